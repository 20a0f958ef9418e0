"""SmoothQuant: outliers of the activations move into the weights, so that int8 rows of both lose less.

Rules: for an input channel j of a product, the weights' column is multiplied by s_j and what makes the input is divided by it,
s_j = max|x_j|^a / max|w_j|^(1-a), normed to a geometric mean of 1: in exact arithmetic the model says the same.  The division
is folded into the norm before q, k, v, before gate and up, and before the head, and into the rows of up before down; a tied
embedding is told its gain.  Activations are measured in
float64 and s is rounded to 1/16 of an octave, so that another CPU's BLAS gives the same s, and the same file.
Source: Xiao et al. 2023, SmoothQuant, equation 4, with a = 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.model_shape import ModelShape
from models.llama import Floats, Layer, Weights

Doubles = NDArray[np.float64]
Progress = Callable[[int, int], None]

ALPHA = 0.5
STEPS_AN_OCTAVE = 16
LEAST_ACTIVATION, LEAST_WEIGHT = 1e-3, 1e-4
LEAST_SCALE, MOST_SCALE = 2.0**-6, 2.0**10
ROWS_A_PIECE = 4096


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What one layer's inputs are divided by: of q, k, v [width], of gate and up [width], of down [hidden]."""

    attention: Floats
    mlp: Floats
    down: Floats


class Smoothed:
    """``weights`` with the smoothing of each layer and of the head [width] folded in; exact but for one rounding a weight."""

    def __init__(self, weights: Weights, smoothings: Sequence[Smoothing], head: Floats) -> None:
        self._weights, self._smoothings, self._head = weights, smoothings, head
        self.epsilon, self.tied, self.embedding = weights.epsilon, weights.tied, weights.embedding

    def norm(self) -> Floats:
        return self._weights.norm() / self._head

    def head(self, first: int, last: int) -> Floats:
        return self._weights.head(first, last) * self._head

    def gain(self) -> Floats:
        return self._weights.gain() / self._head

    def layer(self, index: int) -> Layer:
        layer, by = self._weights.layer(index), self._smoothings[index]
        return replace(
            layer,
            attention_norm=layer.attention_norm / by.attention,
            q=layer.q * by.attention,
            k=layer.k * by.attention,
            v=layer.v * by.attention,
            mlp_norm=layer.mlp_norm / by.mlp,
            gate=layer.gate * by.mlp,
            up=layer.up * by.mlp / by.down[:, None],
            down=layer.down * by.down,
        )


def smoothed(weights: Weights, shape: ModelShape, texts: Sequence[Sequence[int]], progress: Progress | None = None) -> Smoothed:
    """``weights`` smoothed for what the token ids of ``texts`` stir. ``progress`` hears layers done and layers in all."""
    flows = [_Flow(weights, shape, ids) for ids in texts]
    smoothings = []
    for index in range(shape.layers):
        layer = weights.layer(index)
        inputs = np.array([flow.through(layer) for flow in flows], object)
        attention, mlp, down = (np.maximum.reduce(list(inputs[:, place])) for place in range(3))
        columns = [_column_maxima(each) for each in ((layer.q, layer.k, layer.v), (layer.gate, layer.up), (layer.down,))]
        smoothings.append(Smoothing(*map(scales, (attention, mlp, down), columns)))
        if progress:
            progress(index + 1, shape.layers)
    final = np.maximum.reduce([np.abs(flow.normed(weights.norm())).max(0) for flow in flows])
    return Smoothed(weights, smoothings, scales(final, _head_maxima(weights, shape)))


def scales(activations: Doubles, columns: Doubles) -> Floats:  # [n], [n] -> [n]
    """s of every input channel, on the grid."""
    wanted = ALPHA * np.log2(np.maximum(activations, LEAST_ACTIVATION))
    wanted -= (1 - ALPHA) * np.log2(np.maximum(columns, LEAST_WEIGHT))
    wanted = np.clip(wanted - wanted.mean(), np.log2(LEAST_SCALE), np.log2(MOST_SCALE))
    return on_grid(np.rint(wanted * STEPS_AN_OCTAVE).astype(np.int64))


def on_grid(steps: NDArray[np.int64]) -> Floats:
    """2^(step / 16), from square roots and powers of two alone: IEEE 754 gives them the same bits everywhere."""
    sixteenth = sqrt(sqrt(sqrt(sqrt(2.0))))
    fractions = np.cumprod([1.0] + [sixteenth] * (STEPS_AN_OCTAVE - 1))
    octaves, rest = np.divmod(steps, STEPS_AN_OCTAVE)
    return np.asarray(np.ldexp(fractions[rest], octaves), np.float32)


def _column_maxima(matrices: Iterable[Floats]) -> Doubles:  # [m, n], ... -> [n]
    return np.asarray(reduce(np.maximum, (np.abs(w).max(0) for w in matrices)), np.float64)


def _head_maxima(weights: Weights, shape: ModelShape) -> Doubles:  # -> [width]
    starts = range(0, shape.vocabulary, ROWS_A_PIECE)
    return _column_maxima(weights.head(first, min(first + ROWS_A_PIECE, shape.vocabulary)) for first in starts)


class _Flow:
    """One text on its way through the float model, layer by layer. T tokens."""

    def __init__(self, weights: Weights, shape: ModelShape, ids: Sequence[int]) -> None:
        self.shape, self.epsilon = shape, weights.epsilon
        self.x: Doubles = np.concatenate([weights.embedding(each, each + 1) for each in ids]).astype(np.float64)
        frequencies = float(shape.rope_base) ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = np.arange(len(ids))[:, None, None] * frequencies  # [T, 1, head_dim / 2]
        self.cos, self.sin = np.cos(angles), np.sin(angles)
        self.mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)

    def through(self, layer: Layer) -> tuple[Doubles, Doubles, Doubles]:
        """Adds the layer to ``x``; gives the largest |input| of q, k, v [width], of gate and up [width], of down [hidden]."""
        h = self.normed(layer.attention_norm)
        q, k, v = (self.heads(h, w) for w in (layer.q, layer.k, layer.v))
        self.x = self.x + self.attention(self.turned(q), self.turned(k), v) @ _wide(layer.o).T
        g = self.normed(layer.mlp_norm)
        gate, up = g @ _wide(layer.gate).T, g @ _wide(layer.up).T
        hidden = gate / (1 + np.exp(-gate)) * up
        self.x = self.x + hidden @ _wide(layer.down).T
        return np.abs(h).max(0), np.abs(g).max(0), np.abs(hidden).max(0)

    def normed(self, weight: Floats) -> Doubles:  # [T, width]
        return np.asarray(self.x / np.sqrt((self.x * self.x).mean(-1, keepdims=True) + self.epsilon) * weight)

    def heads(self, h: Doubles, w: Floats) -> Doubles:  # [T, width], [n * head_dim, width] -> [T, n, head_dim]
        return (h @ _wide(w).T).reshape(len(h), -1, self.shape.head_dim)

    def turned(self, x: Doubles) -> Doubles:  # [T, n, head_dim] -> the same
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)

    def attention(self, q: Doubles, k: Doubles, v: Doubles) -> Doubles:  # -> [T, heads * head_dim]
        group = self.shape.heads // self.shape.kv_heads
        out = np.empty_like(q)
        for head in range(self.shape.heads):
            scores = q[:, head] @ k[:, head // group].T / sqrt(self.shape.head_dim) + self.mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
        return out.reshape(len(q), -1)


def _wide(w: Any) -> Doubles:
    return np.asarray(w, np.float64)
