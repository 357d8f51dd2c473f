"""State dicts in the published layout, and a file that tries to run code."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


class Malicious:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def layout(blocks: int, mels: int, widths: tuple[int, int]) -> dict[str, Tensor]:
    """A state dict made from the names and shapes alone, as published ones have them."""
    state = {}
    for block in range(blocks):
        state[f"features.{4 * block}.weight"] = torch.randn(64, 64 if block else 1, 3, 3)
        state[f"features.{4 * block}.bias"] = torch.randn(64)
        for name in ("weight", "bias", "running_mean"):
            state[f"features.{4 * block + 1}.{name}"] = torch.randn(64)
        state[f"features.{4 * block + 1}.running_var"] = torch.rand(64)
        state[f"features.{4 * block + 1}.num_batches_tracked"] = torch.tensor(7)
    local = 64 * (mels // 2**blocks)
    state |= {"fc.0.weight": torch.randn(widths[0], local), "fc.0.bias": torch.randn(widths[0])}
    return state | {"fc.3.weight": torch.randn(widths[1], widths[0]), "fc.3.bias": torch.randn(widths[1])}
