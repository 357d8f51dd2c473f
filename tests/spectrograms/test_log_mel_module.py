"""The log-mel front end against an independent float64 computation, its filter bank, and its contract."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch

from byola_fast.spectrograms.log_mel import LogMel

EPS = 2.0**-23
SCALES = [("slaney", "slaney"), ("slaney", None), ("htk", "slaney"), ("htk", None)]
SETTINGS = {"sample_rate": 22050, "n_fft": 600, "win_length": 450, "hop_length": 111, "n_mels": 23, "f_max": 9000.0}


def hz_of_mel(mel: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))  # Slaney: linear to 1 kHz, then log


def mel_of_hz(hz: float, scale: str) -> float:
    if scale == "htk":
        return 2595 * np.log10(1 + hz / 700)
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def mel_bank(to_lms: LogMel) -> np.ndarray:
    """(F, bins) triangles in float64, from the definition."""
    low, high = (mel_of_hz(hz, to_lms.mel_scale) for hz in (to_lms.f_min, to_lms.f_max))
    corners = hz_of_mel(np.linspace(low, high, to_lms.n_mels + 2), to_lms.mel_scale)[:, None]
    hz = np.arange(to_lms.n_fft // 2 + 1) * to_lms.sample_rate / to_lms.n_fft
    rising = (hz - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - hz) / (corners[2:] - corners[1:-1])
    bank = np.maximum(0, np.minimum(rising, falling))
    return bank * 2 / (corners[2:] - corners[:-2]) if to_lms.norm == "slaney" else bank


def log_mel(wav: np.ndarray, to_lms: LogMel, bank: np.ndarray) -> np.ndarray:
    """(B, samples) to (B, 1, F, T) in float64: own framing, window and Fourier transform."""
    n_fft, missing = to_lms.n_fft, to_lms.n_fft - to_lms.win_length
    window = scipy.signal.get_window("hann", to_lms.win_length, fftbins=True)
    window = np.pad(window, (missing // 2, missing - missing // 2))
    padded = np.pad(wav.astype(np.float64), ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=1)[:, :: to_lms.hop_length]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    return np.log(power @ bank.T + EPS).swapaxes(1, 2)[:, None]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("mel_scale", "norm"), SCALES)
def test_the_filter_bank_follows_its_definition(mel_scale: str, norm: str | None) -> None:
    to_lms = LogMel(mel_scale=mel_scale, norm=norm)
    bank, wanted = to_lms.filter_bank.double().numpy(), mel_bank(to_lms)
    # float32 frequencies near 7800 Hz are 5e-4 Hz apart, and the narrowest triangles' sides are 20 Hz wide.
    np.testing.assert_allclose(bank, wanted, rtol=0, atol=5e-5 * wanted.max())
    hz = np.arange(513) * 16000 / 1024
    assert not bank[:, (hz < 60) | (hz > 7800)].any()
    assert (bank >= 0).all()
    assert (bank.sum(axis=1) > 0).all()
    if norm == "slaney":  # unit area, as far as bins of 15.6 Hz sample a wide triangle
        np.testing.assert_allclose(bank[40:].sum(axis=1) * 16000 / 1024, 1, rtol=0.02)
    else:
        assert bank.max() <= 1
        assert bank[40:].max(axis=1).min() > 0.9


@pytest.mark.parametrize(("mel_scale", "norm"), SCALES)
@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["default", "other"])
def test_log_mel_equals_the_float64_computation(mel_scale: str, norm: str | None, settings: dict[str, float]) -> None:
    to_lms = LogMel(mel_scale=mel_scale, norm=norm, **settings)
    wav = noise(3, 15200)
    lms = to_lms(torch.from_numpy(wav)).numpy()
    assert lms.dtype == np.float64
    # Both sides in float64 with the same bank: rounding of 1000 sums, the logarithm's slope at most 1 / eps.
    np.testing.assert_allclose(lms, log_mel(wav, to_lms, to_lms.filter_bank.double().numpy()), rtol=0, atol=1e-9)
    # The bank from its definition moves weights by 1e-5 of their peak, which noise turns into as much of the mel.
    np.testing.assert_allclose(lms, log_mel(wav, to_lms, mel_bank(to_lms)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    # float32: the transform's error is 2e-7 of a frame's norm, a mel bin of noise may hold 1 % of it, squared.
    # bfloat16 and float16 waveforms are exact in float32; only the result, up to 16 in size, is rounded: half an ulp.
    ("dtype", "atol"), [(torch.float32, 2e-5), (torch.float16, 2e-5 + 2**-8), (torch.bfloat16, 2e-5 + 2**-5)],
)  # fmt: skip
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype, atol: float) -> None:
    to_lms = LogMel()
    wav = torch.from_numpy(noise(2, 15200)).to(dtype)
    lms = to_lms(wav)
    assert lms.dtype == dtype
    wanted = log_mel(wav.double().numpy(), to_lms, to_lms.filter_bank.double().numpy())
    np.testing.assert_allclose(lms.double().numpy(), wanted, rtol=0, atol=atol)


def test_a_sine_lands_in_its_mel_bin_at_its_level() -> None:
    to_lms = LogMel(norm=None, mel_scale="htk")
    hz = 1000.0
    wav = torch.sin(2 * torch.pi * hz * torch.arange(16000, dtype=torch.float64) / 16000)
    column = to_lms(wav)[0, :, 50]
    assert int(column.argmax()) == int(mel_bank(to_lms)[:, 64].argmax())
    # 1000 Hz is bin 64; a Hann window spreads an amplitude of 1 as 256, 128 either side.
    power = np.zeros(513)
    power[63:66] = 128.0**2, 256.0**2, 128.0**2
    peak = np.log(mel_bank(to_lms) @ power + EPS).max()
    assert float(column.max()) == pytest.approx(peak, abs=1e-4)  # the bank's own float32 rounding


def test_default_shapes_and_frame_count() -> None:
    to_lms = LogMel()
    assert (to_lms.n_mels, to_lms.sample_rate, to_lms.hop_length) == (64, 16000, 160)
    assert to_lms(torch.zeros(2, 15200)).shape == (2, 1, 64, 96)
    assert to_lms(torch.zeros(15200)).shape == (1, 64, 96)
    for samples in (513, 639, 640, 641, 16000):
        assert to_lms(torch.zeros(1, samples)).shape == (1, 1, 64, to_lms.num_frames(samples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_empty_batch_and_silence(dtype: torch.dtype) -> None:
    to_lms = LogMel()
    empty = to_lms(torch.zeros(0, 15200, dtype=dtype))
    assert empty.shape == (0, 1, 64, 96)
    assert empty.dtype == dtype
    silence = to_lms(torch.zeros(1, 15200, dtype=dtype))
    torch.testing.assert_close(silence, torch.full_like(silence, np.log(EPS)), rtol=0, atol=0)


def test_chunks_strides_and_single_waveforms_agree() -> None:
    to_lms = LogMel()
    wav = torch.from_numpy(noise(61, 3000)).float()  # 19 frames: several chunks
    lms = to_lms(wav)
    assert lms.is_contiguous()
    for index in (0, 30, 60):
        torch.testing.assert_close(lms[index], to_lms(wav[index]), rtol=0, atol=1e-5)  # order of float32 sums
    torch.testing.assert_close(to_lms(wav.T.contiguous().T), lms, rtol=0, atol=0)
    torch.testing.assert_close(to_lms(wav[:, ::2]), to_lms(wav[:, ::2].contiguous()), rtol=0, atol=0)


def test_nan_stays_in_its_waveform() -> None:
    wav = torch.from_numpy(noise(3, 2000)).float()
    wav[1, 1000] = torch.nan
    finite = LogMel()(wav).isfinite().flatten(1).all(dim=1)
    assert finite.tolist() == [True, False, True]


def test_the_input_is_left_alone_and_gradients_flow() -> None:
    wav = torch.from_numpy(noise(2, 700))
    kept = wav.clone()
    to_lms = LogMel(n_fft=64, win_length=64, hop_length=100, n_mels=4)
    to_lms(wav)
    assert torch.equal(wav, kept)
    assert torch.autograd.gradcheck(to_lms, wav.requires_grad_())


def test_buffers_stay_out_of_the_state_dict_and_keep_their_precision() -> None:
    to_lms = LogMel()
    wav = torch.from_numpy(noise(2, 3000)).float()
    wanted = to_lms(wav)
    assert not to_lms.state_dict()
    for convert in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double):
        convert(to_lms)
        assert {to_lms.window.dtype, to_lms.filter_bank.dtype} == {torch.float32}
        assert torch.equal(to_lms(wav), wanted)
    assert {buffer.device.type for buffer in to_lms.to("meta").buffers()} == {"meta"}


def test_autocast_does_not_lower_the_precision() -> None:
    to_lms = LogMel()
    wav = torch.from_numpy(noise(2, 3000)).float()
    wanted = to_lms(wav)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(to_lms(wav), wanted)


def test_it_compiles_to_one_graph() -> None:
    to_lms = LogMel()
    wav = torch.from_numpy(noise(40, 15200)).float()
    compiled = torch.compile(to_lms, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(wav), to_lms(wav), rtol=0, atol=1e-5)  # one chunk or several


@pytest.mark.parametrize(
    ("wav", "error", "message"),
    [
        (torch.zeros(1, 1, 15200), ValueError, "wav: expected shape"),
        (torch.tensor(0.0), ValueError, "wav: expected shape"),
        (torch.zeros(2, 512), ValueError, "more than n_fft // 2 = 512 samples"),
        (torch.zeros(0, 512), ValueError, "more than n_fft // 2 = 512 samples"),
        (torch.zeros(2, 15200, dtype=torch.int32), TypeError, "wav.*int16, got torch.int32"),
        (torch.zeros(2, 15200, dtype=torch.complex64), TypeError, "wav.*complex64"),
        (np.zeros((2, 15200), np.float32), TypeError, "wav.*ndarray"),
    ],
)
def test_bad_waveforms_are_refused(wav: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LogMel()(wav)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_rate": 8000, "f_max": 7800.0}, "f_max.*4000"),
        ({"f_min": 7800.0}, "f_min"),
        ({"f_min": -1.0}, "f_min"),
        ({"f_max": float("nan")}, "f_max"),
        ({"win_length": 1025}, "win_length.*1024"),
        ({"win_length": 0}, "win_length"),
        ({"hop_length": 0}, "hop_length"),
        ({"n_mels": 0}, "n_mels"),
        ({"n_fft": 0}, "n_fft"),
        ({"mel_scale": "bark"}, "mel_scale.*bark"),
        ({"norm": "l2"}, "norm.*l2"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(**settings)


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="fmin"):
        LogMel(fmin=60.0)


@pytest.mark.slow
def test_importing_the_front_end_does_not_import_torchaudio() -> None:
    import subprocess
    import sys

    code = "import sys, byola_fast.spectrograms.log_mel, byola_fast.audio.reading, byola_fast.audio.demo_corpus; "
    code += "print([name for name in ('torchaudio', 'soundfile', 'soxr') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
