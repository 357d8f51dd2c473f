"""ema_update_ against its formula, rounding by rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from byola_fast import ops

PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]


def one_by_one(target, online, decay):
    """The stated roundings in numpy, which fuses nothing."""
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


def test_close_to_the_formula_and_a_fixed_point(device):
    t, o = torch.randn(999, device=device), torch.randn(999, device=device)
    wanted = 0.99 * t.double() + 0.01 * o.double()
    ops.ema_update_([t], [o], 0.99)
    assert_close(t, wanted)
    same = t.clone()
    ops.ema_update_([t], [same], 0.123)
    assert torch.equal(t, same)


def test_a_float32_target_moves_where_bfloat16_would_stay(device):
    target, online = torch.ones(5, device=device), torch.full((5,), 1.0078125, dtype=torch.bfloat16, device=device)
    for _ in range(500):
        ops.ema_update_([target], [online], 0.999)
    assert (target > 1.003).all()


def test_parameters_that_require_gradients_can_be_targets(device):
    target = torch.nn.Parameter(torch.zeros(3, device=device))
    ops.ema_update_([target], [torch.nn.Parameter(torch.ones(3, device=device))], 0.5)
    assert target.tolist() == [0.5] * 3
    assert target.grad_fn is None


@pytest.mark.parametrize(
    ("target", "online", "decay", "error", "words"),
    [
        ([torch.zeros(2)], [], 0.5, ValueError, "as many tensors as in target"),
        ([torch.zeros(2)], [torch.zeros(3)], 0.5, ValueError, r"online\[0\]: expected shape \(2,\), got \(3,\)"),
        ([torch.zeros(2)], [torch.zeros(2).double()], 0.5, TypeError, r"online\[0\]: expected torch.float32"),
        ([torch.zeros(2).half()], [torch.zeros(2).half()], 0.5, TypeError, "half would never move"),
        ([torch.zeros(2).long()], [torch.zeros(2).long()], 0.5, TypeError, "floating-point"),
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, ValueError, r"decay: expected a number in \[0, 1\], got 1.5"),
        ([torch.zeros(2)], [torch.zeros(2)], float("nan"), ValueError, "decay"),
        ([torch.zeros(2)], [torch.zeros(2)], torch.zeros(2), ValueError, "decay"),
        ([[0.0]], [torch.zeros(1)], 0.5, TypeError, r"target\[0\]: expected a torch.Tensor, got list"),
    ],
)
def test_bad_input(target, online, decay, error, words):
    with pytest.raises(error, match=words):
        ops.ema_update_(target, online, decay)
