"""Help text under test, exit codes, and what the command does not import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cxr_retrieval.archive.embedding import Problem
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.cli.console import print_problems
from cxr_retrieval.cli.query import print_result
from cxr_retrieval.errors import ImageError
from cxr_retrieval.gallery.store import Case, Neighbour
from cxr_retrieval.radiograph.letterbox import Letterbox
from cxr_retrieval.retrieval.calibration import Trust
from cxr_retrieval.retrieval.gate import Ood
from cxr_retrieval.retrieval.query import Explanation, QueryResult
from cxr_retrieval.retrieval.voting import weighted_vote
from tests_support import run_cxr

GOLDEN = Path(__file__).parents[1] / "golden"
COMMANDS = (
    "",
    "demo",
    "serve",
    "listen",
    "pull",
    "manifest",
    "ingest",
    "query",
    "view",
    "batch",
    "evaluate",
    "gallery",
    "gallery remove",
    "gallery drop",
    "gallery whois",
    "gallery export",
    "gallery import",
    "gallery use",
    "gallery index",
    "gallery audit",
    "calibrate",
    "adapt",
    "cluster",
    "reindex",
    "audit",
    "audit verify",
    "audit show",
    "audit pairs",
    "loadtest",
    "plan",
    "info",
    "train",
    "train segmentation",
    "train student",
    "train embedder",
    "train ablation",
    "train unseen",
    "train gate",
    "train outcome",
    "train multilabel",
    "train multimodal",
    "train report",
    "train all",
    "build",
    "build onnx",
    "build checkpoints",
    "build parity",
    "build int8",
    "build outcome",
    "build multilabel",
    "build multimodal",
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


def test_info_speaks_plainly() -> None:
    said = run_cxr("info", "--triton", "127.0.0.1:1", "--milvus", "http://127.0.0.1:1")
    assert "url 127.0.0.1:1, answers no" in said.stdout
    assert not re.search(r"\b(True|False)\b", said.stdout)


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """`[copy]` is no markup, `[/x]` no crash, `:x:` no picture."""
    names = ["film[copy].dcm", "case[/x]", "film :dog: [red]|b"]
    print_problems([Problem(name, ImageError(f"{name}: the file is empty")) for name in names])
    assert capsys.readouterr().err.splitlines() == [f"failed {name}: {name}: the file is empty." for name in names]
    hits = tuple(Neighbour(Case("k", name, name, None, None, None, Path("x"), {"sex": "[b]"}, "", ""), 0.5, 0.4, 0.8) for name in names)
    vote = weighted_vote([(hit.case.label, hit.similarity) for hit in hits])
    square = np.zeros((256, 256), np.uint8)
    explanation = Explanation(square, Letterbox(1.0, 0, 0, 256, 256), square, np.zeros((256, 256), np.float32))
    print_result(
        QueryResult(
            "film-0123",
            "v",
            vote,
            hits,
            hits[:1],
            {"total": 1.0},
            ("look at [/x]",),
            Ood(0.1, False, None),
            explanation,
            Trust(None, None, None),
            0.25,
        ),
        "film[copy].dcm",
    )
    shown = capsys.readouterr().out
    for words in (
        *names,
        "film[copy].dcm: case[/x], confidence 33%",
        "sex [b]",
        "warning: look at [/x]",
        "not in the vote",
        "by finding: b 33%",
    ):
        assert words in shown


def test_public_names_are_found_where_they_are_documented() -> None:
    """`from cxr_retrieval import Retriever, …` works, costs nothing before, and a wrong name fails as everywhere."""
    code = (
        "import sys, cxr_retrieval\n"
        "assert not {'numpy', 'pymilvus', 'pydicom'} & set(sys.modules)\n"
        "assert {name: getattr(cxr_retrieval, name) for name in cxr_retrieval.__all__}.keys() == cxr_retrieval._MODULE_OF.keys()\n"
        "from cxr_retrieval import Retriever\n"
        "assert Retriever.__module__ == 'cxr_retrieval.retrieval.retriever'\n"
        "try: cxr_retrieval.Retrieber\n"
        "except AttributeError: pass\n"
        "else: sys.exit('no error')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
        (("batch", ".", "--out", "o", "--triton", "127.0.0.1:1", "--patience", "0"), "no Triton server answers at 127.0.0.1:1", 2),
        (("batch", ".", "--out", "o", "--metrics", "0.0.0.0:0"), "metrics would be served beyond this machine", 2),
        (("train", "embedder", "--manifest", "none.csv", "--segmenter", "s.pt", "--out", "o"), "none.csv: cannot be read", 2),
        (("train", "segmentation", "--manifest", "m.csv", "--out", "o", "--config", "none.toml"), "shipped configs:", 2),
        (("build", "repository", "."), "already exists", 2),
        (("audit", "verify", "none.jsonl"), "none.jsonl: cannot be read", 2),
        (("gallery", "import", "none.parquet", "--audit", "a.log"), "none.parquet: is not whole", 2),
        (("gallery", "use", "v", "--milvus", "http://127.0.0.1:1", "--audit", "a.log"), "no Milvus answers", 2),
        (("reindex", "--triton", "127.0.0.1:1", "--audit", "a.log", "--patience", "0"), "no Triton server answers at 127.0.0.1:1", 2),
        (("serve", "--host", "somewhere"), "the address somewhere is not one", 2),
        (("query",), "nothing to ask with", 2),
        (("gallery", "remove"), "which cases?; expected one of --image, --patient", 2),
        (("gallery", "remove", "--image", "a", "--source", "north"), "which cases?", 2),
        (("gallery", "remove", "--image", "a", "--milvus", "http://127.0.0.1:1", "--audit", "a.log"), "no Milvus answers", 2),
    ],
)
def test_one_clear_error_and_the_right_exit_code(
    arguments: tuple[str, ...], words: str, code: int, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    result = run_cxr(*arguments, cwd=tmp_path)
    assert result.returncode == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_spans_without_their_extra_are_refused_with_the_pip_line(tmp_path: Path) -> None:
    """Run with an import hook that hides OpenTelemetry's SDK, as in an environment without the extra."""
    code = (
        "import os, sys, importlib.util as u\n"
        "os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:1'\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'opentelemetry.sdk' else real(name, *a)\n"
        "sys.argv = ['cxr', 'batch', '.', '--out', 'o']\n"
        "from cxr_retrieval.cli.app import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "pip install 'cxr-retrieval[telemetry]'" in result.stderr


def test_a_bundle_that_is_none_ends_an_ingest_before_anything_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"resourceType": "Patient"}')
    result = run_cxr("ingest", tmp_path, "--label", "control", "--fhir", tmp_path / "bundle.json")
    assert result.returncode == 2
    assert "no FHIR bundle that can be used; expected resourceType Bundle, and no history of resources; got Patient" in " ".join(
        result.stderr.split()
    )
