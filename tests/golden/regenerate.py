"""Writes the golden files anew. Run it, then read the difference: it is what users of the help and of Triton will see."""

from __future__ import annotations

import sys
from pathlib import Path

from google.protobuf import text_format

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "cli")]

from test_cli import COMMANDS  # noqa: E402

from cxr_retrieval.contract import LEAF_MODELS  # noqa: E402
from cxr_retrieval.locations import default_repository  # noqa: E402
from cxr_retrieval.serving.choices import Precision  # noqa: E402
from cxr_retrieval.serving.repository import embedded_leaf, read_config  # noqa: E402
from feature_page import PAGE, tables, with_tables  # noqa: E402
from tests_support import run_cxr  # noqa: E402

for command in COMMANDS:
    text = run_cxr(*command.split(), "--help").stdout
    (HERE / f"help-{command.replace(' ', '-') or 'cxr'}.txt").write_text(text, "utf-8")
for name in LEAF_MODELS:
    config = embedded_leaf(read_config(default_repository() / name), Path("/models") / name / "model.onnx", Precision.bf16, 2)
    (HERE / f"{name}.pbtxt").write_text(text_format.MessageToString(config), "utf-8")
PAGE.write_text(with_tables(PAGE.read_text("utf-8"), tables()), "utf-8")
