"""A real Milvus server for the tests of this folder: one for each file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests_support import HURRIED, real_milvus


@pytest.fixture(scope="module")
def milvus_process() -> Iterator[Any]:
    with real_milvus(**HURRIED) as server:
        yield server


@pytest.fixture(scope="module")
def milvus_server(milvus_process: Any) -> str:
    return f"http://127.0.0.1:{milvus_process.listen_port}"
