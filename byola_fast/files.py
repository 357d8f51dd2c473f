"""What writers and readers of files share: names given to whole files only, and knowing a file again."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


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


def fingerprint(path: Path) -> tuple[int, int]:
    """Return the bytes and the time of the last change in ns, by which a changed file is known; zeros for none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
