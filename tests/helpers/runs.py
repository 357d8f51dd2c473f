"""Tiny runs of the trainer: settings, recordings, logs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

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
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
