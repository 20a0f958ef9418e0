"""The model without its attention: L + 1 stages of one ``.tflite`` on LiteRT or tflite-runtime.

Rules: a row's result does not depend on the rows that share its call.  LiteRT's file has one set of signatures with a dynamic
number of rows; tflite-runtime's has static ones: ``_t1`` for decoding, ``_p64`` for prompts, unused rows are padding.  (Its
``_t4`` gives other last bits than ``_t1`` and takes as long as four of them.)
What ``start`` gives is the step's own memory; every stage fills it anew.

    first stage   tokens, cos, sin       -> x, qkv
    stage i       x, o, cos, sin         -> x, qkv      what follows attention in layer i - 1, then q, k, v of layer i
    last stage    x, o, last             -> logits of the rows ``last``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError
from edge_agent.core.model_shape import ModelShape

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
LOAD_ERRORS = (ValueError, RuntimeError, MemoryError, TypeError, KeyError)
STATIC_DECODE, STATIC_PREFILL = "_t1", "_p64"
INPUTS, OUTPUTS = ("tokens", "x", "o", "last", "cos", "sin"), ("x", "qkv", "logits")
ROWS = {STATIC_DECODE: 1, STATIC_PREFILL: 64}


class StageCalls(Protocol):
    """What the decoder calls, once a step and in this order."""

    def start(self, tokens: Ints, cos: Floats, sin: Floats, decode: int) -> Floats:
        """``tokens [T]``, ``cos``, ``sin [T, d]`` of ``decode`` rows, then a prompt's -> ``qkv [T, heads + 2 kv_heads, d]``."""

    def next(self, stage: int, o: Floats) -> None:
        """Attention's output ``o [T, heads * d]`` of layer ``stage - 1``; what ``start`` gave is now of layer ``stage``."""

    def finish(self, o: Floats, wanted: Sequence[int]) -> Floats:
        """Attention's output of the last layer, and the rows whose logits are wanted -> ``[len(wanted), vocabulary]``."""


