"""Attention of query rows to one ring, in NumPy: each function an equation with its shapes.

Rules: everything is attended in its int8 form, a row itself and its neighbours included; the key scales multiply the scores and
the value scales the probabilities, so "dequantization" is one int8 -> float copy.  ``attend_rows`` computes each row by itself
(matrix times vector over exactly the slots that it sees): its bits do not depend on how many rows are computed with it.
``attend_chunk`` uses matrix products, whose last bits do depend on the number of rows: it is for prompts.

Letters: L layers, k KV heads, g query heads a KV head, d head_dim, n slots seen, T rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.language.ring import Ring
from edge_agent.language.shape import ModelShape

Floats = NDArray[np.float32]
MASKED = np.float32(-1e30)


class Attention:
    """The kernels with the memory that they reuse from call to call."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._strip: Floats = np.empty(0, np.float32)
        self._scores: Floats = np.empty(0, np.float32)

    def rows(self, ring: Ring, layer: int, q: Floats, out: Floats) -> None:
        """``q [T, k * g, d] -> out [T, k * g * d]``; row ``t`` sees all slots up to its own."""
        shape, count = self._shape, len(q)
        k, g, d = shape.kv_heads, shape.group, shape.head_dim
        seen = ring.slot(ring.tokens) + 1
        n = seen + count - 1
        strip = self._strips(n)
        np.copyto(strip, ring.values[layer, 0, :, :n])
        scores = self._room(count * k * g * n)
        parts = [scores[t * k * g * n :][: k * g * (seen + t)].reshape(k, g, seen + t) for t in range(count)]
        sums = []
        for t, p in enumerate(parts):
            m = seen + t
            np.matmul(strip[:, None, :m], q[t].reshape(k, g, d, 1), out=p[..., None])
            sums.append(softened(p, ring.scales[layer, 0, :, None, :m], ring.scales[layer, 1, :, None, :m]))
        np.copyto(strip, ring.values[layer, 1, :, :n])
        for t, p in enumerate(parts):
            o = out[t].reshape(k, g, 1, d)
            np.matmul(p[:, :, None], strip[:, None, : seen + t], out=o)
            o /= sums[t][..., None]

    def chunk(self, ring: Ring, layer: int, q: Floats, out: Floats) -> None:
        """As ``rows``, by matrix products."""
        shape, count = self._shape, len(q)
        k, g, d = shape.kv_heads, shape.group, shape.head_dim
        first = ring.slot(ring.tokens)
        n = first + count
        strip = self._strips(n)
        np.copyto(strip, ring.values[layer, 0, :, :n])
        p = self._room(k * g * count * n).reshape(k, g * count, n)
        np.matmul(q.reshape(count, k, g, d).transpose(1, 2, 0, 3).reshape(k, g * count, d), strip.transpose(0, 2, 1), out=p)
        p.reshape(k, g, count, n)[..., first:] += _later(count)
        z = softened(p, ring.scales[layer, 0, :, None, :n], ring.scales[layer, 1, :, None, :n])
        np.copyto(strip, ring.values[layer, 1, :, :n])
        o = np.matmul(p, strip)
        o /= z
        out.reshape(count, k, g, d)[:] = o.reshape(k, g, count, d).transpose(2, 0, 1, 3)

    def _strips(self, n: int) -> Floats:  # -> [k, n, d]
        k, d = self._shape.kv_heads, self._shape.head_dim
        if self._strip.size < k * n * d:
            self._strip = np.empty(k * n * d, np.float32)
        return self._strip[: k * n * d].reshape(k, n, d)

    def _room(self, size: int) -> Floats:
        if self._scores.size < size:
            self._scores = np.empty(size, np.float32)
        return self._scores[:size]


def softened(p: Floats, key_scales: Floats, value_scales: Floats) -> Floats:  # [k, m, n], [k, 1, n], [k, 1, n] -> z [k, m, 1]
    """``p <- exp(p * s_k - max) * s_v`` in place; gives the sum before ``s_v``, which the output is divided by."""
    p *= key_scales
    p -= p.max(-1, keepdims=True)
    np.exp(p, out=p)
    z: Floats = p.sum(-1, keepdims=True)
    p *= value_scales
    return z


def _later(count: int) -> Floats:  # -> [T, T], what row t may not see of its own chunk
    return np.triu(np.full((count, count), MASKED, np.float32), 1)
