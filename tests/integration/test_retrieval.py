"""Ingest and query through real Triton and real Milvus Lite: results, idempotence, and every bad file of a batch."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from cxr_retrieval.archive.embedding import embed_rows, ingest
from cxr_retrieval.archive.inputs import Unlisted, Unusable, as_cases, find_inputs
from cxr_retrieval.cases.fhir import read_chart
from cxr_retrieval.cases.manifest import ManifestRow, read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.errors import ImageError, UsageError
from cxr_retrieval.evaluation.metrics import LabelledSet, rank
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS, comparable, side_by_side
from cxr_retrieval.gallery.store import Case, Neighbour, Store
from cxr_retrieval.inference.triton import BATCH_SIZE, TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom, write_dicom, write_phantoms
from cxr_retrieval.retrieval.own import OWN_EXPECTED, nearest_others
from cxr_retrieval.retrieval.query import lung_warnings, query
from cxr_retrieval.retrieval.voting import weighted_vote
from cxr_retrieval.settings import MilvusSettings
from fhir_bundles import PRIVATE, hospital, written


def silent(count: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def gallery(
    reader: FilmReader, triton: TritonClient, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory, pseudonyms: Pseudonyms
) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("store")
    with Store(MilvusSettings(str(folder / "gallery.db")), triton.model_version, pseudonyms, create=True) as store:
        report = ingest(read_manifest(phantom_manifest).rows, reader, triton, store, silent)
        assert (report.stored, report.unchanged, report.problems) == (9, 0, ())
        yield store


def test_a_gallery_image_finds_itself_but_does_not_vote(
    gallery: Store, reader: FilmReader, triton: TritonClient, phantom_manifest: Path, tmp_path: Path
) -> None:
    """The same pixels under another name, in another format, without a patient: shown apart, and counted only if asked for."""
    row = read_manifest(phantom_manifest).rows[4]
    with Image.open(row.path) as image:
        image.save(tmp_path / "again.tiff")
    for path in (row.path, tmp_path / "again.tiff"):
        result = query(path, reader, triton, gallery, top_k=4)
        assert [hit.case.image_id for hit in result.own] == [row.image_id]
        assert result.own[0].similarity == pytest.approx(1, abs=1e-3)
        assert result.own[0].case.metadata["age"] == float(row.fields["age"])
        assert row.image_id not in {hit.case.image_id for hit in result.neighbours}
        assert len(result.neighbours) == 4
        assert "they do not vote" in result.warnings[-1]
    counted = query(row.path, reader, triton, gallery, top_k=4, include_own=True)
    assert counted.neighbours[0].case.image_id == row.image_id
    assert (counted.prediction.label, counted.own) == (row.label, ())


def test_the_patients_own_earlier_film_does_not_decide(
    reader: FilmReader, triton: TritonClient, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    """One own control film hardly changed, beside others' COVID-19: known by DICOM's Patient ID, or by --patient; unknown patients stay."""
    phantom = make_phantom(60, "control")
    earlier = phantom.pixels.copy()
    earlier[:3] = np.minimum(earlier[:3], 200) + 1
    Image.fromarray(earlier).save(tmp_path / "earlier.png")
    write_dicom(phantom, tmp_path / "now.dcm")  # its Patient ID is the phantom's image_id
    lines = [f"earlier,earlier.png,control,{phantom.image_id}"]
    for seed, patient in ((70, "p1"), (71, ""), (72, "")):
        Image.fromarray(make_phantom(seed, "covid19").pixels).save(tmp_path / f"{seed}.png")
        lines.append(f"{seed},{seed}.png,covid19,{patient}")
    (tmp_path / "m.csv").write_text("image_id,path,label,patient_id\n" + "\n".join(lines) + "\n")
    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, pseudonyms, create=True) as store:
        assert ingest(read_manifest(tmp_path / "m.csv").rows, reader, triton, store, silent).stored == 4
        found = query(tmp_path / "now.dcm", reader, triton, store, top_k=3)
        assert [hit.case.image_id for hit in found.own] == ["earlier"]
        assert {hit.case.image_id for hit in found.neighbours} == {"70", "71", "72"}
        assert found.prediction.scores == {"covid19": pytest.approx(1)}
        Image.fromarray(phantom.pixels).save(tmp_path / "now.png")
        unknown = query(tmp_path / "now.png", reader, triton, store, top_k=3)
        assert unknown.neighbours[0].case.image_id == "earlier", "nobody said whose it is"
        told = query(tmp_path / "now.png", reader, triton, store, top_k=3, patient=phantom.image_id)
        assert [hit.case.image_id for hit in told.own] == ["earlier"]
        counted = query(tmp_path / "now.dcm", reader, triton, store, top_k=3, include_own=True)
        assert counted.neighbours[0].case.image_id == "earlier"
        with pytest.raises(UsageError, match=r"none, but 1 of this patient.*--include-own"):
            query(tmp_path / "now.dcm", reader, triton, store, where='image_id == "earlier"')


def test_shipped_weights_tell_phantoms_apart(triton: TritonClient) -> None:
    """Which they never saw: thirty-six, each voted on by the others. The lesions were drawn with an eye on seeds 0 to 29 and 700 to 729; these are others."""
    drawn = [make_phantom(seed, label) for label in PHANTOM_LABELS for seed in range(800, 812)]
    squares = np.stack([letterbox(phantom.pixels)[0] for phantom in drawn])[:, None]
    answers = [triton.infer(squares[i : i + BATCH_SIZE], PARTS) for i in range(0, len(squares), BATCH_SIZE)]
    found = comparable(np.concatenate([side_by_side(answer) for answer in answers]), DEFAULT_BALANCE)
    similarities = found @ found.T
    right = 0
    for asked, phantom in enumerate(drawn):
        nearest = [other for other in np.argsort(-similarities[asked]) if other != asked][:10]
        right += weighted_vote([(drawn[other].label, float(similarities[asked, other])) for other in nearest]).label == phantom.label
    assert right / len(drawn) >= 0.9


@pytest.mark.parametrize(("own", "searches"), [(0, 1), (2, 1), (3, 2), (40, 5), (90, 6), (100, 6)])
def test_more_own_films_than_one_search_looks_at(own: int, searches: int) -> None:
    """The search goes on until enough of others are found: none is missing because a patient has many films."""
    cases = [Case(f"{i}", f"{i}", "control", "P" if i < own else None, None, None, Path("x"), {}, "", "") for i in range(100)]
    hits = [Neighbour(case, 1 - i / 100, 1 - i / 100, 1 - i / 100) for i, case in enumerate(cases)]
    asked: list[int] = []

    def search(limit: int) -> list[Neighbour]:
        asked.append(limit)
        return hits[:limit]

    others, mine = nearest_others(search(2 + OWN_EXPECTED), search, 2, lambda case: case.patient_id == "P")
    assert others == hits[own : own + 2]
    assert mine == hits[:own]
    assert len(asked) == searches


def test_published_json(gallery: Store, reader: FilmReader, triton: TritonClient, phantom_manifest: Path) -> None:
    answer = query(read_manifest(phantom_manifest).rows[0].path, reader, triton, gallery, top_k=3).as_json()
    assert set(answer) == {
        "image_id",
        "model_version",
        "balance",
        "prediction",
        "neighbours",
        "earlier_films",
        "summary",
        "timings_ms",
        "warnings",
        "ood",
    }
    assert answer["ood"]["refused"] is False
    assert set(answer["prediction"]) == {"label", "confidence", "scores", "calibrated", "set", "abstained"}
    assert [set(neighbour) for neighbour in answer["neighbours"]] == [{"rank", "image_id", "similarity", "label", "metadata"}] * 3
    assert [set(film) for film in answer["earlier_films"]] == [{"image_id", "similarity", "label", "metadata"}]
    assert [neighbour["rank"] for neighbour in answer["neighbours"]] == [1, 2, 3]
    assert sum(answer["prediction"]["scores"].values()) == pytest.approx(1)
    assert answer["timings_ms"]["total"] > 0
    ages = [neighbour["metadata"]["age"] for neighbour in answer["neighbours"]]
    assert answer["summary"]["n"] == 3
    assert answer["summary"]["features"]["age"]["median"] == sorted(ages)[1]
    assert (answer["prediction"]["calibrated"], answer["prediction"]["set"]) == (None, None)
    assert any("3 voted here; `cxr calibrate`" in warning for warning in answer["warnings"]), "phantoms are no hospital that was measured"


@pytest.mark.parametrize("balance", [0.0, 0.6, 1.0])
def test_another_balance_finds_other_cases_and_promises_nothing(
    gallery: Store, reader: FilmReader, triton: TritonClient, phantom_manifest: Path, balance: float
) -> None:
    """Confidence was measured at the default one, and so was the distance beyond which the gate refuses."""
    film = read_manifest(phantom_manifest).rows[0].path
    found = query(film, reader, triton, gallery, top_k=8, balance=balance)
    for hit in found.neighbours:
        assert hit.similarity == pytest.approx((1 - balance) * hit.semantic + balance * hit.visual, abs=1e-6)
    assert [hit.similarity for hit in found.neighbours] == sorted((hit.similarity for hit in found.neighbours), reverse=True)
    assert found.as_json()["balance"] == balance
    assert (found.trust.calibrated, found.trust.labels) == (None, None)
    assert any(f"measured at a balance of {DEFAULT_BALANCE:g}, and this is {balance:g}" in warning for warning in found.warnings)
    usual = query(film, reader, triton, gallery, top_k=8)
    assert usual.balance == DEFAULT_BALANCE
    assert {hit.case.key for hit in usual.neighbours} == {hit.case.key for hit in found.neighbours}, "eight of nine, in another order"
    assert [hit.similarity for hit in usual.neighbours] != [hit.similarity for hit in found.neighbours]


def test_a_balance_that_is_none_is_refused_before_anything_is_asked(
    gallery: Store, reader: FilmReader, triton: TritonClient, phantom_manifest: Path
) -> None:
    for balance in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="correct --balance"):
            query(read_manifest(phantom_manifest).rows[0].path, reader, triton, gallery, balance=balance)


def test_facts_come_from_fhir_where_the_manifest_has_none(
    reader: FilmReader, triton: TritonClient, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    """By patient_id and the row's date, by DICOM's Patient ID and Study Date; what cannot be stored twice is stored once; nobody is named."""
    write_phantoms(tmp_path, [make_phantom(seed, "covid19") for seed in (5, 6, 7)])
    paths = sorted((tmp_path / "images").iterdir())
    lines = ["image_id,path,label,patient_id,date,temperature [degF],spo2"]
    lines += [
        f"a,{paths[0]},covid19,MRN-4711,2020-03-20,,20",
        f"b,{paths[1]},covid19,MRN-4712,2020-03-25,98.6,",
        f"c,{paths[2]},covid19,,,,",
    ]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    write_dicom(make_phantom(8, "covid19"), tmp_path / "film.dcm")
    dataset = pydicom.dcmread(tmp_path / "film.dcm")
    dataset.PatientID, dataset.StudyDate = "NHS-p1", "20190103"
    dataset.save_as(tmp_path / "film.dcm")
    chart = read_chart([written(tmp_path / "bundle.json", hospital())])

    def rows() -> list[ManifestRow | Unlisted | Unusable]:
        found = find_inputs([str(tmp_path / "film.dcm"), str(tmp_path / "m.csv")], reader)
        return list(as_cases(found, "covid19", None, None))

    with Store(MilvusSettings(str(tmp_path / "gallery.db")), triton.model_version, pseudonyms, create=True) as store:
        first = ingest(rows(), reader, triton, store, silent, chart=chart)
        assert (first.stored, first.problems, first.charted) == (4, (), 3)
        assert [(doubt.image_id, doubt.words.split(" is ")[0]) for doubt in first.doubts] == [("a", "column spo2: 20")]
        facts = {case.image_id: dict(case.metadata) for case in store.vectors()[0]}
        assert facts["a"]["spo2"] == 20, "the manifest wins, whatever one may think of it"
        assert (facts["a"]["temperature"], facts["a"]["went_icu"], facts["a"]["survival"], facts["a"]["age"]) == (38.5, True, False, 67)
        assert (facts["b"]["temperature"], facts["b"]["spo2"], facts["b"]["went_icu"]) == (37, 97, False)
        assert facts["c"] == {}
        (film,) = (facts[name] for name in facts.keys() - {"a", "b", "c"})
        assert film == {"age": 66, "sex": "F", "survival": True, "went_icu": False, "temperature": 36.6}, "the stay of that day; no date"
        assert not [word for word in PRIVATE if word in str(facts)]
        assert ingest(rows(), reader, triton, store, silent, chart=chart).unchanged == 4
        assert ingest(rows(), reader, triton, store, silent).corrected == 3, "what came from a bundle goes with it"


def test_dicom_query_and_where(gallery: Store, reader: FilmReader, triton: TritonClient, tmp_path: Path) -> None:
    write_dicom(make_phantom(77, "covid19"), tmp_path / "q.dcm")
    result = query(tmp_path / "q.dcm", reader, triton, gallery, where='label != "covid19"')
    assert {hit.case.label for hit in result.neighbours} == {"control", "non_covid_pneumonia"}
    assert "only 6 of 10 neighbours" in result.warnings[-1]
    with pytest.raises(UsageError, match="no case to compare with"):
        query(tmp_path / "q.dcm", reader, triton, gallery, where="age > 200")


def test_hardly_any_lung_is_a_warning() -> None:
    """Counted on the picture itself, not on the black bars beside it."""
    _, box = letterbox(np.full((512, 128), 9, np.uint8))
    mask = np.zeros((256, 256), np.uint8)
    assert "cover 0% of the picture" in lung_warnings(mask, box, 0.0)[0]
    mask[:32, box.left : box.left + box.width] = 255
    assert lung_warnings(mask, box, 0.97) == []


def test_networks_that_disagree_are_a_warning(triton: TritonClient) -> None:
    """A phantom's lungs are agreed upon; a lung-like mask on an even picture is not."""
    _, box = letterbox(np.full((256, 256), 9, np.uint8))
    mask = np.full((256, 256), 255, np.uint8)
    assert "agree to 0.62 only" in lung_warnings(mask, box, 0.62)[0]
    phantom = letterbox(make_phantom(5, "control").pixels)[0]
    even = np.full((256, 256), 128, np.uint8)
    found = triton.infer(np.stack([phantom, even])[:, None], (LUNG_MASK, LUNG_AGREEMENT))
    agreed = found["LUNG_AGREEMENT"][:, 0]
    assert 0 <= float(agreed[1]) < float(agreed[0]) <= 1
    assert lung_warnings(np.asarray(found["LUNG_MASK"][0, 0], np.uint8), box, float(agreed[0])) == []
    assert lung_warnings(np.asarray(found["LUNG_MASK"][1, 0], np.uint8), box, float(agreed[1])) != []


