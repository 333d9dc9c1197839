"""`cxr cluster` and `cxr query --method cluster` on a real Milvus Lite gallery of made-up vectors, with a real Triton."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chaos.instant import VERSION
from clusters import fill
from cxr_retrieval.archive import clustering as module
from cxr_retrieval.archive.audit import entries
from cxr_retrieval.archive.clustering import Found, add_new, find_clusters, keep_clusters
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.recalibration import recalibrate
from cxr_retrieval.gallery.backup import export_gallery, import_gallery, read_backup
from cxr_retrieval.gallery.store import CALIBRATION, CLUSTERS, SITES, Case, Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from cxr_retrieval.retrieval.clusters import CONFINED, read_clustering
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.retrieval.site import Site, sites_as_text
from cxr_retrieval.serving.server import Endpoints
from cxr_retrieval.settings import Method, MilvusSettings
from tests_support import run_cxr

CASES = 240


def patience(stop: threading.Event | None = None) -> Patience:
    return Patience(stop or threading.Event(), 0)


def found_in(store: Store, **options: Any) -> Found:
    found = find_clusters(store, patience(), **options)
    assert found is not None
    return found


@pytest.fixture
def store(tmp_path: Path, pseudonyms: Pseudonyms) -> Iterator[Store]:
    """Of three clusters, two films of each patient."""
    with Store(MilvusSettings(str(tmp_path / "gallery.db")), VERSION, pseudonyms, create=True) as opened:
        fill(opened, CASES)
        yield opened


@pytest.fixture
def film(tmp_path: Path) -> Path:
    write_dicom(make_phantom(5, "covid19"), tmp_path / "film.dcm")
    return tmp_path / "film.dcm"


def facts(store: Store) -> dict[str, dict[str, Any]]:
    """All that is stored but for clusters."""
    rows = {str(row["key"]): row for row in store.rows(["*"])}
    return {key: {name: value for name, value in row.items() if name not in ("cluster", "strength")} for key, row in rows.items()}


def test_a_gallery_is_clustered_asked_and_forgotten(tmp_path: Path, film: Path, quick: Endpoints, pseudonyms: Pseudonyms) -> None:
    settings = MilvusSettings(str(tmp_path / "gallery.db"))
    with Store(settings, VERSION, pseudonyms, create=True) as store:
        fill(store, CASES)
    reach = ("--milvus", settings.uri, "--audit", tmp_path / "audit.jsonl")
    ask = ("query", film, "--no-gate", "--triton", quick.grpc, *reach)

    unclustered = run_cxr(*ask, "--method", "cluster")
    assert unclustered.returncode == 2
    assert "this gallery has no clusters" in unclustered.stderr
    assert "Next: give `cxr cluster`" in unclustered.stderr

    done = run_cxr("cluster", *reach)
    assert done.returncode == 0, done.stderr
    assert "240 cases in 3 clusters; `cxr query --method cluster` looks in them from now on" in done.stdout
    assert "adjusted Rand index between seeds: 1.000 in the mean, 1.000 at least" in done.stdout

    said = run_cxr(*ask, "--method", "cluster")
    assert re.search(r"0\.\d{4} +covid19 +\d: 7\d of \d\d covid19", said.stdout), said.stdout
    assert CONFINED in " ".join(said.stdout.split())
    stored = run_cxr("ingest", film, "--label", "control", "--no-gate", "--triton", quick.grpc, *reach)
    assert "1 of the cases are in no cluster. Next: `cxr cluster --new`" in stored.stderr
    assert "1 new cases put into 1 of 3 clusters" in run_cxr("cluster", "--new", *reach).stdout
    assert "has forgotten its clusters" in run_cxr("cluster", "--undo", *reach).stdout
    log = [line for line in entries(tmp_path / "audit.jsonl") if line["action"] == "cluster"]
    assert len(log) >= 4, "begun and ended"


def test_what_an_answer_says_and_does_not_say(
    store: Store, film: Path, reader: FilmReader, quick_client: TritonClient, pseudonyms: Pseudonyms
) -> None:
    found = found_in(store)
    assert keep_clusters(store, found, patience())
    clustering = found.clustering
    site = Site("north", VERSION, CASES, 60, {"control": 0.5, "covid19": 0.5}, {"control": 0.0, "covid19": 0.0}, 0.1, {})
    store.keep({CALIBRATION: recalibrate(store, top_k=10).calibration.as_text(), SITES: sites_as_text({"north": site})})

    def ask(**options: Any) -> Any:
        return query(film, reader, quick_client, store, gate=False, **options)

    nearest, result = ask(), ask(method=Method.cluster)
    assert nearest.trust.calibrated is not None
    assert result.clustering == clustering
    assert (result.trust.calibrated, result.trust.labels) == (None, None)
    assert len(result.neighbours) == 10
    assert CONFINED in result.sentence
    before, after = nearest.as_json(), result.as_json()
    assert {*before, "method"} == {*after}
    assert {*before["neighbours"][0], "cluster"} == {*after["neighbours"][0]}
    beside = after["neighbours"][0]["cluster"]
    assert beside.keys() == {"number", "cases", "labels"}
    assert sum(beside["labels"].values()) == beside["cases"]
    assert len({hit["cluster"]["number"] for hit in after["neighbours"]}) == 1

    patient = "patient-3"
    key = pseudonyms.patient(patient)
    asked: list[tuple[int, dict[str, Any], Callable[[Case], bool]]] = [
        (10, {"where": 'sex == "F"'}, lambda case: case.metadata["sex"] == "F"),
        (60, {"where": 'label == "covid19"'}, lambda case: case.label == "covid19"),
        (200, {"patient": patient}, lambda case: case.patient_id != key),
    ]
    for count, options, meant in asked:
        hits = ask(method=Method.cluster, top_k=count, **options).neighbours
        assert len(hits) == count
        assert all(meant(hit.case) for hit in hits)
    assert any(hit.case.patient_id == key for hit in ask(method=Method.cluster, patient=patient, top_k=CASES, include_own=True).neighbours)
    everything = ask(method=Method.cluster, top_k=CASES)
    assert sorted(hit.case.key for hit in everything.neighbours) == sorted(found.of), "one cluster after the other"
    order = [clustering.number(hit.case.cluster) for hit in everything.neighbours]
    assert sum(one != after for one, after in pairwise(order)) == len(clustering.clusters) - 1
    told = " ".join(ask(method=Method.cluster, source="north").warnings)
    assert f"the profile of north did not vote: {CONFINED}" in told
    assert ask(source="north").site == site
    with pytest.raises(UsageError, match="another balance"):
        ask(method=Method.cluster, balance=0.5)
    with pytest.raises(UsageError, match="no case to compare with"):
        ask(method=Method.cluster, where="age > 200")


def test_new_cases_are_put_beside_those_they_are_like(store: Store, film: Path, reader: FilmReader, quick_client: TritonClient) -> None:
    found = found_in(store)
    keep_clusters(store, found, patience())
    clusters = fill(store, 60, start=CASES)
    asked = query(film, reader, quick_client, store, gate=False, method=Method.cluster, top_k=30)
    assert "of the 32 nearest cases are in no cluster, and not found so: `cxr cluster --new`" in " ".join(asked.warnings)
    before = facts(store)
    tried = add_new(store, patience(), dry_run=True)
    assert (sum(tried.cases.values()), tried.whole) == (60, True)
    assert read_clustering(store.clusters) == found.clustering

    added = add_new(store, patience())
    assert added == tried
    assert facts(store) == before, "no case changes but for its cluster"
    kept = read_clustering(store.clusters)
    assert (kept.run, kept.cases, kept.k) == (found.clustering.run, CASES + 60, found.clustering.k)
    of = dict(store.assigned())
    numbers = {key: kept.number(label) for key, label in of.items()}
    assert None not in numbers.values()
    for part in range(3):
        assert len({numbers[key] for key, one in zip(clusters.keys, clusters.of, strict=True) if one == part}) == 1
    assert add_new(store, patience()).cases == {}
    stopped = threading.Event()
    stopped.set()
    fill(store, 10, start=CASES + 60)
    assert not add_new(store, patience(stopped)).whole


def test_clusters_are_in_force_wholly_or_not_at_all(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts(store)
    first = found_in(store, k=5)
    keep_clusters(store, first, patience())
    assert facts(store) == before
    monkeypatch.setattr(module, "_WRITTEN", 50)
    second, stop = found_in(store, k=12), threading.Event()
    assert second.clustering.run != first.clustering.run
    assert not keep_clusters(store, second, patience(stop), lambda _: stop.set())
    assert store.clusters == "", "neither the former nor the new one"
    with Store(MilvusSettings(str(tmp_path / "gallery.db")), VERSION, store.pseudonyms, beside=store) as again:
        assert again.clusters == ""
        assert sum(label == second.of[key][0] for key, label in again.assigned()) == 50
    assert keep_clusters(store, second, patience())
    assert read_clustering(store.clusters) == second.clustering
    assert dict(store.assigned()) == {key: label for key, (label, _) in second.of.items()}
    assert find_clusters(store, patience(stop)) is None, "stopped before anything is written"
    assert read_clustering(store.clusters) == second.clustering


def test_what_came_or_went_meanwhile_is_left_alone(store: Store) -> None:
    found = found_in(store)
    keys = sorted(found.of)
    store.remove(keys[:1])
    other = np.roll(found.vectors[keys[1]], 1)
    store.put([{**store.rows_of(keys[1:2])[keys[1]], "embedding": other.tolist()}])
    keep_clusters(store, found, patience())
    held = dict(store.assigned())
    assert keys[0] not in held
    assert held[keys[1]] is None, "another film by now"
    assert add_new(store, patience()).cases.keys() <= set(range(len(found.clustering.clusters)))
    assert None not in dict(store.assigned()).values()


def test_clusters_outlive_a_backup(store: Store, tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    keep_clusters(store, found_in(store), patience())
    export_gallery(store, tmp_path / "gallery.parquet")
    settings = MilvusSettings(str(tmp_path / "other.db"))
    taken = import_gallery(settings, pseudonyms, tmp_path / "gallery.parquet", read_backup(tmp_path / "gallery.parquet"))
    assert CLUSTERS in taken
    with Store(settings, VERSION, pseudonyms) as other:
        assert other.clusters == store.clusters
        assert dict(other.assigned()) == dict(store.assigned())
        assert {row["key"]: row["strength"] for row in other.rows(["key", "strength"])} == {
            row["key"]: row["strength"] for row in store.rows(["key", "strength"])
        }


def test_galleries_that_cannot_be_clustered(tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    settings = MilvusSettings(str(tmp_path / "few.db"))
    with Store(settings, VERSION, pseudonyms, create=True) as store:
        store.publish()
        with pytest.raises(UsageError, match=r"no case to cluster; expected more than 10.*ingest more\."):
            find_clusters(store, patience())
        fill(store, 4)
        with pytest.raises(UsageError, match=r"too few cases to cluster; expected more than 10.*got 4.*fewer --neighbours"):
            find_clusters(store, patience())
        assert found_in(store, k=3).clustering.cases == 4
        with pytest.raises(UsageError, match="no clusters"):
            add_new(store, patience())
    away = run_cxr("cluster", "--milvus", "http://127.0.0.1:1", "--patience", "0", "--timeout", "2")
    assert away.returncode == 2
    assert "no Milvus answers" in away.stderr
