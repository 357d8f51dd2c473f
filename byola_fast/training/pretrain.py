"""Pre-training: one flat loop from audio files to an encoder."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byola_fast.audio.batches import Batches, durations
from byola_fast.audio.demo_corpus import write_demo_corpus
from byola_fast.audio.sources import OwnSource, Source, open_source
from byola_fast.networks.encoder_file import describe_encoder
from byola_fast.networks.encoders import ENCODERS, AudioNTT, feature_width, make_encoder, require_embeddings
from byola_fast.objectives.learner import Learner
from byola_fast.objectives.registry import find_learner, make_learner
from byola_fast.runtime.device import pick_device, warn_of_slow_bfloat16
from byola_fast.runtime.distributed import World, join, name_lost_rank
from byola_fast.runtime.plugins import class_name
from byola_fast.runtime.progress import Progress
from byola_fast.spectrograms.corpus_statistics import read_stats, require_sound, take_stats
from byola_fast.spectrograms.log_mel import LogMel
from byola_fast.training.config import PretrainConfig
from byola_fast.training.cuda_graph import Step, graph_step, use_graph
from byola_fast.training.curves import draw_training
from byola_fast.training.probe import Probe
from byola_fast.training.provenance import now, provenance
from byola_fast.training.run_folder import DEMO_AUDIO, RESULTS, RunFolder, RunState
from byola_fast.training.schedules import learning_rate, set_learning_rate
from byola_fast.training.stage_times import StageTimes
from byola_fast.training.watch import Watch
from byola_fast.views.augment import Augment
from byola_fast.views.explain import explain_views
from byola_fast.views.params import resolve_settings
from byola_fast.views.pictures import draw_views

logger = logging.getLogger("byola_fast")

PICTURED_FROM = 16  # segments of the last batch that views.png shows or mixes in

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
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


def pretrain(
    config: PretrainConfig,
    *,
    source: Source | None = None,
    encoder: nn.Module | None = None,
    optimizer: MakeOptimizer | None = None,
) -> PretrainResult:
    """Pre-train an encoder on a folder of audio: data -> log-mel -> views -> networks -> loss -> Adam -> EMA.

    Writes to ``config.out``: ``log.jsonl`` (a line per ``log_every`` steps), ``checkpoint.pt`` (everything that a run
    needs to resume), ``encoder.pth`` (the encoder alone), ``training.png`` and ``views.png`` (with matplotlib). A run
    found there with the same settings resumes from its checkpoint. Ctrl-C and SIGTERM finish the current step, save and
    leave. Under torchrun every process calls this function. It seeds torch's default generators and, if asked, sets
    torch's number of threads.

    Args:
        config: see ``PretrainConfig``.
        source: your own data, instead of ``config.audio_dir``.
        encoder: your own network ``(B, 1, F, T)`` to ``(B, feature_d)`` with an attribute ``feature_d``, instead of
            ``config.encoder``; it is trained in place.
        optimizer: a function of the list of trained parameters that returns their optimiser, instead of Adam. Its
            learning rates are those that ``lr_schedule`` and ``warmup_steps`` begin with.

    Raises:
        TypeError: ``source``, ``encoder`` or ``optimizer`` is something else.
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
    own: dict[str, Any] = {"source": source, "encoder": encoder, "optimizer": optimizer}
    config.check([name for name, value in own.items() if value is not None])
    if encoder is not None:
        config = replace(config, encoder=class_name(encoder, ENCODERS), feature_d=feature_width(encoder))
    device = pick_device(config.device)
    if device.type == "cpu" and config.dtype == "bfloat16":
        warn_of_slow_bfloat16()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with (
        join(device, config.timeout_min) as world,
        closing(RunFolder(config.out)) as run,
        name_lost_rank(world, run.resume_hint),
    ):
        return _train(config.resolved(device.type, optimizer is not None), world, run, **own)


