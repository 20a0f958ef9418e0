"""Small ``.tflite`` files, written here so that no test needs the network.

Owns a writer of TFLite flatbuffers and the models named in ``KINDS``.  Rules: only ``flatbuffers`` and the ``tflite``
schema package are used, so that the files can be made in every environment; weights come from a seeded generator, so that
the same kind is the same bytes for ever; every kind has the signature ``serving_default`` and runs on ai-edge-litert 2
and on tflite-runtime 2.14.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import flatbuffers
import tflite

ALIGNMENT_BYTES = 16
TYPE_CODES = {"float32": 0, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int8": 9}


@dataclass(frozen=True)
class T:
    """A tensor. ``data`` makes it a constant; ``scales`` quantize it, along ``axis`` if there are several."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes = b""
    scales: tuple[float, ...] = ()
    zero_point: int = 0
    axis: int = 0


@dataclass(frozen=True)
class Op:
    """An operator by its ``BuiltinOperator`` name. ``options`` writes its option table and gives (union type, offset)."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Callable[[flatbuffers.Builder], tuple[int, int]] | None = None
    version: int = 1


@dataclass(frozen=True)
class Graph:
    tensors: tuple[T, ...]
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name: str = "main"


def options_table(union: str, **fields: int) -> Callable[[flatbuffers.Builder], tuple[int, int]]:
    """A writer of the option table ``union`` with scalar ``fields``."""

    def write(builder: flatbuffers.Builder) -> tuple[int, int]:
        getattr(tflite, f"{union}Start")(builder)
        for key, value in fields.items():
            getattr(tflite, f"{union}Add{key}")(builder, value)
        return getattr(tflite.BuiltinOptions, union), getattr(tflite, f"{union}End")(builder)

    return write


def _offsets(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _int32s(builder: flatbuffers.Builder, numbers: Sequence[int]) -> int:
    builder.StartVector(4, len(numbers), 4)
    for number in reversed(numbers):
        builder.PrependInt32(number)
    return int(builder.EndVector())


def _aligned_bytes(builder: flatbuffers.Builder, data: bytes) -> int:
    builder.StartVector(1, len(data), ALIGNMENT_BYTES)
    builder.head -= len(data)
    builder.Bytes[builder.head : builder.head + len(data)] = data
    return int(builder.EndVector())


def _quantization(builder: flatbuffers.Builder, tensor: T) -> int:
    builder.StartVector(4, len(tensor.scales), 4)
    for scale in reversed(tensor.scales):
        builder.PrependFloat32(scale)
    scales = builder.EndVector()
    builder.StartVector(8, len(tensor.scales), 8)
    for _ in tensor.scales:
        builder.PrependInt64(tensor.zero_point)
    zero_points = builder.EndVector()
    tflite.QuantizationParametersStart(builder)
    tflite.QuantizationParametersAddScale(builder, scales)
    tflite.QuantizationParametersAddZeroPoint(builder, zero_points)
    tflite.QuantizationParametersAddQuantizedDimension(builder, tensor.axis)
    return int(tflite.QuantizationParametersEnd(builder))


def _tensor(builder: flatbuffers.Builder, tensor: T, buffer: int) -> int:
    name, shape = builder.CreateString(tensor.name), _int32s(builder, [max(n, 1) for n in tensor.shape])
    signature = _int32s(builder, tensor.shape) if -1 in tensor.shape else 0
    quantization = _quantization(builder, tensor) if tensor.scales else 0
    tflite.TensorStart(builder)
    tflite.TensorAddShape(builder, shape)
    tflite.TensorAddType(builder, TYPE_CODES[tensor.dtype])
    tflite.TensorAddBuffer(builder, buffer)
    tflite.TensorAddName(builder, name)
    if quantization:
        tflite.TensorAddQuantization(builder, quantization)
    if signature:
        tflite.TensorAddShapeSignature(builder, signature)
    return int(tflite.TensorEnd(builder))


def _operator(builder: flatbuffers.Builder, op: Op, code_index: int) -> int:
    inputs, outputs = _int32s(builder, op.inputs), _int32s(builder, op.outputs)
    union, options = op.options(builder) if op.options else (0, 0)
    tflite.OperatorStart(builder)
    tflite.OperatorAddOpcodeIndex(builder, code_index)
    tflite.OperatorAddInputs(builder, inputs)
    tflite.OperatorAddOutputs(builder, outputs)
    if op.options:
        tflite.OperatorAddBuiltinOptionsType(builder, union)
        tflite.OperatorAddBuiltinOptions(builder, options)
    return int(tflite.OperatorEnd(builder))


def _graph(builder: flatbuffers.Builder, graph: Graph, codes: list[tuple[str, int]], buffers: list[bytes]) -> int:
    tensors = []
    for tensor in graph.tensors:
        if tensor.data:
            buffers.append(tensor.data)
        tensors.append(_tensor(builder, tensor, len(buffers) - 1 if tensor.data else 0))
    operators = []
    for op in graph.ops:
        if (op.name, op.version) not in codes:
            codes.append((op.name, op.version))
        operators.append(_operator(builder, op, codes.index((op.name, op.version))))
    tensor_vector, operator_vector = _offsets(builder, tensors), _offsets(builder, operators)
    inputs, outputs = _int32s(builder, graph.inputs), _int32s(builder, graph.outputs)
    name = builder.CreateString(graph.name)
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, tensor_vector)
    tflite.SubGraphAddInputs(builder, inputs)
    tflite.SubGraphAddOutputs(builder, outputs)
    tflite.SubGraphAddOperators(builder, operator_vector)
    tflite.SubGraphAddName(builder, name)
    return int(tflite.SubGraphEnd(builder))


def _codes(builder: flatbuffers.Builder, codes: list[tuple[str, int]]) -> int:
    offsets = []
    for name, version in codes:
        code = getattr(tflite.BuiltinOperator, name)
        tflite.OperatorCodeStart(builder)
        tflite.OperatorCodeAddDeprecatedBuiltinCode(builder, min(code, 127))
        tflite.OperatorCodeAddBuiltinCode(builder, code)
        tflite.OperatorCodeAddVersion(builder, version)
        offsets.append(tflite.OperatorCodeEnd(builder))
    return _offsets(builder, offsets)


def _buffers(builder: flatbuffers.Builder, buffers: list[bytes]) -> int:
    offsets = []
    for data in buffers:
        vector = _aligned_bytes(builder, data) if data else 0
        tflite.BufferStart(builder)
        if data:
            tflite.BufferAddData(builder, vector)
        offsets.append(tflite.BufferEnd(builder))
    return _offsets(builder, offsets)


def _tensor_maps(builder: flatbuffers.Builder, graph: Graph, indices: Sequence[int]) -> int:
    offsets = []
    for index in indices:
        name = builder.CreateString(graph.tensors[index].name)
        tflite.TensorMapStart(builder)
        tflite.TensorMapAddName(builder, name)
        tflite.TensorMapAddTensorIndex(builder, index)
        offsets.append(tflite.TensorMapEnd(builder))
    return _offsets(builder, offsets)


def _signature(builder: flatbuffers.Builder, graph: Graph) -> int:
    inputs, outputs = _tensor_maps(builder, graph, graph.inputs), _tensor_maps(builder, graph, graph.outputs)
    key = builder.CreateString("serving_default")
    tflite.SignatureDefStart(builder)
    tflite.SignatureDefAddInputs(builder, inputs)
    tflite.SignatureDefAddOutputs(builder, outputs)
    tflite.SignatureDefAddSignatureKey(builder, key)
    tflite.SignatureDefAddSubgraphIndex(builder, 0)
    return _offsets(builder, [tflite.SignatureDefEnd(builder)])


def write_model(*graphs: Graph) -> bytes:
    """The flatbuffer of a model; the first graph is the main one and gets the signature."""
    builder = flatbuffers.Builder(4096)
    codes: list[tuple[str, int]] = []
    buffers = [b""]
    subgraphs = _offsets(builder, [_graph(builder, graph, codes, buffers) for graph in graphs])
    code_vector, buffer_vector = _codes(builder, codes), _buffers(builder, buffers)
    signatures = _signature(builder, graphs[0])
    description = builder.CreateString("tiny model for tests")
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, 3)
    tflite.ModelAddOperatorCodes(builder, code_vector)
    tflite.ModelAddSubgraphs(builder, subgraphs)
    tflite.ModelAddDescription(builder, description)
    tflite.ModelAddBuffers(builder, buffer_vector)
    tflite.ModelAddSignatureDefs(builder, signatures)
    builder.Finish(tflite.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


def floats(seed: int, *shape: int) -> bytes:
    """``prod(shape)`` float32 weights in [-0.5, 0.5), the same for the same seed."""
    generator = random.Random(seed)
    return struct.pack(f"<{prod(shape)}f", *(generator.random() - 0.5 for _ in range(prod(shape))))


def int8s(seed: int, *shape: int) -> bytes:
    generator = random.Random(seed)
    return struct.pack(f"<{prod(shape)}b", *(generator.randint(-127, 127) for _ in range(prod(shape))))


SAME = options_table("Conv2DOptions", Padding=0, StrideW=1, StrideH=1, DilationWFactor=1, DilationHFactor=1)
DEPTHWISE = options_table(
    "DepthwiseConv2DOptions", Padding=0, StrideW=1, StrideH=1, DepthMultiplier=1, DilationWFactor=1, DilationHFactor=1
)
DENSE = options_table("FullyConnectedOptions")
SOFTMAX = options_table("SoftmaxOptions", Beta=1.0)  # type: ignore[arg-type]


def conv() -> bytes:
    """``y = conv(x)``: float32 [1, 8, 8, 3] -> [1, 8, 8, 4], 3x3, stride 1, SAME; 64 * 4 * 27 = 6,912 MACs."""
    tensors = (
        T("x", "float32", (1, 8, 8, 3)),
        T("w", "float32", (4, 3, 3, 3), floats(1, 4, 3, 3, 3)),
        T("b", "float32", (4,), floats(2, 4)),
        T("y", "float32", (1, 8, 8, 4)),
    )
    return write_model(Graph(tensors, (Op("CONV_2D", (0, 1, 2), (3,), SAME),), (0,), (3,)))


def float_net() -> bytes:
    """conv -> depthwise -> fully connected -> softmax: float32 ``image`` [1, 8, 8, 3] -> ``scores`` [1, 10]."""
    tensors = (
        T("image", "float32", (1, 8, 8, 3)),
        T("w1", "float32", (8, 3, 3, 3), floats(3, 8, 3, 3, 3)),
        T("b1", "float32", (8,), floats(4, 8)),
        T("h1", "float32", (1, 8, 8, 8)),
        T("w2", "float32", (1, 3, 3, 8), floats(5, 1, 3, 3, 8)),
        T("b2", "float32", (8,), floats(6, 8)),
        T("h2", "float32", (1, 8, 8, 8)),
        T("w3", "float32", (10, 512), floats(7, 10, 512)),
        T("b3", "float32", (10,), floats(8, 10)),
        T("h3", "float32", (1, 10)),
        T("scores", "float32", (1, 10)),
    )
    ops = (
        Op("CONV_2D", (0, 1, 2), (3,), SAME),
        Op("DEPTHWISE_CONV_2D", (3, 4, 5), (6,), DEPTHWISE),
        Op("FULLY_CONNECTED", (6, 7, 8), (9,), DENSE),
        Op("SOFTMAX", (9,), (10,), SOFTMAX),
    )
    return write_model(Graph(tensors, ops, (0,), (10,)))


def int8_net() -> bytes:
    """conv -> depthwise -> fully connected, all int8: ``image`` int8 [1, 8, 8, 3] -> ``scores`` int8 [1, 10]."""
    per_channel = tuple(0.002 * (i + 1) for i in range(8))
    tensors = (
        T("image", "int8", (1, 8, 8, 3), scales=(0.0078125,)),
        T("w1", "int8", (8, 3, 3, 3), int8s(9, 8, 3, 3, 3), per_channel),
        T("b1", "int32", (8,), bytes(32), tuple(s * 0.0078125 for s in per_channel)),
        T("h1", "int8", (1, 8, 8, 8), scales=(0.05,), zero_point=-3),
        T("w2", "int8", (1, 3, 3, 8), int8s(10, 1, 3, 3, 8), per_channel, axis=3),
        T("b2", "int32", (8,), bytes(32), tuple(s * 0.05 for s in per_channel)),
        T("h2", "int8", (1, 8, 8, 8), scales=(0.1,), zero_point=4),
        T("w3", "int8", (10, 512), int8s(11, 10, 512), (0.003,)),
        T("b3", "int32", (10,), bytes(40), (0.0003,)),
        T("scores", "int8", (1, 10), scales=(0.5,)),
    )
    ops = (
        Op("CONV_2D", (0, 1, 2), (3,), SAME, version=3),
        Op("DEPTHWISE_CONV_2D", (3, 4, 5), (6,), DEPTHWISE, version=3),
        Op("FULLY_CONNECTED", (6, 7, 8), (9,), DENSE, version=4),
    )
    return write_model(Graph(tensors, ops, (0,), (9,)))


def two_inputs() -> bytes:
    """``total = left + right`` of float32 [1, 4], in a batch of any size: the first dimension is dynamic."""
    tensors = (T("left", "float32", (-1, 4)), T("right", "float32", (-1, 4)), T("total", "float32", (-1, 4)))
    return write_model(Graph(tensors, (Op("ADD", (0, 1), (2,), options_table("AddOptions")),), (0, 1), (2,)))


def slow() -> bytes:
    """Twelve 3x3 convolutions over float32 [1, 96, 96, 32]: 1.02 G MACs, tens of milliseconds on one core."""
    channels, side, layers = 32, 96, 12
    tensors = [
        T("x", "float32", (1, side, side, channels)),
        T("w", "float32", (channels, 3, 3, channels), floats(12, channels, 3, 3, channels)),
        T("b", "float32", (channels,), bytes(4 * channels)),
    ]
    tensors += [T(f"h{i}" if i < layers - 1 else "y", "float32", (1, side, side, channels)) for i in range(layers)]
    ops = tuple(Op("CONV_2D", (i + 2 if i else 0, 1, 2), (i + 3,), SAME) for i in range(layers))
    return write_model(Graph(tuple(tensors), ops, (0,), (layers + 2,)))


def endless() -> bytes:
    """A WHILE loop whose condition is always true: ``invoke`` never returns. float32 ``x`` [1] -> ``y`` [1]."""
    main = Graph(
        (T("x", "float32", (1,)), T("y", "float32", (1,))),
        (Op("WHILE", (0,), (1,), options_table("WhileOptions", CondSubgraphIndex=1, BodySubgraphIndex=2)),),
        (0,),
        (1,),
    )
    condition = Graph(
        (T("x", "float32", (1,)), T("same", "bool", (1,))),
        (Op("EQUAL", (0, 0), (1,), options_table("EqualOptions")),),
        (0,),
        (1,),
        "condition",
    )
    zero = T("zero", "float32", (1,), struct.pack("<f", 0.0))
    body = Graph(
        (T("x", "float32", (1,)), zero, T("y", "float32", (1,))),
        (Op("ADD", (0, 1), (2,), options_table("AddOptions")),),
        (0,),
        (2,),
        "body",
    )
    return write_model(main, condition, body)


KINDS: dict[str, Callable[[], bytes]] = {
    "conv": conv,
    "float": float_net,
    "int8": int8_net,
    "two_inputs": two_inputs,
    "slow": slow,
    "endless": endless,
}


@cache
def tiny_model(kind: str = "conv") -> bytes:
    """The bytes of the model ``kind``, one of ``KINDS``."""
    return KINDS[kind]()
