"""Every op of the CPU backend on arguments of any shape, layout, dtype and value, against the reference in float64.

Every argument has a random memory layout (permuted, sliced with NaN between, expanded, misaligned, lazily negated), and
the number of threads is random. The result must agree with the reference in float64, and must equal, bit for bit, the
result for contiguous copies on one thread.

    BYOLA_FAST_FUZZ=3000 python -m pytest tests/ops/test_fuzz_ops.py     # by hand
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layouts import EXACT, FLOATS, bits, fuzzed, lay_out, normal, threads, uniform
from helpers.oracle import random_crops
from helpers.tolerances import assert_close
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from byola_fast import RunningStats, ops
from byola_fast.ops import functional, reference
from byola_fast.spectrograms.statistics import batch_stats

INTERPOLATIONS = ["bilinear", "bicubic"]
SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 24), st.integers(1, 40))
OPS = torch.ops.byola_fast


def wide(arguments: list[Any]) -> list[Any]:
    """Convert float tensors to float64; keep all other arguments."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def plain(arguments: list[Any]) -> list[Any]:
    return [x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x for x in arguments]


def check(
    data: st.DataObject, op: Callable[..., Any], arguments: list[Any], definition: Callable[..., Any], factor: float = 1
) -> None:
    """Compare an op with its definition in float64 and with itself on contiguous copies; arguments must not change."""
    before = [bits(x) for x in plain(arguments) if isinstance(x, Tensor)]
    with threads(data.draw(st.integers(1, 3))):
        results = op(*arguments)
    with threads(1):
        same = op(*plain(arguments))
    expected = definition(*wide(arguments))
    if isinstance(results, Tensor):
        results, same, expected = (results,), (same,), (expected,)
    for result, other, wanted in zip(results, same, expected, strict=True):
        assert torch.equal(bits(result), bits(other))
        assert result.is_contiguous()
        assert result.shape == wanted.shape
        assert_close(result, wanted, factor)
    after = [bits(x) for x in arguments if isinstance(x, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@fuzzed
@given(st.data())
def test_log_mixup_exp(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    dtype, lam_dtype = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(FLOATS))
    x, z, grad = (lay_out(data, normal(data, shape, dtype)) for _ in range(3))
    lam = lay_out(data, uniform(data, shape[:1]).to(lam_dtype))
    check(data, ops.log_mixup_exp, [x, z, lam], reference.log_mixup_exp_reference)
    check(data, OPS.log_mixup_exp_backward, [grad, x, z, lam], reference.log_mixup_exp_backward_reference)


@fuzzed
@given(st.data())
def test_resize_crop(data):
    batch, mels, frames = shape = data.draw(SHAPES)
    dtype, interpolation = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(INTERPOLATIONS))
    canvas = mels + data.draw(st.integers(0, 12)), frames + data.draw(st.integers(0, 80))
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 150)))
    crop = random_crops(batch, canvas, torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))))
    crop = crop.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    x, grad = (lay_out(data, normal(data, of, dtype)) for of in (shape, (batch, *size)))
    crop = lay_out(data, crop, EXACT)
    check(data, ops.resize_crop, [x, crop, size, interpolation, canvas], lambda x, crop, size, interpolation, canvas:
          reference.resize_crop_reference(x, crop, list(size), list(canvas), interpolation))  # fmt: skip
    rest = [list(shape[1:]), list(canvas), interpolation]
    # one element of a small crop may gather all outputs
    gathered = 1 + size[0] * size[1] / 4
    check(data, OPS.resize_crop_backward, [grad, crop, *rest], reference.resize_crop_backward_reference, gathered)
    with_channel = ops.resize_crop(x[:, None], crop, size, interpolation, canvas)
    assert torch.equal(with_channel[:, 0], ops.resize_crop(x, crop, size, interpolation, canvas))


