"""Find audio files, and read any part of one as mono at any rate; soxr resamples."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path

import torch

from byola_fast.audio.decoding import (
    AUDIO_FORMATS,
    FFMPEG_FORMATS,
    MORE_FORMATS,
    UNKNOWN_FRAMES,
    AudioError,
    AudioFile,
    has_ffmpeg,
)
from byola_fast.audio.store_format import is_store
from byola_fast.runtime.files import some_of

__all__ = ["AudioError", "audio_duration", "list_audio_files", "listing_checksum", "read_audio", "read_blocks"]

logger = logging.getLogger("byola_fast")


def list_audio_files(root: str | Path) -> list[Path]:
    """List the audio files in a folder and its subfolders, sorted; a file is returned as it is.

    Args:
        root: a folder (links are followed, each folder is listed once), or a file of any name.

    Returns:
        Paths that begin with ``root``. Hidden files and folders are left out, and files of other suffixes (in any case)
        than ``AUDIO_FORMATS`` and, with FFmpeg, ``FFMPEG_FORMATS``. The order depends on the names alone.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        AudioError: the folder holds no audio file.
    """
    root = Path(root)
    if not root.is_dir():
        if root.exists():
            return [root]
        raise FileNotFoundError(f"no such file or folder: {root}")
    formats, others = AUDIO_FORMATS.split(), FFMPEG_FORMATS.split()
    if has_ffmpeg():
        formats, others = formats + others, []
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()  # a link may lead back to a folder above it
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_report_folder):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            suffix = path.suffix.lower().lstrip(".")
            if suffix in formats:
                files.append(path)
            else:
                left_out[suffix or "no suffix"] += 1
    if not files and is_store(root):
        raise AudioError(root, "a packed store, which pretrain and stats read; give the folder that it was packed from")
    if left_out:
        kinds = some_of([f"{count} {suffix}" for suffix, count in left_out.most_common()])
        unread = left_out.keys() & set(others)
        message = f"%s: {left_out.total()} files left out for their suffix: %s" + (
            f" ({MORE_FORMATS})" if unread else ""
        )
        logger.log(logging.WARNING if unread else logging.INFO, message, root, kinds)
    if not files:
        raise AudioError(root, f"no audio file in this folder (looked for {' '.join(formats)})")
    return sorted(files)


def relative_names(files: Sequence[str | Path]) -> list[str]:
    """Return the names of files relative to their common folder."""
    names = [os.path.abspath(path) for path in files]
    root = os.path.commonpath({os.path.dirname(name) for name in names})
    return [name[len(root) :].lstrip("/") for name in names]


def listing_checksum(names: Sequence[str]) -> str:
    """Return the checksum of the names of clips; it shows whether a corpus has changed."""
    return hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()


def _report_folder(error: OSError) -> None:
    logger.warning("skipping folder %s: %s", error.filename, error.strerror)


def audio_duration(path: str | Path | bytes) -> float:
    """Return the length of an audio file in seconds: of what ``read_audio`` reads, whatever the header promises.

    A file whose length neither its size nor its structure proves (FLAC, floats, damage) is decoded once.

    Raises:
        AudioError: as ``read_audio``.
    """
    with AudioFile(path) as file:
        return file.frames / file.rate


def read_audio(
    path: str | Path | bytes, sample_rate: int = 16000, *, start_sec: float = 0.0, duration_sec: float | None = None
) -> torch.Tensor:
    """Read an audio file, or a part of it, as a mono waveform at ``sample_rate``.

    Channels are averaged, then resampled by soxr (quality HQ). Only the needed part is decoded, with a margin for the
    resampling filter, on the time grid of the whole file: a part equals the same slice of the whole.

    Args:
        path: a file, or its content as bytes; any that libsndfile reads (wav, flac, ogg, opus, mp3, aiff and more), or
            that FFmpeg reads if the package av is installed (m4a, aac, webm, wma, ALAC and more); of several tracks the
            first. Joined files, and files whose header is wrong, are read to their end; if a decoder cannot, the logger
            ``byola_fast`` warns with the length read.
        sample_rate: rate of the result, in Hz.
        start_sec: start of the part, in seconds, at least 0; rounded to a sample of the result.
        duration_sec: length of the part, in seconds, above 0; None reads to the end.

    Shape:
        ``(samples,)`` float32, nominally in [-1, 1]; shorter than ``duration_sec`` if the file ends sooner. A truncated
        file is read as far as it can be decoded.

    Raises:
        AudioError: the file is missing, unreadable, empty or not a regular file (a pipe, a device); nothing of the part
            can be decoded; the part holds NaN, infinity or samples beyond 2^20 times full scale.
        ValueError: ``sample_rate``, ``start_sec`` or ``duration_sec`` out of range.

    Numerics:
        A part equals the slice of the whole to 1e-6. Opus is the exception: after a seek its decoder settles to about
        5e-3 of full scale. Seeking in a long MP3 makes libmpg123 print harmless notes to stderr. FFmpeg, and files with
        a wrong header, are decoded from the start.
    """
    if sample_rate < 1:
        raise ValueError(f"sample_rate: expected at least 1 Hz, got {sample_rate}")
    if not (start_sec >= 0 and math.isfinite(start_sec)):
        raise ValueError(f"start_sec: expected at least 0 s, got {start_sec}")
    start, count = round(start_sec * sample_rate), None
    if duration_sec is not None:
        if not (math.isfinite(duration_sec) and round(duration_sec * sample_rate) >= 1):
            raise ValueError(f"duration_sec: expected at least one sample (1 / {sample_rate} s), got {duration_sec}")
        count = round(duration_sec * sample_rate)
    with AudioFile(path) as file:
        wav = read_part(file, sample_rate, start, count)
    if not len(wav):
        raise AudioError(file.path, f"nothing can be decoded from {start_sec:g} s on")
    return wav


def read_blocks(path: str | Path, sample_rate: int = 16000, *, block_sec: float = 60.0) -> Iterator[torch.Tensor]:
    """Yield the waveform of ``read_audio`` in consecutive blocks; memory does not grow with the length of the file.

    Args:
        path: as in ``read_audio``.
        sample_rate: rate of the result, in Hz, at least 1.
        block_sec: length decoded at a time, in seconds, above 0; blocks have about this length.

    Shape:
        ``(samples,)`` float32 each, never empty; concatenated they equal ``read_audio(path, sample_rate)``.

    Raises:
        AudioError: as in ``read_audio``; for NaN, infinity or samples beyond 2^20, when their block is reached.
    """
    import numpy as np
    import soxr

    with AudioFile(path) as file:
        rate, found = file.rate, False
        maximum = max(1, round(block_sec * rate))
        resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
        ends = [np.empty(0, np.float32)] if rate != sample_rate else []  # flushes the filter
        for frames in itertools.chain(filter(len, file.blocks(maximum)), ends):
            wav = frames if rate == sample_rate else resampler.resample_chunk(frames, last=not len(frames))
            if len(wav):
                found = True
                yield torch.from_numpy(np.ascontiguousarray(wav))
    if not found:
        raise AudioError(path, "nothing can be decoded")


def resample(wav: torch.Tensor, rate: int, sample_rate: int) -> torch.Tensor:
    """Return waveforms ``(..., samples)`` at another rate, resampled by soxr on the CPU, as ``read_audio`` does.

    Raises:
        ValueError: a rate below 1, or a waveform that requires a gradient.
    """
    if not isinstance(rate, Real) or not 1 <= rate < math.inf:
        raise ValueError(f"sample_rate: expected a number of at least 1 Hz, got {rate!r}")
    if rate == sample_rate:
        return wav
    if wav.requires_grad:
        raise ValueError(f"sample_rate: expected {sample_rate} Hz of a waveform that requires a gradient, got {rate}")
    import soxr

    channels = wav.cpu().to(torch.promote_types(wav.dtype, torch.float32)).reshape(-1, wav.shape[-1]).T
    made = torch.from_numpy(soxr.resample(channels.numpy(), rate, sample_rate, quality="HQ")).T
    return made.reshape(*wav.shape[:-1], -1).to(wav)


def num_resampled(frames: int, rate: int, sample_rate: int) -> int:
    """Return the length of soxr's result: ``frames * sample_rate / rate``, halves rounded up.

    >>> num_resampled(44100, 44100, 16000)
    16000
    """
    return (2 * frames * sample_rate + rate) // (2 * rate)


def read_part(file: AudioFile, sample_rate: int, start: int, count: int | None) -> torch.Tensor:
    """Return samples ``[start, start + count)`` of the resampled mono mix, or fewer if the file ends."""
    import numpy as np
    import soxr

    rate = file.rate
    up, down = sample_rate // math.gcd(rate, sample_rate), rate // math.gcd(rate, sample_rate)
    # The filter spans 92 samples of the lower rate to each side. A part that begins at a multiple of `down` frames has
    # its output samples on the grid of the whole file.
    margin = 0 if up == down else math.ceil(256 * max(1.0, rate / sample_rate))
    first = max(0, (start * down // up - margin) // down * down)
    last = UNKNOWN_FRAMES if count is None else -(-(start + count) * down // up) + margin
    frames = file.read(first, last - first)
    if up != down and len(frames):
        frames = soxr.resample(frames, rate, sample_rate, quality="HQ")
    skip = start - first // down * up
    wav = frames[skip:] if count is None else frames[skip : skip + count]
    return torch.from_numpy(np.ascontiguousarray(wav))
