"""A language model without a model: its answer is a function of the prompt, so that any board gives the same one.

Rules: it stands behind the same contract as a real one (``edge_agent.speaking.Speaker``); it goes on after ``begun``; a gate
lets a test hold it in the middle of an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from functools import lru_cache
from itertools import accumulate

from edge_agent.core.chat import CHAT, Finish, Turn, TurnEnd, TurnPart
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import KvAsk, KvItem, KvState
from edge_agent.core.values import ModelOffer
from edge_agent.gateway.talker import Figure
from edge_agent.speaking import Kept

REFUSED_PROMPT = "refuse this"
TALK_OFFER = ModelOffer("parrot", CHAT, b"p" * 32, 700, 100_000, 1000, parallel=4)


@lru_cache(256)
def words_of(prompt: str, tokens: int) -> list[str]:
    """The whole answer to a prompt, a token each: numbered words, with an umlaut now and then."""
    return [f"{prompt[:8]}{number}{'ü' if number % 3 == 0 else ''} " for number in range(tokens)]


def prompt_of(turn: Turn) -> str:
    return turn.prompt or turn.messages[-1].content


def answer_to(turn: Turn) -> tuple[str, list[str]]:
    """The whole text, and the words of it that follow ``turn.begun``."""
    words = words_of(prompt_of(turn), 2000)
    ends = accumulate(map(len, words), initial=0)
    done = next(number for number, end in enumerate(ends) if end >= len(turn.begun))
    left = words[done : done + turn.max_tokens]
    return turn.begun + "".join(left), left


def end_of_turn(turn: Turn, session: str = "") -> TurnEnd:
    whole, left = answer_to(turn)
    return TurnEnd(whole, Finish.LENGTH, prompt_tokens=3, cached_tokens=0, completion_tokens=len(left), session=session)


class Parrot:
    """``hold_after`` words of each turn it waits for ``gate``."""

    def __init__(self, hold_after: int | None = None) -> None:
        self.hold_after = hold_after
        self.gate, self.held = asyncio.Event(), asyncio.Event()
        self.talking = self.most_talking = self.broken_off = 0
        self.heard: list[Turn] = []
        self.closed = False

    async def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        self.heard.append(turn)
        if prompt_of(turn) == REFUSED_PROMPT:
            raise RefusedError("prompt", "one that is refused", "others")
        self.talking += 1
        self.most_talking = max(self.talking, self.most_talking)
        ended = False
        try:
            for number, word in enumerate(answer_to(turn)[1]):
                if number == self.hold_after:
                    self.held.set()
                    await self.gate.wait()
                await asyncio.sleep(0)
                yield TurnPart(word, 1)
            ended = True
            yield end_of_turn(turn, turn.session)
        finally:
            self.talking -= 1
            self.broken_off += not ended

    async def ready(self) -> str:
        return "" if not self.closed else "it is closed"

    def figures(self) -> Iterable[Figure]:
        return [Figure("turns", "turns that were heard", len(self.heard))]

    def kv_state(self) -> KvState | None:
        return None

    def sessions(self) -> list[Kept]:
        return []

    async def drop(self, name: str) -> bool:
        return False

    async def adopt(self, session: str, manifest: bytes) -> tuple[tuple[bytes, ...], bool]:
        raise RefusedError("session", session, "none: nothing is kept here")

    async def put(self, session: str, item: KvItem, name: bytes, payload: bytes) -> None:
        raise RefusedError("session", session, "none: nothing is kept here")

    async def give(self, ask: KvAsk) -> bytes:
        raise RefusedError("session", ask.session, "none: nothing is kept here")

    async def close(self) -> None:
        self.closed = True
