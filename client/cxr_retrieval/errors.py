"""Every error a user can meet. Each message says what happened, what was expected, what was got, what to do next.

CxrError
├── InputError                 this one input is bad; a batch reports it and goes on       (exit code 1)
│   ├── ImageError             a file that cannot be used as a radiograph
│   ├── ManifestError          a manifest that cannot be used                              (exit code 2)
│   └── UsageError             an argument, filter, config or checkpoint that cannot be used (exit code 2)
│       ├── ClauseError            a filter, with the place in it that is wrong
│       └── GoneError              what was held in memory, or in the gallery, and is no longer
└── ServiceError               the system around us cannot do it now                       (exit code 2)
    ├── InferenceError         Triton: another version, another form
    │   ├── AccessError            it does not trust us, or we do not trust it: certificates, tokens; no waiting mends it
    │   ├── ServerDownError        nobody answers, or its models are not ready: may pass
    │   ├── OverloadedError        its queue or memory is full: may pass
    │   ├── ServerFaultError       it failed or took too long, for these images or for all: may pass
    │   └── UnusableOutputError    it refused or could not compute just these images          (exit code 1)
    ├── StoreError             Milvus: locked, collection does not fit
    │   ├── StoreAccessError       as with Triton
    │   ├── StoreDownError         nobody answers in time: may pass
    │   └── StoreFullError         it takes nothing more now: disk, memory, quota: may pass
    ├── PeerError              an archive of images refuses us, or we refuse it: AE titles, contexts, certificates, passwords
    │   └── PeerDownError          nobody answers in time, or it cannot now: may pass
    ├── StorageDownError       S3-compatible storage does not answer, or cannot now: may pass
    └── SetupError             missing extra, broken installation, server did not start
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial


class CxrError(Exception):
    """Base of all expected errors.

    Args:
        what: What failed, naming the file, model or field.
        expected: What would have been right.
        got: What was there instead.
        next_step: What the reader should do.
        shown: Lines that point at it, printed under all of that.

    Attributes:
        may_pass: Whether the same may succeed later, so that whoever can wait should.
        raised_at: Module and line that made it.
        literal: Those of its parts that stand word for word in the source, by name. They hold nothing of a file, a patient or a server,
            so that a log which must name nobody may have them; the others may hold anything.
    """

    exit_code = 2
    may_pass = False

    def __init__(self, what: str, *, expected: str = "", got: str = "", next_step: str = "", shown: str = "") -> None:
        self.what = what
        self.expected = expected
        self.got = got
        self.next_step = next_step
        self.shown = shown
        parts = [what.rstrip(".")]
        if expected:
            parts.append(f"expected {expected}")
        if got:
            parts.append(f"got {got}")
        message = "; ".join(parts) + "."
        if next_step:
            message += f" Next: {next_step.rstrip('.')}."
        if shown:
            message += f"\n{shown}"
        super().__init__(message)
        here = inspect.currentframe()
        maker = here.f_back if here else None
        self.raised_at = f"{maker.f_globals['__name__']}:{maker.f_lineno}" if maker else ""
        named = {"what": what, "expected": expected, "got": got, "next_step": next_step}
        self.literal = {name: part for name, part in named.items() if part and maker and part in maker.f_code.co_consts}

    def __reduce__(self) -> tuple[Callable[..., CxrError], tuple[str], Mapping[str, object]]:
        """Pickled by its parts; from the message alone, it would come out of a worker process with another one."""
        again = partial(type(self), expected=self.expected, got=self.got, next_step=self.next_step, shown=self.shown)
        return again, (self.what,), dict(vars(self))


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


class ClauseError(UsageError):
    """A filter, or words to look for, that cannot be meant.

    Attributes:
        span: The characters of it that are wrong, from the first, counted from 0, up to but without the second.
    """

    span: tuple[int, int] = (0, 0)


class GoneError(UsageError):
    """Something that was there when it was named, and is no longer."""


class ServiceError(CxrError):
    """Something this command depends on cannot serve it now."""


class InferenceError(ServiceError):
    """Triton serves other weights, or answered in another form."""


class AccessError(InferenceError):
    """Triton or a proxy before it refuses us, or shows a certificate that we do not accept."""


class ServerDownError(InferenceError):
    """No Triton answers, or it has not loaded its models yet; it may a minute later."""

    may_pass = True


class OverloadedError(InferenceError):
    """Triton runs, but has no room for this request now; the same may succeed a moment later."""

    may_pass = True


class ServerFaultError(InferenceError):
    """Triton runs, but failed or took too long; whether these images or the server is to blame, other requests show."""

    may_pass = True


class UnusableOutputError(InferenceError):
    """Triton runs, but refused these images or answered with NaN; in a batch, other images are not affected."""

    exit_code = 1


class StoreError(ServiceError):
    """Milvus is locked, or holds a collection that does not fit."""


class StoreAccessError(StoreError):
    """Milvus refuses us, or shows a certificate that we do not accept."""


class StoreDownError(StoreError):
    """No Milvus answers, or not in time; it may a minute later."""

    may_pass = True


class StoreFullError(StoreError):
    """Milvus runs, but takes nothing more now: its disk, memory or quota is used up; it may once there is room."""

    may_pass = True


class PeerError(ServiceError):
    """An archive of images refuses us, answers in another form, or shows a certificate that we do not accept."""


class PeerDownError(PeerError):
    """No archive answers, it answers too late, or says itself that it cannot now; it may a minute later."""

    may_pass = True


class StorageDownError(ServiceError):
    """S3-compatible storage does not answer, or says itself that it cannot now; it may a minute later."""

    may_pass = True


class SetupError(ServiceError):
    """A missing extra, a broken installation, or an embedded server that did not start."""
