"""The steps of the augmentation as modules: equal to Augment's, per sample, resumable, in a loader's workers."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn
from torch.utils.data import DataLoader, Dataset

from byola_fast import Augment, ops
from byola_fast.transforms import LogMixupExp, PrecomputedNorm, RandomLinearFader, RandomResizeCrop, RunningNorm

RANDOM = {
    "mixup": lambda **more: LogMixupExp(n_memory=16, **more),
    "crop": lambda **more: RandomResizeCrop(**more),
    "fader": lambda **more: RandomLinearFader(**more),
}
STATS = (-1.0, 2.0)


def all_of(seed: int) -> nn.Sequential:
    steps = (LogMixupExp(0.2, 32, seed=seed), RandomResizeCrop(seed=seed), RandomLinearFader(seed=seed))
    return nn.Sequential(PrecomputedNorm(STATS), *steps)


def test_the_steps_of_a_seed_are_the_first_view_of_augment(device):
    aug = Augment("byola-v2", n_memory=32, seed=7, stats=STATS, post_norm=False).to(device)
    steps = all_of(7).to(device)
    for _ in range(4):  # the memory is empty at first
        lms = torch.randn(6, 20, 30, device=device)
        torch.testing.assert_close(steps(lms), aug(lms)[0], rtol=1e-5, atol=1e-5)
    assert len(steps[1].bank) == 24
    assert torch.equal(steps[1].bank.rows, aug.bank.rows)


@pytest.mark.parametrize("kind", RANDOM)
def test_every_sample_has_its_own_parameters_and_its_channels_share_them(kind):
    batch = torch.randn(5, 20, 30)
    alike = batch[:1].expand(5, 20, 30).clone()
    first, second = RANDOM[kind](seed=3), RANDOM[kind](seed=3)
    y = first(alike) if kind != "mixup" else first(batch)
    assert y.shape == (5, 20, 30)
    assert len({tuple(row.flatten().tolist()) for row in y}) == 5
    stereo = torch.stack([batch, batch], 1)
    both, mono = second(stereo), RANDOM[kind](seed=3)(batch)
    assert both.shape == (5, 2, 20, 30)
    assert torch.equal(both[:, 0], both[:, 1])
    assert_close(both[:, 0], mono.double(), factor=10)


@pytest.mark.parametrize("kind", RANDOM)
def test_probability(kind):
    batch = torch.randn(400, 8, 10)
    for p, bounds in ((0.0, (0, 0)), (0.3, (80, 160)), (1.0, (380, 400))):
        same = (RANDOM[kind](p=p, seed=1)(batch) == batch).flatten(1).all(1)
        changed = len(batch) - int(same.sum())
        assert bounds[0] <= changed <= bounds[1], p
    with pytest.raises(ValueError, match="p: expected a probability in"):
        RANDOM[kind](p=1.5)


@pytest.mark.parametrize("kind", RANDOM)
def test_state_resumes_eval_changes_nothing_and_copies_are_alike(kind):
    transform, batches = RANDOM[kind](seed=2), torch.randn(6, 4, 8, 10)
    for batch in batches[:3]:
        transform(batch)
    fresh = RANDOM[kind](seed=99)
    fresh.load_state_dict(transform.state_dict())
    twin = copy.deepcopy(transform)
    transform.eval()
    assert torch.equal(transform(batches[0]), transform(batches[0]))
    transform.train()
    for batch in batches[3:]:
        wanted = transform(batch)
        assert torch.equal(fresh(batch), wanted)
        assert torch.equal(twin(batch), wanted)


def test_crops_of_another_size_and_what_is_not_changed_is_resized_whole():
    x = torch.randn(3, 20, 30)
    assert RandomResizeCrop(size=(16, 24))(x).shape == (3, 16, 24)
    whole = torch.tensor([[0, 7, 20, 30]]).expand(3, 4)
    assert torch.equal(RandomResizeCrop(size=(16, 24), p=0.0)(x), ops.resize_crop(x, whole, (16, 24)))
    assert torch.equal(RandomResizeCrop(p=0.0)(x), x)


def test_one_sample_is_mixed_once_there_is_a_memory():
    mixup, x = LogMixupExp(n_memory=4, seed=0), torch.randn(5, 8, 10)
    assert torch.equal(mixup(x[0]), x[0])
    assert not torch.equal(mixup(x[1]), x[1])
    assert mixup(x[1]).shape == (8, 10)
    within = LogMixupExp(n_memory=0, seed=0)
    assert not torch.equal(within(x), x)
    assert torch.equal(within(x[0]), x[0])


def test_normalisation():
    x = 3 + 2 * torch.randn(16, 8, 10)
    running = RunningNorm()
    y = running(x)
    assert (y.mean().item(), y.std().item()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-4))
    state = running.state_dict()
    running.eval()
    assert_close(running(x[0]), y[0].double(), factor=10)
    assert all(torch.equal(value, state[name]) for name, value in running.state_dict().items())
    assert_close(PrecomputedNorm((3.0, 2.0))(x), (x.double() - 3) / 2, factor=10)
    assert PrecomputedNorm((3.0, 0.0))(torch.full((2, 2), 3.0)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay_and_gradients_flow(dtype):
    x = torch.randn(4, 8, 10, dtype=dtype, requires_grad=True)
    y = all_of(1).to(dtype)(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_refused_inputs():
    crop = RandomResizeCrop()
    for x, error, words in (
        (torch.zeros(3), ValueError, r"x: expected shape \(F, T\), \(B, F, T\) or \(B, C, F, T\)"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "floating-point"),
        ([0.0], TypeError, "x: expected a torch.Tensor"),
    ):
        with pytest.raises(error, match=words):
            crop(x)
    for make, words in (
        (lambda: RandomResizeCrop(freq_scale=(2, 1)), "freq_scale"),
        (lambda: RandomResizeCrop(interpolation="nearest"), "interpolation"),
        (lambda: LogMixupExp(1.5), "mixup_ratio"),
        (lambda: RandomLinearFader(-1.0), "fader_gain"),
        (lambda: PrecomputedNorm((0.0, -1.0)), "stats"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


class Spectrograms(Dataset[torch.Tensor]):
    def __init__(self) -> None:
        self.transform = nn.Sequential(PrecomputedNorm(STATS), RandomResizeCrop(seed=5), RandomLinearFader(seed=5))
        self.x = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.x)


def epoch(workers: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.cat(list(DataLoader(Spectrograms(), 3, num_workers=workers)))


def test_in_a_loaders_workers_every_sample_differs_and_a_seed_repeats():
    first = epoch(2, 1)
    assert len({tuple(row.flatten().tolist()) for row in first}) == 12
    assert torch.equal(first, epoch(2, 1))
    assert not torch.equal(first, epoch(2, 2))
