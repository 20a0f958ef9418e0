"""The disk's budget of parked sessions, and who gives way to keep it.

Rules: room is made before anything is written.  Pinned sessions stay.  An unnamed session goes in whole; a named one gives up its
KV but keeps its ids, and only for a named one that is here already: who is new, or has no name, is refused instead.  The order is
that of ``kv_tiers.first_to_go``.  Whoever calls holds the registry's lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from edge_agent.core.errors import UnavailableError
from edge_agent.store.files import reaching
from edge_agent.store.kv_parked import ParkedSession
from edge_agent.store.kv_registry import Registry
from edge_agent.store.kv_tiers import Parked, Speeds, first_to_go

_REMEDY = "drop a session, or raise disk_bytes"


class Room:
    def __init__(self, registry: Registry, budget_bytes: int) -> None:
        self._registry, self._budget_bytes = registry, budget_bytes
        self.speeds = Speeds()

    @property
    def free_bytes(self) -> int:
        return max(0, self._budget_bytes - self._registry.bytes_on_disk)

    def shrink(self) -> None:
        """The budget may be smaller than it was; ids of named sessions stay even so."""
        try:
            self.make("of an earlier start", 0, (), spares_named=False)
        except UnavailableError as error:
            self._registry.report(str(error))

    def make(self, name: str, size_bytes: int, kept: Collection[str], spares_named: bool) -> None:
        """Let others than ``kept`` give way until the session ``name`` may write so many bytes more.

        Raises ``UnavailableError`` that tells the bytes if too few may give way; those that gave way already are gone.
        """
        while self._registry.bytes_on_disk + size_bytes > self._budget_bytes:
            victim = first_to_go(self._may_give_way(kept, spares_named))
            if victim is None:
                raise UnavailableError(f"session {name}", f"no room for its KV: {self._figures(size_bytes)}", _REMEDY)
            self._give_way(self._registry.sessions[victim.name])

    def _may_give_way(self, kept: Collection[str], spares_named: bool) -> Iterator[Parked]:
        for session in self._registry.sessions.values():
            if session.pins or session.name in kept or (spares_named and session.named):
                continue
            tokens = min(session.restorable().tokens, self._registry.kv_format.window_tokens)
            idle = self._registry.uses - session.last_use
            yield Parked(session.name, session.named, self._freed_bytes(session), self.speeds.prefill_us(tokens), idle)

    def _freed_bytes(self, session: ParkedSession) -> int:
        """What is this session's alone; a named one keeps its log."""
        blocks = self._registry.blocks
        own = sum(rows.file.size_bytes for rows in session.rows.values()) if session.named else session.size_bytes
        return own + sum(blocks.size_bytes(name) for name in session.needs() if len(blocks.owners(name)) == 1)

    def _figures(self, size_bytes: int) -> str:
        sessions = self._registry.sessions.values()
        kept_bytes = sum(self._registry.bytes_of(each) for each in sessions if each.named or each.pins)
        needed = f"{size_bytes} bytes needed, {self.free_bytes} free of {self._budget_bytes}"
        return f"{needed}, and at most {kept_bytes} held by sessions that are named or live"

    def _give_way(self, session: ParkedSession) -> None:
        """An unnamed session goes, a named one keeps its ids."""
        if not session.named:
            self._registry.remove(session)
            return
        needs = list(session.needs())
        session.sealed.clear()
        with reaching(self._registry.folder):
            session.remove_rows()
        self._registry.blocks.release(needs, session.name)
        self._registry.changed(session)
        self._registry.report(f"session {session.name} gave up its KV for room; its {len(session.ids)} ids stay")
