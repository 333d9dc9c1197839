"""A real Milvus server for the tests of this folder: one for each file, and never two at a time."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests_support import start_milvus


@pytest.fixture(scope="module")
def milvus_process() -> Iterator[Any]:
    """A real Milvus 2.3.5 standalone (older than nullable fields)."""
    from milvus import MilvusServer

    folder = tempfile.mkdtemp(prefix="cxr-milvus-")
    server = MilvusServer()
    server.set_base_dir(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server.listen_port = probe.getsockname()[1]
    start_milvus(server)
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def milvus_server(milvus_process: Any) -> str:
    return f"http://127.0.0.1:{milvus_process.listen_port}"
