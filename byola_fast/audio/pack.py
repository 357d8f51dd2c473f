"""Decode every file of a folder once into a packed store, which then gives segments without decoding."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from byola_fast.audio.decoding import decoders
from byola_fast.audio.reading import AudioError
from byola_fast.audio.sources import OwnSource, Paths, Source, is_paths, open_clips
from byola_fast.audio.store_format import MAX_RATE, PartHeader, PartWriter, StoreError, old_data, part_name, read_header
from byola_fast.runtime.files import some_of
from byola_fast.runtime.progress import Progress
from byola_fast.runtime.workers import num_workers, read_in_processes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("byola_fast")


@dataclass
class PackConfig:
    """Settings of ``pack``.

    Attributes:
        audio_dir: folder of audio files (wav, flac, ogg, opus, mp3 and more; any rate and channel count), one file, a
            manifest (CSV or JSONL: file_name, start, end), or several of these.
        out: folder of the store; an existing store stays until the new one is complete.
        sample_rate: rate of the store, in Hz; audio is resampled to it. A store takes 2 bytes per sample: 115 MB per
            hour at 16 kHz.
        part: number of the part to pack, from 0; other processes or machines pack the others into the same folder.
        parts: number of parts of the store; file k of the sorted list goes to part k modulo parts.
        workers: processes that decode; by default one fewer than the CPU cores, at most 8.
        force: pack again even if no file has changed since this part was packed.
    """

    audio_dir: str | list[str]
    out: str
    sample_rate: int = 16000
    part: int = 0
    parts: int = 1
    workers: int | None = None
    force: bool = False


class PackResult(NamedTuple):
    """Contents of a packed part.

    Attributes:
        out: folder of the store.
        files: number of audio files in this part.
        broken: reasons of the files without samples, by name.
        seconds: duration of the audio.
        clipped: number of samples that were clipped to full scale.
        unchanged: whether the part already existed, packed from the same files.
    """

    out: Path
    files: int
    broken: dict[str, str]
    seconds: float
    clipped: int
    unchanged: bool


def run_pack(config: PackConfig) -> PackResult:
    """Pack a folder and show progress; see ``pack``."""
    with Progress("files") as progress:
        return pack(
            config.audio_dir,
            config.out,
            sample_rate=config.sample_rate,
            part=(config.part, config.parts),
            workers=config.workers,
            force=config.force,
            progress=lambda done, total, seconds: progress.show(done, f"{seconds / 3600:.2f} h of audio", total),
        )


def pack(
    source: Paths | Source,
    out: str | Path,
    *,
    sample_rate: int = 16000,
    part: tuple[int, int] = (0, 1),
    workers: int | None = None,
    force: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> PackResult:
    """Decode all clips of a source, or one part of them, into a packed store: ``round(32768 * wav)``, clipped to int16.

    If packing stops at any moment, even by ``kill -9``, an existing store stays complete. A part that was packed from
    the same files (by name, size and modification time; your own source by its listing alone) by the same decoders is
    not packed again, unless a file that was broken can now be read. If a file cannot be read, is empty, or holds NaN,
    infinity or samples beyond 2^20 times full scale, the logger ``byola_fast`` warns and the store records it. Short
    files are not padded.

    Args:
        source: a folder, with all its subfolders, a file, a manifest, or a list of these (see ``list_clips``); or your
            own ``Source`` with a method ``whole(index)``, whose clips have the rate ``sample_rate``.
        out: folder of the store; created if it does not exist.
        sample_rate: rate of the store, in Hz.
        part: (number from 0, number of parts) = (p, n): packs files p, p + n, p + 2n, ... of the sorted list.
        workers: processes that decode; by default one fewer than the CPU cores, at most 8; 0 decodes in this process.
        force: pack even if nothing has changed.
        progress: called with (files done, files in total, seconds of audio).

    Raises:
        FileNotFoundError: no such folder. AudioError: it holds no audio file, or no file can be read.
        StoreError: ``out`` cannot be written or is full; another process is packing this part; ``out`` holds a store
            of another number of parts.
        ChildProcessError: a worker process was killed.
        ValueError: ``sample_rate``, ``part`` or ``workers`` is out of range.
    """
    out, (number, parts) = Path(out), part
    if not 1 <= sample_rate <= MAX_RATE:
        raise ValueError(f"sample_rate: expected 1 to {MAX_RATE} Hz, got {sample_rate}")
    if not 0 <= number < parts:
        raise ValueError(f"part: expected 0 to parts - 1, got part {number} of {parts}")
    workers = num_workers(workers)
    clips: Any = open_clips(source, sample_rate=sample_rate) if is_paths(source) else OwnSource(source, "whole")
    names, checksum, count = clips.names, clips.listing, len(clips)
    if isinstance(source, str | Path) and Path(source).is_dir():
        names = [path.relative_to(source).as_posix() for path in clips.files]
    part_names, indices, decode = names[number::parts], range(number, count, parts), partial(_decode, clips)
    if not force and (
        header := _unchanged(out / f"{part_name(number, parts)}.json", sample_rate, checksum, clips, indices)
    ):
        if old_data(out, header):
            with PartWriter(out, number, parts) as writer:
                writer.remove_old(header)
        return _result(out, header, True)

    offsets, broken, clipped, clipped_names = [0], {}, 0, []
    sources: list[tuple[int, int]] = []
    decoding = read_in_processes(decode, indices, workers)
    with PartWriter(out, number, parts) as writer, closing(decoding) as decoded:
        for name, (wav, num_clipped, state) in zip(part_names, decoded, strict=True):
            if isinstance(wav, AudioError):
                broken[name] = wav.reason
                logger.warning("skipping %s", wav)
            else:
                writer.write(wav)
            clipped += num_clipped
            clipped_names += [name] if num_clipped else []
            offsets.append(writer.samples)
            sources.append(state)
            if progress is not None:
                progress(len(sources), len(indices), writer.samples / sample_rate)
        if len(broken) == count:
            reason = f"{broken[part_names[0]]} (none of {count} files can be read)"
            raise AudioError(clips.files[0] if is_paths(source) else names[0], reason)
        header = writer.finish(
            part=number,
            parts=parts,
            sample_rate=sample_rate,
            files=count,
            listing_sha256=checksum,
            clipped=clipped,
            names=part_names,
            offsets=offsets,
            source_bytes=[size for size, _time in sources],
            source_times=[time for _size, time in sources],
            broken=broken,
            decoders=decoders(versions=False),
        )
    if clipped:
        message = "%d samples of %d files were clipped to full scale: %s"
        logger.warning(message, clipped, len(clipped_names), some_of(clipped_names))
    return _result(out, header, False)


def _result(out: Path, header: PartHeader, unchanged: bool) -> PackResult:
    seconds = header.samples / header.sample_rate
    return PackResult(out, len(header.names), header.broken, seconds, header.clipped, unchanged)


def _unchanged(path: Path, sample_rate: int, listing_sha256: str, clips: Any, indices: range) -> PartHeader | None:
    """Return the header of an existing part if packing now would give the same; else None."""
    if not path.exists():
        return None
    try:
        header = read_header(path)
    except StoreError as error:
        logger.warning("packing again: %s", error)
        return None
    now = (sample_rate, listing_sha256, decoders(versions=False))
    if (header.sample_rate, header.listing_sha256, header.decoders) != now:
        return None
    if _sources(header) != [clips.state(index) for index in indices]:
        return None
    broken = [index for name, index in zip(header.names, indices, strict=True) if name in header.broken]
    return header if all(isinstance(_decode(clips, index)[0], AudioError) for index in broken) else None


def _sources(header: PartHeader) -> list[tuple[int, int]]:
    return list(zip(header.source_bytes, header.source_times, strict=True))


Decoded = tuple["npt.NDArray[np.int16] | AudioError", int, tuple[int, int]]


def _decode(clips: Any, index: int) -> Decoded:
    """Return a whole clip as int16 (or its error), the number of samples beyond full scale, and its file's state."""
    import numpy as np

    state, clipped = clips.state(index), 0
    parts: list[npt.NDArray[np.int16]] = []
    try:
        for block in clips.whole(index):
            wav = block.numpy()
            clipped += int(np.count_nonzero(np.abs(wav) > 1))
            parts.append(np.rint(wav * 32768).clip(-32768, 32767).astype(np.int16))
    except AudioError as error:
        return error, 0, state
    return np.concatenate(parts), clipped, state