def test_ingest_is_idempotent_and_notices_changes(
    reader: FilmReader, triton: TritonClient, phantom_manifest: Path, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    rows = read_manifest(phantom_manifest).rows
    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, pseudonyms, create=True) as store:
        first = ingest(rows[:3], reader, triton, store, silent)  # as if interrupted here
        again = ingest(rows[:5], reader, triton, store, silent)
        assert (first.stored, again.stored, again.unchanged) == (3, 2, 3)
        before = store.vectors()[1]
        corrected = [
            type(row)(row.folder, row.image_id, row.path, "control", row.patient_id, row.source, row.split, row.fields) for row in rows[3:5]
        ]
        third = ingest(corrected, reader, triton, store, silent)
        assert (third.stored, third.corrected, third.unchanged) == (0, 2, 0), "a corrected label needs no new embedding"
        assert store.count() == 5
        cases, after = store.vectors()
        assert np.array_equal(before, after)
        assert {case.label for case in cases if case.image_id in {row.image_id for row in corrected}} == {"control"}


def test_a_folder_that_moved_is_not_embedded_anew(
    reader: FilmReader, triton: TritonClient, phantom_manifest: Path, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, pseudonyms, create=True) as store:
        shutil.copytree(phantom_manifest.parent, tmp_path / "here")
        assert ingest(read_manifest(tmp_path / "here" / "manifest.csv").rows, reader, triton, store, silent).stored == 9
        (tmp_path / "here").rename(tmp_path / "there")
        moved = ingest(read_manifest(tmp_path / "there" / "manifest.csv").rows, reader, triton, store, silent)
        assert (moved.stored, moved.corrected, moved.unchanged, moved.problems) == (0, 0, 9, ()), "the gallery knows no folder"
        assert all(case.path is not None and case.path.is_file() for case in store.vectors()[0]), "and its pictures are found"


