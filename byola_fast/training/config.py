"""The settings of a pre-training run: meaning, defaults and bounds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from byola_fast.networks.ema import CosineDecay
from byola_fast.networks.encoders import ENCODERS
from byola_fast.objectives.registry import LEARNERS, default_of, find_learner
from byola_fast.ops import _checks as check
from byola_fast.runtime.device import DTYPES
from byola_fast.runtime.plugins import find_class
from byola_fast.spectrograms.log_mel import FrontEnd
from byola_fast.views.augment import Augment
from byola_fast.views.params import PRESETS, ViewSettings

SCHEDULES = ("constant", "cosine")
SAMPLE_BY = ("clip", "duration")


@dataclass(kw_only=True)
class PretrainConfig(FrontEnd, ViewSettings):
    """Settings of a pre-training run; more of them in ``FrontEnd`` and ``ViewSettings``.

    Attributes:
        audio_dir: folder of audio files (wav, flac, ogg, opus, mp3 and more; any rate and channel count), one file, a
            manifest (CSV or JSONL: file_name and, if wanted, start and end in seconds), several of these, or a store
            made by ``byola-fast pack``, which is read many times as fast.
        out: folder of the run: checkpoint, encoder, log, pictures. A run found there with the same settings resumes.
        demo: train for twenty seconds on a small corpus synthesised into OUT/demo_audio, instead of audio_dir.
        resume: require a run in OUT to resume. Without this flag, a run found there resumes too.
        restart: start over and replace the run in OUT.
        objective: "byol" (the method); for comparison "simclr", "moco" or "cola" (two segments of each clip); or your
            own learner, as package.module:Class. By default the preset's.
        preset: "byola-v1" (mixup up to 0.4, lr 3e-4, AudioNTT2020) or "byola-v2" (mixup up to 0.2, a random linear
            fader, lr 1e-4, AudioNTT2022), both with byol; "small-data", for a few hours of sound: simclr with
            reconstruction 5, segments of 0.31 s, otherwise byola-v1 at width 512.
        encoder: "AudioNTT2020", "AudioNTT2022", or your own, as package.module:Class; by default the preset's, or
            AudioNTT2020 for a feature_d of up to 1024, which AudioNTT2022 cannot have.
        feature_d: width of the embedding; wider is slower and often better. AudioNTT2020: 512, 1024 or 2048 (default)
            in the papers; 512 by default in small-data. AudioNTT2022: 3072.
        proj_size: width of the projection that the loss compares; by default the objective's, 256 (cola: 512).
        proj_dim: hidden width of projector and predictor; by default 4096. cola has none.
        temperature: of the softmax of simclr (default 0.1) and moco (0.07).
        queue_size: number of past keys that moco compares with; default 65536.
        reconstruction: weight of a second loss beside simclr's: the error of a linear decoder from each frame-level
            feature to its patch of the view; by default none, 5 in preset small-data.
        epochs: passes over the data; each takes one random segment of every clip.
        steps: maximum number of optimiser steps, counted over all parts of the run.
        batch_size: samples per step over all processes; larger is steadier and needs more memory.
        lr: learning rate of Adam; by default the preset's, 3e-4 or 1e-4 (byola-v2).
        lr_schedule: "constant" (published), or "cosine": falls to 0 at the end of the run.
        warmup_steps: steps over which the learning rate rises from 0 to lr.
        ema_decay: share of the target network kept at each step, in [0, 1]; closer to 1 is slower and steadier. By
            default the objective's: byol 0.99, moco 0.999.
        ema_schedule: "constant" (published), or "cosine": ema_decay rises to 1 at the end of the run.
        sample_by: "clip" takes one segment of every clip in an epoch; "duration" as many in all, but of each clip in
            proportion to its duration, so that an hour of music counts more than a drum hit.
        unit_sec: length of a segment, in seconds; shorter clips are padded with silence. By default the preset's, 0.95
            or 0.31 (small-data).
        stats_segments: number of random segments that give mean and std of the log-mels before training; 0 for running
            statistics (first version of the paper).
        stats: JSON file from ``byola-fast stats``, instead of stats_segments.
        n_memory: number of past inputs kept as mixing partners, 24 KB each; 0 mixes within the batch.
        post_norm: normalise both views jointly to mean 0 and std 1; local views apart from them.
        local_views: number of small crops of each segment beside its two views, for byol and simclr; each is compared
            with both views (multi-crop). Not published for BYOL-A.
        local_size: mel bins and frames of the local views; AudioNTT2020 and AudioNTT2022 need all mel bins.
        local_scale: minimum and maximum of both sides of their crops, times mel bins and frames, at most 1.
        seed: of weights, segments and views; the same seed on the same CPU gives the same losses.
        device: "cpu", "cuda", "cuda:1" and so on, "mps"; "auto" takes a GPU if there is one, another for each process.
        dtype: "float32", or "bfloat16" (autocast); by default bfloat16 on a GPU.
        compile: use torch.compile, which takes a minute at first; by default on a GPU.
        cuda_graph: replay the whole step as one CUDA graph; by default on a single GPU.
        channels_last: keep images as (B, F, T, channels), which is faster for convolutions.
        joint_batch: pass both views through the online network as one batch, so that BatchNorm's statistics cover both
            views; not published.
        sync_batchnorm: compute BatchNorm's statistics over all processes (GPUs only).
        workers: processes that decode audio, per training process; by default one fewer than CPU cores, at most 8. A
            store is read by one thread instead; 0 for none.
        store_on_gpu: keep the whole store in GPU memory, 115 MB an hour; by default if it takes less than a quarter of
            the free memory.
        threads: CPU threads of the networks; by default all cores. Fewer are faster if other programs keep cores busy.
        timeout_min: minutes that one process waits for the others before it gives up.
        log_every: steps between two lines of log.jsonl; each waits for the GPU. By default 1 on a CPU and 20 on a GPU.
        save_every: steps between two checkpoints; by default only save_minutes counts.
        keep_every: steps between two kept copies of the encoder, OUT/encoder-STEP.pth; each comes with a checkpoint. By
            default none.
        save_minutes: minutes between two checkpoints. One is also written at the end, at Ctrl-C and at SIGTERM.
        probe: CSV file of a small labelled task, as for eval. Every probe_every steps a linear probe is scored on its
            split valid or on one fold left out, never on test; the best encoder is kept as OUT/encoder-best.pth.
        probe_every: steps between two scores of the probe; by default a twentieth of the run.
        tensorboard: write OUT/tensorboard too, if tensorboard is installed.
        profile: time the stages of up to 200 steps, print them and write OUT/profile.json.
    """

    audio_dir: str | list[str] | None = None
    out: str = "runs/pretrain"
    demo: bool = False
    resume: bool = False
    restart: bool = False
    objective: str | None = None
    preset: str = "byola-v1"
    encoder: str | None = None
    feature_d: int | None = None
    proj_size: int | None = None
    proj_dim: int | None = None
    temperature: float | None = None
    queue_size: int | None = None
    reconstruction: float | None = None
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 256
    lr: float | None = None
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    ema_decay: float | None = None
    ema_schedule: str = "constant"
    sample_by: str = "clip"
    unit_sec: float | None = None
    stats_segments: int = 10000
    stats: str | None = None
    n_memory: int = 2048
    post_norm: bool = True
    local_views: int = 0
    local_size: tuple[int, int] | None = None
    local_scale: tuple[float, float] = (0.2, 0.6)
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    compile: bool | None = None
    cuda_graph: bool | None = None
    channels_last: bool = True
    joint_batch: bool = False
    sync_batchnorm: bool = False
    workers: int | None = None
    store_on_gpu: bool | None = None
    threads: int | None = None
    timeout_min: float = 15.0
    log_every: int | None = None
    save_every: int | None = None
    keep_every: int | None = None
    save_minutes: float = 10.0
    probe: str | None = None
    probe_every: int | None = None
    tensorboard: bool = True
    profile: bool = False

    def check(self, given: Collection[str] = ()) -> None:
        """Refuse values out of range that no later check names.

        Args:
            given: what ``pretrain`` is given besides: "source", "encoder", "optimizer".

        Raises:
            ValueError: names the setting.
        """
        if not self.demo and self.audio_dir is None and "source" not in given:
            raise ValueError("audio_dir: expected a folder of audio files (or --demo), got none")
        if self.demo and self.audio_dir is not None:
            raise ValueError(f"demo: expected none beside audio_dir, whose sound it replaces, got {self.audio_dir!r}")
        replaced: dict[str, list[str]] = {"source": ["audio_dir", "demo"], "encoder": ["encoder"], "optimizer": ["lr"]}
        for own in given:
            if both := [name for name in replaced[own] if getattr(self, name)]:
                raise ValueError(f"{both[0]}: expected none beside {own}=, got {getattr(self, both[0])!r}")
        if self.resume and self.restart:
            raise ValueError("restart: expected no more than one of resume and restart, got both")
        if self.probe_every is not None and self.probe is None:
            raise ValueError(f"probe_every: expected a probe to score, got none and {self.probe_every}")
        if self.objective is not None:
            find_learner(self.objective)
        if self.encoder is not None:
            find_class("encoder", self.encoder, ENCODERS)
        choices: dict[str, Iterable[str]] = dict(preset=PRESETS, dtype=DTYPES)
        choices.update(lr_schedule=SCHEDULES, ema_schedule=SCHEDULES, sample_by=SAMPLE_BY)
        for name, known in choices.items():
            if getattr(self, name) is not None:
                check.require_one_of(name, getattr(self, name), tuple(known))
        minimum = dict(epochs=1, steps=1, batch_size=2, feature_d=1, proj_size=1, proj_dim=1, sample_rate=1, n_mels=1)
        minimum.update(n_fft=1, n_memory=0)
        minimum.update(stats_segments=0, seed=0, workers=0, threads=1, log_every=1, save_every=1, keep_every=1)
        minimum.update(warmup_steps=0, probe_every=1, local_views=0)
        for name, bound in minimum.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")
            if value is not None and value >= (limit := 1 << (63 if name == "seed" else 31)):
                raise ValueError(f"{name}: expected below {limit}, got {value}")
        if self.local_views:
            self._check_local_views()
        elif self.local_size is not None:
            raise ValueError(f"local_size: expected none without local_views, got {self.local_size}")
        if self.unit_sec is not None and not 0 < self.unit_sec * self.sample_rate < 1 << 31:
            raise ValueError(f"unit_sec: expected seconds of 1 to 2^31 samples, got {self.unit_sec}")
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay: expected a share in [0, 1], got {self.ema_decay}")
        for name, what in dict(lr="a learning rate", timeout_min="minutes", save_minutes="minutes").items():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected {what} above 0, got {value}")

    def _check_local_views(self) -> None:
        objective = self.objective or PRESETS[self.preset].objective
        learner = find_learner(objective)
        if not learner.takes_local_views or learner.segments != 1:
            names = " and ".join(name for name, known in LEARNERS.items() if known.takes_local_views)
            raise ValueError(
                f"local_views: expected 0 with objective {objective!r}, which has no use for them ({names} have), "
                f"got {self.local_views}"
            )
        if self.local_size is None:
            raise ValueError(f"local_size: expected mel bins and frames of local views, as {self.n_mels},48, got none")
        Augment(self.preset, n_memory=0, seed=0, stats=(0.0, 1.0), **self.local_settings())  # checks the values

    def local_settings(self) -> dict[str, Any]:
        """Return the settings of the local views, by the names that ``Augment`` has for them."""
        size = None if self.local_size is None else tuple(self.local_size)
        return {"local_views": self.local_views, "local_size": size, "local_scale": tuple(self.local_scale)}

    @property
    def num_samples(self) -> int:
        """Length of a segment, in samples, as a ``Source`` must have it."""
        seconds = PRESETS[self.preset].unit_sec if self.unit_sec is None else self.unit_sec
        return round(seconds * self.sample_rate)

    def resolved(self, device_type: str, own_optimizer: bool = False) -> PretrainConfig:
        """Return the settings with all defaults filled in that depend on other settings or on the device."""
        on_gpu = device_type == "cuda"
        preset = PRESETS[self.preset]
        encoder, feature_d = self.encoder or preset.encoder, self.feature_d
        if self.encoder is None and feature_d is None:
            feature_d = preset.feature_d
        objective = self.objective or preset.objective
        if self.encoder is None and feature_d is not None and not ENCODERS[encoder].has_width(feature_d, self.n_mels):
            encoder = next((name for name, kind in ENCODERS.items() if kind.has_width(feature_d, self.n_mels)), encoder)
        if feature_d is None and encoder in ENCODERS:
            feature_d = ENCODERS[encoder].pretrain_d
        ema_decay = default_of(find_learner(objective), "ema_decay")
        filled: dict[str, Any] = {
            "objective": objective,
            "encoder": encoder,
            "feature_d": feature_d,
            "unit_sec": preset.unit_sec if self.unit_sec is None else self.unit_sec,
            "lr": None if own_optimizer else self.lr or preset.lr,
            "ema_decay": ema_decay if self.ema_decay is None else self.ema_decay,
            "mixup_ratio": preset.mixup_ratio if self.mixup_ratio is None else self.mixup_ratio,
            "fader_gain": preset.fader_gain if self.fader_gain is None else self.fader_gain,
            "f_max": min(self.f_max, self.sample_rate / 2),
            "reconstruction": preset.reconstruction
            if self.reconstruction is None and objective == preset.objective
            else self.reconstruction,
            "dtype": self.dtype or ("bfloat16" if on_gpu else "float32"),
            "compile": on_gpu if self.compile is None else self.compile,
            "log_every": self.log_every or (20 if on_gpu else 1),
        }
        return replace(self, **filled)

    def learner(self, steps: int) -> dict[str, Any]:
        """Return the arguments of ``make_learner`` for a run of so many steps."""
        names = ("proj_size", "proj_dim", "temperature", "queue_size", "reconstruction", "joint_batch")
        decay: Any = self.ema_decay
        if decay is not None and self.ema_schedule == "cosine":
            decay = CosineDecay(decay, steps)
        return {name: getattr(self, name) for name in names} | {"ema_decay": decay}


# The settings of --demo. One thread takes the same time on a busy machine as on an idle one; two would save 5 s.
DEMO = {"epochs": 1000, "steps": 16, "batch_size": 32, "feature_d": 512, "n_memory": 256, "threads": 1}

# Settings that a resumed run may change: its length, paths, and what changes rounding at most.
MAY_CHANGE = {
    *("epochs", "steps", "audio_dir", "out", "resume", "restart", "device", "compile", "cuda_graph", "channels_last"),
    *("workers", "store_on_gpu", "threads", "timeout_min", "log_every", "save_every", "keep_every"),
    *("save_minutes", "probe", "probe_every", "tensorboard", "profile"),
}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run of version 0.1 under today's names: ``precision: bf16`` is ``dtype: bfloat16``.

    >>> renamed({"precision": "bf16", "lr": 0.1})
    {'lr': 0.1, 'dtype': 'bfloat16'}
    """
    values = dict(values)
    if "precision" in values:
        precision = values.pop("precision")
        values.setdefault("dtype", "bfloat16" if precision == "bf16" else precision)
    return values


def differing_settings(before: Mapping[str, Any], now: PretrainConfig) -> list[str]:
    """Name the settings that differ and that a resumed run must keep.

    >>> differing_settings({"lr": 0.1, "steps": 3, "seed": 0}, PretrainConfig(lr=0.2, steps=9))
    ['lr: 0.1 there, 0.2 now']
    """
    before = {"local_views": 0} | renamed(before)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(now).items()}
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in before.items()}
    names = [name for name in listed if name in found and name not in MAY_CHANGE and found[name] != listed[name]]
    return [f"{name}: {found[name]} there, {listed[name]} now" for name in names]
