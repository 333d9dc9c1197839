"""The notebook that ships is what its cells give; answers as HTML and as tables."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import numpy as np
import pyarrow as pa
import pytest
from IPython.core.formatters import HTMLFormatter

from cxr_retrieval.cases.features import FEATURES
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from cxr_retrieval.retrieval.query import QueryResult, query
from cxr_retrieval.serving.server import Endpoints
from cxr_retrieval.settings import MilvusSettings
from notebook import SHIPPED, executed
from tests_support import KEY_FILE


def test_the_notebook_that_ships_is_what_its_cells_give(server: Endpoints, served_gallery: str, tmp_path: Path) -> None:
    write_dicom(make_phantom(1001, "covid19"), tmp_path / "query.dcm")
    now = executed(tmp_path, server.grpc, served_gallery, KEY_FILE)
    shipped = nbformat.read(SHIPPED, as_version=4)
    nbformat.validate(shipped)
    for cell, then in zip(now.cells, shipped.cells, strict=True):
        assert then.source == cell.source
        kinds = [[(output.output_type, sorted(output.get("data", {}))) for output in one.get("outputs", [])] for one in (cell, then)]
        assert kinds[0] == kinds[1], cell.source
    told = re.sub(r"[A-Za-z0-9+/=]{200,}", "(a picture)", str(shipped))
    assert "did you mean age?" in told
    assert "Not for diagnosis" in told
    assert not re.search("/tmp/|/home/|/root/|/work/", told)


@pytest.fixture(scope="module")
def result(served_gallery: str, phantom_manifest: Path, reader: FilmReader, triton: TritonClient, pseudonyms: Pseudonyms) -> QueryResult:
    with Store(MilvusSettings(served_gallery), triton.model_version, pseudonyms) as store:
        return query(read_manifest(phantom_manifest).rows[0].path, reader, triton, store, top_k=4)


def test_an_answer_as_a_table(result: QueryResult) -> None:
    table = result.to_arrow()
    table.validate(full=True)
    assert table.num_rows == len(result.neighbours) + len(result.own) == 5
    assert table["rank"].to_pylist() == [1, 2, 3, 4, None]
    assert table["votes"].to_pylist() == [True] * 4 + [False]
    assert table["key"].to_pylist() == [hit.case.key for hit in (*result.neighbours, *result.own)]
    for feature in FEATURES:
        column = table[feature.name]
        assert column.type == {"number": pa.float64(), "text": pa.string(), "flag": pa.bool_()}[feature.kind]
        assert column.to_pylist() == [hit.case.metadata.get(feature.name) for hit in (*result.neighbours, *result.own)]
    about = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert about["label"] == result.prediction.label
    assert float(about["confidence"]) == result.prediction.confidence
    frame = result.to_pandas()
    assert list(frame.columns) == table.column_names
    assert frame["went_icu"].isna().sum() == table["went_icu"].null_count
    assert np.allclose(frame["similarity"], [hit.similarity for hit in (*result.neighbours, *result.own)])


def test_an_answer_in_a_notebook(result: QueryResult) -> None:
    shown = HTMLFormatter()(result)
    assert shown is not None
    assert result.sentence in shown
    assert "Not for diagnosis" in shown
    assert "data:image/png;base64," in shown
    for hit in result.neighbours:
        assert hit.case.key[:12] in shown
        assert hit.case.image_id not in shown, "pseudonyms, as everywhere"
        assert hit.case.image_id not in repr(result)
    assert shown.count("<tr>") == 1 + len(result.neighbours)
