"""Replayed calls give what calls without replay give, and up to rounding what single ops give: views, states, errors.

They are replayed where Triton serves: on a GPU, and on the CPU under Triton's interpreter, in which
``tests/ops/test_triton_interpreted.py`` runs this file.
"""

from __future__ import annotations

import pytest
import torch

from byola_fast import Augment, augment
from byola_fast.ops import _replay, _triton
from byola_fast.views import augment as module

pytestmark = pytest.mark.skipif(
    not (_triton.interpreted() or torch.cuda.is_available()), reason="only Triton's launches are replayed"
)


@pytest.fixture
def device(device):
    if device.type == "cpu" and not _triton.interpreted():
        pytest.skip("the CPU's kernels are not launched by Triton")
    return device


class Replays:
    """Counts replayed calls; ``without`` makes a call without, ``op_by_op`` by single ops."""

    def __init__(self, monkeypatch):
        self.count, self.monkeypatch = 0, monkeypatch
        real = _replay._replay

        def counted(*args):
            result = real(*args)
            self.count += result is not None
            return result

        monkeypatch.setattr(_replay, "_replay", counted)
        monkeypatch.setattr(_replay, "_plans", {})

    def without(self, call):
        with self.monkeypatch.context() as patch:
            patch.setattr(_replay, "_plans", {})
            return call()

    def op_by_op(self, call):
        with self.monkeypatch.context() as patch:
            patch.setattr(module, "may_replay", lambda x: False)
            return call()


@pytest.fixture
def replays(monkeypatch):
    return Replays(monkeypatch)


def batches(device, number=3, shape=(2, 1, 4, 6), dtype=torch.float32):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(number)]


def assert_same(views, expected):
    for view, other in zip(views, expected, strict=True):
        torch.testing.assert_close(view, other, rtol=0, atol=0, equal_nan=True)
        assert view.stride() == other.stride()
        assert view.dtype == other.dtype


def assert_near(views, expected):
    for view, other in zip(views, expected, strict=True):
        torch.testing.assert_close(view, other, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert view.stride() == other.stride()


CALLS = {
    "seed": {"seed": 5},
    "seed and stats": {"seed": 5, "stats": (-0.5, 2)},
    "large seed": {"seed": 2**63 - 2**40, "step": 2**32 - 9, "stats": (0.1, 1.5)},
    "no seed": {"stats": (0.1, 1.5)},
    "seed on the device": {"seed": torch.tensor},
    "v2, bicubic": {"seed": 5, "preset": "byola-v2", "interpolation": "bicubic"},
    "noise": {"seed": 5, "mixup": "gaussian", "stats": (0.0, 1.0)},
    "size": {"seed": 5, "size": (4, 7), "post_norm": False},
    "lists": {"seed": 5, "freq_scale": [0.5, 1.0]},
}


@pytest.mark.parametrize("keywords", CALLS.values(), ids=CALLS)
def test_augment(keywords, device, replays):
    for number, lms in enumerate(batches(device)):
        changing = dict(keywords)
        if keywords.get("seed") is torch.tensor:
            changing["seed"] = torch.tensor(number + 3, device=device)
        elif "seed" in keywords:
            changing["seed"] += number
            changing["step"] = keywords.get("step", 0) + number
        torch.manual_seed(number)
        views = augment(lms, **changing)
        after = torch.get_rng_state()
    assert replays.count == 1  # the last
    for run, same in ((replays.without, assert_same), (replays.op_by_op, assert_near)):
        torch.manual_seed(number)
        same(views, run(lambda: augment(lms, **changing)))
        assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype, device, replays):
    for lms in batches(device, dtype=dtype):
        for x in (lms, lms[:, 0].transpose(1, 2), lms[::2]):
            given = {"seed": 1, "stats": (0.0, 1.0)}
            assert_same(augment(x, **given), replays.without(lambda x=x, given=given: augment(x, **given)))
    assert replays.count == 3


def test_out(device, replays):
    out, other = torch.zeros(2, 2, 2, 1, 4, 6, device=device)
    for lms in batches(device):
        version = out._version
        views = augment(lms, seed=1, out=out)
        assert_same(views, replays.without(lambda lms=lms: augment(lms, seed=1, out=other)))
        assert torch.equal(out, other)
        assert views[0].data_ptr() == out.data_ptr()
        assert out._version > version
    assert replays.count == 1


MODULES = {
    "fixed": {"stats": (0.1, 1.5)},
    "running": {},
    "v2, no memory": {"preset": "byola-v2", "n_memory": 0},
    "half": {"bank_dtype": torch.float16, "post_norm": False},
}


