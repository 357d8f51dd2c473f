"""augment and Augment: the whole method, replay, chunks, state; test_distributed.py has several processes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import oracle
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import Augment, AugmentParams, RunningStats, augment
from byola_fast.views.params import resolve_settings

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", ["byola-v1", "byola-v2"])
def test_the_whole_method(preset, dtype, device):
    x = (3 * torch.randn(5, 1, 63, 97, device=device) - 4).to(dtype)
    before = x.clone()
    view1, view2, params = augment(x, preset=preset, seed=1, return_params=True)
    wide = x[:, 0].double()
    expected = oracle.normalize(oracle.views(x[:, 0], params, stats=(float(wide.mean()), float(wide.std()))))
    assert view1.shape == view2.shape == x.shape
    assert view1.dtype == dtype
    assert_close(torch.stack([view1, view2])[:, :, 0], expected, factor=2)  # normalised twice
    assert torch.equal(x, before)
    assert params.lam.max() <= (0.4 if preset == "byola-v1" else 0.2)
    assert bool((params.fader == 0).all()) == (preset == "byola-v1")


@pytest.mark.parametrize("mixup", ["log", "linear", "none"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_setting_without_normalisation(interpolation, mixup, device):
    x = torch.randn(4, 16, 40, device=device)
    chosen = {"mixup": mixup, "interpolation": interpolation, "mixup_ratio": 1.0, "fader_gain": 2.5, "size": (16, 24)}
    scales = {"freq_scale": (0.5, 0.9), "time_scale": (0.1, 0.3), "virtual_crop_scale": (1.25, 1.1)}
    view1, view2, params = augment(x, seed=2, stats=(0, 1), post_norm=False, return_params=True, **chosen, **scales)
    expected = oracle.views(x, params, size=(16, 24), canvas=(20, 44), interpolation=interpolation, mixup=mixup)
    assert_close(torch.stack([view1, view2]), expected)
    h, w = params.crop[..., 2], params.crop[..., 3]
    assert h.min() >= 8
    assert h.max() <= 14
    assert w.min() >= 4
    assert w.max() <= 12


@pytest.mark.parametrize("kwargs", [{}, {"step": 3}, {"seed": 5}, {"sample_offset": 4}])
def test_views_depend_on_seed_step_and_sample_number(kwargs):
    x = torch.randn(4, 8, 12)
    base = augment(x, seed=1)
    again = augment(x, **({"seed": 1} | kwargs))
    assert torch.equal(base[0], again[0]) == (not kwargs)


def test_parameters_do_not_depend_on_dtype_or_size_of_the_batch():
    x = torch.randn(9, 8, 12)
    whole = augment(x, seed=3, step=2, return_params=True)[2]
    half = augment(x.half(), seed=3, step=2, return_params=True)[2]
    part = augment(x[2:5], seed=3, step=2, sample_offset=2, return_params=True)[2]
    for name in ("lam", "crop", "fader"):
        assert torch.equal(getattr(whole, name), getattr(half, name))
        assert torch.equal(getattr(whole[2:5], name), getattr(part, name))
    assert whole[2:5].sample_offset == 2


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 10)), mixup=st.sampled_from(["log", "linear", "gaussian"]))
def test_chunks_equal_the_whole(cuts, mixup):
    """Partners from a bank (here replayed), stats given, no post-normalisation: bit for bit."""
    x = torch.randn(11, 7, 9)

    def fresh():
        aug = Augment("byola-v2", seed=4, n_memory=16, stats=(0.5, 2.0), post_norm=False, mixup=mixup)
        aug(torch.randn(16, 7, 9, generator=torch.Generator().manual_seed(0)))
        return aug

    whole = torch.stack(fresh()(x))
    edges = [0, *sorted(cuts), 11]
    parts = []
    for start, stop in itertools.pairwise(edges):
        parts.append(torch.stack(fresh()(x[start:stop], sample_offset=start)))
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("mixup", ["log", "gaussian"])
def test_replay(mixup, device):
    x = torch.randn(6, 8, 12, device=device)
    view1, view2, params = augment(x, seed=8, step=5, mixup=mixup, preset="byola-v2", return_params=True)
    again = augment(x, params=params, mixup=mixup, preset="byola-v2")
    assert torch.equal(view1, again[0])
    assert torch.equal(view2, again[1])


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_parameters_made_by_hand_get_their_seed_where_they_lie(where):
    """Elsewhere it would be refused on a GPU."""
    lam, index = torch.zeros(2, 3, device=where), torch.zeros(2, 3, dtype=torch.int64, device=where)
    params = AugmentParams(lam, index, torch.zeros(2, 3, 4, device=where).int(), torch.zeros(2, 3, 2, device=where))
    assert params.rng.device.type == where
    assert params.rng.dtype == torch.int64


def test_replay_of_a_module_from_its_bank_and_before_it(device):
    aug = Augment(seed=8, n_memory=8, stats=(0, 1)).to(device)
    for _ in range(3):
        state = {k: v.clone() for k, v in aug.state_dict().items()}
        x = torch.randn(3, 8, 12, device=device)
        view1, view2, params = aug(x, return_params=True)
        other = Augment(seed=1, n_memory=8, stats=(0, 1)).to(device)
        other.load_state_dict(state)
        again = other(x, params=params)
        assert torch.equal(view1, again[0])
        assert torch.equal(view2, again[1])
    assert int(params.bank_count) == 6


def test_seeds_come_from_generators(device):
    x = torch.randn(4, 8, 12, device=device)
    for where in {"cpu", device.type}:
        first, second = (augment(x, generator=torch.Generator(where).manual_seed(3))[0] for _ in range(2))
        assert torch.equal(first, second)
    torch.manual_seed(9)
    first = augment(x)[0]
    assert not torch.equal(first, augment(x)[0])
    torch.manual_seed(9)
    assert torch.equal(first, augment(x)[0])


@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 1, 8, 12)])
def test_out_is_reused(shape, device):
    x = torch.randn(shape, device=device)
    out = torch.full((2, *shape), math.nan, device=device)
    view1, view2 = augment(x, seed=1, out=out)
    assert view1.data_ptr() == out.data_ptr()
    assert torch.equal(torch.stack([view1, view2]), out)
    assert torch.equal(view1, augment(x, seed=1)[0])
    aug, twin = (Augment(seed=1).to(device) for _ in range(2))
    aug(x, out=out)
    assert torch.equal(out[1], twin(x)[1])


def test_empty_batches(device):
    for shape in [(0, 8, 12), (0, 1, 8, 12)]:
        view1, view2 = augment(torch.randn(shape, device=device))
        assert view1.shape == view2.shape == shape
        aug = Augment(shape=(8, 12)).to(device)
        assert aug(torch.randn(shape, device=device))[0].shape == shape
        assert len(aug.bank) == 0


def test_one_sample_and_one_element(device):
    assert torch.isfinite(augment(torch.randn(1, 1, 1, device=device), seed=0)[0]).all()
    x = torch.randn(1, 8, 12, device=device)
    params = augment(x, seed=0, return_params=True)[2]
    assert (params.bank_index == -1).all()


@pytest.mark.slow
def test_gradients_reach_the_input_through_everything(device):
    x = torch.randn(3, 5, 7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: torch.stack(augment(x, seed=1, preset="byola-v2")), (x,))
    first = torch.randn(4, 5, 7, dtype=torch.float64, device=device)

    def step(x):
        aug = Augment(seed=1, n_memory=4, stats=(0.1, 1.5)).to(device)
        aug(first)
        return torch.stack(aug(x))

    assert torch.autograd.gradcheck(step, (x,))
    with pytest.raises(RuntimeError, match="gives no gradient to lms"):
        augment(x, out=torch.empty(2, 3, 5, 7, dtype=torch.float64, device=device))


def test_the_bank_holds_clean_inputs_and_is_pushed_after_both_views(device):
    aug = Augment(seed=1, n_memory=5, stats=(1.0, 2.0)).to(device)
    first, second = torch.randn(3, 8, 12, device=device), torch.randn(3, 8, 12, device=device)
    _, _, params = aug(first, return_params=True)
    assert int(params.bank_count) == 0
    assert_close(aug.bank.rows[:3], ((first - 1) / 2).double())
    rows = aug.bank.rows.clone()
    view1, view2, params = aug(second, return_params=True)
    assert params.bank_index.max() < 3
    expected = oracle.normalize(oracle.views(second, params, stats=(1.0, 2.0), bank=rows))
    assert_close(torch.stack([view1, view2]), expected, factor=2)
    assert len(aug.bank) == 5


@pytest.mark.parametrize("stats", [None, (0.5, 2.0)])
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.float16])
def test_a_state_dict_continues_the_very_same_stream(bank_dtype, stats, tmp_path, device):
    kwargs = {"n_memory": 7, "bank_dtype": bank_dtype, "stats": stats}
    aug = Augment("byola-v2", seed=3, **kwargs).to(device)
    batches = torch.randn(6, 3, 8, 12, device=device)
    for batch in batches[:3]:
        aug(batch)
    torch.save(aug.state_dict(), tmp_path / "state.pt")
    fresh = Augment("byola-v2", seed=99, **kwargs).to(device)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in batches[3:]:
        for a, b in zip(aug(batch), fresh(batch), strict=True):
            assert torch.equal(a, b)


def test_non_finite_inputs_never_enter_the_bank(device):
    aug = Augment(seed=1, n_memory=9).to(device)
    aug(torch.randn(4, 8, 12, device=device))
    bad = torch.randn(4, 8, 12, device=device)
    bad[1, 2, 3], bad[3] = math.nan, math.inf
    aug(bad)
    assert int(aug.bank.refused) == 2
    assert len(aug.bank) == 6
    assert aug.bank.rows.isfinite().all()
    assert aug.running_stats.stats().isfinite().all()
    assert torch.stack(aug(torch.randn(4, 8, 12, device=device))).isfinite().all()


def test_without_a_memory_partners_come_from_the_batch(device):
    x = torch.randn(6, 20, 24, device=device)
    aug = Augment(n_memory=0, seed=3, stats=(0.0, 1.0)).to(device)
    for step in range(2):
        view1, view2, params = aug(x, return_params=True)
        same1, same2 = augment(x, seed=3, step=step, stats=(0.0, 1.0))
        assert torch.equal(view1, same1)
        assert torch.equal(view2, same2)
        assert torch.equal(aug(x, params=params)[0], view1)
        aug.rng[1] -= 1  # the replay counted as a step
    assert len(aug.bank) == 0
    again = Augment(n_memory=0, stats=(0.0, 1.0)).to(device)
    again.load_state_dict(aug.state_dict())
    assert torch.equal(again(x)[0], aug(x)[0])


def test_running_statistics_follow_everything_seen(device):
    aug = Augment(seed=1, stats=RunningStats(max_updates=3)).to(device)
    batches = 3 * torch.randn(5, 4, 8, 12, device=device) - 7
    for n, batch in enumerate(batches, start=1):
        aug(batch)
        seen = batches[: min(n, 3)].double()
        assert_close(aug.running_stats.stats(), torch.stack([seen.mean(), seen.std()]))
    aug.eval()
    before = aug.running_stats.stats()
    aug(batches[0])
    assert torch.equal(aug.running_stats.stats(), before)


def test_non_contiguous_inputs(device):
    x = torch.randn(12, 5, 8, device=device).permute(1, 2, 0)
    assert torch.equal(augment(x, seed=1)[0], augment(x.contiguous(), seed=1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, device):
    """Every op computes in its documented dtype, also under autocast."""
    x = torch.randn(4, 8, 12, device=device).to(dtype)
    plain = augment(x, seed=1, preset="byola-v2")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = augment(x, seed=1, preset="byola-v2")
        aug = Augment(seed=1).to(device)
        views = aug(x)
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == dtype
        assert torch.equal(a, b)
    twin = Augment(seed=1).to(device)
    for a, b in zip(views, twin(x), strict=True):
        assert torch.equal(a, b)


def test_a_batch_beyond_the_draws_of_partners_is_refused(device):
    from byola_fast.ops._two_views import two_views

    x, chosen = torch.zeros(2**24 + 1, 1, 1, device=device), vars(resolve_settings("byola-v1", {}))
    for call in (
        lambda: augment(x, seed=1, stats=(0.0, 1.0)),
        lambda: two_views(x, x, None, **chosen, post_norm=True, sample_offset=0, out=None),
    ):
        with pytest.raises(ValueError, match=r"expected (0 to|at most) 2\^24"):
            call()
