"""How to reach Triton and Milvus, where the key of pseudonyms is, what is kept of a film, and how a run is seen: frozen, checked when made.

Every value is also a command-line option and a CXR_ variable. Secrets are values here, never options: they come from a file or the
environment, and stay out of `repr`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cxr_retrieval.errors import SetupError, UsageError

DEFAULT_TRITON: Final = "127.0.0.1:8001"
DNS: Final = "dns:///"
"""Before an address whose name stands for several servers, as gRPC has it."""
DEFAULT_MILVUS: Final = "http://127.0.0.1:19530"
DEFAULT_STORE: Final = Path("~/.local/share/cxr-retrieval/gallery.db")
"""Where `cxr serve` keeps the gallery."""
DEFAULT_AUDIT: Final = Path("~/.local/share/cxr-retrieval/audit.jsonl")
"""Where it is written down who did what."""
DEFAULT_MAPS: Final = Path("~/.local/share/cxr-retrieval/maps")
"""Where maps of galleries are kept."""
DEFAULT_SPOOL: Final = Path("~/.local/share/cxr-retrieval/spool")
"""Where a DICOM node keeps what waits."""
DEFAULT_PSEUDONYM_KEY: Final = Path("~/.local/share/cxr-retrieval/pseudonym.key")
"""Made by the first ingest; the table that leads back lies beside it."""
MIN_KEY_CHARACTERS: Final = 32
"""Of a pseudonym key; as hex digits, 128 bits. `cxr ingest` makes one of 64."""


@dataclass(frozen=True)
class Tls:
    """What each side of an encrypted connection shows the other; PEM files.

    Args:
        ca: Authorities that must have signed the other side's certificate; None: the public ones that gRPC knows.
        certificate: Our own, with what chains it to its authority. A client needs one where the server asks for it (mutual TLS).
        key: Its private key, without a passphrase.
        server_name: In the server's certificate, where that is not the host in its address.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise SetupError(
                "a certificate and its private key go together",
                expected="both, or neither",
                got="only the key" if self.certificate is None else "only the certificate",
                next_step="give the other one, too",
            )
        self.context()

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS, as a client.

        Raises:
            SetupError: A file is missing, not readable, no PEM, or the key is not the certificate's.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:  # ssl.SSLError is one, too
            raise _unusable(self.ca or Path(), "PEM certificates of authorities", error) from error
        if self.certificate is not None and self.key is not None:
            for path in (self.certificate, self.key):
                try:
                    path.read_bytes()
                except OSError as error:
                    raise _unusable(path, "a PEM file", error) from error
            try:
                context.load_cert_chain(self.certificate, self.key, password=lambda: "")  # or it would ask at the terminal
            except (OSError, ValueError) as error:
                raise _unusable(self.certificate, f"a PEM certificate whose private key, not encrypted, is {self.key}", error) from error
        return context

    def server_context(self) -> ssl.SSLContext:
        """For a server of ours, of TLS 1.2 or 1.3 (BCP 195): who connects must show a certificate of `ca`, if there is one.

        Raises:
            SetupError: There is no certificate to serve with.
        """
        if self.certificate is None or self.key is None:
            raise SetupError("no certificate to serve with", expected="a certificate and its private key", next_step="give both")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        if self.ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def secret_in(file: Path) -> str:
    """What a file holds, without space around it.

    Raises:
        SetupError: It cannot be read, or there is nothing in it.
    """
    try:
        found = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "bytes that are no text"
        raise SetupError(f"{file}: cannot be read", expected="a secret", got=said or "", next_step="correct that file") from None
    if not found:
        raise SetupError(f"{file}: empty", expected="a secret", next_step="correct that file")
    return found


def _unusable(path: Path, expected: str, error: Exception) -> SetupError:
    said = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else str(error)
    return SetupError(f"{path}: not usable for TLS", expected=expected, got=said or type(error).__name__, next_step="correct that file")