def _train(
    config: PretrainConfig, world: World, run: RunFolder, source: Any, encoder: nn.Module | None, optimizer: Any
) -> PretrainResult:
    device = world.device
    saved = world.broadcast(lambda: run.open(config))
    torch.manual_seed(config.seed)

    # Data: random segments of every clip in each epoch, and this process's part of each global batch.
    source = _open_source(config, world, run) if source is None else _own_source(source, config)
    by_duration = config.sample_by == "duration"
    seconds = world.broadcast(lambda: durations(source, config.workers)) if by_duration else None
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
        seconds=seconds,
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
    if encoder is None:
        encoder = make_encoder(str(config.encoder), n_mels=to_lms.n_mels, feature_d=config.feature_d)
    shape = _check_shape(config, encoder, to_lms, source)
    learner: Learner = make_learner(str(config.objective), encoder, **config.learner(total)).to(device)
    network = _prepare(learner, config, world)
    own = optimizer is not None
    graphed = use_graph(config.cuda_graph, device, processes=world.size, profile=config.profile, own=own)
    optimizer = _make_optimizer(learner, config, graphed, optimizer)
    rates = [float(group["lr"]) for group in optimizer.param_groups]

    def open_probe() -> Probe | None:
        every = config.probe_every or max(1, total // 20)
        best = saved.get("best") if saved and saved["config"].get("probe") == config.probe else None
        return None if config.probe is None else Probe(config.probe, every, best=best, workers=config.workers)

    probe = world.broadcast(open_probe)
    take_stats = partial(_take_stats, source, to_lms, config, seconds)
    stats, broken = (saved["stats"], {}) if saved else world.broadcast(take_stats)
    batches.broken.update(broken)  # already reported

    # Views.
    aug = Augment(
        config.preset,
        n_memory=config.n_memory,
        shape=shape,
        seed=config.seed,
        stats=stats,
        post_norm=config.post_norm,
        **config.view_settings(),
        **config.local_settings(),
    ).to(device)
    state = RunState(world, learner, optimizer, aug)
    step, epoch, clips = 0, 0, len(source)
    # what a resumed run compares
    about = {"clips": clips, "listing": batches.listing, "total": total, "torch": str(torch.__version__)}

    if world.first:
        data = {"data": config.audio_dir or ("demo" if config.demo else type(source).__name__)}
        run.provenance = provenance(**data, clips=clips, listing=batches.listing, total_steps=total)

    def described() -> dict[str, Any]:
        origin = run.provenance | {"step": step, "saved": now()}
        config_now = describe_encoder(encoder, to_lms, unit_sec=config.unit_sec, provenance=origin)
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
            lms = to_lms(wav.flatten(0, -2))
        with times("augmentation"):
            view1, view2, *local_views = aug(lms, sample_offset=world.rank * len(lms))
            if segments == 2:  # one view of each
                view1, view2 = view1[0::2], view2[1::2]
        with times("forward"), torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            # a learner of one's own may take two views alone
            loss, projection = network(view1, view2, local_views) if local_views else network(view1, view2)
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
        content |= {"best": probe.best} if probe is not None else {}
        if world.first:
            run.save(content, encoder, **described(), last=last, keep=_is_kept(config, step))
            if not last and run.curves_due():
                _draw(config, run, None, stats)

    do_step: Step | None = None if graphed else train_step
    batch = None
    if world.first:
        logger.info("%s", _tell_begin(config, device, step, total, clips))
    reading: Any = batches.run(total, start=step)
    every = None if probe is None else probe.every
    with Watch(config, world, run, step, total, every) as watch, closing(reading):
        for batch in times.each("data", reading):
            do_step = do_step or graph_step(train_step, batch.wav, [learner, aug], optimizer)
            lr = set_learning_rate(optimizer, rates, config, step, total)
            loss, projection = do_step(batch.wav)
            step, epoch = step + 1, batch.epoch
            if watch.due(step):
                score = None
                if probe is not None and world.first and probe.due(step, total):
                    score = probe(encoder, _stats_now(aug, stats), to_lms)
                    if probe.is_best(step, score):
                        run.keep_best(encoder, **described())
                watch.after_step(step, epoch, loss, projection, lr=lr, refused=aug.bank.refused, probe=score)
                if watch.saving:
                    save(last=watch.ending)
                if watch.ending:
                    break

    last = world.broadcast(lambda: run.last_line or {})
    if world.first:
        if probe is not None and probe.best is not None:
            logger.info("best score of the probe: %.1f %%, at step %d", 100 * probe.best[1], probe.best[0])
        if config.profile and times.spans:
            report = times.report(run.path / "profile.json", batches.local_size, config=asdict(config))
            print(report, file=sys.stderr)
        _draw(config, run, None if batch is None else to_lms(batch.wav.flatten(0, -2)), stats)
        run.compare(config, {name: value for name, value in last.items() if name in RESULTS})
    return PretrainResult(run.path, step, last.get("loss", math.nan), last.get("spread", math.nan), watch.stopped_by)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], config: PretrainConfig) -> Iterator[str]:
    """Yield warnings of what differs from the run that is resumed and may change its result."""
    before = dict(now) | dict(saved)  # older checkpoints have fewer entries
    if before["listing"] != now["listing"]:
        yield f"{config.audio_dir} holds other files than at the start of the run; resuming with them"
    if before["torch"] != now["torch"]:
        yield f"torch {now['torch']} resumes a run of torch {before['torch']}: results may differ"
    if before["total"] != now["total"] and "cosine" in (config.lr_schedule, config.ema_schedule):
        rates = [
            learning_rate(config, before["step"], total, config.lr or 0.0) for total in (before["total"], now["total"])
        ]
        jump = f": the learning rate jumps from {rates[0]:.2g} to {rates[1]:.2g}" if any(rates) else ""
        yield f"the cosine schedule now ends at step {now['total']} instead of {before['total']}{jump}"


