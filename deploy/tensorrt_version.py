"""Prints the version of the TensorRT that this image serves with, major.minor.patch, as the file of its library says: libnvinfer.so.10.8.0.

NVIDIA's serving images carry the library without its development package: there is no libnvinfer.so, only libnvinfer.so.10 and what that
links to. Nothing is loaded, so neither a GPU nor a driver is needed while the image is built.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_FILE = re.compile(r"libnvinfer\.so\.(\d+\.\d+\.\d+)")


def versions(cache: str, library_path: str) -> list[str]:
    """Those of the libraries that the loader would find.

    Args:
        cache: What `ldconfig -p` prints.
        library_path: As `LD_LIBRARY_PATH`: folders between colons.
    """
    found = [Path(path) for path in re.findall(r"=> (\S*/libnvinfer\.so\S*)", cache)]
    found += [path for folder in library_path.split(":") if folder for path in Path(folder).glob("libnvinfer.so.*")]
    return sorted({match[1] for path in found if (match := _FILE.fullmatch(path.resolve().name))})


def main() -> int:
    """0, or 2 where there is no TensorRT or more than one."""
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    found = versions(cache, os.environ.get("LD_LIBRARY_PATH", ""))
    if len(found) == 1:
        print(found[0])  # noqa: T201 (a script of its own: this is its answer)
        return 0
    expected = "one TensorRT, as libnvinfer.so.MAJOR.MINOR.PATCH"
    sys.stderr.write(
        f"error: no single TensorRT; expected {expected}; got {', '.join(found) or 'none'}. Next: give TRITON a tritonserver image\n"
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
