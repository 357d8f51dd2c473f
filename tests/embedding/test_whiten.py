"""Whitening: what the layer does to embeddings, files of whitened encoders, and the command."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from helpers.runs import write_recordings

from byola_fast import AudioNTT2020, AudioNTT2022, Embedder, LogMel, describe_encoder, load_encoder, save_encoder
from byola_fast.cli import main
from byola_fast.embedding.streaming import embed_clips
from byola_fast.embedding.whiten import whiten


def test_directions_become_more_equal_and_nothing_is_lost():
    torch.manual_seed(0)
    mixing = torch.randn(12, 12, dtype=torch.float64) @ torch.diag(10.0 ** torch.linspace(1, -3, 12).double())
    x = torch.randn(4000, 12, dtype=torch.float64) @ mixing.T + 5
    layer = whiten(AudioNTT2020(d=12).double(), x, floor=0.1).output
    z = (x - x.mean(0)) / x.std(0)
    strengths = torch.linalg.eigvalsh(z.T @ z / len(z))
    white = layer(x)
    found = torch.linalg.eigvalsh(white.T @ white / len(x))
    torch.testing.assert_close(found, (strengths / (strengths + 0.1)).sort().values, rtol=1e-6, atol=1e-9)
    assert white.mean(0).abs().max() < 1e-9
    back = torch.linalg.solve(layer.weight, (white - layer.bias).T).T
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoder", [AudioNTT2020(n_mels=16, d=24), AudioNTT2022(n_mels=16, d=280)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_a_whitened_encoder_is_recognised(tmp_path, encoder, suffix):
    torch.manual_seed(0)
    encoder, path = encoder.eval(), tmp_path / f"white{suffix}"
    whitened = whiten(encoder, torch.rand(2 * encoder.feature_d, encoder.feature_d))
    assert encoder.output is None  # a copy was made
    to_lms = LogMel(n_mels=16)
    save_encoder(path, whitened, config=describe_encoder(whitened, to_lms), stats=(-7.0, 4.0))
    wav = torch.randn(2, 12000) / 8
    plain = Embedder(encoder, stats=(-7.0, 4.0), to_lms=to_lms).eval()
    expected = whitened.output(plain(wav))
    for loaded in (load_encoder(path), load_encoder(path, encoder=type(encoder).__name__)):
        torch.testing.assert_close(loaded(wav), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded(wav, frames=True).frames, plain(wav, frames=True).frames)


def test_a_long_clip_is_whitened_after_its_pieces_are_pooled(tmp_path):
    torch.manual_seed(0)
    encoder = whiten(AudioNTT2020(n_mels=16, d=8).eval(), torch.rand(64, 8))
    embedder = Embedder(encoder, stats=(-7.0, 4.0), to_lms=LogMel(n_mels=16)).eval()
    wav = 0.1 * np.random.default_rng(0).standard_normal(5 * 16000).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", wav, 16000, subtype="FLOAT")
    *_progress, piece = embed_clips(embedder, [tmp_path / "long.wav"], batch_sec=1.0, workers=0)
    torch.testing.assert_close(piece.rows[0], embedder(torch.from_numpy(wav)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"encoder": torch.nn.Identity()},
            "encoder: expected AudioNTT2020 or AudioNTT2022, not whitened yet, got Ident",
        ),
        ({"encoder": AudioNTT2020(d=4, whitened=True)}, "not whitened yet, got a whitened one"),
        ({"embeddings": torch.ones(7, 4)}, r"embeddings: expected shape \(n, 4\) with n of at least 8, got \(7, 4\)"),
        ({"embeddings": torch.full((8, 4), torch.nan)}, "embeddings: expected finite values"),
        ({"floor": 0.0}, "floor: expected a number above 0, got 0"),
    ],
)
def test_what_cannot_be_whitened(change, words):
    given = {"encoder": AudioNTT2020(d=4), "embeddings": torch.rand(9, 4)} | change
    with pytest.raises(ValueError, match=words):
        whiten(**given)


def test_the_command_writes_an_encoder(tmp_path, capsys):
    recordings = write_recordings(tmp_path / "audio")
    weights, out = tmp_path / "encoder.pth", tmp_path / "white.safetensors"
    encoder = AudioNTT2020(n_mels=16, d=8)
    described = describe_encoder(encoder, LogMel(n_mels=16), unit_sec=0.31)
    save_encoder(weights, encoder, config=described, stats=(-7.0, 4.0))
    assert main(["whiten", str(weights), str(recordings), "--out", str(out), "--segments=40", "--workers=0"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    embedder = load_encoder(out)
    assert embedder.stats == (-7.0, 4.0)
    assert embedder.encoder.output is not None


def test_the_command_reads_a_runs_folder_and_keeps_where_it_comes_from(tmp_path):
    recordings, run, encoder = write_recordings(tmp_path / "audio"), tmp_path / "run", AudioNTT2020(n_mels=16, d=8)
    described = describe_encoder(encoder, LogMel(n_mels=16), provenance={"commit": "abc"})
    run.mkdir()
    save_encoder(run / "encoder.pth", encoder, config=described, stats=(-7.0, 4.0))
    (tmp_path / "part.csv").write_text("file_name,start,end\naudio/a.wav,0.1,0.3\naudio/f.wav,,\n")
    for number, audio in enumerate((recordings, tmp_path / "part.csv")):
        out = str(tmp_path / f"{number}.pth")
        assert main(["whiten", str(run), str(audio), "--out", out, "--segments=40", "--workers=0"]) == 0
        assert load_encoder(out).about["provenance"] == {"commit": "abc"}


def test_what_cannot_be_whitened_is_known_before_sound_is_read(tmp_path, capsys):
    plain, white = AudioNTT2020(n_mels=16, d=8), AudioNTT2020(n_mels=16, d=8, whitened=True)
    for name, encoder in (("plain", plain), ("white", white)):
        described = describe_encoder(encoder, LogMel(n_mels=16))
        save_encoder(tmp_path / f"{name}.pth", encoder, config=described, stats=(-7.0, 4.0))
    for words, message in {
        ("plain.pth", "--segments=9"): "segments: expected at least 16, twice the width, got 9",
        ("plain.pth", "--floor=0"): "floor: expected a number above 0, got 0",
        ("plain.pth", "--out=w.npz"): "out: expected a name ending in .pth, .pt or .safetensors, got w.npz",
        ("white.pth",): "encoder: expected AudioNTT2020 or AudioNTT2022, not whitened yet, got a whitened one",
    }.items():
        assert main(["whiten", str(tmp_path / words[0]), str(tmp_path / "no sound"), *words[1:]]) == 2
        assert message in capsys.readouterr().err
