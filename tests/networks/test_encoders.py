"""Both encoders: size, names, arithmetic, refused input."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from torch import Tensor

from byola_fast import AudioNTT2020, AudioNTT2022, make_encoder
from byola_fast.networks.encoders import AudioNTT

ENCODERS = [AudioNTT2020, AudioNTT2022]


def layout(blocks: int, first: tuple[int, int], last: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Name: shape, as published weights have them; first and last are the shapes of the linear weights."""
    convolutions = {
        f"features.{4 * block + layer}.{name}": shape
        for block in range(blocks)
        for layer, name, shape in (
            (0, "weight", (64, 64 if block else 1, 3, 3)),
            (0, "bias", (64,)),
            *((1, name, (64,)) for name in ("weight", "bias", "running_mean", "running_var")),
            (1, "num_batches_tracked", ()),
        )
    }
    return convolutions | {"fc.0.weight": first, "fc.0.bias": first[:1], "fc.3.weight": last, "fc.3.bias": last[:1]}


LAYOUTS = [
    (AudioNTT2020(), layout(3, (512, 512), (512, 512))),
    (AudioNTT2022(), layout(2, (2048, 1024), (2048, 2048))),
]


def forward_by_hand(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Frames and embedding in evaluation mode, from the weights alone, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    y = x.double()
    is_2020 = "features.8.weight" in state
    for block in (0, 4, 8) if is_2020 else (0, 4):
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
    if not is_2020:
        out = torch.cat([rows, out], dim=2)
    return out, out.max(1).values + out.sum(1) / frames


@pytest.mark.parametrize(
    ("encoder", "parameters"),
    [
        (lambda: AudioNTT2020(d=512), 600_192),
        (lambda: AudioNTT2020(d=1024), 1_649_792),
        (lambda: AudioNTT2020(d=2048), 5_321_856),
        (lambda: AudioNTT2022(), 6_333_376),
    ],
)
def test_number_of_parameters(encoder, parameters):
    assert sum(p.numel() for p in encoder().parameters()) == parameters


@pytest.mark.parametrize(("encoder", "wanted"), LAYOUTS)
def test_names_and_shapes_are_those_of_published_weights(encoder, wanted):
    assert {name: tuple(x.shape) for name, x in encoder.state_dict().items()} == wanted
    state = {name: torch.rand(shape) if shape else torch.tensor(7) for name, shape in wanted.items()}
    encoder.load_state_dict(state, strict=True)
    assert torch.equal(encoder.fc[3].weight, state["fc.3.weight"])


@pytest.mark.parametrize(("n_mels", "frames"), [(24, 8), (24, 29), (63, 97), (17, 96)])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_forward_by_hand(encoder, n_mels, frames):
    width = 64 * (n_mels // encoder.frame_stride) + 40
    encoder = encoder(n_mels, width).eval()
    for norm in encoder.features:
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 1, n_mels, frames)
    wanted_frames, wanted = forward_by_hand(encoder.state_dict(), x)
    assert wanted.abs().max() > 0.05
    assert wanted_frames.shape == (3, frames // encoder.frame_stride, width)
    assert encoder.feature_d == width
    assert_close(encoder.forward_frames(x).detach(), wanted_frames, factor=10)
    assert_close(encoder(x).detach(), wanted, factor=10)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_channels_last_and_bfloat16_change_rounding_alone(encoder):
    encoder, x = encoder().eval(), torch.randn(2, 1, 64, 40)
    wanted = encoder(x).detach()
    assert_close(encoder.to(memory_format=torch.channels_last)(x).detach(), wanted.double(), factor=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.cosine_similarity(encoder(x).float(), wanted).min() > 0.999


def test_make_encoder():
    assert isinstance(make_encoder("AudioNTT2020", feature_d=16), AudioNTT2020)
    assert make_encoder("AudioNTT2020", feature_d=16).feature_d == 16
    assert make_encoder("AudioNTT2022", n_mels=16, feature_d=300).n_mels == 16
    with pytest.raises(
        ValueError,
        match=r"encoder: expected one of .* or 'package\.module:Class', got 'VGG'",
    ):
        make_encoder("VGG")


def small(encoder: type[AudioNTT]) -> AudioNTT:
    return encoder(16, 300)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_dropout_and_batch_norm_follow_the_mode(encoder):
    encoder, x = small(encoder), torch.randn(4, 1, 16, 24)
    before = encoder.features[1].running_mean.clone()
    assert not torch.equal(encoder(x), encoder(x))
    assert not torch.equal(encoder.features[1].running_mean, before)
    encoder.eval()
    before = encoder.features[1].running_mean.clone()
    assert torch.equal(encoder(x), encoder(x))
    assert torch.equal(encoder.features[1].running_mean, before)
    assert encoder.fc[2].p == 0.3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradient_reaches_every_parameter(encoder):
    encoder = small(encoder)
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


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AudioNTT2020(n_mels=7), "n_mels: expected at least 8, got 7"),
        (lambda: AudioNTT2020(d=0), "d: expected at least 1, got 0"),
        (lambda: AudioNTT2022(n_mels=3), "n_mels: expected at least 4, got 3"),
        (lambda: AudioNTT2022(d=512), "more than the 1024 local features that 64 mels make .* got 512"),
        (lambda: AudioNTT2022(d=1024), "got 1024; AudioNTT2020 takes any width"),
        (lambda: AudioNTT2022(hidden_d=0), "hidden_d: expected at least 1"),
    ],
)
def test_refused_sizes(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_empty_batch(encoder):
    assert small(encoder).eval()(torch.zeros(0, 1, 16, 16)).shape == (0, 300)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", ENCODERS)
def test_the_plain_path_equals_the_layers_in_their_order_bit_for_bit(make, channels_last, monkeypatch):
    monkeypatch.setattr("byola_fast.ops._route.PLAIN", True)
    encoder = make(n_mels=16, d=520)
    if channels_last:
        encoder.to(memory_format=torch.channels_last)
    x = torch.randn(3, 1, 16, 19).round(decimals=1)  # ties within the maximum's window
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    twin = copy.deepcopy(encoder)
    weight = torch.randn(3, 19 // encoder.frame_stride, encoder.local_d)
    (encoder._local(x) * weight).sum().backward()
    in_order = twin.features(x).permute(0, 3, 2, 1).flatten(2)
    (in_order * weight).sum().backward()
    assert torch.equal(encoder._local(x), in_order)
    for (name, ours), other in zip(encoder.features.named_parameters(), twin.features.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad), name


class _Twice(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(features, how):
    """Change a block so that its layers must be called; return the calls that a hook saw."""
    seen = []
    if how == "hook":
        features[1].register_forward_hook(lambda module, given, y: seen.append(y.shape))
    elif how == "pooled":
        features[3].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    elif how == "sync":
        features[1] = torch.nn.SyncBatchNorm.convert_sync_batchnorm(features[1]).eval()
    elif how == "subclass":
        features[4].__class__ = _Twice
    elif how == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(features[4])
    elif how == "dilated":
        features[4].dilation = features[4].padding = (2, 2)
    elif how == "no affine":
        features[5] = torch.nn.BatchNorm2d(64, affine=False).to(features[5].weight.device)
    return seen


@pytest.mark.parametrize("how", ["hook", "pooled", "sync", "subclass", "parametrised", "dilated", "no affine"])
def test_hooks_and_replaced_layers_are_called(how, device):
    encoder = small(AudioNTT2020).to(device).eval()
    seen = replaced(encoder.features, how)
    x = torch.randn(3, 1, 16, 24, device=device)
    wanted = encoder.features(x).permute(0, 3, 2, 1).flatten(2)
    before = len(seen)
    torch.testing.assert_close(encoder._local(x), wanted, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2 * before


def test_global_hooks_are_called(device):
    encoder, seen = small(AudioNTT2020).to(device), []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, given, y: seen.append(type(module))):
        encoder(torch.randn(3, 1, 16, 24, device=device))
    assert seen.count(torch.nn.Conv2d) == seen.count(torch.nn.MaxPool2d) == 3


@pytest.mark.parametrize("make", ENCODERS)
def test_a_training_step_equals_the_layers(make, device):
    """The blocks are kernels of ours: within rounding the layers, gradients and running statistics too."""
    encoder = make(n_mels=16, d=520).to(device).double()
    twin = copy.deepcopy(encoder)
    x = torch.randn(3, 1, 16, 19, dtype=torch.float64, device=device)
    ours, wanted = encoder._local(x), twin.features(x).permute(0, 3, 2, 1).flatten(2)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(wanted)
    (ours * weight).sum().backward()
    (wanted * weight).sum().backward()
    for (name, a), b in zip(encoder.features.named_parameters(), twin.features.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, a), b in zip(encoder.features.named_buffers(), twin.features.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_compiles_without_graph_breaks(training, device):
    torch._dynamo.reset()
    encoder = small(AudioNTT2020).to(device).train(training)
    twin, x = copy.deepcopy(encoder), torch.randn(3, 1, 16, 24, device=device)
    got = torch.compile(encoder._local, fullgraph=True)(x)
    torch.testing.assert_close(got, twin._local(x), rtol=1e-4, atol=1e-4)
    for a, b in zip(encoder.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.compile(encoder._local, fullgraph=True)(x).dtype == torch.bfloat16


def test_a_chosen_reference_is_the_plain_path(monkeypatch, device):
    monkeypatch.setattr("byola_fast.ops._route.PLAIN", True)
    encoder, x = small(AudioNTT2020).to(device), torch.randn(3, 1, 16, 19, device=device)
    twin = copy.deepcopy(encoder)
    assert torch.equal(encoder._local(x), twin.features(x).permute(0, 3, 2, 1).flatten(2))
