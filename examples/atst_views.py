"""The views of ATST: segments of 6 s; for its frame-level version, views whose frames stay in step.

    python examples/atst_views.py AUDIO_DIR

ATST-Clip (arXiv:2204.12076) takes two segments of each clip and crops both axes. ATST-Frame (arXiv:2306.04186) takes
one segment and crops mels alone, so that frame t of both views is the same moment. One view of each pair is mixed.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import byola_fast
from byola_fast.audio import read_segment
from byola_fast.transforms import LogMixupExp, PrecomputedNorm, RandomResizeCrop

STATS = (-7.1, 4.2)  # mean and std of the corpus, as byola-fast stats prints them


def clip_views() -> tuple[nn.Module, nn.Module]:
    """Return the transforms of the first and the second segment; the defaults of the crop are the paper's."""
    norm = PrecomputedNorm(STATS)
    return nn.Sequential(norm, RandomResizeCrop()), nn.Sequential(norm, LogMixupExp(), RandomResizeCrop())


def frame_views() -> tuple[nn.Module, nn.Module]:
    """Return the transforms of the two views of one segment."""
    norm = PrecomputedNorm(STATS)
    crops = [RandomResizeCrop(time_scale=(1, 1), virtual_crop_scale=(1, 1)) for _ in range(2)]
    return nn.Sequential(norm, crops[0]), nn.Sequential(norm, LogMixupExp(), crops[1])


def in_step(view1: Tensor, view2: Tensor) -> float:
    """Return how far the loudness of the two views rises and falls together: the mean correlation over frames."""
    loudness = torch.stack([view1.mean(1), view2.mean(1)])  # (2, B, T)
    unit = nn.functional.normalize(loudness - loudness.mean(2, keepdim=True), dim=2)
    return float(unit.prod(0).sum(1).mean())


def main(folder: str, seconds: float = 6.0, batch_size: int = 32) -> tuple[float, float]:
    files = sorted(Path(folder).rglob("*.wav"))[:batch_size]
    to_lms = byola_fast.LogMel()

    def segments(draw: int) -> Tensor:
        read = partial(read_segment, num_samples=round(16000 * seconds), seed=0, epoch=0, draw=draw)
        return to_lms(torch.stack([read(file, index=n) for n, file in enumerate(files)]))[:, 0]  # (B, 64, 601)

    first, second = segments(0), segments(1)
    make1, make2 = clip_views()
    clip = make1(first), make2(second)
    make1, make2 = frame_views()
    frame = make1(first), make2(first)
    for name, views in (("ATST-Clip", clip), ("ATST-Frame", frame)):
        print(f"{name}: two views {tuple(views[0].shape)}, loudness correlates by {in_step(*views):.2f}")
    return in_step(*clip), in_step(*frame)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
