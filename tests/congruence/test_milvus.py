"""The same store code against Milvus Lite and a real Milvus server: what must be equal is, what differs is written down.

Which of the store's two ways is run by what: with nullable fields, by Milvus Lite 3.2.2 alone; without them, by a real server, 2.3.5, which
has none. No server that has them (2.5 and later; compose.yaml starts 2.6) has run this code: none is to be had as a package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient
from threadpoolctl import threadpool_info, threadpool_limits

from clauses import trees
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.cases.manifest import Manifest, ManifestRow, read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import IMAGE_VECTOR, SUBSPACE_SIZE, TEXT_VECTOR
from cxr_retrieval.errors import ClauseError, InputError, StoreError, StoreFullError, UsageError
from cxr_retrieval.gallery.aliases import ALIAS, list_galleries, use_gallery
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, VECTOR_SIZE, comparable
from cxr_retrieval.gallery.clause import Arithmetic, Compare, Field, In, IsNull, Like, Node, Own, Value, Words, printed
from cxr_retrieval.gallery.completion import Counted, Snapshot, Spread
from cxr_retrieval.gallery.filters import Dialect, for_milvus
from cxr_retrieval.gallery.spaces import FILM, REPORTS
from cxr_retrieval.gallery.store import (
    CALIBRATION,
    CLUSTERS,
    UPSERT_BYTES,
    UPSERT_ROWS,
    Clause,
    Entry,
    Held,
    Store,
    by_bytes,
    drop_gallery,
    list_collections,
    make_entry,
    of_run,
    remove_cases,
    understood,
    within,
)
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.gallery.words import WORDS_FIELD
from cxr_retrieval.retrieval.clusters import MOST_CLUSTERS, TOUCHING, Cluster, Clustering, as_text, read_clustering
from cxr_retrieval.serving.server import embedded_milvus
from cxr_retrieval.settings import Match, MilvusSettings, ThumbnailKind
from tests_support import KEY_FILE, dashboard_metrics
from vectors import unit_vectors

pytestmark = pytest.mark.server

CSV = """image_id,path,label,patient_id,source,split,age,sex,went_icu,spo2,clinical_notes,crp,ward,temperature
a,a.png,covid19,p1,north,train,61,F,Y,88,first,12.5,B2,38.1
b,b.png,control,p2,north,train,33,M,N,98,,1,,
c,c.png,non_covid_pneumonia,p3,south,train,,F,,,"quoted ""word"" and 'mark'",,A1,
d,d.png,covid19,,,val,75.5,,Y,,,,,
e,e.png,covid19,p5,south,val,50,F,N,91,ünïcödé,,,
"""


@pytest.fixture(scope="module", params=[pytest.param("lite", id="lite, nullable"), pytest.param("server", id="server 2.3.5, not nullable")])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def settings_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> MilvusSettings:
    return MilvusSettings(str(folder / "gallery.db") if kind == "lite" else request.getfixturevalue("milvus_server"))


@pytest.fixture
def settings(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> MilvusSettings:
    """To write to: a file of its own, or the server."""
    return settings_of(kind, tmp_path, request)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = tmp_path_factory.mktemp("manifest") / "manifest.csv"
    path.write_text(CSV, "utf-8")
    return read_manifest(path)


@pytest.fixture(scope="module")
def entries(manifest: Manifest, pseudonyms: Pseudonyms) -> list[Entry]:
    return [make_entry(row, row.image_id, pseudonyms) for row in manifest.rows]


_AGES = st.sampled_from([33, 50.0, 61, 75.5, 98])
_TEXTS = st.sampled_from(["", "F", "M", "covid19", "first", "A1", "quoted \"word\" and 'mark'", "ünïcödé", "\\"])
_NUMBERS = st.sampled_from([Field("age"), Field("spo2"), Own("extra", ("crp",))])
_HELD = st.sampled_from([Field("sex"), Field("label"), Field("clinical_notes"), Own("extra", ("ward",)), Field("view")])
_ORDERED = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
POSSIBLE: st.SearchStrategy[Node] = st.one_of(
    st.builds(Compare, _ORDERED, _NUMBERS, st.one_of(_AGES.map(Value), _NUMBERS)),
    st.builds(Compare, _ORDERED, st.builds(Arithmetic, st.sampled_from("+-*/%"), _NUMBERS, _AGES.map(Value)), _AGES.map(Value)),
    st.builds(Compare, _ORDERED, _HELD, _TEXTS.map(Value)),
    st.builds(Compare, st.sampled_from(["==", "!="]), st.just(Field("went_icu")), st.booleans().map(Value)),
    st.builds(In, _HELD, st.lists(_TEXTS, max_size=3).map(tuple), st.booleans()),
    st.builds(In, _NUMBERS, st.lists(_AGES, max_size=3).map(tuple), st.booleans()),
    st.builds(Like, _HELD, st.sampled_from(["%", "F%", "%i%", "_", "co_id%", "%\\%%", "a.*"])),
    st.builds(IsNull, st.one_of(_NUMBERS, _HELD), st.booleans()),
    st.builds(Words, st.just(Field("clinical_notes")), st.sampled_from([("first",), ("quoted", "unicode")]), st.booleans()),
).filter(lambda node: not isinstance(node, Words) or not node.phrase or len(node.words) > 1)
"""What can be asked of five cases, many answers to which differ."""


def vectors(n: int, seed: int = 0) -> NDArray[np.float32]:
    return unit_vectors(n, seed)


def similarities(stored: NDArray[np.float32], query: NDArray[np.float32], balance: float = DEFAULT_BALANCE) -> NDArray[np.float32]:
    return comparable(stored, balance) @ comparable(query, balance)


def release(settings: MilvusSettings) -> None:
    """Closes a Milvus Lite folder that a bare client had opened."""
    if settings.is_lite:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(settings.uri)


def make_gallery_without(settings: MilvusSettings, version: str, pseudonyms: Pseudonyms, absent: set[str]) -> None:
    """An empty one as it was made before there were these fields."""
    with Store(settings, version, pseudonyms, create=True) as store:
        about, name = store._client.describe_collection(store.collection), store.collection  # pyright: ignore[reportPrivateUsage]
    client = MilvusClient(settings.uri)
    client.drop_collection(name)
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    for field in about["fields"]:
        if field["name"] not in absent:
            primary = {"is_primary": True} if field["name"] == "key" else {}
            schema.add_field(field["name"], field["type"], nullable=bool(field.get("nullable")), **primary, **field["params"])
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=index, properties=about["properties"])
    client.close()
    release(settings)


def digests(n: int) -> list[str]:
    """Of n different pictures."""
    return [f"{i:064x}" for i in range(n)]


@pytest.fixture(scope="module")
def store(
    kind: str, entries: list[Entry], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, pseudonyms: Pseudonyms
) -> Iterator[Store]:
    """Five cases, to be read only."""
    with Store(settings_of(kind, tmp_path_factory.mktemp("five"), request), "five_cases", pseudonyms, create=True) as opened:
        opened.upsert(entries, digests(len(entries)), vectors(len(entries)))
        yield opened


def test_both_ways_of_keeping_unknown_facts_are_run_each_by_one_kind(store: Store, kind: str) -> None:
    assert store._nullable == (kind == "lite")  # pyright: ignore[reportPrivateUsage]


def test_a_calibration_stays_with_its_gallery(settings: MilvusSettings, entries: list[Entry], pseudonyms: Pseudonyms) -> None:
    """As long as a real one, and beside the fingerprint of the key; taken away again it is gone."""
    told = '{"thresholds":[' + ",".join(["0.123456"] * 1000) + '],"north":"ünïcödé \'x\'"}'
    with Store(settings, "calibrated", pseudonyms, create=True) as opened:
        assert opened.calibration == ""
        opened.upsert(entries, digests(len(entries)), vectors(len(entries)))
        opened.keep({CALIBRATION: told})
        assert opened.calibration == told
    for kept in (told, "", told):
        with Store(settings, "calibrated", pseudonyms) as opened:
            opened.keep({CALIBRATION: kept})
        with Store(settings, "calibrated", pseudonyms) as opened:
            assert opened.calibration == kept
            assert opened.count() == len(entries)
    with Store(settings, "not_calibrated", pseudonyms, create=True) as other:
        assert other.calibration == ""


def test_rows_by_clause(store: Store) -> None:
    assert {row["label"] for row in store.rows(["key", "label"], 'source == "north"')} == {"covid19", "control"}
    with pytest.raises(UsageError, match="unknown field: hospital"):
        list(store.rows(["key"], "hospital == 1"))


def test_search_orders_by_cosine_and_returns_the_facts(store: Store, pseudonyms: Pseudonyms, manifest: Manifest) -> None:
    stored = vectors(5)
    found = store.search(stored[0], 5)
    assert [hit.case.image_id for hit in found] == [list("abcde")[i] for i in np.argsort(-similarities(stored, stored[0]))]
    assert [hit.similarity for hit in found] == pytest.approx(sorted(similarities(stored, stored[0]), reverse=True), abs=1e-5)
    case = found[0].case
    assert (case.label, case.patient_id, case.source, case.split) == ("covid19", pseudonyms.patient("p1"), "north", "train")
    assert (case.key, case.path) == (pseudonyms.image("a"), manifest.rows[0].path.resolve())
    facts = {
        "age": 61.0,
        "sex": "F",
        "went_icu": True,
        "spo2": 88.0,
        "temperature": 38.1,
        "clinical_notes": "first",
        "crp": 12.5,
        "ward": "B2",
    }
    assert case.metadata == facts, "to the last digit"
    assert (case.file, case.pixels) == (pseudonyms.digest("a"), digests(1)[0])


def test_unknown_facts_stay_unknown(store: Store) -> None:
    cases = {hit.case.image_id: hit.case for hit in store.search(vectors(5)[0], 5)}
    assert cases["d"].patient_id is None
    assert cases["d"].metadata == {"age": 75.5, "went_icu": True}
    assert cases["c"].metadata["clinical_notes"] == "quoted \"word\" and 'mark'"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("age > 55", "ad"),
        ("age > 5.5e1", "ad"),
        ("age in [61, 33.0]", "ab"),
        ("60 <= age < 75.5", "a"),
        ("age > 9223372036854775807", ""),
        ("temperature == 38.1", "a"),
        ('patient_id != "p1"', "bcde"),
        ('not (patient_id == "p1")', "bcde"),
        ('patient_id not in ["p1", "p2"] and age > 1', "de"),
        ("patient_id is null", "d"),
        ("went_icu == true", "ad"),
        ("went_icu", "ad"),
        ("not went_icu", "be"),
        ("went_icu != true", "be"),
        ('sex == "F" and label == "covid19"', "ae"),
        ('image_id == "b"', "b"),
        ("image_id in ['a', \"c\"] and not (patient_id == 'p1')", "c"),
        ('image_id != "a" and patient_id in ["p1", "p2"]', "b"),
        ('source in ["south"]', "ce"),
        ('extra["crp"] > 2', "a"),
        ('extra["crp"] in [1, 12.5]', "ab"),
        ('extra["crp"] != 1', "a"),
        ('extra["crp"] is null', "cde"),
        ('exists extra["ward"]', "ac"),
        ('extra["ward"] like "%2"', "a"),
        ('extra["crp"] == true', ""),
        ('extra["crp"] * 2 == 25', "a"),
        ('label like "non%"', "c"),
        ('label like "%vid%"', "acde"),
        ('not (label == "covid19")', "bc"),
        ('sex != "F"', "b"),
        ('sex not in ["F"]', "b"),
        ("not (age > 60)", "be"),
        ("not (age > 60 and went_icu)", "be"),
        ("age is null or sex is null", "cd"),
        ("exists sex", "abce"),
        ('array_length(extra["ward"]) > 0', ""),
        ("age + 1 > 60", "ad"),
        ("age % 2 == 1", "ab"),
        ("spo2 > age", "abe"),
        ('array_contains(extra["ward"], "A1")', ""),
        ('clinical_notes == "quoted \\"word\\" and \'mark\'"', "c"),
        ('not (clinical_notes like "%r%")', "e"),
        ('text_match(clinical_notes, "FIRST mark")', "ac"),
        ('age > 55 and not text_match(clinical_notes, "second")', "a"),
        ('age > 70 or phrase_match(clinical_notes, "quoted word")', "cd"),
    ],
)
def test_filters(store: Store, where: str, expected: str) -> None:
    """The same cases of both, whatever they can be asked: what is unknown, too (`filters.py`)."""
    assert sorted(hit.case.image_id for hit in store.search(vectors(5)[0], 5, where)) == list(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("first", "a"),
        ("Unicode", "e"),
        ("ÜNÏCÖDÉ", "e"),
        ("word mark", "c"),
        ('"and mark"', "c"),
        ('"mark and"', ""),
        ("wor", ""),
        ("-first", "ce"),
        ("-first -quoted", "e"),
    ],
)
def test_words_of_notes(store: Store, text: str, expected: str) -> None:
    """By the words that the gallery keeps, or here; cases without notes never meet them."""
    clause = store.clause("", text)
    assert sorted(hit.case.image_id for hit in store.search(vectors(5)[0], 5, clause)) == list(expected)
    assert (WORDS_FIELD in clause.asked) == ("key in" not in clause.asked) == (WORDS_FIELD in store.fields)
    both = store.clause("age > 55", text)
    assert sorted(hit.case.image_id for hit in store.search(vectors(5)[0], 5, both)) == sorted({*expected} & {*"ad"})


def test_words_asked_as_servers_with_an_index_are(store: Store, kind: str) -> None:
    """No server that has TEXT_MATCH can be had here; Milvus Lite has it, if slowly, and takes what such a server would be asked."""
    if kind == "server":
        with pytest.raises(UsageError, match="is not understood"):
            store.search(vectors(5)[0], 5, Clause("words", 'TEXT_MATCH(clinical_notes, "first")'))
        return
    indexed = Dialect(lite=False, nullable=True, words=True)
    for text, expected in {"first": "a", "word mark": "c", '"and mark"': "c", '"mark and"': "", "-first": "ce", "unicode": "e"}.items():
        condition = understood("", text, store.pseudonyms)
        assert condition is not None
        asked = printed(for_milvus(condition, indexed, lambda *_: pytest.fail("it can be asked all of it")))
        assert "TEXT_MATCH(notes_words" in asked
        assert sorted(hit.case.image_id for hit in store.search(vectors(5)[0], 5, Clause("", asked))) == list(expected)


@pytest.fixture(scope="module")
def snapshot(store: Store) -> Snapshot:
    return Snapshot.take(store)


@settings_of_hypothesis(max_examples=30)
@given(trees(POSSIBLE))
def test_a_snapshot_tells_the_same_cases_apart_as_milvus(store: Store, snapshot: Snapshot, node: Node) -> None:
    """Two ways to evaluate any clause: what Milvus is asked, and what is matched here."""
    where = printed(node)
    found = sorted(hit.case.key for hit in store.search(vectors(5)[0], 5, where))
    assert found == sorted(row["key"] for row in snapshot.meeting(where).rows)


def test_values_are_counted(store: Store) -> None:
    assert store.counts("label") == {"covid19": 3, "control": 1, "non_covid_pneumonia": 1}
    assert store.counts("sex", "age > 40") == {"F": 2}
    assert store.counts("went_icu") == {True: 2, False: 2}
    assert store.counts("age", store.clause("", "first")) == {61.0: 1}
    assert store.counts("view") == {}
    for field in ("patient_id", "image_id", "extra", "pixels", "nonsense"):
        with pytest.raises(UsageError, match=f"no values of {field} can be counted"):
            store.counts(field)


def test_a_snapshot_describes_what_the_gallery_holds(snapshot: Snapshot) -> None:
    assert (len(snapshot), snapshot.whole) == (5, True)
    fields = {one.name: (one.kind, one.known) for one in snapshot.fields()}
    assert fields["age"] == ("number", 4)
    assert fields["went_icu"] == ("flag", 4)
    assert fields['extra["crp"]'] == ("number", 2)
    assert fields['extra["ward"]'] == ("text", 2)
    assert not fields.keys() & {"key", "image_id", "patient_id", "extra", WORDS_FIELD}
    assert [one.name for one in snapshot.fields("S")] == ["source", "split", "sex", "survival", "spo2"]
    assert [one.name for one in snapshot.fields("w")] == ["went_icu", "wbc", 'extra["ward"]']
    label = snapshot.describe("label", limit=2)
    assert label.values == (Counted("covid19", 3), Counted("control", 1))
    assert (label.unknown, label.distinct, label.spread) == (0, 3, None)
    assert snapshot.describe("label", "CO").values == (Counted("covid19", 3), Counted("control", 1))
    age = snapshot.describe("age")
    assert age.spread == Spread(33, 45.75, 55.5, 64.625, 75.5)
    assert age.unknown == 1
    assert snapshot.describe('extra["crp"]').values == (Counted(1, 1), Counted(12.5, 1))
    some = snapshot.meeting("went_icu", "first")
    assert (len(some), some.describe("sex").values) == (1, (Counted("F", 1),))
    with pytest.raises(UsageError, match="no case has a field patient_id"):
        snapshot.describe("patient_id")


def test_a_gallery_without_words_of_notes_still_answers(tmp_path: Path, entries: list[Entry], pseudonyms: Pseudonyms) -> None:
    """As galleries were made before there was --text: they are read, written, and carried over into one that has them."""
    settings = MilvusSettings(str(tmp_path / "gallery.db"))
    make_gallery_without(settings, "older", pseudonyms, {WORDS_FIELD})
    with Store(settings, "older", pseudonyms, create=True) as older:
        older.upsert(entries, digests(5), vectors(5))
        clause = older.clause("age > 30", "first")
        assert f'key in ["{entries[0].key}"]' == clause.asked
        assert [hit.case.image_id for hit in older.search(vectors(5)[0], 5, clause)] == ["a"]
        assert [hit.case.image_id for hit in older.search(vectors(5)[0], 5, older.clause("", "-first -quoted"))] == ["e"]
        with Store(settings, "newer", pseudonyms, create=True, beside=older) as newer:
            newer.put(list(older.rows(["*"])))
            assert [hit.case.image_id for hit in newer.search(vectors(5)[0], 5, newer.clause("age > 30", "first"))] == ["a"]
            older.put(list(newer.rows(["*"])))
            assert WORDS_FIELD in newer.clause("", "first").asked
        assert older.count() == 5
    assert remove_cases(settings, pseudonyms, 'text_match(clinical_notes, "first")').keys() == {"cxr_newer", "cxr_older"}


@pytest.mark.parametrize("where", ["age >", "agee > 5", 'patient == "p1"', "((age > 5)"])
def test_bad_filters_are_the_users_error(store: Store, where: str) -> None:
    with pytest.raises(ClauseError) as caught:
        store.search(vectors(1)[0], 3, where)
    assert where in str(caught.value)
    assert caught.value.exit_code == 2


def test_upsert_replaces_the_whole_row(settings: MilvusSettings, entries: list[Entry], manifest: Manifest, pseudonyms: Pseudonyms) -> None:
    """Facts that the new row omits are gone, typed and own columns alike."""
    row = manifest.rows[0]
    bare = make_entry(
        type(row)(row.folder, row.image_id, row.path, "control", row.patient_id, row.source, row.split, {}), "new", pseudonyms
    )
    assert bare.key == entries[0].key
    with Store(settings, "replaced", pseudonyms, create=True) as store:
        store.upsert(entries, digests(5), vectors(5))
        store.upsert([bare], digests(1), vectors(5)[:1])
        assert store.count() == 5
        case = store.search(vectors(5)[0], 1)[0].case
    assert (case.label, dict(case.metadata)) == ("control", {})


def test_a_cluster_is_a_field_that_only_another_picture_loses(
    settings: MilvusSettings, entries: list[Entry], manifest: Manifest, pseudonyms: Pseudonyms
) -> None:
    """Whether the row that is upserted tells all fields (Lite would keep what it omits, a server would not)."""
    stored = vectors(5)
    keys = [entry.key for entry in entries]
    of = {key: (f"0a1b2c3d:{number % 2}", 1.5 + number) for number, key in enumerate(keys[:4])}
    by_key = dict(zip(keys, stored, strict=True))

    def facts(store: Store) -> dict[str, Any]:
        rows = {str(row["key"]): row for row in store.rows(["*"])}
        return {key: {name: row[name] for name in row if name not in ("cluster", "strength")} for key, row in rows.items()}

    with Store(settings, "in_clusters", pseudonyms, create=True) as store:
        store.upsert(entries, digests(5), stored)
        store.refuse_without_clusters()
        before = facts(store)
        assert dict(store.assigned()) == dict.fromkeys(keys)
        assert store.assign(of, by_key) == 4
        assert store.assign(of, by_key) == 0, "it stands there"
        assert store.assign({keys[4]: ("0a1b2c3d:0", 1.0)}, {keys[4]: stored[0]}) == 0, "of another picture"
        assert facts(store) == before
        assert dict(store.assigned()) == {key: of[key][0] if key in of else None for key in keys}
        hits = store.search(stored[0], 5)
        assert {hit.case.key: (hit.case.cluster, hit.case.strength) for hit in hits} == {**of, keys[4]: (None, 0.0)}
        assert store.count() == 5

        inside = store.search(stored[0], 5, within(Clause("", ""), "0a1b2c3d:0"))
        assert [hit.case.key for hit in inside] == [hit.case.key for hit in hits if hit.case.cluster == "0a1b2c3d:0"]
        both = store.search(stored[0], 5, within(store.clause('sex == "F"'), "0a1b2c3d:0"))
        assert {hit.case.image_id for hit in both} == {"a", "c"}
        near = store.nearest(stored, 5)
        assert [one.key for one in near[0]] == [hit.case.key for hit in hits]
        assert [one.similarity for one in near[0]] == pytest.approx([hit.similarity for hit in hits], abs=1e-5)
        assert [one.cluster for one in near[0]] == [hit.case.cluster for hit in hits]
        assert {one.key for one in store.nearest(stored, 5, of_run("0a1b2c3d"))[1]} == set(keys[:4])
        assert store.nearest(stored[:1], 5, of_run("ffffffff")) == [[]]

        row = manifest.rows[0]
        other = make_entry(
            type(row)(row.folder, row.image_id, row.path, "control", row.patient_id, row.source, row.split, {}), "new", pseudonyms
        )
        store.correct([other], digests(1))
        corrected = store.search(stored[0], 1)[0].case
        assert (corrected.label, dict(corrected.metadata), corrected.cluster) == ("control", {}, of[keys[0]][0])
        assert np.allclose(store.embeddings(keys[:1])[keys[0]], stored[0])
        store.upsert([other], digests(1), vectors(5, 1)[:1])
        replaced = store.search(vectors(5, 1)[0], 1)[0].case
        assert (replaced.key, replaced.cluster, replaced.strength) == (keys[0], None, 0.0)


def test_what_is_kept_of_two_thousand_clusters_fits(settings: MilvusSettings, pseudonyms: Pseudonyms) -> None:
    touching = dict.fromkeys(range(TOUCHING), 1234.56789)
    one = Cluster(99_999, 123456.789, 1.23456789, {"control": 50_000, "covid19": 40_000, "non_covid_pneumonia": 9_999}, touching)
    text = as_text(Clustering("0a1b2c3d", "v", 10, 1234567.89, (one,) * MOST_CLUSTERS, (0.9,) * 5, {"mean": 0.9, "least": 0.8}, {}))
    with Store(settings, "many_clusters", pseudonyms, create=True) as store:
        store.keep({CLUSTERS: text})
    with Store(settings, "many_clusters", pseudonyms) as store:
        assert store.clusters == text
        assert len(read_clustering(text).clusters) == MOST_CLUSTERS


def test_a_gallery_of_before_there_were_clusters_still_answers(tmp_path: Path, entries: list[Entry], pseudonyms: Pseudonyms) -> None:
    """It cannot be clustered as it is; exported and imported it can."""
    settings = MilvusSettings(str(tmp_path / "gallery.db"))
    make_gallery_without(settings, "older", pseudonyms, {"cluster", "strength"})
    with Store(settings, "older", pseudonyms) as older:
        older.upsert(entries, digests(5), vectors(5))
        older.correct(entries[:1], digests(1))
        assert older.search(vectors(5)[0], 1)[0].case.cluster is None
        assert older.nearest(vectors(5), 2)[0][0].cluster is None
        with pytest.raises(UsageError, match=r"before there were clusters.*`cxr gallery export` it, `cxr gallery drop cxr_older`"):
            older.refuse_without_clusters()
        with Store(settings, "newer", pseudonyms, create=True, beside=older) as newer:
            newer.put(list(older.rows(["*"])))
            assert newer.assign({entries[0].key: ("0a1b2c3d:0", 1.0)}, newer.embeddings([entries[0].key])) == 1
            older.put(list(newer.rows(["*"])))
        assert older.count() == 5


def test_what_is_held_and_count_see_fresh_rows(store: Store, entries: list[Entry]) -> None:
    keys = [entry.key for entry in entries]
    expected = {
        entry.key: Held(entry.file, entry.facts, digest, entry.row.source) for entry, digest in zip(entries, digests(5), strict=True)
    }
    assert store.held([*keys, "0" * 32]) == expected
    assert store.held([]) == {}
    assert np.allclose(store.embeddings(keys[1:2])[keys[1]], vectors(5)[1], atol=1e-6)
    assert store.count() == 5


def test_vectors_come_back_as_stored(store: Store, entries: list[Entry]) -> None:
    cases, stored = store.vectors()
    order = np.argsort([entry.key for entry in entries])
    assert [case.key for case in cases] == [entries[i].key for i in order]
    assert np.allclose(stored, vectors(5)[order], atol=1e-6)


def test_many_rows_cross_the_write_and_read_batches(settings: MilvusSettings, tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    lines = "".join(f"i{n},i{n}.png,control\n" for n in range(1203))
    path = tmp_path / "many.csv"
    path.write_text("image_id,path,label\n" + lines)
    many = [make_entry(row, "", pseudonyms) for row in read_manifest(path).rows]
    stored = vectors(len(many), 3)
    with Store(settings, "many_rows", pseudonyms, create=True) as store:
        store.upsert(many, digests(len(many)), stored)
        store.upsert(many[:7], digests(7), stored[:7])
        assert store.count() == 1203
        assert len(store.vectors()[0]) == 1203
        query = vectors(1, 9)[0]
        exact = {f"i{n}" for n in np.argsort(-similarities(stored, query))[:10]}
        assert {hit.case.image_id for hit in store.search(query, 10)} == exact


def test_rows_full_of_notes_are_written_in_calls_that_milvus_takes(
    settings: MilvusSettings, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    """30 MB, in as many calls as bytes demand."""
    path = tmp_path / "notes.csv"
    notes = ",".join(["ü" * 4_000] * 7)
    path.write_text("image_id,path,label,a,b,c,d,e,f,g\n" + "".join(f"i{n},i{n}.png,control,{notes}\n" for n in range(530)))
    many = [make_entry(row, "", pseudonyms) for row in read_manifest(path).rows]
    with Store(settings, "notes", pseudonyms, create=True) as store:
        store.upsert(many, digests(len(many)), vectors(len(many), 4))
        assert store.count() == 530
        (hit,) = store.search(vectors(530, 4)[529], 1)
        assert hit.case.image_id == "i529"
        assert hit.case.metadata["g"] == "ü" * 4_000


@given(st.lists(st.integers(0, 3 * UPSERT_BYTES // 2), max_size=30))
def test_calls_hold_what_bytes_allow(sizes: list[int]) -> None:
    """Every row once and in order; no call is too large but for a row alone; none is smaller than it need be."""
    text = "x" * max(sizes, default=0)
    rows = [{"key": str(n), "notes": text[:size]} for n, size in enumerate(sizes)]
    calls = list(by_bytes(rows))
    assert [row for call in calls for row in call] == rows
    total = [sum(len(row["notes"]) for row in call) for call in calls]
    for size, call, following in zip(total, calls, [*calls[1:], None][: len(calls)], strict=True):
        assert size <= UPSERT_BYTES or len(call) == 1
        assert following is None or size + len(following[0]["notes"]) + 1_000 > UPSERT_BYTES
    assert max((len(call) for call in by_bytes({"key": str(n)} for n in range(1203))), default=0) == UPSERT_ROWS


def test_the_gallery_is_the_first_one_until_another_is_chosen(
    settings: MilvusSettings, entries: list[Entry], caplog: pytest.LogCaptureFixture, pseudonyms: Pseudonyms
) -> None:
    """An ingest with other weights, beside it, changes nothing for who looks at the gallery from outside."""

    def the_gallery() -> list[str]:
        return [name for name, aliases in list_galleries(settings).items() if ALIAS in aliases]

    if the_gallery():  # of a former test, on the server
        client = MilvusClient(settings.uri)
        client.drop_alias(ALIAS)
        client.close()
    for version in ("alias_one", "alias_two"):
        with Store(settings, version, pseudonyms, create=True) as store:
            store.upsert(entries, digests(5), vectors(5))
            store.publish()
            store.publish()
    assert the_gallery() == ["cxr_alias_one"]
    with pytest.raises(UsageError, match="no gallery for model version never"):
        use_gallery(settings, "never")
    assert use_gallery(settings, "alias_two") == "cxr_alias_one"
    assert the_gallery() == ["cxr_alias_two"]
    client = MilvusClient(settings.uri)
    assert client.has_collection(ALIAS), "tools reach it by the alias"
    assert not [record for record in caplog.records if record.name.startswith("pymilvus") and record.levelname == "ERROR"], (
        "no stack on the user's terminal"
    )
    client.close()


def test_rows_are_carried_over_whole_into_a_gallery_that_answers_nobody_until_it_is_filled(
    settings: MilvusSettings, entries: list[Entry], pseudonyms: Pseudonyms
) -> None:
    """As `cxr reindex` does, whose pictures and networks are not of interest here."""
    with Store(settings, "carried_from", pseudonyms, create=True) as former:
        former.upsert(entries, digests(5), vectors(5))
        keys = [entry.key for entry in entries]
        with Store(settings, "carried_to", pseudonyms, fill=True, beside=former) as new:
            new.put(
                [{**row, "embedding": vector.tolist()} for row, vector in zip(former.rows_of(keys).values(), vectors(5, 1), strict=True)]
            )
            assert new.filling
            with pytest.raises(StoreError, match="is not filled yet"):
                Store(settings, "carried_to", pseudonyms, beside=former)
            with Store(settings, "carried_to", pseudonyms, fill=True, beside=former) as again:
                assert again.filling, "a second run finds the mark"
            told, taken = ({row["key"]: row for row in store.rows(["*"])} for store in (former, new))
            assert told.keys() == taken.keys() == {*keys}
            for key, row in taken.items():
                assert {**row, "embedding": None} == {**told[key], "embedding": None}
            assert new.held(keys) == former.held(keys)
            new.filled()
            new.filled()
            assert not new.filling
            new.remove(keys[:1])
            assert (former.count(), new.count()) == (5, 4)
    with Store(settings, "carried_to", pseudonyms) as opened:
        assert {hit.case.image_id for hit in opened.search(vectors(5, 1)[0], 5, "age > 30")} == {"b", "d", "e"}


def test_a_corrected_source_replaces_the_row(
    settings: MilvusSettings, entries: list[Entry], manifest: Manifest, pseudonyms: Pseudonyms
) -> None:
    """The old label must not go on voting beside the new one."""
    row = manifest.rows[0]
    corrected = make_entry(
        type(row)(row.folder, row.image_id, row.path, "control", row.patient_id, "elsewhere", row.split, row.fields), "a", pseudonyms
    )
    assert corrected.key == entries[0].key == pseudonyms.image("a")
    assert corrected.facts != entries[0].facts
    with Store(settings, "corrected", pseudonyms, create=True) as store:
        store.upsert(entries, digests(5), vectors(5))
        store.upsert([corrected], digests(1), vectors(5)[:1])
        cases = [case for case in store.vectors()[0] if case.image_id == "a"]
    assert [(case.label, case.source) for case in cases] == [("control", "elsewhere")]


@pytest.mark.parametrize(("cell", "limit"), [("label", 256), ("source", 256), ("split", 64)])
def test_cells_beyond_what_a_field_holds_are_refused_when_typed(manifest: Manifest, cell: str, limit: int, pseudonyms: Pseudonyms) -> None:
    """Counted in bytes, as Milvus does: one such cell had ended a whole ingest."""
    changed: dict[str, Any] = {cell: "é" * (limit // 2 + 1)}
    other = replace(manifest.rows[0], **changed)
    with pytest.raises(InputError, match=f"column {cell}: too long; expected at most {limit} bytes of UTF-8"):
        make_entry(other, "a", pseudonyms)


def test_further_columns_beyond_what_a_json_field_holds_are_refused_when_typed(manifest: Manifest, pseudonyms: Pseudonyms) -> None:
    row = replace(manifest.rows[0], fields={f"column {n}": "x" * 8_000 for n in range(9)})
    with pytest.raises(InputError, match="the row's further columns: too long; expected at most 65536 bytes"):
        make_entry(row, "", pseudonyms)


def test_prune_takes_only_what_these_sources_no_longer_list(settings: MilvusSettings, entries: list[Entry], pseudonyms: Pseudonyms) -> None:
    with Store(settings, "pruned", pseudonyms, create=True) as store:
        store.upsert(entries, digests(5), vectors(5))
        assert store.prune({entries[1].key, entries[2].key}, {"north"}) == [entries[0].key]
        assert store.count() == 4
        assert store.prune({entries[1].key}, {None}) == [entries[3].key]
        assert sorted(case.image_id for case in store.vectors()[0]) == ["b", "c", "e"]


def test_removal_reaches_the_galleries_of_every_model_version(
    settings: MilvusSettings, entries: list[Entry], pseudonyms: Pseudonyms
) -> None:
    """Consent withdrawn is withdrawn everywhere; a dry run touches nothing."""
    for version in ("removed_one", "removed_two"):
        with Store(settings, version, pseudonyms, create=True) as store:
            store.upsert(entries, digests(5), vectors(5))
            store.publish()
    wanted = sorted(entry.key for entry in entries if entry.row.image_id in ("a", "b"))
    clause = 'source == "north" and patient_id in ["p1", "p2"]'
    for dry_run in (True, False):
        found = remove_cases(settings, pseudonyms, clause, dry_run=dry_run)
        assert {name: found[name] for name in ("cxr_removed_one", "cxr_removed_two")} == dict.fromkeys(
            ("cxr_removed_one", "cxr_removed_two"), wanted
        )
    for version in ("removed_one", "removed_two"):
        with Store(settings, version, pseudonyms) as store:
            assert sorted(hit.case.image_id for hit in store.search(vectors(5)[0], 5)) == ["c", "d", "e"]
    assert drop_gallery(settings, "cxr_removed_two") in (3, 5), "a server may still count what is deleted"
    assert "cxr_removed_two" not in list_collections(settings)
    with pytest.raises(UsageError, match="no gallery cxr_removed_two; expected"):
        drop_gallery(settings, "cxr_removed_two")
    with pytest.raises(UsageError, match="unknown field"):
        remove_cases(settings, pseudonyms, 'patient == "p1"')
    for nothing in ("", " \n"):
        with pytest.raises(UsageError, match="the filter says nothing"):
            remove_cases(settings, pseudonyms, nothing)
    (other,) = remove_cases(settings, pseudonyms, 'patient_id != "p5"', dry_run=True)["cxr_removed_one"]
    assert other == pseudonyms.image("c"), "who may be p5, as nobody knows, stays"


def test_a_gallery_of_another_layout_is_refused(settings: MilvusSettings, pseudonyms: Pseudonyms) -> None:
    """As one made before facts were kept in double precision: it says which fields differ and what to do."""
    client = MilvusClient(settings.uri)
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("key", DataType.VARCHAR, max_length=32, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=VECTOR_SIZE)
    schema.add_field("fingerprint", DataType.VARCHAR, max_length=64)
    schema.add_field("file", DataType.FLOAT)
    client.create_collection("cxr_older", schema=schema)
    client.close()
    release(settings)
    with pytest.raises(StoreError, match=r"another version of this system.*got .*no pixels.*`cxr gallery drop cxr_older`"):
        Store(settings, "older", pseudonyms, create=True)
    assert drop_gallery(settings, "cxr_older") == 0


def test_a_gallery_in_clear_is_refused_and_can_be_dropped(settings: MilvusSettings, pseudonyms: Pseudonyms) -> None:
    """As they were made before there were pseudonyms; removing a patient's cases must not pass over it without a word."""
    client = MilvusClient(settings.uri)
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("key", DataType.VARCHAR, max_length=32, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=VECTOR_SIZE)
    for name in ("image_id", "path"):
        schema.add_field(name, DataType.VARCHAR, max_length=64)
    client.create_collection("cxr_clear", schema=schema)
    client.close()
    release(settings)
    said = r"collection cxr_clear holds image ids and paths in clear.*fields image_id, path.*`cxr gallery drop cxr_clear`"
    with pytest.raises(StoreError, match=said):
        Store(settings, "clear", pseudonyms, create=True)
    with pytest.raises(StoreError, match=said):
        remove_cases(settings, pseudonyms, 'patient_id == "p1"')
    assert drop_gallery(settings, "cxr_clear") == 0


