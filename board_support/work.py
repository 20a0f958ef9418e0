"""What a ``.tflite`` file has to do: its operators, multiply-accumulates and bytes, read from its own flatbuffer.

Rules: imported only by the engine's child and the shell's one-off commands, because the flatbuffer reader brings NumPy;
every vector length of the file is bounded before it is walked; whatever the reader says about a corrupt file becomes a
``RefusedError``.

Shapes are those of the file: a dynamic dimension counts as it is stored there (1), and the branches of IF, WHILE and CALL
are not followed, because nothing in the file says how often they run.  A constant that is only decompressed (float16 weights
behind DEQUANTIZE, sparse ones behind DENSIFY) counts as the constant that it becomes: runtimes do that once, when they load.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import tflite

from board_support.roofline import MAX_OPS, MAX_WORK, ModelWork, OpWork
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DTYPE_BYTES, MAX_RANK, bounded

MAX_MODEL_BYTES = 2**31
MAX_MODEL_TENSORS = 200_000
MAX_OP_TENSORS = 1_024
MIN_MODEL_BYTES = 8
FILE_IDENTIFIER = b"TFL3"

READER_ERRORS = (struct.error, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
"""What the flatbuffer reader and NumPy raise when offsets of a corrupt file lead nowhere."""

TYPE_NAMES = {
    code: name.lower() for name, code in vars(tflite.TensorType).items() if not name.startswith("_") and isinstance(code, int)
}
OP_NAMES = {
    code: name for name, code in vars(tflite.BuiltinOperator).items() if not name.startswith("_") and isinstance(code, int)
}
NUMBER_FORMATS = {
    "int4": "int4", "int8": "int8", "uint8": "int8", "int16": "int16", "float16": "float16", "bfloat16": "float16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    type_name: str
    constant_bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def activation_bytes(self) -> int:
        return 0 if self.constant_bytes else self.elements * DTYPE_BYTES.get(self.type_name, 1)


NO_TENSOR = _Tensor((), "", 0)
DECOMPRESSORS = ("DEQUANTIZE", "DENSIFY")


def model_work(model: bytes | memoryview, subgraph: int = 0) -> ModelWork:
    """The work of one invocation of a subgraph (0: the main one). Raises ``RefusedError`` for anything but a sound model."""
    bounded("model size", len(model), MIN_MODEL_BYTES, MAX_MODEL_BYTES, "bytes")
    if bytes(model[4:8]) != FILE_IDENTIFIER:
        raise RefusedError("model", bytes(model[:8]), "a TFLite flatbuffer: TFL3 at byte 4")
    try:
        return _read(tflite.Model.GetRootAsModel(model, 0), subgraph)
    except READER_ERRORS as error:
        raise RefusedError("model", f"a broken flatbuffer ({type(error).__name__}: {error})", "a sound .tflite file") from None


def _read(model: Any, subgraph: int) -> ModelWork:
    bounded("model subgraph", subgraph, 0, model.SubgraphsLength() - 1)
    graph = model.Subgraphs(subgraph)
    bounded("model tensors", graph.TensorsLength(), 0, MAX_MODEL_TENSORS)
    bounded("model operators", graph.OperatorsLength(), 0, MAX_OPS)
    tensors = [_tensor(model, graph.Tensors(i)) for i in range(graph.TensorsLength())]
    ops = []
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        kind = _kind(model, op)
        if not (kind in DECOMPRESSORS and _folded(op, tensors)):
            ops.append(_op_work(kind, op, tensors))
    ends = _picked(tensors, graph.InputsLength(), graph.Inputs) + _picked(tensors, graph.OutputsLength(), graph.Outputs)
    return ModelWork(tuple(ops), sum(tensor.activation_bytes for tensor in ends))


def _folded(op: Any, tensors: list[_Tensor]) -> bool:
    """Mark the output constant if the input is one."""
    (source,), (target,) = _picked(tensors, op.InputsLength(), op.Inputs), _picked(tensors, op.OutputsLength(), op.Outputs)
    if source.constant_bytes:
        tensors[op.Outputs(0)] = replace(target, constant_bytes=target.elements * DTYPE_BYTES.get(target.type_name, 1))
    return source.constant_bytes > 0


def _tensor(model: Any, tensor: Any) -> _Tensor:
    bounded("model tensor rank", tensor.ShapeLength(), 0, MAX_RANK)
    shape = tuple(max(int(tensor.Shape(i)), 0) or 1 for i in range(tensor.ShapeLength()))
    bounded("model tensor elements", prod(shape), 1, MAX_WORK)
    buffer_index = bounded("model buffer", int(tensor.Buffer()), 0, max(model.BuffersLength() - 1, 0))
    buffer = model.Buffers(buffer_index)
    stored = buffer.DataLength() or (int(buffer.Size()) if int(buffer.Offset()) > 1 else 0)
    constant_bytes = bounded("model buffer size", stored, 0, MAX_MODEL_BYTES, "bytes")
    return _Tensor(shape, TYPE_NAMES.get(tensor.Type(), ""), constant_bytes)


def _picked(tensors: list[_Tensor], length: int, index: Any) -> list[_Tensor]:
    """The tensors that an index vector names; -1 stands for an optional one that is not there."""
    bounded("model operator tensors", length, 0, MAX_OP_TENSORS)
    numbers = [bounded("model tensor index", int(index(i)), -1, len(tensors) - 1) for i in range(length)]
    return [NO_TENSOR if n < 0 else tensors[n] for n in numbers]


def _op_work(kind: str, op: Any, tensors: list[_Tensor]) -> OpWork:
    inputs, outputs = _picked(tensors, op.InputsLength(), op.Inputs), _picked(tensors, op.OutputsLength(), op.Outputs)
    positions, depth, columns, repeats = _product(kind, inputs, outputs)
    return OpWork(
        kind,
        repeats * positions * depth * columns,
        sum(tensor.constant_bytes for tensor in inputs),
        sum(tensor.activation_bytes for tensor in inputs if tensor.shape) + sum(tensor.activation_bytes for tensor in outputs),
        positions,
        depth,
        columns,
        repeats,
        _number_format(inputs),
    )


def _kind(model: Any, op: Any) -> str:
    code = model.OperatorCodes(bounded("model operator code", op.OpcodeIndex(), 0, model.OperatorCodesLength() - 1))
    number = max(int(code.BuiltinCode()), int(code.DeprecatedBuiltinCode()))
    return str(OP_NAMES.get(number, f"BUILTIN_{number}"))


def _number_format(inputs: list[_Tensor]) -> str:
    """The format in which an operator multiplies: that of its activations, unless int8 ones meet int4 weights.

    Float activations over int8 weights (dynamic-range quantization) count as float32, the dearer of the two.
    """
    moving = next((tensor for tensor in inputs if tensor.shape and not tensor.constant_bytes), NO_TENSOR)
    number_format = NUMBER_FORMATS.get(moving.type_name, "float32")
    if number_format == "int8" and any(tensor.type_name == "int4" for tensor in inputs):
        return "int4"
    return number_format


def _product(kind: str, inputs: list[_Tensor], outputs: list[_Tensor]) -> tuple[int, int, int, int]:
    """The matrix product that an operator is: positions, depth, outputs, repeats; all 0 when it multiplies nothing."""
    if kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):  # filter [out, h, w, in] or [1, h, w, channels], output [n, h, w, channels]
        weights, out = inputs[1].shape, outputs[0].shape
        _need_rank(kind, 4, weights, out)
        depth = prod(weights[1:]) if kind == "CONV_2D" else weights[1] * weights[2]
        return prod(out[:3]), depth, out[3], 1
    if kind == "TRANSPOSE_CONV":  # inputs: output shape, filter [out, h, w, in], activations [n, h, w, in]
        weights, moving = inputs[1].shape, inputs[2].shape
        _need_rank(kind, 4, weights, moving)
        return prod(moving[:3]), weights[3], prod(weights[:3]), 1
    if kind == "FULLY_CONNECTED":  # activations [..., in], weights [out, in]
        _need_rank(kind, 2, inputs[1].shape)
        columns, depth = inputs[1].shape[:2]
        return -(-inputs[0].elements // depth), depth, columns, 1
    if kind == "BATCH_MATMUL":  # [..., m, k] x [..., k, n], either may be adjoint -> [..., m, n]
        out = outputs[0].shape
        _need_rank(kind, 2, out, inputs[0].shape)
        depth = prod(inputs[0].shape[-2:]) // out[-2]
        return out[-2], depth, out[-1], prod(out[:-2])
    return 0, 0, 0, 0


def _need_rank(kind: str, low: int, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        if len(shape) < low:
            raise RefusedError(f"model operator {kind}", f"a tensor of rank {len(shape)}", f"rank {low}")
