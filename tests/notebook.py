"""docs/notebook.ipynb: its cells, and how they are executed. `make notebook` writes it anew, over the demo's phantoms."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

SHIPPED: Final = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
_CELLS: Final = (
    """# A query from Python

Triton and the gallery run (`cxr serve`; `Retriever(TritonSettings(…), MilvusSettings(…))` finds them elsewhere). What is shown here are synthetic phantoms: no patient.
**Research use only. Not for diagnosis.**""",
    """from cxr_retrieval import ClauseError, Retriever

retriever = Retriever()
result = retriever.query("query.dcm")
result""",
    "The films, as `cxr query --picture` draws them (half the size):",
    "retriever.picture(result).reduce(2)",
    "The cases as a table, in pandas or Arrow (`to_arrow`); what is not known is null:",
    """cases = result.to_pandas()
cases[["rank", "similarity", "label", "source", "age", "sex", "spo2", "went_icu", "survival"]]""",
    "Only among cases that meet a clause, or whose notes hold words ([the language](asking.md)), and what became of these:",
    """among = retriever.query("query.dcm", where="age >= 50 and not went_icu", text="phantom")
print(among.sentence)
among.summary.lines()""",
    "A clause that cannot be meant is marked where it is wrong:",
    """try:
    retriever.query("query.dcm", where="agee >= 50")
except ClauseError as error:
    print(error)""",
    "How far to trust it ([confidence](confidence.md)): nothing was measured for phantoms, and it says so.",
    "result.trust",
    "retriever.close()",
)


def executed(folder: Path, triton: str, milvus: str, key: Path) -> Any:
    """The notebook with what its cells give, run in `folder`, which holds query.dcm, on servers that stand elsewhere than it says."""
    cells = [new_markdown_cell(text) if number in _WORDS else new_code_cell(text) for number, text in enumerate(_CELLS)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "python"}}
    notebook = new_notebook(cells=cells, metadata=about)
    asking = notebook.cells[1]
    settings = f"TritonSettings({triton!r}), MilvusSettings({milvus!r}), PseudonymSettings(Path({str(key)!r}))"
    asking.source = (
        f"from pathlib import Path\nfrom cxr_retrieval.settings import *\n{asking.source.replace('Retriever()', f'Retriever({settings})')}"
    )
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    ).execute()
    asking.source = _CELLS[1]
    notebook.metadata = about
    return notebook


_WORDS: Final = frozenset({0, 2, 4, 6, 8, 10})
"""Cells that are text."""


def main() -> None:
    """Fills a gallery with the demo's phantoms, executes the notebook over it, writes it."""
    from cxr_retrieval.cli.demo import demo
    from cxr_retrieval.locations import default_repository
    from cxr_retrieval.serving.server import ServerOptions, embedded_triton

    with TemporaryDirectory() as name:
        folder = Path(name)
        demo(folder)
        with embedded_triton(ServerOptions(default_repository(), grpc_port=0, http_port=0, metrics_port=0)) as server:
            nbformat.write(executed(folder, server.grpc, str(folder / "gallery.db"), folder / "pseudonym.key"), SHIPPED)


if __name__ == "__main__":
    sys.exit(main())
