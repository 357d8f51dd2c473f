"""BYOL-A as a module of PyTorch Lightning, which brings loops, devices, checkpoints and loggers.

    python examples/lightning_module.py AUDIO_DIR

Needs pip install pytorch-lightning. Memory, statistics and random stream of Augment lie in Lightning's checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import byola_fast
from byola_fast.audio import read_segment
from byola_fast.objectives.collapse import spread

STATS = (-7.1, 4.2)  # mean and std of the corpus, as byola-fast stats prints them


class Segments(Dataset[Tensor]):
    """A random segment of 0.95 s of each file."""

    def __init__(self, folder: str) -> None:
        self.files = sorted(Path(folder).rglob("*.wav"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        draw = int(torch.randint(1 << 31, ()))
        return read_segment(self.files[index], 15200, seed=0, epoch=0, index=index, draw=draw)


class BYOLA(pl.LightningModule):
    """Log-mels, views and BYOL's loss; the target moves after each step of the optimiser."""

    def __init__(self, feature_d: int = 512) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.to_lms = byola_fast.LogMel()
        self.aug = byola_fast.Augment("byola-v1", n_memory=256, shape=(64, 96), seed=0, stats=STATS)
        self.byol = byola_fast.BYOL(byola_fast.AudioNTT2020(d=feature_d))

    def training_step(self, wav: Tensor, batch_index: int) -> Tensor:
        view1, view2 = self.aug(self.to_lms(wav))
        loss, projection = self.byol(view1, view2)
        self.log_dict({"loss": loss, "spread": spread(projection)}, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_index: int) -> None:
        self.byol.update_target()  # with accumulated gradients, only after steps of the optimiser

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.byol.parameters(), lr=3e-4)


def main(
    folder: str, out: str = "runs/lightning", epochs: int = 10, batch_size: int = 32, feature_d: int = 512
) -> BYOLA:
    model = BYOLA(feature_d)
    data = DataLoader(Segments(folder), batch_size, shuffle=True, drop_last=True)
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir=out, log_every_n_steps=1)
    trainer.fit(model, data)
    trainer.save_checkpoint(f"{out}/last.ckpt")
    config = byola_fast.describe_encoder(model.byol.encoder, model.to_lms)
    byola_fast.save_encoder(f"{out}/encoder.pth", model.byol.encoder, config=config, stats=STATS)
    return model


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
