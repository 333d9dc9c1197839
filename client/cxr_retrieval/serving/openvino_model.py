"""Triton Python-backend model that runs one ONNX graph with OpenVINO. Copied as `model.py` into each embedded leaf."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openvino as ov
import triton_python_backend_utils as pb_utils  # exists inside Triton only


class TritonPythonModel:
    """Runs the requests Triton hands over together as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles the graph; a failure here is what the server reports as the reason for the model being unavailable."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        core = ov.Core()
        graph = core.read_model(parameters["onnx"])
        settings = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[parameters["precision"]],
            "INFERENCE_NUM_THREADS": int(parameters["threads"]),
            "NUM_STREAMS": 1,
        }
        self._request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One inference for all requests; a batch with NaN or infinity is answered with an error, never passed on."""
        parts = [[pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs] for request in requests]
        sizes = [part[0].shape[0] for part in parts]
        batch = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(self._inputs)}
        results = self._request.infer(batch)
        outputs = {name: results[name] for name in self._outputs}
        responses, start = [], 0
        for size in sizes:
            tensors, bad = [], []
            for name, values in outputs.items():
                mine = np.ascontiguousarray(values[start : start + size])
                if mine.dtype.kind == "f" and not np.isfinite(mine).all():
                    bad.append(name)
                tensors.append(pb_utils.Tensor(name, mine))
            if bad:
                error = pb_utils.TritonError(f"{', '.join(bad)} is not finite")
                responses.append(pb_utils.InferenceResponse(error=error))
            else:
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start += size
        return responses
