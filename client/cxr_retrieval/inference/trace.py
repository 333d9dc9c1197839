"""What a request is known by in every log and trace: the ids of W3C Trace Context, level 1."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trace:
    """`trace_id` (32 hex digits) stands for a group of films, `span_id` (16) for one request about them; both are random."""

    trace_id: str = field(default_factory=lambda: secrets.token_hex(16))
    span_id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def traceparent(self) -> str:
        """The header that carries both; "01": the trace is kept somewhere, if only in results and log."""
        return f"00-{self.trace_id}-{self.span_id}-01"

    def again(self) -> Trace:
        """Another request about the same films."""
        return Trace(self.trace_id)
