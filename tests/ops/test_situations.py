"""Every op gives the same values and gradients in the situations of other people's programs, or an error."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from byola_fast import Augment, augment, ops
from byola_fast.ops import reference
from byola_fast.spectrograms.statistics import batch_stats

RNG = torch.tensor([3, 4])
LAM, INDEX, CROPS, FADER = DRAWN = ops.draw_params(RNG, 3, (8, 12), fader_gain=1.0)
X, Z = torch.randn(3, 8, 12), torch.randn(3, 8, 12)
ROWS, COUNT, STATS = torch.randn(6, 8, 12), torch.tensor(4), torch.tensor([0.5, 2.0])
MEL = (torch.hann_window(8), torch.rand(2, 5) + 0.1)
MEL_67 = (torch.hann_window(67), torch.rand(2, 34) + 0.1)  # n_fft without a fast transform: the reference runs


def pushed(x):
    rows, cursor = torch.zeros_like(ROWS), torch.zeros_like(COUNT).repeat(3)
    ops.bank_push_(rows, cursor, x, STATS)
    return rows


def averaged(x):
    target = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)).detach()]
    ops.ema_update_(target, [x.detach()], 0.75)
    return target[0]


def in_place(x):
    y = x.detach().clone()
    return ops.normalize(y, ops.sample_sums(y), inplace=True)


CALLS = {
    "log_mel": lambda x: ops.log_mel(x.flatten(1), *MEL, n_fft=8, hop_length=3, stats=STATS),
    "log_mel, plain": lambda x: ops.log_mel(x.flatten(1), *MEL_67, n_fft=67, hop_length=9),
    "log_mixup_exp": lambda x: ops.log_mixup_exp(x, Z.to(x.dtype), LAM[0]),
    "resize_crop": lambda x: ops.resize_crop(x, CROPS[0], (5, 6), "bicubic"),
    "augment_views": lambda x: ops.augment_views(x, *DRAWN, RNG, bank=ROWS, bank_count=COUNT, stats=STATS)[0],
    "gaussian": lambda x: ops.augment_views(x, *DRAWN, RNG, mixup="gaussian")[0],
    "sample_sums": ops.sample_sums,
    "batch_stats": batch_stats,
    "normalize": lambda x: ops.normalize(x, ops.sample_sums(x)),
    "normalize in place": in_place,
    "draw_params": lambda x: torch.cat([part.double().flatten() for part in ops.draw_params(RNG, 3, (8, 12))]),
    "bank_push_": pushed,
    "ema_update_": averaged,
    "augment": lambda x: torch.stack(augment(x, seed=1, preset="byola-v2")),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def outcome(call, x, around=contextlib.nullcontext):
    """Return value and gradient of a call inside a context."""
    with around():
        x = x.detach().requires_grad_()
        y = call(x)
        if y.requires_grad:
            y.sum().backward(retain_graph=True)
            first = x.grad.clone()
            y.sum().backward()
            assert torch.equal(x.grad, 2 * first)
        return y.detach(), x.grad


def require_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert type(a) is type(b)
            assert a.dtype is b.dtype
            assert torch.equal(a, b)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield


class PassFunction(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class PassDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


AROUND = {
    "default device": lambda: torch.device("meta"),
    "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16),
    "anomaly": torch.autograd.detect_anomaly,
    "deterministic": deterministic,
    "offloaded": torch.autograd.graph.save_on_cpu,
    "function mode": PassFunction,
    "dispatch mode": PassDispatch,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@every_call
def test_inside_a_context(call, around, dtype):
    x = X.to(dtype)
    require_equal(outcome(call, x, around=around), outcome(call, x))


@every_call
def test_under_checkpointing_and_after_inference_mode(call):
    expected = outcome(call, X)
    with torch.inference_mode():
        assert torch.equal(call(X), expected[0])
        inference = X.clone()
    assert torch.equal(call(inference), expected[0])
    for reentrant in (False, True) if expected[1] is not None else (False,):
        require_equal(outcome(lambda x: checkpoint(call, x, use_reentrant=reentrant), X), expected)  # noqa: B023


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@every_call
def test_under_autocast(call, lower):
    def cast(x):
        with torch.autocast("cpu", dtype=lower):
            return call(x)

    require_equal(outcome(cast, X), outcome(call, X))


@every_call
def test_fake_and_meta_tensors_have_the_shape_and_dtype(call, monkeypatch):
    expected = call(X)
    for name, tensor in list(globals().items()):
        if isinstance(tensor, torch.Tensor):
            monkeypatch.setitem(globals(), name, tensor.to("meta"))
    for name in ("DRAWN", "MEL", "MEL_67"):
        monkeypatch.setitem(globals(), name, tuple(part.to("meta") for part in globals()[name]))
    found = call(X)
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_the_reference_of_log_mel_is_the_same_under_autocast():
    arguments = (X.flatten(1), *MEL, ops.mel_bands(MEL[1]), None, 8, 3, True)
    grad = torch.randn(3, 2, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reference.log_mel_reference(*arguments), reference.log_mel_backward_reference(grad, *arguments)
    require_equal(
        found, (reference.log_mel_reference(*arguments), reference.log_mel_backward_reference(grad, *arguments))
    )


def test_fake_mode():
    with FakeTensorMode():
        x, rng = torch.randn(3, 8, 12), torch.tensor([3, 4])
        views, sums = ops.augment_views(x, *ops.draw_params(rng, 3, (8, 12)), rng)
        assert ops.normalize(views, sums, inplace=True).shape == (2, 3, 8, 12)
        assert Augment(seed=1, n_memory=4)(x)[0].shape == (3, 8, 12)
        ops.ema_update_([x], [x + 1], 0.5)


class Labelled(torch.Tensor):
    """A subclass without behaviour of its own."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer, lambda x: x.as_subclass(Labelled)])
