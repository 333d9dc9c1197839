"""The gRPC client of the ensemble: deadlines on every call, a bounded number of requests in flight, checked answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import numpy as np
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential
from tritonclient.utils import InferenceServerException

from cxr_retrieval.contract import (
    BESIDE_ENSEMBLE,
    EMBEDDING,
    ENSEMBLE,
    ENSEMBLE_OUTPUTS,
    IMAGE,
    MODEL_VERSION_PARAMETER,
    LeafSpec,
    TensorSpec,
)
from cxr_retrieval.errors import (
    AccessError,
    InferenceError,
    OverloadedError,
    ServerDownError,
    ServerFaultError,
    UnusableOutputError,
)
from cxr_retrieval.handshake import refusal
from cxr_retrieval.inference.balancing import Balanced
from cxr_retrieval.inference.trace import Trace
from cxr_retrieval.settings import Tls, TritonSettings

BATCH_SIZE: Final = 8
"""Radiographs per request in bulk work; the ensemble itself never batches, its steps do."""

TRUSTED_S: Final = 1.0
"""How long an answer is taken to come from the weights that were last announced: no Triton restarts and loads others within."""

Images = NDArray[np.uint8]
Outputs = dict[str, NDArray[np.generic]]

_START: Final = "start one with `cxr serve`, or give --triton"
_CHANNEL: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 10_000),  # of 120 s, as gRPC has it, a server that is back would be noticed two minutes late
)
_NO_ANSWER: Final = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")


class _Credentials(grpcclient.InferenceServerClientPlugin):
    """Adds to every request what a proxy before Triton wants to see."""

    def __init__(self, settings: TritonSettings) -> None:
        self._settings = settings

    def __call__(self, request: grpcclient.Request) -> None:
        request.headers = {**request.headers, **self._settings.metadata}


def open_channel(settings: TritonSettings) -> grpcclient.InferenceServerClient:
    """A bare client that connects at its first request, encrypted and with credentials as the settings say."""
    tls = settings.tls or Tls()
    named = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    client = grpcclient.InferenceServerClient(
        settings.url,
        ssl=settings.tls is not None,
        root_certificates=tls.ca,
        private_key=tls.key,
        certificate_chain=tls.certificate,
        channel_args=[*_CHANNEL, *named],
    )
    client.register_plugin(_Credentials(settings))
    return client


class TritonClient:
    """A long-lived connection; one per process. Use as a context manager.

    Raises:
        InferenceError: Server down, or the ensemble not ready.
        AccessError: It refuses us, or its certificate is not accepted.
    """

    def __init__(self, settings: TritonSettings) -> None:
        self._settings = settings
        self._client: Any = Balanced(settings, open_channel) if settings.several else open_channel(settings)
        self._further: dict[str, str] = {}
        self._retried = Retrying(
            retry=retry_if_exception_type(OverloadedError),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            stop=stop_after_delay(settings.timeout_s),
            reraise=True,
        )
        try:
            self.model_version = self._announced_version()
            self._announced_at = time.monotonic()
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel."""
        self._client.close()

    def probe(self) -> None:
        """Asks whether the server still serves what it did; vectors of other weights must not meet this version's gallery.

        Raises:
            ServerDownError: Not there yet.
            AccessError: There, but it no longer lets us in.
            InferenceError: It serves other weights now.
        """
        versions = {ENSEMBLE: self.model_version, **self._further}
        for model, known in versions.items():
            version = self._announced_version() if model == ENSEMBLE else self._further_version(model)
            if version != known:
                raise InferenceError(
                    f"Triton at {self._settings.url} serves other weights than before",
                    expected=known,
                    got=version,
                    next_step="serve the former weights, or begin anew with these",
                )
        self._announced_at = time.monotonic()

    def infer(
        self,
        images: Images,
        outputs: Sequence[TensorSpec] = ENSEMBLE_OUTPUTS,
        on_overload: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
    ) -> Outputs:
        """Runs the ensemble on `[n, 1, 256, 256]` uint8; only the steps that the wanted outputs need are executed.

        Args:
            outputs: Of the ensemble, and of the models that are asked about a film beside it.
            on_overload: Told each time the server had no room, before it is asked again.
            trace: What the request is known by, in Triton's own log and trace.

        Returns:
            Output name → array `[n, ...]`.

        Raises:
            InferenceError: Down, failed, deadline exceeded, still overloaded after as long, other weights than before, or an answer of
                the wrong shape or with NaN.
        """
        found: Outputs = {}
        for model, wanted in _by_model(outputs).items():
            found |= self._ask(model, {IMAGE: images}, wanted, on_overload, trace)
        if time.monotonic() > self._announced_at + TRUSTED_S:
            self.probe()
        return found

    def infer_further(self, leaf: LeafSpec, inputs: Sequence[NDArray[np.generic]]) -> Outputs:
        """Runs a model that is no step of the ensemble on inputs `[n, ...]` in the order of its tensors.

        Raises:
            InferenceError: As `infer`.
        """
        return self._ask(leaf.name, dict(zip(leaf.inputs, inputs, strict=True)), leaf.outputs)

    def version_of(self, model: str) -> str:
        """The version of a further model's weights; that they stay the same is seen to from then on, as with the ensemble's.

        Raises:
            InferenceError: It is not served, or does not say which weights it has.
        """
        self._further[model] = self._further_version(model)
        return self._further[model]

    def _further_version(self, model: str) -> str:
        parameters = self.parameters(model)
        if parameters is None:
            raise InferenceError(f"the server has no model {model}", next_step=f"serve one: `cxr serve --{model.partition('_')[0]} FOLDER`")
        version = parameters.get(MODEL_VERSION_PARAMETER)
        if not version:
            raise InferenceError(
                f"the model {model} does not say which weights it has",
                expected=f"parameter {MODEL_VERSION_PARAMETER} in its config.pbtxt",
                next_step="build it anew with `cxr build`",
            )
        return version

    def parameters(self, model: str) -> Mapping[str, str] | None:
        """What a model's configuration says under `parameters`; None if no such model is ready.

        Raises:
            InferenceError: Triton cannot serve.
        """
        try:
            if not self._client.is_model_ready(model, client_timeout=self._settings.timeout_s):
                return None
            config: Any = self._client.get_model_config(model, client_timeout=self._settings.timeout_s)
        except InferenceServerException as error:
            raise self._translate(error) from error
        return {key: value.string_value for key, value in config.config.parameters.items()}

    def _ask(
        self,
        model: str,
        inputs: Mapping[TensorSpec, NDArray[np.generic]],
        outputs: Sequence[TensorSpec],
        on_overload: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
    ) -> Outputs:
        tensors = [grpcclient.InferInput(spec.name, list(values.shape), spec.dtype) for spec, values in inputs.items()]
        for tensor, values in zip(tensors, inputs.values(), strict=True):
            tensor.set_data_from_numpy(values)
        wanted = [grpcclient.InferRequestedOutput(output.name) for output in outputs]
        result: Any = self._retried.copy(before_sleep=lambda _: on_overload())(self._request, model, tensors, wanted, trace)
        count = len(next(iter(inputs.values())))
        return {output.name: self._checked(output, result.as_numpy(output.name), count) for output in outputs}

    def _request(
        self, model: str, tensors: list[grpcclient.InferInput], wanted: list[grpcclient.InferRequestedOutput], trace: Trace | None
    ) -> Any:
        request_id, headers = (trace.trace_id, {"traceparent": trace.traceparent}) if trace else ("", None)
        deadline_s = self._settings.timeout_s
        try:
            return self._client.infer(model, tensors, outputs=wanted, request_id=request_id, headers=headers, client_timeout=deadline_s)
        except InferenceServerException as error:
            raise self._translate(error, model) from error

    def embed(self, images: Images) -> NDArray[np.float32]:
        """Embeddings `[n, 64]` of unit length; the attention map is not computed."""
        return np.asarray(self.infer(images, (EMBEDDING,))[EMBEDDING.name], np.float32)

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

    def _announced_version(self) -> str:
        """The version of the weights, once the ensemble is ready."""
        url, timeout_s = self._settings.url, self._settings.timeout_s
        try:
            if not self._client.is_model_ready(ENSEMBLE, client_timeout=timeout_s):
                raise ServerDownError(
                    f"the model {ENSEMBLE} at {url} is not ready",
                    expected="all four models loaded",
                    got=self._reasons(),
                    next_step="wait until the server has started, or repair that model",
                )
            config: Any = self._client.get_model_config(ENSEMBLE, client_timeout=timeout_s)
        except InferenceServerException as error:
            raise self._translate(error) from error
        version = config.config.parameters[MODEL_VERSION_PARAMETER].string_value
        if not version:  # a gallery of such embeddings could hold any weights'
            raise InferenceError(
                f"the model {ENSEMBLE} at {url} does not say which weights it has",
                expected=f"parameter {MODEL_VERSION_PARAMETER} in its config.pbtxt",
                next_step="serve a repository of `cxr build repository`",
            )
        return version

    def _reasons(self) -> str:
        index: Any = self._client.get_model_repository_index(client_timeout=self._settings.timeout_s)
        return (
            "; ".join(f"{model.name} {model.state or 'UNKNOWN'} {model.reason}".strip() for model in index.models if model.state != "READY")
            or "no such model"
        )

    def _translate(self, error: InferenceServerException, model: str = ENSEMBLE) -> InferenceError:
        """By gRPC status. UNAVAILABLE is what a full queue gives, a failed handshake, and no server at all: then it is asked which."""
        url, status = self._settings.url, _status(error)
        reason = self._settings.without_secrets(" ".join(str(error.message()).split()))[:300]
        if status in _NO_ANSWER and not self._lives():
            if refused := refusal(*self._settings.host_and_port, self._settings.tls):
                return AccessError(
                    f"no trusted connection to Triton at {url}", got=refused.why, next_step=f"{refused.next_step} (--triton-…)"
                )
            return ServerDownError(f"no Triton server answers at {url}", got=reason, next_step=_START)
        if status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            return OverloadedError(f"Triton at {url} has no room for this request now", got=reason, next_step="send less at once, or later")
        if status in ("DEADLINE_EXCEEDED", "CANCELLED"):
            return ServerFaultError(
                f"Triton at {url} took too long",
                expected=f"an answer within {self._settings.timeout_s:g} s",
                got=reason,
                next_step="give a longer --timeout, or send less at once",
            )
        if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return AccessError(
                f"Triton at {url} refused access",
                expected="other credentials" if self._settings.metadata else "credentials, and none were sent",
                got=reason,
                next_step="give what the proxy before it asks for: --triton-token-file, --triton-header-file",
            )
        if status == "NOT_FOUND":
            return ServerDownError(
                f"Triton at {url} does not serve {model} now",
                expected="all four models loaded",
                got=reason,
                next_step="load them, or check its repository",
            )
        if status == "UNIMPLEMENTED":
            return InferenceError(f"what answers at {url} is no Triton", expected="the KServe v2 protocol", got=reason, next_step=_START)
        if status == "INVALID_ARGUMENT":
            return UnusableOutputError(f"Triton at {url} refused the request", got=reason, next_step="see the server's log")
        return ServerFaultError(
            f"Triton at {url} failed", got=reason or status, next_step="see the server's log; out of memory, send smaller batches"
        )

    def _lives(self) -> bool:
        try:
            return bool(self._client.is_server_live(client_timeout=5.0))
        except InferenceServerException as error:
            return _status(error) not in _NO_ANSWER


def _by_model(outputs: Sequence[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """Model → which of its outputs are wanted; the ensemble's, whatever nobody else has."""
    of = {output: leaf.name for leaf in BESIDE_ENSEMBLE for output in leaf.outputs}
    wanted: dict[str, list[TensorSpec]] = {}
    for output in outputs:
        wanted.setdefault(of.get(output, ENSEMBLE), []).append(output)
    return wanted


def _status(error: InferenceServerException) -> str:
    """The name of its gRPC status."""
    return str(error.status() or "").rpartition(".")[2]
