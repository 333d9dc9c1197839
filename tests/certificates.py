"""Certificates as tests need them: ours, a stranger's, an expired one; made anew each time, valid for this machine alone."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import trustme

from cxr_retrieval.settings import Tls

LOCAL = "127.0.0.1"


class Certificates:
    """PEM files in a folder: `ours.pem` and `theirs.pem` are authorities; a name has `<name>.pem` and `<name>.key`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours, theirs = trustme.CA(), trustme.CA()
        ours.cert_pem.write_to_path(self.path("ours.pem"))
        theirs.cert_pem.write_to_path(self.path("theirs.pem"))
        past = datetime.now(timezone.utc) - timedelta(days=1)
        self._write("server", ours.issue_cert(LOCAL))
        self._write("elsewhere", ours.issue_cert("triton.hospital.example"))
        self._write("expired", ours.issue_cert(LOCAL, not_after=past))
        self._write("client", ours.issue_cert("reader@hospital.example"))
        self._write("stranger", theirs.issue_cert("reader@hospital.example"))

    def path(self, name: str) -> Path:
        return self.folder / name

    def tls(self, who: str | None = None, ca: str | None = "ours", server_name: str = "") -> Tls:
        """One side's: whom it trusts, and what it shows."""
        own = (self.path(f"{who}.pem"), self.path(f"{who}.key")) if who else (None, None)
        return Tls(self.path(f"{ca}.pem") if ca else None, *own, server_name)

    def _write(self, name: str, issued: trustme.LeafCert) -> None:
        issued.private_key_pem.write_to_path(self.path(f"{name}.key"))
        self.path(f"{name}.pem").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
