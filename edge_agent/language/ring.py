"""One session's hot KV cache: int8 strips in memory that somebody else owns.

Rules: the state of a ring is a function of its session's tokens, whether it was built token by token or restored.
A strip (layer, K or V, KV head) is ``[slots, head_dim]``; its valid slots are one prefix:

    [sinks: 4][sealed blocks: S * 64][rows: the full block before the last, then the last]

Sealed block ``b`` lies at place ``b mod window_blocks``, so a block that is sealed into a full window takes the place of the
oldest one, and the rows after it move down by a block.  Rows hold keys after RoPE at their absolute position; a sealed block
holds what its int4 form gives back, turned to its absolute position.  The sinks are kept in float16 before RoPE (the prelude)
and turned to the four positions before the window, anew only when it slides: nothing is ever quantized twice.
Nothing here seals by itself: who decodes calls ``seal`` when the tokens are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, block_start, full_blocks, room_in_block, sealed_blocks
from edge_agent.core.model_shape import ModelShape, ring_bytes, ring_slots
from edge_agent.language import int4
from edge_agent.language.int8 import int8_of
from edge_agent.language.rope import Rope, turned, turned_back

Floats = NDArray[np.float32]
Buffer = bytearray | memoryview
LAYERS_AT_ONCE = 5
SINKS = slice(0, SINK_TOKENS)


class Ring:
    """``memory`` is writable and has ``ring_bytes(shape, window_blocks)`` bytes.

    ``values`` is int8 ``[layers, 2, kv_heads, slots, head_dim]``, ``scales`` float32 ``[layers, 2, kv_heads, slots]``; K, then V.
    """

    def __init__(self, memory: Buffer, shape: ModelShape, window_blocks: int) -> None:
        if len(memory) != ring_bytes(shape, window_blocks):
            raise ValueError(f"a ring of {ring_bytes(shape, window_blocks)} bytes cannot lie in {len(memory)}")
        self.shape, self.window_blocks = shape, window_blocks
        strips, slots = (shape.layers, 2, shape.kv_heads), ring_slots(window_blocks)
        data = np.frombuffer(memory, np.uint8)
        first, second = shape.strips * slots * shape.head_dim, shape.strips * slots * (shape.head_dim + 4)
        self.values = data[:first].view(np.int8).reshape(*strips, slots, shape.head_dim)
        self.scales = data[first:second].view(np.float32).reshape(*strips, slots)
        self._prelude = data[second:].view(np.float16).reshape(*strips, SINK_TOKENS, shape.head_dim)
        self._rope = Rope(shape.head_dim, shape.rope_base)
        self.tokens = 0
        self.sealed = 0

    @property
    def used(self) -> int:
        """How many slots are valid."""
        return self.slot(self.tokens)

    @property
    def room(self) -> int:
        """How many tokens may be appended now: to the end of the block, none while a full block waits to be sealed."""
        return room_in_block(self.tokens) if self.sealed >= sealed_blocks(self.tokens) else 0

    @property
    def first_row(self) -> int:
        """The position of the first token after the sinks that is not sealed."""
        return block_start(self.sealed)

    def slot(self, position: int) -> int:
        """Where a sink or a row lies; ``ValueError`` for a position that is sealed."""
        if position < SINK_TOKENS:
            return position
        if position < self.first_row:
            raise ValueError(f"position {position} is sealed; rows begin at {self.first_row}")
        return SINK_TOKENS + min(self.sealed, self.window_blocks) * BLOCK_TOKENS + position - self.first_row

    def reset(self) -> None:
        self.tokens = self.sealed = 0

    def truncate(self, tokens: int) -> None:
        """Forget the rows from position ``tokens`` on (rejected guesses)."""
        first = self.first_row if self.sealed else 0
        if not first <= tokens <= self.tokens:
            raise ValueError(f"truncate to {tokens}: {first} to {self.tokens} are rows")
        self.tokens = tokens

    # Appending: the decoder writes rows where the next slots are, layer by layer, then calls ``advance``.

    def write_sinks(self, layer: int, rows: Floats, cos: Floats, sin: Floats) -> None:
        """Those of ``rows [T, 2, kv_heads, head_dim]``, keys turned by ``cos`` and ``sin [T, head_dim]``, that are sinks."""
        count = min(SINK_TOKENS - self.tokens, len(rows))
        place = slice(self.tokens, self.tokens + count)
        strips = rows[:count].transpose(1, 2, 0, 3)
        self._prelude[layer, 0, :, place] = turned_back(strips[0], cos[:count], sin[:count])
        self._prelude[layer, 1, :, place] = strips[1]
        self._turn_sinks(layer, place, cos[:count], sin[:count])

    def advance(self, tokens: int) -> None:
        if tokens > self.room:
            raise ValueError(f"{tokens} tokens appended where {self.room} fit")
        self.tokens += tokens

    # Sealing

    def seal(self) -> list[tuple[int, bytes]]:
        """Seal what is due; the blocks and their payloads, oldest first."""
        sealed = []
        while self.sealed < sealed_blocks(self.tokens):
            sealed.append((self.sealed, self._seal_next()))
        return sealed

    def _seal_next(self) -> bytes:
        block, slot, used = self.sealed, self.slot(self.first_row), self.used
        payload = self._encoded(block, slice(slot, slot + BLOCK_TOKENS))
        self._write_block(block, int4.parts(payload, self.shape))
        if block >= self.window_blocks:
            later, down = slice(slot + BLOCK_TOKENS, used), slice(slot, used - BLOCK_TOKENS)
            self.values[..., down, :] = self.values[..., later, :]
            self.scales[..., down] = self.scales[..., later]
        self.sealed += 1
        if block >= self.window_blocks:
            self._turn_all_sinks()
        return payload

    def _encoded(self, block: int, place: slice) -> bytes:
        payload = bytearray(self.shape.block_bytes)
        cos, sin = self._block_angles(block)
        for each, part in enumerate(int4.parts(payload, self.shape)):
            for layers in self._few_layers():
                x = self.values[layers, each, :, place] * self.scales[layers, each, :, place, None]
                part[layers].encode(x if each else turned_back(x, cos, sin))
        return bytes(payload)

    def _write_block(self, block: int, parts: tuple[int4.Part, int4.Part]) -> None:
        first = SINK_TOKENS + block % self.window_blocks * BLOCK_TOKENS
        place = slice(first, first + BLOCK_TOKENS)
        cos, sin = self._block_angles(block)
        for each, part in enumerate(parts):
            for layers in self._few_layers():
                x = part[layers].decoded()
                whole, scales = int8_of(x if each else turned(x, cos, sin))
                self.values[layers, each, :, place], self.scales[layers, each, :, place] = whole, scales

    def _few_layers(self) -> Iterator[slice]:
        """Slices of layers whose floats stay in a core's cache while a block is turned and quantized."""
        for first in range(0, self.shape.layers, LAYERS_AT_ONCE):
            yield slice(first, first + LAYERS_AT_ONCE)

    def _block_angles(self, block: int) -> tuple[Floats, Floats]:
        return self._rope.angles(np.arange(block_start(block), block_start(block + 1)))

    def _turn_all_sinks(self) -> None:
        first = block_start(max(0, self.sealed - self.window_blocks)) - SINK_TOKENS
        self._turn_sinks(slice(None), SINKS, *self._rope.angles(np.arange(first, first + SINK_TOKENS)))

    def _turn_sinks(self, layers: int | slice, place: slice, cos: Floats, sin: Floats) -> None:
        x = self._prelude[layers, ..., place, :].astype(np.float32)
        x[..., 0, :, :, :] = turned(x[..., 0, :, :, :], cos, sin)
        self.values[layers, ..., place, :], self.scales[layers, ..., place] = int8_of(x)

    # Parking and restoring

    def prelude(self) -> bytes:
        """The sinks, ``prelude_bytes``: float16 ``[layers, 2, kv_heads, 4, head_dim]``, K before RoPE; junk past ``tokens``."""
        return self._prelude.tobytes()

    def rows(self, first: int, last: int) -> bytes:
        """The rows at positions ``first`` to ``last - 1``, ``row_bytes`` each: int8 values of all strips, then their scales."""
        if not self.first_row <= first <= last <= self.tokens:
            raise ValueError(f"rows {first} to {last}: there are {self.first_row} to {self.tokens}")
        start = self.slot(first)
        place = slice(start, start + last - first)
        packed = np.empty((last - first, self.shape.row_bytes), np.uint8)
        middle = self.shape.strips * self.shape.head_dim
        packed[:, :middle] = np.moveaxis(self.values[..., place, :], 3, 0).reshape(last - first, middle).view(np.uint8)
        scales = np.ascontiguousarray(np.moveaxis(self.scales[..., place], 3, 0)).reshape(last - first, self.shape.strips)
        packed[:, middle:] = scales.view(np.uint8)
        return packed.tobytes()

    def restore(
        self, tokens: int, prelude: bytes | memoryview, blocks: Sequence[bytes | memoryview], rows: bytes | memoryview
    ) -> None:
        """Become the ring of a session with ``tokens`` tokens: the last ``min(sealed, window_blocks)`` blocks, oldest first, and
        all rows after them; with fewer than 64 of them one block more is sealed, as where a prefix is shared that ends there.

        Raises ``RefusedError`` for lengths that do not fit or numbers that are none; the ring is then empty.
        """
        self.reset()
        least = sealed_blocks(tokens)
        more = least < full_blocks(tokens) and len(rows) < BLOCK_TOKENS * self.shape.row_bytes
        sealed = least + more
        count = max(0, tokens - block_start(sealed))
        _fits("KV prelude", prelude, self.shape.prelude_bytes)
        _fits("KV rows", rows, count * self.shape.row_bytes)
        if len(blocks) != min(sealed, self.window_blocks):
            raise RefusedError("KV blocks", len(blocks), str(min(sealed, self.window_blocks)), "recompute them")
        self._prelude.reshape(-1)[:] = np.frombuffer(prelude, np.float16)
        _numbers("KV prelude", self._prelude)
        for block, payload in zip(range(sealed - len(blocks), sealed), blocks, strict=True):
            self._write_block(block, int4.checked(payload, self.shape))
        self.sealed = sealed
        self._turn_all_sinks()
        self._unpack_rows(rows, count)
        self.tokens = tokens

    def _unpack_rows(self, rows: bytes | memoryview, count: int) -> None:
        strips = (self.shape.layers, 2, self.shape.kv_heads)
        packed = np.frombuffer(rows, np.uint8).reshape(count, self.shape.row_bytes)
        middle = self.shape.strips * self.shape.head_dim
        values = packed[:, :middle].view(np.int8).reshape(count, *strips, self.shape.head_dim)
        scales = np.ascontiguousarray(packed[:, middle:]).view(np.float32).reshape(count, *strips)
        _numbers("KV rows", scales)
        first = self.slot(self.first_row)
        self.values[..., first : first + count, :] = np.moveaxis(values, 0, 3)
        self.scales[..., first : first + count] = np.moveaxis(scales, 0, 3)


def _fits(subject: str, data: bytes | memoryview, size: int) -> None:
    if len(data) != size:
        raise RefusedError(subject, f"{len(data)} bytes", f"{size} bytes", "recompute it")


def _numbers(subject: str, x: NDArray[np.floating]) -> None:
    if not np.isfinite(x).all():
        raise RefusedError(subject, "a value that is no number", remedy="recompute it")
