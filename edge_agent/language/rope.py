"""Rotary position embedding: keys are turned by their position, so that scores depend on distances alone.

Rules: angles are float64 until the last cast, so that positions past 100,000 are as exact as the first.  The sine carries its
sign (minus in the first half), which makes a turn two products and a sum.  Source: Su et al. 2021 (RoFormer), half-split form.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Rope:
    """The angles of one model's positions. ``head_dim`` is even."""

    def __init__(self, head_dim: int, base: int) -> None:
        self._frequencies = float(base) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

    def angles(self, positions: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """``[T] -> cos [T, head_dim], signed sin [T, head_dim]``, float32."""
        angle = positions.astype(np.float64)[:, None] * self._frequencies
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        return np.concatenate((cos, cos), 1), np.concatenate((-sin, sin), 1)


def turned(x: Floats, cos: Floats, sin: Floats) -> Floats:  # [..., T, d], [T, d], [T, d] -> [..., T, d]
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half] += x[..., half:] * sin[:, :half]
    out[..., half:] += x[..., :half] * sin[:, half:]
    return out


def turned_back(x: Floats, cos: Floats, sin: Floats) -> Floats:  # [..., T, d], [T, d], [T, d] -> [..., T, d]
    return turned(x, cos, -sin)
