"""Encoders as ONNX and exported programs: the same embeddings, for any batch and length, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from byola_fast import AudioNTT2020, AudioNTT2022, LogMel
from byola_fast.cli import main
from byola_fast.embedding import export as exporter
from byola_fast.embedding.embedder import Embedder
from byola_fast.embedding.export import export_encoder, shortest_export
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.networks.encoder_file import describe_encoder, save_encoder

pytestmark = pytest.mark.slow

SIZES = [(1, 0), (1, 1), (2, 16000), (5, 40001)]  # batch, samples beyond the least
RUN_ELSEWHERE = """
import json, sys
sys.modules["byola_fast"] = None
import torch
about = {"byola_fast.json": ""}
program = torch.export.load(sys.argv[1], extra_files=about).module()
cases = torch.load(sys.argv[2])
torch.save([program(wav) for wav in cases], sys.argv[3])
print(about["byola_fast.json"])
"""


def make_embedder(encoder):
    for layer in encoder.features:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    to_lms = LogMel(n_mels=encoder.n_mels, f_max=4000.0)
    return Embedder(encoder, stats=(-6.0, 3.0), to_lms=to_lms).eval().requires_grad_(False)


def cases(embedder):
    return [torch.randn(batch, shortest_export(embedder) + more) / 4 for batch, more in SIZES]


@pytest.fixture(scope="module")
def embedder():
    return make_embedder(AudioNTT2020(n_mels=16, d=24))


def test_onnx_gives_what_the_encoder_gives(embedder, tmp_path):
    path = export_encoder(embedder, tmp_path / "new" / "e.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", "samples"]
    assert session.get_outputs()[0].shape == ["batch", 24]
    for wav in cases(embedder):
        (found,) = session.run(["embedding"], {"wav": wav.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), embedder(wav), rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert about["sample_rate"] == "16000"
    assert about["min_samples"] == str(shortest_export(embedder))
    assert [file.name for file in path.parent.iterdir()] == ["e.onnx"]


def test_an_exported_program_runs_without_this_package(tmp_path):
    embedder = make_embedder(AudioNTT2022(n_mels=8, d=160, hidden_d=16))
    path = export_encoder(embedder, tmp_path / "e.pt2", frames=True)
    wavs, found = tmp_path / "wavs.pt", tmp_path / "found.pt"
    torch.save(cases(embedder), wavs)
    command = [sys.executable, "-c", RUN_ELSEWHERE, str(path), str(wavs), str(found)]
    message = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert json.loads(message)["frame_period_ms"] == 40
    for wav, frames in zip(torch.load(wavs), torch.load(found), strict=True):
        torch.testing.assert_close(frames, embedder(wav, frames=True).frames, rtol=1e-4, atol=1e-5)


def test_what_surrounds_the_export_is_not_in_the_file(embedder, tmp_path):
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            path = export_encoder(embedder, tmp_path / "e.pt2")
    finally:
        torch.set_default_dtype(torch.float32)
    program = torch.export.load(path).module()
    for wav in cases(embedder):
        torch.testing.assert_close(program(wav), embedder(wav), rtol=1e-4, atol=1e-5)


def test_the_command_reports_the_difference(embedder, tmp_path, capsys):
    weights = tmp_path / "encoder.safetensors"
    save_encoder(weights, embedder.encoder, config=describe_encoder(embedder.encoder, embedder.to_lms), stats=(-6, 3))
    out = tmp_path / "e.onnx"
    assert main(["export", str(weights), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out)
    assert "in onnxruntime" in captured.err


def test_a_difference_to_the_encoder_would_be_seen(embedder, tmp_path):
    path = export_encoder(embedder, tmp_path / "e.onnx")
    assert exporter._difference(embedder, path, frames=False) < 1e-5
    other = make_embedder(AudioNTT2020(n_mels=16, d=24))
    assert exporter._difference(other, path, frames=False) > 1e-2


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_a_file_with_other_embeddings_is_an_error(embedder, tmp_path, capsys, monkeypatch, difference):
    weights = tmp_path / "encoder.safetensors"
    save_encoder(weights, embedder.encoder, config=describe_encoder(embedder.encoder, embedder.to_lms), stats=(-6, 3))
    monkeypatch.setattr(exporter._Face, "forward", lambda _face, wav: torch.full((len(wav), 24), difference))
    monkeypatch.setattr(exporter, "export_encoder", lambda _embedder, path, **_words: Path(path))
    zeros = SimpleNamespace(run=lambda _names, given: [np.zeros((len(given["wav"]), 24), np.float32)])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_args, **_words: zeros)
    assert main(["export", str(weights), "--out", str(tmp_path / "e.onnx")]) == 2
    assert "onnxruntime differs from this encoder by" in capsys.readouterr().err


def test_what_cannot_be_exported(embedder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"ending in \.onnx or \.pt2, got .*e\.tflite"):
        export_encoder(embedder, tmp_path / "e.tflite")
    training = make_embedder(AudioNTT2020(n_mels=16, d=24)).train()
    with pytest.raises(ValueError, match="eval mode, float32, on the CPU, got training"):
        export_encoder(training, tmp_path / "e.pt2")
    with pytest.raises(ValueError, match=r"got eval, torch\.bfloat16"):
        export_encoder(training.eval().bfloat16(), tmp_path / "e.pt2")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_encoder(embedder, tmp_path / "file" / "e.pt2")
    monkeypatch.setattr(exporter, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx"):
        export_encoder(embedder, tmp_path / "e.onnx")