@fuzzed
@given(st.data())
def test_augment_views(data):
    batch, mels, frames = shape = data.draw(SHAPES)
    dtype = data.draw(st.sampled_from(FLOATS))
    interpolation, mixup = (
        data.draw(st.sampled_from(INTERPOLATIONS)),
        data.draw(st.sampled_from(["log", "linear", "gaussian", "none"])),
    )
    canvas = mels + data.draw(st.integers(0, 12)), frames + data.draw(st.integers(0, 80))
    size = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 60)))
    x = lay_out(data, normal(data, shape, dtype))
    pool = bank = count = stats = None
    rows = batch
    if data.draw(st.booleans()):
        rows = data.draw(st.integers(1, 6))
        pool = lay_out(data, normal(data, (rows, mels, frames), dtype))
    if data.draw(st.booleans()):
        filled = data.draw(st.integers(0, 7))
        bank_dtype = data.draw(st.sampled_from(FLOATS))
        bank = lay_out(data, normal(data, (7, mels, frames), bank_dtype))
        count = lay_out(data, torch.tensor(filled))
        rows = filled or rows
    if data.draw(st.booleans()):
        std = data.draw(st.floats(0.5, 4))
        stats_dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        stats = lay_out(data, torch.tensor([data.draw(st.floats(-5, 5)), std], dtype=stats_dtype), EXACT)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    count_of_views = data.draw(st.integers(1, 5))
    crop = torch.stack([random_crops(batch, canvas, generator) for _ in range(count_of_views)])
    index = torch.randint(-1, max(rows, 1), (count_of_views, batch), generator=generator).clamp_max(rows - 1)
    lam = uniform(data, (count_of_views, batch))
    fader = uniform(data, (count_of_views, batch, 2)) * 2 - 1
    rng = torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1)), data.draw(st.integers(0, 2**32 - 1))])
    parameters = [lay_out(data, each) for each in (lam, index, crop, fader, rng)]
    offset, first_view = data.draw(st.integers(0, 2**31)), data.draw(st.integers(0, 2**32 - 5))
    settings = [list(size), list(canvas), interpolation, mixup]
    arguments = [x, pool, bank, count, stats, *parameters, offset, first_view, *settings]

    def definition(x, *args):
        *given, size, canvas, interpolation, mixup = args
        out = torch.empty(count_of_views, x.shape[0], *size, dtype=torch.float64)
        sums = reference.augment_views_out_reference(x, *given, canvas, interpolation, mixup, out)
        return out, sums

    def op(*arguments):
        views, sums = OPS.augment_views(*arguments)
        return views, sums.float()  # sums of float32 values: checked with float32's tolerance

    elements = size[0] * size[1]
    check(data, lambda *a: op(*a)[0], arguments, lambda *a: definition(*a)[0], factor=2)
    check(data, lambda *a: op(*a)[1], arguments, lambda *a: definition(*a)[1], factor=2 * max(1, elements))
    names = ("pool", "bank", "bank_count", "stats")
    named = dict(zip(names, arguments[1:5], strict=True)) | {
        "interpolation": interpolation,
        "mixup": mixup,
        "sample_offset": offset,
        "first_view": first_view,
    }
    out = torch.empty(count_of_views, batch, *size, dtype=dtype)
    views, _ = ops.augment_views(x, *parameters, size=size, canvas=canvas, out=out, **named)
    assert views is out
    assert torch.equal(bits(out), bits(OPS.augment_views(*arguments)[0]))


