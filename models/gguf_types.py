"""The tensor types of GGUF that are read, each as one function from bytes to float32.

Rules: every function takes whole blocks, uint8 [n * block_bytes], and gives float32 [n * block_items] in the same order.
Products are taken in float32, as ggml's reference does, so that the same file gives the same numbers everywhere.
Source: the block structs of https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TensorType:
    """A type stores ``block_items`` numbers in ``block_bytes`` bytes."""

    name: str
    block_items: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]

    def bytes_of(self, items: int) -> int:
        return items // self.block_items * self.block_bytes


def _halves(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of every block. [n, block] -> [n, 1]"""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Floats:
    """Low nibbles, then high nibbles. [n, b] -> [n, 2 b]"""
    return np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)


def float32(raw: Bytes) -> Floats:
    return raw.view("<f4").astype(np.float32)


def float16(raw: Bytes) -> Floats:
    return raw.view("<f2").astype(np.float32)


def bfloat16(raw: Bytes) -> Floats:
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def q4_0(raw: Bytes) -> Floats:
    """d (q - 8): float16 d, 16 bytes of nibbles."""
    blocks = raw.reshape(-1, 18)
    return (_halves(blocks, 0) * (_nibbles(blocks[:, 2:]) - np.float32(8))).reshape(-1)


def q4_1(raw: Bytes) -> Floats:
    """d q + m: float16 d and m, 16 bytes of nibbles."""
    blocks = raw.reshape(-1, 20)
    return (_halves(blocks, 0) * _nibbles(blocks[:, 4:]) + _halves(blocks, 2)).reshape(-1)


def q8_0(raw: Bytes) -> Floats:
    """d q: float16 d, 32 int8."""
    blocks = raw.reshape(-1, 34)
    return (_halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(-1)


def q6_k(raw: Bytes) -> Floats:
    """d s (q - 32): 256 numbers of 6 bits in 16 groups with an int8 scale s each; the low 4 bits lie apart from the high 2."""
    blocks = raw.reshape(-1, 210)
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    fours = np.concatenate([low & 15, low >> 4], 2)  # [n, 2, 4, 32]
    twos = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3  # [n, 2, 4, 32]
    values = (fours | twos << 4).astype(np.float32) - np.float32(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _halves(blocks, 208)  # [n, 16]
    return np.asarray(values.reshape(-1, 16, 16) * scales[:, :, None], np.float32).reshape(-1)


TYPES: Mapping[int, TensorType] = MappingProxyType(
    {
        0: TensorType("F32", 1, 4, float32),
        1: TensorType("F16", 1, 2, float16),
        2: TensorType("Q4_0", 32, 18, q4_0),
        3: TensorType("Q4_1", 32, 20, q4_1),
        8: TensorType("Q8_0", 32, 34, q8_0),
        14: TensorType("Q6_K", 256, 210, q6_k),
        30: TensorType("BF16", 1, 2, bfloat16),
    }
)
