"""What travels between the processes of a cluster, sealed: AES-256-GCM (NIST SP 800-38D) by a key that never travels itself.

Paths of films, ids of patients, credentials of servers and messages that name files would else lie readable in object stores, in what is
spilled from them to disk, and in logs. The key follows from the hospital's key of pseudonyms, which every node has as a secret of its own.
What was sealed by another key, or changed on the way, is not opened, and so never unpickled.
"""

from __future__ import annotations

import os
import pickle
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cxr_retrieval.errors import SetupError

_NONCE_BYTES: Final = 12


class Sealed:
    """Seals and opens; thread-safe. `key`: 32 secret bytes."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, content: object) -> bytes:
        """Content as bytes that nobody reads without the key."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, pickle.dumps(content, pickle.HIGHEST_PROTOCOL), None)

    def open(self, sealed: bytes) -> Any:
        """The content.

        Raises:
            SetupError: Sealed by another key, or changed since.
        """
        try:
            content = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
        except (InvalidTag, ValueError):  # ValueError: cut short
            raise SetupError(
                "a node of the cluster has another pseudonym key than who asks it",
                expected="the same key on every node, in CXR_PSEUDONYM_KEY or the file of --pseudonym-key",
                next_step="give every node that key as a secret",
            ) from None
        return pickle.loads(content)  # noqa: S301 (authenticated)
