"""Maps of real Milvus Lite galleries of made-up vectors: what lies where, the votes, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clusters import fill
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.evaluation.metrics import LabelledSet, Ranking
from cxr_retrieval.gallery.projection import NEIGHBOURS, Nearest, project
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.retrieval.atlas import PASSES, Atlas, draw, follow, keep, kept_at, read
from cxr_retrieval.retrieval.voting import DEFAULT_K, weighted_vote
from cxr_retrieval.settings import MilvusSettings

CASES = 240


@pytest.fixture
def empty(tmp_path: Path, pseudonyms: Pseudonyms) -> Iterator[Store]:
    with Store(MilvusSettings(str(tmp_path / "gallery.db")), "0123456789ab", pseudonyms, create=True) as store:
        yield store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pseudonyms: Pseudonyms) -> Iterator[Store]:
    with Store(MilvusSettings(str(tmp_path_factory.mktemp("atlas") / "gallery.db")), "0123456789ab", pseudonyms, create=True) as opened:
        fill(opened, CASES)
        yield opened


@pytest.fixture(scope="module")
def atlas(store: Store) -> Atlas:
    return draw(store)


def test_what_is_alike_lies_together_and_always_at_the_same_place(store: Store, atlas: Atlas) -> None:
    done: list[int] = []
    again = draw(store, done.append)
    assert sum(done) == PASSES * CASES
    assert again.points.tobytes() == atlas.points.tobytes()
    assert (atlas.keys, atlas.votes) == (again.keys, again.votes)
    assert np.abs(atlas.points).max() == pytest.approx(1)
    facts = {row["key"]: row["source"] for row in store.rows(["key", "source"])}
    sources = np.array([facts[key] for key in atlas.keys])
    apart = np.linalg.norm(atlas.points[:, None] - atlas.points, axis=2) + 9 * np.eye(CASES)
    nearest = np.argsort(apart, axis=1)[:, :10]
    assert (sources[nearest] == sources[:, None]).mean() > 0.95
    assert not atlas.is_stale


def test_votes_are_those_of_an_evaluation(store: Store, atlas: Atlas) -> None:
    cases, vectors = store.vectors()
    facts = [[getattr(case, name) or "" for case in cases] for name in ("key", "label", "patient_id", "source")]
    labelled = LabelledSet(facts[0], vectors, facts[1], facts[2], facts[3])
    ranking, expected = Ranking(labelled, labelled), dict[str, str]()
    for number, case in enumerate(cases):
        order, alike = ranking.of(number)
        expected[case.key] = weighted_vote([(facts[1][i], float(a)) for i, a in zip(order[:DEFAULT_K], alike, strict=False)]).label
    assert dict(zip(atlas.keys, atlas.votes, strict=True)) == expected


def test_a_patient_of_many_films_is_voted_on_by_others(empty: Store) -> None:
    fill(empty, NEIGHBOURS + 20, clusters=1, patients_of=NEIGHBOURS + 10)
    votes = draw(empty).votes
    assert None not in votes


def test_one_patient_alone_has_no_vote(empty: Store) -> None:
    fill(empty, 5, patients_of=5)
    assert set(draw(empty).votes) == {None}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_few_cases_have_a_map_too(count: int) -> None:
    for vectors in (np.eye(8, dtype=np.float32)[:count], np.ones((count, 8), np.float32) / np.sqrt(8, dtype=np.float32)):
        points = project(vectors, Nearest.of(vectors, vectors, count - 1, themselves=True))
        assert points.shape == (count, 2)
        assert np.isfinite(points).all()
        assert np.abs(points).max() <= 1


def test_many_go_another_way() -> None:
    """Beyond 3,000 cases the gradient is interpolated; here in as few steps as can tell."""
    random = np.random.default_rng(0)
    vectors = np.repeat(np.eye(4, 16), 800, axis=0) + 0.1 * random.normal(size=(3200, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    told: list[int] = []

    def enough(cases: int) -> None:
        told.append(cases)
        if sum(told) > 3200 // 4:
            raise UsageError("enough")

    with pytest.raises(UsageError, match="enough"):
        project(vectors, Nearest.of(vectors, vectors, NEIGHBOURS, themselves=True), enough)
    assert len(told) > 3


def test_an_empty_gallery_has_none(empty: Store) -> None:
    with pytest.raises(UsageError, match="cxr ingest"):
        draw(empty)


def test_without_the_library_it_says_what_to_install(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(SetupError, match=r"cxr-retrieval\[map\]"):
        draw(store)


def test_cases_come_and_go(empty: Store) -> None:
    first = fill(empty, 60)
    before = draw(empty)
    place = dict(zip(before.keys, before.points, strict=True))
    empty.remove(first.keys[:5])
    more = fill(empty, 5, start=60)
    after = follow(before, empty)
    assert set(after.keys) == {*first.keys[5:], *more.keys}
    assert (int(after.placed.sum()), after.drawn, after.changed) == (5, 60, pytest.approx(10 / 60))
    assert not after.is_stale
    for key, point, placed in zip(after.keys, after.points, after.placed, strict=True):
        if not placed:
            assert (point == place[key]).all()
            continue
        of = more.of[more.keys.index(key)]
        middles = [np.mean([place[k] for k, c in zip(first.keys, first.of, strict=True) if c == cluster], axis=0) for cluster in range(3)]
        assert np.argmin([np.linalg.norm(point - middle) for middle in middles]) == of
    assert None not in after.votes
    fill(empty, 5, start=70)
    assert follow(after, empty).is_stale


def test_it_is_kept_by_gallery_and_names_nobody(store: Store, atlas: Atlas, tmp_path: Path) -> None:
    settings = MilvusSettings("http://127.0.0.1:1")
    path = kept_at(tmp_path / "maps", settings, store)
    assert read(path, store) is None
    keep(atlas, path, store)
    found = read(path, store)
    assert found is not None
    assert found.points.tobytes() == atlas.points.tobytes()
    assert (found.keys, found.votes, found.drawn, found.made) == (atlas.keys, atlas.votes, atlas.drawn, atlas.made)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert b"case-" not in path.read_bytes()
    assert b"patient-" not in path.read_bytes()
    assert kept_at(tmp_path / "maps", replace(settings, uri="http://127.0.0.1:2"), store) != path


def rewritten(**change: object) -> Callable[[bytes], bytes]:
    def harm(whole: bytes) -> bytes:
        head, body = whole.split(b"\n", 1)
        return json.dumps(json.loads(head) | change).encode() + b"\n" + body

    return harm


def with_digest(harm: Callable[[bytearray], None]) -> Callable[[bytes], bytes]:
    """The body harmed, and the digest made to fit."""
    import hashlib

    def harmed(whole: bytes) -> bytes:
        head, body = whole.split(b"\n", 1)
        other = bytearray(body)
        harm(other)
        told = json.loads(head) | {"sha256": hashlib.sha256(other).hexdigest()}
        return json.dumps(told).encode() + b"\n" + other

    return harmed


def set_bytes(at: int, value: bytes) -> Callable[[bytearray], None]:
    def harm(body: bytearray) -> None:
        body[at : at + len(value)] = value

    return harm


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "no text": lambda _: os.urandom(5000),
    "cut off": lambda whole: whole[:-7],
    "longer": lambda whole: whole + b"\0" * 29,
    "endless nesting": lambda _: b"[" * 100_000 + b"\n",
    "a list": lambda _: b"[]\n",
    "a number of cases beyond all": rewritten(cases=10**18),
    "cases as text": rewritten(cases="x"),
    "another gallery": rewritten(collection="cxr_other"),
    "another key": rewritten(fingerprint="0" * 16),
    "labels that are none": rewritten(labels=7),
    "fewer labels": rewritten(labels=[]),
    "no day": rewritten(made="yesterday"),
    "fewer drawn": rewritten(drawn=1),
    "true for a number": rewritten(drawn=True),
    "not a number": with_digest(set_bytes(16, np.array([np.nan], "<f4").tobytes())),
    "far outside": with_digest(set_bytes(16, np.array([1e30], "<f4").tobytes())),
    "a vote for nothing": with_digest(set_bytes(24, np.array([77], "<i4").tobytes())),
    "out of order": with_digest(set_bytes(0, b"\xff" * 16)),
}


@pytest.mark.parametrize("harm", HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_as_it_was_written_is_refused(harm: Callable[[bytes], bytes], store: Store, atlas: Atlas, tmp_path: Path) -> None:
    path = tmp_path / "some.map"
    keep(atlas, path, store)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(SetupError, match="compute it anew"):
        read(path, store)
    keep(atlas, path, store)
    assert read(path, store) is not None


def test_what_is_no_file_is_refused_at_once(store: Store, atlas: Atlas, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.map")
    keep(atlas, tmp_path / "real.map", store)
    (tmp_path / "link.map").symlink_to(tmp_path / "real.map")
    for name in ("pipe.map", "link.map", "."):
        with pytest.raises(SetupError):
            read(tmp_path / name, store)
    with pytest.raises(SetupError, match="--maps"):
        keep(atlas, tmp_path / "real.map" / "some.map", store)
