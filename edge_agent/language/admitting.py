"""A turn's way in: whose KV it gets, whether there is room for it now, and who waits for room.

Rules: first come, first served, so the first that does not fit keeps the others waiting; only so many wait; a plan is made when
there is room, not before, for sessions change while one waits; a named session answers one turn at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from edge_agent.core.chat import Turn
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.gateway.talker import CONTEXT_LENGTH, KV_ROOM, SESSION_BUSY
from edge_agent.language.admission import Waits
from edge_agent.language.hot import HotSlots
from edge_agent.language.live import LiveTurn
from edge_agent.language.plan import Asked, Past, Plan, for_anyone, for_named
from edge_agent.language.turns import Turns
from edge_agent.store.kv_held import Held
from edge_agent.store.kv_sessions import SessionStore

MAX_REASONS = 256


@dataclass(slots=True, eq=False)
class _Waiter:
    """A turn that waits for room. ``placed`` is set when it has some."""

    live: LiveTurn
    asked: Asked
    placed: asyncio.Future[Plan] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def wake(self, error: SlyError) -> None:
        if not self.placed.done():
            self.placed.set_exception(error)


class Admitting:
    def __init__(self, store: SessionStore, hot: HotSlots, turns: Turns, window_tokens: int, max_waiting: int) -> None:
        self._store, self._hot, self._turns = store, hot, turns
        self._window_tokens, self._max_waiting = window_tokens, max_waiting
        self._busy: set[str] = set()
        self._waiting: deque[_Waiter] = deque()
        self.reasons: dict[str, str] = {}
        """By session, the last ones last: where the KV of its last turn came from, and why."""

    def __len__(self) -> int:
        """How many turns wait."""
        return len(self._waiting)

    def must_rest(self, session: str) -> None:
        """Raises ``RefusedError`` (``SESSION_BUSY``) for a session that answers a turn."""
        if session in self._busy:
            raise RefusedError(SESSION_BUSY, session, "one turn at a time", "wait for its end")

    def claim(self, session: str) -> None:
        """From now on a named session is busy. Raises as ``must_rest``."""
        self.must_rest(session)
        if session:
            self._busy.add(session)

    def release(self, session: str) -> None:
        """Take back a ``claim`` that no turn took over."""
        self._busy.discard(session)

    def busy(self, session: str) -> bool:
        return session in self._busy

    async def place(self, live: LiveTurn, asked: Asked) -> Plan:
        """Wait for room, and give the turn its session and its slot.

        Raises ``RefusedError`` for a turn that never fits, ``UnavailableError`` (``KV_ROOM``) if too many wait already.
        """
        waiter = _Waiter(live, asked)
        if self._waiting or not self._placed(waiter):
            self._enqueue(waiter)
        try:
            return await waiter.placed
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self.go_on()

    def freed(self, live: LiveTurn) -> None:
        """The turn holds nothing any more."""
        self._busy -= {live.session, live.turn.session}
        self.go_on()

    def go_on(self) -> None:
        """Place those who wait, as far as there is room."""
        while self._waiting and self._placed(self._waiting[0]):
            self._waiting.popleft()

    def turn_away(self, error: SlyError) -> None:
        """Whoever waits is told ``error``."""
        for waiter in list(self._waiting):
            waiter.wake(error)

    def _placed(self, waiter: _Waiter) -> bool:
        """Whether the turn waits no longer: it has room, or an error."""
        live = waiter.live
        try:
            plan, held = self._planned(live.turn, waiter.asked)
            need_bytes = self._hot.need_bytes(len(plan.ids) + live.turn.max_tokens)
            admitted = self._hot.admit(need_bytes, plan.session)
            if isinstance(admitted, Waits):
                return False
            self._busy.add(plan.session)
            self._explain(plan)
            self._turns.place(live, plan, held, admitted, need_bytes)
        except SlyError as error:
            waiter.wake(error)
            return True
        if not waiter.placed.done():
            waiter.placed.set_result(plan)
        return True

    def _planned(self, turn: Turn, asked: Asked) -> tuple[Plan, Held | None]:
        held = self._store.resume(turn.session) if turn.session else self._store.match(asked.whole)
        past = Past(held.name, held.ids, held.tokens, held.name in self._busy) if held is not None else None
        plan = for_named(turn.session, asked, past) if turn.session else for_anyone(asked, past, self._store.new_name())
        new_tokens = len(plan.ids) - plan.base_tokens
        if new_tokens > self._window_tokens:
            raise RefusedError(CONTEXT_LENGTH, f"{new_tokens} new tokens", f"{self._window_tokens} at once", "send less")
        return plan, held

    def _explain(self, plan: Plan) -> None:
        self.reasons.pop(plan.session, None)
        self.reasons[plan.session] = f"{plan.source.value}: {plan.reason}"
        while len(self.reasons) > MAX_REASONS:
            del self.reasons[next(iter(self.reasons))]

    def _enqueue(self, waiter: _Waiter) -> None:
        if len(self._waiting) >= self._max_waiting:
            need_bytes = self._hot.need_bytes(len(waiter.asked.whole) + waiter.live.turn.max_tokens)
            room = f"{need_bytes} bytes needed, {self._hot.used_bytes} of {self._hot.room.size_bytes} in use"
            raise UnavailableError(KV_ROOM, f"{room}, and {len(self._waiting)} turns wait already", "try later")
        self._waiting.append(waiter)
