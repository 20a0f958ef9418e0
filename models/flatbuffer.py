"""``.tflite`` files: graphs of operators over tensors, written through the generated schema (package ``tflite``).

Rules: a graph holds names, shapes and numbers only; the weights are ``Constant``s that say how to make their bytes, and are
made one after another while the file is written, so that memory holds one piece of one weight at a time.  Equal constants are
one buffer for all graphs of a model.  Every buffer begins at a multiple of 16 bytes.  The same model gives the same bytes.
The layout is that of any FlatBuffer: the tables first, then the buffers' vectors, which their tables point forward to.
Source: tensorflow/compiler/mlir/lite/schema/schema.fbs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import flatbuffers
import numpy as np
import tflite
from numpy.typing import NDArray

ALIGNMENT_BYTES = 16
SCHEMA_VERSION = 3
MAX_FILE_BYTES = 2**31 - 1
"""A FlatBuffer's offsets have 32 bits, and readers take them as signed."""
TYPES = {
    "float32": tflite.TensorType.FLOAT32,
    "int32": tflite.TensorType.INT32,
    "int8": tflite.TensorType.INT8,
}

Builder = Any
Options = tuple[tuple[str, int | float | bool], ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """A weight named ``key``: ``pieces`` makes its values in C order, in as many arrays as suit its memory."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[NDArray[Any]]]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Tensor:
    """``buffer`` 0 is a value computed at run time. A dimension of -1 is dynamic. ``scale`` marks a quantized tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: int = 0
    scale: float | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    code: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options_table: str = ""
    options: Options = ()


class Model:
    """Graphs that share constants. Each graph is one signature of the file."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.graphs: list[Graph] = []
        self.constants: list[Constant] = []
        self.codes: list[tuple[int, int]] = []
        self._buffers: dict[str, int] = {}
        self._codes: dict[tuple[int, int], int] = {}

    def graph(self, name: str) -> Graph:
        self.graphs.append(Graph(self, name))
        return self.graphs[-1]

    def buffer(self, constant: Constant) -> int:
        """The number of a constant's buffer; 0 is the empty one."""
        if constant.key not in self._buffers:
            self.constants.append(constant)
            self._buffers[constant.key] = len(self.constants)
        return self._buffers[constant.key]

    def code(self, operator: int, version: int) -> int:
        if (operator, version) not in self._codes:
            self._codes[operator, version] = len(self.codes)
            self.codes.append((operator, version))
        return self._codes[operator, version]

    def write(self, file: IO[bytes], written: Callable[[int, int], None] = lambda done, whole: None) -> None:
        """Write the file; ``written`` hears bytes done and bytes in all. Raises ``ValueError`` past ``MAX_FILE_BYTES``."""
        tables = bytearray(_tables(self))
        at = _aligned(len(tables))
        ends = []
        for number, constant in enumerate(self.constants, 1):
            _point(tables, number, at)
            ends.append(at := _aligned(at + ALIGNMENT_BYTES + constant.size_bytes))
        if at > MAX_FILE_BYTES:
            raise ValueError(f"{at} bytes; a .tflite file has at most {MAX_FILE_BYTES}")
        file.write(tables + bytes(_aligned(len(tables)) - len(tables)))
        for constant, end in zip(self.constants, ends, strict=True):
            _write_constant(file, constant)
            file.write(bytes(end - file.tell()))
            written(end, at)


class Graph:
    """One signature: tensors, operators, and which tensors go in and out."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name = model, name
        self.tensors: list[Tensor] = []
        self.operators: list[Operator] = []
        self.inputs: list[tuple[str, int]] = []
        self.outputs: list[tuple[str, int]] = []
        self._constants: dict[tuple[str, float | None], int] = {}

    def tensor(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def shape(self, tensor: int) -> tuple[int, ...]:
        return self.tensors[tensor].shape

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> int:
        self.inputs.append((name, self.tensor(Tensor(f"{self.name}/{name}", dtype, tuple(shape)))))
        return self.inputs[-1][1]

    def output(self, name: str, tensor: int) -> None:
        self.outputs.append((name, tensor))

    def constant(self, constant: Constant, scale: float | None = None) -> int:
        known = (constant.key, scale)
        if known not in self._constants:
            buffer = self.model.buffer(constant)
            self._constants[known] = self.tensor(Tensor(constant.key, constant.dtype, constant.shape, buffer, scale))
        return self._constants[known]

    def literal(self, dtype: str, values: Sequence[float], shape: Sequence[int] | None = None) -> int:
        """A small constant, shared by its value."""
        array = np.array(values, dtype).reshape(tuple(shape) if shape is not None else (len(values),))
        key = f"{dtype}{list(array.shape)} {array.tobytes().hex()}"
        return self.constant(Constant(key, dtype, array.shape, lambda: [array]))

    def apply(
        self,
        code: int,
        inputs: Sequence[int],
        outputs: Sequence[Tensor],
        options_table: str = "",
        options: Options = (),
        version: int = 1,
    ) -> tuple[int, ...]:
        """Add an operator; gives its output tensors."""
        made = tuple(self.tensor(each) for each in outputs)
        self.operators.append(Operator(self.model.code(code, version), tuple(inputs), made, options_table, options))
        return made


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _point(tables: bytearray, buffer: int, at: int) -> None:
    """Let a buffer's table point to a vector whose *data* begins 16 bytes after ``at``: its length is the word before."""
    table = tflite.Model.GetRootAs(tables, 0).Buffers(buffer)._tab
    field = table.Pos + table.Offset(4)
    struct.pack_into("<I", tables, field, at + ALIGNMENT_BYTES - 4 - field)


def _write_constant(file: IO[bytes], constant: Constant) -> None:
    file.write(struct.pack("<12xI", constant.size_bytes))
    begin = file.tell()
    for piece in constant.pieces():
        if piece.dtype != np.dtype(constant.dtype):
            raise ValueError(f"{constant.key}: a piece of {piece.dtype}, not {constant.dtype}")
        file.write(np.ascontiguousarray(piece).data.cast("B") if piece.size else b"")
    if file.tell() - begin != constant.size_bytes:
        raise ValueError(f"{constant.key}: {file.tell() - begin} bytes made, {constant.size_bytes} told")


def _tables(model: Model) -> bytes:
    """Everything but the constants, whose buffers have a vector of no bytes to be pointed elsewhere."""
    builder = flatbuffers.Builder(1 << 20)
    description = builder.CreateString(model.description)
    signatures = _vector(builder, [_signature(builder, number, each) for number, each in enumerate(model.graphs)])
    graphs = _vector(builder, [_graph(builder, each) for each in model.graphs])
    codes = _vector(builder, [_code(builder, *each) for each in model.codes])
    nothing = _buffer(builder, None)
    buffers = _vector(builder, [nothing, *(_buffer(builder, b"") for _ in model.constants)])
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, SCHEMA_VERSION)
    tflite.ModelAddOperatorCodes(builder, codes)
    tflite.ModelAddSubgraphs(builder, graphs)
    tflite.ModelAddDescription(builder, description)
    tflite.ModelAddBuffers(builder, buffers)
    tflite.ModelAddSignatureDefs(builder, signatures)
    builder.Finish(tflite.ModelEnd(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _vector(builder: Builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _numbers(builder: Builder, dtype: str, numbers: Sequence[float]) -> int:
    return int(builder.CreateNumpyVector(np.array(numbers, dtype)))


def _buffer(builder: Builder, data: bytes | None) -> int:
    vector = builder.CreateByteVector(data) if data is not None else 0
    tflite.BufferStart(builder)
    if vector:
        tflite.BufferAddData(builder, vector)
    return int(tflite.BufferEnd(builder))


def _code(builder: Builder, operator: int, version: int) -> int:
    tflite.OperatorCodeStart(builder)
    tflite.OperatorCodeAddDeprecatedBuiltinCode(builder, min(operator, 127))
    tflite.OperatorCodeAddVersion(builder, version)
    tflite.OperatorCodeAddBuiltinCode(builder, operator)
    return int(tflite.OperatorCodeEnd(builder))


def _signature(builder: Builder, number: int, graph: Graph) -> int:
    inputs = _vector(builder, [_named(builder, *each) for each in graph.inputs])
    outputs = _vector(builder, [_named(builder, *each) for each in graph.outputs])
    key = builder.CreateString(graph.name)
    tflite.SignatureDefStart(builder)
    tflite.SignatureDefAddInputs(builder, inputs)
    tflite.SignatureDefAddOutputs(builder, outputs)
    tflite.SignatureDefAddSignatureKey(builder, key)
    tflite.SignatureDefAddSubgraphIndex(builder, number)
    return int(tflite.SignatureDefEnd(builder))


def _named(builder: Builder, name: str, tensor: int) -> int:
    text = builder.CreateString(name)
    tflite.TensorMapStart(builder)
    tflite.TensorMapAddName(builder, text)
    tflite.TensorMapAddTensorIndex(builder, tensor)
    return int(tflite.TensorMapEnd(builder))


def _graph(builder: Builder, graph: Graph) -> int:
    tensors = _vector(builder, [_tensor(builder, each) for each in graph.tensors])
    inputs = _numbers(builder, "int32", [tensor for _, tensor in graph.inputs])
    outputs = _numbers(builder, "int32", [tensor for _, tensor in graph.outputs])
    operators = _vector(builder, [_operator(builder, each) for each in graph.operators])
    name = builder.CreateString(graph.name)
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, tensors)
    tflite.SubGraphAddInputs(builder, inputs)
    tflite.SubGraphAddOutputs(builder, outputs)
    tflite.SubGraphAddOperators(builder, operators)
    tflite.SubGraphAddName(builder, name)
    return int(tflite.SubGraphEnd(builder))


def _tensor(builder: Builder, tensor: Tensor) -> int:
    name = builder.CreateString(tensor.name)
    shape = _numbers(builder, "int32", [max(1, side) for side in tensor.shape])
    signature = _numbers(builder, "int32", tensor.shape) if -1 in tensor.shape else 0
    quantization = _quantization(builder, tensor.scale) if tensor.scale is not None else 0
    tflite.TensorStart(builder)
    tflite.TensorAddShape(builder, shape)
    tflite.TensorAddType(builder, TYPES[tensor.dtype])
    tflite.TensorAddBuffer(builder, tensor.buffer)
    tflite.TensorAddName(builder, name)
    if quantization:
        tflite.TensorAddQuantization(builder, quantization)
    if signature:
        tflite.TensorAddShapeSignature(builder, signature)
    return int(tflite.TensorEnd(builder))


def _quantization(builder: Builder, scale: float) -> int:
    scales, zeros = _numbers(builder, "float32", [scale]), _numbers(builder, "int64", [0])
    tflite.QuantizationParametersStart(builder)
    tflite.QuantizationParametersAddScale(builder, scales)
    tflite.QuantizationParametersAddZeroPoint(builder, zeros)
    return int(tflite.QuantizationParametersEnd(builder))


def _operator(builder: Builder, operator: Operator) -> int:
    inputs, outputs = _numbers(builder, "int32", operator.inputs), _numbers(builder, "int32", operator.outputs)
    options = _options(builder, operator)
    tflite.OperatorStart(builder)
    tflite.OperatorAddOpcodeIndex(builder, operator.code)
    tflite.OperatorAddInputs(builder, inputs)
    tflite.OperatorAddOutputs(builder, outputs)
    if options:
        tflite.OperatorAddBuiltinOptionsType(builder, getattr(tflite.BuiltinOptions, operator.options_table))
        tflite.OperatorAddBuiltinOptions(builder, options)
    return int(tflite.OperatorEnd(builder))


def _options(builder: Builder, operator: Operator) -> int:
    """An operator's option table by its name in the schema; absent fields have the schema's defaults."""
    table = operator.options_table
    if not table:
        return 0
    getattr(tflite, f"{table}Start")(builder)
    for field, value in operator.options:
        getattr(tflite, f"{table}Add{field}")(builder, value)
    return int(getattr(tflite, f"{table}End")(builder))
