"""What a node does with what it receives, as a TOML file says: who may send, which gallery is asked, where answers go, what is kept.

    [node]
    callers = ["CR_ROOM_1", "ARCHIVE"]

    [destinations.archive]
    aet = "ARCHIVE"
    host = "10.0.0.5"
    port = 4242

    [[rules]]
    name = "emergency"
    callers = ["CR_ROOM_1"]
    modalities = ["DX", "CR"]
    where = "age >= 18"
    to = ["archive"]

The first rule that fits an instance counts. Without a file there is one rule: whatever comes is answered into the results alone.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.pacs.dicomweb import Web
from cxr_retrieval.pacs.dimse import Peer, checked_title
from cxr_retrieval.radiograph.header import Header
from cxr_retrieval.radiograph.retained import Deidentification, Retain
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE
from cxr_retrieval.settings import Tls, secret_in

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports] (installed on Python 3.10 only)

SENDER: Final = "sender"
"""In the place of a destination: the one whose AE title is the caller's."""

Title = Annotated[str, AfterValidator(lambda title: checked_title(title, "the rules"))]
Term = Annotated[str, StringConstraints(pattern=r"^[A-Z0-9 _]{1,16}$")]
"""A code string (PS3.5 6.2, VR CS)."""


class Keep(str, Enum):
    """What stays of a received instance once it is answered: nothing, the instance without identities, or the instance as it came."""

    nothing = "nothing"
    deidentified = "deidentified"
    received = "received"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Frozen):
    """What a node lets be asked of it.

    Attributes:
        callers: AE titles that may send; empty: any. addresses: AE title → the only IP address that it may come from.
        associations: At once; a further one is rejected for the time being. pdu_bytes: Of what we let be sent at a time (PS3.8 D.1).
        instance_mib: Of one instance. waiting: Instances without an answer, before further ones are refused (A700).
        free_mib: Of the spool's disk, left alone. idle_s: How long an association may be silent. patience_h: How long a destination that is
            away is tried, before a parcel is given up.
    """

    callers: tuple[Title, ...] = ()
    addresses: dict[Title, str] = {}
    associations: Annotated[int, Field(ge=1, le=200)] = 16
    pdu_bytes: Annotated[int, Field(ge=4096, le=2**20)] = 65_536
    instance_mib: Annotated[int, Field(ge=1, le=1024)] = 256
    waiting: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    free_mib: Annotated[int, Field(ge=1)] = 1024
    idle_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    patience_h: Annotated[float, Field(gt=0)] = 72.0


class Destination(_Frozen):
    """Where answers go: a DICOM peer (`aet`, `host`, `port`) or a DICOMweb server (`web`); secrets stand in files.

    Attributes:
        ca, cert, key: PEM files: authorities that we trust, and what we show. tls: Encrypt, trusting public authorities.
        server_name: In the peer's certificate, if that is not `host`.
        insecure: For `web`: identities may cross the network unencrypted.
    """

    aet: Title = ""
    host: str = ""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    web: str = ""
    user: str = ""
    password_file: Path | None = None
    token_file: Path | None = None
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""
    insecure: bool = False
    timeout_s: Annotated[float, Field(gt=0)] = 30.0

    @model_validator(mode="after")
    def _one_kind(self) -> Destination:
        if bool(self.web) == bool(self.host):
            raise ValueError("give either host, port and aet, or web")
        if self.host and not (self.aet and self.port):
            raise ValueError("a DICOM peer needs host, port and aet")
        return self

    def opened(self) -> Peer | Web:
        """How to reach it.

        Raises:
            SetupError: A file of it cannot be used.
        """
        wanted = self.tls or self.ca or self.cert or self.key or self.server_name
        tls = Tls(self.ca, self.cert, self.key, self.server_name) if wanted else None
        if self.host:
            return Peer(self.aet, self.host, self.port, tls, self.timeout_s)
        return Web(self.web, tls, self.user, _secret(self.password_file), _secret(self.token_file), self.timeout_s, self.insecure)


