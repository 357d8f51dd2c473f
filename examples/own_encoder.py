"""Pre-train your own encoder, load it, embed with it.

    python examples/own_encoder.py AUDIO_DIR
    byola-fast pretrain AUDIO_DIR --encoder examples.own_encoder:SmallNet    # the same from the command line
    byola-fast embed runs/small/encoder.pth AUDIO_DIR --encoder examples.own_encoder:SmallNet

An encoder is any module (B, 1, F, T) -> (B, feature_d) with an attribute feature_d. With forward_frames and
frame_stride it gives frame-level embeddings too. A file of weights never causes an import: whoever loads it names the
class.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import byola_fast


class SmallNet(nn.Module):
    """Two strided convolutions, then mean and maximum over mels and time."""

    frame_stride = 4  # input frames for each output frame

    def __init__(self, feature_d: int = 128) -> None:
        super().__init__()
        self.feature_d = feature_d
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, feature_d, 3, stride=2, padding=1),
            nn.BatchNorm2d(feature_d),
            nn.ReLU(),
        )

    def forward_frames(self, x: Tensor) -> Tensor:
        frames: Tensor = self.layers(x).mean(2).transpose(1, 2)  # (B, T / 4, feature_d)
        return frames

    def forward(self, x: Tensor) -> Tensor:
        frames = self.forward_frames(x)
        return frames.mean(1) + frames.amax(1)


def main(folder: str, out: str = "runs/small", **settings: object) -> Tensor:
    config = byola_fast.PretrainConfig(**{"audio_dir": folder, "out": out, **settings})  # type: ignore[arg-type]
    result = byola_fast.pretrain(
        config,
        encoder=SmallNet(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.05),
    )
    print(f"{result.steps} steps, loss {result.loss:.3f}, spread {result.spread:.2f} (1 is healthy, 0 collapsed)")

    encoder = byola_fast.load_encoder(Path(out) / "encoder.pth", encoder=SmallNet)
    wav = torch.randn(2, encoder.sample_rate)
    frames, times = encoder(wav, frames=True)
    print(f"embedding {tuple(encoder(wav).shape)}, frames {tuple(frames.shape)} every {times[1] - times[0]:.0f} ms")
    return encoder(wav)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
