"""DICOMweb (PS3.18): how an archive is reached over HTTP, with time-outs, bounded answers and secrets that go nowhere else.

Redirects are not followed: they would carry what we ask, and who we are, to another place.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from dicomweb_client.api import DICOMwebClient
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth
from urllib3.exceptions import HTTPError
from urllib3.util.ssl_match_hostname import CertificateError

from cxr_retrieval.errors import PeerDownError, PeerError, SetupError
from cxr_retrieval.settings import Tls, is_loopback

MAX_BYTES: Final = 512 * 2**20
"""Of one answer: a film has some 20 MB, a page of a search less."""
_MAX_S: Final = 600.0
"""Seconds for one answer, however steadily it comes."""
_PASSES: Final = (408, 425, 429)
"""HTTP codes below 500 that say: later."""


@dataclass(frozen=True)
class Web:
    """How to reach an archive.

    Args:
        url: Root of its DICOMweb services, below which /studies lies; https is TLS.
        user: With `password`, for HTTP's basic authentication; or `token`, a bearer's.
        timeout_s: To connect, and between two pieces of an answer.
        insecure: Whether identities may cross a network unencrypted; secrets never do.

    Raises:
        SetupError: One of them is malformed, or would be read by others.
    """

    url: str
    tls: Tls | None = None
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    timeout_s: float = 30.0
    insecure: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            parts, well_formed = urlsplit(""), False
        if not well_formed or "@" in self.url or parts.query or parts.fragment:
            raise SetupError(
                "the DICOMweb address is malformed",
                expected="https://host[:port]/path, credentials apart",
                got="***" if "@" in self.url else self.url,
                next_step="correct it; a user's name is an option of its own",
            )
        if self.timeout_s <= 0:
            raise SetupError(
                "the DICOMweb timeout is out of range", expected="more than 0 s", got=f"{self.timeout_s:g}", next_step="correct --timeout"
            )
        if self.token and (self.user or self.password):
            raise SetupError("a token and a user for DICOMweb", expected="one of them", next_step="leave one out")
        if bool(self.user) != bool(self.password):
            raise SetupError(
                "a user and a password for DICOMweb go together",
                expected="both, or neither",
                got="only the user" if self.user else "only the password",
                next_step="give the other one, too",
            )
        if not all(character.isascii() and character.isprintable() for character in self.token):
            raise SetupError("the token for DICOMweb cannot be sent", expected="printable ASCII", next_step="correct its file")
        if self.tls is not None and not self.secure:
            raise SetupError(
                "certificates for a DICOMweb that is reached without TLS",
                expected="https://",
                got=self.url,
                next_step="correct the address, or leave the certificates out",
            )
        if not self.secure and not is_loopback(parts.hostname or "") and (self.token or self.password or not self.insecure):
            raise SetupError(
                f"{'a secret' if self.token or self.password else 'identities'} for {self.url} would cross the network unencrypted",
                expected="https://, or a server on this machine",
                next_step="write https://, or reach it through a tunnel that ends at 127.0.0.1",
            )

    @property
    def secure(self) -> bool:
        """Whether the connection is encrypted."""
        return self.url.lower().startswith("https://")

    @property
    def root(self) -> str:
        """The address without a / at its end."""
        return self.url.rstrip("/")


class _Bounded(HTTPAdapter):
    """Answers end: by bytes, by seconds, and requests do without an answer in `timeout_s`."""

    def __init__(self, web: Web, connections: int) -> None:
        self._web = web
        super().__init__(pool_connections=1, pool_maxsize=connections)

    def init_poolmanager(self, *given: Any, **options: Any) -> None:
        """Also with the name that the certificate is for."""
        name = self._web.tls.server_name if self._web.tls else ""
        super().init_poolmanager(*given, **options, **({"server_hostname": name, "assert_hostname": name} if name else {}))

    def send(self, request: Any, *given: Any, **options: Any) -> Any:
        """Also where the caller gave no time-out. A wildcard goes as it is: Orthanc's plugin takes `%2A` for letters."""
        path, asks, query = request.url.partition("?")
        request.url = path + asks + query.replace("%2A", "*")
        if options.get("timeout") is None:
            options["timeout"] = self._web.timeout_s
        response = super().send(request, *given, **options)
        whole, ends = response.raw.stream, time.monotonic() + _MAX_S

        def stream(*amount: Any, **how: Any) -> Generator[bytes]:
            count = 0
            for piece in whole(*amount, **how):
                count += len(piece)
                if count > MAX_BYTES or time.monotonic() > ends:
                    response.close()
                    raise PeerError(
                        f"{self._web.root}: an answer without end",
                        expected=f"at most {MAX_BYTES >> 20} MiB within {_MAX_S:g} s",
                        got=f"more than {count >> 20} MiB" if count > MAX_BYTES else "longer",
                        next_step="see the archive's log",
                    )
                yield piece

        response.raw.stream = stream
        return response


