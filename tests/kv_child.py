"""What an engine child does to a session store, without an engine: KV bytes that are a function of the tokens they stand for.

So whatever a store gives back can be checked: a row, a block or a prelude of other tokens has other bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from edge_agent.core.kv import SINK_TOKENS, KvFormat, block_start, full_blocks, packed_ids, sealed_blocks
from edge_agent.store.kv_sessions import Loaded, SessionStore

FORMAT = KvFormat(b"f" * 32, row_bytes=48, block_bytes=1200, prelude_bytes=96, window_blocks=2)


@lru_cache(8192)
def stretched(kind: bytes, prefix: bytes, size_bytes: int) -> bytes:
    return hashlib.shake_128(kind + prefix).digest(size_bytes)


class Bytes:
    """All KV bytes of a session with these ids."""

    def __init__(self, ids: Sequence[int], kv_format: KvFormat = FORMAT) -> None:
        self.packed, self.kv_format = packed_ids(ids), kv_format

    def row(self, position: int) -> bytes:
        return stretched(b"row", self.packed[: 4 * position + 4], self.kv_format.row_bytes)

    def rows(self, first: int, end: int) -> bytes:
        return b"".join(map(self.row, range(first, end)))

    def block(self, block: int) -> bytes:
        return stretched(b"block", self.packed[: 4 * block_start(block + 1)], self.kv_format.block_bytes)

    def prelude(self) -> bytes:
        return stretched(b"prelude", self.packed[: 4 * SINK_TOKENS], self.kv_format.prelude_bytes)

    def agree(self, loaded: Loaded) -> bool:
        """Is this the state of the first ``loaded.tokens`` of these ids?"""
        if not loaded.tokens:
            return (loaded.sealed, loaded.prelude, loaded.blocks, loaded.rows) == (0, b"", (), b"")
        first = max(0, loaded.sealed - self.kv_format.window_blocks)
        return (
            sealed_blocks(loaded.tokens) <= loaded.sealed <= full_blocks(loaded.tokens)
            and loaded.prelude == self.prelude()
            and loaded.blocks == tuple(map(self.block, range(first, loaded.sealed)))
            and loaded.rows == self.rows(block_start(loaded.sealed), loaded.tokens)
        )


class Chat:
    """A live session: what the agent tells the store while the child computes.

    ``synced`` and ``synced_tokens``: how many ids, and how many tokens of KV, the last ``sync`` made durable.
    """

    def __init__(self, store: SessionStore, name: str, kv_format: KvFormat = FORMAT) -> None:
        self.store, self.name, self.kv_format = store, name, kv_format
        self.ids: list[int] = []
        self.tokens = self.sealed = self.synced = self.synced_tokens = 0

    def begin(self) -> Chat:
        self.store.create(self.name)
        return self

    @classmethod
    def resumed(cls, store: SessionStore, name: str, kv_format: KvFormat = FORMAT) -> Chat:
        """A live session from what the store gives back; what it gives back is checked."""
        chat = cls(store, name, kv_format)
        held = store.resume(name)
        assert held is not None
        loaded = store.load(held)
        chat.ids, chat.tokens, chat.sealed = list(held.ids), loaded.tokens, loaded.sealed
        assert Bytes(chat.ids, kv_format).agree(loaded)
        return chat

    @property
    def kv(self) -> Bytes:
        return Bytes(self.ids, self.kv_format)

    def prompt(self, ids: Sequence[int]) -> None:
        """Prefill all of the prompt and sample one more."""
        self.store.prompt(self.name, ids)
        self.ids += ids
        if self.tokens < SINK_TOKENS <= len(self.ids):
            self.store.prelude(self.name, self.kv.prelude())
        self._seal(len(self.ids))
        self._say([len(self.ids)], max(SINK_TOKENS, block_start(self.sealed)))

    def answer(self, step: Sequence[int]) -> None:
        """One step that gave these ids."""
        self._say(step, max(SINK_TOKENS, self.tokens))

    def end(self) -> None:
        self._sync()

    def _say(self, step: Sequence[int], first_row: int) -> None:
        position = len(self.ids)
        self.ids += step
        end = len(self.ids) - 1
        rows = self.kv.rows(first_row, end)
        self.store.append(self.name, position, step, rows, first_row if rows else 0)
        if self.tokens < SINK_TOKENS <= end and position < SINK_TOKENS:
            self.store.prelude(self.name, self.kv.prelude())
        self.tokens = end
        self._seal(end)

    def _seal(self, tokens: int) -> None:
        for block in range(self.sealed, sealed_blocks(tokens)):
            self.store.seal(self.name, block, self.kv.block(block))
            self.sealed = block + 1
            self.tokens = max(self.tokens, block_start(block + 1))
            self._sync()

    def _sync(self) -> None:
        self.store.sync(self.name)
        self.synced, self.synced_tokens = len(self.ids), self.tokens
