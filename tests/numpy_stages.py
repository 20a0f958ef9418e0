"""The stages of a tiny Llama with random weights in NumPy: the ring and the decoder run thousands of steps a second.

Rules: row by row, so that a row's bits do not depend on the rows beside it, as on LiteRT.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.model_shape import ModelShape

Floats = NDArray[np.float32]
TINY = ModelShape(
    layers=2, heads=4, kv_heads=2, head_dim=16, width=32, hidden=48, vocabulary=64, rope_base=10_000, context_tokens=512
)


class NumpyStages:
    """``edge_agent.language.stages.Stages`` without an interpreter."""

    def __init__(self, shape: ModelShape = TINY, seed: int = 7) -> None:
        random = np.random.default_rng(seed)

        def weight(rows: int, columns: int) -> Floats:
            return np.asarray(random.normal(size=(rows, columns)) / np.sqrt(columns), np.float32)

        self._shape = shape
        outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self._embedding = random.normal(size=(shape.vocabulary, shape.width)).astype(np.float32)
        self._weights = [weight(outputs, shape.width) for _ in range(shape.layers)]
        self._o = [weight(shape.width, shape.heads * shape.head_dim) for _ in range(shape.layers)]
        self._up = [weight(shape.hidden, shape.width) for _ in range(shape.layers)]
        self._down = [weight(shape.width, shape.hidden) for _ in range(shape.layers)]
        self._x: Floats = np.empty((0, shape.width), np.float32)
        self._qkv: Floats = np.empty((0, 0, shape.head_dim), np.float32)
        self._cos = self._sin = np.empty((0, shape.head_dim), np.float32)

    def start(self, tokens: NDArray[np.int32], cos: Floats, sin: Floats, decode: int) -> Floats:
        self._x, self._cos, self._sin = self._embedding[tokens], cos, sin
        self._qkv = self._heads(0)
        return self._qkv

    def next(self, stage: int, o: Floats) -> None:
        self._x = self._after(stage - 1, self._x, o)
        self._qkv[:] = self._heads(stage)

    def finish(self, o: Floats, wanted: Sequence[int]) -> Floats:
        rows = list(wanted)
        x = _normal(self._after(self._shape.layers - 1, self._x[rows], o[rows]))
        return _each(self._embedding, x / np.float32(np.sqrt(self._shape.width)))

    def _after(self, layer: int, x: Floats, o: Floats) -> Floats:
        x = x + _each(self._o[layer], o)
        return x + _each(self._down[layer], np.tanh(_each(self._up[layer], _normal(x))))

    def _heads(self, layer: int) -> Floats:
        shape = self._shape
        qkv = _each(self._weights[layer], _normal(self._x)).reshape(len(self._x), -1, shape.head_dim)
        turning = qkv[:, : shape.heads + shape.kv_heads]
        half = shape.head_dim // 2
        swapped = np.concatenate((turning[..., half:], turning[..., :half]), -1)
        qkv[:, : shape.heads + shape.kv_heads] = turning * self._cos[:, None] + swapped * self._sin[:, None]
        qkv[:, : shape.heads] /= np.sqrt(np.float32(shape.head_dim))
        return qkv


def _each(weight: Floats, x: Floats) -> Floats:  # [out, in], [T, in] -> [T, out]
    return np.array([weight @ row for row in x], np.float32).reshape(len(x), len(weight))


def _normal(x: Floats) -> Floats:
    normal: Floats = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5))
    return normal
