"""Calls that one C++ op serves, against the same calls op by op: views, state, random numbers and messages."""

from __future__ import annotations

import copy

import pytest
import torch

import byola_fast
from byola_fast import Augment, augment
from byola_fast.ops import _triton
from byola_fast.spectrograms.statistics import RunningStats
from byola_fast.views import augment as augment_module

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="under the interpreter, Triton serves the CPU")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SETTINGS = [
    {},
    {"preset": "byola-v2", "interpolation": "bicubic"},
    {"mixup": "linear", "size": (7, 30)},
    {"mixup": "gaussian", "mixup_ratio": 0.3, "fader_gain": 0.5},
    {"mixup": "none", "freq_scale": (0.2, 0.9), "time_scale": (1, 1), "virtual_crop_scale": (1.2, 1.0)},
]


@pytest.fixture(autouse=True)
def loaded():
    byola_fast.doctor()


@pytest.fixture
def op_by_op(monkeypatch):
    """Call a function so that no call is made at once; count those that are made at once before."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(augment_module, "has_cpu_op", lambda x: False)
            return function()

    return run


@pytest.fixture
def served(monkeypatch):
    """The views of calls that were made at once; None for one that was not."""
    found = []
    for name in ("augment_at_once", "call_at_once"):
        call = getattr(augment_module, name)
        monkeypatch.setattr(augment_module, name, lambda *args, call=call: found.append(call(*args)) or found[-1])
    return found


def close(views, expected, dtype):
    for view, wanted in zip(views, expected, strict=True):
        assert view.dtype == dtype
        assert view.shape == wanted.shape
        torch.testing.assert_close(view.float(), wanted.float(), rtol=ROUNDING[dtype], atol=4 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("stats", [None, (-1.0, 2.0), torch.tensor([0.5, 3.0], dtype=torch.float64)])
def test_augment(op_by_op, served, dtype, settings, stats):
    for shape in ((5, 13, 21), (3, 1, 16, 24), (1, 9, 10)):
        x = (2 * torch.randn(shape) - 1).to(dtype)
        for rest in ({"seed": 5, "step": 3}, {"post_norm": False}):
            torch.manual_seed(7)
            views, after = augment(x, stats=stats, **settings, **rest), torch.get_rng_state()
            torch.manual_seed(7)
            expected = op_by_op(lambda x=x, rest=rest: augment(x, stats=stats, **settings, **rest))
            assert torch.equal(after, torch.get_rng_state())
            close(views, expected, dtype)
    assert len(served) == 6
    assert None not in served


def test_augment_takes_a_generator_strides_and_out(op_by_op, served):
    x = torch.randn(4, 20, 12).transpose(1, 2)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    out, wanted = torch.empty(2, 4, 12, 20), torch.empty(2, 4, 12, 20)
    version = out._version
    view1, _view2 = augment(x, generator=generators[0], out=out)
    op_by_op(lambda: augment(x, generator=generators[1], out=wanted))
    close(out, wanted, torch.float32)
    assert view1.data_ptr() == out.data_ptr()
    assert out._version > version
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert len(served) == 1
    assert served[0] is not None


@pytest.mark.parametrize("settings", SETTINGS[:4])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"n_memory": 0},
        {"stats": (-1.0, 2.0), "post_norm": False, "bank_dtype": torch.float16},
        {"stats": RunningStats(max_updates=2), "n_memory": 3},
    ],
)
def test_augment_module(op_by_op, served, settings, own):
    """Views, memory, statistics, seed and step, in training and in eval mode."""
    first = Augment(**({"n_memory": 8} | copy.deepcopy(own) | settings), seed=1, shape=(13, 21))
    second = copy.deepcopy(first)
    for number in range(5):
        x = 3 * torch.randn(4, 13, 21) + number
        if number == 2:
            x[1, 0, 0] = torch.nan  # kept out of memory and statistics
        for module in (first, second):
            module.train(number != 3)
        with torch.no_grad():
            views, expected = first(x), op_by_op(lambda x=x: second(x))
        for view, wanted in zip(views, expected, strict=True):
            torch.testing.assert_close(view, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
        states = first.state_dict(), second.state_dict()
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert [views is not None for views in served] == [True] * 5


def test_changed_state_has_a_new_version():
    aug = Augment(seed=1, shape=(8, 8), n_memory=4)
    before = {name: buffer._version for name, buffer in aug.named_buffers()}
    aug(torch.randn(2, 8, 8))
    assert all(buffer._version > before[name] for name, buffer in aug.named_buffers())


def test_settings_that_change_are_noticed():
    aug = Augment(seed=1, shape=(8, 8), stats=(0, 1)).eval()
    x = torch.randn(2, 8, 8)
    before = torch.stack(aug(x))
    aug.settings.mixup_ratio, aug.post_norm = 0.0, False
    assert not torch.equal(torch.stack(aug(x)), before)


def test_what_needs_more_care_goes_op_by_op(served):
    x = torch.randn(2, 8, 8)
    lms = x.clone().requires_grad_()
    torch.stack(augment(lms)).sum().backward()
    assert lms.grad is not None
    augment(x.double())
    augment(x, sample_offset=4)
    augment(x, return_params=True)
    assert served == []
    augment(torch.zeros(0, 8, 8))
    stats = torch.tensor([0.0, 1.0], requires_grad=True)
    torch.stack(augment(x, stats=stats, post_norm=False)).sum().backward()
    assert stats.grad is not None
    assert served == [None, None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"mixup_ratio": 2.0},
        {"preset": "byola-v3"},
        {"seed": -1},
        {"seed": 1.5},
        {"step": 2**32},
        {"stats": (0.0, float("nan"))},
        {"stats": (0.0,)},
        {"freq_scale": [2.0, 1.0]},
        {"size": (0, 4)},
        {"unknown": 3},
        {"out": torch.empty(2, 3)},
        {"virtual_crop_scale": (0.5, 1.0)},
    ],
)
def test_messages_are_the_same(op_by_op, wrong):
    def message():
        with pytest.raises((TypeError, ValueError)) as error:
            augment(torch.randn(2, 8, 8), **wrong)
        return type(error.value), str(error.value)

    assert message() == op_by_op(message)
