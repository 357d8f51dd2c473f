"""Atomic writes, locks, checksums."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: no locks, and an open file cannot be renamed or removed
    fcntl = None  # type: ignore[assignment]

BLOCK_BYTES = 1 << 24  # read at a time for a checksum
SHOWN = 5  # names listed in a message
LOCK_SEC = 5.0  # time to wait for a lock
LOCK_POLL_SEC = 0.1


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, if the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before long work. Nothing is created.

    Raises:
        OSError: it is a folder, a device or read-only, or its folder, or the one to make that in, is read-only.
    """
    _require_regular(path)
    where = path
    while not where.exists() and where != where.parent:
        where = where.parent
    folder = path.parent if where == path else where
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    for used in {where, folder}:
        if not os.access(used, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(used))


def _require_regular(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: write a temporary file beside it, flush it to the disk, rename it.

    Several processes may write a file at the same time: it is always one writer's, at last that of the last. If it is a
    link, the file that it points to is replaced. A killed writer leaves ``NAME.<8 digits>.tmp``, which the next writer
    removes, or, on a file system without locks, nobody.

    Args:
        path: file to write, in an existing folder.
        write: called with the temporary file, open for writing.

    Raises:
        OSError: the file cannot be written; an older one is unchanged.
    """
    path = Path(os.path.realpath(path))
    _require_regular(path)  # a rename would replace a device
    with _open_temporary(path) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            close_to_rename(file)
            os.replace(file.name, path)
        finally:
            close_to_rename(file)
            Path(file.name).unlink(missing_ok=True)
    sync_folder(path.parent)


def _open_temporary(path: Path) -> IO[bytes]:
    """Create and lock a file beside ``path``. Remove those of killed writers, which nobody locks."""
    for old in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp") if fcntl else ():
        with suppress(OSError), open(old, "rb+") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if in use, or without locks
            old.unlink()
    while True:
        file = open(path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp"), "xb")  # noqa: SIM115
        if lock(file) and os.path.exists(file.name):  # else another writer removed it before it was locked
            return file
        file.close()


def as_text(write: Callable[[IO[str]], object]) -> Callable[[IO[bytes]], None]:
    """Adapt a function that writes text for ``write_whole``: UTF-8, line ends unchanged."""

    def encoded(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        write(text)
        text.detach()

    return encoded


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed. Return False if another process holds the lock.

    The system releases the lock when the process ends, even if killed. A system or file system without locks locks
    nothing.
    """
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def lock_soon(file: IO[bytes]) -> None:
    """Lock an open file until it is closed, once no other process holds the lock; see ``lock``."""
    with suppress(OSError):
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)


def close_to_rename(file: IO[bytes]) -> None:
    """Close a file where an open one cannot be renamed or removed; elsewhere it stays open, and locked."""
    if not fcntl:
        file.close()


def open_locked(path: Path) -> IO[bytes] | None:
    """Open a file for appending and lock it, making its folder. Return None if another process keeps the lock.

    Waits some seconds, because the processes of a killed run end a moment after it. The process that has the lock may
    rename or remove the file.
    """
    deadline = time.monotonic() + LOCK_SEC
    while True:
        late = time.monotonic() > deadline
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # noqa: SIM115
            if lock(file) and has_name(file):
                return file
            file.close()
        except FileNotFoundError:  # the folder was removed meanwhile
            if late:
                raise
        if late:
            return None
        time.sleep(LOCK_POLL_SEC)


def has_name(file: IO[bytes]) -> bool:
    """Return whether an open file was not renamed or removed."""
    try:
        return os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


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
