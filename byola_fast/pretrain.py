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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Subset

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
PICTURED_FROM = 16  # segments of the last batch that views.png takes its samples and partners from
FRONT_END = ("sample_rate", "n_fft", "win_length", "hop_length", "n_mels", "f_min", "f_max", "mel_scale", "norm")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


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
        threads: CPU threads of the networks; by default torch's choice, all cores. Fewer are faster where other
            programs keep some of the cores busy, as threads then wait for each other.
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
    threads: int | None = None
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
        least = dict(epochs=1, steps=1, batch_size=2, feature_d=1, proj_size=1, proj_dim=1, sample_rate=1, n_memory=1)
        least.update(stats_segments=0, seed=0, workers=0, threads=1, log_every=1)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a learning rate above 0, got {self.lr}")


# What --demo changes. One thread takes as long on a busy machine as on an idle one; two would save 15 s there.
DEMO = {"epochs": 1000, "steps": 40, "batch_size": 32, "feature_d": 512, "n_memory": 256, "threads": 1}


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
    An interrupt (Ctrl-C) ends the loop; everything is written all the same. Seeds torch's default generators and, where
    asked for, sets torch's number of threads.

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
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    out = Path(config.out)

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
    out.mkdir(parents=True, exist_ok=True)

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
        byol = byol.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in byol.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr or LEARNING_RATES[config.preset])
    total = config.epochs * len(loader) if config.steps is None else min(config.steps, config.epochs * len(loader))
    logger.info("training on %s: %d segments an epoch, %d steps of %d", device, len(dataset), total, config.batch_size)

    step, samples, epoch, interrupted, lms = 0, 0, 0, False, None
    log: list[dict[str, Any]] = []
    with open(out / "log.jsonl", "w", encoding="utf-8") as log_file, _Progress(total) as progress:
        try:
            logged = time.perf_counter()
            for epoch, wav in _batches(dataset, loader, config.epochs):
                lms = to_lms(wav.to(device, non_blocking=True))
                view1, view2 = aug(lms)
                loss, projection = byol(view1, view2)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                byol.update_target()

                step, samples = step + 1, samples + len(wav)
                if step % config.log_every == 0 or step == total:
                    line = {"step": step, "epoch": epoch, "loss": loss.item()}
                    if not math.isfinite(line["loss"]):
                        raise ValueError(f"lr: the loss became {line['loss']} at step {step}; lower the learning rate")
                    line["collapse"] = collapse_std(projection).item()
                    line["samples_per_s"] = round(samples / (time.perf_counter() - logged), 1)
                    line["refused"] = int(aug.bank.refused)  # not finite, and so kept out of the bank
                    line["lr"] = optimizer.param_groups[0]["lr"]
                    print(json.dumps(line), file=log_file, flush=True)
                    log.append(line)
                    samples, logged = 0, time.perf_counter()
                progress.show(step, log)
                if step == total:
                    break
        except KeyboardInterrupt:
            interrupted = True
            logger.warning("interrupted after %d of %d steps; writing the results", step, total)

    if stats is None and aug.running_stats is not None:
        mean, std = aug.running_stats.stats().tolist()
        stats = (mean, std)
    networks = {"model": byol.state_dict(), "optimizer": optimizer.state_dict(), "augment": aug.state_dict()}
    save_checkpoint(out / "checkpoint.pt", networks | {"config": asdict(config), "step": step, "epoch": epoch})
    front_end = {name: getattr(to_lms, name) for name in FRONT_END}
    described = {"encoder": "AudioNTT2020", "feature_d": config.feature_d, "unit_sec": config.unit_sec} | front_end
    save_encoder(out / "encoder.pth", encoder, config=described, stats=stats)
    if log and lms is not None:
        try:
            draw_training(out / "training.png", log)
            names = [f"segment {number}" for number in range(1, 1 + len(lms))]
            panels = explain_views(
                lms[:PICTURED_FROM].cpu(),
                names,
                samples=3,
                preset=config.preset,
                seed=config.seed,
                stats=stats,
                interpolation=config.interpolation,
            )
            draw_views(out / "views.png", panels, title=f"views of the last batch ({config.preset})")
        except ImportError as error:
            logger.warning("no training.png and views.png: %s", error)
    last = log[-1] if log else {"loss": math.nan, "collapse": math.nan}
    return PretrainResult(out, step, last["loss"], last["collapse"], interrupted)


