"""Pseudonyms: what they depend on, the key they need, and the table that leads back."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.cases.pseudonyms import Original, Pseudonyms, open_pseudonyms
from cxr_retrieval.errors import SetupError
from cxr_retrieval.settings import PseudonymSettings

KEY = "0123456789abcdef" * 4


def keyed(key: str = KEY) -> Pseudonyms:
    return Pseudonyms(key.encode(), Path("/nowhere/table"))


@given(st.text(), st.text())
def test_equal_for_equal_ids_alone_and_each_kind_in_a_domain_of_its_own(one: str, other: str) -> None:
    keys = keyed()
    assert (keys.image(one) == keys.image(other)) == (one == other)
    assert len({keys.image(one), keys.patient(one), keys.digest(one), keyed("x" * 32).image(one)}) == 4
    assert re.fullmatch("[0-9a-f]{32}", keys.image(one))


def test_known_values() -> None:
    """RFC 2104 with SHA-256, over the kind, a zero byte, and the id in UTF-8: what was stored stays findable in every later version."""
    assert keyed().image("a") == hmac.new(KEY.encode(), b"cxr-retrieval image\0a", hashlib.sha256).hexdigest()[:32]
    assert (keyed().image("a"), keyed().patient("ä"), keyed().fingerprint) == (
        "f7e56785576a8f9a0eeb5c25071b4e1a",
        "a43740452c1a131d250297f7a6c7f93f",
        "4c78bbfe1f9fb2fd",
    )


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "pseudonym.key"
    settings = PseudonymSettings(file)
    with pytest.raises(SetupError, match=r"no pseudonym key; .*CXR_PSEUDONYM_KEY; got neither.*`cxr ingest` makes one"):
        open_pseudonyms(settings)
    first = open_pseudonyms(settings, create=True).fingerprint
    assert open_pseudonyms(settings, create=True).fingerprint == open_pseudonyms(settings).fingerprint == first
    assert [path.name for path in file.parent.iterdir()] == ["pseudonym.key"], "nothing beside it"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert len(file.read_text().strip()) == 64


def test_processes_that_make_a_key_at_once_agree(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from cxr_retrieval.cases.pseudonyms import Original, open_pseudonyms\n"
        "from cxr_retrieval.settings import PseudonymSettings\n"
        "keys = open_pseudonyms(PseudonymSettings(Path(sys.argv[1])), create=True)\n"
        "for i in range(20): keys.remember([Original(f'{sys.argv[2]}-{i}', Path('/f'), None, 'P')])\n"
        "print(keys.fingerprint)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "k"), str(n)], stdout=subprocess.PIPE, text=True) for n in range(4)
    ]
    assert len({process.communicate(timeout=120)[0] for process in processes}) == 1
    assert {process.returncode for process in processes} == {0}
    with open_pseudonyms(PseudonymSettings(tmp_path / "k")) as keys:
        ids = [f"{n}-{i}" for n in range(4) for i in range(20)]
        assert {original.image_id for original in keys.originals([keys.image(one) for one in ids]).values()} == set(ids)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_or_table_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    settings = PseudonymSettings(tmp_path / "k")
    with open_pseudonyms(settings, create=True) as keys:
        keys.remember([Original("a", Path("/f"))])
    keys.table.chmod(mode)
    with open_pseudonyms(settings) as keys, pytest.raises(SetupError, match=f"expected rights 0600; got {mode:04o}.*chmod 600"):
        keys.originals(["a"])
    (tmp_path / "k").chmod(mode)
    with pytest.raises(SetupError, match=f"expected rights 0600; got {mode:04o}"):
        open_pseudonyms(settings)


def test_short_keys_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k").write_text("x" * 31 + "\n")
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(SetupError, match="too short; expected at least 32 random characters; got 31"):
        open_pseudonyms(PseudonymSettings(tmp_path / "k"))
    monkeypatch.setenv("CXR_PSEUDONYM_KEY", "secret")
    with pytest.raises(SetupError, match=r"too short.*CXR_PSEUDONYM_KEY") as caught:
        PseudonymSettings()
    assert "secret" not in str(caught.value)


def test_a_file_goes_before_the_environment_and_that_before_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXR_PSEUDONYM_KEY", KEY)
    settings = PseudonymSettings()
    assert open_pseudonyms(settings).fingerprint == keyed().fingerprint
    assert KEY not in repr(settings)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "k").write_text("another key, long enough to count\n")
    (tmp_path / "k").chmod(0o600)
    assert open_pseudonyms(PseudonymSettings(tmp_path / "k")).fingerprint == keyed("another key, long enough to count").fingerprint
    monkeypatch.delenv("CXR_PSEUDONYM_KEY")
    open_pseudonyms(PseudonymSettings(), create=True)
    assert (tmp_path / ".local/share/cxr-retrieval/pseudonym.key").is_file()


def test_what_is_remembered_leads_back_until_it_is_forgotten(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(b"/films/\xff name.zip"))
    with Pseudonyms(KEY.encode(), tmp_path / "table") as keys:
        a, b, c = (keys.image(name) for name in "abc")
        p = keys.patient("P")
        assert keys.originals([a, b]) == {}
        assert not keys.table.exists(), "asking makes nothing"
        keys.remember([Original("a", Path("/a.dcm"), None, "P"), Original("b", odd, "x/b.dcm", "P"), Original("c", Path("/c"))])
        keys.remember([Original("a", Path("/moved/a.dcm"), None, "P")])
        assert stat.S_IMODE(keys.table.stat().st_mode) == 0o600
    with Pseudonyms(KEY.encode(), tmp_path / "table") as keys:
        assert keys.originals([a, b, "0" * 32]) == {
            a: Original("a", Path("/moved/a.dcm"), None, "P"),
            b: Original("b", odd, "x/b.dcm", "P"),
        }
        assert keys.images_like(c[:8]) == {c: Original("c", Path("/c"))}
        assert keys.patients_like(p) == keys.patients_like(p[:8]) == {p: ("P", ["a", "b"])}
        keys.forget([a])
        assert keys.patients_like(p) == {p: ("P", ["b"])}
        keys.forget([b])
        assert keys.patients_like(p) == keys.originals([a, b]) == {}
        assert keys.originals([c]).keys() == {c}


def test_more_keys_than_one_statement_takes(tmp_path: Path) -> None:
    with Pseudonyms(KEY.encode(), tmp_path / "table") as keys:
        keys.remember([Original(f"{i}", Path("/f")) for i in range(1203)])
        found = keys.originals([keys.image(f"{i}") for i in range(1203)])
    assert {original.image_id for original in found.values()} == {f"{i}" for i in range(1203)}


def test_a_damaged_table_is_said(tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(b"nonsense" * 1000)
    (tmp_path / "table").chmod(0o600)
    with pytest.raises(SetupError, match=r"the table of pseudonyms cannot be used.*--pseudonym-table"):
        Pseudonyms(KEY.encode(), tmp_path / "table").originals(["a"])
