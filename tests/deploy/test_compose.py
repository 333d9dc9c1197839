"""What can be known of the production stack without a GPU and without its images: it is valid, pinned, and asks for what exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cxr_retrieval.contract import LEAF_MODELS
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.serving.server import Endpoints
from tests_support import dashboard_metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "cxr-retrieval.json"


def compose(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`docker compose` where it is installed, else the `docker-compose` of Debian 12."""
    plugin = ["docker", "compose"]
    has_plugin = shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode == 0
    command = [*(plugin if has_plugin else ["docker-compose"]), *arguments]
    values = {key: value for key, value in os.environ.items() if not key.startswith(("CXR_", "GRAFANA_"))} | environment
    return subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def text() -> str:
    result = compose("config", GRAFANA_PASSWORD="of-the-test")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_compose_file_is_valid_and_names_its_services() -> None:
    result = compose("config", "--services", GRAFANA_PASSWORD="of-the-test")
    assert result.returncode == 0, result.stderr
    assert {"engines", "triton", "milvus", "prometheus", "grafana"} <= set(result.stdout.split())


def test_grafana_has_no_default_password() -> None:
    result = compose("config")
    assert result.returncode != 0
    assert "set GRAFANA_PASSWORD" in result.stderr


def test_every_image_is_pinned_to_a_version(text: str) -> None:
    images = re.findall(r"^\s+(?:image|TRITON): (\S+)$", text, re.MULTILINE)
    assert len(images) >= 5
    for image in images:
        assert re.search(r":v?\d+\.\d+", image), image
    major, minor = map(int, re.search(r"tritonserver:(\d+)\.(\d+)", text).groups())  # pyright: ignore[reportOptionalMemberAccess]
    assert (major, minor) >= (26, 3)


def test_nothing_is_published_beyond_this_machine() -> None:
    source = (ROOT / "compose.yaml").read_text()
    lists = re.findall(r"ports: \[(.*)\]", source)
    assert len(lists) == source.count("ports:") == 5
    published = [port.strip().replace("${CXR_NODE_ADDRESS:-127.0.0.1}", "127.0.0.1") for ports in lists for port in ports.split(",")]
    assert {port.split(":")[1] for port in published} == {"8000", "8001", "8002", "19530", "9090", "3000", "11112"}
    assert all(port.startswith('"127.0.0.1:') for port in published)


def test_the_node_asks_callers_for_certificates() -> None:
    node = compose("--profile", "node", "config", GRAFANA_PASSWORD="of-the-test").stdout
    assert "listen:" in node
    assert "profiles: [node]" in (ROOT / "compose.yaml").read_text(), "it wants rules and certificates first"
    for option in ("--tls-cert", "--tls-key", "--tls-client-ca", "--rules"):
        assert option in node
    assert "--unencrypted" not in node


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_the_nodes_unit_is_valid(tmp_path: Path) -> None:
    unit = (ROOT / "deploy" / "cxr-listen.service").read_text()
    assert "/opt/cxr/bin/cxr listen" in unit
    here = tmp_path / "cxr-listen.service"
    here.write_text(unit.replace("/opt/cxr/bin/cxr", str(Path(sys.executable).with_name("cxr"))))
    checked = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_triton_loads_the_contracts_models_explicitly_from_a_read_only_folder(text: str) -> None:
    assert "--model-control-mode=explicit" in text
    for name in (*LEAF_MODELS, "cxr_retrieval"):
        assert f"--load-model={name}" in text
    source = (ROOT / "compose.yaml").read_text()
    assert '"engines:/engines:ro"' in source
    assert "cxr build engines /engines --check &&" in re.sub(r"\s+", " ", source)


def test_dashboard_asks_triton_for_what_it_exports(student_server: Endpoints, student: TritonClient, squares: Any) -> None:
    """GPU figures apart: no GPU is here to be asked."""
    student.infer(squares[:1])
    exported = urllib.request.urlopen(f"http://{student_server.metrics}/metrics", timeout=10).read().decode()
    asked = dashboard_metrics("nv_")
    assert {"nv_inference_count", "nv_inference_exec_count", "nv_inference_queue_duration_us"} <= asked
    for name in asked:
        assert name.startswith("nv_gpu_") or f"# TYPE {name} " in exported, name


def test_prometheus_and_grafana_find_each_other() -> None:
    targets = (ROOT / "deploy" / "prometheus.yaml").read_text()
    services = set(compose("config", "--services", GRAFANA_PASSWORD="x").stdout.split())
    scraped = set(re.findall(r'targets: \["(\w+):', targets))
    assert scraped == {"triton", "milvus"}
    assert scraped <= services
    source = (ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text()
    used = {panel["datasource"]["uid"] for panel in json.loads(DASHBOARD.read_text())["panels"]}
    assert used == set(re.findall(r"uid: (\w+)", source)) == {"prometheus"}


def service(text: str, name: str) -> str:
    """What `config` says of one service."""
    found = re.search(rf"^  {name}:\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    assert found, f"no service {name}"
    return found[1]


def test_a_clients_shared_memory_is_in_tritons_sight(text: str) -> None:
    """`cxr loadtest --shared-memory` maps a file of /dev/shm on both sides; by itself every container has a /dev/shm of its own."""
    assert re.search(r"^    ipc: shareable$", service(text, "triton"), re.MULTILINE)
    client = compose("--profile", "client", "config", GRAFANA_PASSWORD="of-the-test")
    assert client.returncode == 0, client.stderr
    assert re.search(r"^    ipc: service:triton$", service(client.stdout, "client"), re.MULTILINE)


def test_milvus_is_run_as_its_own_script_runs_it(text: str) -> None:
    """Of standalone_embed.sh: embedded etcd, local storage, no filter of system calls; and the write-ahead log is chosen, not defaulted."""
    milvus = service(text, "milvus")
    expected = {
        "COMMON_STORAGETYPE": "local",
        "DEPLOY_MODE": "STANDALONE",
        "ETCD_CONFIG_PATH": "/milvus/configs/embedEtcd.yaml",
        "ETCD_DATA_DIR": "/var/lib/milvus/etcd",
        "ETCD_USE_EMBED": "true",
        "MQ_TYPE": "rocksmq",
    }
    assert {name: value.strip("'\"") for name, value in re.findall(r"^      ([A-Z_]+): (\S+)$", milvus, re.MULTILINE)} == expected
    assert set(re.findall(r"^    - ((?:no-new|seccomp)\S+)$", milvus, re.MULTILINE)) == {"no-new-privileges:true", "seccomp:unconfined"}
    etcd = dict(re.findall(r"^([a-z-]+): (\S+)$", (ROOT / "deploy" / "milvus-etcd.yaml").read_text(), re.MULTILINE))
    assert etcd == {
        "listen-client-urls": "http://127.0.0.1:2379",
        "advertise-client-urls": "http://127.0.0.1:2379",
        "quota-backend-bytes": "4294967296",
        "auto-compaction-mode": "revision",
        "auto-compaction-retention": '"1000"',
    }


def test_no_other_service_goes_without_the_filter_of_system_calls(text: str) -> None:
    assert text.count("unconfined") == 1
