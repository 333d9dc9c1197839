"""What travels between processes of a cluster is read with the key alone."""

from __future__ import annotations

import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.archive.sealed import Sealed
from cxr_retrieval.errors import ImageError, SetupError

KEY = bytes(range(32))


@given(st.binary(max_size=2000), st.text())
def test_what_is_sealed_comes_out_again(content: bytes, name: str) -> None:
    assert Sealed(KEY).open(Sealed(KEY).seal((content, name))) == (content, name)


def test_nothing_shows() -> None:
    sealed = Sealed(KEY).seal({"path": "/archive/DOE^JANE.dcm", "patient": "4711-0815"})
    assert b"DOE" not in sealed
    assert b"4711-0815" not in sealed
    assert sealed != Sealed(KEY).seal({"path": "/archive/DOE^JANE.dcm", "patient": "4711-0815"}), "the same twice does not look so"


def test_an_error_keeps_its_parts() -> None:
    error = Sealed(KEY).open(Sealed(KEY).seal(ImageError("a: unusable", got="b", next_step="c")))
    assert isinstance(error, ImageError)
    assert (error.what, error.got, error.next_step) == ("a: unusable", "b", "c")


class _Harm:
    """What would run if it were unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.remove, ("/nonexistent/harm",)


@pytest.mark.parametrize("harm", ["another key", "changed", "cut", "empty", "never sealed"])
def test_what_is_not_ours_is_not_unpickled(harm: str) -> None:
    sealed = Sealed(KEY).seal("content")
    given = {
        "another key": Sealed(bytes(32)).seal(_Harm()),
        "changed": sealed[:-1] + bytes([sealed[-1] ^ 1]),
        "cut": sealed[:20],
        "empty": b"",
        "never sealed": pickle.dumps(_Harm()),
    }[harm]
    with pytest.raises(SetupError, match="another pseudonym key"):
        Sealed(KEY).open(given)
