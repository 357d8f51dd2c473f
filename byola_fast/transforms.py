"""Single steps of the augmentation as modules, for ``nn.Sequential``, a data loader's worker, or one's own views.

    transform = nn.Sequential(PrecomputedNorm((-7.1, 4.2)), LogMixupExp(), RandomResizeCrop(), RandomLinearFader())

``Augment`` makes all views in one call, several times as fast; use it where they are made alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from byola_fast import ops
from byola_fast.ops import _checks as check
from byola_fast.ops.functional import size_range, weights_in_range
from byola_fast.ops.philox import SLOT_APPLY, view_words
from byola_fast.ops.reference import EPS, compute_dtype, fader_curve_reference
from byola_fast.runtime.buffers import FixedDtype
from byola_fast.runtime.distributed import loader_worker, own_rank
from byola_fast.runtime.recomputation import refuse_recomputation
from byola_fast.spectrograms.statistics import RunningStats, given_stats
from byola_fast.views.augment import _fresh_rng
from byola_fast.views.memory_bank import MemoryBank

__all__ = ["LogMixupExp", "PrecomputedNorm", "RandomLinearFader", "RandomResizeCrop", "RunningNorm"]


class RandomTransform(FixedDtype):
    """The base class of the random transforms: shapes, the generator state, and ``p``.

    Args:
        p: probability with which a sample is changed.
        seed: in [0, 2^63); by default drawn from torch's default generator. Transforms of one seed draw independently
            of one another, and what ``Augment`` of that seed draws for its first view.

    Shape:
        Log-mel spectrograms ``(F, T)``, ``(B, F, T)`` or ``(B, C, F, T)``; every sample has its own parameters, which
        its channels share.

    State:
        ``rng (2,)`` int64, seed and step, a buffer. A call advances the step; in eval mode it does not. In a data
        loader's worker the stream follows from ``seed`` and the worker's own seed.
    """

    rng: Tensor

    def __init__(self, p: float = 1.0, seed: int | None = None) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p: expected a probability in [0, 1], got {p}")
        self.p = p
        self.register_buffer("rng", _fresh_rng(torch.zeros(0).device, seed, 0, None))
        self._worker_seed: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed spectrograms, of the rank and dtype of ``x``."""
        check.require_float("x", x)
        if x.dim() not in (2, 3, 4):
            raise ValueError(f"x: expected shape (F, T), (B, F, T) or (B, C, F, T), got {tuple(x.shape)}")
        check.require_same_device("x", x, type(self).__name__, self.rng)
        refuse_recomputation(type(self).__name__)
        self._enter_worker()
        samples = x[None, None] if x.dim() == 2 else x[:, None] if x.dim() == 3 else x
        offset = own_rank() * len(samples)
        words, *_ = view_words(self.rng, len(samples), offset, SLOT_APPLY)
        y = self._change(samples, words[0] < round(self.p * 2**32), offset)
        if self.training:
            self.rng[1:].add_(1)
        return y[0, 0] if x.dim() == 2 else y[:, 0] if x.dim() == 3 else y

    def _change(self, x: Tensor, chosen: Tensor, offset: int) -> Tensor:
        """Return ``(B, C, F', T')`` of ``x (B, C, F, T)``; ``chosen (B,)`` says which samples change."""
        raise NotImplementedError

    def _draw(self, x: Tensor, offset: int, **settings: Any) -> tuple[Tensor, ...]:
        """Return lam ``(B,)``, partner ``(B,)``, crop ``(B, 4)`` and fader ``(B, 2)``."""
        size = (x.shape[2], x.shape[3])
        return tuple(drawn[0] for drawn in ops.draw_params(self.rng, len(x), size, sample_offset=offset, **settings))

    def _enter_worker(self) -> None:
        worker = loader_worker()
        if worker is None or worker.seed == self._worker_seed:
            return
        self._worker_seed = worker.seed
        digest = hashlib.sha256(f"{int(self.rng[0])} {worker.seed}".encode()).digest()
        self.rng = self.rng.clone()  # by spawn, workers share the memory of buffers
        self.rng[0] = int.from_bytes(digest[:8], "little") >> 1


