"""A Llama-architecture decoder as ``.tflite`` stages: everything but the attention, which is done between them.

    stage_00(tokens, cos, sin) -> x, qkv        embedding, then the first layer's q, k, v
    stage_i(x, o, cos, sin) -> x, qkv           layer i-1's output projection and MLP, then layer i's q, k, v
    stage_L(x, o, last) -> logits               the last layer's, then norm and head, for the rows that ``last`` names

``tokens`` int32 [T]; ``cos``, ``sin`` float32 [T, 1, head_dim]; ``x``, ``o`` float32 [T, width] (``o``: heads * head_dim);
``qkv`` float32 [T, heads + 2 kv_heads, head_dim]: q, k, v in this order, q and k turned, 1/sqrt(head_dim) in q already.
Positions enter through ``cos`` and ``sin`` alone: a turned head is ``x * cos + swapped(x) * sin``, where ``swapped`` exchanges
the halves of the head and the *first half of sin is negative* (half-split RoPE).

Rules: weights are int8 with a scale a row, written with the tensor scale 1 and a MUL by the row scales after the product: the
only int8 form that is right on both runtimes (2.14 ignores per-channel scales of FULLY_CONNECTED without a word).
ai-edge-litert gets one signature a stage with dynamic T; every signature that held the weights again would cost their size.
tflite-runtime 2.14 gets static ones: ``_t1``, ``_t4`` and, for prefill, ``_p64`` whose products are int8 x int8 -> int32
BATCH_MATMULs (twice as fast there, twenty times slower on LiteRT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.model_shape import ModelShape
from models import graph_operators as op
from models.flatbuffer import Constant, Graph, Model
from models.whole_file import written_whole

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]

ROWS_A_PIECE = 4096
INT8_MAX = 127
LITERT, TFLITE_RUNTIME = "ai_edge_litert", "tflite_runtime"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, float32. q [heads * head_dim, width], k and v [kv_heads * head_dim, width], o [width, heads * head_dim],
    gate and up [hidden, width], down [width, hidden]; rows of q and k in half-split RoPE order; norms [width]."""

    attention_norm: Floats
    q: Floats
    k: Floats
    v: Floats
    o: Floats
    mlp_norm: Floats
    gate: Floats
    up: Floats
    down: Floats


class Weights(Protocol):
    """A model's float weights, read as they are needed. ``tied``: the embedding is the head, its columns times ``gain``."""

    @property
    def epsilon(self) -> float: ...
    @property
    def tied(self) -> bool: ...
    def norm(self) -> Floats: ...  # [width]
    def embedding(self, first: int, last: int) -> Floats: ...  # -> [last - first, width]
    def head(self, first: int, last: int) -> Floats: ...  # -> [last - first, width]
    def gain(self) -> Floats: ...  # [width]
    def layer(self, index: int) -> Layer: ...


@dataclass(frozen=True, slots=True)
class Variant:
    """One set of stages: ``rows`` a call and ``wanted`` rows with logits (-1: any), and how products are done."""

    suffix: str
    rows: int
    wanted: int
    integer: bool = False


VARIANTS: Mapping[str, tuple[Variant, ...]] = MappingProxyType(
    {
        LITERT: (Variant("", -1, -1),),
        TFLITE_RUNTIME: (Variant("_t1", 1, 1), Variant("_t4", 4, 4), Variant("_p64", 64, 1, integer=True)),
    }
)


def build(
    weights: Weights, shape: ModelShape, runtime: str, path: Path, description: str = "", progress: Progress | None = None
) -> None:
    """Write the stages for ``runtime`` (a key of ``VARIANTS``) to ``path``: whole or not at all, mode 0444.

    ``progress`` hears bytes done and bytes in all. Raises ``UnavailableError`` when the folder cannot be written.
    """
    model = stage_model(weights, shape, runtime, description)
    with written_whole(path) as file:
        model.write(file, progress or (lambda done, whole: None))


