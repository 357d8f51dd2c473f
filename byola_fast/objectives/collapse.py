"""Measures of collapsed representations."""

from __future__ import annotations

import torch
from torch import Tensor

from byola_fast.objectives.losses import _is_batch, directions
from byola_fast.ops import _checks as check
from byola_fast.ops.reference import compute_dtype
from byola_fast.runtime.device import without_autocast


def spread(z: Tensor) -> Tensor:
    """Measure collapse: ``sqrt(size)`` times the mean over dimensions of the std over the batch of ``z / |z|``.

    1 for evenly spread directions, 0 if all samples have the same one.

    Args:
        z: embeddings or projections of one batch.

    Shape:
        ``(B, size)`` with B of at least 2; returns a 0-d tensor, in [0, 1] up to sampling noise.

    Raises:
        TypeError: not floating point. ValueError: another rank, or fewer than two samples.

    Source:
        SimSiam, arXiv:2011.10566, section 4.1.

    >>> spread(torch.ones(8, 4))
    tensor(0.)
    >>> bool(spread(torch.randn(4096, 16)) > 0.95)
    True
    """
    check.require_float("z", z)
    _is_batch("z", z, minimum=2)
    spread: Tensor = directions(z).std(0).mean() * z.shape[1] ** 0.5
    return spread


def effective_rank(z: Tensor) -> Tensor:
    """Measure collapse onto few dimensions: the exponential of the entropy of the singular values.

    ``exp(-sum p log p)`` with ``p = singular values of z / their sum``: 1 if all rows are multiples of one vector,
    ``min(B, size)`` if they spread equally over all directions.

    Args:
        z: embeddings or projections. The rank is at most B. Subtract the mean first to ignore a common offset.

    Shape:
        ``(B, size)`` with B of at least 1; returns a 0-d tensor, 1 to min(B, size); NaN if z is not finite.

    Raises:
        TypeError: not floating point. ValueError: another rank, or no sample.

    Numerics:
        The eigenvalues of the Gram matrix in float64, computed on the CPU, as they are few: 3 ms for (256, 256). A GPU
        waits. 1 for zeros.

    Source:
        O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    >>> round(effective_rank(torch.eye(4)).item(), 3), round(effective_rank(torch.ones(8, 4)).item(), 3)
    (4.0, 1.0)
    """
    check.require_float("z", z)
    _is_batch("z", z)
    with without_autocast(z.device):
        wide = z.double()
        gram = (wide @ wide.T if len(z) < z.shape[1] else wide.T @ wide).cpu()
        if not bool(gram.isfinite().all()):
            return torch.full((), float("nan"), dtype=compute_dtype(z.dtype), device=z.device)
        squares = torch.linalg.eigvalsh(gram)
        noise = len(gram) * torch.finfo(gram.dtype).eps * squares.max()  # of eigenvalues that are 0
        values = squares.where(squares > noise, 0).sqrt()
        share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        rank: Tensor = (-torch.xlogy(share, share).sum()).exp()
    return rank.to(z.device, compute_dtype(z.dtype))
