"""The parked precision: a sealed block of 64 tokens in 4 bits a value.

Rules: keys (before RoPE) are quantized per channel over the block's tokens, values per token over its channels (KIVI, Liu et
al. 2024): q = round((x - zero) / scale), 0 to 15, with scale and zero in float16, as they are stored.  A byte holds channel
``c`` in its low nibble and channel ``c + head_dim / 2`` in its high one.  Layout of a payload, each part over all layers and KV
heads: key nibbles, key scales, key zeros, value nibbles, value scales, value zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS
from edge_agent.core.model_shape import ModelShape

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
LEVELS = np.float32(15)
KEY_AXIS, VALUE_AXIS = -2, -1


@dataclass(frozen=True, slots=True)
class Part:
    """K or V of a block: ``nibbles [L, kv, 64, d / 2]``; float16 ``scales`` and ``zeros`` with length 1 along ``axis``."""

    axis: int
    nibbles: Bytes
    scales: NDArray[np.float16]
    zeros: NDArray[np.float16]

    def __getitem__(self, layers: slice) -> Part:
        return Part(self.axis, self.nibbles[layers], self.scales[layers], self.zeros[layers])

    def encode(self, x: Floats) -> None:
        """Take ``x [L, kv, 64, d]``, which is junk afterwards."""
        zero, scale = x.min(self.axis, keepdims=True), x.max(self.axis, keepdims=True)
        scale -= zero
        scale /= LEVELS
        self.scales[:], self.zeros[:] = scale, zero
        scale[:], zero[:] = self.scales, self.zeros
        scale[scale == 0] = 1
        x -= zero
        x /= scale
        np.rint(x, x)
        np.clip(x, 0, LEVELS, x)
        whole = x.astype(np.uint8)
        half = x.shape[-1] // 2
        np.left_shift(whole[..., half:], 4, self.nibbles)
        self.nibbles[:] |= whole[..., :half]

    def decoded(self) -> Floats:
        """``-> [L, kv, 64, d]``: q * scale + zero."""
        half = self.nibbles.shape[-1]
        x = np.empty((*self.nibbles.shape[:-1], 2 * half), np.float32)
        x[..., :half] = self.nibbles & 15
        x[..., half:] = self.nibbles >> 4
        x *= self.scales.astype(np.float32)
        x += self.zeros.astype(np.float32)
        return x


def parts(payload: Any, shape: ModelShape) -> tuple[Part, Part]:
    """K and V of a payload, in place. Raises ``RefusedError`` for another length than ``block_bytes``."""
    if len(payload) != shape.block_bytes:
        raise RefusedError("KV block", f"{len(payload)} bytes", f"{shape.block_bytes} bytes", "recompute it")
    data = np.frombuffer(payload, np.uint8)
    lead, width = (shape.layers, shape.kv_heads), shape.head_dim
    middle = shape.layers * shape.kv_heads * (BLOCK_TOKENS * width // 2 + 4 * width)
    nibbles = (*lead, BLOCK_TOKENS, width // 2)
    keys = _part(KEY_AXIS, data[:middle], nibbles, (*lead, 1, width))
    return keys, _part(VALUE_AXIS, data[middle:], nibbles, (*lead, BLOCK_TOKENS, 1))


def _part(axis: int, data: Bytes, nibbles: tuple[int, ...], scales: tuple[int, ...]) -> Part:
    count = int(np.prod(nibbles))
    scale, zero = data[count:].view(np.float16).reshape(2, *scales)
    return Part(axis, data[:count].reshape(nibbles), scale, zero)


def checked(payload: Any, shape: ModelShape) -> tuple[Part, Part]:
    """``parts`` of bytes from outside. Raises ``RefusedError`` for scales that are no numbers, too."""
    found = parts(payload, shape)
    if not all(np.isfinite(each).all() for part in found for each in (part.scales, part.zeros)):
        raise RefusedError("KV block", "a scale that is no number", remedy="recompute it")
    return found
