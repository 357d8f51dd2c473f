"""Multi-crop: six small views beside the two whole ones of each segment, with an encoder that takes any size.

    python examples/multi_crop.py AUDIO_DIR

Each small view is compared with both whole ones, as in SwAV (arXiv:2006.09882) and DINO (arXiv:2104.14294); the target
network sees whole views alone. The trainer does the same: byola-fast pretrain --local-views 6 --local-size 64,32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import byola_fast
from byola_fast.audio import read_segment


class SmallNet(nn.Sequential):
    """Convolutions, then the mean over all mels and frames that there are."""

    feature_d = 128

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, self.feature_d)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def main(folder: str, steps: int = 100, batch_size: int = 32) -> list[float]:
    torch.manual_seed(0)
    files = sorted(Path(folder).rglob("*.wav"))
    to_lms = byola_fast.LogMel()
    aug = byola_fast.Augment("byola-v1", stats=(-7.1, 4.2), seed=0, local_views=6, local_size=(32, 32))
    byol = byola_fast.BYOL(SmallNet(), proj_size=64, proj_dim=512)
    optimizer = torch.optim.Adam([x for x in byol.parameters() if x.requires_grad], lr=1e-3)

    def segments(step: int) -> Tensor:
        chosen = [int(n) for n in torch.randint(len(files), (batch_size,))]
        return torch.stack([read_segment(files[n], 15200, seed=0, epoch=step, index=n) for n in chosen])

    losses: list[float] = []
    for step in range(steps):
        view1, view2, *small = aug(to_lms(segments(step)))  # (B, 1, 64, 96) twice, (B, 1, 32, 32) six times
        loss, _projection = byol(view1, view2, small)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        byol.update_target()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
