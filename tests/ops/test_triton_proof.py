"""Proofs under Triton's interpreter: no kernel depends on the order of its programs, and no address leaves its tensor.

Programs of a GPU run at the same time and finish in any order; the interpreter runs them one by one, here shuffled.
Addresses are checked at sizes that need more than 32 bits: only chosen programs run, and huge tensors are never read.
"""

from __future__ import annotations

import importlib
import mmap
import pkgutil
import random

import pytest
import torch

from byola_fast import Augment, augment, ops
from byola_fast.ops import _triton

if not _triton.interpreted():
    reason = "needs TRITON_INTERPRET=1; test_triton_interpreted.py runs this file under the interpreter"
    pytest.skip(reason, allow_module_level=True)

import numpy as np
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import GridExecutor, interpreter_builder

OPS = torch.ops.byola_fast
RNG = torch.tensor([11, 5])


@pytest.fixture
def programs(monkeypatch):
    """What the next launches do: ``order`` gives the programs to run of n; ``ran`` holds the names of the kernels."""

    class Programs:
        order, ran, chosen, total = staticmethod(range), set(), [], 0

    call, set_grid_dim, set_grid_idx = GridExecutor.__call__, type(interpreter_builder).set_grid_dim, None
    set_grid_idx = type(interpreter_builder).set_grid_idx

    def launch(self, *args, **kwargs):
        Programs.total = self.grid[0]
        Programs.chosen = list(Programs.order(Programs.total))
        Programs.ran.add(self.fn.__name__)
        self.grid = (len(Programs.chosen),)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(
        type(interpreter_builder), "set_grid_dim", lambda self, x, y, z: set_grid_dim(self, Programs.total, y, z)
    )
    monkeypatch.setattr(
        type(interpreter_builder), "set_grid_idx", lambda self, x, y, z: set_grid_idx(self, Programs.chosen[x], y, z)
    )
    return Programs


def shuffled(seed):
    def order(count):
        return range(count)[::-1] if seed == 0 else random.Random(seed).sample(range(count), count)

    return order


def front_end():
    bank = torch.rand(5, 33)
    return torch.rand(64), bank, ops.mel_bands(bank), torch.tensor([-3.0, 2.0])


def log_mel():
    return [OPS.log_mel(torch.randn(3, 700), *front_end(), 64, 7, True)]


def two_views():
    aug, x = Augment(seed=8, n_memory=8), torch.randn(6, 40, 70)
    exact, y = Augment(seed=8, n_memory=8), torch.randn(6, 40, 64)  # sizes of exact_views.py
    made = [*aug(x), *aug(2 * x), *augment(x, seed=2, interpolation="bicubic"), *exact(y), *exact(2 * y)]
    return [*made, *aug.state_dict().values(), *exact.state_dict().values()]


def single_ops():
    rng, x = torch.tensor([3, 4]), torch.randn(6, 40, 70)
    rows, cursor = torch.zeros(8, 40, 70), torch.tensor([0, 0, 0])
    drawn = ops.draw_params(rng, 6, (40, 70), fader_gain=1.0)
    views, sums = ops.augment_views(x, *drawn, rng)
    ops.bank_push_(rows, cursor, x)
    return [*drawn, views, sums, ops.normalize(views, sums), rows, cursor]


def blocks():
    results = []
    for inputs in (1, 3):
        x, weight = torch.randn(4, inputs, 24, 40), torch.randn(5, inputs, 3, 3)
        leaves = [t.requires_grad_() for t in (x, weight, torch.randn(5), torch.randn(5), torch.randn(5))]
        state = [torch.zeros(5), torch.ones(5), torch.tensor(0)]
        for training in (False, True):
            y = ops.conv_block(*leaves, *state, training=training)
            results += [y, *torch.autograd.grad(y, leaves, torch.randn_like(y)), *(t.clone() for t in state)]
    return results


def mixing():
    x, z, grad, lam = torch.randn(3, 5, 41, 50).unbind() + (torch.rand(5),)  # noqa: RUF005
    return [OPS.log_mixup_exp(x, z, lam), *OPS.log_mixup_exp_backward(grad, x, z, lam)]


def crops():
    x, crop = torch.randn(5, 40, 50), torch.tensor([[0, 3, 20, 60], [1, 0, 39, 75], [5, 5, 1, 1]] * 2)[:5].int()
    y = OPS.resize_crop(x, crop, [33, 70], [40, 75], "bicubic")
    return [y, OPS.resize_crop_backward(y, crop, [40, 50], [40, 75], "bicubic")]


def statistics():
    sums = OPS.sample_sums(torch.randn(9, 40, 50))
    state = [torch.zeros(()), torch.ones(()), torch.tensor(3), torch.tensor(1)]
    return [sums, OPS.batch_stats(sums, torch.float32), OPS.running_stats_(*state, sums, 9), *state]


def moving_average():
    target = [torch.randn(size) for size in (5, 9000, 1, 4097)]
    OPS.ema_update_(target, [torch.randn(len(t)) for t in target], torch.tensor(0.9))
    return target


CALLS = [log_mel, two_views, single_ops, blocks, mixing, crops, statistics, moving_average]


