from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.cases.manifest import patient_key, read_manifest
from cxr_retrieval.errors import ManifestError


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "manifest.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_required_and_optional_columns(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, "image_id,path,label,patient_id,age,wbc\na,img/a.png,covid19,p1,61,\n"))
    (row,) = manifest.rows
    assert row.path == tmp_path / "img" / "a.png"
    assert (row.label, row.patient_id, row.source, row.split) == ("covid19", "p1", None, None)
    assert dict(row.fields) == {"age": "61"}, "an empty cell means unknown"
    assert len(manifest.sha256) == 64


def test_byte_order_mark_and_quoted_newline(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, 'image_id,path,label,clinical_notes\r\na,a.png,x,"two\nlines, one cell"\r\n', "utf-8-sig"))
    assert manifest.rows[0].fields["clinical_notes"] == "two\nlines, one cell"


def test_split_selection_leaves_extra_out(tmp_path: Path) -> None:
    text = "image_id,path,label,split\na,a,x,train\nb,b,x,val\nc,c,y,extra\nd,d,y,\n"
    manifest = read_manifest(write(tmp_path, text))
    assert [row.image_id for row in manifest.select()] == ["a", "b", "d"]
    assert [row.image_id for row in manifest.select(split="extra")] == ["c"]
    assert [row.image_id for row in manifest.select(labels=["y"])] == ["d"]
    with pytest.raises(ManifestError, match="split 'test'; got splits"):
        manifest.require(split="test")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "column image_id, path, label missing"),
        ("image_id,path\na,b\n", "column label missing"),
        ("image_id,path,label\n", "no rows"),
        ("image_id,path,label\na,a.png,\n", "line 2: label is empty"),
        ("image_id,path,label\na,a.png,x\na,b.png,y\n", "more than once; expected one row per image_id; got a"),
        ("image_id,path,label\na,a.png,x,surplus\n", "wrong number of cells"),
        ("image_id,path,label\na,a.png\n", "wrong number of cells"),
        ("image_id,path,label,label\na,a.png,x,y\n", "occurs twice"),
        ('image_id,path,label\na,"a.png,x\n', "not valid CSV"),
    ],
)
def test_unusable_manifest_is_explained(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(tmp_path, text))
    assert words in str(caught.value)
    assert "Next:" in str(caught.value)
    assert caught.value.exit_code == 2


def test_binary_and_absent_files(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ManifestError, match="not a text file"):
        read_manifest(path)
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "none.csv")


def test_patient_key_separates_sources_and_single_images() -> None:
    assert patient_key("a", "1", "x") == patient_key("a", "1", "y")
    assert patient_key("a", "1", "x") != patient_key("b", "1", "x")
    assert patient_key("a", None, "x") != patient_key("a", None, "y")
    assert patient_key("a", None, "x") != patient_key("b", None, "x")


cells = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)
names = st.text("abcdefgh0123", min_size=1, max_size=8)


@given(st.dictionaries(names, st.tuples(names, names, cells, cells), min_size=1, max_size=12))
def test_whatever_a_csv_writer_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: dict[str, tuple[str, str, str, str]]
) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["image_id", "path", "label", "patient_id", "clinical_notes"])
    writer.writerows([key, *values] for key, values in records.items())
    manifest = read_manifest(write(tmp_path_factory.mktemp("m"), buffer.getvalue()))
    assert [row.image_id for row in manifest.rows] == list(records)
    for row in manifest.rows:
        path, label, patient, notes = records[row.image_id]
        assert (row.path.name, row.label, row.patient_id or "", row.fields.get("clinical_notes", "")) == (
            path,
            label,
            patient.strip(),
            notes.strip(),
        )
