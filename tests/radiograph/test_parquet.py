"""Films in Parquet files, ours and hostile ones."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from cxr_retrieval.archive.inputs import Input, Unusable, find_inputs
from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.decoding import DecodingLimits, FilmReader
from cxr_retrieval.radiograph.phantoms import Phantom
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from tests_support import run_cxr

ROWS = 70


@pytest.fixture(scope="module")
def films(phantoms: list[Phantom]) -> list[bytes]:
    """Each another picture."""
    found: list[bytes] = []
    for number in range(ROWS):
        pixels = phantoms[number % len(phantoms)].pixels[::2, ::2].copy()
        pixels[:4, : number + 4] = 255
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png", compress_level=1)
        found.append(stream.getvalue())
    return found


@pytest.fixture(scope="module")
def reader() -> Iterator[FilmReader]:
    with FilmReader(DecodingLimits(workers=1)) as opened:
        yield opened


def written(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path, row_group_size=32)
    return path


@pytest.mark.parametrize("form", ["binary", "large_binary", "struct"])
def test_every_row_is_a_film(form: str, films: list[bytes], reader: FilmReader, tmp_path: Path) -> None:
    image = {
        "binary": pa.array(films),
        "large_binary": pa.array(films, pa.large_binary()),
        "struct": pa.array([{"bytes": film, "path": None} for film in films]),
    }[form]
    found = list(find_inputs([str(written(tmp_path / "a.parquet", image=image))], reader))
    assert [one.name for one in found] == [f"{tmp_path}/a.parquet!/{number}" for number in range(ROWS)]
    inputs = [one for one in found if isinstance(one, Input)]
    assert all(one.row is None for one in inputs)
    assert len({one.place for one in inputs}) == ROWS
    order = random.Random(7).sample(range(ROWS), ROWS)
    for number in [*range(ROWS), *order[:20]]:
        film = reader.submit(inputs[number].path, inputs[number].member).result()
        assert film.file == hashlib.sha256(films[number]).hexdigest()


def test_columns_are_those_of_a_manifest(films: list[bytes], reader: FilmReader, tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.parquet",
        image=films[:4],
        image_id=["a", "b", "c", None],
        label=["control", "covid19", "control", "control"],
        split=["train", "val", "extra", "train"],
        age=[61, None, 3, 4],
        patient_id=["p", "q", "r", "s"],
        vector=[[1.0], [2.0], [3.0], [4.0]],
    )

    def rows(split: str | None = None) -> list[tuple[str, str | None]]:
        found = [one for one in find_inputs([str(path)], reader, split=split) if isinstance(one, Input)]
        return [(one.row.image_id, one.row.fields.get("age")) if one.row else ("", one.member) for one in found]

    assert rows() == [("a", "61"), ("b", None), ("", "3")], "extra takes no part, and a row without an id is a film and no more"
    assert rows("val")[0] == ("b", None)


@pytest.mark.parametrize("harm", ["cut", "noise", "head alone", "no image", "text", "empty row", "no rows", "wide"])
def test_what_is_no_such_file(harm: str, films: list[bytes], reader: FilmReader, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    whole = written(tmp_path / "whole", image=films[:3]).read_bytes()
    if harm == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif harm == "noise":
        path.write_bytes(b"PAR1" + bytes(random.Random(1).randrange(256) for _ in range(5000)) + b"\xff\xff\xff\x7fPAR1")
    elif harm == "head alone":
        path.write_bytes(b"PAR1")
    elif harm == "wide":
        written(path, image=films[:1], **{f"c{number}": [number] for number in range(300)})
    else:
        column = {
            "no image": {"picture": films[:1]},
            "text": {"image": ["words"]},
            "empty row": {"image": [None, b""]},
            "no rows": {"image": pa.array([], pa.binary())},
        }
        written(path, **column[harm])
    found = list(find_inputs([str(path)], reader))
    if harm in ("text", "empty row"):
        for one in found:
            assert isinstance(one, Input)
            with pytest.raises(ImageError, match="no film"):
                reader.submit(one.path, one.member).result()
    elif harm == "no rows":
        assert found == []
    else:
        (unusable,) = found
        assert isinstance(unusable, Unusable)
        assert unusable.name.endswith("a.parquet")


@pytest.mark.parametrize("seed", range(12))
def test_harmed_bytes_cost_their_rows_alone(seed: int, films: list[bytes], reader: FilmReader, tmp_path: Path) -> None:
    """Whatever becomes of such a file, the next one is read."""
    source = random.Random(seed)
    harmed = bytearray(written(tmp_path / "whole", image=films[:12], image_id=[str(number) for number in range(12)]).read_bytes())
    for _ in range(source.randrange(1, 30)):
        harmed[source.randrange(4, len(harmed))] = source.randrange(256)
    (tmp_path / "a.parquet").write_bytes(harmed)
    for one in find_inputs([str(tmp_path / "a.parquet")], reader):
        if isinstance(one, Input):
            with suppress(ImageError):
                reader.submit(one.path, one.member).result()
    (whole, *_) = find_inputs([str(written(tmp_path / "b.parquet", image=films[:1]))], reader)
    assert isinstance(whole, Input)
    assert reader.submit(whole.path, whole.member).result().format == "PNG"


def test_from_a_file_into_a_gallery_and_back(films: list[bytes], quick: Endpoints, tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.parquet",
        image=[*films[:5], b"no picture"],
        image_id=[f"case-{number}" for number in range(6)],
        label=["control"] * 6,
        patient_id=[f"p{number}" for number in range(6)],
    )
    with embedded_milvus(tmp_path / "g.db", "127.0.0.1", 0) as uri:
        reach = ("--triton", quick.grpc, "--milvus", uri, "--no-gate")
        done = run_cxr("ingest", path, *reach)
        assert "5 stored, 0 unchanged, 1 failed" in done.stdout, done.stderr
        assert "5 unchanged" in run_cxr("ingest", path, *reach).stdout
        done = run_cxr("batch", path, "--out", tmp_path / "out.jsonl", *reach)
        assert "6 inputs: 5 answered, 1 failed" in done.stdout, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert {line.get("image_id") for line in lines if line["status"] == "answered"} == {f"case-{number}" for number in range(5)}
