"""Wav in, embedding out: against the parts, with statistics and front end from the file."""

from __future__ import annotations

import math
import re

import pytest
import soundfile
import torch
from helpers.tolerances import assert_close
from helpers.weight_files import Malicious, layout

from byola_fast import EMA, AudioNTT2020, AudioNTT2022, Embedder, LogMel, export_encoder, load_encoder, read_audio
from byola_fast.embedding.streaming import embed_blocks
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.networks.encoder_file import describe_encoder, save_encoder

STATS = (-7.1, 4.2)


def make_embedder(encoder=AudioNTT2020, **settings) -> Embedder:
    return Embedder(encoder(16, 300), stats=STATS, to_lms=LogMel(n_mels=16, **settings)).eval().requires_grad_(False)


@pytest.mark.parametrize("encoder", [AudioNTT2020, AudioNTT2022])
@pytest.mark.parametrize("samples", [1120, 4321, 15200])
def test_is_its_parts(encoder, samples):
    embedder, wav = make_embedder(encoder), 0.1 * torch.randn(3, samples)
    lms = (LogMel(n_mels=16)(wav.double()) - STATS[0]) / STATS[1]
    exact = encoder(16, 300).double().eval()
    exact.load_state_dict(embedder.encoder.state_dict())
    wanted = exact(lms).detach()
    assert wanted.std() > 0.01
    assert_close(embedder(wav), wanted, factor=30)
    frames, timestamps = embedder(wav, frames=True)
    assert_close(frames, exact.forward_frames(lms).detach(), factor=30)
    assert timestamps.shape == frames.shape[1:2] == (math.floor((1 + samples // 160) / encoder.frame_stride),)


def test_attributes_and_timestamps():
    first, second = make_embedder(), make_embedder(AudioNTT2022, sample_rate=8000, f_max=4000.0, hop_length=40)
    assert (first.sample_rate, first.feature_d, first.stats) == (16000, 300, STATS)
    assert (first.hop, first.frame_period_ms, first.min_samples) == (1280, 80.0, 1120)
    assert (second.sample_rate, second.hop, second.frame_period_ms, second.min_samples) == (8000, 160, 20.0, 513)
    times = first(torch.zeros(1, 16000), frames=True).timestamps
    wanted = [(8 * t + sum(range(8)) / 8) * 10 for t in range(12)]  # means of the middles of the frames covered
    assert times.tolist() == wanted
    assert second(torch.zeros(1, 1000), frames=True).timestamps.tolist() == [7.5 + 20 * t for t in range(6)]


def test_a_click_is_where_the_timestamps_say():
    embedder, wav = make_embedder(), torch.zeros(1, 16000)
    wav[0, 8000] = 1  # at 500 ms
    frames, timestamps = embedder(wav, frames=True)
    change = (frames - embedder(torch.zeros(1, 16000), frames=True).frames).abs().sum(2)[0]
    centre = (change * timestamps).sum() / change.sum()
    assert abs(centre - 500) < 40


def test_one_waveform_is_a_row_of_a_batch():
    embedder, wav = make_embedder(), torch.randn(3, 5000)
    batch, batch_frames = embedder(wav), embedder(wav, frames=True)
    for number in range(3):
        assert_close(embedder(wav[number]), batch[number].double(), factor=10)
        frames, timestamps = embedder(wav[number], frames=True)
        assert_close(frames, batch_frames.frames[number].double(), factor=10)
        assert torch.equal(timestamps, batch_frames.timestamps)
    assert embedder(wav[:0]).shape == (0, 300)
    assert_close(embedder(torch.stack([wav, wav], 2)[:, :, 0]), batch.double(), factor=10)


@pytest.mark.parametrize("samples", [1, 400, 1119])
def test_short_clips_are_padded_with_zeros_at_the_end(samples):
    embedder, wav = make_embedder(), torch.randn(2, samples)
    padded = torch.cat([wav, torch.zeros(2, 1120 - samples)], dim=1)
    before = wav.clone()
    assert torch.equal(embedder(wav), embedder(padded))
    assert torch.equal(wav, before)
    assert embedder(wav, frames=True).frames.shape == (2, 1, 300)


def test_dtypes():
    embedder, wav = make_embedder(), 0.1 * torch.randn(2, 16000)
    wanted = embedder(wav)
    assert_close(embedder(wav.double()), wanted.double(), factor=10)
    half = embedder(wav.half())
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half, wanted).min() > 0.999
    embedder.bfloat16()
    assert embedder(wav).dtype == torch.bfloat16
    assert torch.cosine_similarity(embedder(wav).float(), wanted).min() > 0.999


def test_nan_stays_in_its_own_waveform_and_gradients_reach_the_wave():
    embedder, wav = make_embedder(), torch.randn(2, 4000)
    broken = wav.clone()
    broken[0, 100] = math.nan
    assert torch.equal(embedder(broken)[1], embedder(wav)[1])
    wav.requires_grad_(True)
    embedder(wav).sum().backward()
    assert wav.grad.abs().sum() > 0
    assert not embedder(torch.randn(1, 4000)).requires_grad


def embeddings_of(embedder, wav):
    frames, timestamps = embedder(wav, frames=True)
    return [embedder(wav), frames, timestamps, *embed_blocks(embedder, wav[0].split(2000), block_sec=0.4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype):
    embedder, wav = make_embedder(), 0.1 * torch.randn(2, 16000)
    wanted = embeddings_of(embedder, wav)
    torch.set_default_dtype(dtype)
    try:
        found = embeddings_of(embedder, wav)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [x.dtype for x in found] == [torch.float32] * len(wanted)
    assert all(map(torch.equal, found, wanted))


def test_another_default_device_changes_nothing(tmp_path):
    embedder, wav = make_embedder(), 0.1 * torch.randn(2, 16000)
    wanted = embeddings_of(embedder, wav)
    save_encoder(tmp_path / "encoder.pth", embedder.encoder, config={"n_mels": 16}, stats=STATS)
    with torch.device("meta"):
        found = embeddings_of(load_encoder(tmp_path / "encoder.pth"), wav)
        export_encoder(embedder, tmp_path / "encoder.pt2")
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("encoder", [AudioNTT2020, AudioNTT2022])
def test_built_on_meta(encoder):
    embedder, wav = make_embedder(encoder), 0.1 * torch.randn(2, 16000)
    with torch.device("meta"):
        built = make_embedder(encoder)
        average = EMA(built)
        frames = built(torch.empty(2, 16000), frames=True)
    wanted = embeddings_of(embedder, wav)
    assert [x.shape for x in frames] == [x.shape for x in wanted[1:3]]
    built.to_empty(device="cpu").load_state_dict(embedder.state_dict())
    average.to_empty(device="cpu").load_state_dict(EMA(embedder).state_dict())
    for each in (built, average.target):
        assert all(map(torch.equal, embeddings_of(each.eval(), wav), wanted))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_everything_comes_from_an_own_file(tmp_path, suffix):
    path, encoder = tmp_path / f"encoder{suffix}", AudioNTT2020(16, 24)
    to_lms = LogMel(sample_rate=8000, n_mels=16, hop_length=100, f_max=3000.0, mel_scale="htk", norm=None)
    save_encoder(path, encoder, config=describe_encoder(encoder, to_lms), stats=STATS)
    embedder, wav = load_encoder(path, device="cpu"), torch.randn(2, 8000)
    assert (embedder.sample_rate, embedder.hop, embedder.stats) == (8000, 800, STATS)
    assert not any(module.training for module in embedder.modules())
    assert not any(p.requires_grad for p in embedder.parameters())
    wanted = encoder.eval()((to_lms(wav) - STATS[0]) / STATS[1]).detach()
    assert_close(embedder(wav), wanted.double(), factor=10)
    other = load_encoder(path, stats=(0.0, 1.0), to_lms=LogMel(n_mels=16))
    assert (other.stats, other.sample_rate) == ((0, 1), 16000)


def test_published_layout_needs_statistics(tmp_path):
    torch.save({"state_dict": layout(2, 64, (2048, 2048))}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: holds no statistics .* give stats=\(mean, std\).*--stats FILE"):
        load_encoder(tmp_path / "a.pth")
    embedder = load_encoder(tmp_path / "a.pth", stats=STATS)
    assert (embedder.feature_d, embedder.frame_period_ms, embedder.sample_rate) == (3072, 40.0, 16000)
    assert embedder(torch.randn(16000)).shape == (3072,)


def test_files_that_are_refused(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"state_dict": Malicious(mark)}, tmp_path / "code.pth")
    save_encoder(tmp_path / "rate.pth", AudioNTT2020(16, 8), config={"sample_rate": 100}, stats=STATS)
    save_encoder(tmp_path / "type.pth", AudioNTT2020(16, 8), config={"n_fft": "long"}, stats=STATS)
    save_encoder(tmp_path / "old.pth", AudioNTT2020(16, 8), config={"sample_rate": 8000}, stats=STATS)
    for name, words in {
        "code.pth": "pickled code",
        "rate.pth": "config: f_min, f_max: expected",
        "type.pth": "config: ",
        "missing.pth": "No such file",
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(words)):
            load_encoder(tmp_path / name)
    assert not mark.exists()
    assert load_encoder(tmp_path / "old.pth").to_lms.f_max == 4000


@pytest.mark.parametrize(
    ("wav", "error", "words"),
    [
        (torch.zeros(()), ValueError, r"expected shape \(..., samples\), not empty"),
        ([], ValueError, "expected at least one waveform"),
        (torch.zeros(2, 0), ValueError, "not empty"),
        (torch.zeros(2, 4000).long(), TypeError, "floating-point"),
        (torch.zeros(2, 4000, device="meta"), ValueError, "expected a tensor on cpu, as the module, got meta"),
        ([0.0], TypeError, "expected a torch.Tensor"),
    ],
)
def test_refused_waveforms(wav, error, words):
    with pytest.raises(error, match=words):
        make_embedder()(wav)


def test_waveforms_of_every_kind():
    embedder = make_embedder()
    wav = (torch.randn(2, 3, 8000) * 3000).to(torch.int16)
    wanted = embedder(wav.flatten(0, 1) / 32768)
    assert torch.equal(embedder(wav), wanted.view(2, 3, -1))
    assert torch.equal(embedder(wav.numpy()[:, ::-1]), wanted.view(2, 3, -1).flip(1))
    assert_close(embedder(wav[0, 0]), wanted[0].double(), factor=30)
    frames = embedder(wav, frames=True).frames
    assert frames.shape == (2, 3, 6, 300)
    lengths = (8000, 300, 5000)
    alone = [wav[0, k, :length] for k, length in enumerate(lengths)]
    assert torch.equal(embedder(alone), torch.stack([embedder(each) for each in alone]))
    assert [each.frames.shape[0] for each in embedder(alone, frames=True)] == [6, 1, 4]


def test_another_sample_rate_is_resampled_as_files_are(tmp_path):
    wav = 0.1 * torch.randn(44100).cumsum(0).clamp(-5, 5)
    soundfile.write(tmp_path / "a.wav", wav.numpy(), 44100, subtype="FLOAT")
    embedder = make_embedder()
    torch.testing.assert_close(embedder(wav, sample_rate=44100), embedder(read_audio(tmp_path / "a.wav")))
    assert torch.equal(embedder(wav, sample_rate=16000), embedder(wav))
    assert embedder(wav[None].numpy(), sample_rate=44100, frames=True).frames.shape == (1, 12, 300)
    for rate in (0, "16k"):
        with pytest.raises(ValueError, match=f"sample_rate: expected a number of at least 1 Hz, got {rate!r}"):
            embedder(wav, sample_rate=rate)
    with pytest.raises(
        ValueError, match=r"wav: expected waveforms \(samples,\) in a list, got one of shape \(1, 44100\)"
    ):
        embedder([wav, wav[None, :44100]])
    with pytest.raises(ValueError, match="sample_rate: expected 16000 Hz of a waveform that requires a gradient"):
        embedder(wav.requires_grad_(), sample_rate=44100)


def test_a_state_dict_holds_statistics_and_front_end():
    one, other = make_embedder(), Embedder(AudioNTT2020(16, 300), stats=(0.0, 1.0), to_lms=LogMel(n_mels=16)).eval()
    wav = torch.randn(2, 8000)
    assert not torch.equal(one(wav), other(wav))
    other.load_state_dict(one.state_dict())
    assert other.stats == one.stats
    assert torch.equal(one(wav), other(wav))
    before = other.encoder.state_dict()
    other = make_embedder(hop_length=320)
    with pytest.raises(ValueError, match="to_lms: hop_length: expected 160, as where the state was saved, got 320"):
        other.load_state_dict(one.state_dict())
    assert before.keys() == other.encoder.state_dict().keys()


def test_the_upper_edge_of_a_low_rate_is_half_of_it():
    assert LogMel(sample_rate=8000).f_max == 4000
    assert LogMel().f_max == 7800
    with pytest.raises(ValueError, match="f_min < f_max <= sample_rate / 2"):
        LogMel(sample_rate=8000, f_max=7800)


def test_refused_settings():
    with pytest.raises(ValueError, match="to_lms: expected 16 mels, as the encoder, got 64"):
        Embedder(AudioNTT2020(16, 8), stats=STATS, to_lms=LogMel())
    for stats in ((math.nan, 1.0), (0.0, -1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match=r"stats: expected \(mean, std\), finite"):
            Embedder(AudioNTT2020(16, 8), stats=stats)
