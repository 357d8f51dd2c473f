"""What each Triton kernel executes on sm_90, counted in its machine code: within budget, and counted right."""

from __future__ import annotations

import pytest

from benchmarks.gpu import counts, kernels, step_bytes
from byola_fast.ops import _triton

# kernel: maximum instructions, rounds of loads and barriers of a warp, at the shape of benchmarks/gpu/counts.py
BUDGETS = {
    "augment_views, bilinear": (1800, 9, 5),
    "augment_views, bilinear, bf16": (2000, 15, 5),
    "augment_views, bicubic": (2450, 20, 5),
    "augment_views, bicubic, bf16": (2700, 26, 5),
    "augment_views, Gaussian": (2950, 13, 5),
    "two_views": (2250, 11, 6),
    "two_views, bf16": (2450, 17, 6),
    "two_views, bicubic": (2950, 19, 6),
    "finish_views": (440, 3, 3),
    "exact_views": (1300, 5, 4),
    "exact_views, bf16": (1450, 7, 4),
    "exact_views, bicubic": (1650, 6, 4),
    "finish_exact_views": (490, 4, 6),
    "draw_params": (390, 2, 0),
    "write_inputs": (25, 0, 0),
    "ema_update": (130, 4, 0),
    "ema_update, bf16 online": (180, 3, 3),
    "normalize": (440, 3, 5),
    "sample_sums": (380, 7, 3),
    "batch_stats": (240, 1, 5),
    "running_stats": (310, 2, 5),
    "bank_push, flags": (650, 13, 1),
    "bank_push, rows": (700, 11, 5),
    "log_mel": (2550, 22, 10),
    "log_mel, int16, 256": (2100, 18, 10),
    "log_mixup_exp": (170, 1, 0),
    "log_mixup_exp, backward": (310, 1, 0),
    "resize_crop, bilinear": (760, 7, 0),
    "resize_crop, bicubic": (1950, 19, 0),
    "resize_crop, backward": (640, 6, 0),
    "conv_block, moments": (7500, 33, 111),
    "conv_block, first statistics": (2500, 10, 70),
    "conv_block, first": (42000, 126, 0),
    "conv_block, first sums": (40500, 63, 59),
    "conv_block, first backward": (3550, 30, 100),
    "conv_block, sums": (3450, 13, 17),
    "conv_block, statistics": (1250, 8, 20),
    "conv_block, frozen": (120, 1, 0),
    "conv_block, pool": (450, 3, 0),
    "conv_block, pooled sums": (4050, 48, 11),
    "conv_block, norm backward": (1100, 7, 20),
    "conv_block, unpool": (540, 4, 0),
    "conv_block, running": (110, 2, 0),
}

on_the_compiler = pytest.mark.skipif(_triton.interpreted(), reason="the interpreter replaces the compiler")


@pytest.mark.slow
@on_the_compiler
@pytest.mark.parametrize("name", BUDGETS)
def test_executed(name):
    found = counts.count(name)
    instructions, rounds, barriers = BUDGETS[name]
    assert 0.8 * instructions <= found.instructions <= instructions
    assert found.rounds <= rounds
    assert found.barriers <= barriers


def test_every_kernel_has_a_budget():
    assert set(BUDGETS) == set(counts.WORK) == set(kernels.variants())


def code(*lines):
    numbered = [line if line.startswith(".L") else f"        /*{n:04x}*/  {line} ;" for n, line in enumerate(lines)]
    return "\n".join(numbered)


def test_loops_rounds_and_branches_are_counted():
    text = code(
        "@P0 BRA `(.L_x_1)",  # skips a call: taken
        "CALL.REL.NOINC `(slow)",
        ".L_x_1:",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        ".L_x_2:",
        "FADD R0, R0, R7",  # waits for the load of the trip before
        "FADD R0, R0, R6",
        "LDG.E R7, desc[UR4][R2.64]",
        "LDG.E R8, desc[UR4][R2.64+0x4]",
        "@P1 BRA `(.L_x_3)",  # the second conditional branch
        "STS.64 [R9], R2",
        ".L_x_3:",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "@!P1 BRA `(.L_x_2)",
        "STG.E.U16 desc[UR4][R2.64], R8",  # waits
        "EXIT",
        ".L_x_4:",
        "BRA `(.L_x_4)",
    )
    found = counts.walk(text, counts.Work(1, (5,)))
    assert found == counts.Count(2 + 5 * 8 + 2, 5 + 1, 5, 512 + 5 * 256, 64, 5 * 256)
    shorter = counts.walk(text, counts.Work(1, (5,), (1,)))
    assert (shorter.instructions, shorter.shared) == (found.instructions - 5, 0)
    assert counts.walk(text, counts.Work(1, (0,))).instructions == 4
    with pytest.raises(ValueError, match="expected one for each loop"):
        counts.walk(text, counts.Work(1))


@on_the_compiler
def test_the_host_takes_time():
    pytest.importorskip("triton")
    assert 0 < counts.host_us("normalize", 2) < 1e4


def test_a_training_step_moves_a_third_of_the_bytes_of_the_layers():
    """Of the networks at B = 256, 2048-d, bfloat16, with Adam and EMA; counted from the sizes of all arguments."""
    pytest.importorskip("triton")
    ours, layers = (step_bytes.count(fused=fused) for fused in (True, False))
    assert ours.total() <= 5.5e9
    assert layers.total() >= 2.9 * ours.total()
    pooled, given = 256 * 64 * 32 * 48, 4 * 256 * 64 * 96
    # four passes; values in bfloat16, and in those of the online network the place of each maximum
    assert ours["first_forward_kernel"] == pytest.approx(4 * (2 * pooled + given) + 2 * pooled, rel=1e-3)
    assert ours["first_sums_kernel"] == pytest.approx(2 * (3 * pooled + given), rel=0.05)
