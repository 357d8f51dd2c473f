"""The front end: waveforms in, natural-log mel spectrograms out (step 1 of the pipeline)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from byola_fast.ops._checks import is_float, is_one_of

EPS = torch.finfo(torch.float32).eps
CPU_CHUNK_FRAMES = 384  # per thread: the spectra of a chunk (3 MB) stay in cache, which is 2 to 3 times as fast


class LogMel(torch.nn.Module):
    """Turn waveforms into natural-log mel spectrograms: ``lms = log(mel(|STFT(wav)|^2) + eps)``.

    Hann window, frames centred on multiples of ``hop_length`` with reflect padding, ``eps = 2^-23`` (float32's).
    The defaults are BYOL-A's: 0.95 s at 16 kHz (15200 samples) give 64 mels by 96 frames.

    Args:
        sample_rate: rate of the waveforms, in Hz.
        n_fft: length of the Fourier transform, in samples.
        win_length: length of the window, in samples, 1 to ``n_fft``; a shorter one is centred in ``n_fft``.
        hop_length: step between frames, in samples.
        n_mels: number of mel bins, F.
        f_min: lower edge of the lowest mel bin, in Hz, at least 0.
        f_max: upper edge of the highest mel bin, in Hz, at most ``sample_rate / 2``.
        mel_scale: ``"slaney"`` (librosa's default, which BYOL-A's published weights were trained with) or ``"htk"``.
        norm: ``"slaney"`` (every triangle has the same area) or ``None`` (every triangle peaks at 1).
            ``mel_scale="htk", norm=None`` are torchaudio's own defaults.

    Shape:
        ``(B, samples)`` to ``(B, 1, F, T)`` and ``(samples,)`` to ``(1, F, T)``, contiguous, on the device of ``wav``;
        T = ``num_frames(samples)``. ``samples`` must exceed ``n_fft // 2``. An empty batch gives an empty output.

    Raises:
        TypeError: the waveform is no floating-point tensor.
        ValueError: the waveform has another rank or is too short for the padding, or a setting is out of range.

    Numerics:
        float16 and bfloat16 waveforms are computed in float32 and returned in their own dtype; float64 is computed in
        float64, with the filter bank rounded to float32. Autocast is off inside, and ``.half()`` on a model that
        holds this module does not touch the window and the filter bank. Silence gives ``log(eps)`` = -15.94.
        NaN and infinity stay in their own waveform. The CPU works on chunks of the batch, so that float32 results may
        differ in the last bits with the batch size and the number of threads.

    Autograd: differentiable with respect to ``wav``.

    Source: Niizumi et al., arXiv:2103.06695, section IV; the filter bank is ``torchaudio.functional.melscale_fbanks``.

    >>> to_lms = LogMel()
    >>> to_lms(torch.zeros(2, 15200)).shape
    torch.Size([2, 1, 64, 96])
    """

    window: torch.Tensor  # (win_length,) float32
    filter_bank: torch.Tensor  # (F, n_fft // 2 + 1) float32

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        win_length: int = 1024,
        hop_length: int = 160,
        n_mels: int = 64,
        f_min: float = 60.0,
        f_max: float = 7800.0,
        mel_scale: str = "slaney",
        norm: str | None = "slaney",
    ) -> None:
        super().__init__()
        sizes = {"sample_rate": sample_rate, "n_fft": n_fft, "hop_length": hop_length, "n_mels": n_mels}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 1 <= win_length <= n_fft:
            raise ValueError(f"win_length: expected 1 to n_fft = {n_fft}, got {win_length}")
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise ValueError(
                f"f_min, f_max: expected 0 <= f_min < f_max <= sample_rate / 2 = {sample_rate / 2:g} Hz, "
                f"got {f_min:g} and {f_max:g} Hz"
            )
        is_one_of("mel_scale", mel_scale, ("slaney", "htk"))
        if norm not in ("slaney", None):
            raise ValueError(f"norm: expected 'slaney' or None, got {norm!r}")

        import torchaudio  # here, so that importing byola_fast needs torch alone

        self.sample_rate, self.n_fft, self.win_length, self.hop_length = sample_rate, n_fft, win_length, hop_length
        self.n_mels, self.f_min, self.f_max, self.mel_scale, self.norm = n_mels, f_min, f_max, mel_scale, norm
        bank = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate, norm=norm, mel_scale=mel_scale
        )
        self.register_buffer("filter_bank", bank.T.contiguous().float(), persistent=False)
        self.register_buffer("window", torch.hann_window(win_length, dtype=torch.float32), persistent=False)

    def num_frames(self, num_samples: int) -> int:
        """Return the number of frames T of ``num_samples`` samples: ``1 + num_samples // hop_length``.

        Raises:
            ValueError: fewer samples than reflect padding needs, ``n_fft // 2 + 1``.

        >>> LogMel().num_frames(15200)
        96
        """
        if num_samples <= self.n_fft // 2:
            raise ValueError(
                f"wav: expected more than n_fft // 2 = {self.n_fft // 2} samples (reflect padding), got {num_samples}"
            )
        return 1 + num_samples // self.hop_length

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        """Return the log-mel spectrogram ``(B, 1, F, T)`` of ``wav`` ``(B, samples)``; see the class."""
        is_float("wav", wav)
        if wav.ndim not in (1, 2):
            raise ValueError(f"wav: expected shape (B, samples) or (samples,), got {tuple(wav.shape)}")
        frames = self.num_frames(wav.shape[-1])
        batch = wav if wav.ndim == 2 else wav[None]
        if batch.shape[0] == 0:
            return wav.new_empty((0, 1, self.n_mels, frames))

        exact = batch.double() if wav.dtype == torch.float64 else batch.float()
        chunk = batch.shape[0]
        if wav.device.type == "cpu" and not torch.compiler.is_compiling():
            chunk = max(1, CPU_CHUNK_FRAMES * torch.get_num_threads() // frames)
        with torch.autocast(wav.device.type, enabled=False):
            parts = [self._log_mel(part) for part in torch.split(exact, chunk)]
        lms = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(wav.dtype)
        return lms[:, None] if wav.ndim == 2 else lms

    def _log_mel(self, wav: torch.Tensor) -> torch.Tensor:
        """``(B, samples)`` float32 or float64 to ``(B, F, T)``."""
        window = self.window
        if wav.dtype == torch.float64:
            window = torch.hann_window(self.win_length, dtype=torch.float64, device=wav.device)
        # Centred frames and reflect padding are stft's defaults.
        spectrum = torch.stft(wav, self.n_fft, self.hop_length, self.win_length, window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()  # abs() would go through hypot, which is slow
        return (self.filter_bank.to(wav.dtype) @ power + EPS).log()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LogMel:
        """Follow ``fn`` to another device but keep the buffers float32, whatever dtype the rest of a model takes."""

        def keep_dtype(buffer: torch.Tensor) -> torch.Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return (
            f"sample_rate={self.sample_rate}, n_fft={self.n_fft}, win_length={self.win_length}, "
            f"hop_length={self.hop_length}, n_mels={self.n_mels}, f_min={self.f_min:g}, f_max={self.f_max:g}, "
            f"mel_scale={self.mel_scale!r}, norm={self.norm!r}"
        )
