"""`cxr batch` over an archive of hostile files: every one has its line, the good films their answers, and the run its end."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from pathlib import Path

from PIL import Image

from cxr_retrieval.radiograph.phantoms import Phantom
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from hostile_files import hostile, valid
from tests_support import run_cxr


def test_every_hostile_file_has_its_line(quick: Endpoints, phantoms: list[Phantom], phantom_manifest: Path, tmp_path: Path) -> None:
    folder, odd, out = tmp_path / "archive", tmp_path / "odd", tmp_path / "results.jsonl"
    folder.mkdir()
    odd.mkdir()
    for name, data in hostile(19, 100).items():
        (folder / name).write_bytes(data)
    same = ("rle.dcm", "j2k.dcm", "htj2k.dcm", "implicit.dcm", "big.dcm", "deflated.dcm")  # one film in six lossless transfer syntaxes
    for name in same:
        (folder / name).write_bytes(valid()[name])
    for number, phantom in enumerate(phantoms):
        Image.fromarray(phantom.pixels).save(folder / f"good-{number}.png")
    odd_name = b"/R\xf6ntgen-Th\xf6rax\n\x1b[31m.png"  # in Latin-1, of two lines, with a terminal's colours
    shutil.copy(os.fsencode(folder / "good-0.png"), os.fsencode(folder) + odd_name)
    os.mkfifo(odd / "fifo.dcm")
    (odd / "loop.dcm").symlink_to(odd / "loop.dcm")
    with (odd / "sparse.dcm").open("wb") as file:
        file.truncate(2**40)
    expected = sum(1 for _ in folder.iterdir()) + 5
    with socket.socket(socket.AF_UNIX) as listening, embedded_milvus(tmp_path / "gallery.db", "127.0.0.1", 0) as uri:
        listening.bind(str(odd / "socket.dcm"))
        servers = ("--triton", quick.grpc, "--milvus", uri, "--timeout", "20", "--no-gate")
        assert run_cxr("ingest", "--manifest", phantom_manifest, *servers).returncode == 0
        special = [odd / name for name in ("fifo.dcm", "loop.dcm", "sparse.dcm", "socket.dcm", "missing.dcm")]
        done = run_cxr("batch", folder, *special, "--out", out, *servers, "--json", timeout=280)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len(lines) == expected >= 580
    assert set(Counter(line["input"] for line in lines).values()) == {1}
    status = {Path(line["input"]).name: line for line in lines}
    summary, counts = json.loads(done.stdout), Counter(line["status"] for line in lines)
    assert (summary["inputs"], summary["pending"]) == (expected, 0)
    assert {state: summary[state] for state in counts} == counts
    for number in range(len(phantoms)):
        assert status[f"good-{number}.png"]["status"] == "answered"
    copy = next(line for line in lines if "ntgen-Th" in line["input"])
    for pair in ((copy, status["good-0.png"]), [status[name] for name in same]):
        assert len({line["status"] for line in pair} - {"failed"}) == 1
        assert len({line.get("same_as", line["input"]) for line in pair}) == 1
    assert sum("same_as" in line for line in lines) == summary["copies"] >= len(same)
    for path in special:
        assert status[path.name]["status"] == "failed"
    for line in lines:
        assert line["status"] != "failed" or line["error"].count("Next: ") == 1
    dead = Path(summary["dead_letters"]).read_bytes().splitlines()
    assert len(dead) == counts["failed"]
