"""Help text under test, exit codes, and what the command does not import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests_support import run_cxr

GOLDEN = Path(__file__).parents[1] / "golden"
COMMANDS = (
    "",
    "demo",
    "serve",
    "ingest",
    "query",
    "evaluate",
    "loadtest",
    "info",
    "train",
    "train segmentation",
    "train manifest",
    "train student",
    "train embedder",
    "train ablation",
    "train report",
    "train all",
    "build",
    "build onnx",
    "build checkpoints",
    "build parity",
    "build int8",
    "build engines",
    "build repository",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_golden(command: str) -> None:
    """Regenerate with `python tests/golden/regenerate.py`, and read the difference."""
    result = run_cxr(*command.split(), "--help")
    assert result.returncode == 0, result.stderr
    path = GOLDEN / f"help-{command.replace(' ', '-') or 'cxr'}.txt"
    assert result.stdout == path.read_text("utf-8")


def test_info_is_light_and_complete() -> None:
    code = (
        "import sys; from cxr_retrieval.cli.app import app\n"
        "try: app(['info', '--json'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'openvino', 'pymilvus', 'tritonclient', 'numpy', 'pandas', 'pydicom', 'PIL'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip().endswith("[]")
    facts = json.loads(result.stdout)
    assert set(facts) == {"versions", "models", "servers", "devices"}
    assert re.fullmatch(r"[0-9a-f]{12}", facts["models"]["model version"])


def test_the_client_never_imports_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, cxr_retrieval\n"
        "for module in pkgutil.walk_packages(cxr_retrieval.__path__, 'cxr_retrieval.'):\n"
        "    if module.name.rsplit('.')[-1] not in ('__main__', 'openvino_model'): importlib.import_module(module.name)\n"
        "sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("group", ["train", "build"])
def test_groups_print_the_pip_line_when_their_extra_is_missing(group: str, tmp_path: Path) -> None:
    """Run with an import hook that hides PyTorch, as in an environment without the extra."""
    command = {"train": ["segmentation", "--manifest", "m.csv", "--out", "o"], "build": ["onnx", "--segmenter", "s", "--embedder", "e"]}[
        group
    ]
    code = (
        "import sys, importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
        f"sys.argv = ['cxr', {group!r}, *{command!r}]\n"
        "from cxr_retrieval.cli.app import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert f"pip install 'cxr-retrieval[{'training' if group == 'train' else 'build'}]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (("query", "film.png", "--triton", "127.0.0.1:1"), "no Triton server answers at 127.0.0.1:1", 2),
        (("query", "film.png", "--triton", "nonsense"), "Triton address is malformed", 2),
        (("ingest", "--manifest", "none.csv"), "none.csv: cannot be read", 2),
        (("train", "embedder", "--manifest", "none.csv", "--segmenter", "s.pt", "--out", "o"), "none.csv: cannot be read", 2),
        (("train", "segmentation", "--manifest", "m.csv", "--out", "o", "--config", "none.toml"), "shipped configs:", 2),
        (("build", "repository", "."), "already exists", 2),
        (("serve", "--host", "somewhere"), "the address somewhere is not one", 2),
        (("query",), "Missing argument", 2),
    ],
)
def test_one_clear_error_and_the_right_exit_code(arguments: tuple[str, ...], words: str, code: int, tmp_path: Path) -> None:
    result = run_cxr(*arguments, cwd=tmp_path)
    assert result.returncode == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
