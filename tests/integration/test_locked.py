"""Both servers locked, and a proxy that wants a token before Triton: who knows the secrets gets answers, nobody else, and nothing shows them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from certificates import LOCAL, Certificates
from cxr_retrieval.errors import AccessError, ServerDownError
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.phantoms import Phantom
from cxr_retrieval.serving.access import credentials
from cxr_retrieval.serving.choices import Precision
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_triton
from cxr_retrieval.settings import Tls, TritonSettings
from tests_support import ENVIRONMENT, Served, cxr_command, run_cxr

TOKEN = "reader:planted-9c1d47aa03"
BEARER = "planted-bearer-66e2b0f1"
API_KEY = "planted-key-0d92c4"


@dataclass(frozen=True)
class Locked:
    """`cxr serve` on every interface, and what lets a client in."""

    served: Served
    options: tuple[str, ...]

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        return ENVIRONMENT | {"CXR_MILVUS_TOKEN": token}

    def run(self, *arguments: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        return run_cxr(*arguments, *self.options, environment=self.environment(token))


@pytest.fixture(scope="module")
def locked(certificates: Certificates, tiny: Path, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    path = certificates.path
    own = (
        "--repository",
        tiny,
        "--precision",
        "fp32",
        "--tls-cert",
        path("server.pem"),
        "--tls-key",
        path("server.key"),
        "--tls-client-ca",
        path("ours.pem"),
    )
    environment = ENVIRONMENT | {"CXR_SERVE_TOKEN": TOKEN}
    served = Served(tmp_path_factory.mktemp("locked"), "--host", "0.0.0.0", *map(str, own), environment=environment)
    try:
        assert "locked   clients need TLS, a client certificate, a token (the gallery)\n" in served.said
        triton, milvus = served.servers[1], served.servers[3].replace("http:", "https:")
        shown = [
            word
            for server in ("triton", "milvus")
            for option, name in (("ca", "ours.pem"), ("cert", "client.pem"), ("key", "client.key"))
            for word in (f"--{server}-{option}", str(path(name)))
        ]
        running = Locked(served, ("--triton", triton, "--milvus", milvus, *shown, "--timeout", "20"))
        done = running.run("ingest", "--no-gate", "--manifest", phantom_manifest, "--audit", phantom_manifest.with_name("audit.jsonl"))
        assert done.returncode == 0, done.stderr
        yield running
    finally:
        served.stop()


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Iterator[Endpoints]:
    """A Triton to stand a proxy before."""
    with embedded_triton(ServerOptions(tiny, Precision.fp32, grpc_port=0, http_port=0, metrics_port=0)) as server:
        yield server


@pytest.fixture(scope="module")
def films(phantoms: list[Phantom], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """54 of them."""
    folder = tmp_path_factory.mktemp("films")
    for number, phantom in enumerate(phantoms):
        for copy in range(6):
            pixels = phantom.pixels.copy()
            pixels[:4, : copy + 4] = 255
            Image.fromarray(pixels).save(folder / f"{number}-{copy}.png", compress_level=1)
    return folder


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def test_query_and_batch_through_tls_with_certificate_and_token(locked: Locked, films: Path, tmp_path: Path) -> None:
    """And while the batch runs, no process of client or server shows a secret on its command line, or hands it on."""
    answered = locked.run("query", films / "0-0.png", "--json", "--no-gate")
    assert answered.returncode == 0, answered.stderr
    assert len(json.loads(answered.stdout)["neighbours"]) == 9
    out = tmp_path / "results.jsonl"
    with subprocess.Popen(
        cxr_command("batch", films, "--no-gate", "--out", out, *locked.options),
        env=locked.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as batch:
        own = (batch.pid, locked.served.process.pid)
        ours: list[list[str]] = []
        seen: set[int] = set()
        while batch.poll() is None:
            with suppress(psutil.Error):
                ours = [psutil.Process(pid).cmdline() for pid in own]  # anew: what was just started may not be the command yet
            for process in [*tree(batch.pid), *tree(locked.served.process.pid)]:
                try:
                    command, inherited = process.cmdline(), process.environ()
                except psutil.Error:
                    continue
                assert not [word for word in command if "planted" in word]
                # nor a fork of ours, about to be another program
                if process.pid not in own and command not in ours and not Path(command[0]).name.startswith("cxr"):
                    seen.add(process.pid)
                    assert not [name for name, value in inherited.items() if "planted" in value], command
            time.sleep(0.05)
        said = "".join(batch.communicate())
    assert batch.returncode == 0, said
    assert "54 answered" in said
    assert len(seen) >= 3, "workers that decode, Triton, and its backends were looked at"
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"planted" not in written + said.encode()


def test_nothing_listens_unencrypted_beyond_this_machine(locked: Locked) -> None:
    """Triton has no TLS for HTTP and metrics."""
    listening = {
        connection.laddr.port: connection.laddr.ip
        for process in tree(locked.served.process.pid)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    option = dict(zip(locked.options, locked.options[1:], strict=False))
    encrypted = {int(option[name].rsplit(":", 1)[1]) for name in ("--triton", "--milvus")}
    assert {listening[port] for port in encrypted} <= {"0.0.0.0", "::"}
    assert {ip for port, ip in listening.items() if port not in encrypted} == {LOCAL}
    assert len(listening) == 4


@pytest.mark.parametrize(
    ("changed", "token", "words"),
    [
        ({"--triton-ca": "theirs.pem"}, TOKEN, "no trusted connection to Triton at .*certificate was not accepted.*give the authority"),
        ({"--triton-cert": "stranger.pem", "--triton-key": "stranger.key"}, TOKEN, "Triton at .*does not accept this client certificate"),
        ({"--triton-cert": None, "--triton-key": None}, TOKEN, "Triton at .*a client without a certificate.*give a client certificate"),
        ({"--triton-cert": None, "--triton-key": None, "--triton-ca": None}, TOKEN, "Triton at .*speaks TLS, and was asked without"),
        ({"--milvus-ca": "theirs.pem"}, TOKEN, "no trusted connection to Milvus at .*certificate was not accepted.*give the authority"),
        ({"--milvus-cert": None, "--milvus-key": None}, TOKEN, "Milvus at .*a client without a certificate"),
        ({}, f"{TOKEN}x", "Milvus at .*refused access; expected other credentials.*--milvus-token-file"),
        ({}, "", "Milvus at .*refused access; expected credentials, and none were sent"),
    ],
)
def test_whoever_lacks_something_is_told_at_once_what(
    changed: dict[str, str | None], token: str, words: str, locked: Locked, certificates: Certificates, films: Path, tmp_path: Path
) -> None:
    """Not after an hour: --patience is for servers that are away."""
    option = dict(zip(locked.options[::2], locked.options[1::2], strict=True))
    option |= {name: str(certificates.path(value)) for name, value in changed.items() if value}
    given = [word for name, value in option.items() if changed.get(name, "") is not None for word in (name, value)]
    started = time.monotonic()
    result = run_cxr("batch", films, "--out", tmp_path / "r.jsonl", *given, environment=locked.environment(token))
    assert result.returncode == 2, result.stderr
    said = " ".join(result.stderr.split())
    assert said.startswith("error: ")
    assert re.search(words, said), said
    assert "planted" not in said + result.stdout
    assert "Traceback" not in said
    assert "away" not in said
    assert time.monotonic() - started < 60


def test_perf_analyzer_goes_through_tls_and_is_not_told_secrets(locked: Locked, tmp_path: Path) -> None:
    option = dict(zip(locked.options[::2], locked.options[1::2], strict=True))
    triton = [word for name, value in option.items() if name.startswith("--triton") for word in (name, value)]
    common = ("loadtest", "--model", "attention_map", "--concurrency", "1", "--rate", "5", "--shared-memory", "off", "--seconds", "0.5")
    run_cxr(*common, "--stable", "100", "--out", tmp_path, *triton)
    loads = json.loads((tmp_path / "loadtest.json").read_text())["loads"]
    assert set(loads[0]["steps"]) == {"attention_map"}, "it ran there"
    refused = run_cxr(*common, "--out", tmp_path / "no", *triton, environment=ENVIRONMENT | {"CXR_TRITON_TOKEN": BEARER})
    assert refused.returncode == 2
    assert "perf_analyzer cannot keep a secret" in refused.stderr
    assert "planted" not in refused.stderr


def test_the_ten_lines_of_the_document_work(phantom_manifest: Path, tmp_path: Path) -> None:
    """As they stand there, but for address and ports, and the five networks, of which one takes the place."""
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    lines = text.split("```sh\n")[1].split("```")[0].splitlines()
    assert len(lines) == 10
    (at,) = (number for number, line in enumerate(lines) if line.startswith("cxr serve"))
    shutil.copytree(phantom_manifest.parent, tmp_path / "cases")
    shutil.copy(next((tmp_path / "cases" / "images").iterdir()), tmp_path / "film.dcm")
    environment = ENVIRONMENT | {"PATH": f"{Path(cxr_command()[0]).parent}:{ENVIRONMENT['PATH']}", "CXR_AUDIT": str(tmp_path / "audit")}

    def shell(some: list[str], *moved: tuple[str, str]) -> str:
        script = "\n".join(some)
        for former, now in moved:
            script = script.replace(former, now)
        done = subprocess.run(
            ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shell(lines[:at], ("10.0.0.5", LOCAL))
    words = [LOCAL if word == "10.0.0.5" else word for word in lines[at].removesuffix(" &").split()[2:]]
    options = [str(tmp_path / word) if (tmp_path / word).is_file() else word for word in words]
    served = Served(tmp_path, *options, "--segmentation", "student")
    try:
        triton, milvus = served.servers[1], served.servers[3].removeprefix("http://")
        said = shell(lines[at + 1 :], ("10.0.0.5:8001", triton), ("10.0.0.5:19530", milvus))
    finally:
        served.stop()
    assert "9 stored" in said
    assert "confidence" in said


# ------------------------------------------------------------------------------------------- a proxy before Triton


class Door(grpc.GenericRpcHandler):
    """Passes any call on to Triton if it has the token and the key; else it answers with what it was shown, as some proxies do."""

    def __init__(self, triton: grpc.Channel) -> None:
        self._triton = triton
        self.passed = 0
        self.until = float("inf")
        self.says = grpc.StatusCode.UNAUTHENTICATED

    def service(self, handler_call_details: Any) -> Any:
        shown = dict(handler_call_details.invocation_metadata)

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.passed += 1
            if (shown.get("authorization"), shown.get("x-api-key")) != (f"Bearer {BEARER}", API_KEY) or self.passed > self.until:
                context.abort(self.says, f"not good enough: {shown.get('authorization')} and {shown.get('x-api-key')}")
            on: Any = self._triton.unary_unary(handler_call_details.method)
            try:
                return on(request, timeout=60)
            except grpc.RpcError as error:
                failed: Any = error
                context.abort(failed.code(), failed.details())
                raise

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def proxy(triton: str, tls: Tls | None) -> Generator[tuple[Door, str]]:
    with grpc.insecure_channel(triton, options=[("grpc.max_receive_message_length", -1)]) as channel:
        door = Door(channel)
        server = grpc.server(ThreadPoolExecutor(16), handlers=[door], options=[("grpc.max_receive_message_length", -1)])
        port = server.add_secure_port(f"{LOCAL}:0", credentials(tls)) if tls else server.add_insecure_port(f"{LOCAL}:0")
        server.start()
        yield door, f"{LOCAL}:{port}"
        server.stop(0).wait()


def test_a_proxy_that_wants_token_and_header(plain: Endpoints, certificates: Certificates, squares: NDArray[np.uint8]) -> None:
    with proxy(plain.grpc, certificates.tls("server", ca=None)) as (door, url):
        tls, headers = certificates.tls(), (("x-api-key", API_KEY),)
        with TritonClient(TritonSettings(url, 20, tls, BEARER, headers)) as client:
            assert client.embed(squares[:2]).shape == (2, 64)
        for settings, expected in (
            (TritonSettings(url, 20, tls), "credentials, and none were sent"),
            (TritonSettings(url, 20, tls, f"{BEARER}x", headers), "other credentials"),
            (TritonSettings(url, 20, tls, BEARER), "other credentials"),
        ):
            for door.says in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                with pytest.raises(
                    AccessError, match=f"refused access; expected {expected}; got not good enough.*--triton-token"
                ) as caught:
                    TritonClient(settings)
                assert "planted" not in str(caught.value)
                assert "planted" not in repr(settings)


def test_a_token_that_ends_in_the_middle_of_a_batch_fails_no_film(plain: Endpoints, films: Path, tmp_path: Path) -> None:
    """It ends the run; the same command with another token finishes the rest."""
    out, headers = tmp_path / "results.jsonl", tmp_path / "headers"
    headers.write_text(f"X-Api-Key: {API_KEY}\n")
    with proxy(plain.grpc, None) as (door, url):
        command = ("batch", films, "--no-gate", "--embed-only", "--out", out, "--triton", url, "--triton-header-file", headers)
        environment = ENVIRONMENT | {"CXR_TRITON_TOKEN": BEARER}
        door.until = 5
        ended = run_cxr(*command, environment=environment)
        assert ended.returncode == 2, ended.stderr
        assert "refused access" in ended.stderr
        assert "planted" not in ended.stderr + ended.stdout + "".join(
            path.read_text(errors="replace") for path in tmp_path.glob("results*")
        )
        door.until = float("inf")
        done = run_cxr(*command, environment=environment)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["input"] for line in lines}) == len(lines) == 54
    assert {line["status"] for line in lines} == {"answered"}


# ------------------------------------------------------------------------------------------- secrets stay secret


def test_options_that_took_secrets_on_the_command_line_are_gone() -> None:
    for word in (f"--milvus-token={TOKEN}", f"--milvus-password={TOKEN}", f"--triton-token={TOKEN}"):
        result = run_cxr("info", word)
        assert result.returncode == 2
        assert "No such option" in result.stderr
        assert "planted" not in result.stderr + result.stdout


def harm(kind: str, tmp_path: Path) -> list[str]:
    """Arguments that make a command fail in this way."""
    closed = socket.create_server((LOCAL, 0))
    port = closed.getsockname()[1]
    closed.close()
    return {
        "servers away": ["--triton", f"{LOCAL}:{port}", "--milvus", f"http://{LOCAL}:{port}", "--timeout", "2"],
        "secrets in the open": ["--triton", "triton.example:8001", "--milvus", "http://milvus.example:19530"],
        "credentials in the address": ["--milvus", f"http://{TOKEN}@{LOCAL}:{port}"],
        "no such option": ["--no-such-option"],
        "a file that is none": ["--triton-token-file", str(tmp_path)],
        "a broken header": ["--triton-header-file", str(tmp_path / "headers")],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["servers away", "secrets in the open", "credentials in the address", "no such option", "a file that is none", "a broken header"],
)
def test_no_failure_shows_a_secret(kind: str, films: Path, tmp_path: Path) -> None:
    (tmp_path / "headers").write_text(f"X-Api-Key {API_KEY}\n")
    secrets = {"CXR_TRITON_TOKEN": BEARER, "CXR_MILVUS_TOKEN": TOKEN, "CXR_MILVUS_PASSWORD": TOKEN, "CXR_TRITON_HEADERS": f"x-a: {API_KEY}"}
    for pretty in ({}, {"TERM": "xterm-256color", "FORCE_COLOR": "1", "GRPC_VERBOSITY": "debug"}):
        result = run_cxr("query", films / "0-0.png", *harm(kind, tmp_path), environment=ENVIRONMENT | secrets | pretty)
        assert result.returncode == 2
        assert result.stderr
        assert "planted" not in result.stderr + result.stdout


def test_not_even_a_fault_of_ours_shows_one(films: Path, tmp_path: Path) -> None:
    """A traceback, as Typer draws it, out of the middle of a connection."""
    code = (
        "import sys\n"
        "import cxr_retrieval.inference.triton as t\n"
        "def fault(self): raise ZeroDivisionError(repr(self._settings))\n"
        "t.TritonClient._announced_version = fault\n"
        f"sys.argv = ['cxr', 'query', {str(films / '0-0.png')!r}]\n"
        "from cxr_retrieval.cli.app import main; main()"
    )
    environment = ENVIRONMENT | {"CXR_TRITON_TOKEN": BEARER, "CXR_MILVUS_TOKEN": TOKEN, "TERM": "xterm"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "ZeroDivisionError" in result.stderr
    assert "planted" not in result.stderr + result.stdout


def test_a_server_that_is_away_is_still_waited_for(certificates: Certificates) -> None:
    """With TLS, too: only a refusal is not."""
    with pytest.raises(ServerDownError, match="no Triton server answers"):
        TritonClient(TritonSettings(f"{LOCAL}:1", 2, certificates.tls("client")))
