"""A model that answers NaN for bright pictures (tiny graphs in the real server), and a server whose model is not ready."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cxr_retrieval.serving.server as server_module
from cxr_retrieval.archive.embedding import ingest
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import EMBEDDER
from cxr_retrieval.errors import InferenceError, UnusableOutputError
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_triton
from cxr_retrieval.settings import MilvusSettings, TritonSettings


def test_one_nan_picture_does_not_spoil_its_batch(tiny: Path, reader: FilmReader, tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    levels = {"dark": 40, "bright": 240, "grey": 120}
    for name, level in levels.items():
        pixels = np.full((128, 128), level, np.uint8)
        pixels[:4, :4] = 0
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "m.csv").write_text("image_id,path,label\n" + "".join(f"{name},{name}.png,control\n" for name in levels))
    with (
        embedded_triton(ServerOptions(tiny, grpc_port=0, http_port=0, metrics_port=0)) as server,
        TritonClient(TritonSettings(server.grpc)) as client,
        Store(MilvusSettings(str(tmp_path / "g.db")), client.model_version, pseudonyms, create=True) as store,
    ):
        report = ingest(
            read_manifest(tmp_path / "m.csv").rows, reader, client, store, lambda count: None, gate=False
        )  # no films: levels of grey
        assert report.stored == store.count() == 2
        (problem,) = report.problems
        assert problem.image_id == "bright"
        assert "is not finite" in str(problem.error)
        with pytest.raises(UnusableOutputError, match="is not finite"):
            query(tmp_path / "bright.png", reader, client, store)
        assert query(tmp_path / "dark.png", reader, client, store, gate=False).prediction.label == "control"


def test_model_not_ready(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that listens while one of its models has failed: the client says which, and why."""
    broken = tmp_path / "repository"
    shutil.copytree(tiny, broken)
    (broken / EMBEDDER / "1" / "model.onnx").write_bytes(b"no graph")

    def until_it_gave_up(server: Endpoints, models: Sequence[str], timeout_s: float) -> None:
        with pytest.raises(server_module.SetupError, match="could not load embedder"):
            real(server, models, timeout_s)

    real = server_module._wait_until_ready  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(server_module, "_wait_until_ready", until_it_gave_up)
    said = r"cxr_retrieval at .* is not ready; expected all four models loaded; got .*embedder"
    options = ServerOptions(broken, grpc_port=0, http_port=0, metrics_port=0)
    with embedded_triton(options) as server, pytest.raises(InferenceError, match=said):
        TritonClient(TritonSettings(server.grpc))
