"""The hot precision: int8, symmetric, one float32 scale for each vector.

Rules: a vector's form depends on that vector alone, so that it is the same whatever else is quantized with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LEAST_SCALE = np.float32(1e-12)


def int8_of(x: Floats) -> tuple[Floats, Floats]:
    """``[..., d] -> whole numbers from -127 to 127 [..., d] (still float32), scale [...]``."""
    scale = np.maximum(x.max(-1), -x.min(-1))
    scale *= np.float32(1 / 127)
    scale += LEAST_SCALE
    whole = x / scale[..., None]
    np.rint(whole, out=whole)
    return whole, scale
