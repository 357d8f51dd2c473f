"""Tiny labelled tasks of tones in noise."""

from __future__ import annotations

from pathlib import Path

import soundfile
import torch

PITCHES = {"low": 200.0, "mid": 800.0, "high": 3000.0}


def write_task(folder: Path, header: str, lines: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tones.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def write_tone(path: Path, label: str, generator: torch.Generator, samples: int = 5000) -> None:
    """A tone for each of the labels, at a pitch near its own, in noise."""
    wav = 0.02 * torch.randn(samples, generator=generator)
    for each in label.split(","):
        pitch = PITCHES[each.strip()] * (0.9 + 0.2 * torch.rand(1, generator=generator))
        wav += 0.2 * torch.sin(2 * torch.pi * pitch * torch.arange(samples) / 16000)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav.numpy(), 16000)


def make_task(folder: Path, labels: list[str], part_of, header: str) -> Path:
    generator = torch.Generator().manual_seed(5)
    lines = []
    for number, label in enumerate(labels):
        write_tone(folder / "audio" / f"{number}.wav", label, generator)
        lines.append(f'{number}.wav,"{label}",{part_of(number)}')
    return write_task(folder, header, lines)
