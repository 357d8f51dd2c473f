"""The public op of the front end: contract and checks here, arithmetic in the backends."""

from __future__ import annotations

import torch
from torch import Tensor

from byola_fast.ops import _checks as check
from byola_fast.ops._route import needs_reference, op
from byola_fast.ops._schemas import log_mel_in_chunks
from byola_fast.ops.reference import num_frames_reference

__all__ = ["log_mel", "mel_bands", "num_frames"]

LARGEST_FACTOR = 64  # of n_fft; only torch's transform has algorithms for larger primes


def log_mel(
    wav: Tensor,
    window: Tensor,
    filter_bank: Tensor,
    bands: Tensor | None = None,
    *,
    n_fft: int,
    hop_length: int,
    center: bool = True,
    stats: Tensor | None = None,
) -> Tensor:
    """Turn waveforms into natural-log mel spectrograms: ``lms = log(filter_bank |STFT(wav)|^2 + eps)``.

    eps = 1.19e-7 (float32's, for every dtype); with ``stats``, ``(lms - mean) / max(std, eps)``. ``LogMel`` makes
    window and filter bank from settings in Hz.

    Args:
        wav: waveforms in [-1, 1], or int16, which are divided by 32768.
        window: a window shorter than ``n_fft`` is centred in the frame.
        filter_bank: weight of each frequency in each mel bin, not negative.
        bands: first and one past the last frequency with a weight in each mel bin; ``mel_bands(filter_bank)`` by
            default. Kernels do not read weights outside the bands.
        n_fft: length of the Fourier transform, in samples.
        hop_length: step between frames, in samples.
        center: centre frames on multiples of ``hop_length``, with reflect padding; else the first starts at 0.
        stats: mean and std of the pre-normalisation.

    Shape:
        wav ``(B, samples)``, window ``(n,)`` with 1 <= n <= n_fft, filter_bank ``(F, n_fft // 2 + 1)``, bands
        ``(F, 2)`` int32 or int64, stats ``(2,)``; a new contiguous ``(B, F, T)`` tensor in the dtype of wav, float32
        for int16, with T = ``num_frames(samples, n_fft, hop_length, center)``.

    Raises:
        TypeError: wrong dtypes. ValueError: shapes, devices or sizes that do not match, too few samples for a frame.
        RuntimeError: an argument other than wav requires a gradient, because it would get none.

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once, float64 in float64. In float32 the transform's
        error is 1e-7 of a frame's largest magnitude: bands down to 80 dB below it are accurate to 1e-4, weaker bands
        that are not negligible beside eps to 1e-3. NaN and inf stay in their own waveform. On the CPU each frame is the
        same for any batch and number of threads.

    Autograd:
        To wav, once differentiable, by the reference's formula.

    Backends:
        C++ on the CPU, fastest if n_fft has only the prime factors 2, 3 and 5. Triton on CUDA if n_fft is a power of
        two from 64 to 2048, hop_length at most 2 n_fft, and wav not float64. Plain PyTorch otherwise, on the CPU if
        n_fft has a prime factor above 64, under ``torch.export`` and in ``torch.func``.

    Source:
        Niizumi et al., arXiv:2103.06695, section IV.

    >>> bank = torch.ones(1, 5)
    >>> log_mel(torch.zeros(2, 16), torch.hann_window(8), bank, n_fft=8, hop_length=4).shape
    torch.Size([2, 1, 5])
    """
    check.require_tensor("wav", wav)
    if wav.dtype not in (*check.FLOATS, torch.int16):
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*check.FLOATS, torch.int16))
        raise TypeError(f"wav: expected one of {wanted}, got {wav.dtype}")
    check.require_shape("wav", wav, ("B", "samples"))
    n_fft, hop_length = check.whole("n_fft", n_fft, 1, 2**63), check.whole("hop_length", hop_length, 1, 2**63)
    check.require_float("window", window)
    check.require_shape("window", window, ("n",))
    if not 1 <= window.shape[0] <= n_fft:
        raise ValueError(f"window: expected 1 to n_fft = {n_fft} values, got {window.shape[0]}")
    check.require_float("filter_bank", filter_bank)
    check.require_shape("filter_bank", filter_bank, ("F", n_fft // 2 + 1))
    bands = mel_bands(filter_bank) if bands is None else bands
    check.require_integer("bands", bands)
    check.require_shape("bands", bands, (filter_bank.shape[0], 2))
    if stats is not None:
        check.require_float("stats", stats)
        check.require_shape("stats", stats, (2,))
        check.require_same_device("stats", stats, "wav", wav)
    for name, tensor in (("window", window), ("filter_bank", filter_bank), ("bands", bands)):
        check.require_same_device(name, tensor, "wav", wav)
    check.require_no_grad("log_mel", window=window, filter_bank=filter_bank, stats=stats)
    num_frames(wav.shape[1], n_fft, hop_length, center)
    arguments = (wav, window, filter_bank, bands, stats, n_fft, hop_length, center)
    if wav.device.type == "cpu" and _largest_factor(n_fft) > LARGEST_FACTOR and not needs_reference():
        return log_mel_in_chunks(*arguments)
    return op("log_mel", wav)(*arguments)


def _largest_factor(n: int) -> int:
    """Return the largest prime factor of n; 1 for 1."""
    factor = 2
    while factor * factor <= n:
        if n % factor:
            factor += 1
        else:
            n //= factor
    return n


def num_frames(samples: int, n_fft: int, hop_length: int, center: bool = True) -> int:
    """Return the number of frames T: whole windows of ``n_fft``, ``hop_length`` apart, in the padded waveform.

    Raises:
        ValueError: too few samples for one frame or for reflect padding; ``hop_length`` below 1.

    >>> num_frames(15200, 1024, 160)
    96
    """
    if hop_length < 1:
        raise ValueError(f"hop_length: expected at least 1, got {hop_length}")
    if center and samples <= n_fft // 2:
        raise ValueError(f"wav: expected more than n_fft // 2 = {n_fft // 2} samples (reflect padding), got {samples}")
    if not center and samples < n_fft:
        raise ValueError(f"wav: expected at least n_fft = {n_fft} samples (no padding), got {samples}")
    return num_frames_reference(samples, n_fft, hop_length, center)


def mel_bands(filter_bank: Tensor) -> Tensor:
    """Return the first and one past the last frequency with a weight in each mel bin: ``(F, 2)`` int32, 0, 0 for none.

    >>> mel_bands(torch.tensor([[0.0, 0.5, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([[1, 3],
            [0, 0]], dtype=torch.int32)
    """
    weighted = (filter_bank != 0).int()
    first, last = weighted.argmax(1), filter_bank.shape[1] - weighted.flip(1).argmax(1)
    return (torch.stack([first, last], 1) * weighted.amax(1, keepdim=True)).int()
