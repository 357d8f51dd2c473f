"""Atomic writes, locks, checksums."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

BLOCK_BYTES = 1 << 24  # read at a time for a checksum
SHOWN = 5  # names listed in a message


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, if the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, write: Callable[[IO[bytes]], object], *, writer: str = "") -> None:
    """Write a file atomically: write a temporary file, flush it to the disk, rename it.

    Args:
        path: file to write, in an existing folder.
        write: called with the temporary file ``<name><writer>.tmp`` in the same folder, open for writing.
        writer: distinguishes processes that may write the same file at the same time.
    """
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def as_text(write: Callable[[IO[str]], object]) -> Callable[[IO[bytes]], None]:
    """Adapt a function that writes text for ``write_whole``: UTF-8, line ends unchanged."""

    def encoded(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        write(text)
        text.detach()

    return encoded


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed. Return False if another process holds the lock.

    The system releases the lock when the process ends, even if killed. A file system without locks locks nothing.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum.update(block)
    return checksum.hexdigest()


def fingerprint(path: Path) -> tuple[int, int]:
    """Return the size in bytes and modification time in ns, to detect a changed file; zeros if it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def some_of(names: list[str]) -> str:
    """Join names for a message; of many, the first five.

    >>> some_of(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d, e, ...'
    """
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def printable(text: str) -> str:
    r"""Return text for one line: line breaks, control characters and bytes that are not UTF-8 become escapes.

    >>> print(printable("a\nb\udcff"))
    a\nb\udcff
    """
    shown = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return "".join(shown)
