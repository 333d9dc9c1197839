"""Several real Tritons asked as one: one dies, one stalls, one comes back, one serves something else, and nobody who asks notices."""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from certificates import Certificates
from chaos.instant import VERSION
from chaos.world import Service, triton_service
from cxr_retrieval.contract import EMBEDDING, ENSEMBLE, IMAGE_SIZE
from cxr_retrieval.errors import InferenceError, ServerDownError, SetupError, UsageError
from cxr_retrieval.evaluation.loadtest import run_loads
from cxr_retrieval.inference.balancing import Balanced
from cxr_retrieval.inference.triton import TritonClient, open_channel
from cxr_retrieval.settings import TritonSettings
from tests_support import free_ports, until

FILM = np.random.default_rng(3).integers(0, 256, (2, 1, IMAGE_SIZE, IMAGE_SIZE), np.uint8)


@pytest.fixture(scope="module")
def three(instant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Service, int]]]:
    """Servers of the same weights, and their ports."""
    folder = tmp_path_factory.mktemp("three")
    made = [triton_service(folder / name, "--repository", str(instant), "--precision", "fp32", "--threads", "1") for name in "abc"]
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(3))  # open to the end: a server dies with the thread that started it
        list(pool.map(lambda one: one[0].start(), made))
        for service, _ in made:
            stack.callback(service.stop)
        yield made


def settings(*ports: int, timeout_s: float = 30) -> TritonSettings:
    return TritonSettings(",".join(f"127.0.0.1:{port}" for port in ports), timeout_s)


def answered(port: int) -> int:
    """Films that the ensemble of this server has answered for since it started; none while it is away."""
    try:
        with grpcclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
            statistics: Any = client.get_inference_statistics(ENSEMBLE)
            return int(statistics.model_stats[0].inference_count)
    except InferenceServerException:
        return 0


@contextmanager
def asking(client: TritonClient, threads: int = 6) -> Generator[tuple[Counter[str], list[float]]]:
    """Threads that ask again and again; what became of it, and how long each answer took."""
    ended, count, seconds = threading.Event(), Counter[str](), list[float]()
    expected = client.embed(FILM)

    def ask() -> None:
        while not ended.is_set():
            began = time.monotonic()
            try:
                right = np.array_equal(client.embed(FILM), expected)
                count["answered" if right else "wrong"] += 1
            except InferenceError as error:
                count[type(error).__name__] += 1
            seconds.append(time.monotonic() - began)

    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(ask) for _ in range(threads)]
        try:
            yield count, seconds
        finally:
            ended.set()
        for task in tasks:
            task.result()


def test_each_has_its_share(three: list[tuple[Service, int]]) -> None:
    ports = [port for _, port in three]
    before = [answered(port) for port in ports]
    with TritonClient(settings(*ports)) as client:
        assert client.model_version == VERSION
        with asking(client) as (count, _):
            until(lambda: count["answered"] > 300)
    shares = [answered(port) - had for port, had in zip(ports, before, strict=True)]
    assert min(shares) > 0.08 * sum(shares), "they are not equally fast, on two cores"
    assert set(count) == {"answered"}


def test_one_dies_one_stalls_one_comes_back_and_nobody_notices(three: list[tuple[Service, int]]) -> None:
    (first, first_port), (second, second_port), (_, third_port) = three
    with TritonClient(settings(first_port, second_port, third_port)) as client, asking(client) as (count, seconds):
        until(lambda: count["answered"] > 50)
        second.signal(signal.SIGSTOP)
        try:
            at = count["answered"]
            until(lambda: count["answered"] > at + 50)
            first.kill()
            at = count["answered"]
            until(lambda: count["answered"] > at + 200)
        finally:
            second.signal(signal.SIGCONT)
        first.bring_back()
        until(lambda: answered(first_port) > 50, 60)
        until(lambda: answered(second_port) > 0)
    assert set(count) == {"answered"}, "no request failed, and no answer was wrong"
    assert max(seconds) < 12, "what a server had that stalls was asked elsewhere once that was seen, not at its deadline"


def test_a_server_of_other_weights_is_never_asked(three: list[tuple[Service, int]], instant: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(instant, other)
    for config in other.glob("*/config.pbtxt"):
        config.write_text(config.read_text().replace(VERSION, "0another0000"))
    stranger, port = triton_service(tmp_path / "stranger", "--repository", str(other), "--precision", "fp32", "--threads", "1")
    with stranger, TritonClient(settings(three[2][1], port)) as client:
        for _ in range(40):
            client.embed(FILM)
        assert answered(port) == 0
        balanced = Balanced(settings(three[2][1], port), open_channel)
        try:
            assert re.search(rf":{port}: it serves the weights 0another0000, and others {VERSION}", balanced.why())
        finally:
            balanced.close()


def test_where_nobody_answers_that_is_said_of_each_and_ends_when_one_does(three: list[tuple[Service, int]]) -> None:
    nobody, other = free_ports(2)
    with pytest.raises(ServerDownError) as error:
        TritonClient(settings(nobody, other, timeout_s=5))
    assert f"127.0.0.1:{nobody},127.0.0.1:{other}" in str(error.value)
    with TritonClient(settings(nobody, three[2][1])) as client:
        client.embed(FILM)
        client.probe()


def test_a_name_stands_for_all_its_addresses(three: list[tuple[Service, int]]) -> None:
    with TritonClient(TritonSettings(f"dns:///localhost:{three[2][1]}", 10)) as client:
        assert client.embed(FILM).shape == (2, EMBEDDING.shape[0])


@pytest.mark.parametrize("url", ["a:1,", "a:1,b", "a:1 b:2", "dns://a:1", "dns:///a", "", "http://a:1,b:2"])
def test_a_list_that_cannot_be_meant_is_refused(url: str) -> None:
    with pytest.raises(SetupError, match="several with commas between"):
        TritonSettings(url)


def test_a_secret_goes_to_none_of_several_in_the_open() -> None:
    TritonSettings("127.0.0.1:1,localhost:2", token="secret-of-the-test")
    with pytest.raises(SetupError, match="would cross the network unencrypted"):
        TritonSettings("127.0.0.1:1,10.0.0.1:2", token="secret-of-the-test")


def test_a_certificate_is_for_the_name_whose_addresses_are_asked(certificates: Certificates) -> None:
    with_tls = TritonSettings("dns:///localhost:1", 1, certificates.tls("client"))
    balanced = Balanced(with_tls, open_channel)
    try:
        of = balanced.settings_of("127.0.0.1:1")
        assert of.tls is not None
        assert (of.url, of.tls.server_name) == ("127.0.0.1:1", "localhost")
    finally:
        balanced.close()


def test_a_load_is_for_one_server() -> None:
    nothing: Any = None
    with pytest.raises(UsageError, match="perf_analyzer loads one server"):
        run_loads([], FILM, TritonSettings("a:1,b:2"), nothing, nothing, nothing)