def stage_model(weights: Weights, shape: ModelShape, runtime: str, description: str = "") -> Model:
    """The graphs of every stage in every variant that ``runtime`` needs."""
    model = Model(description)
    matrices = _Matrices(weights, shape)
    for variant in VARIANTS[runtime]:
        for index in range(shape.layers + 1):
            _Stage(model.graph(f"stage_{index:02d}{variant.suffix}"), matrices, shape, variant).build(index)
    return model


def row_scales(w: Floats) -> Floats:  # [m, n] -> [m]
    """The largest value of a row is 127 times its scale; a row of zeros has the scale 1."""
    scales = np.abs(w).max(1) / np.float32(INT8_MAX)
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def quantized(w: Floats) -> NDArray[np.int8]:  # [m, n] -> [m, n]
    return np.asarray(np.clip(np.rint(w / row_scales(w)[:, None]), -INT8_MAX, INT8_MAX), np.int8)


class _Matrices:
    """The constants of a model, made from its weights when they are written; the last layers stay in memory meanwhile."""

    def __init__(self, weights: Weights, shape: ModelShape) -> None:
        self.weights, self.shape = weights, shape
        self.layer = lru_cache(2)(weights.layer)

    def vector(self, key: str, make: Callable[[], Floats]) -> Constant:
        return Constant(key, "float32", (self.shape.width,), lambda: [make()])

    def table(self, head: bool) -> tuple[Constant, Constant]:
        """Head or embedding; one table for both where they are tied."""
        key, rows = ("head", self.weights.head) if head or self.weights.tied else ("embedding", self.weights.embedding)
        return _pair(key, (self.shape.vocabulary, self.shape.width), lambda: _pieces(rows, self.shape.vocabulary))

    def qkv(self, index: int) -> tuple[Constant, Constant]:
        shape = ((self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim, self.shape.width)
        return _pair(f"qkv.{index}", shape, lambda: iter([self._qkv(self.layer(index))]))

    def _qkv(self, layer: Layer) -> Floats:
        return np.concatenate([layer.q * np.float32(1 / sqrt(self.shape.head_dim)), layer.k, layer.v])

    def o(self, index: int) -> tuple[Constant, Constant]:
        shape = (self.shape.width, self.shape.heads * self.shape.head_dim)
        return _pair(f"o.{index}", shape, lambda: iter([self.layer(index).o]))

    def gate_up(self, index: int) -> tuple[Constant, Constant]:
        def both() -> Iterator[Floats]:
            yield self.layer(index).gate
            yield self.layer(index).up

        return _pair(f"gate_up.{index}", (2 * self.shape.hidden, self.shape.width), both)

    def down(self, index: int) -> tuple[Constant, Constant]:
        return _pair(f"down.{index}", (self.shape.width, self.shape.hidden), lambda: iter([self.layer(index).down]))


def _pieces(rows: Callable[[int, int], Floats], count: int) -> Iterator[Floats]:
    for first in range(0, count, ROWS_A_PIECE):
        yield rows(first, min(first + ROWS_A_PIECE, count))


def _pair(key: str, shape: tuple[int, int], pieces: Callable[[], Iterator[Floats]]) -> tuple[Constant, Constant]:
    """A matrix of whole rows as int8 values and their row scales."""
    values = Constant(key, "int8", shape, lambda: map(quantized, pieces()))
    return values, Constant(f"{key}.scales", "float32", (shape[0],), lambda: map(row_scales, pieces()))


class _Stage:
    """Builds one graph. T stands for the variant's rows, K for its wanted ones."""

    def __init__(self, graph: Graph, matrices: _Matrices, shape: ModelShape, variant: Variant) -> None:
        self.graph, self.matrices, self.shape, self.variant = graph, matrices, shape, variant

    def build(self, index: int) -> None:
        graph, rows = self.graph, self.variant.rows
        if index == 0:
            self.attend(0, self.embedded(graph.input("tokens", "int32", [rows])))
            return
        x = graph.input("x", "float32", [rows, self.shape.width])
        o = graph.input("o", "float32", [rows, self.shape.heads * self.shape.head_dim])
        x = self.after_attention(index - 1, x, o)
        if index < self.shape.layers:
            self.attend(index, x)
        else:
            graph.output("logits", self.logits(x, graph.input("last", "int32", [self.variant.wanted])))

    def embedded(self, tokens: int) -> int:  # [T] -> [T, width]
        values, scales = self.matrices.table(head=False)
        column = Constant(f"{scales.key}.column", scales.dtype, (*scales.shape, 1), scales.pieces)
        rows = op.dequantize(self.graph, op.gather(self.graph, self.graph.constant(values, 1.0), tokens))
        x = op.mul(self.graph, rows, op.gather(self.graph, self.graph.constant(column), tokens))
        if not self.matrices.weights.tied:
            return x
        return op.mul(self.graph, x, self.graph.constant(self.matrices.vector("gain", self.matrices.weights.gain)))

    def attend(self, index: int, x: int) -> None:  # [T, width] -> outputs x, qkv
        graph, shape, rows = self.graph, self.shape, self.variant.rows
        cos, sin = (graph.input(name, "float32", [rows, 1, shape.head_dim]) for name in ("cos", "sin"))
        layer = self.matrices.layer
        h = self.normed(x, self.matrices.vector(f"attention_norm.{index}", lambda: layer(index).attention_norm))
        qkv = self.product(h, *self.matrices.qkv(index))
        turned, kept = shape.heads + shape.kv_heads, shape.kv_heads
        qk = op.reshape(graph, op.columns(graph, qkv, 0, turned * shape.head_dim), [rows, turned, shape.head_dim])
        v = op.columns(graph, qkv, turned * shape.head_dim, kept * shape.head_dim)
        v = op.reshape(graph, v, [rows, kept, shape.head_dim])
        first, second = op.halves(graph, qk)
        swapped = op.concatenate(graph, [second, first], 2)
        qk = op.add(graph, op.mul(graph, qk, cos), op.mul(graph, swapped, sin))
        graph.output("x", x)
        graph.output("qkv", op.concatenate(graph, [qk, v], 1))

    def after_attention(self, index: int, x: int, o: int) -> int:  # [T, width], [T, heads * head_dim] -> [T, width]
        graph, layer = self.graph, self.matrices.layer
        x = op.add(graph, x, self.product(o, *self.matrices.o(index)))
        h = self.normed(x, self.matrices.vector(f"mlp_norm.{index}", lambda: layer(index).mlp_norm))
        gate, up = op.halves(graph, self.product(h, *self.matrices.gate_up(index)))
        h = op.mul(graph, op.mul(graph, gate, op.logistic(graph, gate)), up)
        return op.add(graph, x, self.product(h, *self.matrices.down(index)))

    def logits(self, x: int, last: int) -> int:  # [T, width], [K] -> [K, vocabulary]
        x = op.gather(self.graph, x, last)
        h = self.normed(x, self.matrices.vector("norm", self.matrices.weights.norm))
        return self.hybrid(h, *self.matrices.table(head=True))

    def normed(self, x: int, weight: Constant) -> int:  # [T, width] -> [T, width]
        graph = self.graph
        epsilon = graph.literal("float32", [self.matrices.weights.epsilon])
        x = op.mul(graph, x, op.rsqrt(graph, op.add(graph, op.mean(graph, op.mul(graph, x, x)), epsilon)))
        return op.mul(graph, x, graph.constant(weight))

    def product(self, x: int, values: Constant, scales: Constant) -> int:  # [T, n], [m, n] -> [T, m]
        return (self.integer if self.variant.integer else self.hybrid)(x, values, scales)

    def hybrid(self, x: int, values: Constant, scales: Constant) -> int:
        y = op.fully_connected(self.graph, x, self.graph.constant(values, 1.0))
        return op.mul(self.graph, y, self.graph.constant(scales))

    def integer(self, x: int, values: Constant, scales: Constant) -> int:
        """x is quantized in the graph, symmetric, one scale a row."""
        graph = self.graph
        scale = op.mul(graph, op.maximum(graph, op.absolute(graph, x)), graph.literal("float32", [1 / INT8_MAX]))
        whole = op.quantize(graph, op.div(graph, x, scale))
        y = op.to_float(graph, op.integer_product(graph, whole, graph.constant(values, 1.0)))
        return op.mul(graph, op.mul(graph, y, scale), graph.constant(scales))
