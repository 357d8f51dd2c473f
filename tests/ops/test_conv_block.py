"""conv_block against float64 autograd of PyTorch's layers: the op itself, and the public function around it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from byola_fast import ops
from byola_fast.ops._dispatch import backend_in_use

OPS = torch.ops.byola_fast
EPS = 1e-5
NAMES = ("x", "weight", "bias", "gamma", "beta")
# dtype: of the norm of a result. float32 and half: sums of a thousand products; with more input channels the
# convolution's output is rounded, so that single maxima flip and move gradients
BOUNDS = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FLIPS = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 0.15, torch.bfloat16: 0.4}
SHAPES = [(3, 9, 11), (1, 2, 2), (2, 16, 24)]


def draw(inputs, channels, shape, dtype, device, shift=0.0):
    """Return x, weight, bias, gamma (one 0, some negative), beta."""
    batch, rows, columns = shape
    x = torch.randn(batch, inputs, rows, columns, dtype=torch.float64) + shift
    weight = torch.randn(channels, inputs, 3, 3, dtype=torch.float64)
    bias, gamma, beta = torch.randn(3, channels, dtype=torch.float64)
    gamma[0] = 0
    return [t.to(device, dtype).requires_grad_() for t in (x, weight, bias, gamma, beta)]


def running(channels, dtype, device):
    mean, variance = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5
    return [t.to(device) for t in (mean, variance, torch.tensor(3))]


def layers(x, weight, bias, gamma, beta, mean, variance, training, eps=EPS):
    y = F.conv2d(x, weight, bias, padding=1)
    y = F.batch_norm(y, mean, variance, gamma, beta, training, 0.1, eps)
    return F.max_pool2d(F.relu(y), 2)


def block(x, weight, bias, gamma, beta, mean, variance, updates, training, eps=EPS):
    """Call the op, on every device and backend, and update the running statistics."""
    known = (None, None) if training else (mean, variance)
    out, _which, _kept, stats = OPS.conv_block(x, weight, bias, gamma, beta, *known, eps, x.dtype)
    if training:
        OPS.batch_norm_running_(mean, variance, updates, stats, x.numel() // x.shape[1], 0.1)
    return out


def assert_near(got, expected, bound):
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.shape == expected.shape
    assert (got - expected).norm() <= bound * expected.norm().clamp_min(1)


def widened(tensors):
    return [t.detach().cpu().double().clone().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("inputs", "channels"), [(1, 6), (1, 70), (5, 70), (17, 16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_layers(inputs, channels, shape, training, dtype, device):
    if shape == (1, 2, 2) and inputs > 1 and dtype in (torch.float16, torch.bfloat16):
        shape = (1, 2, 3)  # four values of a channel: rounding of the convolution is much of their spread
    leaves = draw(inputs, channels, shape, dtype, device)
    state = running(channels, torch.float64 if dtype == torch.float64 else torch.float32, device)
    wide, known = widened(leaves), widened(state[:2])
    expected = layers(*wide, *known, training)
    out = block(*leaves, *state, training)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_near(out, expected, BOUNDS[dtype])
    grad = torch.randn(expected.shape).to(dtype)
    bound = (BOUNDS if inputs == 1 else FLIPS)[dtype]
    got = torch.autograd.grad(out, leaves, grad.to(device))
    for name, a, e in zip(NAMES, got, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert a.dtype == dtype, name
        assert_near(a, e, bound)
    if training:
        assert torch.equal(got[2], torch.zeros_like(got[2]))  # a gradient that is there, for hooks that wait for it
        assert state[2] == 4
    for a, e in zip(state[:2], known, strict=True):
        assert_near(a, e, max(BOUNDS[dtype], 1e-3 if inputs > 1 and dtype != torch.float64 else 0))


@pytest.mark.parametrize("inputs", [1, 3])
def test_the_input_needs_no_gradient(inputs, device):
    x, *leaves = draw(inputs, 6, (3, 9, 11), torch.float64, device)
    state = running(6, torch.float64, device)
    wide = widened(leaves)
    expected = layers(x.detach().cpu(), *wide, None, None, True)
    out = block(x.detach(), *leaves, *state, True)
    grad = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(out, leaves, grad.to(device)), torch.autograd.grad(expected, wide, grad), strict=True
    ):
        assert_near(a, e, 1e-11)


@pytest.mark.parametrize("inputs", [1, 3])
def test_nothing_is_kept_for_no_backward_pass(inputs, device):
    leaves = [t.detach() for t in draw(inputs, 6, (3, 9, 11), torch.float32, device)]
    wanted, *_ = OPS.conv_block(*leaves, None, None, EPS, torch.float32)
    out, which, kept, _stats = OPS.conv_block(*leaves, None, None, EPS, torch.float32, False)
    assert torch.equal(out, wanted)
    assert which.numel() == kept.numel() == 0


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inputs", [1, 2])
def test_gradcheck(inputs, training, device):
    leaves = draw(inputs, 3, (2, 5, 6), torch.float64, device)
    with torch.no_grad():
        leaves[3][0] = -0.5  # at 0 all values of a window tie
    state = running(3, torch.float64, device)
    known = [None, None] if training else [t.double().requires_grad_() for t in state[:2]]
    assert torch.autograd.gradcheck(lambda *a: OPS.conv_block(*a, EPS, torch.float64)[0], (*leaves, *known))


@pytest.mark.parametrize("inputs", [1, 3])
def test_a_large_mean_costs_no_digits(inputs, device):
    """An input whose mean is a thousand spreads: float32 holds it to 6e-5 of a spread."""
    leaves = draw(inputs, 6, (3, 9, 11), torch.float32, device, shift=1000.0)
    with torch.no_grad():
        leaves[1] -= leaves[1].mean((2, 3), keepdim=True)  # else borders, where zeros meet the mean, spread the most
    wide = widened(leaves)
    expected = layers(*wide, None, None, True)
    out = block(*leaves, *running(6, torch.float32, device), True)
    bound = 1e-5 if inputs == 1 else 1e-3
    assert_near(out, expected, bound)
    grad = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad(y, t, grad.to(y)) for y, t in ((out, leaves), (expected, wide)))
    for a, e in zip(got[3:], wanted[3:], strict=True):
        assert_near(a, e, 10 * bound)


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("gamma", [0.0, -1.0, 2.0])
def test_ties_go_to_the_first(inputs, gamma, device):
    # 6 x 6, because C++ convolves 8 x 8 of many channels by F(4 x 4), whose rounding leaves no ties
    x, weight, bias, gammas, beta = draw(inputs, 6, (3, 6, 6), torch.float64, device)
    with torch.no_grad():
        x.copy_(x.round().clamp(-1, 1))
        for whole in (weight, bias):
            whole.copy_(whole.round())
        gammas.fill_(gamma)
        beta.fill_(0.5)
    leaves, eps = [x, weight, bias, gammas, beta], 2.0**-10
    wide = widened(leaves)
    state = [torch.zeros(6), torch.full((6,), 1 - eps), torch.tensor(0)]  # a standard deviation of 1: all is exact
    expected = layers(*wide, *(t.double() for t in state[:2]), False, eps)
    out = block(*leaves, *(t.to(device) for t in state), False, eps)
    grad = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad(y, t[0], grad.to(y)) for y, t in ((out, leaves), (expected, wide)))
    assert_near(got[0], wanted[0], 1e-11)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inputs", [1, 3])
def test_special_values_pass_as_in_the_layers(inputs, training, value, device):
    leaves = draw(inputs, 6, (3, 8, 10), torch.float32, device)
    with torch.no_grad():
        leaves[0][1, 0, 3, 4] = value
    state = running(6, torch.float32, device)
    expected = layers(*(t.detach().cpu() for t in leaves), *(t.cpu().clone() for t in state[:2]), training)
    out = block(*leaves, *state, training).detach().cpu()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("inputs", [1, 3])
def test_any_strides(inputs, device):
    x, *leaves = draw(inputs, 6, (3, 9, 11), torch.float64, device)
    state = running(6, torch.float64, device)
    weight = leaves[0].detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    turned = x.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).requires_grad_()
    expected, got = (block(a, b, *leaves[1:], *state, False) for a, b in ((x, leaves[0]), (turned, weight)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(expected.shape, dtype=torch.float64, device=device)
    for way in (grad, grad.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), grad[:1, :1, :1, :1].expand_as(grad)):
        wanted = torch.autograd.grad(expected, (x, leaves[0]), way, retain_graph=True)
        for a, e in zip(torch.autograd.grad(got, (turned, weight), way, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("inputs", [1, 3])
def test_the_same_bits_again(inputs, device):
    leaves = draw(inputs, 6, (3, 9, 11), torch.float32, device)
    first, second = (block(*leaves, *running(6, torch.float32, device), True) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (torch.autograd.grad(y.square().sum(), leaves) for y in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("inputs", [1, 16])
def test_float32_moves_gradients_only_where_a_maximum_flips(inputs, device):
    """A flip among 10^7 windows is 3e-4 of the weights' gradient; with the maxima of float64, 2e-6 is kept."""
    x, weight, bias, gamma, beta = (t.detach() for t in draw(inputs, 32, (8, 64, 96), torch.float32, device))
    wide = [t.double() for t in (x, weight, bias, gamma, beta)]
    out, which, kept, stats = OPS.conv_block(x, weight, bias, gamma, beta, None, None, EPS, torch.float32)
    exact = OPS.conv_block(*wide, None, None, EPS, torch.float64)
    z = F.batch_norm(F.conv2d(wide[0], wide[1], padding=1), None, None, wide[3], wide[4], True)
    windows = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
    windows = torch.cat([windows, torch.zeros_like(windows[..., :1])], 4)  # 4: clipped, at 0
    taken = windows.gather(4, which.long()[..., None])[..., 0]
    assert (windows.amax(4) - taken).max() < 1e-5
    grad = torch.randn_like(out)
    wanted = OPS.conv_block_backward(grad.double(), wide[0], wide[1], wide[3], *exact[1:], False, True)
    got = OPS.conv_block_backward(grad, x, weight, gamma, exact[1], kept, stats, False, True)
    is_ours = backend_in_use(device.type.upper(), "conv_block")[0] == "cpp"  # else PyTorch's convolution rounds more
    for a, e in zip(got, wanted, strict=True):
        assert_near(a, e, BOUNDS[torch.float32] if is_ours else FLIPS[torch.float32])