@fuzzed
@given(st.data())
def test_draw_params(data):
    """Bit for bit, over the whole range of every parameter."""
    batch, pool = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 2**24))
    mels, frames = data.draw(st.tuples(st.integers(1, 3000), st.integers(1, 100_000)))
    scales = [data.draw(st.tuples(st.floats(0, 3), st.floats(0.01, 20)).map(sorted)) for _ in range(2)]
    canvas = [data.draw(st.floats(1, 3)) for _ in range(2)]
    rng = lay_out(data, torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1)), data.draw(st.integers(0, 2**40))]))
    count = data.draw(st.one_of(st.none(), st.integers(0, 2**24)))
    named = dict(
        mixup_ratio=data.draw(st.floats(0, 1)),
        fader_gain=data.draw(st.floats(0, 1e4)),
        freq_scale=scales[0],
        time_scale=scales[1],
        virtual_crop_scale=canvas,
        bank_count=None if count is None else torch.tensor(count),
        pool=pool,
        pool_offset=data.draw(st.integers(0, 2**24)),
        sample_offset=data.draw(st.integers(0, 2**40)),
        views=data.draw(st.integers(1, 7)),
        first_view=data.draw(st.integers(0, 2**32 - 1)),
    )
    assume(scales[1][1] * frames < 2**22)
    with threads(data.draw(st.integers(1, 3))):
        drawn = ops.draw_params(rng, batch, (mels, frames), **named)
    settled = [functional.size_range("", n, s) for n, s in zip((mels, frames), scales, strict=True)]
    size = functional.canvas_size(mels, frames, canvas)
    expected = reference.draw_params_reference(
        rng, named["bank_count"], batch, pool, named["pool_offset"], named["sample_offset"], *settled, size,
        named["mixup_ratio"], named["fader_gain"], named["views"], named["first_view"],
    )  # fmt: skip
    for got, wanted in zip(drawn, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(bits(got), bits(wanted))
    ops.resize_crop(torch.zeros(batch, 1, 1), drawn[2][-1], size=(1, 1), canvas=size)  # raises unless all boxes fit


@fuzzed
@given(st.data())
def test_sums_statistics_and_normalize(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 12), min_size=2, max_size=4)))
    dtype = data.draw(st.sampled_from(FLOATS))
    mean, std = data.draw(st.floats(-8, 8)), data.draw(st.floats(0.25, 4))
    x = lay_out(data, (mean + std * normal(data, shape, torch.float64)).to(dtype))
    exact = x.double()
    with threads(data.draw(st.integers(1, 3))):
        sums = ops.sample_sums(x)
    assert torch.equal(sums, ops.sample_sums(plain([x])[0]))
    expected = reference.sample_sums_reference(exact)
    size = float(exact.abs().max()) if x.numel() else 0.0
    per_sample = x.numel() // max(len(x), 1)
    for column, power in enumerate((0, 1, 2)):
        bound = 1e-6 * per_sample * max(size, 1.0) ** power  # from the partial sums in float32
        torch.testing.assert_close(sums[:, column], expected[:, column], rtol=0, atol=bound)

    spread = float(exact.std()) if x.numel() > 1 else 0.0
    if spread > 0.1:  # rounding errors dominate a smaller std
        wanted = torch.stack([exact.mean(), exact.std()])
        close = dict(rtol=1e-5, atol=1e-5 * max(size, 1))
        torch.testing.assert_close(batch_stats(x).double(), wanted, **close)
        given = lay_out(data, expected)
        conditioned = 2 * max(1.0, size / spread)
        if given.stride(0) and given.stride(1):  # an expanded tensor holds other sums
            check(data, ops.normalize, [x, given], reference.normalize_reference, conditioned)
    sums = lay_out(data, expected, EXACT)
    inplace = lay_out(data, x, EXACT)
    wanted = ops.normalize(inplace, sums)
    assert ops.normalize(inplace, sums, inplace=True) is inplace
    assert torch.equal(bits(inplace), bits(wanted))