@dataclass(frozen=True)
class TritonSettings:
    """How to reach Triton.

    Args:
        url: host:port of the gRPC endpoint; of several, with commas between; `dns:///name:port`: of every address that the name has.
        timeout_s: Deadline of one call.
        tls: None where the connection is not encrypted.
        token: For a proxy before it, sent as `authorization: Bearer …`.
        headers: Further ones for such a proxy; names in lower case, values may be secret.
    """

    url: str = DEFAULT_TRITON
    timeout_s: float = 60.0
    tls: Tls | None = None
    token: str = field(default="", repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not all(re.fullmatch(r"(dns:///)?(\[[0-9a-fA-F:]+\]|[^/:\s@,]+):\d{1,5}", address) for address in self.addresses):
            raise SetupError(
                "the Triton address is malformed",
                expected="host:port, such as 127.0.0.1:8001; several with commas between",
                got=_without_credentials(self.url),
                next_step="correct --triton",
            )
        if self.timeout_s <= 0:
            raise SetupError(
                "the Triton timeout is out of range", expected="more than 0 s", got=f"{self.timeout_s:g}", next_step="correct --timeout"
            )
        for name, value in self.metadata.items():
            named = re.fullmatch(r"[a-z0-9_.-]+", name) is not None  # else it may be a secret that slipped into the wrong place
            if not named or name.endswith("-bin") or not re.fullmatch(r"[ -~]+", value):
                raise SetupError(
                    f"the header {name!r} for Triton's proxy cannot be sent" if named else "a header for Triton's proxy has no name",
                    expected="a name in lower case, and a value of printable ASCII",
                    next_step="correct --triton-token-file or --triton-header-file",
                )
        if self.metadata and self.tls is None and not all(is_loopback(_parted(address)[0]) for address in self.addresses):
            raise _in_the_open("Triton", self.url, "give --triton-ca or --triton-tls")

    @property
    def addresses(self) -> tuple[str, ...]:
        """The endpoints in `url`."""
        return tuple(address.strip() for address in self.url.split(","))

    @property
    def several(self) -> bool:
        """Whether there is, or may be, more than one server."""
        return len(self.addresses) > 1 or self.url.startswith(DNS)

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The first address in its parts."""
        return _parted(self.addresses[0])

    @property
    def metadata(self) -> dict[str, str]:
        """What every request carries."""
        return {**dict(self.headers), **({"authorization": f"Bearer {self.token}"} if self.token else {})}

    def without_secrets(self, text: str) -> str:
        """What a server or a proxy said, should it have repeated a secret."""
        return _masked(text, self.token, *(value for _, value in self.headers))


@dataclass(frozen=True)
class MilvusSettings:
    """How to reach Milvus.

    Args:
        uri: http(s)://host:port of a server, or the path of a Milvus Lite folder ending in .db. https is TLS.
        user: With `password`, for a server that wants to know; or `token`.
        timeout_s: Deadline of one call.
        tls: For https; None: trust in the public authorities alone.
    """

    uri: str = DEFAULT_MILVUS
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    database: str = ""
    timeout_s: float = 30.0
    tls: Tls | None = None

    def __post_init__(self) -> None:
        if not self.is_lite and (not re.match(r"(https?|tcp|unix)://", self.uri) or "@" in self.uri):
            raise SetupError(
                "the Milvus URI is malformed",
                expected="http://host:port, https://host:port, or a path ending in .db; credentials apart",
                got=_without_credentials(self.uri),
                next_step="correct --milvus; a user's name is --milvus-user",
            )
        if self.timeout_s <= 0:
            raise SetupError(
                "the Milvus timeout is out of range", expected="more than 0 s", got=f"{self.timeout_s:g}", next_step="correct the timeout"
            )
        if self.tls is not None and not (self.secure or self.is_lite):
            raise SetupError(
                "certificates for a Milvus that is reached without TLS",
                expected="https://host:port",
                got=self.uri,
                next_step="correct --milvus, or leave the certificates out",
            )
        if self.tls is not None and self.tls.certificate is not None and self.tls.ca is None:  # pymilvus would not send it
            raise SetupError(
                "a client certificate for Milvus without its authority", expected="a CA file, too", next_step="give --milvus-ca"
            )
        local = self.is_lite or self.uri.startswith("unix:") or is_loopback(self.host_and_port[0])
        if (self.token or self.password) and not (self.secure or local):
            raise _in_the_open("Milvus", self.uri, "write https:// in --milvus, with --milvus-ca")

    @property
    def is_lite(self) -> bool:
        """Whether this is a local file rather than a server."""
        return self.uri.endswith(".db")

    @property
    def secure(self) -> bool:
        """Whether the connection is encrypted."""
        return self.uri.startswith("https://")

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Of a server."""
        parts = urlsplit(self.uri)
        return parts.hostname or "localhost", parts.port or (443 if self.secure else 19530)

    def without_secrets(self, text: str) -> str:
        """What a server said, should it have repeated a secret."""
        return _masked(text, self.token, self.password)


def _parted(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix(DNS).rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_the_open(service: str, address: str, next_step: str) -> SetupError:
    return SetupError(
        f"a secret for {service} at {address} would cross the network unencrypted",
        expected="TLS, or a server on this machine",
        next_step=f"{next_step}; or reach it through a tunnel that ends at 127.0.0.1",
    )


def _without_credentials(address: str) -> str:
    before, at, host = address.rpartition("@")
    return f"***@{host}" if at and before else address


def _masked(text: str, *secrets: str) -> str:
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


@dataclass(frozen=True)
class PseudonymSettings:
    """The key under which ids become pseudonyms, and the table that leads back.

    Attributes:
        key_file: Holds the key, readable by its owner alone; an ingest makes it if it is not there. None: `key`, or else
            DEFAULT_PSEUDONYM_KEY.
        table: SQLite file, made with rights 0600; None: beside the key's file.
        key: The key itself, if there is no `key_file`; by default what the environment gives as CXR_PSEUDONYM_KEY. Kept out of `repr`.
    """

    key_file: Path | None = None
    table: Path | None = None
    key: str = field(default_factory=lambda: os.environ.get("CXR_PSEUDONYM_KEY", ""), repr=False)

    def __post_init__(self) -> None:
        if self.key and len(self.key) < MIN_KEY_CHARACTERS:
            raise SetupError(
                "the pseudonym key is too short",
                expected=f"at least {MIN_KEY_CHARACTERS} random characters in CXR_PSEUDONYM_KEY",
                got=f"{len(self.key)}",
                next_step="make one with `openssl rand -hex 32`",
            )


class EngineName(str, Enum):
    """What takes films in bulk through: this process, or a Ray cluster."""

    local = "local"
    ray = "ray"


class InferenceName(str, Enum):
    """What the workers of a cluster ask: Triton servers, or networks that they hold themselves."""

    triton = "triton"
    openvino = "openvino"
    tensorrt = "tensorrt"


@dataclass(frozen=True)
class EngineSettings:
    """Where films in bulk are worked on.

    Args:
        address: Of the cluster, as Ray has it; empty: one is started on this machine, for as long as the command runs.
        inference: What its workers ask.
        student: Networks of its workers: the small one finds the lungs.
    """

    name: EngineName = EngineName.local
    address: str = ""
    inference: InferenceName = InferenceName.triton
    student: bool = False

    @property
    def asks_triton(self) -> bool:
        """Whether a Triton server says what networks say."""
        return self.inference is InferenceName.triton

    @property
    def on_gpus(self) -> bool:
        """Whether each worker's networks need a GPU."""
        return self.inference is InferenceName.tensorrt

    def __post_init__(self) -> None:
        if self.name is EngineName.local and (self.address or not self.asks_triton):
            raise UsageError(
                "--address and --inference are of a cluster",
                expected="--engine ray beside them",
                got="--engine local",
                next_step="give --engine ray, or leave them out",
            )
        if self.student and self.asks_triton:
            raise UsageError(
                "--segmentation is of networks in the workers",
                expected="--inference openvino or tensorrt",
                got="--inference triton, whose server has chosen",
                next_step="leave it out, or start the server with it",
            )


class ThumbnailKind(str, Enum):
    """What an ingest keeps of a film beside its embedding: nothing, the 256×256 picture with all outside the lungs black, or all of it."""

    none = "none"
    lungs = "lungs"
    full = "full"


class Method(str, Enum):
    """How the cases of an answer are found: the nearest of all, or those of the closest clusters (`retrieval/clusters.py`)."""

    nearest = "nearest"
    cluster = "cluster"


class IndexName(str, Enum):
    """By what a gallery on a Milvus server is searched (`gallery/indexes.py`). `auto`: what fits how many cases there are."""

    auto = "auto"
    flat = "flat"
    hnsw = "hnsw"
    hnsw_sq = "hnsw-sq"
    diskann = "diskann"


class SpaceName(str, Enum):
    """By which vectors films are compared (`gallery/spaces.py`): the ensemble's, or those of a further model that is served."""

    film = "film"
    findings = "findings"
    reports = "reports"


class Match(str, Enum):
    """What of the cases is compared in the space of reports."""

    film = "film"
    report = "report"


class LogFormat(str, Enum):
    """Of what a command says on stderr."""

    text = "text"
    json = "json"


@dataclass(frozen=True)
class TelemetrySettings:
    """`metrics`: where Prometheus may ask, as host:port, or a port of this machine; empty: nowhere. `insecure`: anybody may ask."""

    log_format: LogFormat = LogFormat.text
    metrics: str = ""
    insecure: bool = False

    def __post_init__(self) -> None:
        if not self.metrics:
            return
        host, port = self._parts()
        try:
            ipaddress.ip_address(host)
        except ValueError:
            port = -1
        if not 0 <= port < 65536:
            raise SetupError(
                "the address for metrics is malformed",
                expected="an IP address and a port, such as 127.0.0.1:9108, or a port alone",
                got=self.metrics,
                next_step="correct --metrics",
            )
        if not is_loopback(host) and not self.insecure:
            raise SetupError(
                "metrics would be served beyond this machine",
                expected="a loopback address: there is neither TLS nor a password before them",
                got=host,
                next_step="give 127.0.0.1 and let a proxy reach it, or --insecure where the network is yours alone",
            )

    @property
    def metrics_host(self) -> str:
        """Where to listen; this machine alone if only a port is given."""
        return self._parts()[0]

    @property
    def metrics_port(self) -> int:
        """0: any free one."""
        return self._parts()[1]

    def _parts(self) -> tuple[str, int]:
        host, _, port = self.metrics.rpartition(":")
        host = host.strip("[]") or "127.0.0.1"
        return "127.0.0.1" if host == "localhost" else host, int(port) if port.isascii() and port.isdigit() else -1
