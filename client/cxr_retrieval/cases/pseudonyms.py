"""Keyed pseudonyms of images and patients, and the local table that leads back.

What stands in Milvus, on a wire or in a log is the HMAC-SHA-256 (RFC 2104) of an id under the hospital's own key, cut to 128 bits, each
kind of id in a domain of its own. Without the key nobody can make one from an id, as anybody could with a plain hash of ids that are short
enough to try out, nor lead one back. With the key but without the table, one can ask whether a pseudonym is that of a known id, and no
more; the table alone is the list of who is in the gallery. Both are kept here, with rights 0600 (docs/privacy.md: backup, rotation, loss).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from cxr_retrieval.cases.tables import Layout, PrivateTable, refuse_open_to_others
from cxr_retrieval.errors import SetupError
from cxr_retrieval.settings import DEFAULT_PSEUDONYM_KEY, MIN_KEY_CHARACTERS, PseudonymSettings

DIGITS: Final = 32
"""Hex digits of a pseudonym: 128 bits."""
SHOWN_DIGITS: Final = 12
"""As many as a page shows: enough to find a case by, among a million with a chance of one in 500 that any two are alike."""
MIN_PREFIX: Final = 8
"""Hex digits by which a pseudonym may be asked for."""
_AT_ONCE: Final = 500
_EXPOSED: Final = "if someone may have read it, see docs/privacy.md on a new key"
_LAYOUT: Final = Layout(
    "the table of pseudonyms",
    "give --pseudonym-table",
    _EXPOSED,
    1,
    (
        "CREATE TABLE image (key TEXT PRIMARY KEY, image_id TEXT NOT NULL, path BLOB NOT NULL, member TEXT, patient TEXT) WITHOUT ROWID",
        "CREATE TABLE patient (key TEXT PRIMARY KEY, patient_id TEXT NOT NULL) WITHOUT ROWID",
        "CREATE INDEX image_patient ON image (patient)",
    ),
)
_IMAGES: Final = "SELECT image.key, image_id, path, member, patient_id FROM image LEFT JOIN patient ON patient.key = image.patient"


@dataclass(frozen=True)
class Original:
    """What an image's pseudonym stands for; `member` is set if `path` is a ZIP that holds it."""

    image_id: str
    path: Path
    member: str | None = None
    patient_id: str | None = None


