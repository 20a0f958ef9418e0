"""What every room agrees on about the KV cache of a language model: blocks, their names, and when a block is sealed.

Rules: pure; integers and bytes only.  Token positions count from 0.  The first ``SINK_TOKENS`` are the *prelude* (the attention
sinks); block ``b`` holds the positions ``block_start(b)`` to ``block_start(b + 1) - 1``.  A block is *sealed* (turned into its
immutable int4 form, in memory and on disk alike) when the block after it is full: so the last 64 to 127 tokens are *rows* at the
precision of the hot ring, and a session's state is a function of its tokens, whether it was parked, moved or never stopped.
A block is named by the hash of all tokens up to its end, so that equal prefixes are one block.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_agent.core.values import DIGEST_BYTES, bounded

BLOCK_TOKENS = 64
SINK_TOKENS = 4
MAX_TOKEN_ID = 2**31 - 1
MAX_TOKENS = 2**31


@dataclass(frozen=True, slots=True)
class KvFormat:
    """The sizes of one model's KV bytes, and the ``fingerprint`` (SHA-256) of all that gives them meaning.

    ``row_bytes``: one token at hot precision.  ``block_bytes``: one sealed block.  ``prelude_bytes``: the sinks.
    ``window_blocks``: the most sealed blocks that attention sees.
    """

    fingerprint: bytes
    row_bytes: int
    block_bytes: int
    prelude_bytes: int
    window_blocks: int

    def __post_init__(self) -> None:
        bounded("KV fingerprint length", len(self.fingerprint), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        bounded("KV row_bytes", self.row_bytes, 1, 2**24, "bytes")
        bounded("KV block_bytes", self.block_bytes, 1, 2**26, "bytes")
        bounded("KV prelude_bytes", self.prelude_bytes, 1, 2**26, "bytes")
        bounded("KV window_blocks", self.window_blocks, 1, 2**16, "blocks")

    @property
    def window_tokens(self) -> int:
        """The most tokens that attention sees: sinks, sealed blocks, and two blocks of rows."""
        return SINK_TOKENS + (self.window_blocks + 2) * BLOCK_TOKENS


def block_start(block: int) -> int:
    """The position of a block's first token."""
    return SINK_TOKENS + block * BLOCK_TOKENS


def full_blocks(tokens: int) -> int:
    """How many blocks the first ``tokens`` tokens fill."""
    return max(0, tokens - SINK_TOKENS) // BLOCK_TOKENS


def sealed_blocks(tokens: int) -> int:
    """How many blocks of a session of ``tokens`` tokens are sealed."""
    return max(0, full_blocks(tokens) - 1)


def room_in_block(tokens: int) -> int:
    """How many more tokens may follow before a block is full: 1 to 64, more while the prelude is not."""
    return block_start(full_blocks(tokens) + 1) - tokens


def root_name(fingerprint: bytes, prelude: Sequence[int]) -> bytes:
    """The name of a prelude: what every chain over it begins with. Raises ``ValueError`` unless it has ``SINK_TOKENS`` ids."""
    if len(prelude) != SINK_TOKENS:
        raise ValueError(f"a prelude has {SINK_TOKENS} tokens, not {len(prelude)}")
    return hashlib.sha256(b"sly/1/kv" + fingerprint + packed_ids(prelude)).digest()


def next_name(parent: bytes, block: Sequence[int]) -> bytes:
    """The name of the block with these ids after ``parent``. Raises ``ValueError`` unless it has ``BLOCK_TOKENS`` ids."""
    if len(block) != BLOCK_TOKENS:
        raise ValueError(f"a block has {BLOCK_TOKENS} tokens, not {len(block)}")
    return hashlib.sha256(parent + packed_ids(block)).digest()


def chain(fingerprint: bytes, ids: Sequence[int]) -> Iterator[bytes]:
    """The name of the prelude, then of every full block of ``ids``; nothing if the prelude is not full."""
    if len(ids) < SINK_TOKENS:
        return
    name = root_name(fingerprint, ids[:SINK_TOKENS])
    yield name
    for block in range(full_blocks(len(ids))):
        name = next_name(name, ids[block_start(block) : block_start(block + 1)])
        yield name


def packed_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit numbers."""
    return struct.pack(f"<{len(ids)}I", *ids)


def unpacked_ids(data: bytes | memoryview) -> tuple[int, ...]:
    """Inverse of ``packed_ids``. Raises ``ValueError`` for a length that is no multiple of 4."""
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no whole number of token ids")
    return struct.unpack(f"<{len(data) // 4}I", data)
