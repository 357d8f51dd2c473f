"""AudioNTT2020: size, names, arithmetic, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from byola_fast import AudioNTT2020

# name: shape, as published weights have them for d = 512
LAYOUT = {
    f"features.{4 * block + layer}.{name}": shape
    for block in range(3)
    for layer, name, shape in (
        (0, "weight", (64, 64 if block else 1, 3, 3)),
        (0, "bias", (64,)),
        *((1, name, (64,)) for name in ("weight", "bias", "running_mean", "running_var")),
        (1, "num_batches_tracked", ()),
    )
} | {"fc.0.weight": (512, 512), "fc.0.bias": (512,), "fc.3.weight": (512, 512), "fc.3.bias": (512,)}


def forward_by_hand(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Frames and embedding in evaluation mode, from the weights alone, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    y = x.double()
    for block in (0, 4, 8):
        y = F.conv2d(y, state[f"features.{block}.weight"], state[f"features.{block}.bias"], padding=1)
        norm = {n: state[f"features.{block + 1}.{n}"][None, :, None, None] for n in ("weight", "bias")}
        mean, var = (state[f"features.{block + 1}.running_{n}"][None, :, None, None] for n in ("mean", "var"))
        y = ((y - mean) / (var + 1e-5).sqrt() * norm["weight"] + norm["bias"]).clamp_min(0)
        y = F.max_pool2d(y, 2)
    batch, channels, mels, frames = y.shape
    rows = torch.empty(batch, frames, mels * channels, dtype=torch.float64)
    for mel in range(mels):
        for channel in range(channels):
            rows[:, :, mel * channels + channel] = y[:, channel, mel]
    hidden = (rows @ state["fc.0.weight"].T + state["fc.0.bias"]).clamp_min(0)
    out = (hidden @ state["fc.3.weight"].T + state["fc.3.bias"]).clamp_min(0)
    return out, out.max(1).values + out.sum(1) / frames


@pytest.mark.parametrize(("d", "parameters"), [(512, 600_192), (1024, 1_649_792), (2048, 5_321_856)])
def test_number_of_parameters(d, parameters):
    encoder = AudioNTT2020(d=d)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert encoder.feature_d == d


def test_names_and_shapes_are_those_of_published_weights():
    encoder = AudioNTT2020()
    assert {name: tuple(x.shape) for name, x in encoder.state_dict().items()} == LAYOUT
    state = {name: torch.rand(shape) if shape else torch.tensor(7) for name, shape in LAYOUT.items()}
    encoder.load_state_dict(state, strict=True)
    assert torch.equal(encoder.fc[3].weight, state["fc.3.weight"])


@pytest.mark.parametrize("frames", [8, 29, 96])
def test_forward_by_hand(frames):
    encoder = AudioNTT2020(n_mels=24, d=40).eval()
    for norm in (encoder.features[1], encoder.features[5], encoder.features[9]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 1, 24, frames)
    wanted_frames, wanted = forward_by_hand(encoder.state_dict(), x)
    assert wanted.abs().max() > 0.05
    assert_close(encoder.forward_frames(x).detach(), wanted_frames, factor=10)
    assert_close(encoder(x).detach(), wanted, factor=10)


def test_dropout_and_batch_norm_follow_the_mode():
    encoder, x = AudioNTT2020(n_mels=16, d=64), torch.randn(4, 1, 16, 24)
    before = encoder.features[1].running_mean.clone()
    assert not torch.equal(encoder(x), encoder(x))
    assert not torch.equal(encoder.features[1].running_mean, before)
    encoder.eval()
    before = encoder.features[1].running_mean.clone()
    assert torch.equal(encoder(x), encoder(x))
    assert torch.equal(encoder.features[1].running_mean, before)
    assert encoder.fc[2].p == 0.3


def test_gradient_reaches_every_parameter():
    encoder = AudioNTT2020(n_mels=16, d=32)
    encoder(torch.randn(4, 1, 16, 24)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert all(encoder.get_parameter(name).grad.abs().sum() > 0 for name in ("features.0.weight", "fc.3.weight"))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, 1, 64, 7), ValueError, "at least 8 frames, got 7"),
        (torch.zeros(2, 1, 80, 96), ValueError, r"\(B, 1, 64, T\), got \(2, 1, 80, 96\)"),
        (torch.zeros(2, 64, 96), ValueError, "expected shape"),
        (torch.zeros(2, 2, 64, 96), ValueError, "expected shape"),
        (torch.zeros(2, 1, 64, 96, dtype=torch.int32), TypeError, "floating-point"),
    ],
)
def test_refused_inputs(x, error, words):
    with pytest.raises(error, match=words):
        AudioNTT2020(d=8)(x)


@pytest.mark.parametrize("n_mels", [0, 4, 60])
def test_refused_mels(n_mels):
    with pytest.raises(ValueError, match=f"n_mels: expected a multiple of 8, got {n_mels}"):
        AudioNTT2020(n_mels=n_mels)


def test_empty_batch():
    assert AudioNTT2020(d=8).eval()(torch.zeros(0, 1, 64, 16)).shape == (0, 8)
