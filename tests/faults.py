"""A gRPC proxy before the real Triton that fails, delays or records what passes, by method; whatever it lets through, it does not look at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

Request = Any
"""KServe's ModelInferRequest, as Triton's own client writes it."""
_INFER: Any = vars(service_pb2)["ModelInferRequest"]
Harm = Callable[[Request], grpc.StatusCode | None]


def nothing(_: Request) -> grpc.StatusCode | None:
    """No request fails."""
    return None


@dataclass
class Proxy:
    """`harm`: what becomes of an inference; None lets it through. `delay_s`: how long each one is held up. `asked`: those that came."""

    address: str = ""
    harm: Harm = nothing
    delay_s: float = 0.0
    asked: list[tuple[Request, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def count(self) -> int:
        """Inferences asked for so far."""
        with self.lock:
            return len(self.asked)


@contextmanager
def before(target: str, port: int = 0) -> Generator[Proxy]:
    """A proxy before the server at `target`, on a free port unless one is given."""
    proxy = Proxy()
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(target, unlimited) as channel:

        class Handler(grpc.GenericRpcHandler):
            def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
                method: str = handler_call_details.method  # pyright: ignore[reportAssignmentType]
                onwards = channel.unary_unary(method)

                def pass_on(message: bytes, context: grpc.ServicerContext) -> bytes:
                    metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
                    if method.endswith("/ModelInfer"):
                        request = _INFER.FromString(message)
                        with proxy.lock:
                            proxy.asked.append((request, metadata))
                        status = proxy.harm(request)
                        time.sleep(proxy.delay_s)
                        if status is not None:
                            context.abort(status, "the proxy of a test fails this")
                    try:
                        return onwards(message, timeout=context.time_remaining())
                    except grpc.RpcError as error:
                        status, words = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
                        context.abort(status, words or "")
                        raise

                return grpc.unary_unary_rpc_method_handler(pass_on)

        with ThreadPoolExecutor(40) as pool:
            server = grpc.server(pool, [Handler()], options=unlimited)
            port = server.add_insecure_port(f"127.0.0.1:{port}")
            proxy.address = f"127.0.0.1:{port}"
            server.start()
            try:
                yield proxy
            finally:
                server.stop(0).wait()
