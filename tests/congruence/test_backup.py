"""A gallery in a file and back: within Milvus Lite, within a real server, and from either to the other."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.errors import SetupError, StoreError, UsageError
from cxr_retrieval.gallery.aliases import ALIAS, list_galleries
from cxr_retrieval.gallery.backup import Backup, export_gallery, import_gallery, read_backup
from cxr_retrieval.gallery.balance import VECTOR_SIZE
from cxr_retrieval.gallery.store import CALIBRATION, SITES, Case, Store, drop_gallery, make_entry
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.settings import MilvusSettings, ThumbnailKind
from tests_support import run_cxr
from vectors import unit_vectors

pytestmark = pytest.mark.server

COUNT = 1117
"""Rows: more than a page, and no multiple of one."""


@pytest.fixture(scope="module")
def places(milvus_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, MilvusSettings]:
    folder = tmp_path_factory.mktemp("lite")
    return {
        "lite": MilvusSettings(str(folder / "one.db")),
        "other lite": MilvusSettings(str(folder / "two.db")),
        "server": MilvusSettings(milvus_server),
    }


def fill(
    settings: MilvusSettings, pseudonyms: Pseudonyms, version: str, folder: Path, count: int = COUNT
) -> tuple[list[Case], NDArray[np.float32]]:
    """Cases with facts of every kind, and some without."""
    lines = ["image_id,path,label,patient_id,source,split,age,sex,went_icu,clinical_notes,crp,ward"]
    for number in range(count):
        facts = (
            f'p{number // 2},north,train,{number / 7},F,{"YN"[number % 2]},"a ""note"" über {number}",{number},B'
            if number % 3
            else ",,,,,,,,"
        )
        lines.append(f"i{number},i{number}.png,control,{facts}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", "utf-8")
    entries = [make_entry(row, f"{number:064x}", pseudonyms) for number, row in enumerate(read_manifest(folder / "manifest.csv").rows)]
    vectors = unit_vectors(count, count)
    with Store(settings, version, pseudonyms, create=True) as store:
        store.upsert(entries, [f"{number:064x}" for number in range(count)], vectors)
        store.publish()
        return store.vectors()


def saved(settings: MilvusSettings, pseudonyms: Pseudonyms, version: str, out: Path) -> Backup:
    with Store(settings, version, pseudonyms) as store:
        return export_gallery(store, out)


@pytest.fixture
def small(places: dict[str, MilvusSettings], pseudonyms: Pseudonyms, tmp_path: Path) -> Path:
    """Seven cases in a file."""
    fill(places["lite"], pseudonyms, "small", tmp_path, 7)
    saved(places["lite"], pseudonyms, "small", tmp_path / "small.parquet")
    return tmp_path / "small.parquet"


@pytest.mark.parametrize(("source", "target"), [("lite", "other lite"), ("server", "server"), ("lite", "server"), ("server", "other lite")])
def test_what_comes_back_is_what_went(
    source: str, target: str, places: dict[str, MilvusSettings], pseudonyms: Pseudonyms, tmp_path: Path
) -> None:
    version = f"from_{source}_to_{target}".replace(" ", "_")
    cases, vectors = fill(places[source], pseudonyms, version, tmp_path)
    file = tmp_path / "gallery.parquet"
    about = saved(places[source], pseudonyms, version, file)
    assert (about.model_version, about.rows) == (version, COUNT)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    if source == target:
        drop_gallery(places[source], f"cxr_{version}")
    assert read_backup(file) == about
    for _ in range(2):
        import_gallery(places[target], pseudonyms, file, about, merge=True)
        with Store(places[target], version, pseudonyms) as store:
            again, vectors_again = store.vectors()
        assert again == cases
        assert np.array_equal(vectors_again, vectors), "to the last bit"
    if source == "lite":
        with Store(places[target], version, pseudonyms) as store:
            found = store.search(vectors[5], 3, 'age > 100 and sex == "F"')
            assert found
            assert all(float(hit.case.metadata["age"]) > 100 for hit in found)
            assert store.search(vectors[5], 3, 'extra["crp"] == 301')[0].case.image_id == "i301"


def test_calibration_and_profiles_go_along(places: dict[str, MilvusSettings], pseudonyms: Pseudonyms, small: Path) -> None:
    """Into a gallery that has none of its own; what was measured there stays."""
    kept = {CALIBRATION: '{"temperature":1.5}', SITES: '{"sites":{"sankt-märien":{}}}'}
    with Store(places["lite"], "small", pseudonyms) as store:
        store.keep(kept)
        about = export_gallery(store, small)
    assert about.kept == kept
    try:
        assert import_gallery(places["other lite"], pseudonyms, small, read_backup(small)) == sorted(kept)
        with Store(places["other lite"], "small", pseudonyms) as store:
            assert store.kept == kept
            store.keep({CALIBRATION: "measured here", SITES: ""})
        assert import_gallery(places["other lite"], pseudonyms, small, read_backup(small), merge=True) == [SITES]
        with Store(places["other lite"], "small", pseudonyms) as store:
            assert store.kept == {CALIBRATION: "measured here", SITES: kept[SITES]}
    finally:
        drop_gallery(places["other lite"], "cxr_small")
        drop_gallery(places["lite"], "cxr_small")


def test_a_file_of_the_first_layout_is_read(small: Path) -> None:
    """It held nothing but cases, and its digest told of nothing else."""
    about, held = read_backup(small), pq.read_metadata(small).metadata
    digest = hashlib.sha256(json.dumps(["1", about.model_version, about.key_fingerprint, about.fields], sort_keys=True).encode() + b"\n")
    for row in pq.read_table(small).to_pylist():
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    told = {name: text for name, text in held.items() if name != b"cxr.kept"} | {
        b"cxr.layout": b"1",
        b"cxr.sha256": digest.hexdigest().encode(),
    }
    pq.write_table(pq.read_table(small).replace_schema_metadata(told), small)
    assert read_backup(small) == replace(about, layout="1", sha256=digest.hexdigest())


def another_calibration(path: Path) -> None:
    told = {**pq.read_metadata(path).metadata, b"cxr.kept": b'{"cxr.calibration": "{}"}'}
    pq.write_table(pq.read_table(path).replace_schema_metadata(told), path)


def test_the_file_is_read_by_any_tool(places: dict[str, MilvusSettings], small: Path) -> None:
    table = pq.read_table(small)
    assert table.num_rows == 7
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), VECTOR_SIZE)
    assert table.schema.field("age").type == pa.float64()
    assert json.loads(table.column("extra").to_pylist()[0]) in ({}, *({"crp": float(n), "ward": "B"} for n in range(7)))


def rewrite(path: Path, table: Any) -> None:
    """Another table, with fitting checksums and all that the file said of the former one."""
    told = pq.read_metadata(path).metadata
    pq.write_table(table.replace_schema_metadata({key: value for key, value in told.items() if key.startswith(b"cxr.")}), path)


def changed_value(path: Path) -> None:
    table = pq.read_table(path)
    labels = ["covid19", *table.column("label").to_pylist()[1:]]
    rewrite(path, table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels)))


def fewer_rows(path: Path) -> None:
    rewrite(path, pq.read_table(path).slice(1))


def another_version(path: Path) -> None:
    told = {**pq.read_metadata(path).metadata, b"cxr.model_version": b"68cb5ef269ee"}
    pq.write_table(pq.read_table(path).replace_schema_metadata(told), path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [changed_value, fewer_rows, another_version, another_calibration, cut_off, foreign, empty, Path.unlink])
def test_a_file_that_is_not_whole_stores_nothing(harm: Callable[[Path], None], places: dict[str, MilvusSettings], small: Path) -> None:
    harm(small)
    with pytest.raises(UsageError, match=r"is not whole|not a gallery of this system"):
        read_backup(small)
    done = run_cxr("gallery", "import", small, "--milvus", places["other lite"].uri)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cxr_small" not in list_galleries(places["other lite"])


def test_a_flipped_bit_is_found_or_changes_nothing(places: dict[str, MilvusSettings], small: Path) -> None:
    """Some bytes mean nothing: reserved ones, statistics of a column. Where nothing is found, what is read has the same digest."""
    data, about = small.read_bytes(), read_backup(small)
    found = 0
    for at in range(0, len(data), 61):
        small.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            assert read_backup(small) == about
        except UsageError:
            found += 1
    assert found > len(data) // 61 // 2


def test_another_version_another_key_and_a_gallery_with_cases_are_refused(
    places: dict[str, MilvusSettings], pseudonyms: Pseudonyms, small: Path
) -> None:
    about = read_backup(small)
    stranger = Pseudonyms(b"another key of thirty-two characters", small.with_name("table"))
    with pytest.raises(UsageError, match="its pseudonyms were made under another key"):
        import_gallery(places["other lite"], stranger, small, about)
    assert "cxr_small" not in list_galleries(places["other lite"])
    with pytest.raises(UsageError, match="embeddings of another model version; expected 68cb5ef269ee; got small"):
        import_gallery(places["other lite"], pseudonyms, small, about, model_version="68cb5ef269ee")
    with pytest.raises(UsageError, match="holds 7 cases already"):
        import_gallery(places["lite"], pseudonyms, small, about)
    with Store(places["lite"], "small", pseudonyms) as store:
        assert store.count() == 7


def test_fields_that_the_gallery_lacks_are_refused(places: dict[str, MilvusSettings], pseudonyms: Pseudonyms, small: Path) -> None:
    about = read_backup(small)
    more = replace(about, fields={**about.fields, "doses": "DOUBLE"})
    table = pq.read_table(small)
    pq.write_table(table.append_column("doses", pa.array([1.5] * 7)), small)
    with pytest.raises(UsageError, match=r"holds fields that cxr_small lacks; expected .*; got doses"):
        import_gallery(places["lite"], pseudonyms, small, more, merge=True)


def test_a_full_disk_leaves_the_former_file(places: dict[str, MilvusSettings], pseudonyms: Pseudonyms, small: Path) -> None:
    before = small.read_bytes()
    small.with_name(small.name + ".partial").mkdir()
    with Store(places["lite"], "small", pseudonyms) as store, pytest.raises(SetupError, match="cannot be written"):
        export_gallery(store, small)
    assert small.read_bytes() == before


def test_thumbnails_go_along_if_asked_for(places: dict[str, MilvusSettings], pseudonyms: Pseudonyms, small: Path) -> None:
    with Store(places["lite"], "small", pseudonyms) as store:
        cases, _ = store.vectors()
        squares = np.random.default_rng(3).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.uint8)
        kept = [Thumbnail(case.key, ThumbnailKind.full, case.pixels, square) for case, square in zip(cases, squares, strict=False)]
        store.keep_thumbnails(kept)
        export_gallery(store, small, thumbnails=True)
    import_gallery(places["other lite"], pseudonyms, small, read_backup(small), merge=True)
    with Store(places["other lite"], "small", pseudonyms) as store:
        found = store.thumbnails([case.key for case in cases])
    assert found.keys() == {one.key for one in kept}
    for one in kept:
        assert np.array_equal(found[one.key].square, one.square)
        assert (found[one.key].kind, found[one.key].pixels) == (one.kind, one.pixels)
    drop_gallery(places["other lite"], "cxr_small")  # so that no other test finds it there


def test_the_commands(places: dict[str, MilvusSettings], pseudonyms: Pseudonyms, small: Path, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    lite = places["lite"].uri

    def cxr(*arguments: str | Path) -> Any:
        done = run_cxr("gallery", *arguments, "--milvus", lite, "--audit", log)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "the gallery is now that of small" in cxr("use", "small")
    assert "cxr_small" in [name for name, aliases in list_galleries(places["lite"]).items() if ALIAS in aliases]
    told = json.loads(cxr("export", tmp_path / "again.parquet", "--json"))
    assert (told["model_version"], told["cases"]) == ("small", 7)
    assert "7 cases restored to the gallery of model version small" in cxr("import", tmp_path / "again.parquet", "--merge")
    actions = [json.loads(line)["action"] for line in log.read_text().splitlines()]
    assert actions == [name for name in ("gallery use", "gallery export", "gallery import") for _ in range(2)]
    none = run_cxr("gallery", "export", tmp_path / "x.parquet", "--model-version", "never", "--milvus", lite, "--audit", log)
    assert none.returncode == 2
    assert not (tmp_path / "x.parquet").exists()
    with pytest.raises(StoreError, match="no gallery"):
        Store(places["lite"], "never", pseudonyms)
