"""Many files of any length give the embeddings of the whole, for any blocks and batches."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import AudioNTT2020, AudioNTT2022, Embedder, LogMel
from byola_fast.audio.reading import AudioError, read_audio, read_blocks
from byola_fast.embedding.streaming import embed_blocks, embed_clips
from byola_fast.evaluation.mel_baseline import MelStats

STATS = (-7.1, 4.2)
FRONT_ENDS = [{}, {"hop_length": 100, "n_fft": 512, "win_length": 400}, {"hop_length": 600}]


def make_embedder(encoder=AudioNTT2020, **front_end) -> Embedder:
    network = MelStats(16) if encoder is MelStats else encoder(16, 300)
    return Embedder(network, stats=STATS, to_lms=LogMel(n_mels=16, **front_end)).eval().requires_grad_(False)


def wavs(*samples: int) -> list[torch.Tensor]:
    """Noise of changing loudness, so that no two places are alike."""
    return [torch.randn(count) * torch.linspace(0.01, 0.5, count) for count in samples]


def write(path, wav, rate=16000):
    soundfile.write(path, wav.numpy(), rate, subtype="FLOAT")
    return path


@pytest.mark.parametrize("encoder", [AudioNTT2020, AudioNTT2022, MelStats])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@settings(max_examples=5, deadline=None)
@given(
    samples=st.integers(1, 60000),
    cut=st.integers(200, 30000),
    block_sec=st.floats(0.01, 2.0),
)
def test_blocks_equal_the_whole(encoder, front_end, samples, cut, block_sec):
    torch.manual_seed(samples)
    embedder, (wav,) = make_embedder(encoder, **front_end), wavs(samples)
    whole = embedder(wav, frames=True).frames
    pieces = list(embed_blocks(embedder, wav.split(cut), block_sec=block_sec))
    assert torch.cat(pieces).shape == whole.shape
    assert_close(torch.cat(pieces), whole.double(), factor=30)
    longest = max(1, round(block_sec * 16000 / embedder.hop))
    assert all(1 <= len(piece) <= longest for piece in pieces[:-1])


def test_memory_is_that_of_a_block():
    embedder, seen = make_embedder(), []
    forward = embedder.forward
    embedder.forward = lambda wav, frames: seen.append(len(wav)) or forward(wav, frames=frames)
    given = (torch.randn(5000) for _ in range(200))
    assert sum(map(len, embed_blocks(embedder, given, block_sec=2.0))) == 1000000 // 1280
    assert max(seen) <= 32000 + 5 * 1280 + 5000
    with pytest.raises(ValueError, match="at least one sample"):
        list(embed_blocks(embedder, []))


@pytest.mark.parametrize("rate", [16000, 44100, 8000])
@pytest.mark.parametrize("name", ["a.wav", "a.ogg", "a.mp3", "a.flac"])
def test_read_blocks(tmp_path, rate, name):
    path = tmp_path / name
    soundfile.write(path, 0.1 * np.random.default_rng(1).standard_normal((3 * rate + 77, 2)), rate)
    whole = read_audio(path)
    for block_sec in (0.1, 3.0, 1.0):
        blocks = list(read_blocks(path, block_sec=block_sec))
        assert all(len(block) for block in blocks)
        assert_close(torch.cat(blocks), whole.double())
    assert len(blocks) >= 3


def test_read_blocks_of_what_is_broken(tmp_path):
    wav = torch.randn(16000)
    wav[9000] = torch.nan
    blocks = read_blocks(write(tmp_path / "nan.wav", wav), block_sec=0.25)
    assert len(next(blocks)) == 4000
    with pytest.raises(AudioError, match="NaN or infinite"):
        list(blocks)
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(AudioError, match="not audio"):
        next(read_blocks(tmp_path / "text.wav"))


@pytest.mark.parametrize("encoder", [AudioNTT2020, MelStats])
@pytest.mark.parametrize("frames", [False, True])
def test_files(tmp_path, encoder, frames):
    lengths = [15200, 40000, 15200, 1, 300, 15200, 70000, 9000]
    files = [write(tmp_path / f"{n}.wav", wav) for n, wav in enumerate(wavs(*lengths))]
    files += [write(tmp_path / "nan.wav", torch.full((500,), torch.nan)), tmp_path / "missing.wav"]
    late = torch.randn(70000)
    late[60000] = torch.inf  # found when much of it is embedded already
    files.append(write(tmp_path / "late.wav", late))
    embedder = make_embedder(encoder)
    for batch_sec, workers in ((1.5, 0), (100.0, 0), (3.0, 2)):
        found: dict[int, list[torch.Tensor]] = {}
        broken, samples = {}, dict.fromkeys(range(len(files)), 0)
        for piece in embed_clips(embedder, files, frames=frames, batch_sec=batch_sec, workers=workers):
            assert piece.number not in broken
            found.setdefault(piece.number, []).append(piece.rows)
            samples[piece.number] += piece.samples
            if piece.error is not None:
                assert piece.last
                broken[piece.number] = piece.error.reason
        assert set(broken) == {8, 9, 10}
        assert set(found) == set(range(len(files)))
        assert "NaN" in broken[10]
        assert "No such file" in broken[9]
        for number, count in enumerate(lengths):
            local = embedder(read_audio(files[number]), frames=True).frames
            wanted = local if frames else embedder(read_audio(files[number]))[None]
            assert_close(torch.cat(found[number]), wanted.double(), factor=100)
            assert samples[number] == count


def test_padding_and_refused_settings(tmp_path):
    embedder, files = make_embedder(), [write(tmp_path / "a.wav", torch.randn(5000))]
    (piece,) = embed_clips(embedder, files, pad_sec=0.95, workers=0)
    padded = torch.nn.functional.pad(read_audio(files[0]), (5100, 5100))
    assert_close(piece.rows[0], embedder(padded).double(), factor=10)
    for words in ({"pad_sec": -1}, {"batch_sec": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match=next(iter(words))):
            next(embed_clips(embedder, files, **words))


class Overflowing(AudioNTT2020):
    """Overflows on loud clips, as weights out of range do."""

    def forward_frames(self, x):
        frames = super().forward_frames(x)
        loud = x.amax((1, 2, 3)) > 1
        return torch.where(loud[:, None, None], frames / 0, frames)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_embedding_that_is_not_finite_is_an_error_of_its_file(tmp_path, frames, dtype):
    late = torch.cat([0.01 * torch.randn(60000), 10 * torch.randn(10000)])  # found when much of it is embedded already
    quiet, loud = 0.01 * torch.randn(3, 15200), 10 * torch.randn(15200)
    clips = [quiet[0], loud, quiet[1], late, late[:60000], quiet[2]]
    files = [write(tmp_path / f"{n}.wav", wav) for n, wav in enumerate(clips)]
    embedder = Embedder(Overflowing(16, 24), stats=(0.0, 4.0), to_lms=LogMel(n_mels=16)).eval().to(dtype)
    rows, broken = {}, {}
    for piece in embed_clips(embedder, files, frames=frames, batch_sec=2.0, workers=0):
        if piece.error is not None:
            assert isinstance(piece.error, AudioError)
            broken[piece.number] = str(piece.error)
        else:
            rows.setdefault(piece.number, []).append(piece.rows)
    assert sorted(broken) == [1, 3]
    assert all(str(files[n]) in words and "not finite" in words for n, words in broken.items())
    assert all(torch.cat(rows[n]).isfinite().all() for n in (0, 2, 4, 5))
