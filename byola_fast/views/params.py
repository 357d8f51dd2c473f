"""The settings of an augmentation, and the parameters drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from byola_fast.ops import _checks as check
from byola_fast.ops.functional import canvas_size, size_range, weights_in_range


class Preset(NamedTuple):
    """What a version of the paper publishes; the last one is this project's.

    Attributes:
        mixup_ratio, fader_gain: as in ``ViewSettings``.
        lr: learning rate of its training.
        encoder: the network that it introduces.
        feature_d: width of the embedding; None for the encoder's own.
        objective, unit_sec, reconstruction: as in ``PretrainConfig``.
    """

    mixup_ratio: float
    fader_gain: float
    lr: float
    encoder: str
    feature_d: int | None = None
    objective: str = "byol"
    unit_sec: float = 0.95
    reconstruction: float | None = None


PRESETS = {
    "byola-v1": Preset(mixup_ratio=0.4, fader_gain=0.0, lr=3e-4, encoder="AudioNTT2020"),
    "byola-v2": Preset(mixup_ratio=0.2, fader_gain=1.0, lr=1e-4, encoder="AudioNTT2022"),
    "small-data": Preset(
        mixup_ratio=0.4,
        fader_gain=0.0,
        lr=3e-4,
        encoder="AudioNTT2020",
        feature_d=512,
        objective="simclr",
        unit_sec=0.31,
        reconstruction=5.0,
    ),
}


@dataclass(kw_only=True)
class ViewSettings:
    """What is drawn and how it is applied, for views of the size of their input.

    Attributes:
        mixup: "log" (log-mixup-exp), or the paper's ablations "linear", "gaussian" and "none".
        mixup_ratio: upper bound of the share that is mixed in (the paper's alpha), in [0, 1]; by default the preset's.
        interpolation: of the resized crops: "bilinear", or "bicubic" as published weights were trained with.
        freq_scale: minimum and maximum height of a crop, times the mel bins.
        time_scale: minimum and maximum width of a crop, times the frames.
        virtual_crop_scale: height and width of the canvas that crops are taken from, times mel bins and frames, at
            least 1.
        fader_gain: bound of the random linear fader's ends, in nats; by default the preset's, 0 (none) or 1.
    """

    mixup: str = "log"
    mixup_ratio: float | None = None
    interpolation: str = "bilinear"
    freq_scale: tuple[float, float] = (0.6, 1.5)
    time_scale: tuple[float, float] = (0.6, 1.5)
    virtual_crop_scale: tuple[float, float] = (1.0, 1.5)
    fader_gain: float | None = None

    def view_settings(self) -> dict[str, Any]:
        """Return the settings of the views alone, by name."""
        settings = {field.name: getattr(self, field.name) for field in fields(ViewSettings)}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


class SettingsByName(TypedDict, total=False):
    """The keywords that ``augment`` and ``Augment`` take: those of ``Settings``."""

    mixup: str
    mixup_ratio: float | None
    interpolation: str
    freq_scale: tuple[float, float]
    time_scale: tuple[float, float]
    virtual_crop_scale: tuple[float, float]
    fader_gain: float | None
    size: tuple[int, int] | None


@dataclass(kw_only=True)
class Settings(ViewSettings):
    """View settings with a preset's values filled in, and the size of the views.

    Attributes:
        size: (mels, frames) of the views; the input's if None.
    """

    mixup_ratio: float
    fader_gain: float
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check.require_one_of("mixup", self.mixup, check.MIXERS)
        check.require_one_of("interpolation", self.interpolation, check.INTERPOLATIONS)

    def check_ranges(self, mels: int, frames: int) -> None:
        """Refuse what ``ops.draw_params`` would refuse for inputs of a size.

        Raises:
            ValueError: a value out of range; names the setting.
        """
        weights_in_range(self.mixup_ratio, self.fader_gain)
        size_range("freq_scale", mels, self.freq_scale)
        size_range("time_scale", frames, self.time_scale)
        canvas_size(mels, frames, self.virtual_crop_scale)


SETTING_NAMES = tuple(field.name for field in fields(Settings))


def resolve_settings(preset: str, changes: Mapping[str, Any]) -> Settings:
    """Return a preset with some settings changed; None stands for the preset's value.

    Raises:
        ValueError: an unknown preset or value. TypeError: an unknown setting.
    """
    check.require_one_of("preset", preset, tuple(PRESETS))
    for name in changes:
        if name not in SETTING_NAMES:
            raise TypeError(f"unknown setting {name!r}; known settings are {', '.join(SETTING_NAMES)}")
    known = PRESETS[preset]
    defaults = {"mixup_ratio": known.mixup_ratio, "fader_gain": known.fader_gain}
    return Settings(**defaults | {name: value for name, value in changes.items() if value is not None})


@dataclass(eq=False)
class AugmentParams:
    """The random parameters of V views of a batch, for replay. Views come first, local ones after the others.

    ``torch.load(weights_only=True)`` loads them once byola_fast is imported; ``==`` compares all values.

    Attributes:
        lam: ``(V, B)`` float32, weight of the partner in each sample, in [0, 1].
        bank_index: ``(V, B)`` int64, the partner's row in the bank, or in the batch if the bank is missing or empty;
            -1: no partner, not mixed.
        crop: ``(V, B, 4)`` int32, boxes (i, j, h, w) on the virtual canvas, of local views on the input: first mel,
            first frame, mels, frames.
        fader: ``(V, B, 2)`` float32, value added at the first and the last frame.
        rng: ``(2,)`` int64, seed and step, which the Gaussian mixer's noise follows from; zeros by default.
        bank_count: ``()`` int64, rows in the bank at the draw; None without a bank.
        sample_offset: number of the first sample in the global batch.

    ``params[10:20]`` are the parameters of samples 10 to 19; without a bank, ``bank_index`` still means rows of the
    whole batch.
    """

    lam: Tensor
    bank_index: Tensor
    crop: Tensor
    fader: Tensor
    rng: Tensor = None  # type: ignore[assignment]  # zeros, on the device of the others
    bank_count: Tensor | None = None
    sample_offset: int = 0

    def __post_init__(self) -> None:
        if self.rng is None:
            self.rng = torch.zeros(2, dtype=torch.int64, device=self.lam.device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AugmentParams):
            return NotImplemented
        return all(_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    def __len__(self) -> int:
        return self.lam.shape[1]

    def __getitem__(self, samples: slice) -> AugmentParams:
        if not isinstance(samples, slice):
            raise TypeError(f"params[...]: expected a slice of samples, got {samples!r}")
        start, _stop, step = samples.indices(len(self))
        if step != 1:
            raise ValueError(f"params[...]: expected a slice of neighbours, got step {step}")
        parts = {name: getattr(self, name)[:, samples] for name in ("lam", "bank_index", "crop", "fader")}
        return replace(self, **parts, sample_offset=self.sample_offset + start)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AugmentParams:
        """Return the same parameters on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def check(
        self, batch: int, device: torch.device, canvases: Sequence[tuple[int, tuple[int, int]]], rows: int
    ) -> None:
        """Refuse parameters that do not fit a batch; values are checked on the CPU only.

        Args:
            batch: B.
            device: where the batch is.
            canvases: number of views that share a canvas, and its (mels, frames), in the order of the views.
            rows: number of rows to choose partners from.
        """
        check.require_float("params.lam", self.lam)
        check.require_float("params.fader", self.fader)
        check.whole("params.sample_offset", self.sample_offset, 0, 2**63)
        counts = [count for count, _canvas in canvases]
        for name, wanted in (("lam", ()), ("bank_index", ()), ("crop", (4,)), ("fader", (2,))):
            tensor = getattr(self, name)
            check.require_shape(f"params.{name}", tensor, (sum(counts), batch, *wanted))
            if tensor.device != device:
                raise ValueError(f"params.{name}: expected on {device}, got {tensor.device}; use params.to(device)")
        check.require_integer("params.bank_index", self.bank_index)
        check.require_integer("params.crop", self.crop)
        check.require_integer("params.rng", self.rng, (torch.int64,))
        check.require_shape("params.rng", self.rng, (2,))
        check.require_lam_in_range("params.lam", self.lam)
        for boxes, (_count, canvas) in zip(self.crop.split(counts), canvases, strict=True):
            check.require_crop_in_canvas("params.crop", boxes, canvas)
        check.require_index_in_range("params.bank_index", self.bank_index, rows)

    def __str__(self) -> str:
        seed, step = self.rng.tolist()
        views, first = len(self.lam), self.sample_offset
        lines = [f"AugmentParams: {views} views of {len(self)} samples from number {first}, seed {seed}, step {step}"]
        for view in range(views):
            for sample in range(min(len(self), 4)):
                i, j, h, w = self.crop[view, sample].tolist()
                head, tail = (value + 0.0 for value in self.fader[view, sample].tolist())  # -0 reads as 0
                lines.append(
                    f"  view {view + 1}, sample {sample}: lam {self.lam[view, sample]:.3f} of row "
                    f"{int(self.bank_index[view, sample])}, mels {i}+{h}, frames {j}+{w}, fader {head:+.2f} {tail:+.2f}"
                )
        return "\n".join(lines)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


torch.serialization.add_safe_globals([AugmentParams])
