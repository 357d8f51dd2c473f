"""Augment with another number of views than two, and with local views."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import oracle, ranks
from helpers.tolerances import assert_close
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from byola_fast import Augment, AugmentParams, ops
from byola_fast.runtime.distributed import join

FIXED: dict[str, Any] = {"seed": 3, "n_memory": 6, "stats": (-1.0, 2.0)}
CROPS: dict[str, Any] = {"n_views": 2, "local_views": 4, "local_size": (31, 29), "local_scale": (0.1, 0.4)}
COUNTS = [{"n_views": 1}, {"n_views": 3}, {"n_views": 5, "local_views": 1, "local_size": (8, 8)}, CROPS]


def inputs(*shape: int, steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(shape, generator=generator) - 1 for _ in range(steps)]


def split(aug: Augment, views: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the global and the local views, one tensor each."""
    return [torch.stack(views[: aug.n_views]), *([torch.stack(views[aug.n_views :])] if aug.local_views else [])]


def rows(params: AugmentParams, views: slice) -> AugmentParams:
    return replace(params, **{name: getattr(params, name)[views] for name in ("lam", "bank_index", "crop", "fader")})


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mixup", ["log", "gaussian"])
def test_the_first_two_views_are_those_of_two(mixup, counts, device):
    two = Augment("byola-v2", mixup=mixup, post_norm=False, **FIXED).to(device)
    more = Augment("byola-v2", mixup=mixup, post_norm=False, **FIXED, **counts).to(device)
    for x in inputs(4, 17, 37):
        *expected, params = two(x.to(device), return_params=True)
        *views, drawn = more(x.to(device), return_params=True)
        assert len(views) == len(drawn.lam) == more.n_views + more.local_views
        for number in range(min(2, more.n_views)):
            assert torch.equal(views[number], expected[number])
            for name in ("lam", "bank_index", "crop", "fader"):
                assert torch.equal(getattr(drawn, name)[number], getattr(params, name)[number])
    for name, buffer in two.state_dict().items():
        assert torch.equal(buffer, more.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 63, 97), (1, 1, 63, 97), (2, 1, 1), (0, 9, 12), (1, 3, 2)])
def test_each_group_against_the_method_in_float64(shape, dtype, device):
    aug = Augment("byola-v2", n_memory=0, seed=3, stats=(-1.0, 2.0), **CROPS).to(device)
    x = inputs(*shape, steps=1)[0].to(device, dtype)
    *views, params = aug(x, return_params=True)
    flat = x[:, 0] if x.dim() == 4 else x
    size = tuple(flat.shape[1:])
    whole = oracle.views(flat, rows(params, slice(2)), stats=(-1.0, 2.0))
    local = oracle.views(flat, rows(params, slice(2, 6)), size=(31, 29), canvas=size, stats=(-1.0, 2.0))
    for got, expected in zip(split(aug, views), (whole, local), strict=True):
        assert got.dtype == dtype
        assert_close(got.reshape(expected.shape), oracle.normalize(expected), factor=2)  # rounded twice


@pytest.mark.parametrize("mixup", ["log", "linear", "gaussian", "none"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_local_views_are_those_of_the_op_with_their_parameters(interpolation, mixup, device):
    aug = Augment("byola-v2", mixup=mixup, interpolation=interpolation, **FIXED, **CROPS).to(device)
    for x in inputs(4, 63, 97):
        x = x.to(device)
        bank = aug.bank.rows.clone() if aug.bank.rows is not None else x.new_zeros(6, 63, 97)
        *views, params = aug(x, return_params=True)
        own = (params.lam[2:], params.bank_index[2:], params.crop[2:], params.fader[2:], params.rng)
        made, sums = ops.augment_views(
            x, *own, first_view=2, bank=bank, bank_count=params.bank_count, stats=aug.fixed_stats, size=(31, 29),
            canvas=(63, 97), interpolation=interpolation, mixup=mixup,
        )  # fmt: skip
        assert torch.equal(torch.stack(views[2:]), ops.normalize(made, sums))


def test_local_crops_lie_inside_the_input_and_take_their_scale():
    aug = Augment(seed=1, n_memory=0, n_views=1, local_views=3, local_size=(8, 8), local_scale=(0.25, 0.5))
    params = aug(torch.randn(200, 40, 100), return_params=True)[-1]
    i, j, h, w = params.crop[1:].long().unbind(-1)
    assert [int(h.min()), int(h.max())] == [10, 19]  # half open
    assert [int(w.min()), int(w.max())] == [25, 49]
    assert [int(i.min()), int((i + h).max())] == [0, 40]
    assert [int(j.min()), int((j + w).max())] == [0, 100]
    assert int(params.crop[0, :, 3].max()) > 100


def test_each_group_has_one_mean_and_one_std_of_its_own():
    aug, two = Augment(**FIXED, **CROPS), Augment(**FIXED)
    for x in inputs(5, 17, 37):
        both, local = split(aug, aug(x))
        torch.testing.assert_close(both, torch.stack(two(x)))
        for views in (both, local):
            assert abs(float(views.mean())) < 1e-5
            assert abs(float(views.std()) - 1) < 1e-5
            assert views.flatten(1).mean(1).abs().max() > 1e-3  # jointly, not each view


@pytest.mark.parametrize("counts", COUNTS)
def test_replay_and_slices_of_the_parameters(counts, device):
    aug = Augment("byola-v2", **FIXED, **counts, post_norm=False).to(device)
    for x in inputs(4, 63, 97):
        x = x.to(device)
        before = copy.deepcopy(aug)
        *views, params = aug(x, return_params=True)
        params = pickle.loads(pickle.dumps(params))
        assert len(params) == 4
        for got, expected in zip(before.eval()(x, params=params), views, strict=True):
            assert torch.equal(got, expected)
        if int(params.bank_count):  # partners from the batch mean rows of the whole batch
            for got, expected in zip(before(x[1:3], params=params[1:3]), views, strict=True):
                assert torch.equal(got, expected[1:3])
    total = aug.n_views + aug.local_views
    text = str(params)
    assert f"{total} views of 4 samples" in text
    assert f"view {total}, sample 3" in text
    aug.n_views += 1
    with pytest.raises(ValueError, match=re.escape(f"params.lam: expected shape ({total + 1}, 4), got ({total}, 4)")):
        aug(x, params=params)


@pytest.mark.parametrize("counts", COUNTS)
def test_eval_mode_moves_no_state_and_training_moves_it_once(counts):
    aug = Augment("byola-v2", seed=3, n_memory=6, **counts)
    x = inputs(4, 8, 12, steps=1)[0]
    aug(x)
    assert aug.rng.tolist() == [3, 1]
    assert aug.bank.cursor.tolist() == [4, 4, 0]
    state = {name: buffer.clone() for name, buffer in aug.eval().state_dict().items()}
    for a, b in zip(aug(x), aug(x), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(buffer, state[name]) for name, buffer in aug.state_dict().items())


def test_the_gradient_is_the_sum_of_the_views_gradients():
    x = inputs(3, 8, 12, steps=1)[0].double().requires_grad_()
    aug = Augment("byola-v2", mixup="gaussian", n_memory=0, seed=3, stats=(0.0, 1.0), post_norm=False, **CROPS).eval()
    weights = [torch.randn_like(view) for view in aug(x)]
    (whole,) = torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, aug(x), strict=True)), x)
    parts = [torch.autograd.grad((w * aug(x)[number]).sum(), x)[0] for number, w in enumerate(weights)]
    torch.testing.assert_close(whole, sum(parts))
    assert all(part.abs().sum() > 0 for part in parts)