@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES)
def test_augment_module(settings, device, replays):
    """State and counts of writes too; changes from outside take effect at the next call."""
    ours, theirs, single = (Augment(**{"n_memory": 5, "seed": 1, **settings}).to(device) for _ in range(3))

    def check(lms, changes=None, singly=False):
        for aug in (ours, theirs):
            if changes is not None:
                changes(aug)
        with torch.no_grad():
            views = ours(lms)
            assert_same(views, replays.without(lambda: theirs(lms)))
            if singly:
                assert_near(views, replays.op_by_op(lambda: single(lms)))
        for other in (theirs, single) if singly else (theirs,):
            for (name, state), expected in zip(ours.state_dict().items(), other.state_dict().values(), strict=True):
                assert torch.equal(state, expected), name
        versions = [[x._version for x in aug.buffers()] for aug in (ours, theirs)]
        assert versions[0] == versions[1]

    def elsewhere(aug):
        for buffer in aug.buffers():
            buffer.data = buffer.clone()

    lms = batches(device, 16)
    for x in lms[:5]:
        check(x, singly=True)
    assert replays.count == 2  # the first call allocates the bank
    before = replays.count
    check(lms[5], elsewhere)
    check(lms[6], lambda aug: setattr(aug.settings, "mixup_ratio", 0.9))
    check(lms[7], lambda aug: setattr(aug, "post_norm", not aug.post_norm))
    check(lms[8], lambda aug: aug.load_state_dict(aug.state_dict(), assign=True))
    check(lms[9], lambda aug: aug.rng.copy_(torch.tensor([7, 2**32 - 1], device=device)))
    check(lms[10], lambda aug: aug.eval())
    check(lms[11], lambda aug: aug.train())
    poisoned = lms[12].clone()
    poisoned[1] = torch.nan
    check(poisoned)
    assert replays.count > before
    check(lms[13][:2])


def test_a_tensor_that_does_not_fit_a_plan_is_not_replayed(device, replays):
    memory = torch.randn(49, device=device)
    aligned, unaligned = memory[:-1].view(2, 4, 6), memory[1:].view(2, 4, 6)
    for _ in range(3):
        augment(aligned, seed=1)
    assert replays.count == 1
    assert_same(augment(unaligned, seed=1), replays.without(lambda: augment(unaligned, seed=1)))
    assert replays.count == 1
    aug = Augment(n_memory=2, seed=1, stats=(0.0, 1.0)).to(device)
    for _ in range(4):
        aug(aligned)
    before, state = replays.count, aug.rng.clone()
    with pytest.raises(ValueError, match="memory of its own"):
        aug(aug.bank.rows)
    assert torch.equal(aug.rng, state)
    out = torch.zeros(2, 2, 4, 6, device=device)
    for _ in range(3):
        augment(aligned, seed=1, out=out)
    with pytest.raises(ValueError, match="out: expected memory of its own, got that of"):
        augment(out[0], seed=1, out=out)
    assert replays.count == before + 1


def test_bad_input_is_an_error_after_good_calls(device, replays):
    lms = batches(device, 1)[0]
    for _ in range(3):
        augment(lms, seed=1, size=(4, 6))
    for wrong, error, match in (
        ({"size": (4.0, 6.0)}, ValueError, "size: expected"),
        ({"size": (4, 6), "preset": "byola-v3"}, ValueError, "preset: expected"),
        ({"size": (4, 6), "seed": -1}, ValueError, "seed: expected"),
        ({"size": (4, 6), "step": 2**32}, ValueError, "step: expected"),
        ({"size": (4, 6), "stats": (float("nan"), 1.0)}, ValueError, "stats: expected"),
        ({"size": (4, 6), "sample_offset": -1}, ValueError, "sample_offset: expected"),
        ({"size": (4, 6), "mixup_ratio": 2.0}, ValueError, "mixup_ratio: expected"),
        ({"size": (4, 6), "unknown": 1}, TypeError, "unknown setting"),
    ):
        with pytest.raises(error, match=match):
            augment(lms, **{"seed": 1, **wrong})
    with pytest.raises(TypeError, match="lms: expected"):
        augment(lms.long(), seed=1, size=(4, 6))
    assert replays.count == 1


def test_calls_that_others_look_on_go_op_by_op(device, replays):
    """Gradients, function transforms and dispatch modes see the ops that they need."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Look(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Look.seen += 1
            return func(*args, **(kwargs or {}))

    lms = batches(device, 1)[0]
    for _ in range(4):
        augment(lms, seed=1)
    assert replays.count == 2
    with torch.no_grad():
        augment(lms.clone().requires_grad_(), seed=1)
    assert replays.count == 3
    view1, _view2 = augment(lms.clone().requires_grad_(), seed=1)
    assert view1.requires_grad
    with Look():
        augment(lms, seed=1)
    assert Look.seen > 0
    torch.func.vmap(lambda x: augment(lms, seed=1)[0] + x)(torch.zeros(2, device=device))
    assert replays.count == 3


def test_a_plan_holds_no_memory(device, replays):
    import gc
    import weakref

    aug = Augment(n_memory=5, seed=1, stats=(0.1, 1.5)).to(device)
    lms = batches(device, 1)[0]
    for _ in range(4):
        aug(lms)
    assert replays.count >= 1
    left = [weakref.ref(x.untyped_storage()) for x in (lms, *aug.buffers())]
    held = [weakref.ref(x) for x in (lms, *aug.buffers())]
    del aug, lms
    gc.collect()
    assert not any(ref() is not None for ref in held)
    assert left