def test_a_gallery_of_reports(settings: MilvusSettings, entries: list[Entry], pseudonyms: Pseudonyms) -> None:
    """Films and reports side by side: each is asked by itself, cases without a report come last, and the gallery knows what it is."""
    both = unit_vectors(10, 5)[:, :64] @ np.eye(64, SUBSPACE_SIZE, dtype=np.float32)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    images, texts = both[:5], both[5:]
    outputs = [
        {IMAGE_VECTOR.name: image, **({TEXT_VECTOR.name: text} if n < 3 else {})}
        for n, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    question = {IMAGE_VECTOR.name: texts[1]}
    with Store(settings, "reports_1", pseudonyms, create=True, space=REPORTS) as store:
        store.upsert(entries, ["0"] * 5, [REPORTS.vector(one) for one in outputs])
        store.publish()
        by_report = store.search(REPORTS.question(question, Match.report), 5)
        by_film = store.search(REPORTS.question(question, Match.film), 5)
        near = store.nearest(np.stack([REPORTS.vector(outputs[0])]), 1)[0][0]
    assert (by_report[0].case.key, by_report[0].similarity) == (entries[1].key, pytest.approx(1, abs=1e-5))
    assert {hit.case.key for hit in by_report[3:]} == {entries[3].key, entries[4].key}
    assert [hit.similarity for hit in by_report[3:]] == pytest.approx([-1, -1])
    expected = images @ texts[1]
    assert [hit.case.key for hit in by_film] == [entries[n].key for n in np.argsort(-expected)]
    assert [hit.similarity for hit in by_film] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert (near.key, near.similarity) == (entries[0].key, pytest.approx(1, abs=1e-5))
    with Store(settings, "reports_1", pseudonyms) as store:
        assert store.space is REPORTS
    with pytest.raises(StoreError, match="collection cxr_reports_1 is of another space; expected film; got reports"):
        Store(settings, "reports_1", pseudonyms, space=FILM)
    assert "the gallery" not in list_collections(settings)["cxr_reports_1"]
    assert drop_gallery(settings, "cxr_reports_1") == 5


def test_a_gallery_of_another_key_is_refused(
    settings: MilvusSettings, entries: list[Entry], pseudonyms: Pseudonyms, tmp_path: Path
) -> None:
    """Its keys would never be found again, and cases would be stored twice."""
    other = Pseudonyms(b"another hospital's key, of 32 bytes", tmp_path / "table")
    with Store(settings, "keyed", pseudonyms, create=True) as store:
        store.upsert(entries, digests(5), vectors(5))
    with pytest.raises(StoreError, match=f"another pseudonym key; expected the key with the fingerprint {pseudonyms.fingerprint}"):
        Store(settings, "keyed", other)
    with pytest.raises(StoreError, match="another pseudonym key"):
        remove_cases(settings, other, 'image_id == "a"')
    with Store(settings, "keyed", pseudonyms) as store:
        assert store.count() == 5
    drop_gallery(settings, "cxr_keyed")


def test_without_the_table_there_are_pseudonyms(
    settings: MilvusSettings, entries: list[Entry], pseudonyms: Pseudonyms, tmp_path: Path
) -> None:
    """The key alone, as on a second workstation: cases are found, and have no names."""
    with Store(settings, "untabled", pseudonyms, create=True) as store:
        store.upsert(entries, digests(5), vectors(5))
    key = KEY_FILE.read_text().strip()
    with (
        Pseudonyms(key.encode(), tmp_path / "none") as keys,
        Store(settings, "untabled", keys) as store,
    ):
        (found,) = store.search(vectors(5)[0], 1, 'image_id == "a" and patient_id == "p1"')
    assert (found.case.image_id, found.case.path) == (entries[0].key, None)
    assert not (tmp_path / "none").exists()
    drop_gallery(settings, "cxr_untabled")


def test_thumbnails_come_back_as_they_were_and_go_with_their_cases(
    settings: MilvusSettings, manifest: Manifest, pseudonyms: Pseudonyms
) -> None:
    """Even noise, which no compression makes smaller, is kept without loss; two galleries share them, and no other test has these cases."""
    entries = [make_entry(replace(row, image_id=f"pictured-{row.image_id}"), "", pseudonyms) for row in manifest.rows]
    noise = np.random.default_rng(0).integers(0, 256, (5, 256, 256), np.uint8)
    kinds = (ThumbnailKind.full, ThumbnailKind.lungs)
    pictures = [
        Thumbnail(entry.key, kinds[i % 2], digest, noise[i]) for i, (entry, digest) in enumerate(zip(entries, digests(5), strict=True))
    ]
    keys = [entry.key for entry in entries]
    with Store(settings, "pictured_one", pseudonyms, create=True) as store:
        assert store.thumbnails(keys) == store.thumbnail_kinds(keys) == {}
        store.upsert(entries, digests(5), vectors(5))
        store.keep_thumbnails(pictures)
        store.keep_thumbnails(pictures[:1])
        store.publish()
    with Store(settings, "pictured_two", pseudonyms, create=True) as store:
        store.upsert(entries[:4], digests(4), vectors(4))
        found = store.thumbnails([*keys, "0" * 32])
        assert found.keys() == set(keys)
        for picture in pictures:
            assert (found[picture.key].kind, found[picture.key].pixels) == (picture.kind, picture.pixels)
            assert np.array_equal(found[picture.key].square, picture.square)
        assert store.thumbnail_kinds(keys[:2]) == {keys[0]: ThumbnailKind.full, keys[1]: ThumbnailKind.lungs}
        assert set(store.prune([], {"north"})) == set(keys[:2])
        assert store.thumbnail_kinds(keys).keys() == set(keys), "the other gallery still holds these"
        store.remove_thumbnails([keys[2]])
        assert store.thumbnail_kinds(keys).keys() == {keys[0], keys[1], keys[3], keys[4]}
    remove_cases(settings, pseudonyms, 'image_id == "pictured-d"')
    with Store(settings, "pictured_one", pseudonyms) as store:
        assert store.thumbnail_kinds(keys).keys() == {keys[0], keys[1], keys[4]}
        assert store.prune(keys[:1], {"north"}) == [keys[1]]
        assert store.thumbnail_kinds(keys).keys() == {keys[0], keys[4]}
    drop_gallery(settings, "cxr_pictured_one")
    with Store(settings, "pictured_two", pseudonyms) as store:
        assert store.thumbnail_kinds(keys) == {}, "no gallery holds the first and the last any more"


def test_no_gallery_for_this_model(settings: MilvusSettings, pseudonyms: Pseudonyms) -> None:
    with pytest.raises(StoreError, match="no gallery for model version never_ingested"):
        Store(settings, "never_ingested", pseudonyms)


def test_asking_creates_nothing(tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    with pytest.raises(StoreError, match="nothing there"):
        Store(MilvusSettings(str(tmp_path / "typo.db")), "v", pseudonyms)
    assert not (tmp_path / "typo.db").exists()


def test_wrong_vector_size_is_refused(settings: MilvusSettings, pseudonyms: Pseudonyms) -> None:
    client = MilvusClient(settings.uri)
    client.create_collection("cxr_wrong", dimension=32, id_type="string", max_length=32, vector_field_name="embedding")
    client.close()
    release(settings)
    with pytest.raises(StoreError, match="expected a field embedding of 120 dimensions; got 32 dimensions"):
        Store(settings, "wrong", pseudonyms, create=True)
    assert "cxr_wrong" in list_collections(settings)


def test_server_down(pseudonyms: Pseudonyms) -> None:
    with pytest.raises(StoreError, match=r"no Milvus answers at http://127\.0\.0\.1:1"):
        Store(MilvusSettings("http://127.0.0.1:1", timeout_s=2), "v", pseudonyms)


@contextmanager
def lite_server(folder: Path) -> Generator[tuple[subprocess.Popen[str], str]]:
    """Milvus Lite behind gRPC, in a process of its own, and its URI."""
    code = (
        "from milvus_lite.adapter.grpc.server import start_server_in_thread as start\n"
        f"server, database, port = start({str(folder)!r})\n"
        "print(port, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server, f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


def test_a_server_that_goes_away_is_an_error_within_the_deadline(tmp_path: Path, entries: list[Entry], pseudonyms: Pseudonyms) -> None:
    with lite_server(tmp_path / "g.db") as (server, uri), Store(MilvusSettings(uri, timeout_s=3), "v", pseudonyms, create=True) as store:
        store.upsert(entries, digests(5), vectors(5))
        server.kill()
        server.wait()
        started = time.monotonic()
        for call in (
            store.count,
            lambda: store.search(vectors(1)[0], 3),
            lambda: store.upsert(entries, digests(5), vectors(5)),
            store.vectors,
        ):
            with pytest.raises(StoreError, match="no Milvus answers at"):
                call()
        assert time.monotonic() - started < 40


def test_a_server_that_stalls_is_an_error_within_the_deadline(tmp_path: Path, entries: list[Entry], pseudonyms: Pseudonyms) -> None:
    """Deadlines reach us as gRPC raises them, not as Milvus' own exceptions."""
    with lite_server(tmp_path / "g.db") as (server, uri), Store(MilvusSettings(uri, timeout_s=2), "v", pseudonyms, create=True) as store:
        store.upsert(entries, digests(5), vectors(5))
        server.send_signal(signal.SIGSTOP)
        os.waitpid(server.pid, os.WUNTRACED)  # until each of its threads stands still: until then it may answer
        try:
            for call in (store.count, lambda: store.search(vectors(1)[0], 3)):
                with pytest.raises(StoreError, match=r"took too long; expected an answer within 2 s|no Milvus answers"):
                    call()
        finally:
            server.send_signal(signal.SIGCONT)
        assert store.count() == 5, "and goes on when the server does"


def test_lite_locked_by_another_process(tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    folder = tmp_path / "gallery.db"
    code = f"from milvus_lite.db import MilvusLite; MilvusLite({str(folder)!r}); print('open', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match="another process has this gallery open"):
            Store(MilvusSettings(str(folder)), "v", pseudonyms, create=True)
    finally:
        holder.communicate("\n", timeout=30)
    with Store(MilvusSettings(str(folder)), "v", pseudonyms, create=True) as store:
        assert store.count() == 0


def test_lite_path_that_is_a_file(tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    path = tmp_path / "notes.db"
    path.write_text("not a gallery")
    with pytest.raises(StoreError, match="not a usable Milvus Lite folder"):
        Store(MilvusSettings(str(path)), "v", pseudonyms, create=True)


def test_dashboard_asks_milvus_for_what_it_exports(milvus_process: Any, milvus_server: str) -> None:
    client = MilvusClient(milvus_server)
    client.create_collection("watched", dimension=VECTOR_SIZE)
    client.search("watched", [[0.1] * VECTOR_SIZE], limit=1)
    client.drop_collection("watched")
    client.close()
    exported = urllib.request.urlopen(f"http://127.0.0.1:{milvus_process.webservice_port}/metrics", timeout=30).read().decode()
    asked = {name.removesuffix("_bucket") for name in dashboard_metrics("milvus_")}
    assert asked == {"milvus_proxy_sq_latency", "milvus_proxy_req_count"}
    for name in asked:
        assert f"# TYPE {name} " in exported, name
    assert 'query_type="search"' in exported


def test_a_published_gallery_is_sealed(tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    """Unsealed rows are searched one by one in Milvus Lite; an ingest must not leave a gallery like that to those who query it."""
    vectors = unit_vectors(2000)
    rows = [ManifestRow(tmp_path, f"case-{i}", tmp_path / f"{i}.png", "control", None, None, None, {}) for i in range(len(vectors))]

    def seconds(store: Store) -> float:
        started = time.perf_counter()
        for vector in vectors[:10]:
            assert store.search(vector, 1)[0].similarity == pytest.approx(1.0, abs=1e-4)
        return time.perf_counter() - started

    with Store(MilvusSettings(str(tmp_path / "gallery.db")), "sealed", pseudonyms, create=True) as store:
        store.upsert([make_entry(row, "", pseudonyms) for row in rows], digests(len(rows)), vectors)
        before = seconds(store)
        store.publish()
        store.search(vectors[0], 1)
        assert seconds(store) < before / 2


def test_milvus_lite_leaves_the_other_cores_alone(tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    """Its searches on one thread, wherever they run; what was set before comes back."""

    def threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        assert threads() == {2}
        with Store(MilvusSettings(str(tmp_path / "gallery.db")), "v", pseudonyms, create=True):
            assert threads() == {1}
        assert threads() == {2}
        with embedded_milvus(tmp_path / "served.db", "127.0.0.1", 0) as uri:
            assert threads() == {1}
            with Store(MilvusSettings(uri), "v", pseudonyms, create=True):
                assert threads() == {1}
        assert threads() == {2}
        with pytest.raises(StoreError, match="no gallery"):
            Store(MilvusSettings(str(tmp_path / "gallery.db")), "other", pseudonyms)
        assert threads() == {2}


def test_a_server_that_takes_no_writes_is_waited_for(
    milvus_process: Any, milvus_server: str, entries: list[Entry], pseudonyms: Pseudonyms
) -> None:
    """Its administrator forbids them, with the code that a used-up quota has, and allows them again; it reads that file every few seconds."""
    config = Path(milvus_process.config.base_data_dir) / "configs" / "milvus.yaml"
    allowed = config.read_text()
    denied = threading.Event()

    def until_denied(store: Store) -> None:
        for _ in range(60):
            store.upsert(entries[:1], digests(1), vectors(1))
            time.sleep(0.5)

    with Store(MilvusSettings(milvus_server), "denied", pseudonyms, create=True) as store, ThreadPoolExecutor(1) as pool:
        config.write_text(allowed.replace("forceDeny: false", "forceDeny: true", 1))
        try:
            with pytest.raises(StoreFullError, match="takes nothing more now"):
                until_denied(store)
            patience = Patience(threading.Event(), 60, tell=lambda _: denied.set())
            upserting = pool.submit(patience.until, "milvus", lambda: store.upsert(entries, digests(5), vectors(5)))
            assert denied.wait(30)
        finally:
            config.write_text(allowed)
        upserting.result()
        assert store.count() == 5
