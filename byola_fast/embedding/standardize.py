"""Standardised embeddings, for neighbours, clusters and maps."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from byola_fast.ops.reference import sums_dtype

Rows = TypeVar("Rows")  # a tensor or a NumPy array


def standardize(embeddings: Rows, like: Rows | None = None) -> Rows:
    """Shift and scale each feature to mean 0 and standard deviation 1: ``(embeddings - mean) / std``.

    Features of an encoder that is not whitened differ in size, and many are alike in all sounds. Standardised, each
    feature counts as much as any other. ``docs/evaluation.md`` has what neighbours gain.

    Args:
        embeddings: a floating-point tensor or NumPy array.
        like: rows whose mean and std are taken, for example of the collection that ``embeddings`` are searched in; by
            default the embeddings themselves. A feature that is constant there is only shifted.

    Shape:
        ``(n, d)`` or ``(d,)``, and ``(rows, d)``; returns the shape, type and dtype of ``embeddings``.

    >>> standardize(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    rows = torch.as_tensor(embeddings if like is None else like)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"like: expected shape (rows, d), not empty, got {tuple(rows.shape)}")
    given, dtype = torch.as_tensor(embeddings), sums_dtype(rows.device)
    std, mean = torch.std_mean(rows.to(dtype), 0, correction=0)
    scaled = ((given.to(dtype) - mean) / torch.where(std == 0, 1.0, std)).to(given.dtype)
    answer: Rows = scaled if isinstance(embeddings, Tensor) else scaled.numpy()  # type: ignore[assignment]
    return answer