def test_second_derivative_says_no(device):
    leaves = draw(1, 3, (2, 4, 4), torch.float64, device)
    (grad,) = torch.autograd.grad(
        block(*leaves, *running(3, torch.float64, device), True).sum(), leaves[1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


# the public function


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("inputs", [1, 3])
def test_the_function_equals_batch_norm(inputs, momentum, device):
    x, weight, bias, gamma, beta = draw(inputs, 6, (3, 9, 11), torch.float32, device)
    norm = nn.BatchNorm2d(6, momentum=momentum).to(device)
    with torch.no_grad():
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)
    state = [t.clone() for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    for training in (True, True, False):
        norm.train(training)
        expected = F.max_pool2d(F.relu(norm(F.conv2d(x, weight, bias, padding=1))), 2)
        out = ops.conv_block(x, weight, bias, gamma, beta, *state, training=training, momentum=momentum)
        assert_near(out, expected, BOUNDS[torch.float32])
    for a, e in zip(state, norm.buffers(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_without_running_statistics_or_bias(device):
    x, weight, _bias, gamma, beta = draw(1, 6, (3, 9, 11), torch.float32, device)
    expected = layers(x, weight, None, gamma, beta, None, None, True)
    for training in (True, False):
        out = ops.conv_block(x, weight, None, gamma, beta, training=training)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [1, 3])
def test_autocast(inputs, device):
    x, *leaves = draw(inputs, 6, (3, 9, 11), torch.float32, device)
    expected = layers(x, *leaves, None, None, True)
    with torch.autocast(device.type, torch.bfloat16):
        out = ops.conv_block(x, *leaves, training=True)
        wide = ops.conv_block(x.double(), *(t.double() for t in leaves), training=True)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    assert_near(out, expected, BOUNDS[torch.bfloat16])
    torch.autograd.grad(out.float().sum(), [x, *leaves])


def test_refused_and_empty(device):
    x, weight, bias, gamma, beta = draw(1, 6, (3, 9, 11), torch.float32, device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.conv_block(x[:1, :, :1, :1], weight, bias, gamma, beta, training=True)
    with pytest.raises(ValueError, match="gamma"):
        ops.conv_block(x, weight, bias, gamma[:5], beta, training=True)
    with pytest.raises(RuntimeError, match=r"too small"):
        ops.conv_block(x[:, :, :1], weight, bias, gamma, beta, training=True)
    state = running(6, torch.float32, device)
    assert ops.conv_block(x[:0], weight, bias, gamma, beta, *state, training=False).shape == (0, 6, 4, 5)
