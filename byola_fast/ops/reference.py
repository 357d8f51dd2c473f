"""The plain PyTorch definition of every op, for any device and float dtype. Backends are tested against it.

Half precision is computed in float32 and rounded once at the end; float64 stays float64. Nothing is tuned for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from byola_fast.ops.conv_reference import (
    batch_norm_running__reference as batch_norm_running__reference,
)
from byola_fast.ops.conv_reference import (
    conv_block_backward_reference as conv_block_backward_reference,
)
from byola_fast.ops.conv_reference import (
    conv_block_reference as conv_block_reference,
)
from byola_fast.ops.philox import SLOT_CROP, SLOT_FADER, SLOT_NOISE, SLOT_PARTNER, SLOT_RATIO, view_words

EPS = torch.finfo(torch.float32).eps  # the paper's epsilon, for every dtype
CUBIC_A = -0.75  # the cubic convolution coefficient of torch.nn.functional.interpolate
SIZE_SHIFT = 40  # sizes are (base + slope * u24) >> SIZE_SHIFT


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the compute dtype for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums: float64, except on Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


# the front end


def num_frames_reference(samples: int, n_fft: int, hop_length: int, center: bool) -> int:
    """Return the number of frames T: whole windows of ``n_fft``; ``center`` pads ``n_fft // 2`` on both sides."""
    return 1 + (samples + (n_fft // 2 * 2 if center else 0) - n_fft) // hop_length


def _spectra(wav: Tensor, window: Tensor, n_fft: int, hop_length: int, center: bool) -> Tensor:
    """Return the STFT ``(B, n_fft // 2 + 1, T)`` of ``(B, samples)`` float or int16; ``center`` pads by reflection."""
    dtype = compute_dtype(wav.dtype)
    wav = wav.to(dtype) if wav.is_floating_point() else wav.to(dtype) / 2**15
    window = window.to(dtype)
    return torch.stft(wav, n_fft, hop_length, len(window), window, center=center, return_complex=True)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product in the dtype of both; autocast, which reaches into an op, would lower it."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def log_mel_reference(
    wav: Tensor,
    window: Tensor,
    filter_bank: Tensor,
    bands: Tensor,
    stats: Tensor | None,
    n_fft: int,
    hop_length: int,
    center: bool,
) -> Tensor:
    """Return log(filter_bank |STFT(wav)|^2 + eps), pre-normalised with ``stats``: ``(B, samples)`` to ``(B, F, T)``."""
    frames = num_frames_reference(wav.shape[1], n_fft, hop_length, center)
    dtype = wav.dtype if wav.is_floating_point() else torch.float32
    if wav.shape[0] == 0:
        return wav.new_empty(0, filter_bank.shape[0], frames, dtype=dtype)
    spectra = _spectra(wav, window, n_fft, hop_length, center)
    power = spectra.real.square() + spectra.imag.square()  # abs() calls hypot, which is slow
    lms = (_product(filter_bank.to(power.dtype), power) + EPS).log()
    return pre_norm_reference(lms, stats).to(dtype).contiguous()


def log_mel_backward_reference(
    grad: Tensor,
    wav: Tensor,
    window: Tensor,
    filter_bank: Tensor,
    bands: Tensor,
    stats: Tensor | None,
    n_fft: int,
    hop_length: int,
    center: bool,
) -> Tensor:
    """Return the gradient of ``wav``: through logarithm and power, then the transpose of the transform."""
    if wav.shape[0] == 0:
        return torch.empty_like(wav)
    spectra = _spectra(wav, window, n_fft, hop_length, center)
    power = spectra.real.square() + spectra.imag.square()
    bank = filter_bank.to(power.dtype)
    grad = grad.to(power.dtype) / (_product(bank, power) + EPS)
    if stats is not None:
        grad = grad / stats[1].to(grad.dtype).clamp_min(EPS)
    to_spectra = 2 * _product(bank.T, grad) * spectra
    to_spectra[:, 1 : (n_fft + 1) // 2] /= 2  # the inverse transform counts these twice
    of_window = torch.nn.functional.pad(window.to(power.dtype), _around(len(window), n_fft))
    to_frames = torch.fft.irfft(to_spectra, n_fft, dim=1, norm="forward").transpose(1, 2) * of_window
    pad = n_fft // 2 if center else 0
    padded = [wav.shape[0], wav.shape[1] + 2 * pad]
    to_padded = torch.ops.aten.unfold_backward(to_frames, padded, 1, n_fft, hop_length)
    if pad:
        to_padded = torch.ops.aten.reflection_pad1d_backward(to_padded, wav.to(power.dtype), [pad, pad])
    return to_padded.to(wav.dtype).contiguous()


def _around(length: int, n_fft: int) -> list[int]:
    return [(n_fft - length) // 2, n_fft - length - (n_fft - length) // 2]


# log-mixup-exp


def log_mixup_exp_reference(x: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    """Return y = log((1 - lam) exp(x) + lam exp(z) + eps)."""
    dtype = compute_dtype(x.dtype)
    weight = _per_sample(lam, x.to(dtype))
    y = ((1 - weight) * x.to(dtype).exp() + weight * z.to(dtype).exp() + EPS).log()
    return y.to(x.dtype).contiguous()


def log_mixup_exp_backward_reference(grad: Tensor, x: Tensor, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients: dy/dx = (1 - lam) exp(x) / exp(y), dy/dz = lam exp(z) / exp(y)."""
    dtype = compute_dtype(x.dtype)
    weight = _per_sample(lam, x.to(dtype))
    of_x = (1 - weight) * x.to(dtype).exp()
    of_z = weight * z.to(dtype).exp()
    scaled = grad.to(dtype) / (of_x + of_z + EPS)
    return (scaled * of_x).to(x.dtype).contiguous(), (scaled * of_z).to(z.dtype).contiguous()


# random resize crop


def _taps(size: int, extent: Tensor, interpolation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the taps along one axis, corners aligned: positions in the crop and weights, ``(B, size, taps)``.

    Output o is at o * (extent - 1) / (size - 1). The quotient and remainder of this integer division are exact, so all
    backends choose the same taps; only the fraction is rounded, once.
    """
    position = torch.arange(size, device=extent.device) * (extent[:, None] - 1)
    steps = max(size - 1, 1)
    base = position // steps
    t = (position % steps).to(dtype) / steps
    a = CUBIC_A
    offsets: tuple[int, ...]
    weights: tuple[Tensor, ...]
    if interpolation == "bilinear":
        offsets, weights = (0, 1), (1 - t, t)
    else:
        offsets = (-1, 0, 1, 2)
        s = 1 - t  # the outer weights a (d - 1) (d - 2)^2, with d = 1 + t and d = 2 - t, without cancellation
        weights = (
            a * t * s * s,
            ((a + 2) * t - (a + 3)) * t * t + 1,
            ((a + 2) * s - (a + 3)) * s * s + 1,
            a * s * t * t,
        )
    taps = torch.stack([(base + offset).clamp_min(0) for offset in offsets], dim=-1)
    return taps.minimum(extent[:, None, None] - 1), torch.stack(weights, dim=-1)


def _axis_taps(
    size: int, start: Tensor, extent: Tensor, length: int, canvas: int, interpolation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row numbers in the input, their weights, and whether they are in the input or in the margin."""
    extent = extent.long().clamp(1, canvas)
    start = start.long().clamp_min(0).minimum(canvas - extent)
    taps, weights = _taps(size, extent, interpolation, dtype)
    rows = taps + start[:, None, None] - (canvas - length) // 2
    return rows.clamp(0, max(length - 1, 0)), weights, (rows >= 0) & (rows < length)


def _resize_rows(x: Tensor, rows: Tensor, weights: Tensor, inside: Tensor) -> Tensor:
    """Resize ``x (B, rows, columns)`` along its rows; taps in the margin read zero (0 times a NaN would be NaN)."""
    y = x.new_zeros(x.shape[0], rows.shape[1], x.shape[2])
    for k in range(rows.shape[2]):
        picked = x.gather(1, rows[:, :, k, None].expand(-1, -1, x.shape[2]))
        y = y + weights[:, :, k, None] * torch.where(inside[:, :, k, None], picked, 0)
    return y


def _resize_rows_backward(grad: Tensor, rows: Tensor, weights: Tensor, inside: Tensor, length: int) -> Tensor:
    total = grad.new_zeros(grad.shape[0], length, grad.shape[2])
    for k in range(rows.shape[2]):
        part = torch.where(inside[:, :, k, None], weights[:, :, k, None] * grad, 0)
        total.scatter_add_(1, rows[:, :, k, None].expand(-1, -1, grad.shape[2]), part)
    return total


def resize_crop_reference(x: Tensor, crop: Tensor, size: list[int], canvas: list[int], interpolation: str) -> Tensor:
    """Cut ``crop`` from a zero canvas with ``x`` at its centre and resize it, one axis at a time."""
    dtype = compute_dtype(x.dtype)
    i, j, h, w = crop.unbind(1)
    mels = _axis_taps(size[0], i, h, x.shape[1], canvas[0], interpolation, dtype)
    frames = _axis_taps(size[1], j, w, x.shape[2], canvas[1], interpolation, dtype)
    y = _resize_rows(x.to(dtype), *mels)
    y = _resize_rows(y.transpose(1, 2), *frames).transpose(1, 2)
    return y.to(x.dtype).contiguous()


def resize_crop_backward_reference(
    grad: Tensor, crop: Tensor, input_size: list[int], canvas: list[int], interpolation: str
) -> Tensor:
    """Apply the transpose of ``resize_crop``: scatter each output's gradient to its taps."""
    dtype = compute_dtype(grad.dtype)
    i, j, h, w = crop.unbind(1)
    mels = _axis_taps(grad.shape[1], i, h, input_size[0], canvas[0], interpolation, dtype)
    frames = _axis_taps(grad.shape[2], j, w, input_size[1], canvas[1], interpolation, dtype)
    g = _resize_rows_backward(grad.to(dtype).transpose(1, 2), *frames, input_size[1]).transpose(1, 2)
    return _resize_rows_backward(g, *mels, input_size[0]).to(grad.dtype).contiguous()


# the parameters of views


def draw_params_reference(
    rng: Tensor,
    bank_count: Tensor | None,
    batch: int,
    pool: int,
    pool_offset: int,
    sample_offset: int,
    mels: list[int],
    frames: list[int],
    canvas: list[int],
    mixup_ratio: float,
    fader_gain: float,
    views: int,
    first_view: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw lam, bank_index, crop and fader of all views: integer arithmetic, one rounding per float.

    ``mels`` and ``frames`` are (base, slope): a crop's size is ``clip((base + slope * u24) >> 40, 1, canvas)``.
    """

    def u24(slot: int) -> list[Tensor]:
        return [word >> 8 for word in view_words(rng, batch, sample_offset, slot, views, first_view)]

    size_h, size_w, place_h, place_w = u24(SLOT_CROP)
    h = ((mels[0] + mels[1] * size_h) >> SIZE_SHIFT).clamp(1, canvas[0])
    w = ((frames[0] + frames[1] * size_w) >> SIZE_SHIFT).clamp(1, canvas[1])
    i = (place_h * (canvas[0] - h + 1)) >> 24
    j = (place_w * (canvas[1] - w + 1)) >> 24
    crop = torch.stack([i, j, h, w], dim=-1).int()

    lam = (u24(SLOT_RATIO)[0].float() * 2.0**-24) * mixup_ratio

    partner = u24(SLOT_PARTNER)[0]
    sample_row = torch.arange(batch, device=rng.device) + pool_offset
    in_pool = (partner * max(pool - 1, 0)) >> 24
    in_pool = torch.where(in_pool >= sample_row, in_pool + 1, in_pool)  # never the sample itself
    bank_index = in_pool if pool > 1 else torch.full_like(in_pool, -1)
    if bank_count is not None:
        bank_index = torch.where(bank_count > 0, (partner * bank_count) >> 24, bank_index)

    head, tail, *_ = ((u - 2**23).float() * 2.0**-23 for u in u24(SLOT_FADER))
    fader = torch.stack([head, tail], dim=-1) * fader_gain
    return lam, bank_index, crop, fader


def standard_normal_reference(
    rng: Tensor, batch: int, sample_offset: int, count: int, views: int = 2, first_view: int = 0
) -> Tensor:
    """Return ``(V, B, count)`` float64 standard normals by the Box-Muller transform; four share one Philox call."""
    blocks = torch.arange(-(-count // 4), device=rng.device) + SLOT_NOISE
    dtype = sums_dtype(rng.device)
    words = view_words(rng, batch, sample_offset, blocks, views, first_view)
    a, b, c, d = ((word >> 8).to(dtype) * 2.0**-24 for word in words)
    normals = []
    for radius, angle in ((a, b), (c, d)):
        radius = (-2 * (radius + 2.0**-24).log()).sqrt()
        normals += [radius * (2 * math.pi * angle).cos(), radius * (2 * math.pi * angle).sin()]
    return torch.stack(normals, dim=-1).flatten(2)[..., :count]


def noise_reference(x: Tensor, rng: Tensor, sample_offset: int, views: int, first_view: int) -> Tensor:
    """Return the standard normals of all views, ``(V, B, F, T)``, in the dtype of ``x (B, F, T)``."""
    batch, mels, frames = x.shape  # len(x) would fix the batch of an exported graph
    normals = standard_normal_reference(rng, batch, sample_offset, mels * frames, views, first_view)
    return normals.view(views, *x.shape).to(x.dtype)


# views


def pre_norm_reference(x: Tensor, stats: Tensor | None) -> Tensor:
    """Return (x - mean) / max(std, eps) in the compute dtype; ``stats (2,)`` is mean and std."""
    x = x.to(compute_dtype(x.dtype))
    if stats is None:
        return x
    mean, std = stats.to(x.dtype)
    return (x - mean) / std.clamp_min(EPS)


def partners_reference(
    x: Tensor, bank: Tensor | None, bank_count: Tensor | None, stats: Tensor | None, index: Tensor
) -> Tensor:
    """Return the pre-normalised rows ``(B, F, T)`` to mix in: from the bank, or while it is empty from pool ``x``."""
    dtype = compute_dtype(x.dtype)
    rows = pre_norm_reference(x[index.clamp(0, x.shape[0] - 1)] if x.shape[0] else x, stats)
    if bank is None or bank_count is None:
        return rows
    return torch.where(bank_count > 0, bank[index.clamp(0, bank.shape[0] - 1)].to(dtype), rows)


def mix_reference(x: Tensor, z: Tensor, lam: Tensor, mixup: str) -> Tensor:
    """Mix pre-normalised ``x`` with ``z``: partners for "log" and "linear", standard normals for "gaussian"."""
    weight = _per_sample(lam, x)
    if mixup == "log":
        return log_mixup_exp_reference(x, z, lam)
    if mixup == "linear":
        return (1 - weight) * x + weight * z
    return ((1 - weight) * x.exp() + (weight * z).exp() + EPS).log()


def augment_views_reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Return V views ``(V, B, *size)`` and their ``(V, B, 3)`` sums: count, sum, sum of squares."""
    views = list(_each_view(x, *args))
    return torch.stack(views).to(x.dtype), torch.stack([sample_sums_reference(view) for view in views])


def augment_views_out_reference(x: Tensor, *args: Any) -> Tensor:
    """Write the views to the last argument, ``out (V, B, *size)``, and return their sums."""
    parameters, out = [*args[:-1]], args[-1]  # torch 2.11 cannot trace "*parameters, out = args"
    parameters.insert(-3, out.shape[2:])  # before canvas, interpolation and mixup
    sums = []
    for number, view in enumerate(_each_view(x, *parameters)):
        out[number] = view
        sums.append(sample_sums_reference(view))
    return torch.stack(sums)


def _each_view(
    x: Tensor,
    pool: Tensor | None,
    bank: Tensor | None,
    bank_count: Tensor | None,
    stats: Tensor | None,
    lam: Tensor,
    bank_index: Tensor,
    crop: Tensor,
    fader: Tensor,
    rng: Tensor,
    sample_offset: int,
    first_view: int,
    size: Sequence[int],
    canvas: list[int],
    interpolation: str,
    mixup: str,
) -> Iterator[Tensor]:
    """Yield each view ``(B, *size)`` in the compute dtype."""
    clean = pre_norm_reference(x, stats)
    noise = noise_reference(clean, rng, sample_offset, len(lam), first_view) if mixup == "gaussian" else None
    for view in range(len(lam)):
        mixed = clean
        if noise is not None:
            mixed = mix_reference(clean, noise[view], lam[view], mixup)
        elif mixup in ("log", "linear"):
            z = partners_reference(x if pool is None else pool, bank, bank_count, stats, bank_index[view])
            alone = (bank_index[view] < 0)[:, None, None]
            mixed = torch.where(alone, clean, mix_reference(clean, z, lam[view], mixup))
        y = resize_crop_reference(mixed, crop[view], list(size), canvas, interpolation)
        yield y + fader_curve_reference(fader[view], size[1], y.dtype)


def fader_curve_reference(fader: Tensor, frames: int, dtype: torch.dtype) -> Tensor:
    """Return head + (tail - head) t / (T - 1) over T frames: ``(B, 1, T)`` for ``fader (B, 2)``."""
    t = torch.arange(frames, device=fader.device).to(dtype) / max(frames - 1, 1)
    head, tail = fader.to(dtype)[:, :, None].unbind(1)
    return (head + (tail - head) * t)[:, None, :]


def augment_views_backward_reference(
    grad: Tensor,
    x: Tensor,
    bank: Tensor | None,
    bank_count: Tensor | None,
    stats: Tensor | None,
    lam: Tensor,
    bank_index: Tensor,
    crop: Tensor,
    rng: Tensor,
    sample_offset: int,
    first_view: int,
    canvas: list[int],
    interpolation: str,
    mixup: str,
    resize_crop_backward: Callable[..., Tensor] = resize_crop_backward_reference,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``stats`` (zeros if ``stats`` is None) for ``grad (V, B, *size)``.

    If partners come from the batch (no bank, or an empty one), their gradient is added to their rows. Most of the time
    goes to ``resize_crop_backward``, for which the op passes the backend's kernel.
    """
    clean = pre_norm_reference(x, stats)
    total = torch.zeros_like(clean)
    noise = noise_reference(clean, rng, sample_offset, len(lam), first_view) if mixup == "gaussian" else None
    for view in range(len(lam)):
        g = grad[view].to(clean.dtype)
        g = resize_crop_backward(g, crop[view], list(x.shape[1:]), canvas, interpolation)
        weight = _per_sample(lam[view], clean)
        if noise is not None:
            kept = (1 - weight) * clean.exp()
            total += g * kept / (kept + (weight * noise[view]).exp() + EPS)
        elif mixup in ("log", "linear"):
            index = bank_index[view]
            alone = (index < 0)[:, None, None]
            z = partners_reference(x, bank, bank_count, stats, index)
            if mixup == "log":
                to_x, to_z = log_mixup_exp_backward_reference(g, clean, z, lam[view])
            else:
                to_x, to_z = (1 - weight) * g, weight * g
            total += torch.where(alone, g, to_x)
            to_z = torch.where(alone, 0, to_z)
            if bank is not None and bank_count is not None:
                to_z = torch.where(bank_count > 0, 0, to_z)
            if x.shape[0]:
                total.index_put_((index.clamp(0, x.shape[0] - 1),), to_z, accumulate=True)  # deterministic on a GPU
        else:
            total += g
    if stats is None:
        return total.to(x.dtype), x.new_zeros(2)
    std = stats[1].to(clean.dtype).clamp_min(EPS)
    of_std = torch.where(stats[1] >= EPS, -(total * clean).sum() / std, 0)
    return (total / std).to(x.dtype), torch.stack([-total.sum() / std, of_std]).to(stats.dtype)


# checks


def all_weights_reference(x: Tensor) -> bool:
    """Return whether all values are in [0, 1]; NaN is not."""
    return bool(((x >= 0) & (x <= 1)).all())


def all_inside_reference(boxes: Tensor, mels: int, frames: int) -> bool:
    """Return whether all boxes (i, j, h, w) ``(..., 4)`` are not empty and lie inside the canvas."""
    start, extent = boxes.reshape(-1, 4).long().unflatten(1, (2, 2)).unbind(1)
    limit = torch.tensor([mels, frames], device=boxes.device)
    return not bool(((start < 0) | (extent < 1) | (start > limit - extent)).any())  # start + extent may overflow


# statistics and normalisation


def sample_sums_reference(x: Tensor) -> Tensor:
    """Return count, sum and sum of squares of each sample, ``(B, 3)``."""
    wide = x.to(sums_dtype(x.device)).flatten(1)
    count = torch.full_like(wide[:, 0], wide.shape[1]) if wide.shape[1] else wide.new_zeros(len(wide))
    return torch.stack([count, wide.sum(1), wide.square().sum(1)], dim=1)


def mean_std_reference(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased std (at least eps) from ``(..., 3)`` counts, sums and sums of squares."""
    count, total, squares = sums.reshape(-1, 3).sum(0)
    mean = total / count.clamp_min(1)
    variance = (squares - total * mean) / (count - 1).clamp_min(1)
    return mean, variance.clamp_min(0).sqrt().clamp_min(EPS)


def batch_stats_reference(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean and std that follow from ``sums``, ``(2,)``; 0 and 1 if the count is 0."""
    mean, std = mean_std_reference(sums)
    some = sums.reshape(-1, 3)[:, 0].sum() > 0
    return torch.stack([mean, torch.where(some, std, 1)]).to(dtype)


def rounded_sqrt(x: Tensor) -> Tensor:
    """Return the square root, rounded correctly as in C++; PyTorch's own in float32 on the CPU is not."""
    return x.double().sqrt().to(x.dtype) if x.device.type == "cpu" else x.sqrt()


def running_stats__reference(
    mean: Tensor, variance: Tensor, count: Tensor, updates: Tensor, sums: Tensor, max_updates: int
) -> Tensor:
    """Merge a batch's ``sums (B, 3)`` into running statistics, all 0-d, and return mean and unbiased std, ``(2,)``.

    Chan's merge with an integer count. Samples that are not finite are left out; with ``max_updates`` of at least 0, so
    are later batches. ``variance`` is biased. Returns mean 0 and std 1 while the count is 0.
    """
    kept = torch.where(sums.isfinite().all(1, keepdim=True), sums, 0).sum(0)
    of_batch, squares = (kept[1:] / kept[0].clamp_min(1)).unbind()
    of_batch_variance = (squares - of_batch**2).clamp_min(0).to(variance.dtype)
    of_batch, added = of_batch.to(mean.dtype), kept[0].long()
    if max_updates >= 0:
        added = torch.where(updates < max_updates, added, 0)
    total = count + added
    weight = added.to(mean.dtype) / total.clamp_min(1)
    distance = of_batch - mean
    spread = weight * (1 - weight) * distance**2
    variance.copy_((1 - weight) * variance + weight * of_batch_variance + spread)
    mean.add_(weight * distance)
    count.copy_(total)
    updates.add_(1)
    unbiased = variance * total / (total - 1).clamp_min(1)
    seen = torch.stack([mean, rounded_sqrt(unbiased)])
    return torch.where(total > 0, seen, torch.stack([torch.zeros_like(mean), torch.ones_like(mean)]))


def normalize_reference(x: Tensor, sums: Tensor) -> Tensor:
    """Return (x - mean) / std, with the joint statistics of ``sums``."""
    mean, std = mean_std_reference(sums)
    wide = x.to(compute_dtype(x.dtype))
    return ((wide - mean.to(wide.dtype)) / std.to(wide.dtype)).to(x.dtype).contiguous()


def normalize__reference(x: Tensor, sums: Tensor) -> None:
    """Normalise ``x`` in place."""
    x.copy_(normalize_reference(x, sums))


# the memory bank


def bank_push__reference(rows: Tensor, cursor: Tensor, x: Tensor, stats: Tensor | None) -> None:
    """Write the finite samples of ``x``, pre-normalised, to the ring ``rows (N, F, T)`` and advance ``cursor (3,)``.

    ``cursor`` is (next row, rows filled, samples refused). Shapes must not depend on the number of finite samples: they
    are sorted to the front, and surplus writes repeat the last one (or, if there is none, the row already in place).
    """
    n_memory, batch = rows.shape[0], x.shape[0]
    if batch == 0:
        return
    clean = pre_norm_reference(x, stats).to(rows.dtype)
    finite = clean.isfinite().flatten(1).all(1)
    order = torch.argsort((~finite).int(), stable=True)
    count = finite.sum()
    place = torch.arange(min(batch, n_memory), device=x.device) + (count - n_memory).clamp_min(0)
    place = place.minimum((count - 1).clamp_min(0))
    target = (cursor[0] + place) % n_memory
    written = torch.where(count > 0, clean[order[place]], rows[target])
    rows.index_copy_(0, target, written)
    cursor.copy_(
        torch.stack(
            [(cursor[0] + count) % n_memory, (cursor[1] + count).clamp_max(n_memory), cursor[2] + batch - count]
        )
    )


# the moving average


def ema_update__reference(target: Sequence[Tensor], online: Sequence[Tensor], decay: Tensor) -> None:
    """Set target to decay * target + (1 - decay) * online, computed as an interpolation.

    With w = 1 - decay rounded to the compute dtype: ``t + w (o - t)`` if w < 1/2, else ``o - (1 - w) (o - t)``. The
    difference, product and sum are rounded once each, never fused. So a target equal to its online twin does not
    change, decay 0 copies exactly, and decay 1 keeps exactly.
    """
    for t, o in zip(target, online, strict=True):
        dtype = compute_dtype(t.dtype)
        near, far = t.to(dtype), o.to(dtype)
        weight = (1 - decay.to(t.device, torch.float64 if t.device.type != "mps" else torch.float32)).to(dtype)
        step = far - near
        t.copy_(torch.where(weight < 0.5, near + weight * step, far - (1 - weight) * step))
