"""Random segments of audio files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from byola_fast.audio.decoding import AudioFile
from byola_fast.audio.reading import listing_checksum, num_resampled, read_audio, read_part
from byola_fast.ops.philox import segment_u24

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


class SegmentFolder:
    """Read random segments of audio files, decoding little more than the segment. ``Batches`` makes batches of them.

    The segment depends on (seed, epoch, index, draw) alone, not on workers, ranks or order. Starts lie on the resampled
    grid, at most 2^24 different ones in a file (the samples of 17 minutes at 16 kHz). Clips shorter than a segment are
    centred in zeros.

    Args:
        files: audio files, at least one, such as ``list_audio_files`` returns.
        unit_sec: length of a segment, in seconds, above 0; 0.95 s at 16 kHz are 15200 samples.
        sample_rate: rate of the segments, in Hz.
        seed: key of the random numbers.

    Attributes:
        num_samples: length of a segment, in samples.
        listing: checksum of the names of all files, relative to their common folder.

    Raises:
        ValueError: no files, or ``unit_sec`` or ``sample_rate`` out of range.
    """

    def __init__(
        self, files: Sequence[str | Path], *, unit_sec: float = 0.95, sample_rate: int = 16000, seed: int = 0
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

    @property
    def listing(self) -> str:
        return listing_checksum(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, epoch: int, draw: int = 0) -> torch.Tensor:
        """Return a segment ``(num_samples,)`` float32 of one file.

        Args:
            index: number of the file, 0 to ``len(folder) - 1``.
            epoch: at least 0.
            draw: number of the segment within its file and epoch.

        Raises:
            AudioError: the file cannot be read, or holds NaN or infinity in this segment.
        """
        return self._segment(self.files[index], segment_u24(self.seed, epoch, index, draw))

    def _segment(self, path: Path, u24: int) -> torch.Tensor:
        with AudioFile(path) as file:
            samples = num_resampled(file.frames, file.rate, self.sample_rate)
            if samples > self.num_samples:
                start = _segment_start(samples, self.num_samples, u24)
                return read_part(file, self.sample_rate, start, self.num_samples)
        return fit_segment(read_audio(path, self.sample_rate), self.num_samples, u24)
