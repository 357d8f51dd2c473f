"""Gradients of the functional ops, to x, z and statistics; drawn parameters (lam, crop, fader) get none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from byola_fast.ops import _schemas, reference
from byola_fast.ops.reference import EPS, compute_dtype, mean_std_reference

OPS = torch.ops.byola_fast


def _op(name: str) -> Any:
    """Return an op, or its reference in forward mode, which PyTorch would drop at a custom op in silence."""
    return getattr(reference, f"{name}_reference") if forward_ad._current_level >= 0 else getattr(OPS, name)


def _register(name: str, backward: Any, setup_context: Any) -> None:
    torch.library.register_autograd(
        f"{_schemas.NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_schemas.library
    )


def _save_log_mel(ctx: Any, inputs: Any, output: Any) -> None:
    wav, window, filter_bank, bands, stats, *ctx.settings = inputs
    ctx.save_for_backward(wav, window, filter_bank, bands, stats)


def _log_mel_backward(ctx: Any, grad: Tensor) -> Any:
    return _op("log_mel_backward")(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 7


def _save_log_mixup_exp(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _log_mixup_exp_backward(ctx: Any, grad: Tensor) -> Any:
    x, z, lam = ctx.saved_tensors
    return *_op("log_mixup_exp_backward")(grad, x, z, lam), None


def _save_resize_crop(ctx: Any, inputs: Any, output: Any) -> None:
    x, crop, _size, ctx.canvas, ctx.interpolation = inputs
    ctx.input_size = x.shape[1:]
    ctx.save_for_backward(crop)


def _resize_crop_backward(ctx: Any, grad: Tensor) -> Any:
    (crop,) = ctx.saved_tensors
    to_x = _op("resize_crop_backward")(grad, crop, ctx.input_size, ctx.canvas, ctx.interpolation)
    return to_x, None, None, None, None


def _save_augment_views(ctx: Any, inputs: Any, output: Any) -> None:
    x, pool, bank, bank_count, stats, lam, bank_index, crop, _fader, rng, *settings = inputs
    ctx.sample_offset, ctx.first_view, _size, ctx.canvas, ctx.interpolation, ctx.mixup = settings
    ctx.foreign_pool = pool is not None
    ctx.save_for_backward(x, bank, bank_count, stats, lam, bank_index, crop, rng, output[0])


def _augment_views_backward(ctx: Any, grad_views: Tensor, grad_sums: Tensor) -> Any:
    if ctx.foreign_pool:
        raise RuntimeError("augment_views: no gradient if partners come from a pool of other rows; give pool=None")
    x, bank, bank_count, stats, lam, bank_index, crop, rng, views = ctx.saved_tensors
    dtype = compute_dtype(views.dtype)
    of_total, of_squares = grad_sums[..., 1, None, None], grad_sums[..., 2, None, None]
    grad = grad_views.to(dtype) + (of_total + 2 * views * of_squares).to(dtype)
    to_x, to_stats = _op("augment_views_backward")(
        grad,
        x,
        bank,
        bank_count,
        stats,
        lam,
        bank_index,
        crop,
        rng,
        ctx.sample_offset,
        ctx.first_view,
        ctx.canvas,
        ctx.interpolation,
        ctx.mixup,
    )
    return to_x, None, None, None, None if stats is None else to_stats, *[None] * 11


def _save_sample_sums(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _sample_sums_backward(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    of_total, of_squares = (g.reshape(-1, *[1] * (x.dim() - 1)) for g in (grad[:, 1], grad[:, 2]))
    return (of_total + 2 * x * of_squares).to(x.dtype)


def _save_normalize(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1], output)


def _normalize_backward(ctx: Any, grad: Tensor) -> Any:
    sums, y = ctx.saved_tensors
    _mean, std = mean_std_reference(sums)
    wide = grad.to(sums.dtype)
    to_sums = _through_statistics(sums, -wide.sum() / std, -(wide * y).sum() / std)
    return (wide / std).to(grad.dtype), to_sums


def _save_batch_stats(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _batch_stats_backward(ctx: Any, grad: Tensor) -> Any:
    (sums,) = ctx.saved_tensors
    return _through_statistics(sums, *grad.to(sums.dtype).unbind()), None


def _through_statistics(sums: Tensor, of_mean: Tensor, of_std: Tensor) -> Tensor:
    """Return the gradient of ``sums`` from those of mean and std.

    With n, S and Q the count, sum and sum of squares: m = S / n, s^2 = (Q - S m) / (n - 1).
    """
    mean, std = mean_std_reference(sums)
    count = sums.reshape(-1, 3)[:, 0].sum().clamp_min(1)
    of_variance = torch.where(std > EPS, of_std / (2 * std), 0)
    of_squares = of_variance / (count - 1).clamp_min(1)
    of_total = of_mean / count - 2 * mean * of_squares
    return torch.stack([torch.zeros_like(of_total), of_total, of_squares]).expand_as(sums)


def _save_conv_block(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, gamma, _beta, mean, variance, *_settings = inputs
    _out, which, kept, stats = output
    ctx.frozen, ctx.has_bias = mean is not None, bias is not None
    ctx.dtypes = [None if known is None else known.dtype for known in (mean, variance)]
    ctx.save_for_backward(x, weight, gamma, which, kept, stats)
    ctx.mark_non_differentiable(which, kept, stats)
    ctx.set_materialize_grads(False)  # else autograd fills tensors of kept's size with zeros


def _conv_block_backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> Any:
    if grad is None:
        return (None,) * 10
    needs_x, needs_statistics = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:7])
    to_x, to_weight, to_bias, to_gamma, to_beta = _op("conv_block_backward")(
        grad, *ctx.saved_tensors, ctx.frozen, needs_x
    )
    to_x, to_bias = to_x if needs_x else None, to_bias if ctx.has_bias else None
    to_statistics: list[Tensor | None] = [None, None]
    if needs_statistics:
        _x, _weight, gamma, _which, _kept, stats = ctx.saved_tensors
        a, r = gamma * stats[1], stats[1]
        each = zip((-a * to_beta, -a * r * to_gamma / 2), ctx.dtypes, strict=True)
        to_statistics = [gradient.to(dtype) for gradient, dtype in each]
    return to_x, to_weight, to_bias, to_gamma, to_beta, *to_statistics, *[None] * 3


_register("log_mel", _log_mel_backward, _save_log_mel)
_register("log_mixup_exp", _log_mixup_exp_backward, _save_log_mixup_exp)
_register("resize_crop", _resize_crop_backward, _save_resize_crop)
_register("augment_views", _augment_views_backward, _save_augment_views)
_register("sample_sums", _sample_sums_backward, _save_sample_sums)
_register("batch_stats", _batch_stats_backward, _save_batch_stats)
_register("normalize", _normalize_backward, _save_normalize)
_register("conv_block", _conv_block_backward, _save_conv_block)


def _register_once(name: str) -> None:
    """Raise an error at a second derivative; without it, the second derivative would be silently missing."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"byola_fast: {name} is differentiable once; use torch.func for higher derivatives")

    _register(name, backward, lambda ctx, inputs, output: None)


for _name in _schemas.OPS:
    if _name.endswith("_backward"):
        _register_once(_name)
