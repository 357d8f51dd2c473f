"""What writers and readers of files share: names given to whole files only, locks, and knowing a file again."""

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
SHOWN = 5  # names in a message


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system allows it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, write: Callable[[IO[bytes]], object], *, writer: str = "") -> None:
    """Give a file its name only when all of it is on the disk: whenever writing stops, the old one is whole.

    Args:
        path: file to write, in a folder that exists.
        write: called with ``<name><writer>.tmp``, open for writing, in the same folder.
        writer: tells processes apart that may write the same file at the same time.
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
    """Return what ``write_whole`` takes for a function that writes text: UTF-8, line ends as they come."""

    def encoded(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        write(text)
        text.detach()

    return encoded


def lock(file: IO[bytes]) -> bool:
    """Keep other processes out of an open file until it is closed; False where one of them keeps this one out.

    The system lets go of it with the process, however that ends. Where a file system has no locks, nobody is kept out.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def file_sha256(path: Path) -> str:
    """Return the checksum of a file, read from the disk."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum.update(block)
    return checksum.hexdigest()


def fingerprint(path: Path) -> tuple[int, int]:
    """Return the bytes and the time of the last change in ns, by which a changed file is known; zeros for none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def some_of(names: list[str]) -> str:
    """Return names for a message, the first of many.

    >>> some_of(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d, e, ...'
    """
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
