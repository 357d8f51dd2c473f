"""Loss functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from byola_fast.ops import _checks as check
from byola_fast.ops.reference import compute_dtype
from byola_fast.runtime.device import without_autocast
from byola_fast.runtime.distributed import gather_rows


def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """Return the mean squared distance of normalised vectors: the batch mean of ``2 - 2 cos(q, z)``.

    Args:
        q: predictions of the online network.
        z: projections of the target network, detached.

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
    check.require_float("q", q)
    check.require_float("z", z)
    _is_batch("q", q)
    check.require_shape("z", z, tuple(q.shape))
    cosine = (directions(q) * directions(z)).sum(1)
    return (2 - 2 * cosine).mean()


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float = 0.1, *, gather: bool = False) -> Tensor:
    """Return the normalised, temperature-scaled cross-entropy of finding each row's partner in the other view.

    ``-log(exp(cos(z_i, z_j) / t) / sum_{k != i} exp(cos(z_i, z_k) / t))``, z the 2 B rows of both views, j the partner
    of i; the mean over all 2 B rows.

    Args:
        z1, z2: projections of two views; row i of both comes from the same sample.
        temperature: t, above 0.
        gather: compare with the rows of all ranks of torch.distributed (equally many on each); the result is the mean
            over this rank's rows.

    Shape:
        z1, z2 ``(B, size)`` with B of at least 2, so that there are negatives; returns a 0-d tensor.

    Raises:
        TypeError: not floating point. ValueError: other shapes, fewer than two samples.

    Numerics:
        Half precision is computed and returned in float32, also under autocast. Norms are clamped to at least 1e-12.

    Autograd:
        To z1 and z2, and across ranks; see ``gather_rows``.

    Source:
        SimCLR, arXiv:2002.05709, eq. (1).

    >>> z = torch.eye(2)
    >>> nt_xent_loss(z, z, temperature=1.0)  # log(1 + 2 / e)
    tensor(0.5514)
    """
    _is_pair("z1", z1, "z2", z2)
    with without_autocast(z1.device):
        view1, view2 = directions(z1), directions(z2)
        all1, first = gather_rows(view1) if gather else (view1, 0)
        all2, _ = gather_rows(view2) if gather else (view2, 0)
        rows, everyone = torch.cat([view1, view2]), torch.cat([all1, all2])
        first_view = first + torch.arange(len(z1), device=z1.device)
        second_view = first_view + len(all1)
        itself = torch.cat([first_view, second_view])[:, None] == torch.arange(len(everyone), device=z1.device)
        logits = (rows @ everyone.T / temperature).masked_fill(itself, float("-inf"))
        return F.cross_entropy(logits, torch.cat([second_view, first_view]))


def info_nce_loss(
    q: Tensor, k: Tensor, negatives: Tensor, temperature: float = 0.07, *, count: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of matching each query to its key, among that key and the negatives.

    ``-log(exp(cos(q, k) / t) / (exp(cos(q, k) / t) + sum_n exp(cos(q, n) / t)))``, the mean over the batch.

    Args:
        q: queries. k: their keys, row by row, detached.
        negatives: rows of length 1, as from ``directions``.
        temperature: t, above 0.
        count: number of valid negatives, the first ones: a 0-d tensor on the device; by default all.

    Shape:
        q, k ``(B, size)``, negatives ``(K, size)``; returns a 0-d tensor.

    Raises:
        TypeError: not floating point. ValueError: other shapes, or an empty batch, which has no mean.

    Numerics:
        As ``nt_xent_loss``.

    Autograd:
        To q, k and negatives.

    Source:
        MoCo, arXiv:1911.05722, eq. (1).

    >>> info_nce_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 1.0)
    tensor(0.3133)
    """
    _is_pair("q", q, "k", k, minimum=1)
    check.require_float("negatives", negatives)
    check.require_shape("negatives", negatives, ("K", q.shape[1]))
    with without_autocast(q.device):
        query, key = directions(q), directions(k)
        cosines = query @ negatives.to(query.dtype).T
        if count is not None:
            filled = torch.arange(len(negatives), device=q.device) < count
            cosines = cosines.masked_fill(~filled, float("-inf"))
        logits = torch.cat([(query * key).sum(1, keepdim=True), cosines], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def bilinear_loss(anchor: Tensor, positive: Tensor, weight: Tensor, *, gather: bool = False) -> Tensor:
    """Return the cross-entropy of matching each anchor to its positive by the similarity ``anchor W positive``.

    ``-log(exp(s_ii) / sum_j exp(s_ij))`` with ``s_ij = anchor_i W positive_j``, the mean over the batch.

    Args:
        anchor, positive: projections of two segments; row i of both comes from the same clip.
        weight: W.
        gather: as ``nt_xent_loss``.

    Shape:
        anchor, positive ``(B, size)`` with B of at least 2, so that there are negatives, weight ``(size, size)``;
        returns a 0-d tensor.

    Raises:
        TypeError: not floating point. ValueError: other shapes, fewer than two samples.

    Numerics:
        Half precision is computed and returned in float32, also under autocast.

    Autograd:
        To all three, and across ranks; see ``gather_rows``.

    Source:
        COLA, arXiv:2010.10915, its bilinear similarity.

    >>> bilinear_loss(torch.eye(2), torch.eye(2), torch.zeros(2, 2))  # log(2)
    tensor(0.6931)
    """
    _is_pair("anchor", anchor, "positive", positive)
    check.require_float("weight", weight)
    check.require_shape("weight", weight, (anchor.shape[1], anchor.shape[1]))
    with without_autocast(anchor.device):
        rows, others = anchor.to(compute_dtype(anchor.dtype)), positive.to(compute_dtype(positive.dtype))
        everyone, first = gather_rows(others) if gather else (others, 0)
        logits = rows @ (weight.to(rows.dtype) @ everyone.T)
        return F.cross_entropy(logits, first + torch.arange(len(rows), device=rows.device))


def directions(z: Tensor) -> Tensor:
    """Scale rows ``(B, size)`` to length 1; half precision becomes float32, also under autocast.

    >>> directions(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    with without_autocast(z.device):
        unit: Tensor = F.normalize(z.to(compute_dtype(z.dtype)), dim=1)
    return unit


def _is_batch(name: str, z: Tensor, minimum: int = 1) -> None:
    check.require_shape(name, z, ("B", "size"))
    if z.shape[0] < minimum:
        raise ValueError(f"{name}: expected at least {minimum} sample{'s' * (minimum > 1)}, got {z.shape[0]}")


def _is_pair(name: str, x: Tensor, other: str, y: Tensor, minimum: int = 2) -> None:
    check.require_float(name, x)
    check.require_float(other, y)
    _is_batch(name, x, minimum)
    check.require_shape(other, y, tuple(x.shape))