class Pseudonyms:
    """The key, and the table; thread-safe, and safe beside other processes. Use as a context manager.

    Args:
        key: Secret bytes.
        table: Made when first written to; while it is not there, nothing leads back.

    Attributes:
        fingerprint: Tells two keys apart and gives neither away.
    """

    def __init__(self, key: bytes, table: Path) -> None:
        self._key = key
        self.table = table
        self.fingerprint = self._of("fingerprint", "")[:16]
        self._held = PrivateTable(table, _LAYOUT)

    def __enter__(self) -> Pseudonyms:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the table."""
        self._held.close()

    def image(self, image_id: str) -> str:
        """The pseudonym of an image: 32 hex digits, the gallery's primary key."""
        return self._of("image", image_id)

    def patient(self, patient_id: str) -> str:
        """The pseudonym of a patient, of whatever source."""
        return self._of("patient", patient_id)

    def digest(self, sha256: str) -> str:
        """A digest as it may be stored: two of the same file or picture stay equal, and whoever holds the file cannot find it by one."""
        return self._of("digest", sha256)

    def secret(self, purpose: str) -> bytes:
        """A secret of its own for something else that must be keyed; the key cannot be had from it. 32 bytes."""
        return hmac.new(self._key, f"cxr-retrieval secret\0{purpose}".encode(), hashlib.sha256).digest()

    def remember(self, originals: Sequence[Original]) -> None:
        """Notes what these images' pseudonyms, and their patients', stand for; on disk when it returns.

        Raises:
            SetupError: The table cannot be written.
        """
        patients = {self.patient(one.patient_id): one.patient_id for one in originals if one.patient_id is not None}
        images = [
            (
                self.image(one.image_id),
                one.image_id,
                os.fsencode(one.path),
                one.member,
                None if one.patient_id is None else self.patient(one.patient_id),
            )
            for one in originals
        ]
        with self._held.writing() as base:
            base.executemany("INSERT INTO patient VALUES (?, ?) ON CONFLICT (key) DO NOTHING", list(patients.items()))
            base.executemany(  # what is there already is not written again
                "INSERT INTO image VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET path = excluded.path, member = excluded.member, patient = excluded.patient "
                "WHERE path != excluded.path OR member IS NOT excluded.member OR patient IS NOT excluded.patient",
                images,
            )

    def forget(self, keys: Collection[str]) -> None:
        """Takes these images out of the table, and patients of whom it holds no other image.

        Raises:
            SetupError: The table cannot be written.
        """
        with self._held.writing(create=False) as base:
            base.executemany("DELETE FROM image WHERE key = ?", [(key,) for key in keys])
            base.execute("DELETE FROM patient WHERE key NOT IN (SELECT patient FROM image WHERE patient IS NOT NULL)")

    def originals(self, keys: Collection[str]) -> dict[str, Original]:
        """Pseudonym of an image → what it stands for, for those that the table knows.

        Raises:
            SetupError: The table cannot be read.
        """
        wanted, found = list(keys), dict[str, Original]()
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            found |= self._images(f"image.key IN ({', '.join('?' * len(some))})", some)
        return found

    def images_like(self, prefix: str) -> dict[str, Original]:
        """As `originals`, for pseudonyms that begin with these hex digits."""
        return self._images("image.key BETWEEN ? AND ?", [prefix, prefix + "~"])

    def patients_like(self, prefix: str) -> dict[str, tuple[str, list[str]]]:
        """Pseudonyms of patients that begin so → patient_id, and the image_ids of this patient's films."""
        with self._held.reading() as base:
            rows = base.execute(
                "SELECT patient.key, patient_id, image_id FROM patient LEFT JOIN image ON image.patient = patient.key "
                "WHERE patient.key BETWEEN ? AND ? ORDER BY patient.key, image_id",
                (prefix, prefix + "~"),
            ).fetchall()
        found: dict[str, tuple[str, list[str]]] = {}
        for key, patient_id, image_id in rows:
            images = found.setdefault(key, (patient_id, []))[1]
            images += [] if image_id is None else [image_id]
        return found

    def _images(self, condition: str, values: Sequence[str]) -> dict[str, Original]:
        with self._held.reading() as base:
            rows = base.execute(f"{_IMAGES} WHERE {condition} ORDER BY image.key", values).fetchall()
        return {key: Original(image_id, Path(os.fsdecode(path)), member, patient_id) for key, image_id, path, member, patient_id in rows}

    def _of(self, kind: str, text: str) -> str:
        return hmac.new(self._key, f"cxr-retrieval {kind}\0{text}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:DIGITS]


def open_pseudonyms(settings: PseudonymSettings, *, create: bool = False) -> Pseudonyms:
    """The key and its table.

    Args:
        create: Make a key where there is none (ingest), or complain.

    Raises:
        SetupError: No key, too short a key, or a key file that others can read.
    """
    file = (settings.key_file or DEFAULT_PSEUDONYM_KEY).expanduser()
    key = settings.key if settings.key and settings.key_file is None else _read_key(file, create=create)
    table = settings.table.expanduser() if settings.table else file.with_name(file.name + ".table")
    return Pseudonyms(key.encode(), table)


def _read_key(file: Path, *, create: bool) -> str:
    try:
        if create and not file.exists():
            _make_key(file)
        with file.open(encoding="utf-8") as opened:
            refuse_open_to_others(file, opened.fileno(), _EXPOSED)
            key = opened.read().strip()
    except FileNotFoundError as error:
        raise SetupError(
            "no pseudonym key",
            expected=f"the key under which the gallery was filled, in {file} or in CXR_PSEUDONYM_KEY",
            got="neither",
            next_step="give it with --pseudonym-key; for a new gallery, `cxr ingest` makes one",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) and error.strerror else "no text"
        raise SetupError(f"{file}: the pseudonym key cannot be read or made", got=got, next_step="correct --pseudonym-key") from error
    if len(key) < MIN_KEY_CHARACTERS:
        raise SetupError(
            f"{file}: the pseudonym key is too short",
            expected=f"at least {MIN_KEY_CHARACTERS} random characters",
            got=f"{len(key)}",
            next_step="restore the key, or make one with `openssl rand -hex 32`",
        )
    return key


def _make_key(file: Path) -> None:
    """A random key, whole in its place from the first moment; where another process was faster, that one's stays."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="ascii") as opened:
        opened.write(secrets.token_hex(32) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    try:
        file.hardlink_to(partial)
    except FileExistsError:
        pass
    finally:
        partial.unlink()
