"""A model whose answer is known without running it: whether a runtime computes at all, and what it should.

Owns its bytes and its arithmetic.  Rules: no library is needed to make it, so the agent's own process can; it has integers only
and every scale is 1, so that the one right answer follows from whole numbers, on every machine and by every delegate; the same
bytes for ever.  One fully connected layer, ``y = clamp(w x + b)`` in int8, wide enough for the kernels that use a processor's
vector instructions; some outputs saturate.
Source: tensorflow/compiler/mlir/lite/schema/schema.fbs (the numbers of the fields), flatbuffers.dev/internals (the layout).
"""

from __future__ import annotations

import struct
from hashlib import sha256

from edge_agent.core.values import Tensor

INPUTS, OUTPUTS = 64, 16
INPUT_NAME, OUTPUT_NAME = "x", "y"
_INT32, _INT8 = 2, 9
"""``TensorType``."""
_FULLY_CONNECTED, _FULLY_CONNECTED_OPTIONS = 9, 8
"""``BuiltinOperator``, and the place of its options in ``BuiltinOptions``."""
_INT8_VERSION = 4
"""Of the operator: the first with int8 weights of one scale."""
_SCHEMA_VERSION = 3
_ALIGNMENT_BYTES = 16


def known_inputs() -> dict[str, Tensor]:
    return {INPUT_NAME: Tensor("int8", (1, INPUTS), struct.pack(f"<{INPUTS}b", *_inputs()))}


def known_outputs() -> dict[str, Tensor]:
    """What ``known_model`` gives for ``known_inputs``, computed here in whole numbers."""
    inputs, weights, biases = _inputs(), _weights(), _biases()
    rows = [weights[at * INPUTS : (at + 1) * INPUTS] for at in range(OUTPUTS)]
    sums = [sum(w * x for w, x in zip(row, inputs, strict=True)) + bias for row, bias in zip(rows, biases, strict=True)]
    data = struct.pack(f"<{OUTPUTS}b", *(max(-128, min(127, each)) for each in sums))
    return {OUTPUT_NAME: Tensor("int8", (1, OUTPUTS), data)}


def known_model() -> bytes:
    """The ``.tflite`` file."""
    weights, biases = struct.pack(f"<{OUTPUTS * INPUTS}b", *_weights()), struct.pack(f"<{OUTPUTS}i", *_biases())
    tensors = [
        _tensor(INPUT_NAME, _INT8, (1, INPUTS), 0),
        _tensor("w", _INT8, (OUTPUTS, INPUTS), 1),
        _tensor("b", _INT32, (OUTPUTS,), 2),
        _tensor(OUTPUT_NAME, _INT8, (1, OUTPUTS), 0),
    ]
    options = _Table(("b", 0))
    operator = _Table(
        ("I", 0), _Numbers("i", (0, 1, 2)), _Numbers("i", (3,)), ("B", _FULLY_CONNECTED_OPTIONS), options
    )  # fmt: skip
    graph = _Table([*tensors], _Numbers("i", (0,)), _Numbers("i", (3,)), [operator], "main")
    code = _Table(("b", _FULLY_CONNECTED), None, ("i", _INT8_VERSION), ("i", _FULLY_CONNECTED))
    signature = _Table([_Table(INPUT_NAME, ("I", 0))], [_Table(OUTPUT_NAME, ("I", 3))], "serving_default", None, ("I", 0))
    buffers = [_Table(), _Table(_Numbers("B", tuple(weights))), _Table(_Numbers("B", tuple(biases)))]
    root = _Table(("I", _SCHEMA_VERSION), [code], [graph], "known answer", [*buffers], None, None, [signature])
    file = bytearray(struct.pack("<I4s", 0, b"TFL3"))
    struct.pack_into("<I", file, 0, _write(file, root))
    return bytes(file)


def _inputs() -> tuple[int, ...]:
    return _drawn("inputs", INPUTS, 8)


def _weights() -> tuple[int, ...]:
    return _drawn("weights", OUTPUTS * INPUTS, 3)


def _biases() -> tuple[int, ...]:
    return _drawn("biases", OUTPUTS, 100)


def _drawn(what: str, count: int, most: int) -> tuple[int, ...]:
    """``count`` numbers from -``most`` to ``most``, by SHA-256 in counter mode."""
    blocks = (sha256(f"sly/1/known-answer {what} {at}".encode()).digest() for at in range(-(-count // 32)))
    return tuple(byte % (2 * most + 1) - most for byte in b"".join(blocks)[:count])


def _tensor(name: str, kind: int, shape: tuple[int, ...], buffer: int) -> _Table:
    quantization = _Table(None, None, _Numbers("f", (1.0,)), _Numbers("q", (0,)))
    return _Table(_Numbers("i", shape), ("b", kind), ("I", buffer), name, quantization)


class _Numbers:
    """A vector of scalars, which ``struct`` calls ``code``."""

    def __init__(self, code: str, values: tuple[float, ...]) -> None:
        self.size, self.count = struct.calcsize(code), len(values)
        self.data = struct.pack(f"<{len(values)}{code}", *values)


class _Table:
    """Fields by their number in the schema: a scalar as (code of ``struct``, value), something referred to, or nothing."""

    def __init__(self, *fields: tuple[str, int] | str | _Numbers | _Table | list[_Table] | None) -> None:
        self.fields = fields


def _write(file: bytearray, thing: object) -> int:
    """Append what is referred to, and after it what that refers to; where it begins."""
    match thing:
        case _Table():
            return _write_table(file, thing)
        case _Numbers():
            _pad(file, 4, max(4, _ALIGNMENT_BYTES if thing.size == 1 else thing.size))
            at = len(file)
            file += struct.pack("<I", thing.count) + thing.data
        case str():
            _pad(file, 0, 4)
            at = len(file)
            file += struct.pack("<I", len(thing)) + thing.encode("ascii") + b"\0"
        case list():
            _pad(file, 0, 4)
            at = len(file)
            file += struct.pack("<I", len(thing)) + bytes(4 * len(thing))
            for number, each in enumerate(thing):
                _refer(file, at + 4 + 4 * number, each)
        case _:
            raise ValueError(f"nothing that a file refers to: {thing!r}")
    return at


def _write_table(file: bytearray, table: _Table) -> int:
    """Its vtable, the table, then what it refers to."""
    offsets, body, referred = [], bytearray(4), []
    for field in table.fields:
        code, value = field if isinstance(field, tuple) else ("I", 0)
        _pad(body, 0, struct.calcsize(code))
        offsets.append(0 if field is None else len(body))
        if field is not None:
            referred += [] if isinstance(field, tuple) else [(len(body), field)]
            body += struct.pack(f"<{code}", value)
    vtable = struct.pack(f"<{2 + len(offsets)}H", 4 + 2 * len(offsets), len(body), *offsets)
    _pad(file, len(vtable), 4)
    file += vtable
    at = len(file)
    struct.pack_into("<i", body, 0, len(vtable))
    file += body
    for place, each in referred:
        _refer(file, at + place, each)
    return at


def _refer(file: bytearray, place: int, thing: object) -> None:
    struct.pack_into("<I", file, place, _write(file, thing) - place)


def _pad(file: bytearray, ahead: int, alignment: int) -> None:
    """So that what comes after ``ahead`` more bytes is aligned."""
    file += bytes(-(len(file) + ahead) % alignment)
