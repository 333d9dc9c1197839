"""`make fuzz`: harmed files through the reader for as long as there are seeds. Exit code 1 if one ends as anything but a film or an ImageError."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import psutil

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.decoding import DecodingLimits, FilmReader
from hostile_files import damaged


def main() -> int:
    """Runs the seeds; says on stderr what went wrong, on stdout how many files ended how."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--files", type=int, default=2000, help="for each seed")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for one file")
    chosen = parser.parse_args()
    ended, wrong, me = Counter[str](), 0, psutil.Process()
    with FilmReader(DecodingLimits(timeout_s=chosen.timeout)) as reader, tempfile.TemporaryDirectory() as folder:
        for seed in chosen.seeds:
            paths = [Path(folder) / name for name, _ in damaged(seed, chosen.files)]
            for path, (_, data) in zip(paths, damaged(seed, chosen.files), strict=True):
                path.write_bytes(data)
            for path, future in [(path, reader.submit(path)) for path in paths]:
                error = future.exception()
                ended["a film" if error is None else str(error).split(": ", 1)[-1].split(";")[0]] += 1
                if error is not None and not isinstance(error, ImageError):
                    wrong += 1
                    print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
                path.unlink()
            print(f"seed {seed}: {ended.total()} files; {me.memory_info().rss >> 20} MiB, {me.num_fds()} descriptors", file=sys.stderr)
    for reason, number in ended.most_common():
        print(f"{number:8d}  {reason}")
    left = len(me.children())
    print(f"{ended.total()} files, {wrong} neither film nor ImageError, {left} processes left")
    return int(bool(wrong or left))


if __name__ == "__main__":
    sys.exit(main())
