"""Calls without gradients that one C++ op serves on the CPU; for one sample, Python would take longer than the work."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from byola_fast.ops import _checks as check
from byola_fast.ops._two_views import ADVANCE, BATCH_STATS, POST_NORM, Running, pack, two_views_on_cpu
from byola_fast.ops.functional import MAX_ROWS, check_out, without_channel
from byola_fast.runtime.distributed import own_rank
from byola_fast.runtime.recomputation import is_recomputed
from byola_fast.spectrograms.statistics import given_stats
from byola_fast.views.params import resolve_settings

if TYPE_CHECKING:
    from byola_fast.views.augment import Augment

CPU = torch.device("cpu")


def augment_at_once(
    lms: Tensor,
    preset: str,
    stats: tuple[float, float] | Tensor | None,
    seed: int | Tensor | None,
    step: int | Tensor,
    generator: torch.Generator | None,
    out: Tensor | None,
    post_norm: bool,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor] | None:
    """Return the views of ``augment``; None, with nothing drawn, for a call that needs more care or is refused."""
    x = _spectrograms(lms)
    if x is None or type(step) is not int:
        return None
    if generator is not None and (generator.device != CPU or is_recomputed()):
        return None
    if seed is None:
        if step != 0:
            return None
    elif type(seed) is not int or not (0 <= seed < 2**63 and 0 <= step < 2**32):
        return None
    flags = (POST_NORM if post_norm else 0) | (BATCH_STATS if stats is None else 0)
    try:
        packed = _packed(flags, own_rank(), x.shape[1], x.shape[2], preset, tuple(settings.items()))
        of_pre_norm = None if stats is None else _given_stats(stats)
    except (TypeError, ValueError):
        return None
    if of_pre_norm is not None and of_pre_norm.requires_grad and torch.is_grad_enabled():
        return None
    flat_out = None if out is None else flat(out, lms, packed[1])
    if seed is None:
        rng = torch.randint(2**63 - 1, (1,), generator=generator, device=CPU)
    else:
        rng = torch.tensor((seed, step), dtype=torch.int64, device=CPU)
    if flat_out is not None:
        check.require_own_memory("out", flat_out, x=x, rng=rng, stats=of_pre_norm)
    views = two_views_on_cpu(x, packed, rng, of_pre_norm, flat_out)
    return _finished(views, lms, out)


def call_at_once(module: Augment, lms: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the views of an ``Augment`` that is plain, and go a step on; None, with nothing done, as above."""
    x, bank, training = _spectrograms(lms), module.bank, module.training
    rows, cursor, rng, running = bank.rows, bank.cursor, module.rng, module.running_stats
    if x is None or rows is None or x.shape[1:] != rows.shape[1:] or not (rows.is_cpu and rng.is_cpu):
        return None
    stats = module.fixed_stats
    state: Running = (None, None, None, None)
    if running is not None:
        if not training:
            stats = running.stats()
        elif running.mean.dtype is torch.float32 and running.mean.is_cpu:
            state = running.mean, running.variance, running.count, running.updates
        else:
            return None
    flags = (POST_NORM if module.post_norm else 0) | (ADVANCE if training else 0)
    most = -1 if running is None or running.max_updates is None else running.max_updates
    try:
        packed = pack(flags, own_rank(), x.shape[1], x.shape[2], max_updates=most, **vars(module.settings))
    except (TypeError, ValueError):
        return None
    flat_out = None if out is None else flat(out, lms, packed[1])
    if flat_out is not None:
        check.require_own_memory("out", flat_out, lms=x, **dict(module.named_buffers()))
    memory = (rows, cursor) if len(rows) else (None, None)
    views = two_views_on_cpu(x, packed, rng, stats, flat_out, memory[0], memory[1], state)
    if training:
        increment_version([tensor for tensor in (rng, *memory, *state) if tensor is not None])
    return _finished(views, lms, out)


def _spectrograms(lms: Tensor) -> Tensor | None:
    """Return ``(B, F, T)`` without the channel; None for another shape, an empty batch, or one that is too large."""
    if lms.dim() == 4 and lms.shape[1] == 1:
        lms = lms[:, 0]
    return lms if lms.dim() == 3 and lms.numel() and lms.shape[0] <= MAX_ROWS else None


@functools.lru_cache(maxsize=256)
def _packed(
    flags: int, rank: int, mels: int, frames: int, preset: str, changes: tuple[tuple[str, Any], ...]
) -> tuple[Tensor, tuple[int, int]]:
    return pack(flags, rank, mels, frames, **vars(resolve_settings(preset, dict(changes))))


def _given_stats(stats: tuple[float, float] | Tensor) -> Tensor:
    return given_stats(stats, CPU) if isinstance(stats, Tensor) else _kept_stats(*stats)


@functools.lru_cache(maxsize=256)
def _kept_stats(mean: float, std: float) -> Tensor:
    with torch.inference_mode(False):
        return given_stats((mean, std), CPU)


def _finished(views: Tensor, lms: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    if out is not None:
        increment_version(out)  # autograd does not see the kernels' writes
    view1, view2 = with_channel(views, lms).unbind(0)
    return view1, view2


def flat(out: Tensor, lms: Tensor, size: tuple[int, int] | None, views: int = 2) -> Tensor:
    """Check ``out`` and return it without the channel that the views will have."""
    check.require_tensor("out", out)
    if lms.dim() == 4:
        if out.dim() != 5 or out.shape[2] != 1:
            wanted = f"({views}, B, 1, F, T) for views of (B, 1, F, T)"
            raise ValueError(f"out: expected shape {wanted}, got {tuple(out.shape)}")
        out = out[:, :, 0]
    x = without_channel("lms", lms)
    check_out(out, x, size or (x.shape[1], x.shape[2]), views)
    check.require_no_grad("augment with out=", lms=lms, out=out)
    return out


def with_channel(views: Tensor, lms: Tensor) -> Tensor:
    """Return views ``(V, B, F, T)`` in the rank of the input."""
    return views[:, :, None] if lms.dim() == 4 else views
