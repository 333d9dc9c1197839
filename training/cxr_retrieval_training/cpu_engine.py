"""A graph over many images on the CPU: OpenVINO, which serves, is about three times as fast as PyTorch there."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from cxr_retrieval.progress import track


class CpuEngine:
    """A graph of one input, one image to a thread; compiled for one image, as it is served.

    One thread starts requests and waits for them, in turn. `ov.AsyncInferQueue` says that it is done before its last callback has let
    go of Python's lock, and an engine dropped in that moment, which holds the lock, waits for the callback for ever; and of several
    Python threads the first calls may wait for each other just so, inside OpenVINO's bindings (2026.4).

    Args:
        model: `openvino.Model`, which is reshaped to one image, or the path of an ONNX file.
        precision: OpenVINO's hint: f32 or bf16.
    """

    def __init__(self, model: Any, precision: str = "f32") -> None:
        settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"}
        core = ov.Core()
        graph: Any = model if isinstance(model, ov.Model) else core.read_model(model)
        graph.reshape({tensor: [1, *list(tensor.get_partial_shape())[1:]] for tensor in graph.inputs})
        compiled: Any = core.compile_model(graph, "CPU", settings)
        count = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._requests: list[Any] = [compiled.create_infer_request() for _ in range(count)]

    def __call__(self, images: NDArray[np.uint8], what: str = "") -> list[NDArray[Any]]:
        """Every output `[n, …]` of `[n, …]`, in the graph's order; shows progress when told what it is."""
        results: list[list[NDArray[Any]]] = []
        running: deque[Any] = deque()

        def finish() -> Any:
            request = running.popleft()
            request.wait()
            results.append([np.array(tensor.data[0]) for tensor in request.output_tensors])
            return request

        try:
            for i in track(range(len(images)), what) if what else range(len(images)):
                request = self._requests[i] if i < len(self._requests) else finish()
                request.start_async({0: images[i : i + 1]})
                running.append(request)
            while running:
                finish()
        finally:
            for request in running:
                request.wait()
        return [np.stack(values) for values in zip(*results, strict=True)]
