"""Tiny runs of the trainer: settings, recordings, logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from byola_fast.networks.checkpoint import load_checkpoint

TINY = {
    **{"feature_d": 16, "proj_size": 8, "proj_dim": 32, "n_memory": 16, "unit_sec": 0.25, "workers": 0},
    **{"batch_size": 4, "steps": 4, "stats_segments": 8, "device": "cpu", "threads": 1, "tensorboard": False},
}


def write_recordings(folder: Path) -> Path:
    """Write nine usable recordings, of five formats, several rates and channel counts, and three broken ones."""
    rng = np.random.default_rng(0)

    def noise(seconds: float, rate: int, channels: int) -> np.ndarray:
        return rng.normal(0, 0.1, (round(seconds * rate), channels)).cumsum(0).clip(-1, 1) * 0.5

    (folder / "deeper").mkdir(parents=True)
    for name, seconds, rate, channels, subtype in (
        ("a.wav", 0.6, 44100, 2, "PCM_24"),
        ("b.flac", 0.5, 22050, 1, None),
        ("c.ogg", 0.7, 48000, 2, "VORBIS"),
        ("deeper/d.opus", 0.6, 48000, 1, "OPUS"),
        ("deeper/e.mp3", 0.8, 32000, 1, None),
        ("f.wav", 0.6, 8000, 6, None),
        ("ten_ms.wav", 0.01, 16000, 1, None),
        ("silent.wav", 0.5, 16000, 1, None),
        ("truncated.wav", 1.0, 16000, 1, None),
    ):
        wav = noise(seconds, rate, channels) * (name != "silent.wav")
        with soundfile.SoundFile(
            folder / name, "w", rate, channels, subtype, format="OGG" if name.endswith("opus") else None
        ) as file:
            file.write(wav)
    data = (folder / "truncated.wav").read_bytes()
    (folder / "truncated.wav").write_bytes(data[: len(data) // 2])
    (folder / "empty.flac").touch()
    (folder / "text.wav").write_text("this is no audio")
    (folder / "headless.mp3").write_bytes(bytes(3000))
    (folder / "notes.txt").write_text("not looked at")
    return folder


def read_log(out: Path) -> list[dict]:
    """Return the lines of a log, without what they say of their start."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "run"} for line in lines]


def tensors(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return everything in a checkpoint under one name each."""
    if isinstance(content, dict):
        return {k: v for name, inner in content.items() for k, v in tensors(inner, f"{prefix}.{name}").items()}
    if isinstance(content, list | tuple):
        return {k: v for n, inner in enumerate(content) for k, v in tensors(inner, f"{prefix}.{n}").items()}
    return {prefix: content}


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs left the same: weights, moments, bank, statistics, generators, and log but for its times."""
    first, second = (tensors(load_checkpoint(path / "checkpoint.pt")) for path in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name not in (".config.out", ".config.steps", ".config.epochs", ".config.save_every"):
            same = torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
            assert same, name
    logs = [[{k: v for k, v in line.items() if k != "samples_per_s"} for line in read_log(path)]
            for path in (one, other)]  # fmt: skip
    assert logs[0] == logs[1]
