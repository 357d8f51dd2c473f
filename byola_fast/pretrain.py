"""Pre-training: one flat loop from audio files to an encoder."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from byola_fast.audio import AudioError, SegmentFolder, collate_segments, list_audio_files
from byola_fast.augment import Augment
from byola_fast.byol import BYOL
from byola_fast.checkpoint import save_checkpoint, save_encoder
from byola_fast.demo import write_demo_corpus
from byola_fast.encoders import AudioNTT2020
from byola_fast.frontend import LogMel
from byola_fast.normalize import compute_stats
from byola_fast.objectives import collapse_std
from byola_fast.pictures import draw_training, draw_views
from byola_fast.show import explain_views

logger = logging.getLogger("byola_fast")

LEARNING_RATES = {"byola-v1": 3e-4, "byola-v2": 1e-4}  # of the papers
FEWEST_STATS_SEGMENTS = 1000  # of small folders too, whose files then give several segments each
LINE_SEC = 5.0  # between two lines of progress where there is no terminal


@dataclass
class PretrainConfig:
    """Settings of a pre-training run.

    Attributes:
        audio_dir: folder of audio files (wav, flac, ogg, opus, mp3 and more; any rate and channel count), or one file.
        out: folder that the results are written to; files of the same names in it are replaced.
        demo: synthesise a small corpus into OUT/demo_audio and train on it for about a minute, instead of audio_dir.
        preset: "byola-v1" (mixup up to 0.4) or "byola-v2" (mixup up to 0.2, and a random linear fader).
        epochs: passes over the data; each takes one random segment of every file.
        steps: stop after so many optimiser steps, if the epochs have not ended before.
        batch_size: samples per step; more is steadier and needs more memory.
        lr: learning rate of Adam; by default the preset's, 3e-4 (byola-v1) or 1e-4 (byola-v2).
        feature_d: width of the embedding: 512, 1024 or 2048 in the papers; more is slower and often better.
        proj_size: width of the projection that the loss compares.
        proj_dim: hidden width of projector and predictor.
        unit_sec: length of a segment, in seconds; shorter clips are padded with silence.
        sample_rate: rate that audio is resampled to, in Hz.
        n_memory: past inputs kept to be mixed in, in samples.
        ema_decay: share of the target network kept at each step, in [0, 1]; nearer to 1 is slower and steadier.
        interpolation: of the resized crops: "bilinear", or "bicubic" as published weights were trained with.
        stats_segments: random segments that mean and std of the log-mels are taken of beforehand, at most one of each
            file (or 1000 in all, of fewer files); 0 for running statistics.
        seed: of weights, segments and views; the same seed on the same CPU gives the same losses.
        workers: processes that read audio; by default one fewer than there are CPU cores, at most 8.
        device: "cpu", "cuda", "cuda:1" and so on; "auto" takes a GPU where there is one.
        log_every: steps between two lines of log.jsonl; each line waits for the GPU.
    """

    audio_dir: str | None = None
    out: str = "runs/pretrain"
    demo: bool = False
    preset: str = "byola-v1"
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 256
    lr: float | None = None
    feature_d: int = 2048
    proj_size: int = 256
    proj_dim: int = 4096
    unit_sec: float = 0.95
    sample_rate: int = 16000
    n_memory: int = 2048
    ema_decay: float = 0.99
    interpolation: str = "bilinear"
    stats_segments: int = 10000
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    log_every: int = 1

    def check(self) -> None:
        """Refuse values out of range that nothing further down would name.

        Raises:
            ValueError: a value out of range; names the field.
        """
        if not self.demo and self.audio_dir is None:
            raise ValueError("audio_dir: expected a folder of audio files (or --demo), got none")
        if self.preset not in LEARNING_RATES:
            raise ValueError(f"preset: expected one of {', '.join(LEARNING_RATES)}, got {self.preset!r}")
        least = {"epochs": 1, "steps": 1, "batch_size": 2, "feature_d": 1, "proj_size": 1, "proj_dim": 1}
        least |= {"sample_rate": 1, "n_memory": 1, "stats_segments": 0, "seed": 0, "workers": 0, "log_every": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a learning rate above 0, got {self.lr}")


DEMO = {"epochs": 1000, "steps": 60, "batch_size": 32, "feature_d": 512, "n_memory": 256}


def demo_config(**changes: Any) -> PretrainConfig:
    """Return the settings of the demonstration: small enough for a minute on two CPU cores."""
    return PretrainConfig(**({"demo": True} | DEMO | changes))


class PretrainResult(NamedTuple):
    """How a run ended: folder of the results, steps done, last logged loss and collapse, and whether it was stopped."""

    out: Path
    steps: int
    loss: float
    collapse: float
    interrupted: bool


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Pre-train an encoder on a folder of audio: data -> log-mel -> views -> networks -> loss -> Adam -> EMA.

    Writes to ``config.out``: ``log.jsonl`` (a line per ``log_every`` steps), ``checkpoint.pt`` (networks, optimiser,
    augmentation), ``encoder.pth`` (the encoder alone), ``training.png`` and ``views.png`` (with matplotlib only).
    An interrupt (Ctrl-C) ends the loop; everything is written all the same.

    Args:
        config: see ``PretrainConfig``.

    Raises:
        FileNotFoundError: no such folder. AudioError: no file in it can be read. ValueError: settings out of range, or
        views too small for the encoder. CheckpointError: the results cannot be written.

    Numerics:
        float32. On one CPU, the same seed and number of threads give the same losses, whatever the number of workers.

    Source:
        BYOL-A, arXiv:2103.06695 and arXiv:2204.07402. Differs: as ``Augment``.
    """
    config.check()
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        _keep_freed_memory()
    torch.manual_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)

    # Data: one random segment of every file in each epoch.
    if config.demo:
        write_demo_corpus(out / "demo_audio", seed=config.seed)
    folder = out / "demo_audio" if config.demo else Path(str(config.audio_dir))
    dataset = SegmentFolder(
        list_audio_files(folder), unit_sec=config.unit_sec, sample_rate=config.sample_rate, seed=config.seed
    )
    to_lms = LogMel(sample_rate=config.sample_rate, f_max=min(7800.0, config.sample_rate / 2)).to(device)
    stats = _take_stats(dataset, to_lms, config) if config.stats_segments else None
    dataset = _enough_files(dataset, config)
    loader = _make_loader(dataset, config, shuffle=True)

    # Views, networks, optimiser.
    aug = Augment(
        config.preset,
        n_memory=config.n_memory,
        shape=(to_lms.n_mels, to_lms.num_frames(dataset.num_samples)),
        seed=config.seed,
        stats=stats,
        interpolation=config.interpolation,
    ).to(device)
    encoder = AudioNTT2020(to_lms.n_mels, config.feature_d)
    byol = BYOL(encoder, config.proj_size, config.proj_dim, config.ema_decay).to(device)
    if device.type == "cpu":
        byol = byol.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [parameter for parameter in byol.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr or LEARNING_RATES[config.preset])
    total = config.epochs * len(loader) if config.steps is None else min(config.steps, config.epochs * len(loader))
    logger.info("training on %s: %d segments an epoch, %d steps of %d", device, len(dataset), total, loader.batch_size)

    step, epoch, log, lms, interrupted = 0, 0, [], None, False
    with open(out / "log.jsonl", "w", encoding="utf-8") as log_file, _Progress(total) as progress:
        try:
            for epoch, wav in _epochs(dataset, loader, config.epochs):
                started = time.perf_counter()
                lms = to_lms(wav.to(device, non_blocking=True))
                view1, view2 = aug(lms)
                loss, projection = byol(view1, view2)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                byol.update_target()
                step += 1

                if step % config.log_every == 0 or step == total:
                    line = {
                        "step": step,
                        "epoch": epoch,
                        "loss": loss.item(),
                        "collapse": collapse_std(projection).item(),
                        "samples_per_s": round(progress.rate(len(wav)), 1),
                        "refused": int(aug.bank.refused),
                        "lr": optimizer.param_groups[0]["lr"],
                    }
                    log.append(line)
                    log_file.write(json.dumps(line) + "\n")
                    log_file.flush()
                progress.advance(log)
                if step == total:
                    break
        except KeyboardInterrupt:
            interrupted = True
            logger.warning("interrupted after step %d of %d; writing the results", step, total)
