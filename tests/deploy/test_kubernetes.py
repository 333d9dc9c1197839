"""What can be known of the manifests without a cluster: they render, every object is valid, and names, ports, commands, secrets and network policies
fit each other and the programs. Containers' own command lines are run here: the CPU variant's in the Triton of the wheel, the node's and the page's."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import ValidationError

from certificates import Certificates
from cxr_retrieval.cli.app import app
from cxr_retrieval.contract import ENSEMBLE, LEAF_MODELS
from cxr_retrieval.errors import CxrError
from cxr_retrieval.inference import balancing
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.pacs.rules import read_rules
from cxr_retrieval.serving.server import _install_backend  # pyright: ignore[reportPrivateUsage] (where the wheel's Triton is, and how it is started)
from cxr_retrieval.settings import TritonSettings
from manifests import (
    KUBERNETES,
    ROOT,
    TOP,
    Object,
    Pod,
    named,
    objects,
    of_kind,
    of_name,
    pods,
    quantity,
    rendered,
    require_valid,
    selected,
)
from network_policies import Party, ours, passes, theirs
from tests_support import ENVIRONMENT, cxr_command, free_ports, until

PAGE = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
READ_BESIDE = frozenset({"CXR_PSEUDONYM_KEY", "CXR_COMPILED"})
"""Variables that are no option's: the key itself, and where Triton's backend keeps compiled graphs."""
BYTES_PER_CASE = 2900
"""docs/performance.md: what a Milvus server grew by from 100,000 to 1,000,000 cases."""


@pytest.mark.parametrize("top", TOP)
def test_every_object_is_valid(top: str) -> None:
    assert objects(top)
    for one in objects(top):
        require_valid(one)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] in ("cxr", "cxr-gallery"), named(one)


def test_a_field_that_does_not_exist_is_found_wherever_it_is() -> None:
    broken = {
        "Deployment": lambda spec: spec["template"]["spec"]["containers"][0].update(imagePullPolcy="Always"),
        "RayJob": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(securityContexts={}),
        "Milvus": lambda spec: spec["components"]["standalone"].update(replica=2),
        "ServiceMonitor": lambda spec: spec["endpoints"][0].update(ports="metrics"),
    }
    for kind, harm in broken.items():
        one = json.loads(json.dumps(of_kind(kind)[0]))
        require_valid(one)
        harm(one["spec"])
        with pytest.raises(ValidationError, match="Additional properties are not allowed"):
            require_valid(one)


def test_nothing_in_the_folder_is_left_out() -> None:
    """Every kustomization is applied or a part of one, and every manifest belongs to one."""
    used: set[Path] = set()
    waiting = [KUBERNETES / top for top in TOP]
    while waiting:
        folder = waiting.pop()
        if folder not in used:
            used.add(folder)
            said = yaml.safe_load((folder / "kustomization.yaml").read_text())
            entries = [
                *said.get("resources", ()),
                *said.get("components", ()),
                *(patch.get("path", ".") for patch in said.get("patches", ())),
            ]
            files = [(folder / entry).resolve() for entry in entries]
            waiting += [path for path in files if path.is_dir() and path != folder]
            used |= {path for path in files if path.is_file()}
    there = {path for path in KUBERNETES.rglob("*.yaml") if path.name not in ("kustomization.yaml", "prometheus-adapter.yaml")}
    assert there <= used
    assert {path.parent for path in KUBERNETES.rglob("kustomization.yaml")} <= used


def test_both_variants_are_the_same_but_for_what_triton_computes_with() -> None:
    one, other = ({(named(one), json.dumps(one)) for one in objects(f"overlays/{variant}")} for variant in ("gpu", "cpu"))
    assert {told for told, _ in one ^ other} == {"Deployment triton"}
    assert {told for told, _ in one} >= {
        "ConfigMap dashboard",
        "Milvus gallery",
        "StatefulSet listen",
        "Deployment view",
        "NetworkPolicy nothing",
    }


# ------------------------------------------------------------------------------------------------------------------ pods


def test_every_image_is_pinned_to_the_version_of_compose() -> None:
    ours, milvus = re.findall(r"image: ((?:cxr-retrieval|milvusdb/milvus):\S+)", (ROOT / "compose.yaml").read_text())
    assert {container["image"] for pod in pods() for container in pod.containers} == {ours}
    assert {one["spec"]["components"]["image"] for one in of_kind("Milvus")} == {milvus}


def test_every_pod_is_restricted() -> None:
    """As Pod Security's `restricted` has it, and beyond: a root that is not written to, and no token of the cluster."""
    accounts = {one["metadata"]["name"]: one for one in of_kind("ServiceAccount")}
    for pod in pods():
        if pod.of["kind"] == "Milvus":
            continue
        told, context = named(pod.of), pod.spec["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, 1000, 1000), told
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, told
        assert pod.spec["automountServiceAccountToken"] is False, told
        assert accounts[pod.spec["serviceAccountName"]]["automountServiceAccountToken"] is False, told
        assert pod.spec["enableServiceLinks"] is False, told
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), told
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, told
        for volume in pod.spec["volumes"]:
            assert volume.keys() - {"name"} <= {"emptyDir", "secret", "configMap", "persistentVolumeClaim"}, told
    enforced = {one["metadata"]["name"]: one["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] for one in of_kind("Namespace")}
    assert enforced == {"cxr": "restricted", "cxr-gallery": "baseline"}


def test_files_that_are_the_owners_alone_stay_so() -> None:
    """By default a volume's files are opened to the pod's group at every start, and the table of pseudonyms is then refused."""
    for pod in pods():
        kept = [volume for volume in pod.spec.get("volumes", ()) if "persistentVolumeClaim" in volume]
        if kept or "volumeClaimTemplates" in pod.of["spec"]:
            assert pod.spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", named(pod.of)


def test_every_container_asks_for_what_it_needs_and_may_have_no_more_than_a_limit() -> None:
    every = [(named(pod.of), container["resources"]) for pod in pods() for container in pod.containers]
    for one in of_kind("Milvus"):
        every += [
            (named(one), part["resources"]) for part in one["spec"]["components"].values() if isinstance(part, dict) and "replicas" in part
        ]
        every.append((f"etcd of {named(one)}", one["spec"]["dependencies"]["etcd"]["inCluster"]["values"]["resources"]))
    for told, resources in every:
        for name in ("cpu", "memory"):
            assert 0 < quantity(resources["requests"][name]) <= quantity(resources["limits"][name]), (told, name)


def test_reasons_stand_beside_resources() -> None:
    """Whoever changes a number must know why it was that one: on its line, or in lines of their own right above."""
    for path in KUBERNETES.rglob("*.yaml"):
        above = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "requests:" in line:
                assert "#" in line or above.lstrip().startswith("#"), f"{path.relative_to(KUBERNETES)}:{number}"
            above = line


def test_volumes_claims_accounts_and_settings_that_are_named_are_there() -> None:
    claims = {one["metadata"]["name"] for one in of_kind("PersistentVolumeClaim")}
    maps = {one["metadata"]["name"] for one in of_kind("ConfigMap")}
    for pod in pods():
        templates = {one["metadata"]["name"] for one in pod.of["spec"].get("volumeClaimTemplates", ())}
        volumes = {one["name"]: one for one in pod.spec.get("volumes", ())}
        mounted = {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}
        assert mounted == volumes.keys() | templates, named(pod.of)
        assert {one["persistentVolumeClaim"]["claimName"] for one in volumes.values() if "persistentVolumeClaim" in one} <= claims
        assert {one["configMap"]["name"] for one in volumes.values() if "configMap" in one} <= maps
        assert {source["configMapRef"]["name"] for one in pod.containers for source in one.get("envFrom", ())} <= maps


def test_shared_memory_is_as_much_as_in_compose_and_within_the_limit() -> None:
    for pod in pods():
        for volume in pod.spec.get("volumes", ()):
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                assert all(
                    2 * quantity(volume["emptyDir"]["sizeLimit"]) <= quantity(one["resources"]["limits"]["memory"])
                    for one in pod.spec["containers"]
                )
    (shm,) = {volume["emptyDir"]["sizeLimit"] for pod in of_name("triton") for volume in pod.spec["volumes"] if volume["name"] == "shm"}
    assert f"shm_size: {shm.lower().replace('gi', 'gb')}" in (ROOT / "compose.yaml").read_text()


def test_a_triton_goes_once_clients_have_left_it() -> None:
    for pod in of_name("triton"):
        (triton,) = pod.spec["containers"]
        stay = triton["lifecycle"]["preStop"]["sleep"]["seconds"]
        (finish,) = [int(one.partition("=")[2]) for one in triton["args"] if one.startswith("--exit-timeout-secs=")]
        assert stay > balancing._RESOLVED_S  # pyright: ignore[reportPrivateUsage]
        assert pod.spec["terminationGracePeriodSeconds"] >= stay + finish
        assert pod.of["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        assert {one["topologyKey"] for one in pod.spec["topologySpreadConstraints"]} == {
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        }


def test_a_triton_on_cpus_has_as_many_threads_as_cores() -> None:
    for pod in of_name("triton"):
        (build,) = pod.spec["initContainers"]
        (triton,) = pod.spec["containers"]
        if "engines" in build["args"]:
            assert build["resources"]["limits"]["nvidia.com/gpu"] == triton["resources"]["limits"]["nvidia.com/gpu"] == 1
        else:
            (threads,) = re.findall(r"--threads (\d+)", build["args"][-1])
            assert quantity(threads) == quantity(triton["resources"]["limits"]["cpu"])


def test_tritons_backend_finds_openvino_where_the_image_has_it() -> None:
    (path,) = {one["value"] for pod in of_name("triton") for one in pod.spec["containers"][0]["env"] if one["name"] == "PYTHONPATH"}
    assert f"ln -s /opt/cxr/lib/python3*/site-packages {path} " in (ROOT / "deploy" / "Dockerfile").read_text()


def test_triton_loads_the_contracts_models() -> None:
    for pod in of_name("triton"):
        loaded = [one.partition("=")[2] for one in pod.spec["containers"][0]["args"] if one.startswith("--load-model=")]
        assert loaded == [*LEAF_MODELS, ENSEMBLE]


# ------------------------------------------------------------------------------------------------------------------ commands


@dataclass(frozen=True)
class Command:
    """A `cxr` command line as it stands in a manifest; `parsed` has its options by name."""

    pod: Pod
    container: Object
    words: tuple[str, ...]
    parsed: dict[str, Any]
    variables: frozenset[str]
    """Of the environment, that its options know."""


def parse(words: list[str]) -> tuple[dict[str, Any], frozenset[str]]:
    """
    Raises:
        click.UsageError: There is no such command, or no such option.
    """
    assert words[0] == "cxr"
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    context = command.make_context(words[1], rest)
    variables = {
        variable
        for parameter in command.params
        for variable in ([parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or ())
    }
    return context.params, frozenset(variables)


def command_lines(pod: Pod, container: Object) -> Iterator[list[str]]:
    words = [*container.get("command", ()), *container.get("args", ())]
    known = {**pod.settings, **{one["name"]: one.get("value", "") for one in container.get("env", ())}}
    words = [re.sub(r"\$\((\w+)\)", lambda name: known[name[1]], word) for word in words]
    if words[:1] == ["cxr"]:
        yield words
    elif words[:2] == ["sh", "-c"]:
        lines = [shlex.split(line) for line in words[2].split("&&")]
        yield from (line[line.index("cxr") :] for line in lines if "cxr" in line)


@functools.cache
def commands() -> list[Command]:
    found = [
        Command(pod, container, tuple(line), *parse(line))
        for pod in pods()
        for container in pod.containers
        for line in command_lines(pod, container)
    ]
    for one in of_kind("RayJob"):
        head, *_ = pods([one])
        line = shlex.split(one["spec"]["entrypoint"].partition(" || ")[0])
        found.append(Command(head, head.spec["containers"][0], tuple(line), *parse(line)))
    return found


def test_every_command_is_one_of_ours_and_has_the_options_that_are_given() -> None:
    assert {one.words[:2] if one.words[1] != "build" else one.words[:3] for one in commands()} == {
        ("cxr", "listen"),
        ("cxr", "view"),
        ("cxr", "batch"),
        ("cxr", "reindex"),
        ("cxr", "build", "engines"),
        ("cxr", "build", "repository"),
    }
    with pytest.raises(Exception, match="No such option"):
        parse(["cxr", "view", "--no-such-option"])


def test_commands_on_the_page_are_ours_too() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", PAGE)
    found = [match[1] for line in lines if (match := re.search(r"(?:^|-- )(cxr (?:ingest|gallery|reindex|batch) .*)", line))]
    assert len(found) >= 5
    for line in found:
        if "…" not in line:
            parse(shlex.split(line))


def test_every_variable_is_known_to_a_command_that_is_told_it() -> None:
    for one in commands():
        own = {variable["name"] for variable in one.container.get("env", ()) if variable["name"].startswith("CXR_")}
        assert own <= one.variables | READ_BESIDE, one.words
    every = {variable for one in commands() for variable in one.variables}
    for settings in of_kind("ConfigMap"):
        assert {name for name in settings["data"] if name.startswith("CXR_")} <= every


def test_clients_are_told_the_names_and_ports_that_are_there() -> None:
    (settings,) = {json.dumps(one["data"]) for one in of_kind("ConfigMap") if one["metadata"]["name"] == "settings"}
    told = json.loads(settings)
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind("Service")}
    given = [told["CXR_TRITON"], *(one.parsed["triton"] for one in commands() if one.words[1] == "reindex")]
    for address in given:
        name, port = re.fullmatch(r"dns:///([a-z-]+):(\d+)", address).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert services[name]["clusterIP"] == "None", "only a headless Service's name leads to every pod"
        assert int(port) in {one["port"] for one in services[name]["ports"]}
    (milvus,) = {(one["metadata"]["name"], one["metadata"]["namespace"]) for one in of_kind("Milvus")}
    assert told["CXR_MILVUS"] == f"https://{milvus[0]}-milvus.{milvus[1]}.svc:19530"
    # the certificates that the page has made are for these names
    for address in (*given, told["CXR_MILVUS"]):
        host = re.sub(r"^\w+:///?|:\d+$", "", address)
        assert f"DNS:{host}" in PAGE, host
    for name, value in told.items():
        if value.startswith("/"):
            mounts = [mount["mountPath"] for pod in pods() if pod.settings for mount in pod.spec["containers"][0]["volumeMounts"]]
            assert name == "HOME" or str(Path(value).parent) in mounts, name


def test_ray_in_the_image_is_the_ray_that_is_asked_for() -> None:
    pinned = re.findall(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (asked,) = {one["spec"]["rayClusterSpec"]["rayVersion"] for one in of_kind("RayJob")}
    assert pinned in ([], [asked])


def test_the_nodes_rules_can_be_read() -> None:
    assert read_rules(KUBERNETES / "clients" / "rules.toml").rules


# ------------------------------------------------------------------------------------------------------------------ ports and selectors


def listens(pod: Pod, container: Object) -> set[int]:
    """Where the program in a container listens beyond its own pod, as itself has it."""
    found: set[int] = set()
    variables = {one["name"]: one.get("value", "") for one in container.get("env", ())}
    if "CXR_METRICS" in variables:
        found.add(int(variables["CXR_METRICS"].rpartition(":")[2]))
    for one in commands():
        if one.container is container and one.words[1] in ("listen", "view"):
            assert one.parsed["host"] == "0.0.0.0"
            found.add(one.parsed["port"])
    words = container.get("args", ())
    if "tritonserver" in words:
        assert "--http-address=127.0.0.1" in words
        assert not any(word.startswith(("--grpc-port", "--metrics-port")) for word in words)
        found |= {8001, 8002}  # Triton's defaults
    if pod.of["kind"] == "RayJob" and "CXR_METRICS" in variables:
        found |= {6379, 8265, 10001}  # Ray's, of a head
    return found


def test_containers_name_the_ports_that_their_programs_listen_on() -> None:
    for pod in pods():
        for container in pod.containers:
            assert {port["containerPort"] for port in container.get("ports", ())} == listens(pod, container), (
                named(pod.of),
                container["name"],
            )


def ports_of(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for container in pod.containers for port in container.get("ports", ())}


def test_services_lead_to_pods_that_have_the_port() -> None:
    for service in of_kind("Service"):
        reached = selected(service["spec"]["selector"], "cxr")
        assert reached, named(service)
        assert len({pod.of["metadata"]["name"] for pod in reached}) == 1, f"{named(service)} leads to pods of several kinds"
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in ports_of(pod) for pod in reached), named(service)
            assert port["port"] in (ports_of(reached[0])[port["targetPort"]], 443), named(service)
    for stateful in of_kind("StatefulSet"):
        assert stateful["spec"]["serviceName"] in {one["metadata"]["name"] for one in of_kind("Service")}


def test_probes_ask_ports_that_are_there() -> None:
    for pod in pods():
        for container in pod.spec.get("containers", ()):
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(kind)
                if probe and "httpGet" in probe:
                    assert probe["httpGet"]["port"] in ports_of(pod), named(pod.of)
            if pod.of["kind"] in ("Deployment", "StatefulSet"):
                assert {"readinessProbe", "livenessProbe"} <= container.keys(), named(pod.of)


def test_every_other_selector_selects_something() -> None:
    for one in (*of_kind("Deployment"), *of_kind("StatefulSet"), *of_kind("PodDisruptionBudget")):
        assert selected(one["spec"]["selector"]["matchLabels"], one["metadata"]["namespace"]), named(one)
    for one in of_kind("HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in {(other["kind"], other["metadata"]["name"]) for other in of_kind(target["kind"])}
    services = of_kind("Service")
    for one in of_kind("ServiceMonitor"):
        wanted = one["spec"]["selector"]["matchLabels"].items()
        watched = [service for service in services if wanted <= service["metadata"]["labels"].items()]
        assert watched, named(one)
        for endpoint in one["spec"]["endpoints"]:
            assert all(endpoint["port"] in {port["name"] for port in service["spec"]["ports"]} for service in watched), named(one)
    for one in of_kind("PodMonitor"):
        watched = selected(one["spec"]["selector"]["matchLabels"], "cxr")
        assert any(endpoint["port"] in ports_of(pod) for endpoint in one["spec"]["podMetricsEndpoints"] for pod in watched), named(one)
    for pod in pods():
        for term in pod.spec.get("affinity", {}).get("podAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", ()):
            assert selected(term["labelSelector"]["matchLabels"], pod.namespace), named(pod.of)
    for one in (*of_kind("ServiceMonitor"), *of_kind("PodMonitor")):
        assert one["metadata"]["namespace"] == "cxr"


def test_weights_of_a_release_are_nobody_elses() -> None:
    """The Service of the present weights never leads to a pod of the next ones."""
    services = {one["metadata"]["name"]: one["spec"]["selector"] for one in of_kind("Service")}
    assert services["triton"] != services["triton-next"]
    assert {pod.of["metadata"]["name"] for pod in selected(services["triton"], "cxr")} == {"triton"}
    assert {pod.of["metadata"]["name"] for pod in selected(services["triton-next"], "cxr")} == {"triton-next"}
    kinds = {one["kind"] for one in objects("release/gpu")}
    assert kinds == {"ServiceAccount", "Service", "Deployment", "Job"}


# ------------------------------------------------------------------------------------------------------------------ secrets


def test_no_manifest_holds_a_secret_and_each_that_is_named_is_made_on_the_page() -> None:
    made: dict[tuple[str, str], set[str]] = {}
    for namespace, name, files in re.findall(r"kubectl --namespace (\S+) create secret generic (\S+)(.*)", PAGE):
        made[namespace, name] = set(re.findall(r"--from-file=([\w.-]+)=", files))
    used: dict[tuple[str, str], set[str]] = {}
    assert not of_kind("Secret")
    for pod in pods():
        volumes = {one["name"]: one["secret"] for one in pod.spec.get("volumes", ()) if "secret" in one}
        values = [*pod.settings.values(), *(word for container in pod.containers for word in container.get("args", ()))]
        for container in pod.containers:
            for variable in container.get("env", ()):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    used.setdefault((pod.namespace, reference["name"]), set()).add(reference["key"])
                elif re.search(r"KEY|TOKEN|PASSWORD|SECRET", variable["name"]):
                    assert variable["value"].startswith("/"), f"{named(pod.of)}: {variable['name']} is a value"
                values.append(variable.get("value", ""))
            for mount in container["volumeMounts"]:
                if mount["name"] in volumes and not volumes[mount["name"]].get("optional"):
                    assert mount["readOnly"] is True
                    names = {file for value in values for file in re.findall(rf"{mount['mountPath']}/([\w.-]+)", value)}
                    assert names, f"{named(pod.of)}: nothing asks for {mount['mountPath']}"
                    used.setdefault((pod.namespace, volumes[mount["name"]]["secretName"]), set()).update(names)
    for one in of_kind("Milvus"):
        namespace, spec = one["metadata"]["namespace"], one["spec"]
        used.setdefault((namespace, spec["dependencies"]["storage"]["secretRef"]), {"accesskey", "secretkey"})
        (tls,) = [volume["secret"]["secretName"] for volume in spec["components"]["volumes"]]
        (mount,) = [mount["mountPath"] for mount in spec["components"]["volumeMounts"]]
        used[namespace, tls] = {path.removeprefix(f"{mount}/") for path in spec["config"]["tls"].values()}
    assert used == made


# ------------------------------------------------------------------------------------------------------------------ who may reach whom


DNS = Party({"k8s-app": "kube-dns"}, "kube-system", {"kubernetes.io/metadata.name": "kube-system"})
PROMETHEUS, GATEWAY, OPERATOR = (
    theirs("monitoring", scrapes="true"),
    theirs("gateway", forwards="true"),
    theirs("operators", operates="true"),
)
STRANGER, INTERNET, HOSPITAL = theirs("elsewhere"), Party(address="203.0.113.9"), Party(address="192.0.2.7")


CLIENTS = ("listen", "view", "bulk", "reindex")
NEEDED = [
    *((client, "triton", 8001) for client in CLIENTS),
    *((client, "gallery", 19530) for client in CLIENTS),
    *((somebody, "names", 53) for somebody in (*CLIENTS, "triton", "gallery")),
    ("prometheus", "triton", 8002),
    ("prometheus", "listen", 9108),
    ("prometheus", "bulk", 9108),
    ("prometheus", "gallery", 9091),
    ("gateway", "view", 8080),
    ("hospital", "listen", 11112),
    ("listen", "hospital", 104),
    ("bulk", "bulk", 6379),
    ("bulk", "bulk", 34567),
    ("bulk", "hospital", 443),
    ("operator", "bulk", 8265),
    ("gallery", "gallery", 53100),
    ("gallery", "etcd", 2379),
    ("gallery", "hospital", 443),
    ("operator", "gallery", 9091),
    ("operator", "etcd", 2379),
]
REFUSED = [
    *((client, "internet", 443) for client in (*CLIENTS, "triton", "gallery", "etcd")),
    *(
        ("stranger", ours, port)
        for ours, port in (("triton", 8001), ("triton", 8002), ("view", 8080), ("listen", 11112), ("gallery", 19530), ("bulk", 8265))
    ),
    ("internet", "listen", 11112),
    ("hospital", "view", 8080),
    ("prometheus", "triton", 8001),
    ("prometheus", "gallery", 19530),
    ("gateway", "triton", 8001),
    ("view", "bulk", 8265),
    ("listen", "view", 8080),
    ("view", "hospital", 104),
    ("triton", "gallery", 19530),
    ("triton", "listen", 11112),
    ("view", "triton", 8002),
    ("view", "etcd", 2379),
]


def party(name: str) -> Party:
    others = {
        "names": DNS,
        "prometheus": PROMETHEUS,
        "gateway": GATEWAY,
        "operator": OPERATOR,
        "stranger": STRANGER,
        "internet": INTERNET,
        "hospital": HOSPITAL,
    }
    if name == "etcd":
        return Party({}, "cxr-gallery", {"kubernetes.io/metadata.name": "cxr-gallery"})
    return others.get(name) or ours(name, "cxr-gallery" if name == "gallery" else "cxr")


def test_whoever_needs_somebody_reaches_them_and_nobody_else_does() -> None:
    for source, target, port in NEEDED:
        protocol = "UDP" if port == 53 else "TCP"
        assert passes(party(source), party(target), port, protocol), f"{source} → {target}:{port} is not let through"
    for source, target, port in REFUSED:
        assert not passes(party(source), party(target), port), f"{source} → {target}:{port} is let through"


def test_policies_speak_of_pods_and_namespaces_that_are_there() -> None:
    labelled = set(re.findall(r"kubectl label namespace \S+ (cxr-retrieval/\w+)=true", PAGE))
    for one in of_kind("NetworkPolicy"):
        namespace = one["metadata"]["namespace"]
        assert selected(one["spec"]["podSelector"].get("matchLabels", {}), namespace), named(one)
        for rule in (*one["spec"].get("ingress", ()), *one["spec"].get("egress", ())):
            for peer in (*rule.get("from", ()), *rule.get("to", ())):
                if "ipBlock" in peer:
                    assert peer["ipBlock"]["cidr"] == "192.0.2.0/24", "a hospital's own network stands in its overlay"
                    continue
                there = peer.get("namespaceSelector", {}).get("matchLabels", {"kubernetes.io/metadata.name": namespace})
                name = there.get("kubernetes.io/metadata.name")
                assert name in ("cxr", "cxr-gallery", "kube-system") if name else there.keys() <= labelled, named(one)
                if name in ("cxr", "cxr-gallery"):
                    assert selected(peer.get("podSelector", {}).get("matchLabels", {}), str(name)), named(one)


# ------------------------------------------------------------------------------------------------------------------ autoscaling, monitoring


def adapter_rule() -> Object:
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    return rule


def test_the_autoscaler_asks_for_the_metric_that_the_adapter_makes() -> None:
    for one in of_kind("HorizontalPodAutoscaler"):
        (metric,) = one["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] == adapter_rule()["name"]["as"]
        assert one["spec"]["minReplicas"] >= 2 > max(budget["spec"]["maxUnavailable"] for budget in of_kind("PodDisruptionBudget"))
    assert adapter_rule()["name"]["as"] in PAGE


def test_the_dashboard_is_the_one_that_compose_shows() -> None:
    (board,) = {
        one["data"]["cxr-retrieval.json"] for one in of_kind("ConfigMap") if one["metadata"]["labels"].get("grafana_dashboard") == "1"
    }
    assert json.loads(board) == json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "cxr-retrieval.json").read_text())


# ------------------------------------------------------------------------------------------------------------------ sizes, and the page

HOSPITALS_RULES = '[[rules]]\nname = "of the hospital"\n'


def requests_of(milvus: Object) -> tuple[Decimal, Decimal]:
    """Cores and bytes of a gallery and its etcd."""
    parts = [
        (part["resources"]["requests"], part["replicas"])
        for part in milvus["spec"]["components"].values()
        if isinstance(part, dict) and "replicas" in part
    ]
    etcd = milvus["spec"]["dependencies"]["etcd"]["inCluster"]["values"]
    parts.append((etcd["resources"]["requests"], etcd["replicaCount"]))
    cores, memory = (sum(quantity(requests[name]) * count for requests, count in parts) for name in ("cpu", "memory"))
    return Decimal(cores), Decimal(memory)


def row(begins: str) -> list[str]:
    (found,) = re.findall(rf"^\| {re.escape(begins)}[^|]*\|(.*)\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


@pytest.mark.parametrize(("size", "millions"), [("1m", 1), ("10m", 10), ("100m", 100)])
def test_a_gallery_has_room_for_as_many_cases_as_its_name_says(size: str, millions: int) -> None:
    (milvus,) = of_kind("Milvus", objects(f"milvus/{size}"))
    parts, column = milvus["spec"]["components"], ["1m", "10m", "100m"].index(size)
    copies = milvus["spec"]["config"].get("queryCoord", {}).get("clusterLevelLoadReplicaNumber", 1)
    nodes = parts["queryNode" if millions > 1 else "standalone"]
    memory = nodes["replicas"] * quantity(nodes["resources"]["requests"]["memory"])
    assert BYTES_PER_CASE * millions * 10**6 * copies <= Decimal("0.7") * memory
    assert (
        row("query nodes × memory")[column] == f"{nodes['replicas']} × {quantity(nodes['resources']['requests']['memory']) / 2**30:g} GiB"
    )
    cores, asked = requests_of(milvus)
    assert row("requests of the gallery")[column] == f"{cores.normalize():f} cores, {asked / 2**30:.0f} GiB"
    etcd = milvus["spec"]["dependencies"]["etcd"]["inCluster"]["values"]
    assert row("etcd, volumes")[column] == f"{etcd['replicaCount']} × {etcd['persistence']['size'].replace('Gi', ' GiB')}"
    assert (milvus["spec"]["dependencies"]["msgStreamType"], copies) == (("rocksmq", 1) if millions == 1 else ("woodpecker", 2))
    assert milvus["spec"]["dependencies"]["etcd"]["inCluster"]["deletionPolicy"] == "Retain"


def test_the_measured_figures_are_those_of_the_performance_page() -> None:
    rows = re.findall(
        r"^\| Milvus 2.3.5, HNSW \| ([\d,]+) \|.*\| ([\d,]+) \|$", (ROOT / "docs" / "performance.md").read_text(), re.MULTILINE
    )
    memory = {int(cases.replace(",", "")): int(megabytes.replace(",", "")) for cases, megabytes in rows}
    assert round((memory[1_000_000] - memory[100_000]) * 1e6 / 900_000, -2) == BYTES_PER_CASE
    assert "2.9 kB" in PAGE


def test_the_first_figure_of_the_page_is_what_the_overlay_asks_for() -> None:
    overlay = objects("overlays/gpu")
    (milvus,) = of_kind("Milvus", overlay)
    cores, memory = requests_of(milvus)
    gpus = 0
    for pod in pods(overlay):
        count = next(
            (one["spec"]["minReplicas"] for one in of_kind("HorizontalPodAutoscaler", overlay) if named(pod.of) == "Deployment triton"), 1
        )
        for container in pod.spec.get("containers", ()):
            cores += count * quantity(container["resources"]["requests"]["cpu"])
            memory += count * quantity(container["resources"]["requests"]["memory"])
            gpus += count * container["resources"]["limits"].get("nvidia.com/gpu", 0)
    claims = [one["spec"] for one in of_kind("PersistentVolumeClaim", overlay)]
    claims += [claim["spec"] for one in of_kind("StatefulSet", overlay) for claim in one["spec"]["volumeClaimTemplates"]]
    dependencies = milvus["spec"]["dependencies"]
    claims.append(dependencies["rocksmq"]["persistence"]["persistentVolumeClaim"]["spec"])
    etcd = dependencies["etcd"]["inCluster"]["values"]
    volumes = sum(quantity(one["resources"]["requests"]["storage"]) for one in claims) + etcd["replicaCount"] * quantity(
        etcd["persistence"]["size"]
    )
    assert f"{gpus} GPUs, {cores.normalize():f} cores, {memory / 2**30:.0f} GiB of memory, {volumes / 2**30:.0f} GiB of volumes" in PAGE


@pytest.fixture
def hospital(tmp_path: Path) -> tuple[tuple[Object, ...], tuple[Object, ...]]:
    """What the page's two overlays, a hospital's and its release's, come to."""
    texts = re.findall(r"```yaml\n(.*?)\n *```", PAGE, re.DOTALL)
    made: list[tuple[Object, ...]] = []
    for folder, text in zip((tmp_path / "hospital", tmp_path / "hospital" / "release"), texts, strict=True):
        folder.mkdir()
        here = re.sub(r"(\.\./)+deploy", os.path.relpath(ROOT / "deploy", folder), textwrap.dedent(text))
        (folder / "kustomization.yaml").write_text(here)
        (folder / "rules.toml").write_text(HOSPITALS_RULES)
        made.append(rendered(folder))
    return made[0], made[1]


def test_the_pages_own_overlays_are_valid_and_leave_no_placeholder(hospital: tuple[tuple[Object, ...], tuple[Object, ...]]) -> None:
    all_of_it, release = hospital
    for one in (*all_of_it, *release):
        require_valid(one)
    assert "192.0.2." not in yaml.safe_dump_all(all_of_it)
    images = [{container["image"] for pod in pods(part) for container in pod.containers} for part in hospital]
    assert images == [{"registry.hospital.example/cxr-retrieval:0.1.0"}, {"registry.hospital.example/cxr-retrieval:0.2.0"}]
    (listen,) = of_name("listen", all_of_it)
    (rules,) = [volume["configMap"]["name"] for volume in listen.spec["volumes"] if volume["name"] == "rules"]
    assert [one["data"]["rules.toml"] for one in of_kind("ConfigMap", all_of_it) if one["metadata"]["name"] == rules] == [HOSPITALS_RULES]
    (job,) = [pod for pod in pods(release) if pod.of["kind"] == "Job"]
    assert job.spec["containers"][0]["volumeMounts"][-1]["mountPath"] == "/films"


def test_paths_on_the_page_are_there() -> None:
    paths = set(re.findall(r"deploy/[\w./-]+\w", PAGE))
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


# ------------------------------------------------------------------------------------------------------------------ run here


def test_the_cpu_variants_own_command_lines_serve_who_shows_a_certificate(
    instant: Path, certificates: Certificates, tmp_path: Path
) -> None:
    """As its containers are started, in the Triton of the wheel; folders and ports alone are others. Its metrics are what the adapter asks for."""
    (pod,) = of_name("triton", objects("overlays/cpu"))
    (build,), (triton,) = pod.spec["initContainers"], pod.spec["containers"]
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    made = [word.replace("/models", str(tmp_path / "models")) for word in build["args"]]
    for _ in range(2):  # a pod whose machine was restarted finds what it made before
        subprocess.run(made, env=ENVIRONMENT | {"PATH": path, "CXR_REPOSITORY": str(instant)}, check=True, capture_output=True)

    tls = {"tls.crt": "server.pem", "tls.key": "server.key", "ca.crt": "ours.pem"}
    (tmp_path / "triton-tls").mkdir()
    for name, source in tls.items():
        shutil.copy(certificates.path(source), tmp_path / "triton-tls" / name)
    binary, environment = _install_backend(tmp_path)
    grpc, http, metrics = free_ports(3)
    words = [re.sub(r"=(/models|/triton-tls)", rf"={tmp_path}\1", word) for word in triton["args"]]
    assert words[0] == "tritonserver"
    environment |= {one["name"]: one["value"].replace("/tmp/", f"{tmp_path}/") for one in triton["env"] if one["name"] == "CXR_COMPILED"}
    here = [f"--grpc-port={grpc}", f"--http-port={http}", f"--metrics-port={metrics}", f"--backend-directory={tmp_path / 'backends'}"]
    prefix = f"cxr-kubernetes-{os.getpid()}-"
    log = (tmp_path / "triton.log").open("wb")
    process = subprocess.Popen(
        [str(binary), *words[1:], *here, f"--backend-config=python,shm-region-prefix-name={prefix}"],
        env=environment,
        stdout=log,
        stderr=log,
    )
    try:
        probe = [word.replace(":8000", f":{http}") for word in triton["readinessProbe"]["exec"]["command"]]
        until(lambda: process.poll() is not None or subprocess.run(probe, check=False, capture_output=True).returncode == 0)
        assert process.poll() is None, (tmp_path / "triton.log").read_text()
        locked = TritonSettings(f"127.0.0.1:{grpc}", tls=certificates.tls("client"))
        with TritonClient(locked) as client:
            assert client.model_version
        with pytest.raises(CxrError), TritonClient(TritonSettings(f"127.0.0.1:{grpc}", tls=certificates.tls())):
            pass
        exported = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10).read().decode()
        asked = set(re.findall(r"nv_\w+", adapter_rule()["metricsQuery"] + adapter_rule()["seriesQuery"]))
        assert asked == {"nv_inference_queue_duration_us", "nv_inference_request_success"}
        (model,) = set(re.findall(r'model="(\w+)"', adapter_rule()["metricsQuery"]))
        for name in asked:
            assert re.search(rf'^{name}{{.*model="{model}"', exported, re.MULTILINE), name
    finally:
        process.terminate()
        started = time.monotonic()
        process.wait(60)
        log.close()
        for region in Path("/dev/shm").glob(f"{prefix}*"):
            region.unlink(missing_ok=True)
    assert time.monotonic() - started < 30, "it ends on SIGTERM, within its --exit-timeout-secs"


def started(pod: Pod, folder: Path, certificates: Certificates, *further: str, **other: str) -> subprocess.Popen[str]:
    """The only container of a pod as its manifest starts it, with this machine's folders for its volumes and certificates for its Secrets."""
    (container,) = pod.spec["containers"]
    files = {"client-tls": ("client", "ours"), "listen-tls": ("server", "ours"), "view-tls": ("server", None)}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] != "/tmp"}
    for name in mounts.values():
        (folder / name).mkdir()
        if name in files:
            who, authority = files[name]
            for file, source in {"tls.crt": f"{who}.pem", "tls.key": f"{who}.key", "ca.crt": f"{authority}.pem"}.items():
                if authority or file != "ca.crt":
                    shutil.copy(certificates.path(source), folder / name / file)
    if "rules" in mounts.values():
        shutil.copy(KUBERNETES / "clients" / "rules.toml", folder / "rules")
    if "view-token" in mounts.values():
        (folder / "view-token" / "token").write_text("0123456789abcdef" * 2)

    def here(text: str) -> str:
        return next(
            (f"{folder / name}{text.removeprefix(at)}" for at, name in mounts.items() if text == at or text.startswith(f"{at}/")), text
        )

    told = {**pod.settings, **{one["name"]: one.get("value", "0123456789abcdef" * 4) for one in container["env"]}}
    environment = {name: here(value) for name, value in told.items()} | {"HOME": str(folder)} | other
    words = [here(re.sub(r"\$\((\w+)\)", lambda name: told[name[1]], word)) for word in container["command"]]
    command = [*cxr_command(*words[1:]), *further]
    bare = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("CXR_")}
    with (folder / "said").open("w") as said:
        return subprocess.Popen(command, env=bare | environment, stdout=subprocess.PIPE, stderr=said, text=True)


