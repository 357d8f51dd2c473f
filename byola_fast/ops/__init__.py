"""Ops on log-mel spectrograms: the contract is in ``functional``, the table of ops in ``_schemas``.

A call takes three hops: ``ops.log_mixup_exp`` -> ``torch.ops.byola_fast.log_mixup_exp`` -> the backend's kernel.
"""

from byola_fast.ops import _autograd as _autograd
from byola_fast.ops import _triton, blocks, frontend, functional
from byola_fast.ops._dispatch import BackendError
from byola_fast.ops._native import cpu as _cpu
from byola_fast.ops._native import cuda as _cuda
from byola_fast.ops.blocks import *  # noqa: F403
from byola_fast.ops.frontend import *  # noqa: F403
from byola_fast.ops.functional import *  # noqa: F403

__all__ = ["BackendError"]
__all__ += blocks.__all__
__all__ += frontend.__all__
__all__ += functional.__all__

_cuda.install()
_triton.install()
_cpu.install()
