"""Shapes and types of the networks' signatures are enforced while these tests run."""

from __future__ import annotations

from jaxtyping import install_import_hook

install_import_hook("cxr_retrieval_training", "beartype.beartype")
