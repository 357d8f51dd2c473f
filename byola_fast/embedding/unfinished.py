"""Finished embeddings on disk, so that a stopped run of embed resumes."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byola_fast.embedding.tables import Clip
from byola_fast.runtime.files import fingerprint, write_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("byola_fast")

KEEP_SEC = 15.0  # seconds of work that a kill can cost


class Unfinished:
    """A folder of pairs: a file of raw rows and a JSON list of the clips in it. Only listed clips count.

    Rows are appended as they come, so that memory does not grow. Every few seconds a list of the clips finished since
    the last one is written, whole or not at all.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int) -> None:
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "settings.json"
        if about.exists() and any(folder.glob("*-*.json")):
            try:
                found = dict(json.loads(about.read_bytes()))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{about}: damaged: {error}; remove its folder") from error
            if other := [name for name, value in settings.items() if found.get(name) != value]:
                raise ValueError(
                    f"{folder}: holds the work of a stopped run with other {', '.join(other)}; run that again, remove "
                    "the folder, or give another out"
                )
        _write_json(about, settings, rank)
        for orphan in folder.glob(f"{rank}-*.f32"):
            if not orphan.with_suffix(".json").exists():
                orphan.unlink()
        self._number = 1 + max((int(path.stem.split("-")[1]) for path in folder.glob(f"{rank}-*.json")), default=-1)

    def __enter__(self) -> Unfinished:
        self._open()
        return self

    def _open(self) -> None:
        self._path = self.folder / f"{self.rank}-{self._number}.f32"
        self._file = open(self._path, "wb")  # noqa: SIM115
        self._content: dict[str, Any] = {"clips": {}, "broken": {}, "width": 0}
        self._rows = self._begin = 0  # rows written, and how many belong to finished clips
        self._since = time.monotonic()

    def __exit__(self, *_exception: object) -> None:
        self._keep()
        self._file.close()
        if not self._path.with_suffix(".json").exists():
            self._path.unlink()

    def add(self, name: str, path: Path, rows: npt.NDArray[np.float32], last: bool) -> None:
        self._file.write(rows.tobytes())
        self._rows += len(rows)
        self._content["width"] = rows.shape[1]
        if last:
            self._content["clips"][name] = [self._begin, self._rows - self._begin, *fingerprint(path)]
            self._begin = self._rows
            if time.monotonic() - self._since > KEEP_SEC:
                self._keep()
                self._file.close()
                self._number += 1
                self._open()

    def add_broken(self, name: str, reason: str) -> None:
        self._content["broken"][name] = reason
        self._begin = self._rows

    def _keep(self) -> None:
        if self._content["clips"] or self._content["broken"]:
            self._file.flush()
            os.fsync(self._file.fileno())
            _write_json(self._path.with_suffix(".json"), self._content, self.rank)

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
        paths = sorted(self.folder.glob("*-*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [(path, content) for path in paths if (content := _read_list(path)) is not None]


def _read_list(path: Path) -> dict[str, Any] | None:
    """Read a list that ``Unfinished`` wrote; None if it is damaged or its rows are gone."""
    try:
        content = json.loads(path.read_bytes())
        clips, width = content["clips"].values(), content["width"]
        numbers = [width, *(number for clip in clips for number in clip)]
        whole = all(type(number) is int for number in numbers) and all(len(clip) == 4 for clip in clips)
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


def _write_json(path: Path, content: dict[str, Any], rank: int) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content).encode()), writer=f".{rank}")
