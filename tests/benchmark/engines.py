"""The engines called bare in one process, the arithmetic they do, and what this machine can do at most."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from cxr_retrieval.contract import LEAVES, LUNG_SEGMENTATION
from cxr_retrieval.locations import default_repository
from cxr_retrieval.serving.choices import Networks, Precision
from cxr_retrieval.serving.repository import graph_file

CORES: Final = len(os.sched_getaffinity(0))
HINTS: Final = {Precision.fp32: "f32", Precision.bf16: "bf16", Precision.int8: "f32"}
Images = NDArray[np.uint8]


class BareEngines:
    """The three graphs in this process, chained as the ensemble chains them, without any server.

    As fast as they go: many images one to a core, or one image on all cores; compiled for one image.
    """

    def __init__(self, precision: Precision, networks: Networks) -> None:
        self._alone = self._compile(precision, networks, 1)[0]
        self._lanes = self._compile(precision, networks, CORES)

    def one(self, image: Images) -> None:
        """One image `[1, 1, 256, 256]` on all cores."""
        self._chain(self._alone, image)

    def rate(self, images: Images, count: int) -> float:
        """Images per second at saturation: `count` of them, one to a core, each core taking the next when it is done."""
        waiting = itertools.cycle(range(len(images)))
        left = iter(range(count))
        lock = threading.Lock()

        def work(requests: list[Any]) -> None:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                    i = next(waiting)
                self._chain(requests, images[i : i + 1])

        threads = [threading.Thread(target=work, args=(lane,)) for lane in self._lanes]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count / (time.perf_counter() - started)

    @staticmethod
    def _chain(requests: list[Any], image: Images) -> None:
        segmented = requests[0].infer({"IMAGE": image})
        embedded = requests[1].infer({"LUNGS": segmented["LUNGS"]})
        requests[2].infer({"ATTENTION": embedded["ATTENTION"], "MASK": segmented["LUNG_MASK"]})

    @staticmethod
    def _compile(precision: Precision, networks: Networks, streams: int) -> list[list[Any]]:
        """Requests for each stream, by leaf."""
        core = ov.Core()
        compiled = []
        for leaf in LEAVES:
            lowered = precision if leaf.name == LUNG_SEGMENTATION else Precision.fp32
            graph = core.read_model(graph_file(default_repository(), leaf.name, networks, int8=lowered is Precision.int8))
            graph.reshape({tensor: [1, *list(tensor.get_partial_shape())[1:]] for tensor in graph.inputs})
            settings = {"INFERENCE_PRECISION_HINT": HINTS[lowered], "INFERENCE_NUM_THREADS": CORES, "NUM_STREAMS": streams}
            compiled.append(core.compile_model(graph, "CPU", {**settings, "ENABLE_CPU_PINNING": False}))
        return [[model.create_infer_request() for model in compiled] for _ in range(streams)]


def gigaflop(graph: Path) -> float:
    """Multiplications and additions of one image's convolutions and matrix products, in 10⁹ (two for each multiply-add)."""
    model = ov.Core().read_model(graph)
    model.reshape({value.get_any_name(): [1, *list(value.get_partial_shape())[1:]] for value in model.inputs})
    total = 0
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind in ("Convolution", "GroupConvolution"):
            weights, out = node.input(1).get_shape(), node.output(0).get_shape()
            each = np.prod(weights[2 if kind == "GroupConvolution" else 1 :])
            total += 2 * int(np.prod(out)) * int(each)
        elif kind in ("ConvolutionBackpropData", "GroupConvolutionBackpropData"):
            weights, data = node.input(1).get_shape(), node.input(0).get_shape()
            each = np.prod(weights[2 if kind.startswith("Group") else 1 :])
            total += 2 * int(np.prod(data)) * int(each)
        elif kind == "MatMul":
            total += 2 * int(np.prod(node.output(0).get_shape())) * int(node.input(0).get_shape()[-1])
    return total / 1e9


def peak_gigaflops(precision: Precision, size: int = 2048) -> float:
    """GFLOP/s of a large matrix product in this precision on all cores: what engines can be measured against."""
    from openvino import opset13 as ops

    a = ops.parameter([size, size], np.float32, name="a")
    b = ops.constant(np.random.default_rng(0).normal(size=(size, size)).astype(np.float32))
    if precision is Precision.int8:
        scale = [ops.constant(np.array(value, np.float32)) for value in (-4.0, 4.0, -4.0, 4.0)]
        left, right = ops.fake_quantize(a, *scale, levels=256), ops.fake_quantize(b, *scale, levels=255)
    else:
        left, right = a, b
    build: Any = ov.Model  # its stub knows no list of nodes
    model = build([ops.matmul(left, right, transpose_a=False, transpose_b=True)], [a], "product")
    settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": CORES, "NUM_STREAMS": 1}
    request: Any = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    value = np.random.default_rng(1).normal(size=(size, size)).astype(np.float32)
    request.infer({"a": value})
    times = []
    for _ in range(7):
        started = time.perf_counter()
        request.infer({"a": value})
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e9
