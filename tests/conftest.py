"""Fixtures that several test folders share. The server fixtures start the real Triton once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook
from numpy.typing import NDArray
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

from certificates import Certificates
from chaos.instant import instant_repository
from cxr_retrieval.archive.embedding import ingest
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms, open_pseudonyms
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.locations import default_repository
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, Phantom, make_phantom, write_phantoms
from cxr_retrieval.serving.choices import Networks
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_milvus, embedded_triton
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings
from tests_support import KEY_FILE
from tiny_models import write_tiny_repository

install_import_hook("cxr_retrieval_training", "beartype.beartype")  # shapes in signatures are checked, wherever it is imported from first
settings.register_profile("cxr", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("cxr")

ROOT = Path(__file__).parents[1]
TOGETHER: Final = (
    ("tests/congruence/",),  # each file starts the one real Milvus that there may be on a machine
    (  # `server`
        "tests/real_data/",
        "tests/retrieval/",
        "tests/view/",
        "tests/browser/",
        "tests/integration/test_retrieval.py",
        "tests/integration/test_notebook.py",
        "tests/integration/test_serving.py",
    ),
)
"""Files that one worker runs, so that what they start is started once."""
HEAVY: Final = (TOGETHER[1], ("tests/build/",), ("tests/training/",))
"""What keeps a core busy and takes gigabytes: for the first two workers alone."""
LONGEST_FIRST: Final = (*HEAVY, TOGETHER[0], ("tests/chaos/",), ("tests/integration/",))
"""Else one worker is left with one of these when the others have nothing more to do."""


class Scheduling(LoadFileScheduling):
    """A file to a worker, as xdist has it, but for those that go to one together. A third worker takes what mostly waits for servers."""

    def _split_scope(self, nodeid: str) -> str:
        return next((paths[0] for paths in TOGETHER if nodeid.startswith(paths)), super()._split_scope(nodeid))

    def _reschedule(self, node: WorkerController) -> None:
        if self._next(node) is not None:
            super()._reschedule(node)
        elif not node.shutting_down:
            node.shutdown()

    def _assign_work_unit(self, node: WorkerController) -> None:
        self.workqueue.move_to_end(self._next(node) or next(iter(self.workqueue)), last=False)
        super()._assign_work_unit(node)

    def _next(self, node: WorkerController) -> str | None:
        heavy = tuple(paths[0] for paths in HEAVY) if node.gateway.id not in ("gw0", "gw1") else ()
        return next((scope for scope in self.workqueue if not scope.startswith(heavy)), None)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((rank for rank, paths in enumerate(LONGEST_FIRST) if item.nodeid.startswith(paths)), len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def pseudonyms() -> Iterator[Pseudonyms]:
    """The key and table that commands run by `run_cxr` have, too."""
    with open_pseudonyms(PseudonymSettings(KEY_FILE), create=True) as opened:
        yield opened


@pytest.fixture(scope="session")
def repository() -> Path:
    return default_repository()


@pytest.fixture(scope="session")
def phantoms() -> list[Phantom]:
    """Three of each label."""
    return [make_phantom(seed, label) for label in PHANTOM_LABELS for seed in (11, 12, 13)]


@pytest.fixture(scope="session")
def squares(phantoms: list[Phantom]) -> NDArray[np.uint8]:
    return np.stack([letterbox(phantom.pixels)[0] for phantom in phantoms])[:, None]


@pytest.fixture(scope="session")
def phantom_manifest(phantoms: list[Phantom], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("gallery"), phantoms)


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Endpoints]:
    """The shipped ensemble in a real Triton: seconds to start, and a tenth of one for a film. Most tests ask no more than the other two can answer."""
    with embedded_triton(ServerOptions(repository, grpc_port=0, http_port=0, metrics_port=0)) as endpoints:
        yield endpoints


@pytest.fixture(scope="session")
def student_server(repository: Path) -> Iterator[Endpoints]:
    """The shipped weights with one network for the lungs in the place of five: answers of films, in half the time, after a quarter of it."""
    options = ServerOptions(repository, networks=Networks.student, grpc_port=0, http_port=0, metrics_port=0)
    with embedded_triton(options) as endpoints:
        yield endpoints


@pytest.fixture(scope="session")
def student(student_server: Endpoints) -> Iterator[TritonClient]:
    with TritonClient(TritonSettings(student_server.grpc)) as client:
        yield client


@pytest.fixture(scope="session")
def instant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks that answer at once, and find lungs where there are none: for what becomes of inputs, whatever is said of them."""
    return instant_repository(tmp_path_factory.mktemp("instant"))


@pytest.fixture(scope="session")
def quick(instant: Path) -> Iterator[Endpoints]:
    with embedded_triton(ServerOptions(instant, grpc_port=0, http_port=0, metrics_port=0)) as endpoints:
        yield endpoints


@pytest.fixture(scope="session")
def quick_client(quick: Endpoints) -> Iterator[TritonClient]:
    with TritonClient(TritonSettings(quick.grpc)) as client:
        yield client


@pytest.fixture(scope="module")
def small_networks() -> Iterator[None]:
    """Networks of this process have every kind of layer, but half as many of them, and drop islands of a few pixels by a sixth of the operators
    that drop those of 13: training, exporting and tracing one takes half the time. What ships has them all (tests/build/test_published.py).
    """
    from timm.models import efficientnet

    from cxr_retrieval_training.embedding import embedder
    from cxr_retrieval_training.imagenet import imagenet_state
    from cxr_retrieval_training.segmentation import segmenter

    whole = {channels: imagenet_state(channels) for channels in (1, 3)}
    with pytest.MonkeyPatch.context() as patch:
        built: Any = efficientnet._gen_efficientnet_lite  # pyright: ignore
        patch.setattr(
            efficientnet, "_gen_efficientnet_lite", lambda *given, **options: built(*given, **options | {"depth_multiplier": 0.3})
        )
        patch.setattr(segmenter, "_OPENING_RADIUS", 1)
        for module in (embedder, segmenter):
            patch.setattr(module, "imagenet_state", lambda channels=3: whole[channels])
        yield


@pytest.fixture(scope="session")
def tiny(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of tiny graphs, which answer NaN for bright pictures."""
    return write_tiny_repository(repository, tmp_path_factory.mktemp("tiny") / "repository")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def triton(server: Endpoints) -> Iterator[TritonClient]:
    with TritonClient(TritonSettings(server.grpc)) as client:
        yield client


@pytest.fixture(scope="session")
def reader() -> Iterator[FilmReader]:
    with FilmReader() as opened:
        yield opened


@pytest.fixture(scope="session")
def served_gallery(
    reader: FilmReader, triton: TritonClient, phantom_manifest: Path, pseudonyms: Pseudonyms, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Where a Milvus serves the nine phantoms to as many clients as want them."""
    with embedded_milvus(tmp_path_factory.mktemp("served") / "gallery.db", "127.0.0.1", 0) as uri:
        with Store(MilvusSettings(uri), triton.model_version, pseudonyms, create=True) as store:
            assert ingest(read_manifest(phantom_manifest).rows, reader, triton, store, lambda _: None).stored == 9
        yield uri


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = Path(os.environ.get("CXR_REAL_DATA", ROOT.parent / "shared" / "data" / "cxr-public"))
    if not (folder / "manifest.csv").is_file():
        pytest.skip("the public radiographs are not here (set CXR_REAL_DATA)")
    return folder
