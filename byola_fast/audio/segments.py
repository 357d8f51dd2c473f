"""Random segments of audio files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from byola_fast.audio.decoding import AudioError, AudioFile
from byola_fast.audio.reading import listing_checksum, num_resampled, read_blocks, read_part, relative_names
from byola_fast.ops.philox import segment_u24
from byola_fast.runtime.files import fingerprint

LONGEST_SAMPLES = 1 << 31  # of a segment: 37 hours at 16 kHz


def fit_segment(wav: torch.Tensor, num_samples: int, u24: int) -> torch.Tensor:
    """Cut a segment from a waveform at a random place, or pad a shorter waveform with zeros on both sides.

    ``start = u24 * (samples - num_samples + 1) >> 24``; a shorter waveform gets ``(num_samples - samples) // 2`` zeros
    in front and the rest behind.

    Args:
        wav: ``(samples,)``.
        num_samples: length of the segment, at least 1.
        u24: the random draw, an integer in [0, 2^24); unused if the waveform is no longer than the segment.

    Shape:
        ``(num_samples,)``; a view of ``wav`` unless padded.

    Raises:
        ValueError: wrong rank, or ``num_samples`` or ``u24`` out of range.

    >>> fit_segment(torch.arange(5), 2, (1 << 24) - 1), fit_segment(torch.ones(2), 5, 0)
    (tensor([3, 4]), tensor([0., 1., 1., 0., 0.]))
    """
    if wav.ndim != 1:
        raise ValueError(f"wav: expected shape (samples,), got {tuple(wav.shape)}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    missing = num_samples - len(wav)
    if missing > 0:
        return torch.nn.functional.pad(wav, (missing // 2, missing - missing // 2))
    start = _segment_start(len(wav), num_samples, u24)
    return wav[start : start + num_samples]


def _segment_start(samples: int, num_samples: int, u24: int) -> int:
    if not 0 <= u24 < 1 << 24:
        raise ValueError(f"u24: expected in [0, 2^24), got {u24}")
    return (u24 * (samples - num_samples + 1)) >> 24


def read_segment(
    audio: str | Path | bytes,
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    index: int,
    draw: int = 0,
    sample_rate: int = 16000,
    part: tuple[float, float | None] = (0.0, None),
) -> torch.Tensor:
    """Read a random segment of an audio file, decoding little more than the segment; for the sources of users too.

    It depends on (seed, epoch, index, draw) alone. Starts lie on the resampled grid, at most 2^24 different ones in a
    file (the samples of 17 minutes at 16 kHz). Shorter audio is centred in zeros.

    Args:
        audio: a file that ``read_audio`` reads, or its bytes.
        num_samples: length of the segment, at least 1.
        seed: key of the random numbers.
        epoch: at least 0.
        index: number of the clip.
        draw: number of the segment within its clip and epoch.
        sample_rate: rate of the segment, in Hz.
        part: start and end, in seconds, of what the segment is taken from; no end is the end of the file.

    Shape:
        ``(num_samples,)`` float32.

    Raises:
        AudioError: the file cannot be read, ends before the part, or holds NaN or infinity in this segment.
    """
    u24 = segment_u24(seed, epoch, index, draw)
    with AudioFile(audio) as file:
        first, last = _part(file, sample_rate, part)
        if last - first > num_samples:
            start = first + _segment_start(last - first, num_samples, u24)
            return read_part(file, sample_rate, start, num_samples)
        whole = part == (0.0, None)  # whose end is certain only once it is decoded
        wav = read_part(file, sample_rate, first, None if whole else last - first)
    if not len(wav):
        raise AudioError(file.path, f"nothing can be decoded from {part[0]:g} s on")
    return fit_segment(wav, num_samples, u24)


def _part(file: AudioFile, sample_rate: int, part: tuple[float, float | None]) -> tuple[int, int]:
    """Return the first sample of a part and the one after its last."""
    samples = num_resampled(file.frames, file.rate, sample_rate)
    first = round(part[0] * sample_rate)
    last = samples if part[1] is None else min(samples, round(part[1] * sample_rate))
    if first and first >= last:
        raise AudioError(file.path, f"nothing from {part[0]:g} s on: it has {samples / sample_rate:.2f} s")
    return first, last


class SegmentFolder:
    """Read random segments of audio files, as ``read_segment``. ``Batches`` makes batches of them.

    Args:
        files: audio files, at least one, such as ``list_audio_files`` returns.
        unit_sec: length of a segment, in seconds, above 0; 0.95 s at 16 kHz are 15200 samples.
        sample_rate: rate of the segments, in Hz.
        seed: key of the random numbers.
        parts: start and end of each clip, in seconds; by default clips are whole files.

    Attributes:
        num_samples: length of a segment, in samples.

    Raises:
        ValueError: no files, or ``unit_sec`` or ``sample_rate`` out of range.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        *,
        unit_sec: float = 0.95,
        sample_rate: int = 16000,
        seed: int = 0,
        parts: Sequence[tuple[float, float | None]] | None = None,
    ) -> None:
        self.files = [Path(path) for path in files]
        if not self.files:
            raise ValueError("files: expected at least one audio file, got none")
        if sample_rate < 1:
            raise ValueError(f"sample_rate: expected at least 1 Hz, got {sample_rate}")
        if not 0.5 < unit_sec * sample_rate < LONGEST_SAMPLES:
            raise ValueError(f"unit_sec: expected 1 to 2^31 samples (1 / {sample_rate} s each), got {unit_sec}")
        self.num_samples = round(unit_sec * sample_rate)
        self.sample_rate = sample_rate
        self.seed = seed
        self.parts = parts

    @property
    def names(self) -> list[str]:
        """The names of all clips, relative to their common folder; of a part, with its start and end."""
        names = relative_names(self.files)
        if self.parts is None:
            return names
        spans = (f"{start:g}-{'' if end is None else f'{end:g}'}" for start, end in self.parts)
        return [f"{name}#{span}" for name, span in zip(names, spans, strict=True)]

    @property
    def listing(self) -> str:
        """The checksum of ``names``, which tells of changed data."""
        return listing_checksum(self.names)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, epoch: int, draw: int = 0) -> torch.Tensor:
        """Return a segment ``(num_samples,)`` float32 of one clip.

        Args:
            index: number of the clip, 0 to ``len(folder) - 1``.
            epoch: at least 0.
            draw: number of the segment within its clip and epoch.

        Raises:
            AudioError: as ``read_segment``.
        """
        where: dict[str, int] = {"seed": self.seed, "epoch": epoch, "index": index, "draw": draw}
        part, rate = self._part(index), self.sample_rate
        return read_segment(self.files[index], self.num_samples, **where, sample_rate=rate, part=part)

    def seconds(self, index: int) -> float:
        """Return the duration of a clip.

        Raises:
            AudioError: the file cannot be read.
        """
        with AudioFile(self.files[index]) as file:
            first, last = _part(file, self.sample_rate, self._part(index))
        return (last - first) / self.sample_rate

    def whole(self, index: int) -> Iterator[torch.Tensor]:
        """Yield all of a clip in blocks, float32.

        Raises:
            AudioError: the file cannot be read.
        """
        part = self._part(index)
        if part == (0.0, None):  # float32 of a whole file may not fit in memory
            yield from read_blocks(self.files[index], self.sample_rate)
            return
        with AudioFile(self.files[index]) as file:
            first, last = _part(file, self.sample_rate, part)
            yield read_part(file, self.sample_rate, first, last - first)

    def state(self, index: int) -> tuple[int, int]:
        """Return size and modification time of a clip's file; ``pack`` compares them."""
        return fingerprint(self.files[index])

    def _part(self, index: int) -> tuple[float, float | None]:
        return (0.0, None) if self.parts is None else self.parts[index]
