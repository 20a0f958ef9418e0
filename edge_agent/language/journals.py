"""What a turn leaves in the store, event by event, and when that is made durable.

Rules: an event is written in one go, before anything of it is shown: ids and rows, the prelude, sealed blocks; none of it is
synced here and now.  A session is synced, in a thread, when a block of an answer was sealed and before its turn's end is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from edge_agent.core.kv import SINK_TOKENS, KvFormat, block_start, sealed_blocks
from edge_agent.language.events import TurnEvent
from edge_agent.store.kv_sessions import SessionStore


class Journals:
    def __init__(self, store: SessionStore, kv_format: KvFormat, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._store, self._format, self._spawn = store, kv_format, spawn
        self._syncing: set[str] = set()

    def write(self, session: str, position: int, event: TurnEvent) -> None:
        """``position``: how many ids the session has. Raises ``UnavailableError`` if it cannot be written."""
        if event.ids or event.rows:
            self._store.append(session, position, event.ids, event.rows, event.first_row)
        if event.prelude:
            self._store.prelude(session, event.prelude)
        for each in event.sealed:
            self._store.seal(session, each.block, each.payload)

    def sync_soon(self, session: str) -> None:
        """Make the session durable beside the steps."""
        if session not in self._syncing:
            self._syncing.add(session)
            self._spawn(self._sync_once(session))

    async def sync(self, session: str) -> None:
        """Raises ``UnavailableError``."""
        await asyncio.to_thread(self._store.sync, session)

    async def _sync_once(self, session: str) -> None:
        try:
            await self.sync(session)
        finally:
            self._syncing.discard(session)

    def parked_bytes(self, tokens: int) -> int:
        """What a session of so many tokens takes when it is parked."""
        if tokens < SINK_TOKENS:
            return 0
        sealed = sealed_blocks(tokens)
        visible = min(sealed, self._format.window_blocks)
        rows = tokens - block_start(sealed)
        return self._format.prelude_bytes + visible * self._format.block_bytes + rows * self._format.row_bytes
