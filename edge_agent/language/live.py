"""One turn while it is served: what it asked, what came out so far, and the stream to whoever asked.

Rules: an id counts as shown only after it is in the journal; the stream ends with exactly one ``TurnEnd`` or one error; nothing
is put into a stream that has ended.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum

from edge_agent.core.chat import Finish, Sampling, Tier, Turn, TurnEnd, TurnPart
from edge_agent.core.errors import SlyError

MAX_NOTES = 8


class Phase(StrEnum):
    """``ASKED -> PLACED -> LIVE -> ENDING -> FREED``; any of the first three may go to ``FREED`` at once."""

    ASKED = "asked"
    """It has no slot."""
    PLACED = "placed"
    """It has a slot and a session, and is not begun."""
    LIVE = "live"
    ENDING = "ending"
    """The child is through with it; its session is being synced."""
    FREED = "freed"
    """It holds nothing."""


@dataclass(slots=True)
class Times:
    """Of the agent's monotonic clock, in µs: when the turn came, began in the child, and showed its first id."""

    arrived_us: int
    begun_us: int = 0
    first_us: int = 0
    restore_us: int = 0


@dataclass(slots=True, eq=False)
class LiveTurn:
    """``ids``: all acknowledged ids of the session; ``kv_tokens`` of them are in KV; ``prompt_tokens`` came before the answer.

    ``session`` is its name in the store, known once the turn is planned.  ``over``: its stream has ended.  ``left``: whoever
    asked has gone.
    """

    turn: Turn
    sampling: Sampling
    times: Times
    phase: Phase = Phase.ASKED
    session: str = ""
    slot: int = -1
    ids: list[int] = field(default_factory=list)
    kv_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    tier: Tier = Tier.NONE
    text: str = ""
    drafted: int = 0
    accepted: int = 0
    notes: list[str] = field(default_factory=list)
    over: bool = False
    left: bool = False
    pinned: bool = False
    told_tokens: int = 0
    out: asyncio.Queue[TurnPart | TurnEnd | SlyError] = field(default_factory=asyncio.Queue)

    @property
    def made_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def answered(self) -> tuple[int, ...]:
        """The ids of the answer so far."""
        return tuple(self.ids[self.prompt_tokens :])

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES and text not in self.notes:
            self.notes.append(text)

    def show(self, text: str) -> None:
        self.text += text
        if text and not self.over:
            self.out.put_nowait(TurnPart(text, self.made_tokens - self.told_tokens))
            self.told_tokens = self.made_tokens

    def fail(self, error: SlyError) -> None:
        if not self.over:
            self.over = True
            self.out.put_nowait(error)

    def end(self, finish: Finish, kv_bytes: int, now_us: int) -> None:
        if not self.over:
            self.over = True
            self.out.put_nowait(self._end(finish, kv_bytes, now_us))

    def _end(self, finish: Finish, kv_bytes: int, now_us: int) -> TurnEnd:
        times = self.times
        return TurnEnd(
            text=self.turn.begun + self.text,
            finish=finish,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.made_tokens,
            recomputed_tokens=self.recomputed_tokens,
            kv_bytes=kv_bytes,
            tier=self.tier,
            first_token_us=max(0, times.first_us - times.arrived_us),
            restore_us=times.restore_us,
            prefill_us=max(0, times.first_us - times.begun_us),
            decode_us=max(0, now_us - times.first_us),
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            session=self.turn.session,
            notes=tuple(self.notes),
        )
