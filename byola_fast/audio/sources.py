"""What training reads: the protocol of sources, folders and manifests, and the checks of users' own sources."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, SupportsFloat, TypeGuard

import torch
from torch import Tensor

from byola_fast.audio.decoding import BYTES, LOUDEST
from byola_fast.audio.reading import AudioError, list_audio_files
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.store import SegmentStore
from byola_fast.audio.store_format import is_store
from byola_fast.runtime.files import some_of

Paths = str | Path | Sequence[str | Path]

MANIFESTS = (".csv", ".tsv", ".jsonl")
COLUMNS = ("file_name", "start", "end")
DTYPES = (torch.float32, torch.int16)


class Source(Protocol):
    """Clips that training takes random segments of: the interface of ``pretrain(source=)``.

    Worker processes have a copy each, so ``read`` must depend on its arguments alone: then a resumed run and any number
    of workers and ranks read the same. ``byola_fast.audio.read_segment`` reads a segment so from a file or from bytes.

    Attributes:
        num_samples: length of a segment, in samples: ``unit_sec`` times ``sample_rate`` of the run.
        listing: a checksum of what the clips are, such as of their names; another one warns that a run is resumed on
            other data.

    Two methods more serve single tasks: ``seconds(index) -> float``, the duration of a clip, for ``sample_by
    "duration"``; ``whole(index) -> (samples,)``, all of a clip, for ``pack``.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def listing(self) -> str: ...

    def __len__(self) -> int:
        """Return the number of clips, which must not change."""
        ...

    def read(self, index: int, epoch: int, draw: int) -> Tensor:
        """Return a segment ``(num_samples,)`` float32 in [-1, 1], or int16.

        If it raises an error, the clip is named once and another one replaces it.

        Args:
            index: number of the clip, from 0.
            epoch: from 0.
            draw: number of the segment within its clip and epoch.
        """
        ...


class OwnSource:
    """A user's source, whose answers are checked, so that a fault costs one clear line and no training.

    Args:
        source: see ``Source``.
        needs: methods that it must have besides.

    Raises:
        TypeError: an attribute is missing. ValueError: no clip, or ``num_samples`` below 1.
    """

    def __init__(self, source: Any, *needs: str) -> None:
        wanted = ("__len__", "num_samples", "listing", "read", *needs)
        if missing := [name for name in wanted if not hasattr(source, name)]:
            kind = type(source).__name__
            raise TypeError(f"source: expected {', '.join(wanted)}, got {kind} without {', '.join(missing)}")
        self.source, self.listing, self.num_samples = source, str(source.listing), source.num_samples
        self._count = len(source)
        if self._count < 1:
            raise ValueError("source: expected at least one clip, got none")
        if not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ValueError(f"source: num_samples: expected a number of at least 1, got {self.num_samples!r}")
        self.dtype: torch.dtype | None = None
        for index in range(self._count):  # a wrong shape or dtype is found before any work
            with suppress(AudioError):
                self.dtype = self.read(index, 0).dtype
                break

    def __len__(self) -> int:
        if (now := len(self.source)) != self._count:
            raise ValueError(f"source: expected {self._count} clips, as at the start, got {now}")
        return self._count

    def read(self, index: int, epoch: int, draw: int = 0) -> Tensor:
        """Return a segment.

        Raises:
            AudioError: the source raises, or its segment is not finite: another clip replaces this one. TypeError or
            ValueError: it returns something else than a segment.
        """
        wav = self._ask("read", index, epoch, draw)
        if not isinstance(wav, Tensor) or wav.shape != (self.num_samples,):
            got = tuple(wav.shape) if isinstance(wav, Tensor) else type(wav).__name__
            raise ValueError(f"source: read({index}, ...): expected a tensor ({self.num_samples},), got {got}")
        if wav.dtype != (self.dtype or wav.dtype):
            raise TypeError(f"source: read({index}, ...): expected {self.dtype}, as of other clips, got {wav.dtype}")
        return _checked(wav, "read", index)

    def seconds(self, index: int) -> float:
        """Return the duration of a clip, for ``sample_by="duration"``."""
        seconds = self._ask("seconds", index)
        if not isinstance(seconds, SupportsFloat) or not 0 <= float(seconds) < math.inf:
            raise ValueError(f"source: seconds({index}): expected a number of at least 0, got {seconds!r}")
        return float(seconds)

    def whole(self, index: int) -> Iterator[Tensor]:
        """Yield all of a clip, for ``pack``."""
        wav = self._ask("whole", index)
        if not isinstance(wav, Tensor) or wav.ndim != 1:
            got = tuple(wav.shape) if isinstance(wav, Tensor) else type(wav).__name__
            raise ValueError(f"source: whole({index}): expected a tensor (samples,), got {got}")
        if not len(wav):
            raise AudioError(_name(index), "no samples")
        wav = _checked(wav, "whole", index)
        yield wav / 32768 if wav.dtype == torch.int16 else wav

    def state(self, index: int) -> tuple[int, int]:
        """Return what ``pack`` compares: nothing, as the listing alone tells of changes."""
        return 0, 0

    @property
    def names(self) -> list[str]:
        """A name of each clip."""
        return [str(_name(index)) for index in range(len(self))]

    def _ask(self, method: str, index: int, *more: int) -> Any:
        try:
            return getattr(self.source, method)(index, *more)
        except Exception as error:  # whatever a user's own code raises
            line = next(iter(str(error).splitlines()), "")
            reason = f"{type(error).__name__}: {line}"
            if isinstance(error, AudioError):
                reason = error.reason if error.path.name.startswith(BYTES) else line
            raise AudioError(_name(index), reason) from error


