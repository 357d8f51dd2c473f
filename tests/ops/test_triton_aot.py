"""Compile every Triton kernel ahead of time, on any machine: no spills, and resources within budget."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import kernels
from byola_fast.ops import _triton

# kernel: maximum registers per thread, maximum bytes of shared memory, minimum programs per SM; all architectures
BUDGETS = {
    "augment_views, bilinear": (64, 128, 4),
    "augment_views, bilinear, bf16": (64, 128, 4),
    "augment_views, bicubic": (64, 128, 4),
    "augment_views, bicubic, bf16": (64, 128, 4),
    "augment_views, Gaussian": (64, 128, 4),
    "two_views": (80, 128, 3),
    "two_views, bf16": (80, 128, 3),
    "two_views, bicubic": (80, 128, 3),
    "finish_views": (64, 128, 4),
    "exact_views": (64, 28 * 1024, 4),
    "exact_views, bf16": (64, 28 * 1024, 4),
    "exact_views, bicubic": (64, 28 * 1024, 4),
    "finish_exact_views": (64, 256, 4),
    "draw_params": (40, 0, 12),
    "write_inputs": (32, 0, 16),
    "ema_update": (56, 64, 4),
    "ema_update, bf16 online": (56, 8192, 4),
    "normalize": (64, 64, 4),
    "sample_sums": (64, 64, 8),
    "batch_stats": (56, 64, 8),
    "running_stats": (56, 64, 8),
    "bank_push, flags": (48, 64, 10),
    "bank_push, rows": (64, 64, 8),
    "log_mel": (168, 16384, 3),
    "log_mel, int16, 256": (168, 16384, 3),
    "log_mixup_exp": (40, 0, 12),
    "log_mixup_exp, backward": (48, 0, 10),
    "resize_crop, bilinear": (48, 0, 10),
    "resize_crop, bicubic": (96, 0, 5),
    "resize_crop, backward": (40, 0, 12),
    "conv_block, moments": (96, 64, 5),
    "conv_block, first statistics": (72, 2048, 7),
    "conv_block, first": (160, 0, 3),
    "conv_block, first sums": (160, 1024, 3),
    "conv_block, first backward": (216, 128, 2),
    "conv_block, sums": (120, 1024, 4),
    "conv_block, statistics": (56, 128, 9),
    "conv_block, frozen": (40, 0, 12),
    "conv_block, pool": (56, 0, 9),
    "conv_block, pooled sums": (64, 512, 8),
    "conv_block, norm backward": (56, 128, 9),
    "conv_block, unpool": (72, 0, 7),
    "conv_block, running": (40, 0, 12),
}
MEASURED = {"log_mel": (80, 90)}  # on sm_100 8 bytes are spilled; `python -m benchmarks.gpu.kernels` prints all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_triton.interpreted(), reason="the interpreter replaces the compiler"),
]


@pytest.mark.parametrize(
    ("name", "architecture"), [(name, a) for name in BUDGETS for a in MEASURED.get(name, kernels.ARCHITECTURES)]
)
def test_resources(name, architecture):
    found = kernels.measure(name, architecture)
    registers, shared, programs = BUDGETS[name]
    assert found.spilled == 0
    assert found.registers <= registers
    assert found.shared <= shared
    assert found.programs >= programs


@pytest.mark.parametrize("name", BUDGETS)
def test_sizes_of_one_compile(name):
    """Triton makes a constant of an integer that is 1, which has none of a tensor's methods."""
    variant = kernels.variants()[name]
    file, kernel = variant.kernel.split(".")
    made = getattr(importlib.import_module(f"byola_fast.ops._triton.{file}"), kernel)
    taken = {*variant.pointers, *variant.constants, *kernels.FLOATS}
    ones = [p.name for p in made.params if not (p.is_constexpr or p.do_not_specialize or p.name in taken)]
    compiled = kernels.compile_variant(replace(variant, constants=variant.constants | dict.fromkeys(ones, 1)), 90)
    assert compiled.asm["cubin"]


def test_every_kernel_has_a_budget():
    assert set(BUDGETS) == set(kernels.variants())
    compiled = {variant.kernel for variant in kernels.variants().values()}
    for file in pkgutil.iter_modules(_triton.__path__):
        source = importlib.import_module(f"byola_fast.ops._triton.{file.name}")
        defined = {name for name in vars(source) if name.endswith("_kernel")}
        assert defined <= {kernel.split(".")[1] for kernel in compiled}


def test_triton_is_not_imported_before_it_is_used():
    code = "import sys, torch, byola_fast; byola_fast.augment(torch.zeros(2, 4, 6)); assert 'triton' not in sys.modules"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_programs_per_sm_of_log_mel_are_those_its_launcher_assumes():
    assert [kernels.measure("log_mel, int16, 256", a).programs for a in kernels.ARCHITECTURES] == [3, 4, 3]


def test_two_views_asks_for_the_registers_it_has_here(monkeypatch):
    from byola_fast.ops._triton import two_views

    for architecture, limit in kernels.variants()["two_views"].max_registers.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, a=architecture: divmod(a, 10))
        x = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=None)
        assert two_views.of_device(x).get("maxnreg", two_views.views_file.REGISTERS) == limit


def test_the_views_fill_an_h200_in_one_wave():
    """At least 2 x 256 programs, one per view, run at a time on 132 multiprocessors."""
    names = "augment_views, bilinear", "two_views", "two_views, bf16", "two_views, bicubic"
    for name in (*names, "exact_views", "exact_views, bf16", "exact_views, bicubic", "finish_exact_views"):
        assert kernels.measure(name, 90).programs * 132 >= 2 * 256
