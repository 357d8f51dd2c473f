"""log_mel against torchaudio and float64: every available backend, difficult waveforms, odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torchaudio
from helpers.layouts import threads
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from byola_fast import LogMel, ops
from byola_fast.ops.reference import log_mel_backward_reference, log_mel_reference

EPS = 2.0**-23
OPS = torch.ops.byola_fast


def noise(*shape: int, level: float = 0.1) -> Tensor:
    return level * torch.randn(*shape, dtype=torch.float64)


def exact(to_lms: LogMel, wav: Tensor) -> Tensor:
    """Return (B, F, T) in float64 by plain PyTorch on the CPU; test_log_mel_module.py checks it against numpy."""
    tensors = (tensor.cpu() for tensor in (to_lms.window, to_lms.filter_bank, to_lms.bands))
    return log_mel_reference(wav.double().cpu(), *tensors, None, to_lms.n_fft, to_lms.hop_length, to_lms.center)


def of_torchaudio(to_lms: LogMel, wav: Tensor) -> Tensor:
    mel = torchaudio.transforms.MelSpectrogram(
        to_lms.sample_rate,
        n_fft=to_lms.n_fft,
        win_length=to_lms.win_length,
        hop_length=to_lms.hop_length,
        f_min=to_lms.f_min,
        f_max=to_lms.f_max,
        n_mels=to_lms.n_mels,
        mel_scale=to_lms.mel_scale,
        norm=to_lms.norm,
        center=to_lms.center,
    )
    return (mel.to(wav.dtype)(wav.cpu()) + EPS).log()


TONES = ("sine at Nyquist", "sine at 440 Hz", "sine over a floor of 100 dB below", "constant")


def clips() -> dict[str, Tensor]:
    """Waveforms ``(1, samples)`` float64 that are difficult for a transform in float32."""
    n = torch.arange(15200, dtype=torch.float64)[None]
    return {
        "noise": noise(1, 15200),
        "sine at Nyquist": torch.cos(math.pi * n),
        "sine at 440 Hz": torch.sin(2 * math.pi * 440 / 16000 * n),
        "sine over a floor of 100 dB below": torch.sin(0.7 * n) + 1e-5 * noise(1, 15200),
        "onset after silence": noise(1, 15200, level=0.5) * (n > 9000),
        "decay over 120 dB": noise(1, 15200) * 10 ** (-6 * n / 15200),
        "constant": torch.ones_like(n),
        "click": (n == 7777).double(),
        "silence": torch.zeros_like(n),
        "denormals": 1e-40 * noise(1, 15200),
        "float32's largest that keeps a finite power": noise(1, 15200, level=1e15),
    }


@pytest.mark.parametrize(("mel_scale", "norm"), [("slaney", "slaney"), ("htk", None)])
@pytest.mark.parametrize("name", clips())
def test_float32_agrees_with_torchaudio_and_float64(name, mel_scale, norm, device):
    to_lms = LogMel(mel_scale=mel_scale, norm=norm).to(device)
    wav = clips()[name].float()
    lms, wanted, common = to_lms(wav.to(device))[:, 0].cpu(), exact(to_lms, wav), of_torchaudio(to_lms, wav)
    loud = wanted > wanted.max() - math.log(1e8)  # 80 dB
    for bins, limit in ((loud, 1e-4), (~loud, 1e-3)):
        if bins.any():
            # Beside a pure tone, other bins hold the transform's rounding errors, in torchaudio too.
            allowed = max(limit, 3 * (common - wanted)[bins].abs().max().item())
            assert name in TONES or allowed == limit
            assert (lms - common)[bins].abs().max() <= allowed
            assert (lms - wanted)[bins].abs().max() <= allowed


@pytest.mark.parametrize("center", [True, False])
def test_noise_is_tight_against_float64(center, device):
    to_lms = LogMel(center=center).to(device)
    wav = noise(3, 16001).float()
    error = (to_lms(wav.to(device))[:, 0].cpu() - exact(to_lms, wav)).abs()
    assert error.max() <= 2e-6  # one rounding of values near 8, 1000 roundings of the transform, on average zero
    assert error.mean() <= 2e-7


@settings(max_examples=60, deadline=None)
@given(
    n_fft=st.one_of(st.integers(1, 70), st.sampled_from([81, 100, 128, 243, 400, 512, 600, 1021, 1024, 2048, 4096])),
    hop_length=st.integers(1, 700),
    n_mels=st.integers(1, 9),
    batch=st.integers(0, 3),
    center=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16]),
    data=st.data(),
)
def test_any_sizes_agree_with_the_reference(n_fft, hop_length, n_mels, batch, center, dtype, data):
    minimum = n_fft // 2 + 1 if center else n_fft
    samples = minimum + data.draw(st.integers(0, min(3000, 150 * hop_length)))
    bins = n_fft // 2 + 1
    bank = torch.rand(n_mels, bins) + 0.1
    first = torch.randint(bins + 1, (n_mels, 2)).sort(1).values
    place = torch.arange(bins)
    bank *= (place >= first[:, :1]) & (place < first[:, 1:])
    window = torch.rand(data.draw(st.integers(1, n_fft)), dtype=torch.float64) + 0.1
    scaled = 0.1 * torch.randn(batch, samples)
    wav = (32768 * scaled).short() if dtype == torch.int16 else scaled.to(dtype)
    stats = torch.tensor([-3.0, 2.0]) if data.draw(st.booleans()) else None
    lms = ops.log_mel(wav, window, bank, n_fft=n_fft, hop_length=hop_length, center=center, stats=stats)
    plain = wav.double() / 32768 if dtype == torch.int16 else wav.double()
    wanted = log_mel_reference(plain, window, bank, first, stats, n_fft, hop_length, center)
    assert lms.shape == (batch, n_mels, ops.num_frames(samples, n_fft, hop_length, center)) == wanted.shape
    assert lms.is_contiguous()
    assert lms.dtype == (torch.float32 if dtype == torch.int16 else dtype)
    # A float32 transform has an error of 1e-7 of a frame's largest magnitude; squared and beside eps, few bins show it.
    # Factor 3, because large prime lengths are transformed by definition, and the roundings of n_fft terms add up.
    assert_close(lms, wanted, factor=3)


def test_a_large_prime_runs_plain_pytorch():
    wav, window = noise(2, 3000).float(), torch.hann_window(1018)
    bank = torch.rand(2, 510)
    lms = ops.log_mel(wav, window, bank, n_fft=1018, hop_length=300)  # 2 times 509
    torch.testing.assert_close(lms, OPS.log_mel(wav, window, bank, ops.mel_bands(bank), None, 1018, 300, True))
    assert_close(lms, log_mel_reference(wav.double(), window, bank, ops.mel_bands(bank), None, 1018, 300, True), 3)


def test_int16_equals_the_same_waveform_in_float32(device):
    to_lms = LogMel().to(device)
    whole = torch.randint(-32768, 32768, (3, 15201), device=device).short()
    whole[0, :4000] = 0
    lms = to_lms(whole)
    assert lms.dtype == torch.float32
    torch.testing.assert_close(lms, to_lms(whole.float() / 32768), rtol=0, atol=0 if device.type == "cpu" else 1e-6)


def test_statistics_pre_normalise(device):
    to_lms = LogMel(n_mels=5).to(device)
    wav = noise(2, 4000).float().to(device)
    stats = torch.tensor([-7.1, 4.2], device=device)
    torch.testing.assert_close(to_lms(wav, stats=stats), (to_lms(wav) - stats[0]) / stats[1], rtol=0, atol=2e-6)
    constant = to_lms(wav, stats=torch.tensor([0.0, 0.0], device=device))
    torch.testing.assert_close(constant, to_lms(wav) / EPS, rtol=1e-5, atol=0)


def test_frames_do_not_depend_on_batch_threads_or_strides():
    to_lms = LogMel()
    wav = noise(7, 40000).float()  # three pieces, the last one partly empty
    wanted = to_lms(wav)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(to_lms(wav), wanted)
    for row in range(7):
        assert torch.equal(to_lms(wav[row]), wanted[row])
    assert torch.equal(to_lms(torch.cat([wav, wav], 1)[:, :40000]), wanted)
    assert torch.equal(to_lms(wav.T.contiguous().T), wanted)
    assert torch.equal(to_lms(wav.repeat_interleave(2, 0)[::2]), wanted)
    # a frame is the same at any position: 160 samples earlier, one column earlier
    inner = to_lms(wav[:, 160:])[..., 4:200]
    assert torch.equal(inner, wanted[..., 5:201])


def test_nan_and_inf_stay_in_their_frames():
    to_lms = LogMel()
    wav = noise(3, 15200).float()
    clean = to_lms(wav)[:, 0]
    wav[0, 8000], wav[1, 8000] = torch.nan, torch.inf
    lms = to_lms(wav)[:, 0]
    touched = torch.zeros(96, dtype=torch.bool)
    touched[[t for t in range(96) if abs(8000 - 160 * t) < 512]] = True
    assert not lms[:2, :, touched].isfinite().any()
    assert torch.equal(lms[:, :, ~touched], clean[:, :, ~touched])
    assert torch.equal(lms[2], clean[2])


def test_weights_outside_the_bands_are_not_missed_nor_read():
    """``bands`` from ``mel_bands`` hold every weight, also with zeros between."""
    bank = torch.tensor([[0, 1.0, 0, 2.0, 0], [0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0], [0, 0, 0, 0, 4.0]])
    assert ops.mel_bands(bank).tolist() == [[1, 4], [0, 0], [0, 1], [4, 5]]
    wav, window = noise(2, 50).float(), torch.hann_window(8)
    lms = ops.log_mel(wav, window, bank, n_fft=8, hop_length=3)
    wanted = log_mel_reference(wav.double(), window, bank, ops.mel_bands(bank), None, 8, 3, True)
    assert_close(lms, wanted)
    torch.testing.assert_close(lms[:, 1], torch.full_like(lms[:, 1], math.log(EPS)))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("n_fft", [8, 9, 12])
def test_gradients(n_fft, center, device):
    wav = noise(2, 40).to(device).requires_grad_()
    window = torch.hann_window(n_fft - 1, dtype=torch.float64, device=device)
    bank = torch.rand(3, n_fft // 2 + 1, device=device)
    stats = torch.tensor([-1.0, 2.0], device=device)

    def call(x: Tensor) -> Tensor:
        return ops.log_mel(x, window, bank, n_fft=n_fft, hop_length=5, center=center, stats=stats)

    assert torch.autograd.gradcheck(call, wav)
    (grad,) = torch.autograd.grad(call(wav).sum(), wav, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_the_backward_of_the_reference_is_its_derivative():
    wav = noise(2, 3000).requires_grad_()
    to_lms = LogMel(n_fft=400, win_length=320)
    arguments = (to_lms.window.double(), to_lms.filter_bank, to_lms.bands, None, 400, 160, True)
    lms = log_mel_reference(wav, *arguments)
    grad = torch.randn_like(lms)
    (wanted,) = torch.autograd.grad(lms, wav, grad)
    torch.testing.assert_close(log_mel_backward_reference(grad, wav.detach(), *arguments), wanted)
    single = log_mel_backward_reference(grad.float(), wav.detach().float(), *arguments)
    torch.testing.assert_close(single.double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_export_uses_plain_pytorch():
    to_lms = LogMel()
    wav = noise(3, 15200).float()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(to_lms, (wav,), dynamic_shapes={"wav": {0: batch}})
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "byola_fast" in target]
    longer = noise(5, 15200).float()
    torch.testing.assert_close(exported.module()(longer), to_lms(longer), rtol=0, atol=1e-4)


def test_compiled_graphs_hold_the_op():
    to_lms = LogMel(n_mels=4)
    compiled = torch.compile(lambda wav: 2 * to_lms(wav), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, samples in ((2, 3000), (3, 4001)):
        wav = noise(batch, samples).float()
        assert torch.equal(compiled(wav), 2 * to_lms(wav))


WAV, WINDOW, BANK = torch.zeros(2, 100), torch.ones(8), torch.ones(3, 5)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((WAV.int(), WINDOW, BANK), {}, TypeError, "wav: expected one of float32.*int16, got torch.int32"),
        ((WAV[0], WINDOW, BANK), {}, ValueError, r"wav: expected shape \(B, samples\)"),
        ((WAV[:, :4], WINDOW, BANK), {}, ValueError, "more than n_fft // 2 = 4 samples"),
        ((WAV[:, :1], WINDOW, BANK), {}, ValueError, "got 1"),
        ((WAV[:, :0], WINDOW, BANK), {}, ValueError, "got 0"),
        ((WAV[:, :7], WINDOW, BANK), {"center": False}, ValueError, "at least n_fft = 8 samples"),
        ((WAV, torch.ones(9), BANK), {}, ValueError, "window: expected 1 to n_fft = 8 values, got 9"),
        ((WAV, torch.ones(0), BANK), {}, ValueError, "window"),
        ((WAV, WINDOW, BANK[:, :4]), {}, ValueError, r"filter_bank: expected shape \(F, 5\), got \(3, 4\)"),
        ((WAV, WINDOW, BANK, torch.zeros(2, 2).int()), {}, ValueError, r"bands: expected shape \(3, 2\)"),
        ((WAV, WINDOW, BANK, torch.zeros(3, 2)), {}, TypeError, "bands: expected int32"),
        ((WAV, WINDOW, BANK), {"hop_length": 0}, ValueError, "hop_length: expected an integer in "),
        ((WAV, WINDOW, BANK), {"stats": torch.zeros(3)}, ValueError, r"stats: expected shape \(2,\)"),
        ((WAV, WINDOW, BANK.clone().requires_grad_()), {}, RuntimeError, "no gradient to filter_bank"),
    ],
)
def test_bad_arguments_are_refused(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        ops.log_mel(*arguments, **{"n_fft": 8, "hop_length": 3} | settings)


def test_bands_outside_the_spectrum_are_never_read():
    for bad in ([[0, 6]], [[-1, 3]], [[4, 3]]):
        bands = torch.tensor(bad * 3, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="bands: expected 0 <= first <= last"):
            OPS.log_mel(WAV, WINDOW, BANK, bands, None, 8, 3, True)