def test_two_sources_that_number_their_films_alike(
    reader: FilmReader, triton: TritonClient, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    """The second must not replace the first without a word; the same film under a corrected source does."""
    for name, seed in (("one", 1), ("two", 2)):
        Image.fromarray(make_phantom(seed, "control").pixels).save(tmp_path / f"{name}.png")

    def rows(path: str, source: str) -> tuple[ManifestRow, ...]:
        (tmp_path / "m.csv").write_text(f"image_id,path,label,source\n0001,{path},control,{source}\n")
        return read_manifest(tmp_path / "m.csv").rows

    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, pseudonyms, create=True) as store:
        assert ingest(rows("one.png", "north"), reader, triton, store, silent).stored == 1
        refused = ingest(rows("two.png", "south"), reader, triton, store, silent)
        assert "image_id 0001 is taken by another film" in str(refused.problems[0].error)
        assert ingest(rows("one.png", "south"), reader, triton, store, silent).corrected == 1
        assert [(case.image_id, case.source) for case in store.vectors()[0]] == [("0001", "south")]


def test_bad_files_are_reported_and_the_rest_goes_on(
    reader: FilmReader, triton: TritonClient, phantom_manifest: Path, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    good = read_manifest(phantom_manifest).rows[0]
    files = {
        "good": good.path.read_bytes(),
        "empty": b"",
        "text": b"not an image",
        "cut": good.path.read_bytes()[:5000],
        "fine": read_manifest(phantom_manifest).rows[1].path.read_bytes(),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "path", "label", "age"])
        writer.writerows([name, f"{name}.png", "control", ""] for name in (*files, "absent"))
        writer.writerow(["odd", "good.png", "control", "very old"])
        writer.writerow(["long", "good.png", "c" * 257, ""])
    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, pseudonyms, create=True) as store:
        report = ingest(read_manifest(tmp_path / "manifest.csv").rows, reader, triton, store, silent)
        assert report.stored == store.count() == 2
    reasons = {problem.image_id: str(problem.error) for problem in report.problems}
    assert set(reasons) == {"empty", "text", "cut", "absent", "odd", "long"}
    assert "empty" in reasons["empty"]
    assert "not an image" in reasons["text"]
    assert "damaged" in reasons["cut"]
    assert "relative to the manifest's folder" in reasons["absent"]
    assert "column age: not understood" in reasons["odd"]
    assert "column label: too long" in reasons["long"]


