"""Options that several commands share, each also an environment variable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cxr_retrieval.settings import DEFAULT_AUDIT, DEFAULT_MILVUS, DEFAULT_TRITON

_SERVER = "Servers"

Triton = Annotated[str, typer.Option("--triton", envvar="CXR_TRITON", help="Triton's gRPC endpoint, host:port.", rich_help_panel=_SERVER)]
Timeout = Annotated[float, typer.Option("--timeout", envvar="CXR_TIMEOUT", help="Deadline of one call, seconds.", rich_help_panel=_SERVER)]
Milvus = Annotated[
    str, typer.Option("--milvus", envvar="CXR_MILVUS", help="Milvus URI, or a Milvus Lite path ending in .db.", rich_help_panel=_SERVER)
]
MilvusUser = Annotated[str, typer.Option("--milvus-user", envvar="CXR_MILVUS_USER", help="User name.", rich_help_panel=_SERVER)]
MilvusPassword = Annotated[str, typer.Option("--milvus-password", envvar="CXR_MILVUS_PASSWORD", help="Password.", rich_help_panel=_SERVER)]
MilvusToken = Annotated[
    str, typer.Option("--milvus-token", envvar="CXR_MILVUS_TOKEN", help="Token, instead of user and password.", rich_help_panel=_SERVER)
]
MilvusDatabase = Annotated[
    str, typer.Option("--milvus-database", envvar="CXR_MILVUS_DATABASE", help="Database name.", rich_help_panel=_SERVER)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Repository = Annotated[
    Path | None,
    typer.Option("--repository", envvar="CXR_REPOSITORY", help="Production model repository.", show_default="the one that ships"),
]
Audit = Annotated[Path, typer.Option("--audit", envvar="CXR_AUDIT", help="Log that names what was removed, when and by whom.")]

TRITON_DEFAULT = DEFAULT_TRITON
MILVUS_DEFAULT = DEFAULT_MILVUS
TIMEOUT_DEFAULT = 60.0
AUDIT_DEFAULT = DEFAULT_AUDIT