class Rule(_Frozen):
    """What is done with instances of a kind.

    Attributes:
        callers, modalities, body_parts: Who sent it, Modality (0008,0060), Body Part Examined (0018,0015); empty: any.
        gallery: Milvus URI of the cases to compare with; empty: the node's own. where, text, top_k, source, include_own, gate, error_rate,
            balance: As `cxr batch` has them.
        send: What goes to the destinations named in `to`. to: Names, or "sender".
        forward: Destinations that get the instance itself, de-identified. keep: What stays here. retain: Options of de-identification.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
    callers: tuple[Title, ...] = ()
    modalities: tuple[Term, ...] = ()
    body_parts: tuple[Term, ...] = ()
    gallery: str = ""
    where: str = ""
    text: str = ""
    top_k: Annotated[int, Field(ge=1, le=1000)] = 10
    source: str | None = None
    include_own: bool = False
    gate: bool = True
    error_rate: Annotated[float, Field(ge=0.01, le=0.5)] = DEFAULT_ERROR_RATE
    balance: Annotated[float, Field(ge=0, le=1)] = DEFAULT_BALANCE
    send: tuple[Literal["report", "picture"], ...] = ("report", "picture")
    to: tuple[str, ...] = ()
    forward: tuple[str, ...] = ()
    keep: Keep = Keep.nothing
    retain: frozenset[Retain] = frozenset()

    @model_validator(mode="after")
    def _retained(self) -> Rule:
        if self.retain and not (self.forward or self.keep is Keep.deidentified):
            raise ValueError('retain without keep = "deidentified" or forward')
        Deidentification(b"", self.retain)
        return self

    def fits(self, caller: str, header: Header) -> bool:
        """Whether an instance is of its kind."""
        return (
            (not self.callers or caller in self.callers)
            and (not self.modalities or header.get("Modality") in self.modalities)
            and (not self.body_parts or header.get("BodyPartExamined") in self.body_parts)
        )


class Rules(_Frozen):
    """All of it."""

    node: Limits = Limits()
    destinations: dict[Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")], Destination] = {}
    rules: tuple[Rule, ...] = (Rule(name="all"),)

    @model_validator(mode="after")
    def _known(self) -> Rules:
        if len({rule.name for rule in self.rules}) < len(self.rules):
            raise ValueError("two rules have the same name")
        if SENDER in self.destinations:
            raise ValueError(f'a destination is called "{SENDER}", which means who has sent')
        for rule in self.rules:
            for name in (*rule.to, *rule.forward):
                if name != SENDER and name not in self.destinations:
                    raise ValueError(f'rule "{rule.name}" names the destination "{name}", and there is none of that name')
        return self

    def match(self, caller: str, header: Header) -> Rule | None:
        """The first rule that fits."""
        return next((rule for rule in self.rules if rule.fits(caller, header)), None)

    def named(self, name: str) -> Rule | None:
        """The rule of this name; None: it is no longer there."""
        return next((rule for rule in self.rules if rule.name == name), None)

    def destination_of(self, caller: str) -> str | None:
        """The name of the destination that has this AE title."""
        return next((name for name, one in self.destinations.items() if one.aet == caller), None)

    def addressees(self, names: tuple[str, ...], caller: str) -> list[str]:
        """Destinations by name; "sender" is none where no destination has the caller's AE title."""
        found = [self.destination_of(caller) if name == SENDER else name for name in names]
        return list(dict.fromkeys(name for name in found if name is not None))


def rules_of(keep: str) -> Rules:
    """The one rule of a node without a file.

    Raises:
        UsageError: `keep` is none of `Keep`.
    """
    try:
        return Rules(rules=(Rule(name="all", keep=Keep(keep)),))
    except ValueError as error:
        raise UsageError(
            "--keep cannot be meant", expected=" or ".join(one.value for one in Keep), got=keep, next_step="correct it"
        ) from error


def read_rules(path: Path) -> Rules:
    """The file's rules; its relative paths are relative to its folder.

    Raises:
        UsageError: It cannot be read, or says something that cannot be meant.
    """
    try:
        said = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{path}: the rules cannot be read", expected="a TOML file", got=got, next_step="correct it") from error
    try:
        rules = Rules.model_validate(said)
    except (ValidationError, SetupError, UsageError) as error:
        raise UsageError(
            f"{path}: the rules cannot be meant", expected="what docs/hospital.md shows", got=_told(error), next_step="correct it"
        ) from error
    return rules.model_copy(update={"destinations": {name: _placed(one, path.parent) for name, one in rules.destinations.items()}})


def _placed(destination: Destination, folder: Path) -> Destination:
    files = {name: getattr(destination, name) for name in ("password_file", "token_file", "ca", "cert", "key")}
    return destination.model_copy(update={name: folder / file.expanduser() for name, file in files.items() if file is not None})


def _told(error: ValidationError | SetupError | UsageError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the whole'}: {one['msg']}" for one in error.errors(include_url=False)[:5])


def _secret(file: Path | None) -> str:
    return secret_in(file) if file is not None else ""
