"""``ema_update_`` against its formula, rounding by rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.layouts import threads
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import ops
from byola_fast.ops import reference

PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]


def one_by_one(target, online, decay):
    """The formula with its roundings in numpy, which fuses nothing."""
    kind = np.float64 if target.dtype == torch.float64 else np.float32
    t, o = target.cpu().numpy(), online.to(target.dtype).cpu().numpy()
    weight = kind(1 - np.float64(decay))
    step = o - t
    return torch.from_numpy(np.asarray(t + weight * step if weight < 0.5 else o - (kind(1) - weight) * step))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.99, 0.9996, 1.0])
@pytest.mark.parametrize(("target_dtype", "online_dtype"), PAIRS)
def test_every_rounding(target_dtype, online_dtype, decay, device):
    shapes = [(), (1,), (7,), (64, 33), (3, 5, 7), (0,), (1031,)]
    online = [torch.randn(s, device=device).to(online_dtype) for s in shapes]
    for wrap in (float, lambda d: torch.tensor(d, dtype=torch.float64, device=device)):
        target = [torch.randn(s, dtype=target_dtype, device=device) for s in shapes]
        expected = [one_by_one(t, o, decay) for t, o in zip(target, online, strict=True)]
        kept = [o.clone() for o in online]
        ops.ema_update_(target, online, wrap(decay))
        for t, e in zip(target, expected, strict=True):
            assert torch.equal(t.cpu(), e.reshape(t.shape))
        assert all(torch.equal(o, k) for o, k in zip(online, kept, strict=True))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_mix_of_shapes_strides_and_alignments(data):
    target, online, expected = [], [], []
    decay = data.draw(st.floats(0, 1))
    for _ in range(data.draw(st.integers(0, 6))):
        shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
        offset, stride = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))

        def tensor(shape=shape, offset=offset, stride=stride):
            wide = torch.randn([n * stride + offset for n in shape])
            return wide[tuple(slice(offset, None, stride) for _ in shape)] if shape else wide

        t, o = tensor(), data.draw(st.sampled_from([tensor(), tensor().contiguous()]))
        if len(shape) == 2 and data.draw(st.booleans()):
            o = o.t().contiguous().t()
        target.append(t)
        online.append(o)
        expected.append(one_by_one(t, o, decay))
    ops.ema_update_(target, online, decay)
    for t, e in zip(target, expected, strict=True):
        assert torch.equal(t, e.reshape(t.shape))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("decay", [0.25, 0.996])
def test_large_and_tiny_tensors_on_threads(decay, count, device):
    shapes = [(300_001,), (3,), (), (70_000, 3), *[(13,)] * 500, (0,), (65_536,)]
    target, online = [[torch.randn(s, device=device) for s in shapes] for _ in range(2)]
    expected = [one_by_one(t, o, decay) for t, o in zip(target, online, strict=True)]
    with threads(count):
        ops.ema_update_(target, online, decay)
    for t, e in zip(target, expected, strict=True):
        assert torch.equal(t.cpu(), e.reshape(t.shape))


def plain(x):
    return x


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x):
    return x.transpose(1, 3).contiguous().transpose(1, 3)


def with_gaps(x):
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("of_online", [plain, channels_last, transposed, with_gaps])
@pytest.mark.parametrize("of_target", [plain, channels_last, transposed, with_gaps])
@pytest.mark.parametrize(("target_dtype", "online_dtype"), PAIRS)
def test_memory_formats(target_dtype, online_dtype, of_target, of_online, device):
    target = of_target(torch.randn(5, 3, 4, 7, dtype=target_dtype, device=device))
    online = of_online(torch.randn(5, 3, 4, 7, device=device).to(online_dtype))
    strides, expected = target.stride(), one_by_one(target, online, 0.9)
    ops.ema_update_([target], [online], 0.9)
    assert target.stride() == strides
    assert torch.equal(target.cpu(), expected)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_nan_inf_and_denormals_match_the_reference(decay, device):
    values = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan], device=device)
    target, online = (x.reshape(-1).contiguous() for x in torch.meshgrid(values, values, indexing="ij"))
    wanted, weight = target.clone(), torch.tensor(decay, device=device)
    reference.ema_update__reference([wanted], [online], weight)
    ops.ema_update_([target], [online], decay if decay != 0.9 else weight)
    assert torch.equal(target.isnan(), wanted.isnan())
    kept = ~wanted.isnan()
    assert torch.equal(target[kept], wanted[kept])
    assert torch.equal(target[kept].signbit(), wanted[kept].signbit())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decay_of_any_float_dtype(dtype, device):
    decay = torch.tensor(0.99, dtype=dtype)
    target, online = torch.randn(33, device=device), torch.randn(33, device=device)
    expected = one_by_one(target, online, float(decay))
    ops.ema_update_([target], [online], decay)
    assert torch.equal(target.cpu(), expected)


def test_close_to_the_formula_and_a_fixed_point(device):
    t, o = torch.randn(999, device=device), torch.randn(999, device=device)
    wanted = 0.99 * t.double() + 0.01 * o.double()
    ops.ema_update_([t], [o], 0.99)
    assert_close(t, wanted)
    same = t.clone()
    ops.ema_update_([t], [same], 0.123)
    assert torch.equal(t, same)


def test_a_float32_target_moves_by_steps_too_small_for_bfloat16(device):
    target, online = torch.ones(5, device=device), torch.full((5,), 1.0078125, dtype=torch.bfloat16, device=device)
    for _ in range(500):
        ops.ema_update_([target], [online], 0.999)
    assert (target > 1.003).all()


def test_parameters_that_require_gradients_can_be_targets(device):
    target = torch.nn.Parameter(torch.zeros(3, device=device))
    ops.ema_update_([target], [torch.nn.Parameter(torch.ones(3, device=device))], 0.5)
    assert target.tolist() == [0.5] * 3
    assert target.grad_fn is None


def test_no_tensors_at_all(device):
    ops.ema_update_([], [], 0.5)
    ops.ema_update_([], [], torch.tensor(0.5, device=device))
    ops.ema_update_((torch.zeros(0, 3, device=device),), (torch.zeros(0, 3, device=device),), 0.5)


def test_backward_raises_if_a_saved_target_was_updated(device):
    target, x = torch.ones(3, device=device), torch.ones(3, device=device, requires_grad=True)
    y = (target * x).sum()
    ops.ema_update_([target], [torch.zeros(3, device=device)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_tensors(device):
    with torch.inference_mode():
        target = torch.zeros(3, device=device)
        ops.ema_update_([target], [torch.ones(3, device=device)], 0.5)
        assert target.tolist() == [0.5] * 3


def test_inside_a_compiled_graph(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(target, online, decay):
        ops.ema_update_([target], [online], decay)
        return 2 * target

    target, online = torch.zeros(3, device=device), torch.ones(3, device=device)
    assert step(target, online, torch.tensor(0.75, device=device)).tolist() == [0.5] * 3
    assert target.tolist() == [0.25] * 3
    with pytest.raises(Exception, match=r"online\[0\]: expected shape \(3,\)"):
        step(target, torch.ones(4, device=device), torch.tensor(0.75, device=device))
