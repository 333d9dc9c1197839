"""How to reach Triton and Milvus: frozen, checked when made. Every value is also a command-line option and a CXR_ variable."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cxr_retrieval.errors import SetupError

DEFAULT_TRITON: Final = "127.0.0.1:8001"
DEFAULT_MILVUS: Final = "http://127.0.0.1:19530"
DEFAULT_STORE: Final = Path("~/.local/share/cxr-retrieval/gallery.db")
"""Where `cxr serve` keeps the gallery."""
DEFAULT_AUDIT: Final = Path("~/.local/share/cxr-retrieval/audit.jsonl")
"""Where removals are written down."""


@dataclass(frozen=True)
class TritonSettings:
    """`url` is host:port of the gRPC endpoint; `timeout_s` the deadline of one call."""

    url: str = DEFAULT_TRITON
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^/:\s]+):\d{1,5}", self.url):
            raise SetupError(
                "the Triton address is malformed", expected="host:port, such as 127.0.0.1:8001", got=self.url, next_step="correct --triton"
            )
        if self.timeout_s <= 0:
            raise SetupError(
                "the Triton timeout is out of range", expected="more than 0 s", got=f"{self.timeout_s:g}", next_step="correct --timeout"
            )


@dataclass(frozen=True)
class MilvusSettings:
    """`uri` is http(s)://host:port of a server, or the path of a Milvus Lite folder ending in .db.

    `token`, or `user` and `password`, authenticate against a server; they are kept out of `repr`.
    """

    uri: str = DEFAULT_MILVUS
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    database: str = ""
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.is_lite and not re.match(r"(https?|tcp|unix)://", self.uri):
            raise SetupError(
                "the Milvus URI is malformed",
                expected="http://host:port, or a path ending in .db",
                got=self.uri,
                next_step="correct --milvus",
            )
        if self.timeout_s <= 0:
            raise SetupError(
                "the Milvus timeout is out of range", expected="more than 0 s", got=f"{self.timeout_s:g}", next_step="correct the timeout"
            )

    @property
    def is_lite(self) -> bool:
        """Whether this is a local file rather than a server."""
        return self.uri.endswith(".db")