def _name(index: int) -> Path:
    return Path(f"clip {index} of the source")


def _checked(wav: Tensor, method: str, index: int) -> Tensor:
    if wav.dtype not in DTYPES or wav.device.type != "cpu":
        got = f"{wav.dtype} on {wav.device}"
        raise TypeError(f"source: {method}({index}, ...): expected float32 or int16 on the CPU, got {got}")
    if not bool(wav.isfinite().all()):
        raise AudioError(_name(index), "NaN or infinite samples")
    if len(wav) and wav.dtype == torch.float32 and float(loudest := wav.detach().abs().max()) > LOUDEST:
        raise AudioError(_name(index), f"samples up to {loudest:.3g} times full scale; expected at most 2^20")
    return wav


class Clip(NamedTuple):
    """An audio file, or the part of it from ``start`` to ``end``, in seconds; no ``end`` is the end of the file."""

    path: Path
    start: float = 0.0
    end: float | None = None


def list_clips(paths: Paths) -> list[Clip]:
    """List the clips of folders, files and manifests, in their order.

    Args:
        paths: one or several. A manifest is a file ``.csv`` or ``.tsv`` with a header, or ``.jsonl`` with an object on
            each line. It has a column ``file_name``, relative to its folder, and if wanted ``start`` and ``end`` in
            seconds; others are ignored.

    Raises:
        FileNotFoundError: no such file or folder. AudioError: no audio file; missing files of a manifest. ValueError: a
        manifest that cannot be read (names the line); a packed store among several paths.
    """
    several = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not several:
        raise ValueError("audio_dir: expected at least one folder or file, got none")
    clips: list[Clip] = []
    for path in several:
        if len(several) > 1 and is_store(path):
            raise ValueError(f"audio_dir: expected one packed store alone, got {path} among {len(several)}; pack all")
        clips += read_manifest(path) if path.suffix in MANIFESTS else map(Clip, list_audio_files(path))
    return clips


def read_manifest(path: str | Path) -> list[Clip]:
    """Read a manifest; see ``list_clips``."""
    path = Path(path)
    clips, missing, known = [], [], {}
    for number, row in _rows(path):
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}: line {number}: file_name: expected the name of a file, got {name!r}")
        start, end = (_seconds(path, number, row, key) for key in ("start", "end"))
        clip = Clip(path.parent / name, start or 0.0, end)
        if end is not None and end <= clip.start:
            raise ValueError(f"{path}: line {number}: end: expected more than the start {clip.start:g}, got {end:g}")
        if clip.path not in known:
            known[clip.path] = clip.path.is_file()
            missing += [] if known[clip.path] else [f"{clip.path} (line {number})"]
        clips.append(clip)
    if missing:
        raise AudioError(path, f"{len(missing)} of {len(known)} files missing: {some_of(missing)}")
    if not clips:
        raise AudioError(path, "no file in this manifest")
    return clips


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line's number and values."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        row = json.loads(line)
                        yield number, row if isinstance(row, dict) else {}
                return
            table = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", skipinitialspace=True)
            if "file_name" not in (table.fieldnames or ()):
                got = ", ".join(table.fieldnames or ()) or "none"
                raise ValueError(f"{path}: expected columns file_name and, if wanted, start and end, got {got}")
            if twice := [name for name in COLUMNS if list(table.fieldnames or ()).count(name) > 1]:
                raise ValueError(f"{path}: expected each column once, got {', '.join(twice)} more than once")
            for row in table:
                yield table.line_num, row
    except (csv.Error, json.JSONDecodeError, RecursionError) as error:
        number = table.line_num if path.suffix != ".jsonl" else number
        raise ValueError(f"{path}: line {number}: cannot be read: {error}") from error


def _seconds(path: Path, number: int, row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{path}: line {number}: {key}: expected seconds of at least 0, got {value!r}")
    return seconds


def is_paths(source: Any) -> TypeGuard[Paths]:
    """Return whether a source is given by paths of files or folders."""
    return isinstance(source, str | Path | list | tuple)


def open_clips(paths: Paths, *, unit_sec: float = 0.95, sample_rate: int = 16000, seed: int = 0) -> SegmentFolder:
    """Open folders of audio files, single files and manifests; arguments and errors as for ``open_source``."""
    clips = list_clips(paths)
    parts = [(clip.start, clip.end) for clip in clips] if any(clip[1:] != (0.0, None) for clip in clips) else None
    files = [clip.path for clip in clips]
    return SegmentFolder(files, unit_sec=unit_sec, sample_rate=sample_rate, seed=seed, parts=parts)


def open_source(
    paths: Paths, *, unit_sec: float = 0.95, sample_rate: int = 16000, seed: int = 0
) -> SegmentFolder | SegmentStore:
    """Open folders of audio files, single files and manifests (see ``list_clips``), or a packed store.

    Args:
        paths: one or several; of packed stores one.
        unit_sec: length of a segment, in seconds.
        sample_rate: in Hz; a packed store must have this rate.
        seed: key of the random segments.

    Raises:
        The errors of ``SegmentStore``, or of ``list_clips`` and ``SegmentFolder``.
        ValueError: the store was packed at another rate.
    """
    one = paths if isinstance(paths, str | Path) else paths[0] if len(paths) == 1 else None
    if one is None or not is_store(Path(one)):
        return open_clips(paths, unit_sec=unit_sec, sample_rate=sample_rate, seed=seed)
    store = SegmentStore(one, unit_sec=unit_sec, seed=seed)
    if store.sample_rate != sample_rate:
        raise ValueError(f"sample_rate: expected {store.sample_rate} Hz, the rate of {one}, got {sample_rate}")
    return store