def _take_stats(dataset: SegmentFolder, to_lms: LogMel, config: PretrainConfig) -> tuple[float, float]:
    """Return mean and std of the log-mels of random segments; the first reading of every file, or of many."""
    count = min(config.stats_segments, max(len(dataset), FEWEST_STATS_SEGMENTS))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))[:count].tolist()
    loader = _make_loader(Subset(dataset, order), config, shuffle=False)
    passes = math.ceil(count / len(order))
    logger.info("taking mean and std of the log-mels of %d segments", passes * len(order))

    def batches() -> Iterator[Tensor]:
        for number in range(passes):
            dataset.set_epoch(number)
            yield from (to_lms(wav.to(to_lms.window.device)) for wav in loader if wav is not None)
            if len(dataset.broken) == len(order):
                raise AudioError(dataset.files[order[0]], f"cannot be read, nor can any other of {len(order)} files")

    return compute_stats(batches())


def _enough_files(dataset: SegmentFolder, config: PretrainConfig) -> SegmentFolder:
    """Leave out the files found broken, and list the others several times where they are fewer than a batch."""
    if len(dataset) < config.batch_size and not config.stats_segments:
        for index in range(len(dataset)):
            dataset[index]  # finds and reports the broken ones, which nothing has read so far
    broken = dataset.broken
    files = [path for path in dataset.files if path not in broken]
    if not files:
        raise AudioError(dataset.files[0], f"cannot be read, nor can any other of {len(dataset)} files")
    repeats = math.ceil(config.batch_size / len(files))
    if repeats > 1:
        told = "%d readable files are fewer than batch_size %d: each gives %d segments an epoch"
        logger.info(told, len(files), config.batch_size, repeats)
    return SegmentFolder(files * repeats, unit_sec=config.unit_sec, sample_rate=config.sample_rate, seed=config.seed)


def _make_loader(dataset: Any, config: PretrainConfig, *, shuffle: bool) -> DataLoader[Any]:
    workers = config.workers if config.workers is not None else min(8, (os.cpu_count() or 1) - 1)
    order = torch.Generator().manual_seed(config.seed)
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=RandomSampler(dataset, generator=order) if shuffle else None,
        drop_last=shuffle,
        num_workers=workers,
        collate_fn=collate_segments,
        pin_memory=config.device != "cpu" and torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # seeds workers, as often as there are any: no draw that matters may share it
    )


def _ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _batches(dataset: SegmentFolder, loader: DataLoader[Any], epochs: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (epoch, waveforms ``(B, samples)``); B is smaller where files of a batch could not be read."""
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        count = 0
        for wav in loader:
            if wav is not None and len(wav) > 1:  # BatchNorm needs two
                count += 1
                yield epoch, wav
        if not count:
            raise AudioError(
                dataset.files[0], f"cannot be read, nor can two files of any batch of the {len(dataset)} files"
            )


def _keep_freed_memory() -> None:
    """Let glibc keep the memory it is given back.

    It returns blocks of more than 32 MB to the kernel, which maps and clears them anew in every step: activations of
    a batch of 64 cost 800,000 page faults, two fifths of the time of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


class _Progress:
    """A bar with rate, remaining time and loss on a terminal, elsewhere a line every few seconds; both on stderr."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = ("steps", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task("", total=total, told="") if self.bar is not None else None
        self.total = total
        self.started = self.told = time.monotonic()

    def __enter__(self) -> _Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, step: int, log: Sequence[dict[str, Any]]) -> None:
        """Tell the steps done and the last line of the log."""
        if not log:
            return
        told = f"loss {log[-1]['loss']:.3f}  spread {log[-1]['collapse']:.2f}  {log[-1]['samples_per_s']:.0f} samples/s"
        now = time.monotonic()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, told=told)
        elif now - self.told >= LINE_SEC or step in (1, self.total):
            remaining = (now - self.started) / step * (self.total - step)
            print(f"step {step}/{self.total}  {told}  {remaining:.0f} s left", file=sys.stderr, flush=True)
            self.told = now
