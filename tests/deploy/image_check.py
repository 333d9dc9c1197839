"""Builds deploy/Dockerfile for real on a stand-in for NVIDIA's image, and runs what is in it without a network: `make image-check`.

No registry of containers is needed. The stand-in is Debian in place of Ubuntu, with what of Triton's image the Dockerfile and compose.yaml rely on: python3
and pip but no venv, curl, wget, libb64, the user triton-server, and a TensorRT that is nothing but names (a library, a wheel). So this shows that every step
runs and what is then there; not that the real TensorRT installs, nor that an engine builds. As root, with mmdebstrap, buildah and cc; five minutes, 3 GB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = "99.0.0"
"""Of the stand-in's TensorRT: none that a package index could have instead."""
PACKAGES = ("ca-certificates", "curl", "wget", "libb64-0d", "python3", "python3-pip")
"""Those of Triton's build.py that are used here; python3-venv is not among them."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
CHECKS = {
    "no PyTorch": "! /opt/cxr/bin/python -c 'import torch' 2> /dev/null",
    "cxr, the modules it needs, TensorRT's builder by its version": (
        "cxr info --json > /dev/null && /opt/cxr/bin/python -c 'import onnx, matplotlib, cxr_retrieval_build.tensorrt_engine as t; print(t.find_tensorrt().name)'"
    ),
    "cxr build engines comes as far as TensorRT's builder, which the stand-in has not": (
        """cd /tmp && cxr build engines /engines > said 2>&1; grep -o "module 'tensorrt' has no attribute 'ILogger'" said"""
    ),
    "perf_analyzer without a network": "perf_analyzer --version",
    "cxr loadtest comes as far as asking for Triton": (
        "cd /cases && cxr loadtest --triton 127.0.0.1:9 2>&1 | tee said | tail -n 3; grep -q 'could not be measured' said"
    ),
    "OpenVINO in the image's own Python, as Triton's backend asks for it": (
        "PYTHONPATH=/opt/cxr/site-packages python3 -c 'import numpy, openvino; print(numpy.__version__, openvino.get_version())'"
    ),
    "triton-server, and what it may write to": "id && touch /engines/written /cases/written && ! touch /opt/cxr/written 2> /dev/null",
}


def run(*command: str | Path, **environment: str) -> str:
    """Runs to the end, shows what was said if it failed."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | environment, check=False)
    if result.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))[:200]}\n{(result.stdout + result.stderr)[-4000:]}")
    return result.stdout.strip()


def stand_in(work: Path, buildah: tuple[str, ...]) -> str:
    """The image to build on, as `localhost/stand-in`."""
    archive, library, wheel = work / "base.tar", work / f"libnvinfer.so.{VERSION}", work / f"tensorrt-{VERSION}.1-py3-none-any.whl"
    run("mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", archive)
    run("cc", "-shared", "-nostdlib", "-x", "c", "/dev/null", "-Wl,-soname,libnvinfer.so." + VERSION.split(".")[0], "-o", library)
    with zipfile.ZipFile(wheel, "w") as file:
        about = f"tensorrt-{VERSION}.1.dist-info"
        file.writestr("tensorrt/__init__.py", f'__version__ = "{VERSION}.1"\n')
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {VERSION}.1\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    container = run(*buildah, "from", "scratch")
    run(*buildah, "add", container, archive, "/")
    run(*buildah, "copy", container, library, "/usr/lib/x86_64-linux-gnu/")
    run(*buildah, "copy", container, wheel, "/wheels/")
    run(*buildah, "copy", container, CERTIFICATES, CERTIFICATES)
    environment = (
        "DEBIAN_FRONTEND=noninteractive",
        "PIP_FIND_LINKS=/wheels",
        f"PIP_CERT={CERTIFICATES}",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    )
    run(*buildah, "config", *(part for setting in environment for part in ("--env", setting)), container)
    run(
        *buildah,
        "run",
        "--isolation",
        "chroot",
        container,
        "--",
        "sh",
        "-c",
        "useradd triton-server && [ $(id -u triton-server) = 1000 ] && ldconfig",
    )
    run(*buildah, "commit", "--rm", container, "localhost/stand-in")
    return "localhost/stand-in"


def main() -> int:
    """0 if every step of the Dockerfile ran and every check passed."""
    work = Path(tempfile.mkdtemp(prefix="cxr-image-check-"))
    buildah = ("buildah", "--storage-driver", "vfs", "--root", str(work / "storage"), "--runroot", str(work / "run"))
    try:
        base = stand_in(work, buildah)
        print(
            f"stand-in for the Triton image: Debian bookworm with {', '.join(PACKAGES)} and a TensorRT {VERSION} of names alone", flush=True
        )
        dockerfile = sys.argv[1] if len(sys.argv) > 1 else ROOT / "deploy" / "Dockerfile"
        run(*buildah, "bud", "--isolation", "chroot", "--build-arg", f"TRITON={base}", "--tag", "localhost/cxr", "--file", dockerfile, ROOT)
        container = run(*buildah, "from", "localhost/cxr")
        root = Path(run(*buildah, "mount", container))
        sizes = {name: run("du", "-sm", root / name).split()[0] for name in ("opt/cxr", "opt/perf", "opt/cxr-retrieval")}
        print(f"built: {', '.join(f'/{name} {size} MB' for name, size in sizes.items())}", flush=True)
        failed = 0
        for name, check in CHECKS.items():
            environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "MPLCONFIGDIR": "/tmp/matplotlib", "CXR_MILVUS": "http://milvus:19530"}
            result = subprocess.run(
                ["unshare", "--net", shutil.which("chroot") or "/usr/sbin/chroot", "--userspec=1000:1000", str(root), "sh", "-c", check],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
            failed += result.returncode != 0
            print(
                f"{'passed' if result.returncode == 0 else 'FAILED'}  {name}: {' | '.join((result.stdout + result.stderr).strip().splitlines())[:400]}",
                flush=True,
            )
        run(*buildah, "umount", container)
        print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed")
        return 1 if failed else 0
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
