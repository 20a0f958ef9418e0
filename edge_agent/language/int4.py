"""The parked precision: a sealed block of 64 tokens in 4 bits a value.

Rules: keys (before RoPE) are quantized per channel over the block's tokens, values per token over its channels (KIVI, Liu et
al. 2024): q = round((x - zero) / scale), 0 to 15, with scale and zero in float16, as they are stored.  A byte holds channel
``c`` in its low nibble and channel ``c + head_dim / 2`` in its high one.  Layout of a payload, each part over all layers and KV
heads: key nibbles, key scales, key zeros, value nibbles, value scales, value zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS
from edge_agent.language.shape import ModelShape

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Bytes = NDArray[np.uint8]
LEVELS = 15
KEY_AXIS, VALUE_AXIS = -2, -1


def encoded(keys: Floats, values: Floats) -> bytes:
    """``[L, kv, 64, d]`` twice ``-> block_bytes``."""
    return b"".join(part.tobytes() for part in (*int4_of(keys, KEY_AXIS), *int4_of(values, VALUE_AXIS)))


def decoded(payload: bytes | memoryview, shape: ModelShape) -> tuple[Floats, Floats]:
    """Inverse of ``encoded``, up to its rounding. Raises ``RefusedError`` for another length or scales that are no numbers."""
    if len(payload) != shape.block_bytes:
        raise RefusedError("KV block", f"{len(payload)} bytes", f"{shape.block_bytes} bytes", "recompute it")
    data = np.frombuffer(payload, np.uint8)
    layers, heads, width = shape.layers, shape.kv_heads, shape.head_dim
    lead = layers * heads
    middle = lead * (BLOCK_TOKENS * width // 2 + 4 * width)
    keys = _parts(data[:middle], (layers, heads, BLOCK_TOKENS, width // 2), (layers, heads, 1, width))
    values = _parts(data[middle:], (layers, heads, BLOCK_TOKENS, width // 2), (layers, heads, BLOCK_TOKENS, 1))
    return float_of(*keys), float_of(*values)


def _parts(data: Bytes, nibbles: tuple[int, ...], scales: tuple[int, ...]) -> tuple[Bytes, Halves, Halves]:
    count = int(np.prod(nibbles))
    halves = data[count:].view(np.float16)
    if not np.isfinite(halves).all():
        raise RefusedError("KV block", "a scale that is no number", remedy="recompute it")
    scale, zero = halves.reshape(2, *scales)
    return data[:count].reshape(nibbles), scale, zero


def int4_of(x: Floats, axis: int) -> tuple[Bytes, Halves, Halves]:
    """``[..., d] -> nibbles [..., d / 2], scale and zero`` with length 1 along ``axis``."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    zero, scale = low.astype(np.float16), ((high - low) / LEVELS).astype(np.float16)
    step = scale.astype(np.float32)
    step[step == 0] = 1
    level = np.rint((x - zero.astype(np.float32)) / step)
    whole = np.clip(level, 0, LEVELS, out=level).astype(np.uint8)
    half = x.shape[-1] // 2
    return whole[..., :half] | whole[..., half:] << 4, scale, zero


def float_of(nibbles: Bytes, scale: Halves, zero: Halves) -> Floats:
    """``[..., d / 2] -> [..., d]``: q * scale + zero."""
    half = nibbles.shape[-1]
    x = np.empty((*nibbles.shape[:-1], 2 * half), np.float32)
    x[..., :half] = nibbles & 15
    x[..., half:] = nibbles >> 4
    x *= scale.astype(np.float32)
    x += zero.astype(np.float32)
    return x
