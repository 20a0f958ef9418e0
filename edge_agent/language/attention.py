"""Attention of query rows to one ring, in NumPy: each function an equation with its shapes.

Rules: everything is attended in its int8 form, a row itself and its neighbours included; the key scales multiply the scores and
the value scales the probabilities, so "dequantization" is one int8 -> float copy.  ``Rows`` computes each row by itself
(matrix times vector over exactly the slots that it sees): its bits do not depend on how many rows are computed with it.
``Tiles`` uses matrix products, whose last bits depend on their shape: so a prompt is computed in tiles that lie at fixed
positions, each by products of one shape, whatever part of it is new.  What a row gives depends on its position, the tokens
before it, and whether it was generated (``Rows``) or read (``Tiles``).
Both are made once a step and keep their views of the ring for all layers: what is done a layer is arithmetic alone.

Letters: L layers, k KV heads, g query heads a KV head, d head_dim, n slots seen, T rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.kv import SINK_TOKENS
from edge_agent.language.batching import TILE_TOKENS
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


class Tile:
    """Rows of one tile of a prompt, by matrix products over the whole tile: they do not depend on how much of it is new.

    ``q [T, k * g, d]`` and ``out [T, k * g * d]`` are those of the positions ``first`` to ``last - 1``; ``strips [2, k, >= n, d]``.
    """

    def __init__(self, ring: Ring, first: int, last: int, strips: Floats, q: Floats, out: Floats, space: Workspace) -> None:
        k, g, d = ring.shape.kv_heads, ring.shape.group, ring.shape.head_dim
        start, end = tile_of(first)
        rows, n = end - start, ring.slot(end - 1) + 1
        self._q, self._out = (each.reshape(last - first, k, g, d).transpose(1, 2, 0, 3) for each in (q, out))
        self._rows = space.floats("queries", k, g * rows, d)
        self._new = self._rows.reshape(k, g, rows, d)[:, :, first - start : last - start]
        self._padded = last - first < rows
        self._p = space.floats("scores", k, g * rows, n)
        self._own = self._p.reshape(k, g, rows, n)[..., n - rows :]
        self._later = np.triu(np.full((rows, rows), MASKED, np.float32), 1)
        self._keys, self._values = strips[0, :, :n].swapaxes(1, 2), strips[1, :, :n]
        self._key_scales, self._value_scales = ring.scales[:, 0, :, None, :n], ring.scales[:, 1, :, None, :n]
        self._most, self._sum = space.floats("most", k, g * rows, 1), space.floats("sum", k, g * rows, 1)
        ring.scales[..., ring.slot(last - 1) + 1 : n] = 1  # what the slots after the last row hold is masked, and must be numbers

    def attend(self, layer: int) -> None:
        p, rows = self._p, self._rows
        if self._padded:
            rows.fill(0)
        np.copyto(self._new, self._q)
        np.matmul(rows, self._keys, p)  # [k, g * tile, d] @ [k, d, n] -> [k, g * tile, n]
        np.add(self._own, self._later, self._own)
        softened(p, self._key_scales[layer], self._value_scales[layer], self._most, self._sum)
        np.matmul(p, self._values, rows)  # [k, g * tile, n] @ [k, n, d] -> [k, g * tile, d]
        np.divide(rows, self._sum, rows)
        np.copyto(self._out, self._new)


class Tiles:
    """As ``Rows``, for a piece of a prompt, tile after tile."""

    def __init__(self, ring: Ring, q: Floats, out: Floats, space: Workspace) -> None:
        k, d, tokens = ring.shape.kv_heads, ring.shape.head_dim, ring.tokens
        last = tokens + len(q)
        n = ring.slot(tile_of(last - 1)[1] - 1) + 1
        self._whole = ring.values[:, :, :, :n]
        self._strips = space.floats("strips", 2, k, n, d)
        self._tiles = []
        first = tokens
        while first < last:
            end = min(tile_of(first)[1], last)
            part = slice(first - tokens, end - tokens)
            self._tiles.append(Tile(ring, first, end, self._strips, q[part], out[part], space))
            first = end

    def attend(self, layer: int) -> None:
        np.copyto(self._strips, self._whole[layer])
        for tile in self._tiles:
            tile.attend(layer)


def tile_of(position: int) -> tuple[int, int]:
    """The first position of a position's tile, and of the next one: the first tile has the sinks as well."""
    end = SINK_TOKENS + (max(0, position - SINK_TOKENS) // TILE_TOKENS + 1) * TILE_TOKENS
    return (end - TILE_TOKENS if end > SINK_TOKENS + TILE_TOKENS else 0), end


def softened(p: Floats, key_scales: Floats, value_scales: Floats, most: Floats, total: Floats) -> None:
    """``[..., m, n]``, scales that broadcast to it, ``[..., m, 1]`` twice: in place ``p <- exp(p s_k - max) s_v``, its sum before
    ``s_v`` to ``total``."""
    np.multiply(p, key_scales, p)
    np.maximum.reduce(p, -1, out=most, keepdims=True)
    np.subtract(p, most, p)
    np.exp(p, p)
    np.add.reduce(p, -1, out=total, keepdims=True)
    np.multiply(p, value_scales, p)
