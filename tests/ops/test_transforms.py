"""torch.func, forward mode and vmap of every op: the derivatives of the reverse mode, the rows of single calls."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from byola_fast import Augment, augment, ops
from byola_fast.spectrograms.statistics import RunningStats, batch_stats

CROP = torch.tensor([[0, 1, 5, 9], [2, 0, 6, 12], [1, 3, 4, 15]])
RNG = torch.tensor([3, 4])
LAM, INDEX, CROPS, FADER = ops.draw_params(RNG, 3, (8, 12), fader_gain=1.0)
WINDOW, BANK = torch.hann_window(8), torch.rand(2, 5) + 0.1


def value(shape=(3, 8, 12), dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


Z, STATS = value(), torch.tensor([0.5, 2.0], dtype=torch.float64)


def views(x, mixup="log", stats=STATS):
    made, sums = ops.augment_views(x, LAM, INDEX, CROPS, FADER, RNG, stats=stats, mixup=mixup)
    return ops.normalize(made, sums)


OPS = {
    "log_mel": lambda x: ops.log_mel(x.flatten(1), WINDOW, BANK, n_fft=8, hop_length=3, stats=STATS),
    "log_mixup_exp": lambda x: ops.log_mixup_exp(x, Z, LAM[0]),
    "log_mixup_exp of partners": lambda x: ops.log_mixup_exp(Z, x, LAM[0]),
    "resize_crop": lambda x: ops.resize_crop(x, CROP, interpolation="bicubic"),
    "augment_views": views,
    "augment_views, linear": lambda x: views(x, "linear"),
    "augment_views, gaussian": lambda x: views(x, "gaussian"),
    "sample_sums": ops.sample_sums,
    "normalize": lambda x: ops.normalize(x, ops.sample_sums(x)),
    "batch_stats": batch_stats,
    "augment": lambda x: torch.stack(augment(x, seed=1)),
    "Augment": lambda x: torch.stack(Augment("byola-v2", seed=1, n_memory=4, stats=(0.5, 2.0))(x)),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_op
def test_reverse_and_forward_mode_and_batches_of_both(op):
    x = value().requires_grad_()
    of_batches = {
        "check_batched_grad": True,
        "check_batched_forward_grad": op is not OPS["log_mel"],
    }  # torch.stft fails
    assert torch.autograd.gradcheck(op, x, check_forward_ad=True, fast_mode=True, atol=1e-4, **of_batches)
    y, (tangent, x) = op(x), (value(), x.detach())
    torch.testing.assert_close(torch.func.jvp(op, (x,), (tangent,))[0], y)
    torch.testing.assert_close(torch.func.jacfwd(op)(x), torch.func.jacrev(op)(x))


@every_op
def test_forward_mode_of_a_backward_pass(op):
    x = value().requires_grad_()
    y = op(x)
    seed, tangent = torch.randn_like(y), torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        got = torch.autograd.grad(y, x, forward_ad.make_dual(seed, tangent))[0]
        torch.testing.assert_close(forward_ad.unpack_dual(got).tangent, expected)


@every_op
def test_reverse_mode_of_torch_func(op):
    x = value()
    seed = torch.randn_like(op(x))
    (expected,) = torch.autograd.grad((op(x.requires_grad_()) * seed).sum(), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(lambda x: (op(x) * seed).sum())(x), expected)
    torch.testing.assert_close(torch.func.vjp(op, x)[1](seed)[0], expected)


@every_op
def test_second_derivatives(op):
    x, direction = value(), value()
    seed = torch.randn_like(op(x))

    def slope(x):
        return torch.func.grad(lambda x: (op(x).square() * seed).sum())(x)

    got = torch.func.jvp(slope, (x,), (direction,))[1]
    expected = (slope(x + 1e-5 * direction) - slope(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    (reverse,) = torch.func.vjp(slope, x)[1](direction)  # the Hessian is symmetric
    torch.testing.assert_close(reverse, got)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in OPS if name != "Augment"])  # which keeps a memory
def test_vmap(name):
    op = OPS[name]
    several = value((2, 3, 8, 12))
    expected = torch.stack([op(x) for x in several])
    torch.testing.assert_close(torch.func.vmap(op)(several), expected)
    torch.testing.assert_close(torch.func.functionalize(op)(several[0]), expected[0])
    x = several[0].clone().requires_grad_()
    y = op(x)
    seeds = torch.randn(2, *y.shape, dtype=y.dtype)
    (batched,) = torch.autograd.grad(y, x, seeds, retain_graph=True, is_grads_batched=True)
    for seed, got in zip(seeds, batched, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, x, seed, retain_graph=True)[0])


@pytest.mark.parametrize("varied", ["lam", "bank_index", "crop", "fader", "rng", "stats", "bank", "x"])
def test_vmap_over_drawn_parameters(varied):
    drawn = [ops.draw_params(torch.tensor([5, step]), 3, (8, 12), fader_gain=1.0) for step in range(2)]
    choices = {
        "x": [value(), value()],
        **{name: [draw[k] for draw in drawn] for k, name in enumerate(("lam", "bank_index", "crop", "fader"))},
        "rng": [RNG, RNG + 1],
        "stats": [STATS, STATS + 1],
        "bank": [value((4, 8, 12)), value((4, 8, 12))],
    }
    fixed = {name: pair[0] for name, pair in choices.items() if name != varied} | {"bank_count": torch.tensor(4)}
    for mixup in ("log", "gaussian"):

        def op(changed, mixup=mixup):
            return ops.augment_views(**fixed, **{varied: changed}, mixup=mixup)

        got = torch.func.vmap(op)(torch.stack(choices[varied]))
        for number, changed in enumerate(choices[varied]):
            torch.testing.assert_close(tuple(part[number] for part in got), op(changed))


def test_vmap_of_the_draw_and_of_single_ops():
    steps = torch.tensor([[1, 2], [1, 3]])
    named = {"bank_count": torch.tensor(2), "views": 3, "first_view": 1}
    got = torch.func.vmap(lambda rng: ops.draw_params(rng, 3, (8, 12), **named))(steps)
    for number, rng in enumerate(steps):
        expected = ops.draw_params(rng, 3, (8, 12), **named)
        assert all(torch.equal(a[number], b) for a, b in zip(got, expected, strict=True))
    mixed = torch.func.vmap(lambda lam: ops.log_mixup_exp(Z, Z + 1, lam))(LAM)
    torch.testing.assert_close(mixed[1], ops.log_mixup_exp(Z, Z + 1, LAM[1]))
    cropped = torch.func.vmap(lambda crop: ops.resize_crop(Z, crop))(CROPS)
    torch.testing.assert_close(cropped[1], ops.resize_crop(Z, CROPS[1]))


def test_ops_that_keep_data_keep_no_derivative():
    """Memory, moving average and running statistics are data, in forward mode as in reverse mode."""
    x = value(dtype=torch.float32)
    rows, cursor, target = torch.zeros(4, 8, 12), torch.zeros(3, dtype=torch.int64), [torch.zeros(3, 8, 12)]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        ops.bank_push_(rows, cursor, dual)
        ops.ema_update_(target, [dual], 0.5)
        stats = RunningStats().update(dual)
        assert all(forward_ad.unpack_dual(kept).tangent is None for kept in (rows, *target, stats))
    assert torch.equal(rows[:3], x)
    assert torch.equal(target[0], x / 2)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_writing_to_what_a_transform_does_not_know_is_an_error(transform):
    x = value((2, 3, 8, 12), torch.float32)
    rows, cursor, out = torch.zeros(4, 8, 12), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, 8, 12)
    kept, module = [torch.zeros(3, 8, 12)], Augment(seed=1, n_memory=4, shape=(8, 12))
    kept.append(module.bank.rows)
    calls = [
        lambda x: ops.bank_push_(rows, cursor, x),
        lambda x: ops.ema_update_(kept[:1], [x], 0.5),
        lambda x: augment(x, seed=1, out=out)[0].sum(),
        lambda x: module(x)[0].sum(),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"vmap: |a captured Tensor|gives no gradient"):
            torch.func.vmap(call)(x) if transform == "vmap" else torch.func.grad(call)(x[0])
    assert not any(t.count_nonzero() for t in (rows, cursor, out, *kept))


def test_a_second_derivative_without_torch_func_says_what_to_do():
    x = value().requires_grad_()
    (slope,) = torch.autograd.grad(OPS["resize_crop"](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once; use torch\.func"):
        slope.sum().backward()
