"""The HEAR interface: against the embedder, against its own contract, and by HEAR's own validator."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.tolerances import assert_close

from byola_fast import AudioNTT2020, AudioNTT2022, Embedder, LogMel
from byola_fast.hear import HearModel, get_scene_embeddings, get_timestamp_embeddings, load_model
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.networks.encoder_file import describe_encoder, save_encoder

STATS = (-7.1, 4.2)


def write_weights(path: Path, encoder: torch.nn.Module, n_mels: int = 16) -> str:
    save_encoder(path, encoder, config=describe_encoder(encoder, LogMel(n_mels=n_mels)), stats=STATS)
    return str(path)


@pytest.fixture(params=[lambda: AudioNTT2020(16, 24), lambda: AudioNTT2022(16, 300, 32)], ids=["2020", "2022"])
def model(request, tmp_path):
    return load_model(write_weights(tmp_path / "encoder.pth", request.param()))


def test_attributes(model):
    width = model.embedder.feature_d
    assert (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size) == (16000, width, width)
    assert model.offsets == {24: 2, 300: 1}[width]
    assert not model.training


@pytest.mark.parametrize("samples", [1, 700, 17120, 31680, 64000])
def test_embeddings(model, samples):
    audio = 0.3 * torch.randn(3, samples)
    scenes = get_scene_embeddings(audio, model)
    assert scenes.dtype == torch.float32
    assert_close(scenes, model.embedder(audio).double(), factor=10)
    frames, times = get_timestamp_embeddings(audio, model)
    assert frames.dtype == torch.float32
    assert frames.shape == (*times.shape, model.timestamp_embedding_size)
    length_ms = samples / 16
    assert (times.diff() == 40).all()
    assert torch.equal(times[0], times[2])
    assert times[0, 0] <= 40
    assert length_ms - 40 <= times[0, -1] <= max(length_ms, float(times[0, 0]))

    plain, plain_times = model.embedder(audio, frames=True)  # the first grid, but for the end, which is padded
    whole = min(plain.shape[1] - 2, frames.shape[1] // model.offsets)
    if whole > 0:
        assert_close(frames[:, :: model.offsets][:, :whole], plain[:, :whole].double(), factor=10)
        assert torch.equal(times[0, :: model.offsets][:whole], plain_times[:whole])


def test_the_second_grid_lies_between_the_frames_of_the_first():
    model = HearModel(Embedder(AudioNTT2020(16, 24), stats=STATS, to_lms=LogMel(n_mels=16)).eval())
    audio = 0.3 * torch.randn(2, 32000)
    frames, times = get_timestamp_embeddings(audio, model)
    later, later_times = get_timestamp_embeddings(audio[:, 640:], model)  # 40 ms later: the second grid is the first
    assert torch.equal(later_times[:, ::2][:, :20] + 40, times[:, 1::2][:, :20])
    inner = slice(2, 20)  # beyond what the beginning, cut elsewhere, reaches
    assert_close(later[:, ::2][:, inner], frames[:, 1::2][:, inner].double(), factor=30)


def test_large_batches_in_parts(monkeypatch, model):
    audio = torch.randn(7, 16000)
    scenes, (frames, times) = get_scene_embeddings(audio, model), get_timestamp_embeddings(audio, model)
    monkeypatch.setattr("byola_fast.hear.BATCH_SEC", 2.5)
    assert_close(get_scene_embeddings(audio, model), scenes.double(), factor=10)
    again, again_times = get_timestamp_embeddings(audio, model)
    assert_close(again, frames.double(), factor=10)
    assert torch.equal(again_times, times)


def test_nan_stays_in_its_own_sound(model):
    audio = 0.3 * torch.randn(2, 16000)
    broken = audio.clone()
    broken[0, 100] = torch.nan
    scenes, (frames, _times) = get_scene_embeddings(broken, model), get_timestamp_embeddings(broken, model)
    assert torch.equal(scenes[1], get_scene_embeddings(audio, model)[1])
    assert torch.equal(frames[1], get_timestamp_embeddings(audio, model)[0][1])
    assert not scenes[0].isfinite().any()
    assert not frames[0].isfinite().all()


def test_without_a_path_the_weights_in_the_box():
    scenes = get_scene_embeddings(torch.randn(2, 16000), load_model())
    assert scenes.shape == (2, 512)


def test_refused(tmp_path, model):
    with pytest.raises(CheckpointError, match="No such file"):
        load_model(str(tmp_path / "missing.pth"))
    for audio, error in ((torch.zeros(16000), ValueError), (torch.zeros(2, 0), ValueError), ([[0.0]], TypeError)):
        with pytest.raises(error, match="audio: expected"):
            get_scene_embeddings(audio, model)
        with pytest.raises(error, match="audio: expected"):
            get_timestamp_embeddings(audio, model)
    coarse = Embedder(AudioNTT2020(16, 24), stats=STATS, to_lms=LogMel(n_mels=16, hop_length=900))
    with pytest.raises(ValueError, match=r"at most 50 ms apart, got 56\.25 ms"):
        HearModel(coarse)


@pytest.fixture(scope="module")
def validator(tmp_path_factory):
    """HEAR's validator, from the package index, with an empty stand-in for TensorFlow."""
    target = tmp_path_factory.mktemp("hearvalidator")
    options = ["--no-deps", "--ignore-requires-python", "--disable-pip-version-check", "--retries=1", "--timeout=10"]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, f"--target={target}", "hearvalidator==2021.0.6"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip(f"hearvalidator cannot be installed here: {answer.stderr.strip().splitlines()[-1:]}")
    tensorflow = ModuleType("tensorflow")
    tensorflow.Module = type("Module", (), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", tensorflow)
        patch.syspath_prepend(target)
        yield importlib.import_module("hearvalidator.validate")


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [AudioNTT2020, AudioNTT2022])
def test_hears_own_validator(validator, tmp_path, capsys, encoder):
    path = write_weights(tmp_path / "encoder.safetensors", encoder(), 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            validator.ValidateModel("byola_fast.hear", path, device="cpu")()
        except validator.ModelError as error:  # no Exception, so that pytest would stop
            pytest.fail(str(error))
    assert "Max interval between timestamps is 40.0ms" in capsys.readouterr().out
    message = [" ".join(str(one.message).split()) for one in caught if "timestamps" in str(one.message)]
    assert [words for words in message if not words.startswith("IMPORTANT: A common bug")] == []  # always given
