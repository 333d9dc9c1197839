"""A graph over many images on the CPU: OpenVINO, which serves, is about three times as fast as PyTorch there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from cxr_retrieval.progress import track


class CpuEngine:
    """A graph of one input, one image to a thread.

    Not an `ov.AsyncInferQueue`: its last callback may still be waiting for Python's lock when all results are there, and an engine
    dropped in that moment, which holds the lock, waits for the callback for ever (OpenVINO 2026.4).

    Args:
        model: `openvino.Model`, or the path of an ONNX file.
        precision: OpenVINO's hint: f32 or bf16.
    """

    def __init__(self, model: Any, precision: str = "f32") -> None:
        settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"}
        compiled: Any = ov.Core().compile_model(model, "CPU", settings)
        self._streams = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self._streams):
            self._idle.put(compiled.create_infer_request())

    def __call__(self, images: NDArray[np.uint8], what: str = "") -> list[NDArray[Any]]:
        """Every output `[n, …]` of `[n, …]`, in the graph's order; shows progress when told what it is."""
        threads = ThreadPoolExecutor(self._streams)
        try:
            runs = [threads.submit(self._run, images[i : i + 1]) for i in range(len(images))]
            results = [run.result() for run in (track(runs, what) if what else runs)]
        finally:
            threads.shutdown(cancel_futures=True)
        return [np.stack(values) for values in zip(*results, strict=True)]

    def _run(self, image: NDArray[np.uint8]) -> list[NDArray[Any]]:
        request = self._idle.get()
        try:
            return [np.array(values[0]) for values in request.infer({0: image}, share_outputs=True).values()]
        finally:
            self._idle.put(request)
