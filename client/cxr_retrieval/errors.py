"""Every error a user can meet. Each message says what happened, what was expected, what was got, what to do next.

CxrError
├── InputError                 this one input is bad; a batch reports it and goes on       (exit code 1)
│   ├── ImageError             a file that cannot be used as a radiograph
│   ├── ManifestError          a manifest that cannot be used                              (exit code 2)
│   └── UsageError             an argument, filter, config or checkpoint that cannot be used (exit code 2)
└── ServiceError               the system around us cannot do it now                       (exit code 2)
    ├── InferenceError         Triton: too slow, another version
    │   ├── AccessError            it does not trust us, or we do not trust it: certificates, tokens; no waiting mends it
    │   ├── ServerDownError        nobody answers, or its models are not ready: worth waiting for
    │   ├── OverloadedError        its queue or memory is full: worth another try
    │   └── UnusableOutputError    it refused or could not compute just these images          (exit code 1)
    ├── StoreError             Milvus: locked, collection does not fit
    │   ├── StoreAccessError       as with Triton
    │   └── StoreDownError         nobody answers in time: worth waiting for
    └── SetupError             missing extra, broken installation, server did not start
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial


class CxrError(Exception):
    """Base of all expected errors.

    Args:
        what: What failed, naming the file, model or field.
        expected: What would have been right.
        got: What was there instead.
        next_step: What the reader should do.
    """

    exit_code = 2

    def __init__(self, what: str, *, expected: str = "", got: str = "", next_step: str = "") -> None:
        self.what = what
        self.expected = expected
        self.got = got
        self.next_step = next_step
        parts = [what.rstrip(".")]
        if expected:
            parts.append(f"expected {expected}")
        if got:
            parts.append(f"got {got}")
        message = "; ".join(parts) + "."
        if next_step:
            message += f" Next: {next_step.rstrip('.')}."
        super().__init__(message)

    def __reduce__(self) -> tuple[Callable[..., CxrError], tuple[str]]:
        """Pickled by its parts; from the message alone, it would come out of a worker process with another one."""
        return partial(type(self), expected=self.expected, got=self.got, next_step=self.next_step), (self.what,)


class InputError(CxrError):
    """One input is unusable; others are not affected."""

    exit_code = 1


class ImageError(InputError):
    """A file that cannot be used as a frontal chest radiograph."""


class ManifestError(InputError):
    """A manifest that cannot be used at all."""

    exit_code = 2


class UsageError(InputError):
    """An argument, filter expression, training config or checkpoint that cannot be used."""

    exit_code = 2


class ServiceError(CxrError):
    """Something this command depends on cannot serve it now."""


class InferenceError(ServiceError):
    """Triton is too slow, serves other weights, or answered with something unusable."""


class AccessError(InferenceError):
    """Triton or a proxy before it refuses us, or shows a certificate that we do not accept."""


class ServerDownError(InferenceError):
    """No Triton answers, or it has not loaded its models yet; it may a minute later."""


class OverloadedError(InferenceError):
    """Triton runs, but has no room for this request now; the same may succeed a moment later."""


class UnusableOutputError(InferenceError):
    """Triton runs, but refused these images or answered with NaN; in a batch, other images are not affected."""

    exit_code = 1


class StoreError(ServiceError):
    """Milvus is locked, or holds a collection that does not fit."""


class StoreAccessError(StoreError):
    """Milvus refuses us, or shows a certificate that we do not accept."""


class StoreDownError(StoreError):
    """No Milvus answers, or not in time; it may a minute later."""


class SetupError(ServiceError):
    """A missing extra, a broken installation, or an embedded server that did not start."""
