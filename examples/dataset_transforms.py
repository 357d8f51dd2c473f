"""Transforms in a Dataset, as with torchvision: the loader's workers make both views, a sample at a time.

    python examples/dataset_transforms.py AUDIO_DIR

byola_fast.Augment after the loader is faster and has one memory for all; see own_loop.py. This form fits programs whose
datasets take a transform.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import byola_fast
from byola_fast import transforms as T

Pair = tuple[Tensor, Tensor]


def compose(seed: int) -> nn.Module:
    """One view of a log-mel spectrogram (64, 96): the steps of byola-v2, the last without its post-normalisation."""
    return nn.Sequential(
        T.PrecomputedNorm((-7.1, 4.2)),  # mean and std of the corpus, as byola-fast stats prints them
        T.LogMixupExp(0.2, n_memory=256, shape=(64, 96), seed=seed),  # each worker has a memory of its own
        T.RandomResizeCrop(seed=seed),
        T.RandomLinearFader(p=0.8, seed=seed),
    )


class TwoViews:
    """Give each view its own transform: in a shared memory, a sample would meet itself."""

    def __init__(self, seed: int) -> None:
        self.view1, self.view2 = compose(2 * seed), compose(2 * seed + 1)

    def __call__(self, lms: Tensor) -> Pair:
        return self.view1(lms), self.view2(lms)


class LogMels(Dataset[Pair]):
    """The first 0.95 s of each file, transformed."""

    def __init__(self, files: list[Path], transform: TwoViews, samples: int = 15200) -> None:
        self.files, self.transform, self.samples = files, transform, samples
        self.to_lms = byola_fast.LogMel()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        wav = byola_fast.read_audio(self.files[index])[: self.samples]
        wav = nn.functional.pad(wav, (0, self.samples - len(wav)))
        return self.transform(self.to_lms(wav[None])[0, 0])


def main(folder: str, epochs: int = 2, batch_size: int = 16, workers: int = 2) -> list[Pair]:
    torch.manual_seed(0)  # the workers' seeds follow from it, and so do the views
    data = LogMels(sorted(Path(folder).rglob("*.wav")), TwoViews(seed=0))
    loader = DataLoader(
        data, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )  # persistent workers keep their memory from one epoch to the next
    batches: list[Pair] = []
    for epoch in range(epochs):
        for view1, view2 in loader:
            batches.append((view1, view2))  # here goes your training step
        print(f"epoch {epoch + 1}: {len(loader)} batches of two views {tuple(view1.shape)}")
    return batches


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