def test_a_file_that_kills_its_decoder_costs_only_itself(
    reader: FilmReader, triton: TritonClient, phantom_manifest: Path, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    """It used to end the whole ingest with it (exit code 134)."""
    jpeg = Path(str(get_testdata_file("SC_rgb_jpeg.dcm"))).read_bytes()
    data = bytearray(jpeg.replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.51"))  # which GDCM reads, and aborts on
    data[1005 : 1005 + 64] = bytes(64)
    (tmp_path / "deadly.dcm").write_bytes(data)
    good = [row.path for row in read_manifest(phantom_manifest).rows[:4]]
    for path in good:
        shutil.copy(path, tmp_path)
    names = [good[0].name, good[1].name, "deadly.dcm", good[2].name, good[3].name]
    (tmp_path / "m.csv").write_text("image_id,path,label\n" + "".join(f"{name},{name},control\n" for name in names))
    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, pseudonyms, create=True) as store:
        report = ingest(read_manifest(tmp_path / "m.csv").rows, reader, triton, store, silent)
        assert (report.stored, store.count()) == (4, 4)
    (problem,) = report.problems
    assert str(problem.error).startswith("deadly.dcm: the decoder crashed (signal 6)")


def test_bad_query_file(gallery: Store, reader: FilmReader, triton: TritonClient, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"x\.png: the file is empty"):
        query(tmp_path / "x.png", reader, triton, gallery)


@pytest.mark.parametrize("balance", [0.0, DEFAULT_BALANCE, 1.0])
def test_evaluation_ranks_as_the_store_searches(
    gallery: Store, reader: FilmReader, triton: TritonClient, phantom_manifest: Path, balance: float
) -> None:
    """Exact neighbours in memory are what a user's query gets from Milvus."""
    rows = read_manifest(phantom_manifest).rows
    embedded = embed_rows(rows, reader, triton, gallery, silent)
    assert embedded.from_store == len(rows), "nothing is computed twice"
    ids = [row.image_id for row in embedded.rows]
    vectors = comparable(embedded.vectors, balance)
    everything = LabelledSet(ids, vectors, [row.label for row in embedded.rows], ids, [""] * len(ids))
    other = LabelledSet(["q"], vectors[:1], ["control"], ["nobody"], [""])
    order, similarity = rank(everything, 0, other)
    found = gallery.search(embedded.vectors[0], 9, balance=balance)
    assert [hit.similarity for hit in found] == pytest.approx(similarity.tolist(), abs=1e-5)
    assert {hit.case.image_id for hit in found[:5]} == {ids[i] for i in order[:5]}
