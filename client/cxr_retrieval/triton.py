"""The gRPC client of the ensemble: deadlines on every call, a bounded number of requests in flight, checked answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Final

import numpy as np
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from cxr_retrieval.contract import EMBEDDING, ENSEMBLE, ENSEMBLE_OUTPUTS, IMAGE, MODEL_VERSION_PARAMETER, TensorSpec
from cxr_retrieval.errors import InferenceError, UnusableOutputError
from cxr_retrieval.settings import TritonSettings

BATCH_SIZE: Final = 8
"""Radiographs per request in bulk work; the ensemble itself never batches, its steps do."""

Images = NDArray[np.uint8]
Outputs = dict[str, NDArray[np.generic]]

_START: Final = "start one with `cxr serve`, or give --triton"


class TritonClient:
    """A long-lived connection; one per process. Use as a context manager.

    Raises:
        InferenceError: Server down, or the ensemble not ready.
    """

    def __init__(self, settings: TritonSettings) -> None:
        self._settings = settings
        self._client = grpcclient.InferenceServerClient(settings.url)
        try:
            if not self._client.is_model_ready(ENSEMBLE, client_timeout=settings.timeout_s):
                raise InferenceError(
                    f"the model {ENSEMBLE} at {settings.url} is not ready",
                    expected="all four models loaded",
                    got=self._reasons(),
                    next_step="wait until the server has started, or repair that model",
                )
            config: Any = self._client.get_model_config(ENSEMBLE, client_timeout=settings.timeout_s)
        except InferenceServerException as error:
            self._client.close()
            raise self._translate(error) from error
        except InferenceError:
            self._client.close()
            raise
        self.model_version = config.config.parameters[MODEL_VERSION_PARAMETER].string_value or "unknown"

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel."""
        self._client.close()

    def infer(self, images: Images, outputs: Sequence[TensorSpec] = ENSEMBLE_OUTPUTS) -> Outputs:
        """Runs the ensemble on `[n, 1, 256, 256]` uint8; only the steps that the wanted outputs need are executed.

        Returns:
            Output name → array `[n, ...]`.

        Raises:
            InferenceError: Down, deadline exceeded, or an answer of the wrong shape or with NaN.
        """
        tensor = grpcclient.InferInput(IMAGE.name, list(images.shape), IMAGE.dtype)
        tensor.set_data_from_numpy(images)
        wanted = [grpcclient.InferRequestedOutput(output.name) for output in outputs]
        try:
            result: Any = self._client.infer(ENSEMBLE, [tensor], outputs=wanted, client_timeout=self._settings.timeout_s)
        except InferenceServerException as error:
            raise self._translate(error) from error
        return {output.name: self._checked(output, result.as_numpy(output.name), len(images)) for output in outputs}

    def embed(self, images: Images) -> NDArray[np.float32]:
        """Embeddings `[n, 64]` of unit length; the attention map is not computed."""
        return np.asarray(self.infer(images, (EMBEDDING,))[EMBEDDING.name], np.float32)

    def embed_stream(self, batches: Iterable[Images]) -> Iterator[Future[NDArray[np.float32]]]:
        """Finished futures of each batch's embeddings, in order, with at most `in_flight` requests open.

        Batches are drawn lazily, so the source is read while the server computes; a failed batch fails its own future.
        """
        waiting: deque[Future[NDArray[np.float32]]] = deque()
        with ThreadPoolExecutor(self._settings.in_flight) as pool:
            try:
                for batch in batches:
                    waiting.append(pool.submit(self.embed, batch))
                    if len(waiting) >= self._settings.in_flight:
                        wait([waiting[0]])
                        yield waiting.popleft()
                while waiting:
                    wait([waiting[0]])
                    yield waiting.popleft()
            finally:
                for future in waiting:
                    future.cancel()

    def _checked(self, output: TensorSpec, values: NDArray[np.generic] | None, count: int) -> NDArray[np.generic]:
        shape = (count, *output.shape)
        if values is None or values.shape != shape:
            got = "nothing" if values is None else str(values.shape)
            raise InferenceError(
                f"the server answered {output.name} in another form",
                expected=f"{shape}",
                got=got,
                next_step="serve the models of this version",
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UnusableOutputError(
                f"the server answered {output.name} with NaN or infinity", next_step="check the model's weights and precision"
            )
        return values

    def _reasons(self) -> str:
        index: Any = self._client.get_model_repository_index(client_timeout=self._settings.timeout_s)
        return (
            "; ".join(f"{model.name} {model.state or 'UNKNOWN'} {model.reason}".strip() for model in index.models if model.state != "READY")
            or "no such model"
        )

    def _translate(self, error: InferenceServerException) -> InferenceError:
        status = error.status() or ""
        reason = " ".join(str(error.message()).split())[:300]
        if status.endswith("UNAVAILABLE"):
            return InferenceError(f"no Triton server answers at {self._settings.url}", got=reason, next_step=_START)
        if status.endswith(("DEADLINE_EXCEEDED", "CANCELLED")):
            return InferenceError(
                f"Triton at {self._settings.url} took too long",
                expected=f"an answer within {self._settings.timeout_s:g} s",
                got=reason,
                next_step="give a longer --timeout, or send less at once",
            )
        return UnusableOutputError(f"Triton at {self._settings.url} refused the request", got=reason, next_step="see the server's log")
