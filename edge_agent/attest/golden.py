"""The golden input of a model: what every board feeds it to show that it still answers as it should.

Rules: it follows from the model's signature alone, to the bit and on every machine, so that nothing has to be kept or sent.  Its
bytes are SHA-256(label, input's name, counter), one block after another.  Floats are given their sign, one of a few exponents and
all their mantissa by these bytes, so they lie between -1 and 1 and are finite; integers of 32 bits and more are 0 or 1, since
they often are indices or lengths; a dimension that is open is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from math import prod

from edge_agent.core.values import DTYPE_BYTES, Tensor, TensorSpec

LABEL = b"sly/1/golden"
MAX_GOLDEN_BYTES = 16 * 2**20
"""Of all inputs of one model; one that takes more has no golden input."""
_EXPONENTS = {
    "float16": ((0xFF, 0x00), (0x83, 0x38)),
    "float32": ((0x7F, 0x00), (0x81, 0x3E)),
    "float64": ((0x0F, 0xE0), (0x80, 0x3F)),
}
"""IEEE 754 (2019), table 3.5: (kept bits, set bits) of the last byte but one and of the last, so that the value's magnitude is
under 1."""


def golden_inputs(inputs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Tensors that fit the signature's ``inputs``; none at all if they would be more than ``MAX_GOLDEN_BYTES``."""
    shapes = {spec.name: tuple(max(1, length) for length in spec.shape) for spec in inputs}
    if sum(prod(shapes[spec.name]) * DTYPE_BYTES[spec.dtype] for spec in inputs) > MAX_GOLDEN_BYTES:
        return {}
    return {spec.name: _tensor(spec, shapes[spec.name]) for spec in inputs}


def _tensor(spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    width = DTYPE_BYTES[spec.dtype]
    data = _stream(spec.name, prod(shape) * width)
    if spec.dtype in _EXPONENTS:
        for place, (kept, given) in zip((width - 2, width - 1), _EXPONENTS[spec.dtype], strict=True):
            data[place::width] = data[place::width].translate(bytes(byte & kept | given for byte in range(256)))
    elif spec.dtype == "bool" or width >= 4:
        data[::width] = data[::width].translate(bytes(byte & 1 for byte in range(256)))
        for place in range(1, width):
            data[place::width] = bytes(len(data) // width)
    return Tensor(spec.dtype, shape, bytes(data))


def _stream(name: str, size_bytes: int) -> bytearray:
    seed = LABEL + sha256(name.encode()).digest()
    blocks = (sha256(seed + number.to_bytes(4, "big")).digest() for number in range(-(-size_bytes // 32)))
    return bytearray(b"".join(blocks)[:size_bytes])
