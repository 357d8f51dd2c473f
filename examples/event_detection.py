"""Detect events in time from frame-level embeddings, on scenes mixed from single sounds, so that onsets are known.

    python examples/event_detection.py SOUNDS

SOUNDS has a folder for each class, of three .wav files or more. Scenes of 10 s are mixed from them: for training from
two thirds of the files, for the test from the others. A probe reads from each frame, every 80 ms, which classes sound.
events.png shows a scene of the test.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import byola_fast

Event = tuple[int, float, float]  # class, onset, end in s
Table = npt.NDArray[np.bool_]  # (frames, classes)
Times = npt.NDArray[np.floating[Any]]
SECONDS, EVENTS, TOLERANCE = 10.0, 6, 0.2


def mix(sounds: list[list[torch.Tensor]], rate: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[Event]]:
    """Return a scene in soft noise, and its events."""
    scene, events = 0.002 * torch.from_numpy(rng.standard_normal(round(SECONDS * rate)).astype(np.float32)), []
    for _ in range(EVENTS):
        kind = int(rng.integers(len(sounds)))
        wav = sounds[kind][int(rng.integers(len(sounds[kind])))][: 2 * rate]
        start = int(rng.integers(len(scene) - len(wav)))
        scene[start : start + len(wav)] += wav * float(10 ** rng.uniform(-1, 0)) / wav.abs().max().clamp_min(1e-4)
        events.append((kind, start / rate, (start + len(wav)) / rate))
    return scene, events


def active(events: list[Event], times: Times, classes: int) -> Table:
    """Return which class sounds at which time."""
    table = np.zeros((len(times), classes), bool)
    for kind, onset, end in events:
        table[(times >= onset) & (times < end), kind] = True
    return table


def onsets(table: Table, times: Times) -> list[tuple[int, float]]:
    starts = table & ~np.vstack([np.zeros_like(table[:1]), table[:-1]])
    return [(int(kind), float(times[frame])) for frame, kind in np.argwhere(starts)]


def hits(found: list[tuple[int, float]], true: list[tuple[int, float]]) -> int:
    """Return how many true onsets were found, of their class and within the tolerance, each found one used once."""
    left = list(found)
    for kind, onset in true:
        near = [one for one in left if one[0] == kind and abs(one[1] - onset) <= TOLERANCE]
        if near:
            left.remove(min(near, key=lambda one: abs(one[1] - onset)))
    return len(found) - len(left)


def main(folder: str, picture: str = "events.png", scenes: int = 40) -> float:
    encoder, rng = byola_fast.load_encoder(), np.random.default_rng(0)
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    files = [sorted(Path(folder, name).rglob("*.wav")) for name in names]
    if few := [name for name, paths in zip(names, files, strict=True) if len(paths) < 3]:
        raise SystemExit(f"{folder}: expected three .wav files or more in each folder, got fewer in {few[0]}")
    sounds = [[byola_fast.read_audio(path, encoder.sample_rate) for path in paths] for paths in files]
    train, test = [each[0::3] + each[1::3] for each in sounds], [each[2::3] for each in sounds]
    mixed = [
        [mix(part, encoder.sample_rate, rng) for _ in range(n)] for part, n in ((train, scenes), (test, scenes // 2))
    ]
    with torch.no_grad():
        frames = [[encoder(scene, frames=True) for scene, _ in part] for part in mixed]
    times = frames[0][0].timestamps.numpy() / 1000
    truth = [[active(events, times, len(names)) for _, events in part] for part in mixed]
    x, y = np.concatenate([one.frames.numpy() for one in frames[0]]), np.concatenate(truth[0])
    probes = [make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(x, own) for own in y.T]
    tables = [np.stack([probe.predict(one.frames.numpy()) for probe in probes], 1) for one in frames[1]]

    found, true = [onsets(one, times) for one in tables], [onsets(one, times) for one in truth[1]]
    count = sum(hits(ours, theirs) for ours, theirs in zip(found, true, strict=True))
    score = 2 * count / max(1, sum(map(len, found)) + sum(map(len, true)))
    right = np.mean(np.array(tables) == np.array(truth[1]))
    print(f"onsets within {TOLERANCE} s: F1 {100 * score:.0f} %; frames right: {100 * right:.0f} %")
    draw(picture, byola_fast.LogMel()(mixed[1][0][0])[0], truth[1][0], tables[0], names)
    return score


def draw(picture: str, lms: torch.Tensor, truth: Table, found: Table, names: list[str]) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    upper.imshow(lms.numpy(), origin="lower", aspect="auto", extent=(0, SECONDS, 0, len(lms)))
    shown, place = truth.T + 2.0 * found.T, (0, SECONDS, len(names) - 0.5, -0.5)  # 1 missed, 2 false, 3 right
    upper.set_ylabel("mel")
    lower.imshow(shown, aspect="auto", interpolation="nearest", extent=place, cmap="Blues")
    lower.set_yticks(range(len(names)), names)
    lower.set_xlabel("s; pale: missed, middle: false, dark: right")
    figure.savefig(picture)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