@fuzzed
@given(st.data())
def test_running_stats(data):
    """Batches of any dtype and layout, with samples that are not finite and batches after the limit."""
    limit = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    running, seen, largest, counted = RunningStats(limit), [], 1.0, 0
    for _ in range(data.draw(st.integers(1, 6))):
        shape = (data.draw(st.integers(0, 4)), *data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
        x = lay_out(data, normal(data, shape, data.draw(st.sampled_from(FLOATS))))
        if len(x) and data.draw(st.booleans()) and x.stride(0):
            x = plain([x])[0]
            x[0].view(-1)[-1] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        stats = running.update(x)
        counted += x.numel() > 0
        if limit is None or counted <= limit:
            finite = x.double()[x.double().flatten(1).isfinite().all(1)]
            seen.append(finite.flatten())
            largest = max(largest, float(finite.abs().max()) if finite.numel() else 0)
        everything = torch.cat(seen) if seen else torch.empty(0)
        assert int(running.count) == len(everything)
        assert torch.equal(stats, running.stats())
        if len(everything):
            std = everything.std() if len(everything) > 1 else torch.zeros(())
            wanted = torch.stack([everything.mean(), std.double()])
            torch.testing.assert_close(stats.double(), wanted, rtol=2e-5, atol=2e-5 * largest)


@fuzzed
@given(st.data())
def test_bank_push(data):
    """Rows and cursor of any allowed dtype and layout; the written rows follow the definition."""
    n_memory, mels, frames = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40)))
    rows_dtype = data.draw(st.sampled_from(FLOATS))
    rows = normal(data, (n_memory, mels, frames), rows_dtype)
    rows = lay_out(data, rows, ["contiguous", "offset"])
    state = [data.draw(st.integers(0, n_memory - 1)), data.draw(st.integers(0, n_memory)), data.draw(st.integers(0, 9))]
    cursor = lay_out(data, torch.tensor(state), ["contiguous", "offset"])
    stats = None
    if data.draw(st.booleans()):
        stats = lay_out(data, torch.tensor([data.draw(st.floats(-3, 3)), data.draw(st.floats(0.5, 3))]), EXACT)
    twin, cursor_twin = rows.double(), cursor.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        x = lay_out(
            data, normal(data, (data.draw(st.integers(0, 12)), mels, frames), data.draw(st.sampled_from(FLOATS)))
        )
        for place in data.draw(st.sets(st.integers(0, 11), max_size=3)):
            if place < len(x) and x.stride(0):
                x = x.clone()
                x[place, -1, -1] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        ops.bank_push_(rows, cursor, x, stats)
        reference.bank_push__reference(twin, cursor_twin, x.double(), None if stats is None else stats.double())
        assert cursor.tolist() == cursor_twin.tolist()
    assert_close(rows, twin, factor=2)


@fuzzed
@given(st.data())
def test_ema_update(data):
    """Bit for bit, for any layout: three specified roundings."""
    target, online = [], []
    for _ in range(data.draw(st.integers(0, 5))):
        shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        half = [torch.float16, torch.bfloat16] if dtype == torch.float32 else []
        target.append(lay_out(data, normal(data, shape, dtype), EXACT))
        online.append(lay_out(data, normal(data, shape, data.draw(st.sampled_from([dtype, *half])))))
    decay = data.draw(st.floats(0, 1))
    kept, twin = [o.clone() for o in online], [t.clone() for t in target]
    reference.ema_update__reference(twin, online, torch.tensor(decay, dtype=torch.float64))
    with threads(data.draw(st.integers(1, 3))):
        ops.ema_update_(target, online, decay)
    for t, wanted, o, k in zip(target, twin, online, kept, strict=True):
        assert torch.equal(bits(t), bits(wanted))
        assert torch.equal(o, k)


