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
from enum import IntEnum

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DIGEST_BYTES, MAX_COST, MAX_PARALLEL, MODEL_NAME, bounded, checked
from edge_agent.core.waits import checked_waits

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


class Place(IntEnum):
    """Where a board holds the KV of a session that does not talk."""

    HOT = 0
    RAM = 1
    DISK = 2


MAX_HOMES = 256
"""Sessions that a board tells of: those used last."""
SESSION_HASH_BYTES = 16
MAX_SPEED_TOK_S = 10**9
MAX_REFUSAL_CHARS = 512


def session_hash(name: str) -> bytes:
    """What boards call a session in front of others: its name is its client's affair."""
    return hashlib.sha256(b"sly/1/session" + name.encode()).digest()[:SESSION_HASH_BYTES]


@dataclass(frozen=True, slots=True)
class KvHome:
    """A session whose KV a board holds: so many tokens of it, and where."""

    session: bytes
    tokens: int
    place: Place

    def __post_init__(self) -> None:
        bounded("KV home session length", len(self.session), SESSION_HASH_BYTES, SESSION_HASH_BYTES, "bytes")
        bounded("KV home tokens", self.tokens, 0, MAX_TOKENS, "tokens")


@dataclass(frozen=True, slots=True)
class KvState:
    """What a board holds, and can do, with the KV of one language model.

    ``fingerprint``: of the KV format; only between equal ones can a session move.  ``parked_bytes``, ``hot_bytes``: of one token,
    parked and while it talks.  ``free_bytes``: of hot memory, for sessions that are to talk.  ``window_tokens``: the most that
    one session takes.  ``queue_us``: what a new turn waits, ``waits_us`` (``core.waits``) those that are urgent.  Speeds are
    measured, in tokens a second; 0: not measured yet.
    """

    model: str
    fingerprint: bytes
    parked_bytes: int
    hot_bytes: int
    free_bytes: int
    window_tokens: int
    queue_us: int = 0
    prefill_tok_s: int = 0
    ram_tok_s: int = 0
    disk_tok_s: int = 0
    homes: tuple[KvHome, ...] = ()
    waits_us: tuple[int, ...] = ()
    running: int = 0
    """Turns that talk at this moment."""

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "KV model", self.model)
        bounded("KV fingerprint length", len(self.fingerprint), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        bounded("KV parked_bytes", self.parked_bytes, 1, 2**24, "bytes")
        bounded("KV hot_bytes", self.hot_bytes, 1, 2**24, "bytes")
        bounded("KV free_bytes", self.free_bytes, 0, 2**50, "bytes")
        bounded("KV window_tokens", self.window_tokens, 1, MAX_TOKENS, "tokens")
        bounded("KV queue_us", self.queue_us, 0, MAX_COST, "µs")
        checked_waits("KV waits_us", self.waits_us, self.queue_us)
        bounded("KV running", self.running, 0, MAX_PARALLEL)
        for name in ("prefill_tok_s", "ram_tok_s", "disk_tok_s"):
            bounded(f"KV {name}", getattr(self, name), 0, MAX_SPEED_TOK_S, "tokens/s")
        if len(self.homes) > MAX_HOMES or len({home.session for home in self.homes}) != len(self.homes):
            raise RefusedError("KV homes", f"{len(self.homes)} sessions", f"at most {MAX_HOMES}, each once")

    def home(self, session: bytes) -> KvHome | None:
        """This board's KV of a session, by its hash."""
        return next((home for home in self.homes if home.session == session), None)


class KvItem(IntEnum):
    """What is asked of a session that moves."""

    MANIFEST = 0
    BLOCK = 1
    """The prelude or a sealed block, by its name."""
    ROWS = 2
    MOVED = 3
    """Nothing more: the asker has all of it, and holds the session from now on."""


@dataclass(frozen=True, slots=True)
class KvAsk:
    """``session``: its hash. ``name``: of a block."""

    session: bytes
    fingerprint: bytes
    item: KvItem
    name: bytes = b""

    def __post_init__(self) -> None:
        bounded("KV ask session length", len(self.session), SESSION_HASH_BYTES, SESSION_HASH_BYTES, "bytes")
        bounded("KV ask fingerprint length", len(self.fingerprint), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        bounded("KV ask name length", len(self.name), *_name_lengths(self.item), "bytes")


@dataclass(frozen=True, slots=True)
class KvAnswer:
    """``payload`` of what was asked, or why there is none."""

    session: bytes
    item: KvItem
    name: bytes = b""
    payload: bytes = b""
    refusal: str = ""

    def __post_init__(self) -> None:
        bounded("KV answer session length", len(self.session), SESSION_HASH_BYTES, SESSION_HASH_BYTES, "bytes")
        bounded("KV answer name length", len(self.name), *_name_lengths(self.item), "bytes")
        bounded("KV answer refusal length", len(self.refusal), 0, MAX_REFUSAL_CHARS, "characters")


def _name_lengths(item: KvItem) -> tuple[int, int]:
    return (DIGEST_BYTES, DIGEST_BYTES) if item is KvItem.BLOCK else (0, 0)
