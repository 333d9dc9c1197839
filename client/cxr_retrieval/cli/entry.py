"""Where `cxr` begins: before anything is loaded, so that Ctrl-C meanwhile is no stack of imports in the operator's terminal."""

from __future__ import annotations

import signal


def main() -> None:
    """Loads the command and runs it (`app.main`)."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background job is not
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends this process without a word, as it would any other
    from cxr_retrieval.cli import app

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app.main()
