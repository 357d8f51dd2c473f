"""The front end: waveforms in, natural-log mel spectrograms out (step 1 of the pipeline)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from byola_fast import ops
from byola_fast.ops import _checks as check
from byola_fast.runtime.buffers import FixedDtype
from byola_fast.runtime.device import without_autocast
from byola_fast.spectrograms.mel_bank import mel_filter_bank


@dataclass(kw_only=True)
class FrontEnd:
    """Settings of the front end, which commands that compute log-mels take.

    Attributes:
        sample_rate: rate that audio is resampled to, in Hz; a packed store has the rate it was packed at.
        n_fft: length of the Fourier transform, in samples.
        win_length: length of its window, in samples, at most n_fft.
        hop_length: step between frames, in samples.
        n_mels: mel bins of the log-mel spectrogram; a multiple of 8 suits AudioNTT2020.
        f_min: lower edge of the lowest mel bin, in Hz.
        f_max: upper edge of the highest mel bin, in Hz; half the sample rate if that is less.
        mel_scale: "slaney" (librosa's default, used by published weights) or "htk".
        norm: area of the mel triangles: "slaney", or null for a peak of 1 (torchaudio's default, with "htk").
    """

    sample_rate: int = 16000
    n_fft: int = 1024
    win_length: int = 1024
    hop_length: int = 160
    n_mels: int = 64
    f_min: float = 60.0
    f_max: float = 7800.0
    mel_scale: str = "slaney"
    norm: str | None = "slaney"

    def front_end(self) -> dict[str, Any]:
        """Return the arguments of ``LogMel``, with f_max at most half the sample rate."""
        settings = {field.name: getattr(self, field.name) for field in fields(FrontEnd)}
        return settings | {"f_max": min(self.f_max, self.sample_rate / 2)}


LARGEST = 1 << 31
FRONT_END = (*(field.name for field in fields(FrontEnd)), "center")  # attributes of LogMel that define it


class LogMel(FixedDtype):
    """Turn waveforms into natural-log mel spectrograms: ``lms = log(mel(|STFT(wav)|^2) + eps)``.

    Hann window, frames centred on multiples of ``hop_length`` with reflect padding, ``eps = 2^-23`` (float32's).
    The defaults are BYOL-A's: 0.95 s at 16 kHz (15200 samples) give 64 mels by 96 frames. int16 waveforms, as in a
    packed store, need no conversion: ``view1, view2 = aug(to_lms(wav))``.

    Args:
        sample_rate: rate of the waveforms, in Hz.
        n_fft: length of the Fourier transform, in samples.
        win_length: length of the window, in samples, 1 to ``n_fft``; a shorter one is centred in ``n_fft``.
        hop_length: step between frames, in samples.
        n_mels: number of mel bins, F.
        f_min: lower edge of the lowest mel bin, in Hz, at least 0.
        f_max: upper edge of the highest mel bin, in Hz, at most ``sample_rate / 2``; by default 7800 or that, if less.
        mel_scale: ``"slaney"`` (librosa's default, which BYOL-A's published weights were trained with) or ``"htk"``.
        norm: ``"slaney"`` (every triangle has the same area) or ``None`` (every triangle peaks at 1).
            ``mel_scale="htk", norm=None`` are torchaudio's own defaults.
        center: False starts the first frame at the first sample and pads nothing.

    Shape:
        ``(B, samples)`` to ``(B, 1, F, T)`` and ``(samples,)`` to ``(1, F, T)``, contiguous, on the device of ``wav``;
        T = ``num_frames(samples)``. ``samples`` must exceed ``n_fft // 2``, or reach ``n_fft`` if not centred. An empty
        batch gives an empty output.

    Raises:
        TypeError: the waveform is neither a floating-point tensor nor int16.
        ValueError: the waveform has another rank or is too short for the padding, or a setting is out of range.

    Numerics:
        int16 counts as ``wav / 32768`` and gives float32. float16 and bfloat16 waveforms are computed in float32 and
        returned in their own dtype; float64 is computed in float64, with the filter bank rounded to float32. Autocast
        is off inside. Window and filter bank are float32, even after ``.half()`` or under a default dtype of half.
        Silence gives ``log(eps)`` = -15.94. NaN and infinity stay in their own waveform.

    Autograd: once differentiable with respect to ``wav``, by plain PyTorch.

    Backends: ``ops.log_mel``; ``torch.export`` takes plain PyTorch.

    Source: Niizumi et al., arXiv:2103.06695, section IV; the filter bank is ``torchaudio.functional.melscale_fbanks``,
    computed here where torchaudio cannot be loaded.

    >>> to_lms = LogMel()
    >>> to_lms(torch.zeros(2, 15200)).shape
    torch.Size([2, 1, 64, 96])
    """

    window: torch.Tensor  # (win_length,) float32
    filter_bank: torch.Tensor  # (F, n_fft // 2 + 1) float32
    bands: torch.Tensor  # (F, 2) int32: where the filter bank is not zero

    def __init__(
        self,
        *,
        sample_rate: int = FrontEnd.sample_rate,
        n_fft: int = FrontEnd.n_fft,
        win_length: int = FrontEnd.win_length,
        hop_length: int = FrontEnd.hop_length,
        n_mels: int = FrontEnd.n_mels,
        f_min: float = FrontEnd.f_min,
        f_max: float | None = None,
        mel_scale: str = FrontEnd.mel_scale,
        norm: str | None = FrontEnd.norm,
        center: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"sample_rate": sample_rate, "n_fft": n_fft, "hop_length": hop_length, "n_mels": n_mels}
        for name, value in sizes.items():
            if not 1 <= value < LARGEST:
                raise ValueError(f"{name}: expected at least 1 and less than 2^31, got {value}")
        if not 1 <= win_length <= n_fft:
            raise ValueError(f"win_length: expected 1 to n_fft = {n_fft}, got {win_length}")
        f_max = min(FrontEnd.f_max, sample_rate / 2) if f_max is None else f_max
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise ValueError(
                f"f_min, f_max: expected 0 <= f_min < f_max <= sample_rate / 2 = {sample_rate / 2:g} Hz, "
                f"got {f_min:g} and {f_max:g} Hz"
            )
        check.require_one_of("mel_scale", mel_scale, ("slaney", "htk"))
        if norm not in ("slaney", None):
            raise ValueError(f"norm: expected 'slaney' or None, got {norm!r}")

        self.sample_rate, self.n_fft, self.win_length, self.hop_length = sample_rate, n_fft, win_length, hop_length
        self.n_mels, self.f_min, self.f_max, self.mel_scale, self.norm = n_mels, f_min, f_max, mel_scale, norm
        self.center = center
        for name in ("filter_bank", "bands", "window"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._compute()

    def _compute(self) -> None:
        """Compute the buffers, whatever torch's default dtype and device are, and move them to their device."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                band = (self.f_min, self.f_max, self.n_mels)
                bank = mel_filter_bank(self.n_fft, *band, self.sample_rate, self.norm, self.mel_scale)
                window = torch.hann_window(self.win_length)
        finally:
            torch.set_default_dtype(default)
        device = self.window.device
        self.filter_bank, self.bands, self.window = (x.to(device) for x in (bank, ops.mel_bands(bank), window))
        self._computed = (self.filter_bank, self.bands, self.window)

    def _restore(self) -> None:
        """Compute the buffers again if others were put in their place.

        No state dict has them, so ``to_empty`` and loaders of large models leave them without values.
        """
        here = (self.filter_bank, self.bands, self.window)
        if type(self.window) is not torch.Tensor or self.window.is_meta or all(map(operator.is_, here, self._computed)):
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("LogMel: its buffers were replaced; call it once before torch.compile traces it")
        self._compute()

    def num_frames(self, num_samples: int) -> int:
        """Return the number of frames T of ``num_samples`` samples; for an even ``n_fft``, ``1 + num_samples // hop``.

        Raises:
            ValueError: fewer samples than reflect padding needs, ``n_fft // 2 + 1``, or, not centred, than ``n_fft``.

        >>> LogMel().num_frames(15200)
        96
        """
        return ops.num_frames(num_samples, self.n_fft, self.hop_length, self.center)

    def forward(self, wav: torch.Tensor, *, stats: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-mel spectrogram ``(B, 1, F, T)`` of ``wav`` ``(B, samples)``; see the class.

        With ``stats (2,)``, mean and std, it is also pre-normalised: ``(lms - mean) / max(std, eps)``.
        """
        check.require_tensor("wav", wav)
        if wav.ndim not in (1, 2):
            raise ValueError(f"wav: expected shape (B, samples) or (samples,), got {tuple(wav.shape)}")
        self._restore()
        window = self.window
        if wav.dtype == torch.float64:
            window = torch.hann_window(self.win_length, dtype=torch.float64, device=wav.device)
        with without_autocast(wav.device):
            lms = ops.log_mel(
                wav if wav.ndim == 2 else wav[None],
                window,
                self.filter_bank,
                self.bands,
                n_fft=self.n_fft,
                hop_length=self.hop_length,
                center=self.center,
                stats=stats,
            )
        return lms[:, None] if wav.ndim == 2 else lms

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LogMel:
        super()._apply(fn, recurse)
        self._restore()
        return self

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return (
            f"sample_rate={self.sample_rate}, n_fft={self.n_fft}, win_length={self.win_length}, "
            f"hop_length={self.hop_length}, n_mels={self.n_mels}, f_min={self.f_min:g}, f_max={self.f_max:g}, "
            f"mel_scale={self.mel_scale!r}, norm={self.norm!r}, center={self.center}"
        )
