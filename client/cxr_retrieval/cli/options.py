"""Options that several commands share, each also an environment variable."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cxr_retrieval.cli.watched import Watched, watched
from cxr_retrieval.serving.choices import Segmentation
from cxr_retrieval.settings import (
    DEFAULT_AUDIT,
    DEFAULT_MAPS,
    DEFAULT_MILVUS,
    DEFAULT_PSEUDONYM_KEY,
    DEFAULT_TRITON,
    EngineName,
    EngineSettings,
    InferenceName,
    LogFormat,
    MilvusSettings,
    PseudonymSettings,
    SpaceName,
    TelemetrySettings,
    Tls,
    TritonSettings,
    secret_in,
)

_SERVER: Final = "Servers"
_LOCKED: Final = "Encryption and credentials"
_PSEUDONYMS: Final = "Pseudonyms"
INPUTS: Final = (
    "Radiographs; folders, ZIPs, DICOMDIRs or Parquet files that hold them; quoted patterns such as 'archive/**/*.dcm'; "
    "s3://BUCKET/FOLDER/; manifests (.csv); or - for a list of names on stdin."
)
"""What a PATH may be, where films in bulk are asked for."""
INDEXES: Final = (
    "auto (by size), flat (every case compared; exact), hnsw (a graph in memory), hnsw-sq (the same in less of it; Milvus 2.6) "
    "or diskann (a graph on the server's SSD)."
)
"""What a gallery on a Milvus server can be searched by."""
_SEEN: Final = "Seen from outside"
_CLUSTER: Final = "On a cluster"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Repository = Annotated[
    Path | None,
    typer.Option("--repository", envvar="CXR_REPOSITORY", help="Production model repository.", show_default="the one that ships"),
]
Patience = Annotated[float, typer.Option("--patience", min=0, help="Seconds to wait for a server that is away, from the start on.")]
Audit = Annotated[Path, typer.Option("--audit", envvar="CXR_AUDIT", help="Log of who did what to which cases, and when; see `cxr audit`.")]
Maps = Annotated[Path, typer.Option("--maps", envvar="CXR_MAPS", help="Folder in which maps of galleries are kept.")]

Where = Annotated[
    str,
    typer.Option(
        "--where",
        metavar="EXPR",
        help="Only cases that meet this, such as 'age >= 60 and sex == \"F\" and spo2 < 92 and went_icu'; see docs/asking.md.",
    ),
]
Words = Annotated[
    str,
    typer.Option(
        "--text", metavar="WORDS", help="Only cases whose clinical notes hold all these words, a '\"phrase so\"', and no '-word'."
    ),
]
NoGate = Annotated[bool, typer.Option("--no-gate", help="Take also what looks like no upright frontal chest film.")]

ErrorRate = Annotated[
    float,
    typer.Option("--error-rate", min=0.01, max=0.5, help="Share of the sets of labels that may lack the right one."),
]

Balance = Annotated[
    float,
    typer.Option(
        "--balance",
        min=0,
        max=1,
        help="What counts as like: 0 what was learnt from labels, 1 what lungs look like, between: both, so weighed.",
    ),
]

Space = Annotated[
    SpaceName,
    typer.Option(
        "--space",
        envvar="CXR_SPACE",
        help="Compare films by what the ensemble learnt, or by a further model of the server: its findings, or its films and reports.",
    ),
]

Source = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="NAME",
        envvar="CXR_SOURCE",
        help="The hospital that films come from; its profile votes, if `cxr adapt` has learnt one.",
    ),
]

AUDIT_DEFAULT = DEFAULT_AUDIT
MAPS_DEFAULT = DEFAULT_MAPS
ERROR_RATE_DEFAULT: Final = 0.1
BALANCE_DEFAULT: Final = 0.25
SPACE_DEFAULT: Final = SpaceName.film
PATIENCE_DEFAULT: Final = 3600.0

_Timeout = Annotated[float, typer.Option("--timeout", envvar="CXR_TIMEOUT", help="Deadline of one call, seconds.", rich_help_panel=_SERVER)]


def _triton(
    triton: Annotated[
        str,
        typer.Option(
            "--triton",
            envvar="CXR_TRITON",
            help="Triton's gRPC endpoint, host:port; several with commas, or dns:///name:port.",
            rich_help_panel=_SERVER,
        ),
    ] = DEFAULT_TRITON,
    timeout: _Timeout = 60.0,
    triton_tls: Annotated[
        bool,
        typer.Option(
            "--triton-tls",
            envvar="CXR_TRITON_TLS",
            help="Encrypt; trust public authorities.",
            rich_help_panel=_LOCKED,
            show_default=False,
        ),
    ] = False,
    triton_ca: Annotated[
        Path | None, typer.Option(envvar="CXR_TRITON_CA", help="Encrypt, trusting these authorities (PEM).", rich_help_panel=_LOCKED)
    ] = None,
    triton_cert: Annotated[
        Path | None, typer.Option(envvar="CXR_TRITON_CERT", help="Encrypt, and show this certificate (PEM).", rich_help_panel=_LOCKED)
    ] = None,
    triton_key: Annotated[
        Path | None, typer.Option(envvar="CXR_TRITON_KEY", help="Private key of --triton-cert.", rich_help_panel=_LOCKED)
    ] = None,
    triton_server_name: Annotated[
        str,
        typer.Option(envvar="CXR_TRITON_SERVER_NAME", help="Name in its certificate, if another.", rich_help_panel=_LOCKED),
    ] = "",
    triton_token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_TRITON_TOKEN_FILE",
            help="File with a bearer token for a proxy before Triton; or CXR_TRITON_TOKEN holds it.",
            rich_help_panel=_LOCKED,
        ),
    ] = None,
    triton_header_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_TRITON_HEADER_FILE",
            help="File with headers for it, a line 'name: value' each; or CXR_TRITON_HEADERS holds them.",
            rich_help_panel=_LOCKED,
        ),
    ] = None,
) -> TritonSettings:
    tls = None
    if triton_tls or triton_ca or triton_cert or triton_key or triton_server_name:
        tls = Tls(triton_ca, triton_cert, triton_key, triton_server_name)
    headers = secret(triton_header_file, "CXR_TRITON_HEADERS").splitlines()
    pairs = tuple((name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in headers if line.strip()))
    return TritonSettings(triton, timeout, tls, secret(triton_token_file, "CXR_TRITON_TOKEN"), pairs)


def _milvus(
    timeout: _Timeout = 60.0,
    milvus: Annotated[
        str,
        typer.Option("--milvus", envvar="CXR_MILVUS", help="Milvus URI, or a Milvus Lite path ending in .db.", rich_help_panel=_SERVER),
    ] = DEFAULT_MILVUS,
    milvus_database: Annotated[str, typer.Option(envvar="CXR_MILVUS_DATABASE", help="Database name.", rich_help_panel=_SERVER)] = "",
    milvus_ca: Annotated[
        Path | None, typer.Option(envvar="CXR_MILVUS_CA", help="Authorities to trust, for https:// (PEM).", rich_help_panel=_LOCKED)
    ] = None,
    milvus_cert: Annotated[
        Path | None, typer.Option(envvar="CXR_MILVUS_CERT", help="Certificate to show (PEM).", rich_help_panel=_LOCKED)
    ] = None,
    milvus_key: Annotated[
        Path | None, typer.Option(envvar="CXR_MILVUS_KEY", help="Private key of --milvus-cert.", rich_help_panel=_LOCKED)
    ] = None,
    milvus_server_name: Annotated[
        str,
        typer.Option(envvar="CXR_MILVUS_SERVER_NAME", help="Name in its certificate, if another.", rich_help_panel=_LOCKED),
    ] = "",
    milvus_token_file: Annotated[
        Path | None,
        typer.Option(envvar="CXR_MILVUS_TOKEN_FILE", help="File with the token; or CXR_MILVUS_TOKEN holds it.", rich_help_panel=_LOCKED),
    ] = None,
    milvus_user: Annotated[
        str, typer.Option(envvar="CXR_MILVUS_USER", help="User name, instead of a token.", rich_help_panel=_LOCKED)
    ] = "",
    milvus_password_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_MILVUS_PASSWORD_FILE",
            help="File with the user's password; or CXR_MILVUS_PASSWORD holds it.",
            rich_help_panel=_LOCKED,
        ),
    ] = None,
) -> MilvusSettings:
    tls = None
    if milvus_ca or milvus_cert or milvus_key or milvus_server_name:
        tls = Tls(milvus_ca, milvus_cert, milvus_key, milvus_server_name)
    password, token = secret(milvus_password_file, "CXR_MILVUS_PASSWORD"), secret(milvus_token_file, "CXR_MILVUS_TOKEN")
    return MilvusSettings(milvus, milvus_user, password, token, milvus_database, timeout, tls)


def secret(file: Path | None, variable: str) -> str:
    """From a file, or from the environment and then no longer there: what we start afterwards does not inherit it.

    Never from the command line, which the process list shows to everybody on the machine.

    Raises:
        SetupError: The file cannot be read, or there is nothing in it.
    """
    found = os.environ.pop(variable, "").strip()
    return found if file is None else secret_in(file)


def _pseudonyms(
    pseudonym_key: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_PSEUDONYM_KEY_FILE",
            help="File with the key (0600); or CXR_PSEUDONYM_KEY holds it.",
            rich_help_panel=_PSEUDONYMS,
            show_default=f"in {DEFAULT_PSEUDONYM_KEY.parent}",
        ),
    ] = None,
    pseudonym_table: Annotated[
        Path | None,
        typer.Option(
            envvar="CXR_PSEUDONYM_TABLE",
            help="Table that leads back to ids and files.",
            rich_help_panel=_PSEUDONYMS,
            show_default="beside the key",
        ),
    ] = None,
) -> PseudonymSettings:
    return PseudonymSettings(pseudonym_key, pseudonym_table, secret(None, "CXR_PSEUDONYM_KEY"))


def _seen(
    log_format: Annotated[
        LogFormat,
        typer.Option("--log-format", envvar="CXR_LOG_FORMAT", help="json: lines that name no file or patient.", rich_help_panel=_SEEN),
    ] = LogFormat.text,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            envvar="CXR_METRICS",
            metavar="[HOST:]PORT",
            help="Serve Prometheus metrics there while it runs; 0 takes any free port.",
            rich_help_panel=_SEEN,
        ),
    ] = "",
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="CXR_METRICS_INSECURE", help="Let --metrics answer other machines.", rich_help_panel=_SEEN)
    ] = False,
) -> AbstractContextManager[Watched]:
    return watched(TelemetrySettings(log_format, metrics, insecure))


def _engine(
    engine: Annotated[
        EngineName,
        typer.Option("--engine", envvar="CXR_ENGINE", help="Who works on films: this machine, or a Ray cluster.", rich_help_panel=_CLUSTER),
    ] = EngineName.local,
    address: Annotated[
        str,
        typer.Option(
            "--address",
            help="The cluster's head, HOST:PORT or auto; or RAY_ADDRESS says it.",
            show_default="one is started on this machine",
            rich_help_panel=_CLUSTER,
        ),
    ] = "",
    inference: Annotated[
        InferenceName,
        typer.Option("--inference", help="What its workers ask: --triton, or networks that they hold.", rich_help_panel=_CLUSTER),
    ] = InferenceName.triton,
    segmentation: Annotated[
        Segmentation, typer.Option("--segmentation", help="Of networks that they hold, as of `cxr serve`.", rich_help_panel=_CLUSTER)
    ] = Segmentation.ensemble,
) -> EngineSettings:
    given = address or (os.environ.get("RAY_ADDRESS", "") if engine is EngineName.ray else "")
    return EngineSettings(engine, given, inference, segmentation is Segmentation.student)


_MADE_BY: Final[dict[str, Callable[..., Any]]] = {
    "triton": _triton,
    "milvus": _milvus,
    "pseudonyms": _pseudonyms,
    "engine": _engine,
    "seen": _seen,
}


def with_servers(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, in the place of its parameters `triton: TritonSettings`, `milvus: MilvusSettings`,
    `pseudonyms: PseudonymSettings`, `engine: EngineSettings` and `seen: Watched`, the options that make them; it is watched until it
    returns.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    makers = {name: inspect.signature(make, eval_str=True).parameters for name, make in _MADE_BY.items() if name in parameters}
    options = {name: option for made in makers.values() for name, option in made.items()}

    @functools.wraps(command)
    def reaching(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in options}
        settings = {name: _MADE_BY[name](**{option: chosen[option] for option in made}) for name, made in makers.items()}
        with ExitStack() as opened:
            entered = {name: opened.enter_context(settings[name]) for name in settings.keys() & {"seen"}}
            command(**given, **settings | entered)

    own = [parameter for name, parameter in parameters.items() if name not in makers]
    every = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *options.values())]
    reaching.__signature__ = inspect.Signature(every)  # pyright: ignore[reportAttributeAccessIssue] (how Python lets a function say so)
    reaching.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return reaching
