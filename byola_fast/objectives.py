"""What training minimises, and how to tell whether it has collapsed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from byola_fast.ops import _checks as check


def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """Return the squared distance of two batches of directions: the batch mean of ``2 - 2 cos(q, z)``.

    Args:
        q: predictions of the online network.
        z: projections of the target network, to be predicted; detach them, or compute them without gradients.

    Shape:
        q, z ``(B, size)``; returns a 0-d tensor, in [0, 4].

    Raises:
        TypeError: not floating point. ValueError: other shapes, or an empty batch, which has no mean.

    Numerics:
        Half precision is computed and returned in float32. Norms are clamped to at least 1e-12.

    Autograd:
        To q and z.

    Source:
        BYOL, arXiv:2006.07733, eq. (2).

    >>> byol_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor(2.)
    """
    check.is_float("q", q)
    check.is_float("z", z)
    _is_batch("q", q)
    check.has_shape("z", z, tuple(q.shape))
    cosine = (_directions(q) * _directions(z)).sum(1)
    return (2 - 2 * cosine).mean()


def collapse_std(z: Tensor) -> Tensor:
    """Measure collapse: ``sqrt(size)`` times the mean over dimensions of the std over the batch of ``z / |z|``.

    1 where directions are spread evenly, 0 where every sample has the same one.

    Args:
        z: embeddings or projections of one batch.

    Shape:
        ``(B, size)`` with B of at least 2; returns a 0-d tensor, in [0, 1] up to sampling noise.

    Raises:
        TypeError: not floating point. ValueError: another rank, or fewer than two samples.

    Source:
        SimSiam, arXiv:2011.10566, section 4.1.

    >>> collapse_std(torch.ones(8, 4))
    tensor(0.)
    >>> bool(collapse_std(torch.randn(4096, 16)) > 0.95)
    True
    """
    check.is_float("z", z)
    _is_batch("z", z, least=2)
    spread: Tensor = _directions(z).std(0).mean() * z.shape[1] ** 0.5
    return spread


def _is_batch(name: str, z: Tensor, least: int = 1) -> None:
    check.has_shape(name, z, ("B", "size"))
    if z.shape[0] < least:
        raise ValueError(f"{name}: expected at least {least} sample{'s' * (least > 1)}, got {z.shape[0]}")


def _directions(z: Tensor) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):
        directions: Tensor = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
    return directions