class LogMixupExp(RandomTransform):
    """Mix in past inputs as sounds mix: ``log((1 - lam) exp(x) + lam exp(z) + eps)``, lam up to ``mixup_ratio``.

    Past inputs are kept in a memory, one row per sample; until it has any, partners are other samples of the batch, and
    a single sample is not mixed. Inputs are to be pre-normalised.

    Args:
        mixup_ratio: largest weight of the partner, in [0, 1].
        n_memory: rows of the memory; 0 mixes within the batch.
        shape: (C F, T) of a row, C the number of channels; by default that of the first batch.
        bank_dtype: float32, or float16 for half the memory.
        p, seed: as for ``RandomTransform``.

    Source:
        BYOL-A, arXiv:2103.06695. Differs: as ``Augment``.

    >>> LogMixupExp(n_memory=16)(torch.randn(4, 64, 96)).shape
    torch.Size([4, 64, 96])
    """

    def __init__(
        self,
        mixup_ratio: float = 0.4,
        n_memory: int = 2048,
        *,
        shape: tuple[int, int] | None = None,
        bank_dtype: torch.dtype = torch.float32,
        p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(p, seed)
        weights_in_range(mixup_ratio, 0.0)
        self.mixup_ratio, self.bank = mixup_ratio, MemoryBank(n_memory, shape, bank_dtype)

    def _change(self, x: Tensor, chosen: Tensor, offset: int) -> Tensor:
        flat = x.flatten(1, 2)
        rows, count = self.bank.prepare(flat, allocate=self.training), self.bank.count
        if not len(rows):
            count = torch.zeros_like(count)
        lam, partner, *_ = self._draw(x, offset, mixup_ratio=self.mixup_ratio, bank_count=count)
        z = flat[partner.clamp(0, max(0, len(flat) - 1))]
        if len(rows):  # filled or not, which only the device knows
            z = torch.where(count > 0, rows[partner.clamp(0, len(rows) - 1)].to(x.dtype), z)
        mixed = ops.log_mixup_exp(flat, z, lam)
        y = torch.where((chosen & (partner >= 0))[:, None, None], mixed, flat)
        if self.training:
            self.bank.push(flat.detach())
        return y.unflatten(1, x.shape[1:3])

    def extra_repr(self) -> str:
        return f"mixup_ratio={self.mixup_ratio}, p={self.p}"


class RandomResizeCrop(RandomTransform):
    """Cut a random box from a virtual canvas around the input, and resize it; see ``ops.resize_crop``.

    Args:
        freq_scale: (min, max) of the box's height, times F.
        time_scale: (min, max) of its width, times T.
        virtual_crop_scale: size of the canvas, times (F, T).
        size: (mels, frames) of the output; the input's by default.
        interpolation: "bilinear" or "bicubic".
        p, seed: as for ``RandomTransform``; a sample that is not changed is resized whole.

    Source:
        BYOL-A, arXiv:2103.06695. Differs: bilinear by default (published: bicubic).

    >>> RandomResizeCrop(size=(64, 64))(torch.randn(64, 96)).shape
    torch.Size([64, 64])
    """

    def __init__(
        self,
        freq_scale: Sequence[float] = (0.6, 1.5),
        time_scale: Sequence[float] = (0.6, 1.5),
        virtual_crop_scale: Sequence[float] = (1.0, 1.5),
        *,
        size: tuple[int, int] | None = None,
        interpolation: str = "bilinear",
        p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(p, seed)
        size_range("freq_scale", 1, freq_scale)
        size_range("time_scale", 1, time_scale)
        check.require_one_of("interpolation", interpolation, check.INTERPOLATIONS)
        self.freq_scale, self.time_scale, self.virtual_crop_scale = freq_scale, time_scale, virtual_crop_scale
        self.size, self.interpolation = size, interpolation

    def _change(self, x: Tensor, chosen: Tensor, offset: int) -> Tensor:
        mels, frames = x.shape[2:]
        canvas = ops.canvas_size(mels, frames, self.virtual_crop_scale)
        names = ("freq_scale", "time_scale", "virtual_crop_scale")
        _lam, _partner, crop, _fader = self._draw(x, offset, **{name: getattr(self, name) for name in names})
        whole = [(canvas[0] - mels) // 2, (canvas[1] - frames) // 2, mels, frames]
        boxes = torch.stack([torch.where(chosen, crop[:, k], whole[k]) for k in range(4)], dim=1)
        boxes = boxes.repeat_interleave(x.shape[1], 0)
        y = ops.resize_crop(x.flatten(0, 1), boxes, self.size, self.interpolation, canvas)
        return y.unflatten(0, x.shape[:2])

    def extra_repr(self) -> str:
        return f"freq_scale={self.freq_scale}, time_scale={self.time_scale}, size={self.size}, p={self.p}"


class RandomLinearFader(RandomTransform):
    """Add a line over time, from ``gain U(-1, 1)`` at the first frame to another such value at the last.

    Args:
        gain: largest value added at either end, in the unit of the (normalised) log-mels.
        p, seed: as for ``RandomTransform``.

    Source:
        BYOL-A, arXiv:2204.07402.

    >>> RandomLinearFader()(torch.zeros(2, 64, 96)).shape
    torch.Size([2, 64, 96])
    """

    def __init__(self, gain: float = 1.0, *, p: float = 1.0, seed: int | None = None) -> None:
        super().__init__(p, seed)
        weights_in_range(0.0, gain)
        self.gain = gain

    def _change(self, x: Tensor, chosen: Tensor, offset: int) -> Tensor:
        *_, fader = self._draw(x, offset, fader_gain=self.gain)
        fader = fader * chosen[:, None]
        wide = x.to(compute_dtype(x.dtype))
        return (wide + fader_curve_reference(fader, x.shape[3], wide.dtype)[:, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"gain={self.gain}, p={self.p}"


class PrecomputedNorm(FixedDtype):
    """Normalise with the statistics of a corpus: ``(x - mean) / max(std, eps)``, for any shape.

    Args:
        stats: (mean, std), such as ``byola-fast stats`` computes.

    >>> PrecomputedNorm((-7.0, 4.0))(torch.tensor([-7.0, -3.0]))
    tensor([0., 1.])
    """

    stats: Tensor

    def __init__(self, stats: tuple[float, float] | Tensor) -> None:
        super().__init__()
        self.register_buffer("stats", given_stats(stats, torch.zeros(0).device).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised spectrograms."""
        return _normalized(x, self.stats)

    def extra_repr(self) -> str:
        return f"stats={self.stats.tolist()}"


class RunningNorm(FixedDtype):
    """Normalise with the statistics of all inputs so far, this one included (first version of BYOL-A).

    In eval mode the statistics stay as they are.

    Args:
        max_updates: number of batches that the statistics follow; None for no limit.

    >>> round(RunningNorm()(torch.tensor([[-1.0, 0.0], [3.0, 2.0]])).std().item(), 5)
    1.0
    """

    def __init__(self, max_updates: int | None = None) -> None:
        super().__init__()
        self.running = RunningStats(max_updates)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised spectrograms."""
        check.require_float("x", x)
        samples = x[None] if x.dim() == 2 else x  # RunningStats takes samples along the first axis
        return _normalized(x, self.running.update(samples) if self.training else self.running.stats())


def _normalized(x: Tensor, stats: Tensor) -> Tensor:
    check.require_float("x", x)
    wide = x.to(compute_dtype(x.dtype))
    return ((wide - stats[0]) / stats[1].clamp_min(EPS)).to(x.dtype)