class Graph:
    """One set of signatures: every stage at one number of rows, which a dynamic one can change."""

    def __init__(self, interpreter: Any, shape: ModelShape, suffix: str) -> None:
        self._shape, self._wrapper = shape, interpreter._interpreter
        runners = [interpreter.get_signature_runner(f"stage_{i:02d}{suffix}") for i in range(shape.layers + 1)]
        self._subgraphs = [each._subgraph_index for each in runners]
        self._numbers = [dict(each._inputs) for each in runners]
        self._rows = [0] * len(runners)
        self._inputs: list[tuple[NDArray[Any], ...]] = [() for _ in runners]
        named = [dict(each._outputs) for each in runners]
        self._outputs = [tuple(outputs[name] for name in OUTPUTS if name in outputs) for outputs in named]
        self.static_rows = ROWS.get(suffix, 0)

    def resize(self, stage: int, rows: int) -> None:
        """Make room for ``rows`` rows in one stage."""
        if self._rows[stage] == rows:
            return
        subgraph, inputs, wrapper = self._subgraphs[stage], self._numbers[stage], self._wrapper
        self._inputs[stage] = ()
        if not self.static_rows:
            for name, index in inputs.items():
                wrapper.ResizeInputTensor(index, np.array(self._input_shape(name, rows), np.int32), False, subgraph)
        wrapper.AllocateTensors(subgraph)
        self._inputs[stage] = tuple(wrapper.tensor(wrapper, inputs[name], subgraph) for name in INPUTS if name in inputs)
        for view in self._inputs[stage]:
            view.fill(0)
        self._rows[stage] = rows

    def _input_shape(self, name: str, rows: int) -> tuple[int, ...]:
        shape = self._shape
        return {
            "x": (rows, shape.width),
            "o": (rows, shape.heads * shape.head_dim),
            "cos": (rows, 1, shape.head_dim),
            "sin": (rows, 1, shape.head_dim),
        }.get(name, (rows,))

    def run(self, stage: int, *arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """``arrays`` in the order of ``INPUTS``, as many rows as the stage has room for, or fewer; outputs as of ``OUTPUTS``."""
        rows = len(arrays[0])
        if rows == self._rows[stage]:
            for view, array in zip(self._inputs[stage], arrays, strict=True):
                np.copyto(view, array)
        else:
            for view, array in zip(self._inputs[stage], arrays, strict=True):
                np.copyto(view[:rows], array)
        wrapper, subgraph = self._wrapper, self._subgraphs[stage]
        wrapper.Invoke(subgraph)
        return tuple([wrapper.tensor(wrapper, index, subgraph) for index in self._outputs[stage]])


@dataclass(slots=True)
class Piece:
    """Rows ``first`` to ``last - 1`` of a step, computed by one graph."""

    graph: Graph
    first: int
    last: int


class Stages(StageCalls):
    """``decode`` rows come first in a step, prompt rows after them: a static file has other graphs for each."""

    def __init__(self, interpreter: Any, shape: ModelShape) -> None:
        self._shape = shape
        names = set(interpreter.get_signature_list())
        self._dynamic = Graph(interpreter, shape, "") if "stage_00" in names else None
        suffixes = () if self._dynamic else tuple(ROWS)
        self._static = {suffix: Graph(interpreter, shape, suffix) for suffix in suffixes}
        self._interpreter = interpreter
        self._pieces: list[Piece] = []
        self._x: Floats = np.empty((0, shape.width), np.float32)
        self._qkv: Floats = np.empty((0, 0, 0), np.float32)
        self._cos = self._sin = np.empty((0, 1, shape.head_dim), np.float32)

    def start(self, tokens: Ints, cos: Floats, sin: Floats, decode: int) -> Floats:
        shape, count = self._shape, len(tokens)
        self._pieces = self._cut(decode, count)
        self._cos, self._sin = cos[:, None], sin[:, None]
        self._x = np.empty((count, shape.width), np.float32)
        self._qkv = np.empty((count, shape.heads + 2 * shape.kv_heads, shape.head_dim), np.float32)
        self._run(0, tokens)
        return self._qkv

    def next(self, stage: int, o: Floats) -> None:
        self._run(stage, self._x, o)

    def finish(self, o: Floats, wanted: Sequence[int]) -> Floats:
        rows, stage = np.asarray(wanted, np.int64), self._shape.layers
        x, o = self._x[rows], o[rows]
        logits = np.empty((len(rows), self._shape.vocabulary), np.float32)
        for piece in self._cut(len(rows), len(rows)):
            part = slice(piece.first, piece.last)
            count = piece.last - piece.first
            piece.graph.resize(stage, piece.graph.static_rows or count)
            last = np.arange(count, dtype=np.int32)
            (found,) = piece.graph.run(stage, x[part], o[part], last)
            logits[part] = found[:count]
        return logits

    def _run(self, stage: int, *arrays: NDArray[Any]) -> None:
        if len(self._pieces) == 1 and not self._pieces[0].graph.static_rows:
            graph = self._pieces[0].graph
            graph.resize(stage, len(self._cos))
            self._x, qkv = graph.run(stage, *arrays, self._cos, self._sin)
            np.copyto(self._qkv, qkv)
            return
        for piece in self._pieces:
            part = slice(piece.first, piece.last)
            count = piece.last - piece.first
            piece.graph.resize(stage, piece.graph.static_rows)
            x, qkv = piece.graph.run(stage, *(array[part] for array in (*arrays, self._cos, self._sin)))
            np.copyto(self._x[part], x[:count])
            np.copyto(self._qkv[part], qkv[:count])

    def _cut(self, decode: int, rows: int) -> list[Piece]:
        if self._dynamic:
            return [Piece(self._dynamic, 0, rows)] if rows else []
        pieces, first = [], 0
        while first < rows:
            left = (decode if first < decode else rows) - first
            suffix = STATIC_PREFILL if first >= decode else STATIC_DECODE
            last = first + min(left, ROWS[suffix])
            pieces.append(Piece(self._static[suffix], first, last))
            first = last
        return pieces


def open_stages(
    interpreter_module: ModuleType, path_or_content: str | bytes, shape: ModelShape, threads: int, runtime: str
) -> Stages:
    """The stages of a built model on the ``interpreter`` module of ``runtime``. Raises ``RefusedError`` if they do not load."""
    model = {"model_path" if isinstance(path_or_content, str) else "model_content": path_or_content}
    try:
        return Stages(interpreter_module.Interpreter(**model, num_threads=threads), shape)
    except LOAD_ERRORS as error:
        raise RefusedError(f"language model on {runtime}", str(error), "the stages that sly models build writes") from error
