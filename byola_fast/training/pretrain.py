"""Pre-training: one flat loop from audio files to an encoder."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byola_fast.audio.batches import Batches, as_float, open_source
from byola_fast.audio.demo_corpus import write_demo_corpus
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.store import DeviceStore, SegmentStore
from byola_fast.networks.encoder_file import describe_encoder
from byola_fast.networks.encoders import AudioNTT, make_encoder, require_embeddings
from byola_fast.objectives.learner import Learner
from byola_fast.objectives.registry import find_learner, make_learner
from byola_fast.runtime.device import keep_freed_memory, pick_device
from byola_fast.runtime.distributed import World, join, name_lost_rank
from byola_fast.runtime.progress import Progress
from byola_fast.spectrograms.corpus_statistics import read_stats, require_sound, take_stats
from byola_fast.spectrograms.log_mel import LogMel
from byola_fast.training.config import PretrainConfig
from byola_fast.training.cuda_graph import Step, graph_step, use_graph
from byola_fast.training.curves import draw_training
from byola_fast.training.run_folder import DEMO_AUDIO, RunFolder, RunState
from byola_fast.training.schedules import set_learning_rate
from byola_fast.training.stage_times import StageTimes
from byola_fast.training.watch import Watch
from byola_fast.views.augment import Augment
from byola_fast.views.explain import explain_views
from byola_fast.views.params import resolve_settings
from byola_fast.views.pictures import draw_views

logger = logging.getLogger("byola_fast")

PICTURED_FROM = 16  # segments of the last batch that views.png shows or mixes in

Source = SegmentFolder | SegmentStore | DeviceStore
Pair = tuple[float, float]  # mean and std


class PretrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        out: folder of the results.
        steps: done so far, over all parts of the run.
        loss: last logged loss.
        spread: last logged spread of the projections; 1 is healthy.
        stopped_by: number of the signal that stopped the run early; 0 if it reached its end.
    """

    out: Path
    steps: int
    loss: float
    spread: float
    stopped_by: int


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Pre-train an encoder on a folder of audio: data -> log-mel -> views -> networks -> loss -> Adam -> EMA.

    Writes to ``config.out``: ``log.jsonl`` (a line per ``log_every`` steps), ``checkpoint.pt`` (everything that a run
    needs to resume), ``encoder.pth`` (the encoder alone), ``training.png`` and ``views.png`` (with matplotlib). A run
    found there with the same settings resumes from its checkpoint. Ctrl-C and SIGTERM finish the current step, save and
    leave. Under torchrun every process calls this function. It seeds torch's default generators and, if asked, sets
    torch's number of threads.

    Args:
        config: see ``PretrainConfig``.

    Raises:
        FileNotFoundError: no such folder. AudioError: no file in it can be read. ValueError: settings out of range or
        different from those of the run in the folder, views too small for the encoder, or a loss that is not finite;
        the last good checkpoint stays whole. CheckpointError: the folder cannot be written, or its checkpoint cannot be
        read. RankError: another process of the run died.

    Numerics:
        On one CPU, the same seed and number of threads give the same losses for any number of workers. A run stopped at
        any moment and resumed equals an uninterrupted one bit for bit. Views do not depend on the number of processes;
        BatchNorm's statistics do, because each process has its own.

    Source:
        BYOL-A, arXiv:2103.06695 and arXiv:2204.07402. Differs: as ``Augment``.
    """
    config.check()
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with (
        join(device, config.timeout_min) as world,
        closing(RunFolder(config.out)) as run,
        name_lost_rank(world, run.resume_hint),
    ):
        return _train(config.resolved(device.type), world, run)


def _train(config: PretrainConfig, world: World, run: RunFolder) -> PretrainResult:
    device = world.device
    saved = world.broadcast(lambda: run.open(config))
    torch.manual_seed(config.seed)

    # Data: random segments of every clip in each epoch, and this process's part of each global batch.
    source = _open_source(config, world, run)
    segments = find_learner(str(config.objective)).segments
    batches = Batches(
        source,
        config.batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        workers=config.workers,
        segments=segments,
        device=device,
    )
    if batches.local_size < 2:
        raise ValueError(f"batch_size: expected at least 2 for each of {world.size} processes, got {config.batch_size}")
    if len(set(world.gather((len(source), batches.listing)))) > 1:
        raise ValueError(f"audio_dir: expected the same files for all {world.size} processes")
    if batches.repeats > 1 and world.first:
        message = "%d clip%s fewer than batch_size %d: each gives up to %d segments an epoch"
        logger.info(message, len(source), " is" if len(source) == 1 else "s are", config.batch_size, batches.repeats)
    total = min(config.epochs * batches.steps_per_epoch, config.steps or sys.maxsize)
    to_lms = LogMel(**config.front_end()).to(device)

    # Networks check the last settings; statistics take a while and come after them.
    encoder = make_encoder(str(config.encoder), n_mels=to_lms.n_mels, feature_d=config.feature_d)
    shape = _check_shape(config, encoder, to_lms, source)
    learner: Learner = make_learner(str(config.objective), encoder, **config.learner(total)).to(device)
    network = _prepare(learner, config, world)
    graphed = use_graph(config.cuda_graph, device, processes=world.size, profile=config.profile)
    stats, broken = (saved["stats"], {}) if saved else world.broadcast(lambda: _take_stats(source, to_lms, config))
    batches.broken.update(broken)  # already reported

    # Views, optimiser.
    aug = Augment(
        config.preset,
        n_memory=config.n_memory,
        shape=shape,
        seed=config.seed,
        stats=stats,
        post_norm=config.post_norm,
        **config.view_settings(),
    ).to(device)
    optimizer = _make_optimizer(learner, config, graphed)
    state = RunState(world, learner, optimizer, aug)
    step, epoch, clips = 0, 0, len(source)
    # what a resumed run compares
    about = {"clips": clips, "listing": batches.listing, "total": total, "torch": str(torch.__version__)}

    def described() -> dict[str, Any]:
        config_now = describe_encoder(encoder, to_lms, unit_sec=config.unit_sec)
        return {"config": config_now, "stats": _stats_now(aug, stats)}

    if world.rank:
        torch.manual_seed(config.seed + (world.rank << 32))  # dropout differs between processes
    if saved is not None:
        if saved["clips"] != clips:
            raise ValueError(f"audio_dir: expected the {saved['clips']} clips that the run began with, got {clips}")
        if config.stats is not None and Path(config.stats).exists() and read_stats(config.stats)[:2] != stats:
            raise ValueError(f"stats: {config.stats} changed since the run began: {stats} then")
        if world.first:
            for change in _changes(saved, about, config):
                logger.warning("%s", change)
        step, epoch = state.restore(saved)
        if world.first:
            run.complete(encoder, keep=_is_kept(config, step), **described())

    times = StageTimes(device, on=config.profile)

    def train_step(wav: Tensor) -> tuple[Tensor, Tensor]:
        with times("log-mel"):
            lms = to_lms(as_float(wav).flatten(0, -2))
        with times("augmentation"):
            view1, view2 = aug(lms, sample_offset=world.rank * len(lms))
            if segments == 2:  # one view of each
                view1, view2 = view1[0::2], view2[1::2]
        with times("forward"), torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss, projection = network(view1, view2)
        with times("backward"):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with times("optimiser"):
            optimizer.step()
        with times("EMA"):
            learner.update_target()
        return loss.detach(), projection

    def save(last: bool) -> None:
        state.check_finite(step, run.resume_hint())
        content = state.collect({"step": step, "epoch": epoch, "stats": stats, "config": asdict(config)} | about)
        if world.first:
            run.save(content, encoder, **described(), last=last, keep=_is_kept(config, step))
            if not last and run.curves_due():
                _draw(config, run, None, stats)

    do_step: Step | None = None if graphed else train_step
    batch = None
    if world.first:
        logger.info("%s", _tell_begin(config, device, step, total, clips))
    reading: Any = batches.run(total, start=step)
    with Watch(config, world, run, step, total) as watch, closing(reading):
        for batch in times.each("data", reading):
            do_step = do_step or graph_step(train_step, batch.wav, [learner, aug], optimizer)
            lr = set_learning_rate(optimizer, config, step, total)
            loss, projection = do_step(batch.wav)
            step, epoch = step + 1, batch.epoch
            if watch.due(step):
                watch.after_step(step, epoch, loss, projection, lr=lr, refused=aug.bank.refused)
                if watch.saving:
                    save(last=watch.ending)
                if watch.ending:
                    break

    if world.first:
        if config.profile and times.spans:
            report = times.report(run.path / "profile.json", batches.local_size, config=asdict(config))
            print(report, file=sys.stderr)
        _draw(config, run, None if batch is None else to_lms(as_float(batch.wav).flatten(0, -2)), stats)
    last = run.last_line or {}
    return PretrainResult(run.path, step, last.get("loss", math.nan), last.get("spread", math.nan), watch.stopped_by)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], config: PretrainConfig) -> Iterator[str]:
    """Yield warnings of what differs from the run that is resumed and may change its result."""
    before = dict(now) | dict(saved)  # older checkpoints have fewer entries
    if before["listing"] != now["listing"]:
        yield f"{config.audio_dir} holds other files than at the start of the run; resuming with them"
    if before["torch"] != now["torch"]:
        yield f"torch {now['torch']} resumes a run of torch {before['torch']}: results may differ"
    if before["total"] != now["total"] and "cosine" in (config.lr_schedule, config.ema_schedule):
        yield f"the cosine schedule now ends at step {now['total']} instead of {before['total']}: its value jumps"


def _is_kept(config: PretrainConfig, step: int) -> bool:
    return config.keep_every is not None and step % config.keep_every == 0


def _check_shape(config: PretrainConfig, encoder: nn.Module, to_lms: LogMel, source: Source) -> tuple[int, int]:
    """Return (mels, frames) of the segments, or refuse settings that do not fit them.

    A user's own encoder is tried once, so that a wrong output shape is found before the statistics are computed.
    """
    stride: Any = getattr(encoder, "frame_stride", 1)
    minimum = max(to_lms.n_fft // 2 + 1, (stride - 1) * to_lms.hop_length)
    if source.num_samples < minimum:
        needed = f"{minimum} samples, {minimum / config.sample_rate:.3g} s"
        raise ValueError(f"unit_sec: expected at least {needed}, for {config.encoder}, got {config.unit_sec}")
    shape = to_lms.n_mels, to_lms.num_frames(source.num_samples)
    if not isinstance(encoder, AudioNTT):
        require_embeddings(encoder, shape)
    resolve_settings(config.preset, config.view_settings()).check_ranges(*shape)
    return shape


def _tell_begin(config: PretrainConfig, device: torch.device, step: int, total: int, clips: int) -> str:
    if step >= total:
        return f"nothing to do: {step} of {total} steps are done; raise --epochs or --steps to train longer"
    if step:
        return f"resuming at step {step} of {total}"
    width = "" if config.feature_d is None else f", {config.feature_d}-d"
    what = f"{config.encoder}{width}, on {device}"
    return f"training {what}: {total} steps of {config.batch_size} segments, from {clips} clips"


def _open_source(config: PretrainConfig, world: World, run: RunFolder) -> Source:
    folder = Path(str(config.audio_dir))
    if config.demo:
        folder = run.path / DEMO_AUDIO
        world.broadcast(lambda: len(write_demo_corpus(folder, seed=config.seed)))
    source = open_source(folder, unit_sec=float(config.unit_sec or 0), sample_rate=config.sample_rate, seed=config.seed)
    if isinstance(source, SegmentStore) and world.device.type == "cuda" and config.store_on_gpu is not False:
        free, _all = torch.cuda.mem_get_info(world.device)
        if config.store_on_gpu or 2 * int(source.lengths.sum()) < free / 4:
            return source.to_device(world.device)
    elif config.store_on_gpu:
        raise ValueError("store_on_gpu: expected a packed store and a GPU (or false, or null), got true")
    return source


def _take_stats(source: Source, to_lms: LogMel, config: PretrainConfig) -> tuple[Pair | None, dict[Path, str]]:
    """Return mean and std of the log-mels, as ``byola-fast stats`` computes them, and the broken files."""
    if config.stats is not None:
        return read_stats(config.stats, to_lms)[:2], {}
    if not config.stats_segments:
        return None, {}
    broken: dict[Path, str] = {}
    with Progress("segments for mean and std") as progress:
        stats = take_stats(
            source,
            to_lms,
            segments=config.stats_segments,
            seed=config.seed,
            workers=config.workers,
            progress=lambda done, total: progress.show(done, total=total),
            broken=broken,
        )
    return stats[:2], broken


def _stats_now(aug: Augment, stats: Pair | None) -> Pair | None:
    if aug.running_stats is None:
        return stats
    mean, std = aug.running_stats.stats().tolist()
    require_sound(std)
    return mean, std


def _prepare(learner: nn.Module, config: PretrainConfig, world: World) -> nn.Module:
    """Return the module to call: the learner, compiled if asked, with gradients averaged over all processes."""
    if config.sync_batchnorm:
        if world.device.type != "cuda":
            raise ValueError("sync_batchnorm: expected GPUs, because SyncBatchNorm has no CPU version, got the CPU")
        nn.SyncBatchNorm.convert_sync_batchnorm(learner)
    if config.channels_last:
        learner.to(memory_format=torch.channels_last)
    if config.compile:
        learner.compile(dynamic=False)
    return world.wrap(learner)


def _make_optimizer(learner: nn.Module, config: PretrainConfig, graphed: bool) -> torch.optim.Optimizer:
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    assert config.lr is not None
    lr: Any = torch.tensor(config.lr, device=trained[0].device) if graphed else config.lr
    return torch.optim.Adam(trained, lr=lr, fused=True, capturable=graphed)


def _draw(config: PretrainConfig, run: RunFolder, lms: Tensor | None, stats: Pair | None) -> None:
    """Draw the curves and some views of a batch; warn if that fails."""
    shown = [line for line in run.lines if {"loss", "spread"} <= line.keys()]
    if not shown:
        return
    try:
        draw_training(run.path / "training.png", shown, find_learner(str(config.objective)).loss_name)
        if lms is not None and config.mixup == "log":  # the picture has no panel for the other mixers
            names = [f"segment {number}" for number in range(1, 1 + len(lms))]
            given: dict[str, Any] = {"preset": config.preset, "seed": config.seed, "stats": stats}
            given |= config.view_settings()
            panels = explain_views(lms[:PICTURED_FROM].cpu(), names, samples=3, **given)
            draw_views(run.path / "views.png", panels, title=f"views of the last batch ({config.preset})")
    except Exception as error:  # a picture is worth no run
        logger.warning("no training.png and views.png: %s", error)
