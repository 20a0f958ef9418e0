"""The hot precision: int8, symmetric, one float32 scale for each vector.

Rules: a vector's form depends on that vector alone, so that it is the same whatever else is quantized with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LEAST = np.float32(1e-10)
LEVELS = np.float32(127)


def int8_of(x: Floats) -> tuple[Floats, Floats]:
    """``[..., d] -> whole numbers from -127 to 127 [..., d] (still float32), scale [...]``."""
    whole, scale = np.empty_like(x), np.empty(x.shape[:-1], np.float32)
    quantize(x, whole, scale, scale[..., None])
    return whole, scale


def quantize(x: Floats, whole: Floats, scale: Floats, scale_column: Floats) -> None:  # [..., d], [..., d], [...], [..., 1]
    """``int8_of`` into memory of the caller, who also has the view of ``scale`` with one axis more."""
    np.abs(x, whole)
    np.maximum.reduce(whole, -1, out=scale, initial=LEAST)
    np.divide(scale, LEVELS, scale)
    np.divide(x, scale_column, whole)
    np.rint(whole, whole)
