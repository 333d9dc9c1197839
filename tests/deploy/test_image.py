"""deploy/Dockerfile without building it. `make image-check` builds it, on a stand-in for NVIDIA's image (image_check.py)."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports] (installed on Python 3.10 only)

ROOT = Path(__file__).parents[2]
FINDER = ROOT / "deploy" / "tensorrt_version.py"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined: ("RUN", "apt-get update && …")."""
    lines = [line for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", "")
    return [(match[1], match[2]) for match in re.finditer(r"^([A-Z]+) (.*)$", whole, re.MULTILINE)]


def of_kind(kind: str) -> list[str]:
    found = [text for name, text in instructions() if name == kind]
    assert found, f"the Dockerfile has no {kind}"
    return found


def test_every_line_is_an_instruction_that_is_known() -> None:
    assert [name for name, _ in instructions()] == ["ARG", "FROM", "RUN", *["COPY"] * 6, "RUN", "RUN", "ENV", "USER"]


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_every_step_is_what_a_shell_can_read(shell: str) -> None:
    for command in of_kind("RUN"):
        result = subprocess.run([shell, "-n", "-c", command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, (command, result.stderr)


def test_only_what_is_copied_goes_to_the_builder_and_all_of_it() -> None:
    sources = {source for text in of_kind("COPY") for source in text.split()[:-1]}
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == sources
    for source in sources:
        assert (ROOT / source).exists(), source


def test_the_extras_exist_and_bring_what_the_images_commands_need_but_no_pytorch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (named,) = re.findall(r"'/opt/cxr-retrieval\[([a-z,]+)\]'", " ".join(of_kind("RUN")))
    wanted = named.split(",")
    assert set(wanted) == {"engines", "loadtest", "dicom", "ray"}, "cxr build engines, cxr loadtest, cxr listen, cxr batch --engine ray"
    requirements = [*project["dependencies"], *(requirement for extra in wanted for requirement in extras[extra])]
    names = {re.split(r"[\s\[<>=!~;]", requirement)[0] for requirement in requirements}
    assert {"onnx", "matplotlib", "pymilvus", "pynetdicom", "ray"} <= names
    assert not {"torch", "torchvision", "cxr-retrieval"} & names


def test_the_builder_is_of_the_version_that_serves() -> None:
    (install,) = [command for command in of_kind("RUN") if "pip install" in command]
    assert "TENSORRT=$(python3 /opt/cxr-retrieval/deploy/tensorrt_version.py) &&" in re.sub(r"\s+", " ", install)
    assert '"tensorrt==${TENSORRT}.*"' in install
    assert install.index("tensorrt_version.py") < install.index("pip install")


def test_debian_has_every_package_named() -> None:
    """Ubuntu's archive cannot be asked here; the names are the same."""
    if shutil.which("apt-cache") is None or not list(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("there are no lists of packages here (apt-get update)")
    packages = [
        word for text in re.findall(r"apt-get install ([^&]+)", " ".join(of_kind("RUN"))) for word in text.split() if word[0] != "-"
    ]
    assert packages == ["python3-venv"], "the base image has python3 and pip, but no ensurepip"
    assert subprocess.run(["apt-cache", "show", *packages], capture_output=True, check=False).returncode == 0


def test_nothing_runs_as_root() -> None:
    assert instructions()[-1] == ("USER", "1000:1000")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"libnvinfer.so.11.0.0": None, "libnvinfer.so.11": "libnvinfer.so.11.0.0"}, ["11.0.0"]),
        ({"libnvinfer.so.10.15.1": None, "libnvinfer.so.10": "libnvinfer.so.10.15.1", "libnvinfer.so": "libnvinfer.so.10"}, ["10.15.1"]),
        ({"libnvinfer.so.11.0.0": None, "libnvinfer.so.10.9.0": None}, ["10.9.0", "11.0.0"]),
        ({"libnvinfer_plugin.so.11.0.0": None, "libnvinfer_builder_resource.so.11.0.0": None, "libnvinfer.so.11": None}, []),
        ({}, []),
    ],
    ids=["serving image", "development image", "two", "only its relatives", "none"],
)
def test_the_version_of_tensorrt_is_found_without_its_development_package(
    tmp_path: Path, files: dict[str, str | None], expected: list[str]
) -> None:
    for name, target in files.items():
        if target is None:
            (tmp_path / name).touch()
        else:
            (tmp_path / name).symlink_to(target)
    versions = runpy.run_path(str(FINDER))["versions"]
    cache = "\n".join(f"\t{name} (libc6,x86-64) => {tmp_path / name}" for name in files if files[name])
    assert versions("", f"/nowhere::{tmp_path}") == expected
    assert set(versions(cache, "")) <= set(expected)
    assert versions(cache, str(tmp_path)) == expected, "the same library found twice is one"


def test_an_image_with_two_tensorrts_or_none_is_refused(tmp_path: Path) -> None:
    for name in ("libnvinfer.so.98.0.0", "libnvinfer.so.97.0.0"):
        (tmp_path / name).touch()
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    result = subprocess.run([sys.executable, str(FINDER)], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected one TensorRT, as libnvinfer.so.MAJOR.MINOR.PATCH; got 97.0.0, 98.0.0" in result.stderr
