"""Find audio files, and read any part of one as mono at any rate.

soundfile (libsndfile) decodes and soxr resamples; both are imported on first use.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from byola_fast.audio.store_format import is_store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import soundfile

logger = logging.getLogger("byola_fast")

AUDIO_FORMATS = "wav wave rf64 w64 flac ogg oga opus mp3 mp2 aif aiff aifc au snd caf voc sph"
SUFFIXES = frozenset("." + name for name in AUDIO_FORMATS.split())
BLOCK_FRAMES = 1 << 22  # decoded at a time: a long file takes the memory of its mono mix alone
OGG_PAGE_FRAMES = 1 << 18  # an Ogg page holds at most 255 packets; Vorbis encoders write 1024 frames in each
MP3_SEEK_FRAMES = 1 << 18  # decoding this many takes milliseconds
UNKNOWN_FRAMES = 1 << 60  # libsndfile returns 2^63 - 1 if the header has no length (FLAC from a pipe)


class AudioError(ValueError):
    """An audio file cannot be used. The message names the file and the reason.

    Attributes:
        path: the file.
        reason: the reason, without the name.

    >>> print(AudioError(Path("a.wav"), "empty file (0 bytes)"))
    a.wav: empty file (0 bytes)
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # both: pickling, on the way from a worker, passes them to __init__
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def list_audio_files(root: str | Path) -> list[Path]:
    """List the audio files in a folder and its subfolders, sorted; a file is returned as it is.

    Args:
        root: a folder (links are followed, each folder is listed once), or a file of any name.

    Returns:
        Paths that begin with ``root``. Hidden files and folders, and files without one of ``SUFFIXES`` (in any case),
        are left out. The order depends on the names alone.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        AudioError: the folder holds no audio file.
    """
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"no such file or folder: {root}")
    files: list[Path] = []
    visited: set[tuple[int, int]] = set()  # a link may lead back to a folder above it
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_report_folder):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        audio = (Path(folder, name) for name in names if not name.startswith("."))
        files += [path for path in audio if path.suffix.lower() in SUFFIXES]
    if not files and is_store(root):
        raise AudioError(root, "a packed store, which pretrain and stats read; give the folder that it was packed from")
    if not files:
        raise AudioError(root, f"no audio file in this folder (looked for {AUDIO_FORMATS})")
    return sorted(files)


def listing_checksum(files: Sequence[str | Path]) -> str:
    """Return the checksum of file names relative to their common folder; it shows whether a corpus has changed."""
    names = [os.path.abspath(path) for path in files]
    root = os.path.commonpath({os.path.dirname(name) for name in names})
    return hashlib.sha256(b"\0".join(os.fsencode(name[len(root) :].lstrip("/")) for name in names)).hexdigest()


def _report_folder(error: OSError) -> None:
    logger.warning("skipping folder %s: %s", error.filename, error.strerror)


def audio_duration(path: str | Path) -> float:
    """Return the length of an audio file in seconds, from its header alone.

    A truncated file may hold less than its header says. A file is decoded only if its header has no length (a FLAC
    written to a pipe).

    Raises:
        AudioError: the file is missing, unreadable or empty.
    """
    with _open(path) as file:
        return _num_frames(file) / int(file.samplerate)


def read_audio(
    path: str | Path, sample_rate: int = 16000, *, start_sec: float = 0.0, duration_sec: float | None = None
) -> torch.Tensor:
    """Read an audio file, or a part of it, as a mono waveform at ``sample_rate``.

    Channels are averaged, then resampled by soxr (quality HQ). Only the needed part is decoded, with a margin for the
    resampling filter, on the time grid of the whole file: a part equals the same slice of the whole.

    Args:
        path: any file that libsndfile reads (wav, flac, ogg, opus, mp3, aiff and more).
        sample_rate: rate of the result, in Hz.
        start_sec: start of the part, in seconds, at least 0; rounded to a sample of the result.
        duration_sec: length of the part, in seconds, above 0; None reads to the end.

    Shape:
        ``(samples,)`` float32, nominally in [-1, 1]; shorter than ``duration_sec`` if the file ends sooner. A truncated
        file is read as far as it can be decoded.

    Raises:
        AudioError: the file is missing, unreadable or empty, nothing of the part can be decoded, or the part holds NaN
            or infinity.
        ValueError: ``sample_rate``, ``start_sec`` or ``duration_sec`` out of range.

    Numerics:
        A part equals the slice of the whole to 1e-6. Opus is the exception: after a seek its decoder settles to about
        5e-3 of full scale. Seeking in a long MP3 makes libmpg123 print harmless notes to stderr.
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
    with _open(path) as file:
        wav = _read_part(file, sample_rate, start, count)
    if not len(wav):
        raise AudioError(path, f"nothing can be decoded from {start_sec:g} s on")
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
        AudioError: as in ``read_audio``; for NaN or infinity, when their block is reached.
    """
    import numpy as np
    import soxr

    with _open(path) as file:
        rate, found = int(file.samplerate), False
        maximum = max(1, round(block_sec * rate))
        resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
        ends = [np.empty(0, np.float32)] if rate != sample_rate else []  # flushes the filter
        blocks = filter(len, _mono_blocks(file, UNKNOWN_FRAMES, maximum))
        for frames in itertools.chain(blocks, ends):
            if not np.isfinite(frames).all():
                raise AudioError(path, "NaN or infinite samples")
            wav = frames if rate == sample_rate else resampler.resample_chunk(frames, last=not len(frames))
            if len(wav):
                found = True
                yield torch.from_numpy(np.ascontiguousarray(wav))
    if not found:
        raise AudioError(path, "nothing can be decoded")


