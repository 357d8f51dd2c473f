"""Printed lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def say(line: object, stream: TextIO | None) -> None:
    """Print a line, whatever the stream can encode and whether or not anybody reads it.

    Other characters, of a name that is not UTF-8 for one, are printed as escapes. ``stream`` is None where the caller
    has closed it.
    """
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    with reader_may_leave(stream):
        print(str(line).encode(encoding, "backslashreplace").decode(encoding), file=stream)


@contextmanager
def reader_may_leave(stream: TextIO) -> Iterator[None]:
    """Write to a stream, and flush it; if its reader has left, as ``head`` does, drop what it has not read."""
    try:
        try:
            yield
        finally:
            stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python fails at its end
    except OSError:
        if stream is not sys.stderr:  # a log on a full disk ends no run
            raise
