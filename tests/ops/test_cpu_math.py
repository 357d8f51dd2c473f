"""exp and log of the C++ kernels in every binade, and the kernels built for every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cpu_math import check_math
from helpers.layouts import threads

import byola_fast

CHECK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from helpers import oracle
from helpers.tolerances import assert_close
from byola_fast import augment, ops
from byola_fast.ops._native import cpu
from helpers.cpu_math import check_math
torch.manual_seed(1)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for shape in ((5, 64, 96), (3, 63, 97), (2, 5, 7), (2, 1, 1), (2, 9, 400)):
        for interpolation in ("bilinear", "bicubic"):
            x = (2 * torch.randn(shape) - 1).to(dtype)
            *_, params = augment(x, seed=3, preset="byola-v2", return_params=True)
            given = dict(params=params, stats=(-1, 2), preset="byola-v2", post_norm=False)
            got = augment(x, interpolation=interpolation, **given)
            assert_close(torch.stack(got), oracle.views(x, params, stats=(-1.0, 2.0), interpolation=interpolation))
            crop = params.crop[0]
            wide = x.double().requires_grad_()
            if shape[2] < 9:
                assert torch.autograd.gradcheck(lambda x: ops.resize_crop(x, crop, interpolation=interpolation), wide)
for inputs in (1, 5):
    x, weight = torch.randn(3, inputs, 9, 11), torch.randn(70, inputs, 3, 3)
    given, eps = [x, weight, *torch.randn(3, 70)], (None, None, 1e-5)
    out, *kept = torch.ops.byola_fast.conv_block(*given, *eps, torch.float32)
    wide, *exact = torch.ops.byola_fast.conv_block(*(t.double() for t in given), *eps, torch.float64)
    torch.testing.assert_close(out.double(), wide, rtol=1e-5, atol=1e-5)
    got = torch.ops.byola_fast.conv_block_backward(out, *given[:2], given[3], *kept, False, True)
    exact = (wide, x.double(), weight.double(), given[3].double(), *exact, False, True)
    for a, b in zip(got, torch.ops.byola_fast.conv_block_backward(*exact), strict=True):
        assert (a - b).norm() <= 5e-6 * b.norm()
check_math()
print(cpu.in_use().split(",")[0])
"""


def test_exp_and_log_over_every_binade():
    byola_fast.doctor()  # loads the kernels
    check_math()


CAPABILITIES = {"default": "portable", "avx2": "AVX2", "avx512": "AVX-512"}
LEVELS = ["DEFAULT", "AVX2", "AVX512"]
HERE = list(CAPABILITIES)[: LEVELS.index(torch.backends.cpu.get_cpu_capability()) + 1]


@pytest.mark.slow
@pytest.mark.parametrize("capability", HERE)
def test_every_instruction_set_of_this_machine(capability):
    """Kernels for an older instruction set of this CPU give the same views."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "BYOLA_FAST_STRICT": "1"}
    code = CHECK.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == CAPABILITIES[capability]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_same_answer_for_any_number_of_threads(interpolation):
    x = torch.randn(37, 63, 97)
    answers = []
    for count in (1, 2, 3, 8):
        with threads(count):
            answers.append(torch.stack(byola_fast.augment(x, seed=1, preset="byola-v2", interpolation=interpolation)))
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])


def test_no_memory_of_the_size_of_the_batch_is_allocated():
    """Besides the reused output, torch allocates only parameters and sums, O(B)."""
    x = torch.randn(64, 64, 96)
    out = torch.empty(2, 64, 64, 96)
    byola_fast.augment(x, seed=1, out=out)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        byola_fast.augment(x, seed=1, out=out)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < x.nbytes // 20
