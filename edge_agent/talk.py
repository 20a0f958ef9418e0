"""Turns of talk of clients in this process: each a request like every other, its parts a stream.

Owns the streams between the node's effects and whoever asked.  Rules: a stream gives the text in order and without a gap, then
one end, whatever became of the parts; what the result holds beyond them comes before the end; a stream that is closed early
abandons its request.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from edge_agent.core.chat import Turn, TurnEnd, TurnPart
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import AnswerPart, DataClass, InferenceResult, Limits, Status
from edge_agent.gateway.terms import TALK_DEADLINE_US
from edge_agent.node.events import Abandoned, Event, Submitted
from edge_agent.node.streams import Assembly, end_of, turn_request

CHANGED = "the end of this answer came from another draw than its beginning: the whole text is in the end"


class Talks:
    """``feed`` takes the node's events, ``new_handle`` numbers the clients of this process."""

    def __init__(self, feed: Callable[[Event], None], new_handle: Callable[[], int]) -> None:
        self._feed, self._new_handle = feed, new_handle
        self._heard: dict[int, asyncio.Queue[AnswerPart | InferenceResult]] = {}

    def __len__(self) -> int:
        return len(self._heard)

    def part(self, handle: int, part: AnswerPart) -> None:
        if handle in self._heard:
            self._heard[handle].put_nowait(part)

    def answer(self, handle: int, result: InferenceResult) -> None:
        if handle in self._heard:
            self._heard[handle].put_nowait(result)

    async def talk(
        self,
        turn: Turn,
        model: str | None,
        *,
        data: DataClass = DataClass.PRIVATE,
        limits: Limits | None = None,
    ) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        """Serve one turn. Raises ``RefusedError`` for one that is at fault, ``UnavailableError`` when no board can serve it."""
        handle, answered, shown, told_tokens = self._new_handle(), False, Assembly(turn.begun), 0
        heard: asyncio.Queue[AnswerPart | InferenceResult] = asyncio.Queue()
        self._heard[handle] = heard
        try:
            limits = limits or Limits(TALK_DEADLINE_US)
            self._feed(Submitted(turn_request(os.urandom(16).hex(), turn, model, limits, data), handle))
            while isinstance(said := await heard.get(), AnswerPart):
                for fresh in shown.take(said):
                    yield TurnPart(fresh.text, fresh.tokens - told_tokens)
                    told_tokens = fresh.tokens
            answered = True
            end = ended(said)
            if rest := shown.rest(end.text):
                yield TurnPart(rest, max(0, end.completion_tokens - told_tokens))
            yield end if rest is not None else replace(end, notes=(*end.notes, CHANGED))
        finally:
            del self._heard[handle]
            if not answered:
                self._feed(Abandoned(handle))


def ended(result: InferenceResult) -> TurnEnd:
    """The end of the turn in a result. Raises what a result that is not OK stands for."""
    if result.status is Status.REFUSED:
        raise RefusedError(result.reason)
    if result.status is not Status.OK:
        raise UnavailableError(f"turn on {result.board}", result.reason)
    return replace(end_of(result), receipt=result.receipt)
