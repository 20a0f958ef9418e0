"""Attention of query rows to one ring, in NumPy: each function an equation with its shapes.

Rules: everything is attended in its int8 form, a row itself and its neighbours included; the key scales multiply the scores and
the value scales the probabilities, so "dequantization" is one int8 -> float copy.  ``Rows`` computes each row by itself
(matrix times vector over exactly the slots that it sees): its bits do not depend on how many rows are computed with it.
``Chunk`` uses matrix products, whose last bits do depend on the number of rows: it is for prompts.
Both are made once a step and keep their views of the ring for all layers: what is done a layer is arithmetic alone.

Letters: L layers, k KV heads, g query heads a KV head, d head_dim, n slots seen, T rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.language.ring import Ring

Floats = NDArray[np.float32]
MASKED = np.float32(-1e30)
"""Times the least scale there is (8e-13) it still is far below any score."""


class Workspace:
    """Memory that attention reuses from step to step; it grows to what the longest ring needs."""

    def __init__(self) -> None:
        self._floats: dict[str, Floats] = {}

    def floats(self, name: str, *shape: int) -> Floats:
        """``shape`` floats of junk, the same memory for the same ``name``."""
        size = int(np.prod(shape))
        if name not in self._floats or self._floats[name].size < size:
            self._floats[name] = np.empty(size, np.float32)
        return self._floats[name][:size].reshape(shape)


class Row:
    """One row's views: it sees the first ``n`` slots. ``q`` and ``out`` are ``[k * g, d]``, ``strips [2, k, >= n, d]``."""

    def __init__(self, ring: Ring, n: int, strips: Floats, q: Floats, out: Floats, space: Workspace, place: int) -> None:
        k, g, d = ring.shape.kv_heads, ring.shape.group, ring.shape.head_dim
        self.p = space.floats(f"scores {place}", k, g, n)
        self.p_column, self.p_row = self.p[..., None], self.p[:, :, None]
        self.keys, self.values = strips[:, :, None, :n]
        self.key_scales, self.value_scales = ring.scales[:, 0, :, None, :n], ring.scales[:, 1, :, None, :n]
        self.q, self.out = q.reshape(k, g, d, 1), out.reshape(k, g, 1, d)
        self.most = space.floats(f"most {place}", k, g, 1)
        self.sum = space.floats(f"sum {place}", k, g, 1)
        self.sum_column = self.sum[..., None]

    def attend(self, layer: int) -> None:
        p = self.p
        np.matmul(self.keys, self.q, self.p_column)  # [k, 1, n, d] @ [k, g, d, 1] -> [k, g, n, 1]
        softened(p, self.key_scales[layer], self.value_scales[layer], self.most, self.sum)
        np.matmul(self.p_row, self.values, self.out)  # [k, g, 1, n] @ [k, 1, n, d] -> [k, g, 1, d]
        np.divide(self.out, self.sum_column, self.out)


class Rows:
    """``q [T, k * g, d]`` to ``out [T, k * g * d]``; row ``t`` sees all slots up to its own."""

    def __init__(self, ring: Ring, q: Floats, out: Floats, space: Workspace) -> None:
        k, d = ring.shape.kv_heads, ring.shape.head_dim
        first = ring.slot(ring.tokens)
        n = first + len(q)
        self._whole = ring.values[:, :, :, :n]
        self._strips = space.floats("strips", 2, k, n, d)
        self._rows = [Row(ring, first + t + 1, self._strips, q[t], out[t], space, t) for t in range(len(q))]

    def attend(self, layer: int) -> None:
        np.copyto(self._strips, self._whole[layer])
        for row in self._rows:
            row.attend(layer)


class Chunk:
    """As ``Rows``, by matrix products, one KV head after another so that its scores stay in a core's cache."""

    def __init__(self, ring: Ring, q: Floats, out: Floats, space: Workspace) -> None:
        k, g, d = ring.shape.kv_heads, ring.shape.group, ring.shape.head_dim
        count, first = len(q), ring.slot(ring.tokens)
        n = first + count
        self._whole, self._scales = ring.values[:, :, :, :n], ring.scales[:, :, :, :n]
        self._q = q.reshape(count, k, g, d).transpose(1, 2, 0, 3)
        self._out = out.reshape(count, k, g, d).transpose(1, 2, 0, 3)
        self._strip = space.floats("strips", n, d)
        self._rows = space.floats("queries", g, count, d)
        self._p = space.floats("scores", g * count, n)
        self._own = self._p.reshape(g, count, n)[..., first:]
        self._most, self._sum = space.floats("most", g * count, 1), space.floats("sum", g * count, 1)
        self._later = np.triu(np.full((count, count), MASKED, np.float32), 1)

    def attend(self, layer: int) -> None:
        for head in range(len(self._q)):
            self._attend(self._whole[layer, :, head], self._scales[layer, :, head], self._q[head], self._out[head])

    def _attend(self, whole: NDArray[np.int8], scales: Floats, q: Floats, out: Floats) -> None:
        p, strip, rows = self._p, self._strip, self._rows.reshape(len(self._p), -1)
        np.copyto(self._rows, q)
        np.copyto(strip, whole[0])
        np.matmul(rows, strip.T, p)  # [g * T, d] @ [d, n] -> [g * T, n]
        np.add(self._own, self._later, self._own)
        softened(p, scales[0], scales[1], self._most, self._sum)
        np.copyto(strip, whole[1])
        np.matmul(p, strip, rows)  # [g * T, n] @ [n, d] -> [g * T, d]
        np.divide(rows, self._sum, rows)
        np.copyto(out, self._rows)


def softened(p: Floats, key_scales: Floats, value_scales: Floats, most: Floats, total: Floats) -> None:
    """``[..., m, n]``, scales that broadcast to it, ``[..., m, 1]`` twice: in place ``p <- exp(p s_k - max) s_v``, its sum before
    ``s_v`` to ``total``."""
    np.multiply(p, key_scales, p)
    np.maximum.reduce(p, -1, out=most, keepdims=True)
    np.subtract(p, most, p)
    np.exp(p, p)
    np.add.reduce(p, -1, out=total, keepdims=True)
    np.multiply(p, value_scales, p)
