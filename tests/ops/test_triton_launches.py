"""Compile launches for an H200 on any machine, with the arguments a GPU would get, without running them.

Triton compiles a separate variant for sizes that are 1, multiples of 16 or wider than 32 bits, and for each alignment
of pointers. The interpreter has no variants, and ``test_triton_aot.py`` does not try these.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from byola_fast.ops import _schemas, _triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_triton.interpreted(), reason="the interpreter replaces the compiler"),
]


class FakeDriver:
    """The methods of a driver that the compiler calls."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


@pytest.fixture
def launched(monkeypatch):
    """Compile launches without running them; the list of their (name, kernel)."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from byola_fast.ops._triton import shared

    monkeypatch.setattr(driver, "_active", FakeDriver())
    seen, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append((self.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(shared, "KEEP", False)
    for file in sorted(set(_schemas.LAUNCHERS.values())):
        module = importlib.import_module(f"byola_fast.ops._triton.{file}")
        for kernel in (value for value in vars(module).values() if isinstance(value, JITFunction)):
            kernel.device_caches.clear()  # kernels of a real GPU
        if hasattr(module, "approximate"):
            monkeypatch.setattr(module, "approximate", lambda x: x.dtype != torch.float64)
        if hasattr(module, "resident_programs"):
            monkeypatch.setattr(module, "resident_programs", lambda x, per_sm: 132 * per_sm)
    yield seen
    for file in set(_schemas.LAUNCHERS.values()):
        for kernel in vars(importlib.import_module(f"byola_fast.ops._triton.{file}")).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()


def variants(launched):
    return len({id(kernel) for _name, kernel in launched})


def make_views(
    batch,
    shape,
    size,
    *,
    interpolation="bilinear",
    mixup="log",
    dtype=torch.float32,
    bank=None,
    offset=0,
    pool=None,
    views=2,
    first_view=0,
):
    from byola_fast.ops._triton import augment_views as module

    rows = None if bank is None else torch.zeros(bank, *shape, dtype=torch.float16)
    others = None if pool is None else torch.zeros(pool, *shape, dtype=dtype)
    index, crop = torch.zeros(views, batch, dtype=torch.int64), torch.ones(views, batch, 4, dtype=torch.int32)
    drawn = torch.rand(views, batch), index, crop
    given = (others, rows, None if bank is None else torch.tensor(1), torch.zeros(2), *drawn)
    out = torch.empty(views, batch, *size, dtype=dtype)
    canvas = [shape[0], int(1.5 * shape[1])]
    module.augment_views_out(
        torch.zeros(batch, *shape, dtype=dtype),
        *given,
        torch.zeros(views, batch, 2),
        torch.zeros(2).long(),
        offset,
        first_view,
        canvas,
        interpolation,
        mixup,
        out,
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("batch", "shape", "size", "settings"),
    [
        (1, (1, 1), (1, 1), {"bank": 1, "pool": 1, "offset": 1}),
        (3, (63, 1), (1, 300), {"dtype": torch.bfloat16, "offset": 2**33}),
        (2, (1, 97), (5, 1), {"mixup": "gaussian", "dtype": torch.float64, "bank": 5}),
        (3, (64, 96), (32, 32), {"views": 16, "first_view": 2**31 + 1, "bank": 5}),
        (1, (63, 97), (63, 97), {"views": 1, "first_view": 1, "mixup": "gaussian", "bank": 5}),
    ],
)
def test_views(batch, shape, size, settings, interpolation, launched):
    make_views(batch, shape, size, interpolation=interpolation, **settings)
    assert [name for name, _kernel in launched] == ["augment_views_kernel"]


def test_another_batch_size_compiles_nothing(launched):
    from byola_fast.ops._triton import bank_push, log_mel

    for batch, offset in ((32, 0), (31, 1), (1, 31)):
        make_views(batch, (16, 16), (16, 16), bank=64, offset=offset, pool=batch)
    assert variants(launched) == 1
    launched.clear()
    for batch, samples in ((32, 1600), (31, 1632), (1, 1616)):
        bank, cursor = torch.zeros(16, 4, 4), torch.zeros(3).long()
        bank_push.bank_push_(bank, cursor, torch.zeros(batch, 4, 4), None)
        given = torch.zeros(64), torch.zeros(5, 33), torch.zeros(5, 2).int(), None, 64, 16, True
        log_mel.log_mel(torch.zeros(batch, samples), *given)
    assert variants(launched) <= 4  # numbers of frames: multiples of 16 and others


def fuse_views(monkeypatch, shape, *, dtype=torch.float32, bank=torch.float32):
    """Launch both views of ``shape``, with memory of the dtype ``bank``, if any."""
    from byola_fast.ops._triton import exact_views, two_views

    monkeypatch.setattr(exact_views, "approximate", lambda x: True)
    x, rng = torch.zeros(shape, dtype=dtype), torch.zeros(2).long()
    memory = (None, None) if bank is None else (torch.zeros(2048, *shape[1:], dtype=bank), torch.zeros(3).long())
    ranges = [[0, 1], [2**45, 2**20], [shape[1], int(1.5 * shape[2])]]
    given = (x, None, *memory, torch.zeros(2), rng, 0, 0, *ranges, 0.4, 1.0, "bilinear", "log", True, True)
    two_views.two_views_(*given, x.new_empty(2, *shape))


def test_another_batch_of_exact_views_compiles_nothing(launched, monkeypatch):
    for batch in (256, 31, 1):
        fuse_views(monkeypatch, (batch, 64, 96))
    assert {name for name, _kernel in launched} == {"exact_views_kernel", "finish_exact_views_kernel"}
    assert variants(launched) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_views_of_every_dtype_of_memory(dtype, launched, monkeypatch):
    for bank in (None, torch.float32, torch.bfloat16, torch.float16):
        fuse_views(monkeypatch, (2, 16, 32), dtype=dtype, bank=bank)
    assert {name for name, _kernel in launched} == {"exact_views_kernel", "finish_exact_views_kernel"}


def test_views_of_one_output_a_lane_are_not_exact(launched, monkeypatch):
    """Each lane would fuse its only square into the sum of squares, and lanes write sums that differ."""
    fuse_views(monkeypatch, (2, 8, 32))
    assert {name for name, _kernel in launched} == {"two_views_kernel", "finish_views_kernel"}


@pytest.mark.parametrize(
    ("hop_length", "mels", "dtype"), [(1, 1, torch.float32), (64, 1, torch.int16), (128, 80, torch.bfloat16)]
)
def test_log_mels(hop_length, mels, dtype, launched):
    from byola_fast.ops._triton import log_mel

    given = torch.zeros(9), torch.zeros(mels, 33), torch.zeros(mels, 2).long(), torch.zeros(2), 64, hop_length
    log_mel.log_mel(torch.zeros(1, 64).to(dtype), *given, False)
    assert len(launched) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (2, 7, 1)])
def test_all_others(shape, dtype, launched):
    from byola_fast.ops._triton import bank_push, draw_params, log_mixup_exp, normalize
    from byola_fast.ops._triton import resize_crop as resize

    x, lam, canvas = torch.zeros(shape, dtype=dtype), torch.rand(shape[0]), [shape[1], int(1.5 * shape[2])]
    crop, sums = torch.ones(shape[0], 4, dtype=torch.int64), normalize.sample_sums(x)
    log_mixup_exp.log_mixup_exp(x, x, lam)
    log_mixup_exp.log_mixup_exp_backward(x, x, x, lam)
    for interpolation in ("bilinear", "bicubic"):
        resize.resize_crop(x.transpose(1, 2), crop, [1, 1], [shape[2], shape[1]], interpolation)
        resize.resize_crop_backward(
            torch.zeros(shape[0], 2, 1, dtype=dtype), crop, list(shape[1:]), canvas, interpolation
        )
    normalize.normalize(x, sums)
    stats = normalize.batch_stats(sums, dtype)
    state = [torch.zeros(()), torch.zeros(()), torch.tensor(0), torch.tensor(0)]
    normalize.running_stats_(*state, sums, 1)
    bank_push.bank_push_(torch.zeros(1, *shape[1:]), torch.zeros(3).long(), x, stats)
    for count in (None, torch.tensor(1)):
        ranges = [0, 1], [2**45, 2**20], canvas, 1.0, 0.0
        for views in ((2, 0), (1, 1), (16, 2**32 - 1)):
            draw_params.draw_params(torch.zeros(2).long(), count, shape[0], 1, 1, 2**40, *ranges, *views)
    assert len(launched) == 20


@pytest.mark.parametrize("online", [torch.float32, torch.float16, torch.bfloat16])
def test_the_moving_average(online, launched):
    from byola_fast.ops._triton import ema_update

    target = [torch.zeros(5)[1:], torch.zeros(4)]
    ema_update.ema_update_(target, [torch.zeros(4, dtype=online), torch.zeros(4, dtype=online)], torch.tensor(0.5))
    assert variants(launched) == 2  # aligned and not
