"""Fine-tune the encoder for a labelled task, and compare it with a linear probe.

    python examples/fine_tune.py TASK.csv AUDIO_DIR

TASK.csv has the columns file_name, label and split (train, valid, test), as for ``byola-fast eval``. The encoder learns
at a tenth of the head's learning rate; of all epochs, the one best on valid is tested. Three seeds draw head, order and
places of the segments.
"""

from __future__ import annotations

import copy
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import byola_fast

Part = tuple[list[Tensor], Tensor]  # waveforms, numbers of their classes
SAMPLES = 15200  # 0.95 s at 16 kHz


def read(task: str, audio: str, rate: int) -> tuple[dict[str, Part], int]:
    """Return the clips of each split, those of 0.95 s or less padded at both ends, and the number of classes."""
    with open(task, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    classes = sorted({line["label"] for line in lines})
    parts = {}
    for split in ("train", "valid", "test"):
        own = [line for line in lines if line["split"] == split]
        wavs = [byola_fast.read_audio(Path(audio, line["file_name"]), rate) for line in own]
        shorts = [max(0, SAMPLES - len(wav)) for wav in wavs]
        wavs = [nn.functional.pad(wav, (n // 2, n - n // 2)) for wav, n in zip(wavs, shorts, strict=True)]
        parts[split] = wavs, torch.tensor([classes.index(line["label"]) for line in own])
    return parts, len(classes)


def accuracy(network: nn.Module, part: Part) -> float:
    with torch.no_grad():
        found = torch.cat([network(wav[None]).argmax(1) for wav in part[0]])
    return float((found == part[1]).float().mean())


def fine_tune(encoder: byola_fast.Embedder, parts: dict[str, Part], classes: int, seed: int, epochs: int) -> float:
    torch.manual_seed(seed)
    body, head = copy.deepcopy(encoder).requires_grad_(True), nn.Linear(encoder.feature_d, classes)
    network = nn.Sequential(body, nn.BatchNorm1d(encoder.feature_d), nn.Dropout(0.3), head)
    groups: list[dict[str, Any]] = [{"params": body.parameters(), "lr": 1e-4}, {"params": network[1:].parameters()}]
    optimizer = torch.optim.AdamW(groups, 1e-3)
    (wavs, labels), best, kept = parts["train"], -1.0, network.state_dict()
    for _ in range(epochs):
        network.train()
        body.eval()  # its BatchNorm keeps the statistics of pre-training, and its dropout is off
        for chosen in torch.randperm(len(wavs)).split(32):
            starts = [int(torch.randint(len(wavs[k]) - SAMPLES + 1, ())) for k in chosen]
            batch = torch.stack([wavs[k][start : start + SAMPLES] for k, start in zip(chosen, starts, strict=True)])
            loss = nn.functional.cross_entropy(network(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        if (reached := accuracy(network, parts["valid"])) > best:
            best, kept = reached, copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    return accuracy(network, parts["test"])


def main(task: str, audio: str, epochs: int = 15, seeds: int = 3) -> tuple[float, list[float]]:
    encoder = byola_fast.load_encoder()  # or your own: load_encoder("runs/mine")
    parts, classes = read(task, audio, encoder.sample_rate)
    rows = {split: torch.stack([encoder(wav) for wav in wavs]).numpy() for split, (wavs, _) in parts.items()}
    probes = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)) for c in (1e-3, 1e-2, 0.1, 1.0)]
    fitted = [probe.fit(rows["train"], parts["train"][1]) for probe in probes]
    best = max(fitted, key=lambda probe: probe.score(rows["valid"], parts["valid"][1]))
    probe = float(best.score(rows["test"], parts["test"][1]))
    tuned = [fine_tune(encoder, parts, classes, seed, epochs) for seed in range(seeds)]
    shown = ", ".join(f"{100 * one:.1f}" for one in tuned)
    mean, spread = statistics.fmean(tuned), statistics.stdev(tuned) if seeds > 1 else 0.0
    print(f"linear probe {100 * probe:.1f} %; fine-tuned {100 * mean:.1f} ± {100 * spread:.1f} % ({shown})")
    return probe, tuned


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
