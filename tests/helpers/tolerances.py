"""How close a result in each dtype must come to float64, and why. One table for all tests."""

from __future__ import annotations

import torch
from torch import Tensor

# dtype: (relative, absolute) to the largest value around 10 that log-mel spectrograms have
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),  # a few hundred roundings of 1.1e-16
    torch.float32: (1e-6, 4e-6),  # exp, log and up to 16 taps, each within a few roundings of 6e-8 of values below 10
    torch.float16: (1e-3, 1e-3),  # computed in float32; one rounding of 4.9e-4, two where a pass writes half between
    torch.bfloat16: (8e-3, 8e-3),  # the same with 3.9e-3
}


def assert_close(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Compare with a float64 result, NaN equal to NaN; ``factor`` is for conditioning that the caller explains."""
    relative, absolute = TOLERANCES[actual.dtype]
    torch.testing.assert_close(
        actual.double().cpu(),
        expected.double().cpu(),
        rtol=factor * relative,
        atol=factor * absolute,
        equal_nan=True,
    )
