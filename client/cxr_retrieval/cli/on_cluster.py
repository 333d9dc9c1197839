"""What a bulk command with `--engine ray` asks of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from cxr_retrieval.archive.cluster import connected, engine_on, identities_on
from cxr_retrieval.archive.embedding import Identify
from cxr_retrieval.archive.pipeline import Engine, Inference
from cxr_retrieval.archive.stages import Plan
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.serving.choices import Networks
from cxr_retrieval.serving.in_process import InProcess, Runtime
from cxr_retrieval.settings import EngineSettings, PseudonymSettings, TritonSettings

Open = Callable[[], AbstractContextManager[Inference]]


def networks_of_workers(engine: EngineSettings, triton: TritonSettings, client: TritonClient | None) -> tuple[Open, str]:
    """How workers open what they ask, and the version of its weights; `client`: of ours, of the Triton that they ask, if they do.

    Raises:
        SetupError: No weights here.
    """
    if client is not None:
        return partial(TritonClient, triton), client.model_version
    chosen = InProcess(Runtime(engine.inference.value), Networks.student if engine.student else Networks.ensemble)
    return chosen.open, chosen.model_version


@contextmanager
def on_cluster(engine: EngineSettings, pseudonyms: PseudonymSettings, plan: Plan[Any]) -> Generator[tuple[Engine, Identify]]:
    """The engine, and what tells which file lies where; connected until the end.

    Raises:
        SetupError: No cluster there, or no key of pseudonyms here.
    """
    with connected(engine.address, pseudonyms) as room:
        yield engine_on(room, plan, pseudonyms), identities_on(room, plan, pseudonyms)
