"""Finished embeddings on disk, so that a stopped run of embed resumes."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byola_fast.embedding.tables import Clip
from byola_fast.runtime.files import close_to_rename, fingerprint, open_locked, write_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("byola_fast")

KEEP_SEC = 15.0  # seconds of work that a kill can cost
LOCK = "lock"


class Unfinished:
    """A folder of pairs: a file of raw rows and a JSON list of the clips in it. Only listed clips count.

    Rows are appended as they come, so that memory does not grow. Every few seconds a list of the clips finished since
    the last one is written, whole or not at all. Names of files are never used twice, so that processes that outlive a
    killed run do no harm.

    Args:
        folder: made by ``claim``.
        settings: all that rows depend on besides the files, as JSON reads it back.
        rank: of this process.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int) -> None:
        self.folder, self.settings, self.rank = folder, settings, rank

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the folder and lock it for a run; at the end, remove it if it is empty. Rank 0 does so for all ranks.

        Raises:
            ValueError: another run has it, or it holds the work of other settings.
        """
        path = self.folder / LOCK
        lock = open_locked(path)
        if lock is None:
            owner = "which has just ended"
            with suppress(OSError):
                owner = path.read_text(encoding="utf-8", errors="replace")
            out = self.folder.with_suffix("")
            raise ValueError(f"{out}: another embed is writing there ({owner}); wait until it ends or give another out")
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())
            lock.flush()
            self._lists()  # refuses other settings
            for orphan in self.folder.glob("*-*.f32"):
                if not orphan.with_suffix(".json").exists():
                    orphan.unlink()
            yield
        finally:
            with suppress(OSError), lock:
                close_to_rename(lock)
                path.unlink()
                self.folder.rmdir()

    def clear(self) -> None:
        """Remove all rows and lists."""
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()

    def __enter__(self) -> Unfinished:
        self._open()
        return self

    def _open(self) -> None:
        self._path = self.folder / f"{self.rank}-{secrets.token_hex(8)}.f32"
        self._file = open(self._path, "xb")  # noqa: SIM115
        self._content: dict[str, Any] = {"settings": self.settings, "clips": {}, "broken": {}, "width": 0}
        self._rows = self._begin = 0  # rows written, and how many belong to finished clips
        self._since = time.monotonic()

    def __exit__(self, *_exception: object) -> None:
        self._keep()
        self._file.close()
        if not self._path.with_suffix(".json").exists():
            self._path.unlink()

    def add(self, name: str, source: tuple[int, int], rows: npt.NDArray[np.float32], last: bool) -> None:
        """Add a clip's next rows. ``source`` is the ``fingerprint`` of its file from before it was read."""
        self._file.write(rows.tobytes())
        self._rows += len(rows)
        self._content["width"] = rows.shape[1]
        if last:
            self._content["clips"][name] = [self._begin, self._rows - self._begin, *source]
            self._begin = self._rows
            if time.monotonic() - self._since > KEEP_SEC:
                self._keep()
                self._file.close()
                self._open()

    def add_broken(self, name: str, reason: str) -> None:
        self._content["broken"][name] = reason
        self._begin = self._rows

    def _keep(self) -> None:
        if self._content["clips"] or self._content["broken"]:
            self._file.flush()
            os.fsync(self._file.fileno())
            content = json.dumps(self._content).encode()
            write_whole(self._path.with_suffix(".json"), lambda file: file.write(content))

    def clips(self, files: dict[str, Path]) -> dict[str, Clip]:
        """Return the place of each clip's rows, for clips whose files have not changed since."""
        found = {}
        for path, content in self._lists():
            for name, (begin, rows, *source) in content["clips"].items():
                if name in files and tuple(source) == fingerprint(files[name]):
                    found[name] = Clip(path.with_suffix(".f32"), begin, rows, content["width"])
        if len({clip.width for clip in found.values()}) > 1:
            raise ValueError(f"{self.folder}: damaged: rows of several widths; remove it")
        return found

    def broken(self) -> dict[str, str]:
        return {name: reason for _path, content in self._lists() for name, reason in content["broken"].items()}

    def _lists(self) -> list[tuple[Path, dict[str, Any]]]:
        found = []
        for path in sorted(self.folder.glob("*-*.json"), key=lambda path: path.stat().st_mtime_ns):
            content = _read_list(path)
            if content is None:
                continue
            held = content["settings"]
            other = [name for name in {**held, **self.settings} if held.get(name) != self.settings.get(name)]
            if other and content["clips"]:
                raise ValueError(
                    f"{self.folder}: holds the work of a stopped run with other {', '.join(other)}; run that again, "
                    "remove the folder, or give another out"
                )
            if not other:
                found.append((path, content))
        return found


def _read_list(path: Path) -> dict[str, Any] | None:
    """Read a list that ``Unfinished`` wrote; None if it is damaged or its rows are gone."""
    try:
        content = json.loads(path.read_bytes())
        clips, width = content["clips"].values(), content["width"]
        whole = isinstance(content["settings"], dict)
        numbers = [width, *(number for clip in clips for number in clip)]
        whole = whole and all(type(number) is int for number in numbers) and all(len(clip) == 4 for clip in clips)
        held = path.with_suffix(".f32").stat().st_size
        whole = whole and all(begin >= 0 <= rows and 4 * width * (begin + rows) <= held for begin, rows, *_ in clips)
        whole = whole and (width > 0 or not clips) and all(isinstance(x, str) for x in content["broken"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        logger.warning("%s: damaged, or its rows are gone; embedding its clips again", path)
        path.unlink()
        return None
    return content