@fuzzed
@given(st.data())
def test_log_mel(data):
    n_fft = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 243, 256])))
    hop, center = data.draw(st.integers(1, 300)), data.draw(st.booleans())
    minimum = n_fft // 2 + 1 if center else n_fft
    batch, samples = data.draw(st.integers(0, 3)), minimum + data.draw(st.integers(0, 120 * hop if hop < 9 else 900))
    dtype = data.draw(st.sampled_from([*FLOATS, torch.int16]))
    values = 0.05 * normal(data, (batch, samples), torch.float64)
    wav = lay_out(data, (32768 * values).clamp(-32768, 32767).short() if dtype == torch.int16 else values.to(dtype))
    window = lay_out(data, uniform(data, (data.draw(st.integers(1, n_fft)),), data.draw(st.sampled_from(FLOATS))) + 0.1)
    bins, mels = n_fft // 2 + 1, data.draw(st.integers(0, 6))
    bank = lay_out(data, uniform(data, (mels, bins), data.draw(st.sampled_from(FLOATS))) + 0.05)
    bands = ops.mel_bands(bank).to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    stats = lay_out(data, torch.tensor([-3.0, 2.0]), EXACT) if data.draw(st.booleans()) else None
    tensors = [wav, window, bank, lay_out(data, bands, EXACT), stats]

    def op(wav, window, bank, bands, stats):
        return ops.log_mel(wav, window, bank, bands, n_fft=n_fft, hop_length=hop, center=center, stats=stats)

    def definition(wav, *others):
        exact = wav.double() / 32768 if wav.dtype == torch.int16 else wav
        return reference.log_mel_reference(exact, *others, n_fft, hop, center)

    check(data, op, tensors, definition, factor=6)


@pytest.mark.parametrize("canvas", [(2**40, 16), (8, 2**40), (2**31, 2**31), (2**62, 2**62), (2**33, 16)])
def test_a_canvas_out_of_all_proportion_is_refused(canvas):
    """Sizes beyond int32 once made kernels write out of bounds."""
    x, out = torch.randn(2, 8, 16), torch.empty(2, 2, 8, 16)
    crop = torch.tensor([[0, 0, canvas[0], canvas[1]]] * 2)
    for call in (
        lambda: ops.resize_crop(x, crop, canvas=canvas),
        lambda: ops.resize_crop(x, crop[:, [0, 0, 0, 0]] + 1, size=canvas),
        lambda: functional.canvas_size(8, 16, (canvas[0] / 8, canvas[1] / 16)),
    ):
        with pytest.raises(ValueError, match=r"fewer than 2\^31"):
            call()
    two = [torch.rand(2, 2), torch.zeros(2, 2).long(), torch.stack([crop] * 2), torch.zeros(2, 2, 2)]
    for call in (
        lambda: OPS.resize_crop(x, crop, [8, 16], list(canvas), "bilinear"),
        lambda: OPS.resize_crop_backward(x, crop, [8, 16], list(canvas), "bilinear"),
        lambda: OPS.augment_views_out(
            x, None, None, None, None, *two, torch.tensor([1, 2]), 0, 0, list(canvas), "bilinear", "log", out
        ),
    ):
        with pytest.raises(RuntimeError, match=r"fewer than 2\^31"):
            call()


def test_a_hop_that_overflows_int64_gives_one_frame():
    """Unused lanes of the kernel once read at multiples of the hop."""
    wav, window, bank = torch.randn(3, 2000), torch.ones(64), torch.ones(2, 33)
    one = ops.log_mel(wav, window, bank, n_fft=64, hop_length=2100)
    assert one.shape == (3, 2, 1)
    for hop in (2**61 - 10**12, 2**62, 2**63 - 1):
        assert torch.equal(ops.log_mel(wav, window, bank, n_fft=64, hop_length=hop), one)


@pytest.mark.parametrize("next_row", [-1, -7, 2**62, -(2**63)])
def test_a_damaged_cursor_stays_inside_the_bank(next_row):
    memory = torch.zeros(9, 2, 3)
    cursor = torch.tensor([next_row, 0, 0])
    ops.bank_push_(memory[3:6], cursor, torch.ones(2, 2, 3))
    assert memory[3:6].sum() == 12
    assert memory.sum() == 12
    assert cursor.tolist() == [(next_row + 2) % 3, 2, 0]