def _is_kept(config: PretrainConfig, step: int) -> bool:
    return config.keep_every is not None and step % config.keep_every == 0


def _check_shape(config: PretrainConfig, encoder: nn.Module, to_lms: LogMel, source: Source) -> tuple[int, int]:
    """Return (mels, frames) of the segments, or refuse settings that do not fit them.

    A user's own encoder is tried once, so that a wrong output shape is found before the statistics are computed; any
    encoder is tried on local views.
    """
    stride: Any = getattr(encoder, "frame_stride", 1)
    minimum = max(to_lms.n_fft // 2 + 1, (stride - 1) * to_lms.hop_length)
    if source.num_samples < minimum:
        needed = f"{minimum} samples, {minimum / config.sample_rate:.3g} s"
        raise ValueError(f"unit_sec: expected at least {needed}, for {config.encoder}, got {config.unit_sec}")
    shape = to_lms.n_mels, to_lms.num_frames(source.num_samples)
    if not isinstance(encoder, AudioNTT):
        require_embeddings(encoder, shape)
    if config.local_size is not None:
        try:
            require_embeddings(encoder, config.local_settings()["local_size"])
        except ValueError as error:
            raise ValueError(f"local_size: expected a size that the encoder takes: {error}") from error
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


def _own_source(given: Any, config: PretrainConfig) -> Source:
    needs = ["seconds"] if config.sample_by == "duration" else []
    source: Source = given if hasattr(given, "gather") else OwnSource(given, *needs)  # a store checks itself
    if (rate := getattr(given, "sample_rate", config.sample_rate)) != config.sample_rate:
        raise ValueError(f"sample_rate: expected {rate} Hz, the rate of the source, got {config.sample_rate}")
    if source.num_samples != config.num_samples:
        wanted = f"{config.num_samples}, {config.unit_sec} s at {config.sample_rate} Hz"
        raise ValueError(f"source: num_samples: expected {wanted}, got {source.num_samples}")
    return source


def _open_source(config: PretrainConfig, world: World, run: RunFolder) -> Source:
    assert config.audio_dir is not None or config.demo
    folder = run.path / DEMO_AUDIO
    if config.demo:
        world.broadcast(lambda: len(write_demo_corpus(folder, seed=config.seed)))
    paths: Any = folder if config.demo else config.audio_dir
    source: Any = open_source(
        paths, unit_sec=float(config.unit_sec or 0), sample_rate=config.sample_rate, seed=config.seed
    )
    if hasattr(source, "to_device") and world.device.type == "cuda" and config.store_on_gpu is not False:
        free, _all = torch.cuda.mem_get_info(world.device)
        if config.store_on_gpu or 2 * int(source.lengths.sum()) < free / 4:
            return source.to_device(world.device)
    elif config.store_on_gpu:
        raise ValueError("store_on_gpu: expected a packed store and a GPU (or false, or null), got true")
    return source


def _take_stats(
    source: Source, to_lms: LogMel, config: PretrainConfig, seconds: Tensor | None
) -> tuple[Pair | None, dict[Path, str]]:
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
            durations=seconds,
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


def _make_optimizer(
    learner: nn.Module, config: PretrainConfig, graphed: bool, make: MakeOptimizer | None
) -> torch.optim.Optimizer:
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    if make is None:
        assert config.lr is not None
        lr: Any = torch.tensor(config.lr, device=trained[0].device) if graphed else config.lr
        return torch.optim.Adam(trained, lr=lr, fused=True, capturable=graphed)
    made = make(trained) if callable(make) else make
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a function that returns a torch optimiser, got {type(made).__name__}")
    return made


def _draw(config: PretrainConfig, run: RunFolder, lms: Tensor | None, stats: Pair | None) -> None:
    """Draw the curves and some views of a batch; warn if that fails."""
    shown = [line for line in run.lines if {"loss", "spread"} <= line.keys()]
    if not shown:
        return
    try:
        draw_training(run.path / "training.png", shown, find_learner(str(config.objective)).loss_name, run.path.name)
        if lms is not None and config.mixup == "log":  # the picture has no panel for the other mixers
            names = [f"segment {number}" for number in range(1, 1 + len(lms))]
            given: dict[str, Any] = {"preset": config.preset, "seed": config.seed, "stats": stats}
            given |= config.view_settings()
            panels = explain_views(lms[:PICTURED_FROM].cpu(), names, samples=3, **given)
            title, front_end = f"views of the last batch ({config.preset})", LogMel(**config.front_end())
            draw_views(run.path / "views.png", panels, title=title, to_lms=front_end)
    except Exception as error:  # a picture is worth no run
        logger.warning("no training.png and views.png: %s", error)