@every_call
def test_subclasses_count_as_tensors(call, kind):
    found = call(kind(X.clone())).detach()
    assert torch.equal(torch.Tensor(found), torch.Tensor(call(X)))


def test_what_backward_needs_may_not_change_before_it():
    x = X.clone().requires_grad_()
    for changed, call in (
        (CROPS[0].clone(), lambda crop: ops.resize_crop(x, crop)),
        (LAM[0].clone(), lambda lam: ops.log_mixup_exp(x, Z, lam)),
        (ROWS.clone(), lambda bank: ops.augment_views(x, *DRAWN, RNG, bank=bank, bank_count=COUNT)[0]),
    ):
        y = call(changed)
        changed.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    out = torch.empty(2, 3, 8, 12)
    augment(X, seed=1, out=out)
    y = out * torch.ones(1, requires_grad=True)
    augment(X, seed=2, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_lazily_negated_view_is_read_and_not_written():
    base = torch.randn(3, 8, 12)
    for call in CALLS.values():
        assert torch.equal(call(torch._neg_view(base)), call(-base))
    writes = {
        (3, 8, 12): lambda y: ops.normalize(y, ops.sample_sums(y), inplace=True),
        (6, 8, 12): lambda y: ops.bank_push_(y, torch.zeros(3, dtype=torch.int64), X),
        (2, 3, 8, 12): lambda y: augment(X, seed=1, out=y),
        (1, 3, 8, 12): lambda y: ops.ema_update_([y], [X[None]], 0.5),
    }
    for shape, write in writes.items():
        kept = torch.ones(shape)
        with pytest.raises((ValueError, RuntimeError), match="negat"):
            write(torch._neg_view(kept))
        assert (kept == 1).all()


def test_numbers_of_other_libraries():
    expected = averaged(X)
    for decay in (np.float32(0.75), np.float64(0.75), torch.tensor(0.75)):
        target = [torch.zeros(3, 8, 12)]
        ops.ema_update_(target, [X], decay)
        assert torch.equal(target[0], expected)
    for seed in (np.int64(1), torch.tensor(1), torch.tensor(1, dtype=torch.int32)):
        assert torch.equal(augment(X, seed=seed)[0], augment(X, seed=1)[0])
    sizes = {"n_fft": np.int64(8), "hop_length": np.int32(3), "stats": STATS}
    assert torch.equal(ops.log_mel(X.flatten(1), *MEL, **sizes), CALLS["log_mel"](X))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.log_mixup_exp(X, Z, 0.5), "lam: expected a torch.Tensor, got float"),
        (lambda: ops.log_mixup_exp(X, Z, torch.tensor(0.5)), r"lam: expected shape \(3,\), got \(\)"),
        (lambda: ops.draw_params(RNG, 3, (8, 12), pool=4.5), "pool: expected an integer in .*, got 4.5"),
        (lambda: ops.draw_params(RNG, 3, (8, 12), pool_offset=0.5), "pool_offset: expected an integer in .*, got 0.5"),
        (lambda: ops.log_mel(X[0], *MEL, n_fft=8.0, hop_length=3), "n_fft: expected an integer in .*, got 8.0"),
        (lambda: ops.log_mel(X[0], *MEL, n_fft=8, hop_length=2.5), "hop_length: expected an integer in .*, got 2.5"),
        (
            lambda: ops.ema_update_(torch.nn.Linear(2, 2).parameters(), [X], 0.5),
            "target: expected a list of tensors, got generator",
        ),
        (lambda: ops.ema_update_([X], iter([X]), 0.5), "online: expected a list of tensors, got list_iterator"),
        (lambda: augment(X, seed=1.0), "seed: expected an integer in .*, got 1.0"),
    ],
)
def test_numbers_that_are_none(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()
