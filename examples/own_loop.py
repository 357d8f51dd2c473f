"""Views in your own training loop: audio files in, two views of each log-mel spectrogram out.

    python examples/own_loop.py AUDIO_DIR

Any loss on pairs of views fits; here it is SimCLR's. See byol_in_fifty_lines.py for BYOL, and docs/training.md for the
trainer that does all of this, resumes, and runs on several GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import byola_fast
from byola_fast.objectives.losses import nt_xent_loss


class Segments(Dataset[torch.Tensor]):
    """A random 0.95 s segment of each file: 15200 samples at 16 kHz, which give 64 mels by 96 frames."""

    def __init__(self, files: list[Path], samples: int = 15200) -> None:
        self.files, self.samples = files, samples

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        wav = byola_fast.read_audio(self.files[index])
        wav = torch.nn.functional.pad(wav, (0, max(0, self.samples - len(wav))))
        start = int(torch.randint(len(wav) - self.samples + 1, ()))
        return wav[start : start + self.samples]


def main(folder: str, steps: int = 100, batch_size: int = 32, feature_d: int = 512) -> list[float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = sorted(Path(folder).rglob("*.wav"))
    held_out = files[::10]  # to validate on
    train = [file for file in files if file not in held_out]
    loader = DataLoader(Segments(train), batch_size, shuffle=True, drop_last=True)
    if not len(loader):
        raise SystemExit(f"{folder}: expected {batch_size} .wav files to train on, got {len(train)}")

    to_lms = byola_fast.LogMel().to(device)
    aug = byola_fast.Augment("byola-v2", n_memory=256, stats=(-7.1, 4.2)).to(device)  # mean and std of the corpus
    encoder = byola_fast.AudioNTT2020(d=feature_d).to(device)
    head = torch.nn.Linear(feature_d, 128).to(device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-4)

    modules = torch.nn.ModuleList([aug, encoder, head])

    def loss_of(wav: torch.Tensor) -> torch.Tensor:
        view1, view2 = aug(to_lms(wav.to(device)))  # (B, 1, 64, 96) each; every sample has its own crop and ratio
        return nt_xent_loss(head(encoder(view1)), head(encoder(view2)))

    losses: list[float] = []
    while len(losses) < steps:
        for wav in loader:
            loss = loss_of(wav)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(f"step {len(losses)}: loss {losses[-1]:.3f}")
            if len(losses) == steps:
                break
        modules.eval()  # in eval mode aug changes no state, so that validation does not change training
        with torch.no_grad():
            valid = [loss_of(wav).item() for wav in DataLoader(Segments(held_out), batch_size)]
        modules.train()
        print(f"validation loss {sum(valid) / len(valid):.3f}")
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
