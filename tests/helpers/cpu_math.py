"""The accuracy of the C++ kernels' own exp and log."""

from __future__ import annotations

import ctypes

import numpy as np

from byola_fast.ops._native import cpu

MOST_ULP = 4


def every_binade(per_binade=2000):
    """Random float32 mantissas in every binade from the denormals up, positive."""
    rng = np.random.default_rng(5)
    exponent = np.repeat(np.arange(255, dtype=np.uint32), per_binade)
    mantissa = rng.integers(0, 2**23, exponent.size, dtype=np.uint32)
    return (exponent << 23 | mantissa).view(np.float32)


def ulps(actual, expected):
    """Distance to a float64 result in units of float32's last place there."""
    spacing = np.spacing(np.abs(expected).clip(2.0**-126).astype(np.float32)).astype(np.float64)
    return np.abs(actual.astype(np.float64) - expected) / spacing


def apply(function, x):
    """Replace float32 values by a function of the library."""
    function.argtypes = ctypes.c_void_p, ctypes.c_int64
    function(x.ctypes.data, x.size)


def check_math():
    kernels = cpu.library()
    x = np.concatenate([every_binade(), -every_binade(), np.linspace(-104, 88.72, 400_001).astype(np.float32)])
    y = x.copy()
    apply(kernels.byola_exp, y)
    with np.errstate(over="ignore"):
        exact = np.exp(x.astype(np.float64))
    finite = exact <= np.finfo(np.float32).max
    assert ulps(y[finite], exact[finite]).max() <= MOST_ULP
    assert np.isinf(y[x > 88.7229]).all()

    # from 2^-125 on: the argument contains eps = 2^-23
    x = np.concatenate([every_binade()[4000:], np.linspace(0.5, 2, 400_001).astype(np.float32)])
    y = x.copy()
    apply(kernels.byola_log_positive, y)
    assert ulps(y, np.log(x.astype(np.float64))).max() <= MOST_ULP

    special = np.array([np.nan, np.inf, -np.inf, 0], dtype=np.float32)
    apply(kernels.byola_exp, special)
    np.testing.assert_array_equal(special, np.array([np.nan, np.inf, 0, 1], dtype=np.float32))
    special = np.array([np.nan, np.inf, 1], dtype=np.float32)
    apply(kernels.byola_log_positive, special)
    np.testing.assert_array_equal(special, np.array([np.nan, np.inf, 0], dtype=np.float32))
