"""Ops on log-mel spectrograms: the contract is in ``functional``, the schemas in ``_library``.

A call takes three hops: ``ops.log_mixup_exp`` -> ``torch.ops.byola_fast.log_mixup_exp`` -> the backend's kernel.
"""

from byola_fast.ops import _autograd as _autograd
from byola_fast.ops import _extension as _extension
from byola_fast.ops import _extension_cuda as _extension_cuda
from byola_fast.ops import _library as _library
from byola_fast.ops import _triton
from byola_fast.ops._backends import BackendError
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

_extension_cuda.install()
_triton.install()
_extension.install()