def test_out_takes_global_views_and_is_refused_with_local_ones():
    x = inputs(4, 1, 8, 12, steps=1)[0]
    out = torch.full((3, *x.shape), torch.nan)
    views = Augment(**FIXED, n_views=3)(x, out=out)
    assert views[2].data_ptr() == out[2].data_ptr()
    for view, expected in zip(views, Augment(**FIXED, n_views=3)(x), strict=True):
        assert torch.equal(view, expected)
    with pytest.raises(ValueError, match=re.escape("out: expected shape (3, 4, 8, 12), got (2, 4, 8, 12)")):
        Augment(**FIXED, n_views=3)(x, out=out[:2])
    with pytest.raises(ValueError, match=r"out: expected none with local views, .* got a tensor"):
        Augment(**FIXED, **CROPS)(x, out=out[:2])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n_views": 0}, "n_views: expected an integer in [1, 2^16), got 0"),
        ({"n_views": 2.0}, "n_views: expected an integer in [1, 2^16), got 2.0"),
        ({"local_views": -1}, "local_views: expected an integer in [0, 2^16), got -1"),
        ({"local_views": 2}, "local_size: expected the (mels, frames) of local views, got None"),
        ({"local_size": (8, 0)}, "local_size: expected (mels, frames) of at least (1, 1), integers, got (8, 0)"),
        ({"local_size": 8}, "local_size: expected (mels, frames) of at least (1, 1), integers, got 8"),
        ({"local_scale": (0.5, 0.2)}, "local_scale: expected (min, max) with 0 <= min <= max, max > 0"),
        (
            {"local_scale": (0.5, 1.5)},
            "local_scale: expected (min, max) with max <= 1, inside the input, got (0.5, 1.5)",
        ),
        ({"local_scale": 0.5}, "local_scale: expected (min, max) with 0 <= min <= max"),
    ],
)
def test_bad_counts_sizes_and_scales(given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Augment(**given)


class Crops(Dataset):
    """Lam of each view of one sample."""

    def __init__(self, aug: Augment) -> None:
        self.aug = aug

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        *_, params = self.aug(inputs(1, 8, 12, steps=1)[0], return_params=True)
        return params.lam[:, 0]


def test_workers_of_a_loader_draw_apart():
    aug = Augment(**FIXED | {"n_memory": 0}, **CROPS)
    drawn = torch.cat([*DataLoader(Crops(aug), batch_size=2, num_workers=2)])
    assert drawn.shape == (8, 6)
    assert len(drawn.unique()) == 48


def views_of_ranks(lms: Tensor) -> list[list[Tensor]]:
    with join(torch.device("cpu")) as world:
        own = lms.shape[1] // world.size
        aug = Augment("byola-v2", seed=5, n_memory=12, **CROPS)
        return [[*aug(batch[world.rank * own :][:own])] for batch in lms]


@pytest.mark.slow
def test_views_do_not_depend_on_the_number_of_processes(tmp_path):
    lms = torch.stack(inputs(8, 16, 24))
    whole = views_of_ranks(lms)
    parts = ranks.run(2, tmp_path, views_of_ranks, lms)
    for step, views in enumerate(whole):
        for number, view in enumerate(views):
            assert torch.equal(view, torch.cat([part[step][number] for part in parts]))