def _open(path: str | Path) -> soundfile.SoundFile:
    """Open a file that has samples, or raise an AudioError with the reason."""
    import soundfile

    try:
        with open(path, "rb") as raw:
            if not raw.read(1):
                raise AudioError(path, "empty file (0 bytes)")
        file = soundfile.SoundFile(os.fsencode(path))  # bytes: a name need not be UTF-8
    except OSError as error:
        raise AudioError(path, error.strerror or str(error)) from error
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a .raw file, which has no header
        raise AudioError(path, "not audio that libsndfile can read") from error
    if file.frames < 1:
        file.close()
        raise AudioError(path, "the file holds no samples")
    return file


def _num_frames(file: soundfile.SoundFile) -> int:
    """Number of frames: from the header, or by decoding if the header has no length."""
    if file.frames < UNKNOWN_FRAMES:
        return int(file.frames)
    with _open(os.fsdecode(file.name)) as again:
        return len(_decode(again, 0, UNKNOWN_FRAMES))


def _num_resampled(frames: int, rate: int, sample_rate: int) -> int:
    """Length of soxr's result: ``frames * sample_rate / rate``, halves rounded up."""
    return (2 * frames * sample_rate + rate) // (2 * rate)


def _read_part(file: soundfile.SoundFile, sample_rate: int, start: int, count: int | None) -> torch.Tensor:
    """Samples ``[start, start + count)`` of the resampled mono mix, or fewer if the file ends."""
    import numpy as np
    import soxr

    rate = int(file.samplerate)
    up, down = sample_rate // math.gcd(rate, sample_rate), rate // math.gcd(rate, sample_rate)
    # The filter spans 92 samples of the lower rate to each side. A part that begins at a multiple of `down` frames has
    # its output samples on the grid of the whole file.
    margin = 0 if up == down else math.ceil(256 * max(1.0, rate / sample_rate))
    first = max(0, (start * down // up - margin) // down * down)
    last = UNKNOWN_FRAMES if count is None else -(-(start + count) * down // up) + margin
    frames = _decode(file, first, min(last, int(file.frames)) - first)
    if not np.isfinite(frames).all():
        raise AudioError(os.fsdecode(file.name), "NaN or infinite samples")
    if up != down and len(frames):
        frames = soxr.resample(frames, rate, sample_rate, quality="HQ")
    skip = start - first // down * up
    wav = frames[skip:] if count is None else frames[skip : skip + count]
    return torch.from_numpy(np.ascontiguousarray(wav))


def _decode(file: soundfile.SoundFile, start: int, count: int) -> npt.NDArray[np.floating[Any]]:
    """Frames ``[start, start + count)`` mixed to mono, float32, as far as decoding succeeds."""
    import numpy as np
    import soundfile

    first = _seek_point(file, start)
    if first > 0:
        try:
            file.seek(first)
        except soundfile.SoundFileError:  # damaged, or cut short: decode from the beginning
            with _open(os.fsdecode(file.name)) as again:
                return _decode(again, 0, start + count)[start:]
    blocks = [np.empty(0, np.float32), *_mono_blocks(file, start + count - first, BLOCK_FRAMES)]
    return np.concatenate(blocks)[start - first :]


def _mono_blocks(file: soundfile.SoundFile, wanted: int, maximum: int) -> Iterator[npt.NDArray[np.floating[Any]]]:
    """The next ``wanted`` frames mixed to mono, at most ``maximum`` at a time, as far as decoding succeeds."""
    import numpy as np
    import soundfile

    # After every read of a seekable file, soundfile seeks to its position, and an MP3 decoder loses its bit reservoir.
    file.seekable = lambda: False
    while wanted > 0:
        block = np.full((min(wanted, maximum), file.channels), np.nan, np.float32)
        try:
            got = len(file.read(out=block))
        except soundfile.SoundFileError:  # the file breaks off inside this block, which holds the decoded frames
            got = int(np.count_nonzero(~np.isnan(block[:, -1])))
            wanted = 0
        yield block[:got].mean(axis=1)
        wanted = wanted - got if got == len(block) else 0


def _seek_point(file: soundfile.SoundFile, start: int) -> int:
    """The frame to seek to, at or before ``start``, so that decoding is correct from ``start`` on."""
    if "VORBIS" in file.subtype:  # in the last page libsndfile 1.2 seeks a block too far (its issue 885)
        return max(0, min(start, int(file.frames) - OGG_PAGE_FRAMES))
    if "MPEG" in file.subtype and start < MP3_SEEK_FRAMES:  # a seek makes libmpg123 write to stderr
        return 0
    if "OPUS" in file.subtype or "MPEG" in file.subtype:  # half a second for the decoder to settle
        return max(0, start - int(file.samplerate) // 2)
    return start
