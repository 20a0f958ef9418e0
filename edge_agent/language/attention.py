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

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.kv import SINK_TOKENS
from edge_agent.language.batching import TILE_TOKENS
from edge_agent.language.ring import Ring

Floats = NDArray[np.float32]
MASKED = np.float32(-1e30)
"""Times the least scale there is (8e-13) it still is far below any score."""
GROUP_SLOTS = 2_080
"""Of rings whose rows are computed together: 3.5 MB of floats at 3 KV heads of 64. A longer ring is a group of its own."""


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
    """One row's views: it sees the first ``n`` slots. ``strips [2, k, >= n, d]``, ``q`` and ``out [k * g, d]``, ``p [k, g, n]``,
    ``most [k, g, 1]``."""

    def __init__(self, ring: Ring, strips: Floats, q: Floats, out: Floats, p: Floats, most: Floats) -> None:
        k, g, d, n = ring.shape.kv_heads, ring.shape.group, ring.shape.head_dim, p.shape[-1]
        self.p, self.p_column, self.p_row, self.most = p, p[..., None], p[:, :, None], most
        self.keys, self.values = strips[:, :, None, :n]
        self.key_scales, self.value_scales = ring.scales[:, 0, :, None, :n], ring.scales[:, 1, :, None, :n]
        self.q, self.out = q.reshape(k, g, d, 1), out.reshape(k, g, 1, d)

    def score(self, layer: int) -> None:
        np.matmul(self.keys, self.q, self.p_column)  # [k, 1, n, d] @ [k, g, d, 1] -> [k, g, n, 1]
        np.multiply(self.p, self.key_scales[layer], self.p)

    def gather(self, layer: int) -> None:
        np.multiply(self.p, self.value_scales[layer], self.p)
        np.matmul(self.p_row, self.values, self.out)  # [k, g, 1, n] @ [k, 1, n, d] -> [k, g, 1, d]


class Rows:
    """Rows of several rings: ``lanes`` says how many of each; ``q [T, k * g, d]`` to ``out [T, k * g * d]``, in their order.

    A row sees all slots of its ring up to its own.  The scores of all rows lie one after another, so that what is done to each
    number by itself, and each row's maximum and sum, is one call for all.
    """

    def __init__(self, lanes: Sequence[tuple[Ring, int]], q: Floats, out: Floats, space: Workspace) -> None:
        shape = lanes[0][0].shape
        k, g, d = shape.kv_heads, shape.group, shape.head_dim
        seen = [ring.used + t + 1 for ring, count in lanes for t in range(count)]
        ends = list(accumulate(seen))
        self._starts = np.array([0, *ends[:-1]])
        self._p = space.floats("scores", k, g, ends[-1])
        self._most, self._sum = space.floats("most", k, g, len(q)), space.floats("sum", k, g, len(q))
        self._out, self._sum_column = out.reshape(-1, k, g, d), self._sum.transpose(2, 0, 1)[..., None]
        self._rings: list[tuple[Floats, NDArray[np.int8], list[Row]]] = []
        self._rows: list[Row] = []
        for number, (ring, count) in enumerate(lanes):
            n = ring.used + count
            strips = space.floats(f"strips {number}", 2, k, n, d)
            of_ring = range(len(self._rows), len(self._rows) + count)
            scores = [self._p[..., ends[t] - seen[t] : ends[t]] for t in of_ring]
            rows = [Row(ring, strips, q[t], out[t], p, self._most[..., t : t + 1]) for t, p in zip(of_ring, scores, strict=True)]
            self._rings.append((strips, ring.values[:, :, :, :n], rows))
            self._rows += rows

    def attend(self, layer: int) -> None:
        p = self._p
        for strips, whole, rows in self._rings:
            np.copyto(strips, whole[layer])
            for row in rows:
                row.score(layer)
        np.maximum.reduceat(p, self._starts, -1, out=self._most)
        for row in self._rows:
            np.subtract(row.p, row.most, row.p)
        np.exp(p, p)
        np.add.reduceat(p, self._starts, -1, out=self._sum)
        for row in self._rows:
            row.gather(layer)
        np.divide(self._out, self._sum_column, self._out)


def groups(lanes: Sequence[tuple[Ring, int]]) -> Iterator[list[tuple[Ring, int]]]:
    """``lanes`` in their order, cut so that the float copies of one group's rings stay small."""
    group: list[tuple[Ring, int]] = []
    for ring, count in lanes:
        if group and sum(each.used + rows for each, rows in group) + ring.used + count > GROUP_SLOTS:
            yield group
            group = []
        group.append((ring, count))
    if group:
        yield group


class Tile:
    """Rows of one tile of a prompt, by matrix products over the whole tile: they do not depend on how much of it is new.

    ``q [T, k * g, d]`` and ``out [T, k * g * d]`` are of the positions ``first`` to ``last - 1``; ``strips [2, k, >= n, d]``.
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
    """A piece of a prompt, tile after tile; ``q [T, k * g, d]`` to ``out [T, k * g * d]``.

    ``helper``: a thread that takes every second tile, in a ``second`` workspace; a tile's bits do not depend on who computes it.
    """

    def __init__(
        self, ring: Ring, q: Floats, out: Floats, space: Workspace, second: Workspace, helper: ThreadPoolExecutor | None
    ) -> None:
        k, d, tokens = ring.shape.kv_heads, ring.shape.head_dim, ring.tokens
        last = tokens + len(q)
        n = ring.slot(tile_of(last - 1)[1] - 1) + 1
        self._whole = ring.values[:, :, :, :n]
        self._strips = space.floats("strips 0", 2, k, n, d)
        self._tiles: list[Tile] = []
        self._helper = helper
        first = tokens
        while first < last:
            end = min(tile_of(first)[1], last)
            part = slice(first - tokens, end - tokens)
            scratch = second if helper and len(self._tiles) % 2 else space
            self._tiles.append(Tile(ring, first, end, self._strips, q[part], out[part], scratch))
            first = end

    def attend(self, layer: int) -> None:
        np.copyto(self._strips, self._whole[layer])
        if self._helper is None or len(self._tiles) == 1:
            _attend(self._tiles, layer)
            return
        helped = self._helper.submit(_attend, self._tiles[1::2], layer)
        try:
            _attend(self._tiles[::2], layer)
        finally:
            helped.result()


def _attend(tiles: Sequence[Tile], layer: int) -> None:
    for tile in tiles:
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
