"""Encoders recognised from files: own ones, whole runs, and state dicts of the published layout."""

from __future__ import annotations

import pytest
import torch
from helpers.weight_files import layout
from torch import Tensor

from byola_fast import AudioNTT2020, AudioNTT2022, Augment, LogMel, make_learner
from byola_fast.networks.checkpoint import CheckpointError, save_checkpoint
from byola_fast.networks.encoder_file import describe_encoder, read_encoder, save_encoder
from byola_fast.spectrograms.log_mel import FRONT_END


def wrap(state: dict[str, Tensor], prefix: str, wrappers: tuple[str, ...]) -> dict:
    content = {prefix + name: tensor for name, tensor in state.items()}
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 3}
    return content


@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("state_dict", "model")])
@pytest.mark.parametrize("prefix", ["", "module.", "online._orig_mod.encoder."])
@pytest.mark.parametrize(
    ("kind", "blocks", "mels", "widths", "feature_d"),
    [
        (AudioNTT2020, 3, 64, (512, 512), 512),
        (AudioNTT2020, 3, 80, (24, 24), 24),
        (AudioNTT2022, 2, 64, (2048, 2048), 3072),
        (AudioNTT2022, 2, 16, (40, 30), 286),
    ],
)
def test_published_layout(tmp_path, kind, blocks, mels, widths, feature_d, prefix, wrappers):
    state = layout(blocks, mels, widths)
    torch.save(wrap(state, prefix, wrappers), tmp_path / "a.pth")
    encoder, config, stats = read_encoder(tmp_path / "a.pth")
    assert type(encoder) is kind
    assert (encoder.n_mels, encoder.feature_d, encoder.training) == (mels, feature_d, False)
    assert (config, stats) == ({}, None)
    loaded = encoder.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("encoder", [AudioNTT2020(63, 24), AudioNTT2022(63, 1000, 20)])
def test_own_files(tmp_path, suffix, encoder):
    path, to_lms = tmp_path / f"a{suffix}", LogMel(n_mels=63, f_min=50.0, norm=None)
    save_encoder(path, encoder, config=describe_encoder(encoder, to_lms, unit_sec=0.5), stats=(-7.1, 4.2))
    loaded, config, stats = read_encoder(path)
    assert type(loaded) is type(encoder)
    assert (loaded.n_mels, loaded.feature_d) == (63, encoder.feature_d)
    assert {name: config[name] for name in FRONT_END} == {name: getattr(to_lms, name) for name in FRONT_END}
    assert (config["encoder"], config["unit_sec"], stats) == (type(encoder).__name__, 0.5, (-7.1, 4.2))
    x = torch.randn(2, 1, 63, 20)
    assert torch.equal(loaded(x), encoder.eval()(x))


@pytest.mark.parametrize("objective", ["byol", "simclr", "moco", "cola"])
@pytest.mark.parametrize("fixed", [True, False])
def test_whole_runs(tmp_path, objective, fixed):
    """The online encoder, and statistics from the augmentation where the file has no others."""
    learner = make_learner(objective, AudioNTT2020(16, 24), proj_size=4, proj_dim=8)
    torch.nn.init.normal_(learner.encoder.fc[0].bias)  # unlike the target's
    augment = Augment(stats=(-3.0, 2.0) if fixed else None, n_memory=4)
    lms = 2 * torch.randn(6, 16, 24) - 3
    augment(lms)
    content = {"model": learner.state_dict(), "augment": augment.state_dict(), "config": {"n_mels": 16}, "stats": None}
    save_checkpoint(tmp_path / "checkpoint.pt", content)
    encoder, config, stats = read_encoder(tmp_path / "checkpoint.pt")
    assert torch.equal(encoder.fc[0].bias, learner.encoder.fc[0].bias)
    assert config == {"n_mels": 16}
    assert stats == pytest.approx((-3, 2) if fixed else (lms.mean().item(), lms.std().item()), rel=1e-5)
    save_checkpoint(tmp_path / "checkpoint.pt", content | {"stats": (-1.0, 5.0)})
    assert read_encoder(tmp_path / "checkpoint.pt").stats == (-1, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head.weight": torch.ones(2, 2)}, "1 unexpected: head.weight"),
        ({"fc.3.bias": torch.ones(3)}, r"1 of another shape: fc.3.bias \(3,\) instead of \(24,\)"),
        ({"features.5.running_mean": None}, "1 missing: features.5.running_mean"),
        ({"features.8.weight": None, "features.4.weight": None}, r"found 1 convolutions, fc.0.weight \(24, 128\)"),
        ({"features.12.weight": torch.ones(64, 64, 3, 3)}, "found 4 convolutions"),
        ({"fc.0.weight": None}, "fc.0.weight missing"),
        ({"fc.0.weight": torch.ones(24, 100)}, r"not the layers of AudioNTT2020 .* fc.0.weight \(24, 100\)"),
        ({"features.0.weight": None}, r"no weights of an encoder \(features.N.\*, fc.N.\*\) among 24 tensors"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path, change, words):
    state = {name: x for name, x in (layout(3, 16, (24, 24)) | change).items() if x is not None}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words) as error:
        read_encoder(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in str(error.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"config": {"n_mels": 80}}, "config: n_mels 80 contradicts weights for 16 mels"),
        ({"config": {"n_mels": "16"}}, "config: n_mels '16' contradicts"),
        ({"stats": [1.0]}, r"stats: expected \(mean, std\), got \[1.0\]"),
        ({"stats": "no"}, "stats: expected"),
    ],
)
def test_contradictions_are_named(tmp_path, more, words):
    save_checkpoint(tmp_path / "a.pt", {"state_dict": layout(3, 16, (24, 24))} | more)
    with pytest.raises(CheckpointError, match=words):
        read_encoder(tmp_path / "a.pt")


@pytest.mark.parametrize("order", [("target", "online"), ("online", "target")])
def test_of_two_networks_the_target_is_not_taken(tmp_path, order):
    states = {name: layout(3, 16, (24, 24)) for name in order}
    content = {f"{name}.encoder.{key}": x for name in order for key, x in states[name].items()}
    torch.save(content, tmp_path / "a.pth")
    assert torch.equal(read_encoder(tmp_path / "a.pth").encoder.fc[0].bias, states["online"]["fc.0.bias"])
