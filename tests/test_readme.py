"""The README's own commands, executed as they stand there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_retrieval.phantoms import make_phantom, write_dicom
from cxr_retrieval.serving.server import Endpoints
from tests_support import ENVIRONMENT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no {kind} block"
    return found[1]


def test_own_cases(server: Endpoints, phantom_manifest: Path, tmp_path: Path) -> None:
    """Every line but `cxr serve`, which the session's server stands in for, with a Milvus Lite file."""
    shutil.copytree(phantom_manifest.parent, tmp_path / "cases")
    write_dicom(make_phantom(50, "covid19"), tmp_path / "film.dcm")
    lines = [line for line in block("sh").splitlines() if line and not line.startswith("cxr serve")]
    assert len(lines) == 4
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    environment = ENVIRONMENT | {"PATH": path, "CXR_TRITON": server.grpc, "CXR_MILVUS": str(tmp_path / "g.db")}
    result = subprocess.run(
        ["bash", "-euc", "\n".join(lines)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "9 stored, 0 unchanged, 0 failed" in result.stdout
    assert (tmp_path / "film.html").is_file()


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text("utf-8")):
        for target in re.findall(r"make ([a-z]+)", text):
            if target in ("demo", "test", "lint", "bench", "clean"):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/results.md", "docs/performance.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


def test_disclaimer_and_honesty() -> None:
    assert "Not for diagnosis" in README
    assert "Not run here" in README
