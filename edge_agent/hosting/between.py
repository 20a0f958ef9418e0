"""A language model while two of its releases are loaded: turns go to one, and its sessions come from the other.

Rules: one turn a session, in both together; a turn of a release on trial that fails goes on in the old one with the text that was
shown, within its budget; what the old one cannot do either is not held against the new one, nor is a lack of room or time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_agent.core.chat import Finish, Turn, TurnEnd, TurnPart
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.kv import KvAsk, KvItem, KvState
from edge_agent.core.values import MAX_DEADLINE_US
from edge_agent.gateway.talker import DRAINING, KV_ROOM, SESSION_BUSY, Figure, Parts
from edge_agent.speaking import Kept, Speaker

if TYPE_CHECKING:
    from edge_agent.hosting.languages import LanguageRelease
    from edge_agent.hosting.succession import Succession

PATIENCE_S = 10.0
"""So long the next word is waited for at least before the new release is said to hang."""
NO_FAULT = (DRAINING, KV_ROOM, SESSION_BUSY)
"""What a release refuses for that has nothing wrong."""

Tell = Callable[["LanguageRelease", str], None]
"""Of a turn of a release on trial: why it was not clean, empty if it was."""


class HurriedError(UnavailableError):
    """No word came in half of the time that was left, which was not much."""


class Between(Speaker):
    """``first`` has the new turns, ``second`` sessions that may still come."""

    def __init__(self, shared: Succession, first: LanguageRelease, second: LanguageRelease) -> None:
        self._shared, self.first, self._second = shared, first, second

    async def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        async with aclosing(GoingOn(self.first, turn, MAX_DEADLINE_US, None).parts()) as parts:
            async for part in parts:
                yield part

    async def ready(self) -> str:
        return await self.first.hosted.ready()

    def figures(self) -> Iterable[Figure]:
        return self.first.hosted.figures()

    def kv_state(self) -> KvState | None:
        return self.first.hosted.kv_state()

    def sessions(self) -> list[Kept]:
        both = ((each, release) for release in (self.first, self._second) for each in release.hosted.sessions())
        return [each for each, release in both if self._shared.home(each[0]) is release]

    async def drop(self, name: str) -> bool:
        return await self._shared.drop(name)

    async def adopt(self, session: str, manifest: bytes) -> tuple[tuple[bytes, ...], bool]:
        await self._shared.bring(session, self.first)
        return await self.first.hosted.adopt(session, manifest)

    async def put(self, session: str, item: KvItem, name: bytes, payload: bytes) -> None:
        await self.first.hosted.put(session, item, name, payload)

    async def give(self, ask: KvAsk) -> bytes:
        return await self.first.hosted.give(ask)

    async def close(self) -> None:
        """Its releases are closed by who has them."""


class GoingOn:
    """One turn, which begins in ``first``; ``release`` is where it is now. ``tell``, if set, is told of it, for it is a trial."""

    def __init__(self, first: LanguageRelease, turn: Turn, budget_us: int, tell: Tell | None) -> None:
        self.release, self._turn, self._tell = first, turn, tell
        self._shared = first.succession
        self._loop = asyncio.get_running_loop()
        self._due_s = self._loop.time() + budget_us / 1e6
        self._text, self._tokens = turn.begun, 0
        self._failed: SlyError | None = None
        """What ended the turn in the new release."""

    async def parts(self) -> Parts:
        """As ``Speaker.talk``."""
        with ExitStack() as stack:
            if self._shared is not None:
                stack.enter_context(self._shared.claimed(self._turn.session))
            on_trial = self._shared is not None and self._tell is not None
            async with aclosing(self._tried() if on_trial else self._on(self.release)) as said:
                async for part in said:
                    yield part

    async def _tried(self) -> Parts:
        """On the new release if that can, else, or from there on, on the old one."""
        shared, tell = self._shared, self._tell
        assert shared is not None
        assert tell is not None
        new, old = shared.new, shared.old
        with old.at_work():
            if self._may_be_tried(new, tell):
                try:
                    async with aclosing(self._on(new)) as said:
                        async for part in said:
                            if isinstance(part, TurnEnd):
                                tell(new, "")
                            yield part
                    return
                except SlyError as error:
                    self._failed = error
            async with aclosing(self._on(old)) as said:
                async for part in said:
                    if isinstance(part, TurnEnd) and self._failed is not None and _at_fault(self._failed):
                        tell(new, str(self._failed))
                    yield part

    @staticmethod
    def _may_be_tried(new: LanguageRelease, tell: Tell) -> bool:
        if not new.spoiled and new.deaths:
            tell(new, new.hosted.service.pump.why or "its engine died")
        return not new.spoiled

    async def _on(self, release: LanguageRelease) -> Parts:
        """What is left of the turn, in a release."""
        before, self.release = self._tokens, release
        if before >= self._turn.max_tokens:
            yield TurnEnd(self._text, Finish.LENGTH, 0, 0, before, session=self._turn.session)
            return
        turn = replace(self._turn, begun=self._text, max_tokens=self._turn.max_tokens - before)
        if self._shared is not None and turn.session:
            await self._shared.bring(turn.session, release, broken_off=self._failed is not None)
        with release.at_work():
            async with aclosing(release.hosted.talk(turn)) as said, self._watched(release) as watched:
                while True:
                    part = await watched(said)
                    if isinstance(part, TurnEnd):
                        yield replace(part, completion_tokens=part.completion_tokens + before)
                        return
                    self._text, self._tokens = self._text + part.text, self._tokens + part.tokens
                    yield part

    @asynccontextmanager
    async def _watched(self, release: LanguageRelease) -> AsyncIterator[Callable[[Parts], Awaitable[TurnPart | TurnEnd]]]:
        """How to wait for the next word: of a release on trial not for ever, and no longer than its engine lives."""
        shared = self._shared
        if shared is None or self._tell is None or release is not shared.new:
            yield _next
            return
        died, given_up = release.hosted.service.died, shared.given_up
        trouble = [self._loop.create_task(each.wait()) for each in (died, given_up)]
        try:
            yield lambda said: self._next_in_time(release, said, trouble)
        finally:
            for each in trouble:
                each.cancel()

    async def _next_in_time(
        self, release: LanguageRelease, said: Parts, trouble: Sequence[asyncio.Task[bool]]
    ) -> TurnPart | TurnEnd:
        half_s = max(0.0, self._due_s - self._loop.time()) / 2
        word = self._loop.create_task(_next(said))
        try:
            await asyncio.wait([word, *trouble], timeout=half_s, return_when=asyncio.FIRST_COMPLETED)
            if word.done():
                return word.result()
        finally:
            if not word.done():
                word.cancel()
                await asyncio.wait([word])
        if trouble[1].done():
            raise UnavailableError(DRAINING, f"{release} was given up")
        if trouble[0].done():
            raise UnavailableError(str(release), release.hosted.service.pump.why or "its engine died")
        error = HurriedError if half_s < PATIENCE_S else UnavailableError
        raise error(str(release), f"no word within {half_s:g} s")


async def _next(said: Parts) -> TurnPart | TurnEnd:
    return await anext(said)


def _at_fault(error: SlyError) -> bool:
    refused = isinstance(error, (RefusedError, UnavailableError)) and error.subject in NO_FAULT
    return not refused and not isinstance(error, HurriedError)