def test_the_nodes_and_the_pages_own_command_lines_answer_their_probes_while_servers_are_away(
    certificates: Certificates, tmp_path: Path
) -> None:
    """The node takes films meanwhile, so its health says 503 and its other probe 200; the page asks for its token."""
    (port,) = free_ports(1)
    (tmp_path / "node").mkdir()
    (tmp_path / "page").mkdir()
    (listen, *_), (view, *_) = of_name("listen"), of_name("view")
    node = started(listen, tmp_path / "node", certificates, "--port", "0", CXR_METRICS=f"127.0.0.1:{port}")
    page = started(view, tmp_path / "page", certificates, "--port", "0")

    def status(url: str) -> int:
        try:
            return urllib.request.urlopen(url, timeout=10, context=certificates.tls().context() if url.startswith("https") else None).status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        assert node.stdout is not None
        assert page.stdout is not None
        assert node.stdout.readline().startswith("CXR@0.0.0.0:"), (tmp_path / "node" / "said").read_text()
        url = page.stdout.readline().strip()
        assert url.startswith("https://127.0.0.1:"), (tmp_path / "page" / "said").read_text()
        probes = {name: one.spec["containers"][0] for name, one in {"node": listen, "page": view}.items()}
        until(lambda: status(f"http://127.0.0.1:{port}{probes['node']['readinessProbe']['httpGet']['path']}") == 503)
        assert status(f"http://127.0.0.1:{port}{probes['node']['livenessProbe']['httpGet']['path']}") == 200
        for probe in ("readinessProbe", "livenessProbe"):
            asked = probes["page"][probe]["httpGet"]
            assert (asked["scheme"], status(url.rstrip("/") + asked["path"])) == ("HTTPS", 200)
        assert status(f"{url}api/status") == 401
        assert (tmp_path / "node" / "spool" / "waiting").is_dir()
    finally:
        for process in (node, page):
            process.terminate()
        ended = [process.wait(60) for process in (node, page)]
        for process in (node, page):
            process.communicate()
    assert set(ended) <= {0, 130, 143}
