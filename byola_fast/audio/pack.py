"""Packing: every file of a folder decoded once, into a store that gives segments without decoding."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from byola_fast.audio.reading import AudioError, list_audio_files, listing_checksum, read_audio
from byola_fast.audio.store_format import PartHeader, PartWriter, StoreError, old_data, part_name, read_header
from byola_fast.runtime.files import fingerprint
from byola_fast.runtime.progress import Progress
from byola_fast.runtime.workers import num_workers, read_in_processes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("byola_fast")


@dataclass
class PackConfig:
    """Settings of packing a folder.

    Attributes:
        audio_dir: folder of audio files (wav, flac, ogg, opus, mp3 and more; any rate and channel count), or one file.
        out: folder that the store is written to; what was packed there before stays until the new one is whole.
        sample_rate: rate that audio is resampled to, in Hz. A store holds 2 bytes a sample: 115 MB an hour at 16 kHz.
        part: number of the part to pack, from 0; other processes or machines pack the others into the same folder.
        parts: how many parts make the store; files are dealt out to them by their place in the sorted list.
        workers: processes that decode; by default as many as there are CPU cores less one, at most 8.
        force: pack again although no file has changed since this part was packed.
    """

    audio_dir: str
    out: str
    sample_rate: int = 16000
    part: int = 0
    parts: int = 1
    workers: int | None = None
    force: bool = False


class PackResult(NamedTuple):
    """What a part of a store holds.

    Attributes:
        out: the folder.
        files: audio files of this part.
        broken: those of them that gave no samples, and why.
        seconds: of audio.
        clipped: samples that were beyond full scale and are held at it.
        unchanged: whether the part was there already, packed from the same files.
    """

    out: Path
    files: int
    broken: dict[str, str]
    seconds: float
    clipped: int
    unchanged: bool


def run_pack(config: PackConfig) -> PackResult:
    """Pack a folder, showing progress; see ``pack``."""
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
    audio_dir: str | Path,
    out: str | Path,
    *,
    sample_rate: int = 16000,
    part: tuple[int, int] = (0, 1),
    workers: int | None = None,
    force: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> PackResult:
    """Decode every file of a folder, or of a part of it, into a packed store: ``round(32768 * wav)``, held in int16.

    Whatever stops it, even ``kill -9``, the store that was there before stays whole. A part that was packed from the
    same files (by name, size and time of change) is left as it is. A file that cannot be read, is empty or holds NaN or
    infinity is reported by the logger ``byola_fast`` and recorded; short files are kept as they are.

    Args:
        audio_dir: a folder, with all its subfolders, or a file.
        out: folder of the store; made where it does not exist.
        sample_rate: in Hz.
        part: (number from 0, of how many): files number, number + how many, ... of the sorted list.
        workers: processes that decode; by default as many as there are CPU cores less one, at most 8; 0 decodes in this
            one.
        force: pack although nothing has changed.
        progress: called with (files done, of how many, seconds of audio).

    Raises:
        FileNotFoundError: no such folder. AudioError: no audio file in it, or not one of them can be read.
        StoreError: ``out`` cannot be written or is full; another process is packing this part; ``out`` holds a store
            of another number of parts.
        ChildProcessError: a process that decodes was killed.
        ValueError: ``sample_rate``, ``part`` or ``workers`` out of range.
    """
    audio_dir, out, (number, parts) = Path(audio_dir), Path(out), part
    if sample_rate < 1:
        raise ValueError(f"sample_rate: expected at least 1 Hz, got {sample_rate}")
    if not 0 <= number < parts:
        raise ValueError(f"part: expected 0 to parts - 1, got part {number} of {parts}")
    workers = num_workers(workers)
    listing = list_audio_files(audio_dir)
    root = audio_dir if audio_dir.is_dir() else audio_dir.parent
    names = [path.relative_to(root).as_posix() for path in listing]
    checksum, own, files = listing_checksum(listing), names[number::parts], listing[number::parts]
    if not force and (header := _unchanged(out / f"{part_name(number, parts)}.json", sample_rate, checksum, files)):
        if old_data(out, header):
            with PartWriter(out, number, parts) as writer:
                writer.remove_old(header)
        return _result(out, header, True)

    offsets, broken, clipped = [0], {}, 0
    sources: list[tuple[int, int]] = []
    decoding = read_in_processes(partial(_decode, sample_rate=sample_rate), files, workers)
    with PartWriter(out, number, parts) as writer, closing(decoding) as decoded:
        for name, (wav, beyond, source) in zip(own, decoded, strict=True):
            if isinstance(wav, AudioError):
                broken[name] = wav.reason
                logger.warning("skipping %s", wav)
            else:
                writer.write(wav)
            clipped += beyond
            offsets.append(writer.samples)
            sources.append(source)
            if progress is not None:
                progress(len(sources), len(files), writer.samples / sample_rate)
        if len(broken) == len(listing):
            reason = f"{broken[own[0]]} (none of {len(listing)} files can be read)"
            raise AudioError(listing[0], reason)
        header = writer.finish(
            part=number,
            parts=parts,
            sample_rate=sample_rate,
            files=len(listing),
            listing_sha256=checksum,
            clipped=clipped,
            names=own,
            offsets=offsets,
            source_bytes=[size for size, _time in sources],
            source_times=[time for _size, time in sources],
            broken=broken,
        )
    if clipped:
        logger.warning("%d samples were beyond full scale and are held at it", clipped)
    return _result(out, header, False)


def _result(out: Path, header: PartHeader, unchanged: bool) -> PackResult:
    seconds = header.samples / header.sample_rate
    return PackResult(out, len(header.names), header.broken, seconds, header.clipped, unchanged)


def _unchanged(path: Path, sample_rate: int, listing_sha256: str, files: list[Path]) -> PartHeader | None:
    """Return the header of a part that is there already, packed as it would be now; else None."""
    if not path.exists():
        return None
    try:
        header = read_header(path)
    except StoreError as error:
        logger.warning("packing again: %s", error)
        return None
    same = (header.sample_rate, header.listing_sha256) == (sample_rate, listing_sha256)
    return header if same and _sources(header) == [fingerprint(file) for file in files] else None


def _sources(header: PartHeader) -> list[tuple[int, int]]:
    return list(zip(header.source_bytes, header.source_times, strict=True))


Decoded = tuple["npt.NDArray[np.int16] | AudioError", int, tuple[int, int]]


def _decode(file: Path, sample_rate: int) -> Decoded:
    """Return a whole file as int16 or an error, the number of samples beyond full scale, and its fingerprint."""
    import numpy as np

    source = fingerprint(file)
    try:
        wav = read_audio(file, sample_rate).numpy()
    except AudioError as error:
        return error, 0, source
    beyond = int(np.count_nonzero(np.abs(wav) > 1))
    return np.rint(wav * 32768).clip(-32768, 32767).astype(np.int16), beyond, source
