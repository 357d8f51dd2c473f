"""The mel filter bank: torchaudio's, or the same computed here where torchaudio cannot be loaded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LINEAR_HZ = 200 / 3  # of a mel below the break of Slaney's scale
BREAK_HZ, BREAK_MEL, LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27


def mel_filter_bank(
    n_fft: int, f_min: float, f_max: float, n_mels: int, sample_rate: int, norm: str | None, mel_scale: str
) -> Tensor:
    """Return the triangles ``(n_mels, n_fft // 2 + 1)`` float32, on the CPU.

    torchaudio has a library of C++ that loads beside the PyTorch it was built for alone, which a CPU-only PyTorch may
    not be. What is computed here equals its filter bank within 1e-6.
    """
    arguments = (n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate)
    try:
        from torchaudio.functional import melscale_fbanks  # here, so that importing byola_fast needs torch alone
    except (ImportError, OSError, RuntimeError):
        return own_filter_bank(*arguments, norm, mel_scale).T.contiguous()
    return melscale_fbanks(*arguments, norm=norm, mel_scale=mel_scale).T.contiguous()


def own_filter_bank(
    n_freqs: int, f_min: float, f_max: float, n_mels: int, sample_rate: int, norm: str | None, mel_scale: str
) -> Tensor:
    """Return ``(n_freqs, n_mels)``; in float32 throughout, as torchaudio, whose rounding narrow triangles show."""
    edges = _to_hz(torch.linspace(_to_mel(f_min, mel_scale), _to_mel(f_max, mel_scale), n_mels + 2), mel_scale)
    slopes = edges - torch.linspace(0, sample_rate // 2, n_freqs)[:, None]
    widths = edges.diff()
    bank = torch.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]).clamp_min(0)
    return bank * (2.0 / (edges[2:] - edges[:-2])) if norm == "slaney" else bank


def _to_mel(hertz: float, mel_scale: str) -> float:
    if mel_scale == "htk":
        return 2595.0 * math.log10(1.0 + hertz / 700.0)
    return hertz / LINEAR_HZ if hertz < BREAK_HZ else BREAK_MEL + math.log(hertz / BREAK_HZ) / LOG_STEP


def _to_hz(mels: Tensor, mel_scale: str) -> Tensor:
    if mel_scale == "htk":
        return 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    return torch.where(mels < BREAK_MEL, LINEAR_HZ * mels, BREAK_HZ * torch.exp(LOG_STEP * (mels - BREAK_MEL)))
