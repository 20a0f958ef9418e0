"""The operators that the language stages use, each with the shape of its result.

Rules: a function takes the graph and tensor numbers and gives the number of its result; shapes are in the comments.  A side of
-1 is dynamic: it broadcasts against 1 and itself, and at most one side of a reshape may be it.
Versions are the lowest that both runtimes take; what one of them gets wrong is told where it is avoided.
"""

from __future__ import annotations

from collections.abc import Sequence

from tflite import BuiltinOperator

from models.flatbuffer import Graph, Options, Tensor


def _one(
    graph: Graph,
    code: int,
    inputs: Sequence[int],
    shape: Sequence[int],
    table: str = "",
    options: Options = (),
    version: int = 1,
    dtype: str = "float32",
    scale: float | None = None,
) -> int:
    result = Tensor(f"{graph.name}/{len(graph.tensors)}", dtype, tuple(shape), scale=scale)
    return graph.apply(code, inputs, [result], table, options, version)[0]


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    if any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        raise ValueError(f"{a} and {b} do not broadcast")
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def mul(graph: Graph, a: int, b: int) -> int:
    return _one(graph, BuiltinOperator.MUL, [a, b], _broadcast(graph.shape(a), graph.shape(b)), "MulOptions")


def add(graph: Graph, a: int, b: int) -> int:
    return _one(graph, BuiltinOperator.ADD, [a, b], _broadcast(graph.shape(a), graph.shape(b)), "AddOptions")


def div(graph: Graph, a: int, b: int) -> int:
    return _one(graph, BuiltinOperator.DIV, [a, b], _broadcast(graph.shape(a), graph.shape(b)), "DivOptions")


def mean(graph: Graph, x: int) -> int:  # [T, n] -> [T, 1]
    return _reduce(graph, BuiltinOperator.MEAN, x)


def maximum(graph: Graph, x: int) -> int:  # [T, n] -> [T, 1]
    return _reduce(graph, BuiltinOperator.REDUCE_MAX, x)


def _reduce(graph: Graph, code: int, x: int) -> int:
    shape = graph.shape(x)
    axis = graph.literal("int32", [len(shape) - 1])
    return _one(graph, code, [x, axis], (*shape[:-1], 1), "ReducerOptions", (("KeepDims", True),))


def rsqrt(graph: Graph, x: int) -> int:
    return _one(graph, BuiltinOperator.RSQRT, [x], graph.shape(x))


def logistic(graph: Graph, x: int) -> int:
    return _one(graph, BuiltinOperator.LOGISTIC, [x], graph.shape(x))


def absolute(graph: Graph, x: int) -> int:
    return _one(graph, BuiltinOperator.ABS, [x], graph.shape(x), "AbsOptions")


def gather(graph: Graph, rows: int, indices: int) -> int:  # [n, m], int32 [k] -> [k, m]
    whole = graph.tensors[rows]
    shape = (*graph.shape(indices), *whole.shape[1:])
    options: Options = (("Axis", 0),)
    return _one(graph, BuiltinOperator.GATHER, [rows, indices], shape, "GatherOptions", options, 2, whole.dtype, whole.scale)


def dequantize(graph: Graph, x: int) -> int:
    return _one(graph, BuiltinOperator.DEQUANTIZE, [x], graph.shape(x), "DequantizeOptions", (), 2)


def columns(graph: Graph, x: int, first: int, count: int) -> int:  # [T, n] -> [T, count]
    rows = graph.shape(x)[0]
    begin, size = graph.literal("int32", [0, first]), graph.literal("int32", [rows, count])
    return _one(graph, BuiltinOperator.SLICE, [x, begin, size], (rows, count), "SliceOptions")


def reshape(graph: Graph, x: int, shape: Sequence[int]) -> int:
    return _one(graph, BuiltinOperator.RESHAPE, [x, graph.literal("int32", shape)], shape, "ReshapeOptions")


def halves(graph: Graph, x: int) -> tuple[int, ...]:  # [..., 2 n] -> [..., n], [..., n]
    shape = graph.shape(x)
    half = (*shape[:-1], shape[-1] // 2)
    results = [Tensor(f"{graph.name}/{len(graph.tensors) + 1 + i}", "float32", half) for i in range(2)]
    axis = graph.literal("int32", [len(shape) - 1], [])
    return graph.apply(BuiltinOperator.SPLIT, [axis, x], results, "SplitOptions", (("NumSplits", 2),))


def concatenate(graph: Graph, parts: Sequence[int], axis: int) -> int:
    shape = list(graph.shape(parts[0]))
    shape[axis] = sum(graph.shape(part)[axis] for part in parts)
    return _one(graph, BuiltinOperator.CONCATENATION, parts, shape, "ConcatenationOptions", (("Axis", axis),))


def fully_connected(graph: Graph, x: int, w: int) -> int:  # [T, n], int8 [m, n] -> [T, m]
    """x is quantized to int8 by the runtime, a scale and a zero point a row; the scale of ``w`` must be 1."""
    shape = (graph.shape(x)[0], graph.shape(w)[0])
    options: Options = (("KeepNumDims", True), ("AsymmetricQuantizeInputs", True))
    return _one(graph, BuiltinOperator.FULLY_CONNECTED, [x, w, -1], shape, "FullyConnectedOptions", options, 3)


def quantize(graph: Graph, x: int) -> int:  # float32 [T, n] -> int8 [T, n], scale 1
    return _one(graph, BuiltinOperator.QUANTIZE, [x], graph.shape(x), "QuantizeOptions", dtype="int8", scale=1.0)


def integer_product(graph: Graph, x: int, w: int) -> int:  # int8 [T, n], int8 [m, n] -> int32 [T, m]
    shape = (graph.shape(x)[0], graph.shape(w)[0])
    options: Options = (("AdjY", True),)
    return _one(graph, BuiltinOperator.BATCH_MATMUL, [x, w], shape, "BatchMatMulOptions", options, 3, "int32", 1.0)


def to_float(graph: Graph, x: int) -> int:
    return _one(graph, BuiltinOperator.CAST, [x], graph.shape(x))
