"""Encoders: log-mel spectrograms in, embeddings out."""

from __future__ import annotations

from torch import Tensor, nn

from byola_fast.ops import _checks as check

CHANNELS = 64
STRIDE = 8  # mels and frames that one local feature covers: three poolings by 2
DROPOUT = 0.3


class AudioNTT2020(nn.Module):
    """Encode log-mel spectrograms with three convolutions and an MLP over time: the encoder of BYOL-A's first version.

    3 x [Conv3x3, BatchNorm, ReLU, MaxPool2] -> at each of T // 8 times, all mels and channels -> Linear d, ReLU,
    Dropout 0.3, Linear d, ReLU -> max over time + mean over time.

    Args:
        n_mels: mel bins F of the input, a multiple of 8.
        d: width of the embedding; 512, 1024 and 2048 make 600,192, 1,649,792 and 5,321,856 parameters.

    Attributes:
        feature_d: width of the embedding, d.

    Shape:
        ``(B, 1, F, T)`` with T of at least 8 to ``(B, d)``; ``forward_frames`` gives ``(B, T // 8, d)``, of which
        frame t covers input frames 8 t to 8 t + 7 (and a margin). Frames beyond a multiple of 8 are not used.

    Raises:
        ValueError: a wrong rank or number of mels, too few frames; ``n_mels`` or ``d`` out of range.
        TypeError: an input that is no floating-point tensor.

    Numerics:
        State dict keys are ``features.N.*`` and ``fc.N.*``, N counting every layer. Each local feature holds mels
        outermost and channels innermost.

    Autograd:
        To the input and all parameters.

    Source:
        BYOL-A, arXiv:2103.06695, its audio encoder.

    >>> import torch
    >>> AudioNTT2020(d=512)(torch.zeros(2, 1, 64, 96)).shape
    torch.Size([2, 512])
    """

    def __init__(self, n_mels: int = 64, d: int = 512) -> None:
        super().__init__()
        if n_mels < STRIDE or n_mels % STRIDE:
            raise ValueError(f"n_mels: expected a multiple of {STRIDE}, got {n_mels}")
        if d < 1:
            raise ValueError(f"d: expected at least 1, got {d}")
        self.n_mels = n_mels
        self.feature_d = d
        layers: list[nn.Module] = []
        for channels in (1, CHANNELS, CHANNELS):
            layers += [
                nn.Conv2d(channels, CHANNELS, 3, padding=1),
                nn.BatchNorm2d(CHANNELS),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Sequential(
            nn.Linear(CHANNELS * (n_mels // STRIDE), d), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(d, d), nn.ReLU()
        )

    def forward_frames(self, x: Tensor) -> Tensor:
        """Return one feature vector for every 8 frames: ``(B, 1, F, T)`` to ``(B, T // 8, d)``."""
        check.is_float("x", x)
        check.has_shape("x", x, ("B", 1, self.n_mels, "T"))
        if x.shape[3] < STRIDE:
            raise ValueError(f"x: expected at least {STRIDE} frames, got {x.shape[3]}")
        local = self.features(x)  # (B, channels, F / 8, T // 8)
        frames: Tensor = self.fc(local.permute(0, 3, 2, 1).flatten(2))
        return frames

    def forward(self, x: Tensor) -> Tensor:
        """Return one embedding for each sample: ``(B, 1, F, T)`` to ``(B, d)``."""
        return pool_frames(self.forward_frames(x))

    def extra_repr(self) -> str:
        return f"n_mels={self.n_mels}, d={self.feature_d}"


def pool_frames(frames: Tensor) -> Tensor:
    """Sum up frames over time, ``max + mean``: ``(B, T, d)`` to ``(B, d)``.

    >>> import torch
    >>> pool_frames(torch.tensor([[[1.0], [3.0]]]))
    tensor([[5.]])
    """
    return frames.amax(1) + frames.mean(1)
