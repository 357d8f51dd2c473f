"""A picture of what the augmentation does to some audio: original, partner, mix and both views."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from byola_fast.audio.reading import AudioError, audio_duration, list_audio_files, read_audio
from byola_fast.audio.segments import LONGEST_SAMPLES, SegmentFolder, fit_segment
from byola_fast.spectrograms.log_mel import LogMel
from byola_fast.views.explain import explain_views
from byola_fast.views.pictures import draw_views

logger = logging.getLogger("byola_fast")

LOWEST_HZ = 60.0
BATCH = 16  # segments that partners are chosen from


def show(
    path: str | Path,
    out: str | Path,
    *,
    samples: int | None = None,
    preset: str = "byola-v1",
    interpolation: str = "bilinear",
    unit_sec: float = 0.95,
    sample_rate: int = 16000,
    seed: int = 0,
) -> Path:
    """Draw what ``augment`` does to segments of a recording, or of some recordings of a folder.

    Args:
        path: an audio file, whose segments are each other's partners, or a folder.
        out: picture to write.
        samples: how many segments to draw; 1 of a file and 3 of a folder by default.
        preset: "byola-v1" or "byola-v2".
        interpolation: "bilinear" or "bicubic".
        unit_sec: length of a segment, in seconds.
        sample_rate: in Hz.
        seed: picks files, segments and parameters; the same seed draws the same picture.

    Returns:
        ``out``, as a path.

    Raises:
        FileNotFoundError: no such file or folder. AudioError: nothing there can be read. ImportError: no matplotlib.
        ValueError: settings out of range.
    """
    path = Path(path)
    samples = (3 if path.is_dir() else 1) if samples is None else samples
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if sample_rate <= 2 * LOWEST_HZ:
        raise ValueError(f"sample_rate: expected more than {2 * LOWEST_HZ:g} Hz, got {sample_rate}")
    to_lms = LogMel(sample_rate=sample_rate, f_min=LOWEST_HZ, f_max=min(7800.0, sample_rate / 2))
    shortest = to_lms.n_fft // 2 + 1
    if not shortest <= unit_sec * sample_rate < LONGEST_SAMPLES:
        message = f"expected at least {shortest} samples (1 / {sample_rate} s each) and fewer than 2^31"
        raise ValueError(f"unit_sec: {message}, got {unit_sec}")
    pick = _segments_of_folder if path.is_dir() else _segments_of_file
    names, wavs = pick(path, max(samples, BATCH), unit_sec, sample_rate, seed)
    lms = to_lms(torch.stack(wavs))
    panels = explain_views(lms, names, samples=samples, preset=preset, interpolation=interpolation, seed=seed)
    title = f"{path.name or path.resolve().name}   ({preset}, {interpolation}, seed {seed})"
    draw_views(out, panels, title=title, to_lms=to_lms)
    return Path(out)


def _segments_of_file(
    path: Path, count: int, unit_sec: float, sample_rate: int, seed: int
) -> tuple[list[str], list[Tensor]]:
    """Return names and waveforms of up to ``count`` of one file's neighbouring segments, in random order."""
    whole = max(1, int(audio_duration(path) / unit_sec + 1e-6))
    names, wavs = [], []
    for number in _shuffled(whole, seed)[:count]:
        start_sec = number * unit_sec
        wav = read_audio(path, sample_rate, start_sec=start_sec, duration_sec=unit_sec)
        names.append(f"{path.name} at {start_sec:.2f} s" if whole > 1 else path.name)
        wavs.append(fit_segment(wav, round(unit_sec * sample_rate), 0))
    return names, wavs


def _segments_of_folder(
    folder: Path, count: int, unit_sec: float, sample_rate: int, seed: int
) -> tuple[list[str], list[Tensor]]:
    """Return names and waveforms of random segments of up to ``count`` random files."""
    source = SegmentFolder(list_audio_files(folder), unit_sec=unit_sec, sample_rate=sample_rate, seed=seed)
    names, wavs = [], []
    for index in _shuffled(len(source), seed):
        try:
            wavs.append(source.read(index, 0))
        except AudioError as error:
            logger.warning("skipping %s", error)
            continue
        names.append(source.files[index].name)
        if len(names) == count:
            break
    if not names:
        raise AudioError(folder, f"none of {len(source)} audio files can be read")
    return names, wavs


def _shuffled(count: int, seed: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    order: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return order


@dataclass
class ShowConfig:
    """Settings of a picture of views.

    Attributes:
        out: picture to write; its suffix is the format (png, pdf, svg).
        samples: number of segments to draw; by default 1 for a file and 3 for a folder.
        preset: "byola-v1" (mixup up to 0.4) or "byola-v2" (mixup up to 0.2, and a random linear fader).
        interpolation: of the resized crops: "bilinear" or "bicubic".
        unit_sec: length of a segment, in seconds.
        sample_rate: rate that audio is resampled to, in Hz.
        seed: picks files, segments and parameters; the same seed draws the same picture.
    """

    out: str = "views.png"
    samples: int | None = None
    preset: str = "byola-v1"
    interpolation: str = "bilinear"
    unit_sec: float = 0.95
    sample_rate: int = 16000
    seed: int = 0
