"""The precisions that an embedded server offers (apart, so that `--help` need not load a protobuf runtime)."""

from __future__ import annotations

from enum import Enum


class Precision(str, Enum):
    """Arithmetic of the embedded engines. bf16 is about twice as fast where the CPU has AVX-512 BF16 or AMX."""

    fp32 = "fp32"
    bf16 = "bf16"
