"""Triton Python-backend model that runs one ONNX graph with OpenVINO. Copied as `model.py` into each embedded leaf.

The graph is compiled twice, each time for one image: of tensors whose shapes it knows OpenVINO fuses more and copies less (a tenth to a
quarter of the time). One image alone gets all cores at once, for the shortest time. Several are dealt out one by one to as many
streams of one thread each: no thread waits for another within an image, so a core that somebody else keeps busy slows down what runs on
it and nothing more, and models of one ensemble that run at the same time share the cores as the kernel sees fit (hence no pinning).

What OpenVINO makes of a graph before it knows of streams takes most of a start. It is made once and read twice; and kept for the next
start, in the folder that `cxr serve` names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import openvino as ov
import triton_python_backend_utils as pb_utils  # exists inside Triton only

_KEPT: Final = 16
"""So many compiled graphs, of 1 to 40 MB, those used last: three leaves, in some precisions, of this version and the one before."""


class TritonPythonModel:
    """Runs the requests Triton hands over together as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles the graph; a failure here is what the server reports as the reason for the model being unavailable."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        threads = int(parameters["threads"])
        core, precision = ov.Core(), {"INFERENCE_PRECISION_HINT": parameters["inference_precision"]}
        compiled = _compiled(core, Path(parameters["onnx"]), precision)
        settings = {**precision, "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        self._alone = core.import_model(compiled, "CPU", {**settings, "NUM_STREAMS": 1}).create_infer_request()
        self._queue = ov.AsyncInferQueue(core.import_model(compiled, "CPU", {**settings, "NUM_STREAMS": threads}), threads)
        self._queue.set_callback(self._keep)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers every request; an image whose result holds NaN or infinity is answered with an error, never passed on."""
        parts = [[pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs] for request in requests]
        images = [{name: part[i][n : n + 1] for i, name in enumerate(self._inputs)} for part in parts for n in range(len(part[0]))]
        results = self._infer(images)
        responses, start = [], 0
        for part in parts:
            mine = results[start : start + len(part[0])]
            start += len(mine)
            outputs = {name: np.concatenate([result[name] for result in mine]) for name in self._outputs}
            bad = [name for name, values in outputs.items() if values.dtype.kind == "f" and not np.isfinite(values).all()]
            if bad:
                error = pb_utils.TritonError(f"{', '.join(bad)} is not finite", pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=error))
            else:
                tensors = [pb_utils.Tensor(name, values) for name, values in outputs.items()]
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

    def _infer(self, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(images) == 1:
            found = self._alone.infer(images[0])
            return [{name: found[name] for name in self._outputs}]
        results: list[Any] = [None] * len(images)
        for i, image in enumerate(images):
            self._queue.start_async(image, (results, i))
        self._queue.wait_all()
        return results

    def _keep(self, request: Any, place: tuple[list[Any], int]) -> None:
        results, i = place
        results[i] = {name: np.array(request.get_tensor(name).data) for name in self._outputs}


def _compiled(core: ov.Core, path: Path, precision: dict[str, str]) -> bytes:
    """The graph as OpenVINO exports it once compiled for one image: as an earlier start left it, or made now and kept.

    Kept behind its SHA-256, in a file named after all that it depends on: another graph, precision, OpenVINO or processor has another.
    """
    graph = path.read_bytes()
    machine = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    about = json.dumps([ov.get_version(), machine, precision]).encode()
    folder = os.environ.get("CXR_COMPILED")
    kept = Path(folder) / f"{hashlib.sha256(about + graph).hexdigest()[:32]}.compiled" if folder else None
    if kept and (found := _found(kept)):
        return found
    model = core.read_model(path)  # of bytes, an error would not name the file
    model.reshape({tensor: [1, *list(tensor.get_partial_shape())[1:]] for tensor in model.inputs})
    stream = io.BytesIO()
    core.compile_model(model, "CPU", precision).export_model(stream)
    made = stream.getvalue()
    if kept:
        try:
            _store(kept, hashlib.sha256(made).digest() + made)
        except OSError as error:
            pb_utils.Logger.log_warn(f"{kept.parent}: compiled graphs are not kept, so the next start takes as long: {error.strerror}")
    return made


def _found(path: Path) -> bytes:
    """Nothing if it is not there, or not what was written."""
    with suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            os.utime(path)
            return content[32:]
    return b""


def _store(path: Path, content: bytes) -> None:
    """Whole or not at all, for two instances may write and read it at once; and forgets what was not used for longest."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
    for other in sorted(path.parent.iterdir(), key=lambda other: -other.stat().st_mtime)[_KEPT:]:
        other.unlink(missing_ok=True)
