"""Options that several commands share, each also an environment variable."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cxr_retrieval.settings import DEFAULT_AUDIT, DEFAULT_MILVUS, DEFAULT_TRITON, MilvusSettings, TritonSettings

_SERVER: Final = "Servers"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Repository = Annotated[
    Path | None,
    typer.Option("--repository", envvar="CXR_REPOSITORY", help="Production model repository.", show_default="the one that ships"),
]
Audit = Annotated[Path, typer.Option("--audit", envvar="CXR_AUDIT", help="Log that names what was removed, when and by whom.")]

AUDIT_DEFAULT = DEFAULT_AUDIT

_Timeout = Annotated[float, typer.Option("--timeout", envvar="CXR_TIMEOUT", help="Deadline of one call, seconds.", rich_help_panel=_SERVER)]


def _triton(
    triton: Annotated[
        str, typer.Option("--triton", envvar="CXR_TRITON", help="Triton's gRPC endpoint, host:port.", rich_help_panel=_SERVER)
    ] = DEFAULT_TRITON,
    timeout: _Timeout = 60.0,
) -> TritonSettings:
    return TritonSettings(triton, timeout)


def _milvus(
    timeout: _Timeout = 60.0,
    milvus: Annotated[
        str,
        typer.Option("--milvus", envvar="CXR_MILVUS", help="Milvus URI, or a Milvus Lite path ending in .db.", rich_help_panel=_SERVER),
    ] = DEFAULT_MILVUS,
    milvus_user: Annotated[str, typer.Option(envvar="CXR_MILVUS_USER", help="User name.", rich_help_panel=_SERVER)] = "",
    milvus_password: Annotated[str, typer.Option(envvar="CXR_MILVUS_PASSWORD", help="Password.", rich_help_panel=_SERVER)] = "",
    milvus_token: Annotated[
        str, typer.Option(envvar="CXR_MILVUS_TOKEN", help="Token, instead of user and password.", rich_help_panel=_SERVER)
    ] = "",
    milvus_database: Annotated[str, typer.Option(envvar="CXR_MILVUS_DATABASE", help="Database name.", rich_help_panel=_SERVER)] = "",
) -> MilvusSettings:
    return MilvusSettings(milvus, milvus_user, milvus_password, milvus_token, milvus_database, timeout)


_MADE_BY: Final[dict[str, Callable[..., Any]]] = {"triton": _triton, "milvus": _milvus}


def with_servers(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, in the place of its parameters `triton: TritonSettings` and `milvus: MilvusSettings`, the options that make them."""
    parameters = inspect.signature(command, eval_str=True).parameters
    makers = {name: inspect.signature(make, eval_str=True).parameters for name, make in _MADE_BY.items() if name in parameters}
    options = {name: option for made in makers.values() for name, option in made.items()}

    @functools.wraps(command)
    def reaching(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in options}
        settings = {name: _MADE_BY[name](**{option: chosen[option] for option in made}) for name, made in makers.items()}
        command(**given, **settings)

    own = [parameter for name, parameter in parameters.items() if name not in makers]
    every = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *options.values())]
    reaching.__signature__ = inspect.Signature(every)  # pyright: ignore[reportAttributeAccessIssue] (how Python lets a function say so)
    reaching.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return reaching
