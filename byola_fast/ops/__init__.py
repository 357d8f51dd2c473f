"""Ops on log-mel spectrograms: the contract is in ``functional``, the schemas in ``_schemas``.

A call takes three hops: ``ops.log_mixup_exp`` -> ``torch.ops.byola_fast.log_mixup_exp`` -> the backend's kernel.
"""

from byola_fast.ops import _autograd as _autograd
from byola_fast.ops import _schemas as _schemas
from byola_fast.ops import _triton
from byola_fast.ops._dispatch import BackendError
from byola_fast.ops._native import cpu as _cpu
from byola_fast.ops._native import cuda as _cuda
from byola_fast.ops.frontend import log_mel, mel_bands, num_frames
from byola_fast.ops.functional import (
    augment_views,
    bank_push_,
    canvas_size,
    draw_params,
    ema_update_,
    log_mixup_exp,
    normalize,
    resize_crop,
    sample_sums,
)

__all__ = [
    "BackendError",
    "augment_views",
    "bank_push_",
    "canvas_size",
    "draw_params",
    "ema_update_",
    "log_mel",
    "log_mixup_exp",
    "mel_bands",
    "normalize",
    "num_frames",
    "resize_crop",
    "sample_sums",
]

_cuda.install()
_triton.install()
_cpu.install()