@pytest.mark.parametrize("call", CALLS)
def test_no_race_shows_when_programs_run_in_another_order(call, programs, monkeypatch):
    monkeypatch.setattr(importlib.import_module("byola_fast.ops._triton.shared"), "PROGRAMS_INTERPRETED", 7)
    results = []
    for order in (range, shuffled(0), shuffled(1)):
        programs.order = order
        torch.manual_seed(5)
        results.append(call())
    assert len(programs.chosen) > 1 or call is statistics
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_the_race_tests_launch_every_kernel(programs):
    for call in CALLS:
        call()
    for file in pkgutil.iter_modules(_triton.__path__):
        defined = vars(importlib.import_module(f"byola_fast.ops._triton.{file.name}"))
        assert {name for name in defined if name.endswith("_kernel")} <= programs.ran


NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for
HUGE = 2**26  # bytes; tensors above it have addresses but no contents


class Memory:
    """Huge tensors in address space that is never touched; every access is held against the tensors' bounds."""

    def __init__(self):
        self.regions, self.maps, self.written = [], [], {}

    def tensor(self, *shape, dtype=torch.float32):
        size = max(1, int(np.prod(shape, dtype=object))) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        self.maps.append(mmap.mmap(-1, size, flags=flags))
        x = torch.frombuffer(self.maps[-1], dtype=dtype).view(shape)
        self.regions.append((x.data_ptr(), x.data_ptr() + size))
        return x

    def small(self, x):
        self.regions.append((x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes()))
        return x

    def check(self, addresses, mask, size):
        """Return whether all addresses lie in a huge tensor; fail if one lies in none."""
        wanted = np.atleast_1d(addresses)[np.atleast_1d(mask).astype(bool)].ravel()
        if not wanted.size:
            return None
        low, high = int(wanted.min()), int(wanted.max()) + size
        inside = [(a, b) for a, b in self.regions if a <= low and high <= b]
        assert inside, f"address out of bounds: {low:#x} to {high:#x} of {[(hex(a), hex(b)) for a, b in self.regions]}"
        return inside[0] if inside[0][1] - inside[0][0] > HUGE else None


@pytest.fixture
def memory(monkeypatch, programs):
    """Allocations of launchers come from ``Memory``, and loads and stores of kernels are checked."""
    place, plain = Memory(), interpreter._interpreter
    empty = torch.empty

    class Checked:
        def load(self, addresses, mask, other, dtype):
            if place.check(addresses, mask, np.dtype(dtype).itemsize):
                return np.zeros(np.shape(addresses), dtype)
            return plain.load(addresses, mask, other, dtype)

        def store(self, addresses, values, mask):
            region = place.check(addresses, mask, np.asarray(values).dtype.itemsize)
            if region is None:
                return plain.store(addresses, values, mask)
            wanted = np.atleast_1d(addresses)[np.atleast_1d(mask).astype(bool)].ravel()
            place.written.setdefault(region[0], set()).update(int(a) - region[0] for a in wanted)
            return None

        def __getattr__(self, name):
            return getattr(plain, name)

    def allocate(shape, dtype):
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        return place.tensor(*shape, dtype=dtype) if size > HUGE else place.small(empty(shape, dtype=dtype))

    def new_empty(self, *shape, dtype=None, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return allocate(tuple(shape), dtype or self.dtype)

    monkeypatch.setattr(interpreter, "_interpreter", Checked())
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype=None, **_: allocate(tuple(x.shape), dtype or x.dtype))
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *_: None)
    programs.order = lambda count: sorted({0, count // 2, count - 1})
    return place


LONGEST = 2**31 - 64 * 2048 - 1  # samples that the kernel takes


@pytest.mark.parametrize(
    ("batch", "samples", "mels", "n_fft", "hop_length"),
    [
        (1, 2**30 + 4097, 3, 1024, 160),  # reflection at the end: 2 samples needs more than 31 bits
        (3, LONGEST, 2, 2048, 4096),
        (2, 2**25, 300, 64, 1),  # mels times frames
        (2**22, 1100, 64, 1024, 160),  # 2^22 x 64 x 7 log-mels
    ],
)
def test_proof_that_log_mel_stays_in_bounds(batch, samples, mels, n_fft, hop_length, memory, monkeypatch):
    from byola_fast.ops._triton import log_mel as module

    monkeypatch.setattr(module, "resident_programs", lambda x, per_sm: 2**40)
    wav = memory.tensor(batch, samples, dtype=torch.int16)
    bands = torch.tensor([[0, n_fft // 2 + 1]] * mels)
    given = torch.ones(n_fft), torch.ones(mels, n_fft // 2 + 1), bands, torch.zeros(2), n_fft, hop_length, True
    module._tables.clear()
    for tensor in (*given[:4], module.turns(n_fft, wav.device)):
        memory.small(tensor)
    lms = module.log_mel(wav, *given)
    frames = lms.shape[2]
    tile = 2 * module.LANES // module.RADICES[n_fft][0]
    last = range((frames - 1) // tile * tile, frames)
    wanted = {4 * (((batch - 1) * mels + mel) * frames + t) for mel in range(mels) for t in last}
    assert wanted <= memory.written.get(lms.data_ptr(), wanted)
