# mypy: ignore-errors
"""y = log((1 - lam) exp(x) + lam exp(z) + eps) and its gradients, elementwise (BYOL-A, arXiv:2103.06695).

Forward reads x and z and writes y, 12 bytes per element in float32; backward also reads the gradient and writes two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import EPS, approximate, compute_type, launch, mix_log, on_device

BLOCK = 1024


@triton.jit
def place(count, BLOCK: tl.constexpr):
    """Return a program's sample and the elements of its chunk, numbered in the tensor and in the sample."""
    chunks = tl.cdiv(count, BLOCK)
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    n = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return sample, sample * count + n, n


@triton.jit
def log_mixup_exp_kernel(x, z, lam, y, count, COMPUTE: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr):
    sample, offset, n = place(count, BLOCK)
    weight = tl.load(lam + sample).to(COMPUTE)
    near = tl.load(x + offset, n < count, other=0).to(COMPUTE)
    far = tl.load(z + offset, n < count, other=0).to(COMPUTE)
    tl.store(y + offset, mix_log(near, far, weight, APPROXIMATE), n < count)


@triton.jit
def log_mixup_exp_backward_kernel(grad, x, z, lam, to_x, to_z, count, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    sample, offset, n = place(count, BLOCK)
    weight = tl.load(lam + sample).to(COMPUTE)
    of_x = (1 - weight) * tl.exp(tl.load(x + offset, n < count, other=0).to(COMPUTE))
    of_z = weight * tl.exp(tl.load(z + offset, n < count, other=0).to(COMPUTE))
    scaled = tl.load(grad + offset, n < count, other=0).to(COMPUTE) / (of_x + of_z + EPS)
    tl.store(to_x + offset, scaled * of_x, n < count)
    tl.store(to_z + offset, scaled * of_z, n < count)


def log_mixup_exp(x: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel():
        count = y.numel() // len(y)
        with on_device(x):
            launch(
                log_mixup_exp_kernel,
                len(y) * triton.cdiv(count, BLOCK),
                x.contiguous(),
                z.contiguous(),
                lam.contiguous(),
                y,
                count,
                COMPUTE=compute_type(x.dtype),
                APPROXIMATE=approximate(x),
                BLOCK=BLOCK,
            )
    return y


def log_mixup_exp_backward(grad: Tensor, x: Tensor, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    to_x, to_z = x.new_empty(x.shape), z.new_empty(z.shape)
    if to_x.numel():
        count = to_x.numel() // len(to_x)
        with on_device(x):
            launch(
                log_mixup_exp_backward_kernel,
                len(to_x) * triton.cdiv(count, BLOCK),
                grad.contiguous(),
                x.contiguous(),
                z.contiguous(),
                lam.contiguous(),
                to_x,
                to_z,
                count,
                COMPUTE=compute_type(x.dtype),
                BLOCK=BLOCK,
            )
    return to_x, to_z
