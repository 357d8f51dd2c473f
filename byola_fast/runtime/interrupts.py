"""Ctrl-C on the command line: one line and exit code 130, also while libraries are imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code


def _leave(*_: object) -> None:
    os.write(2, b"byola-fast: interrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, for work that must be left in order."""
    before = signal.getsignal(signal.SIGINT)
    if before is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before is _leave:
            signal.signal(signal.SIGINT, before)


# Python imports the package, which takes seconds, before any code of a command runs. "-m": python -m byola_fast.
_command = os.path.basename(sys.argv[0]) == "byola-fast" or (sys.argv[0] == "-m" and "byola_fast" in sys.orig_argv)
if _command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
