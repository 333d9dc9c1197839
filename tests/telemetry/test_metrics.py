"""Metrics as Prometheus reads them, and the table and the board that speak of them."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cxr_retrieval.archive.watching import Away, Back, Event, Listening, Queue, Settled
from cxr_retrieval.errors import ServerDownError, SetupError
from cxr_retrieval.settings import TelemetrySettings
from cxr_retrieval.telemetry.metrics import Metrics, served
from tests_support import dashboard_metrics

ROOT = Path(__file__).parents[2]


def scraped(metrics: Metrics) -> str:
    with served(metrics, "127.0.0.1", 0) as address, urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def text(events: tuple[Event, ...]) -> str:
    metrics = Metrics("1.2.3")
    for event in events:
        metrics(event)
    return scraped(metrics)


@pytest.fixture(scope="module")
def samples(text: str) -> dict[str, float]:
    """`name{label,…}` → value."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {f"{sample.name}{{{','.join(sample.labels.values())}}}": sample.value for sample in found}


def test_what_happened_is_counted(samples: dict[str, float]) -> None:
    expected = {
        "cxr_files_total{answered}": 8,
        "cxr_files_total{failed}": 1,
        "cxr_files_expected{}": 13,
        "cxr_errors_total{ImageError}": 1,
        "cxr_retries_total{OverloadedError,triton}": 1,
        "cxr_breaker_open{triton}": 0,
        "cxr_breaker_open{milvus}": 1,
        "cxr_waited_seconds_total{triton}": 11,
        "cxr_waiting_seconds{triton}": 0,
        "cxr_sent_bytes_total{}": 16 * 65536,
        "cxr_films_answered_total{}": 8,
        "cxr_requests_in_flight{}": 4,
        "cxr_requests_in_flight_limit{}": 6,
        "cxr_films_held{reading}": 3,
        "cxr_films_held{to_ask}": 5,
        "cxr_films_held{doubted}": 2,
        "cxr_films_held{to_keep}": 7,
        "cxr_stage_seconds_count{read}": 1,
        "cxr_stage_seconds_sum{infer}": 0.3,
        "cxr_stage_seconds_sum{keep}": 0.1,
        "cxr_stage_seconds_sum{record}": 0.01,
        "cxr_dicom_instances_total{received}": 1,
        "cxr_dicom_instances_total{rejected caller}": 1,
        "cxr_dicom_parcels_total{archive,sent}": 1,
        "cxr_dicom_parcels_total{archive,postponed}": 1,
        "cxr_dicom_associations{}": 2,
        "cxr_dicom_waiting{}": 41,
        "cxr_dicom_oldest_seconds{}": 7.5,
        "cxr_dicom_to_send{}": 3,
        "cxr_dicom_oldest_parcel_seconds{}": 90,
        "cxr_build_info{1.2.3}": 1,
    }
    assert {name: samples[name] for name in expected} == pytest.approx(expected)
    assert samples["cxr_waiting_seconds{milvus}"] > 0


def health(metrics: Metrics) -> tuple[int, dict[str, Any]]:
    with served(metrics, "127.0.0.1", 0) as address:
        try:
            with urllib.request.urlopen(f"http://{address}/health", timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def test_health_is_well_until_a_server_is_waited_for() -> None:
    metrics = Metrics("1")
    assert health(metrics) == (200, {"status": "ok", "waiting_for": {}})
    metrics(Listening(lambda: Queue(0, 5, 1.5, 2, 0.5)))
    queue = {"associations": 0, "waiting": 5, "oldest_s": 1.5, "to_send": 2, "oldest_parcel_s": 0.5}
    assert health(metrics) == (200, {"status": "ok", "waiting_for": {}, **queue})
    metrics(Away("triton", ServerDownError("no Triton")))
    time.sleep(0.1)
    code, said = health(metrics)
    assert (code, said["status"]) == (503, "waiting")
    assert said["waiting_for"]["triton"] > 0
    metrics(Back("triton", 1.0))
    assert health(metrics)[0] == 200


def test_two_runs_in_one_process_share_nothing() -> None:
    first, second = Metrics("1"), Metrics("1")
    first(Settled({"answered": 5}))
    assert 'cxr_files_total{state="answered"} 5.0' in scraped(first)
    assert "cxr_files_total{" not in scraped(second)


def test_the_table_names_every_metric_and_no_other(text: str) -> None:
    page = (ROOT / "docs" / "observability.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(cxr_\w+)", page, re.MULTILINE)) == {
        line.split()[2] for line in text.splitlines() if line.startswith("# TYPE") and not line.split()[2].endswith("_created")
    }


def test_the_board_asks_for_what_there_is(samples: dict[str, float]) -> None:
    asked = {name for name in dashboard_metrics("cxr_") if name != "cxr_retrieval"}  # a model's name
    assert {"cxr_files_total", "cxr_breaker_open", "cxr_stage_seconds_bucket"} <= asked
    assert asked <= {name.split("{")[0] for name in samples}


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(SetupError, match=r"metrics cannot be served at 127\.0\.0\.1"),
            served(Metrics("1"), "127.0.0.1", taken.getsockname()[1]),
        ):
            pytest.fail("must not be served")


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [
        ("9108", "127.0.0.1", 9108),
        (":0", "127.0.0.1", 0),
        ("localhost:9108", "127.0.0.1", 9108),
        ("127.0.0.2:1", "127.0.0.2", 1),
        ("[::1]:9108", "::1", 9108),
    ],
)
def test_where_metrics_are_served(given: str, host: str, port: int) -> None:
    settings = TelemetrySettings(metrics=given)
    assert (settings.metrics_host, settings.metrics_port) == (host, port)


@pytest.mark.parametrize("given", ["nonsense", "host:1", "127.0.0.1:70000", "127.0.0.1:", "1.2.3.4.5:1", "127.0.0.1:-1"])
def test_a_malformed_address_is_refused(given: str) -> None:
    with pytest.raises(SetupError, match="the address for metrics is malformed"):
        TelemetrySettings(metrics=given)


def test_beyond_this_machine_only_if_told_so() -> None:
    with pytest.raises(SetupError, match="beyond this machine"):
        TelemetrySettings(metrics="0.0.0.0:9108")
    assert TelemetrySettings(metrics="0.0.0.0:9108", insecure=True).metrics_host == "0.0.0.0"


def test_prometheus_scrapes_the_port_that_compose_gives_the_client() -> None:
    scrape = (ROOT / "deploy" / "prometheus.yaml").read_text()
    port = re.search(r"names: \[client\], type: A, port: (\d+)", scrape)
    assert port
    assert f"names: [listen], type: A, port: {port[1]}" in scrape
    assert f'CXR_METRICS: "0.0.0.0:{port[1]}"' in (ROOT / "compose.yaml").read_text()
    assert json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "cxr-retrieval.json").read_text())["panels"]
