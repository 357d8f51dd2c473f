"""BYOL-A in fifty lines: two networks, one loss, a moving average.

    python examples/byol_in_fifty_lines.py

It trains on a small synthetic corpus for a minute. byola_fast.BYOL holds the same method as a module.
"""

from __future__ import annotations

import tempfile

import torch
from torch import nn

import byola_fast
from byola_fast.audio.demo_corpus import write_demo_corpus
from byola_fast.objectives.losses import byol_loss


def mlp(width: int, hidden: int = 1024, out: int = 128) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


def main(steps: int = 60, batch_size: int = 32, feature_d: int = 512) -> list[float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        wavs = [byola_fast.read_audio(path) for path in write_demo_corpus(folder)]

    to_lms = byola_fast.LogMel()
    aug = byola_fast.Augment("byola-v1", n_memory=256, seed=0)  # without stats=, running statistics
    online = nn.Sequential(byola_fast.AudioNTT2020(d=feature_d), mlp(feature_d))
    predictor = mlp(128)
    target = byola_fast.EMA(online, decay=0.99, buffers="none")
    optimizer = torch.optim.Adam([*online.parameters(), *predictor.parameters()], lr=3e-4)

    losses = []
    for step in range(steps):
        chosen = [wavs[k] for k in torch.randint(len(wavs), (batch_size,))]
        starts = [int(torch.randint(max(1, len(wav) - 15200), ())) for wav in chosen]
        segments = [wav[start : start + 15200] for wav, start in zip(chosen, starts, strict=True)]
        batch = torch.stack([nn.functional.pad(wav, (0, 15200 - len(wav))) for wav in segments])

        view1, view2 = aug(to_lms(batch))
        with torch.no_grad():
            target1, target2 = target(view1), target(view2)
        loss = byol_loss(predictor(online(view1)), target2) + byol_loss(predictor(online(view2)), target1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.update()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