@contextmanager
def session(web: Web, connections: int = 4) -> Generator[requests.Session]:
    """What every request to this archive goes through; threads may share it.

    It takes no proxy, password or authority from the environment or ~/.netrc.
    """
    with requests.Session() as opened:
        opened.trust_env = False
        opened.max_redirects = 0
        opened.mount("https://" if web.secure else "http://", _Bounded(web, connections))
        if web.tls is not None:
            opened.verify = str(web.tls.ca) if web.tls.ca else True
            if web.tls.certificate is not None:
                opened.cert = (str(web.tls.certificate), str(web.tls.key))
        if web.user:
            opened.auth = HTTPBasicAuth(web.user.encode(), web.password.encode())
        if web.token:
            opened.headers["Authorization"] = f"Bearer {web.token}"
        yield opened


@contextmanager
def opened(web: Web, connections: int = 4) -> Generator[DICOMwebClient]:
    """A client of this archive; what it raises becomes ours within `answered`. It asks once: who can wait does, by `Patience`."""
    with session(web, connections) as through:
        client = DICOMwebClient(web.root, session=through, timeout=web.timeout_s)
        client.set_http_retry_params(retry=False)
        yield client


@contextmanager
def answered(web: Web) -> Generator[None]:
    """Turns what requests and dicomweb-client raise into errors of ours.

    Raises:
        PeerError: The archive refuses us, or does not speak DICOMweb; nothing mends that by itself.
        PeerDownError: It is away, too slow, or says that it cannot now.
    """
    try:
        yield
    except requests.HTTPError as error:
        raise _by_code(web, error.response.status_code if error.response is not None else 0) from error
    except requests.exceptions.SSLError as error:
        raise PeerError(
            f"{web.root}: no encrypted connection",
            got=_tls_reason(error),
            next_step="give the authority that signed the server's certificate, and a client certificate if it wants one",
        ) from error
    except requests.TooManyRedirects as error:
        raise PeerError(
            f"{web.root}: leads elsewhere, and is not followed",
            expected="an answer",
            got="a redirect",
            next_step="give the address at which the archive answers itself",
        ) from error
    except requests.exceptions.JSONDecodeError as error:
        raise not_dicomweb(web, "no JSON") from error
    except (requests.RequestException, HTTPError) as error:
        slow = isinstance(error, requests.Timeout)
        raise PeerDownError(
            f"{web.root}: {'too slow' if slow else 'does not answer'}",
            expected=f"an answer within {web.timeout_s:g} s",
            got="" if slow else type(error).__name__,
            next_step="check its address, and whether it runs",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # dicomweb-client reads what servers say as it comes
        raise not_dicomweb(web, type(error).__name__) from error


def objects(web: Web, answer: object) -> list[dict[str, Any]]:
    """The answer to a search, of which the client has only seen that it is JSON.

    Raises:
        PeerError: It is no list of data sets in DICOM JSON (PS3.18 F.2).
    """
    if not isinstance(answer, list) or not all(isinstance(one, dict) for one in answer):
        raise not_dicomweb(web, type(answer).__name__)
    return answer


def not_dicomweb(web: Web, got: str) -> PeerError:
    """What to say of an answer in another form."""
    return PeerError(
        f"{web.root}: answers, but not as DICOMweb does",
        expected="DICOM JSON or multipart/related (PS3.18)",
        got=got,
        next_step="check the path of the address, such as /dicom-web",
    )


def _by_code(web: Web, code: int) -> PeerError:
    if code >= 500 or code in _PASSES:
        return PeerDownError(f"{web.root}: cannot serve now", got=f"HTTP {code}", next_step="see its log; ask again later")
    if code in (401, 403, 407):
        return PeerError(
            f"{web.root}: does not let us in",
            got=f"HTTP {code}",
            next_step="correct user, password or token, and what the archive lets them do",
        )
    return PeerError(f"{web.root}: refuses the request", got=f"HTTP {code}", next_step="check the path of the address, such as /dicom-web")


def _tls_reason(error: BaseException) -> str:
    """What OpenSSL says, out of the layers around it; else the kind of the error."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, CertificateError):
            return "hostname mismatch"
        reason = getattr(found, "verify_message", None) or getattr(found, "reason", None)
        if isinstance(reason, str):
            return reason.replace("_", " ").lower()
        inner = reason if isinstance(reason, BaseException) else None
        found = inner or next((given for given in found.args if isinstance(given, BaseException)), None) or found.__cause__
    return type(error).__name__
