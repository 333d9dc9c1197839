"""A real S3-compatible storage on this machine: SeaweedFS."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs

from tests_support import free_ports, until


@dataclass
class ObjectStorage:
    """One server, with one bucket; `environment`: how AWS tools find it."""

    folder: Path
    port: int
    key: str = "key-of-tests"
    secret: str = field(default_factory=secrets.token_hex)
    others: list[int] = field(default_factory=lambda: free_ports(3))
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def files(self) -> Any:
        return fs.S3FileSystem(
            access_key=self.key,
            secret_key=self.secret,
            endpoint_override=f"http://127.0.0.1:{self.port}",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def start(self) -> None:
        config = self.folder / "s3.json"
        identity = {"name": "t", "credentials": [{"accessKey": self.key, "secretKey": self.secret}], "actions": ["Admin"]}
        config.write_text(json.dumps({"identities": [identity]}))
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        master, volume, filer = self.others
        grpc = free_ports(4)
        command = [str(Path(sys.executable).with_name("weed")), "server", f"-dir={data}", "-ip=127.0.0.1", "-s3", f"-s3.config={config}"]
        command += [f"-s3.port={self.port}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
        names = ("master", "volume", "filer", "s3")
        command += [f"-{name}.port.grpc={port}" for name, port in zip(names, grpc, strict=True)]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0"], stdout=log, stderr=log
            )
        until(self._answers, 60)

    def _answers(self) -> bool:
        try:
            self.files.create_dir("archive")
        except OSError:
            return False
        return True

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def put(self, key: str, content: bytes) -> None:
        with self.files.open_output_stream(key) as stream:
            stream.write(content)


@contextmanager
def object_storage(folder: Path) -> Generator[ObjectStorage]:
    (port,) = free_ports(1)
    storage = ObjectStorage(folder, port)
    try:
        storage.start()
        yield storage
    finally:
        storage.stop()
