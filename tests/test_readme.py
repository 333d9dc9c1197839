"""The README's own commands, executed as they stand there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from cxr_retrieval.retrieval.picture import DISCLAIMER
from cxr_retrieval.serving.server import Endpoints
from tests_support import ENVIRONMENT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no {kind} block"
    return found[1]


def test_own_cases(student_server: Endpoints, phantom_manifest: Path, tmp_path: Path) -> None:
    """Every line but `cxr serve`, which the session's server stands in for, with a Milvus Lite file."""
    shutil.copytree(phantom_manifest.parent, tmp_path / "cases")
    write_dicom(make_phantom(50, "covid19"), tmp_path / "film.dcm")
    lines = [line for line in block("sh").splitlines() if line and not line.startswith("cxr serve")]
    assert len(lines) == 6
    (tmp_path / "archive").mkdir()
    shutil.copy(tmp_path / "film.dcm", tmp_path / "archive")
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    environment = ENVIRONMENT | {"PATH": path, "CXR_TRITON": student_server.grpc, "CXR_MILVUS": str(tmp_path / "g.db")}
    result = subprocess.run(
        ["bash", "-euc", "\n".join(lines)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "9 stored, 0 unchanged, 0 failed" in result.stdout
    assert (tmp_path / "film.html").is_file()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_every_make_target_named_exists() -> None:
    """As code: `make X`, or a line that begins with it at a prompt."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = README + "".join(
        (ROOT / name).read_text("utf-8") for name in ("CONTRIBUTING.md", "docs/performance.md", "docs/clusters.md", "docs/galleries.md")
    )
    named = set(re.findall(r"(?:`|^\$ )make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test", "bench"} <= named <= targets


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CHANGELOG.md",
        "docs/results.md",
        "docs/performance.md",
        "docs/history.md",
        "docs/privacy.md",
        "docs/clusters.md",
        "docs/scale.md",
        "docs/galleries.md",
        "docs/bulk.md",
        "docs/kubernetes.md",
    ],
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text("utf-8"))
    assert targets
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_readme_says_first_what_every_answer_says() -> None:
    before_the_first_heading = README.split("\n## ")[0]
    assert DISCLAIMER in before_the_first_heading.replace("\n> ", " ")


@pytest.mark.parametrize(
    ("part", "only_by"),
    [
        ("TensorRT engines", "deserialize_cuda_engine"),
        ("TensorRT in the Triton container", "nvidia-smi"),
        ("`compose.yaml`", 'compose("up"'),
        ("`deploy/kubernetes`", 'kubectl("apply"'),
    ],
)
def test_what_no_test_runs_is_said_to_be_not_run(part: str, only_by: str) -> None:
    """A part is run only by a call of its own: while no test makes it, docs/performance.md has to say "not run", and no longer."""
    sources = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    table = (ROOT / "docs" / "performance.md").read_text("utf-8").split("## What has been run where")[1].split("\n## ")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {part}")]
    assert ("not run" in row) == (not any(only_by in source for source in sources))
