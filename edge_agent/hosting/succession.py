"""Two releases of a language model between which sessions go over.

Rules: a named session lies in one of the two, at first in the old one, and goes over when it is asked for in the other; one that
talks stays until its turn has ended; what becomes of it is said by its next turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.gateway.talker import SESSION_BUSY
from edge_agent.hosting import sessions

if TYPE_CHECKING:
    from edge_agent.hosting.languages import LanguageRelease

REST_PERIOD_S, REST_LIMIT_S = 0.05, 60.0
"""How often, and how long, a session is asked for whose turn nobody hears any more and the engine has not ended yet."""


class Succession:
    """Where the named sessions of two releases are. ``given_up``: turns of the new one are to go on in the old one."""

    def __init__(self, old: LanguageRelease, new: LanguageRelease) -> None:
        self.old, self.new = old, new
        self.given_up = asyncio.Event()
        self.left_out: set[str] = set()
        """Sessions that could not be taken over."""
        self._at_new: set[str] = set()
        self._claimed: set[str] = set()
        self._lock = asyncio.Lock()

    def other(self, release: LanguageRelease) -> LanguageRelease:
        return self.old if release is self.new else self.new

    def home(self, session: str) -> LanguageRelease:
        return self.new if session in self._at_new else self.old

    def of(self, release: LanguageRelease) -> list[str]:
        """The named sessions that lie in a release."""
        return [name for name in sessions.named(release.hosted.service.store) if self.home(name) is release]

    @contextmanager
    def claimed(self, session: str) -> Iterator[None]:
        """A turn of this session is under way, in one release or the other. Raises ``RefusedError`` if another one is.

        Turns that began before there were two are not known here: their release knows them.
        """
        if session in self._claimed:
            raise RefusedError(SESSION_BUSY, session, "one turn at a time", "wait for its end")
        self._claimed |= {session} - {""}
        try:
            yield
        finally:
            self._claimed.discard(session)

    async def bring(self, session: str, release: LanguageRelease, broken_off: bool = False) -> None:
        """From now on the session lies in ``release``, with its ids. Raises ``RefusedError`` while it talks.

        ``broken_off``: its turn in the other release has ended for whoever asked, if not for the engine.
        """
        async with self._lock:
            home = self.home(session)
            if home is release:
                return
            release.hosted.service.admitting.must_rest(session)
            if not broken_off and not (home is self.new and self.given_up.is_set()):
                home.hosted.service.admitting.must_rest(session)
            if home.hosted.service.store.look(session) is not None:
                await self._carry(session, home, release)
            (self._at_new.add if release is self.new else self._at_new.discard)(session)

    async def bring_all(self, release: LanguageRelease) -> None:
        """Every session lies in ``release`` then, but those that are ``left_out``."""
        for session in self.of(self.other(release)):
            try:
                async with asyncio.timeout(REST_LIMIT_S):
                    while not await self._brought(session, release):
                        await asyncio.sleep(REST_PERIOD_S)
            except TimeoutError:
                self.left_out.add(session)

    async def _brought(self, session: str, release: LanguageRelease) -> bool:
        try:
            await self.bring(session, release)
        except RefusedError:
            return False
        return True

    async def drop(self, session: str) -> bool:
        """Forget a session in both."""
        dropped = [await each.hosted.drop(session) for each in (self.old, self.new)]
        return any(dropped)

    async def _carry(self, session: str, home: LanguageRelease, release: LanguageRelease) -> None:
        target = release.hosted.service
        if home.tokenizer != release.tokenizer:
            await release.hosted.drop(session)
            target.notes[session] = sessions.lost_note(session, str(home))
            return
        try:
            tokens = await asyncio.to_thread(sessions.carry, session, home.hosted.service.store, target.store)
            note = sessions.note_of(session, str(home), tokens)
        except SlyError as error:
            self.left_out.add(session)
            note = f"session {session} cannot be taken over from {home}: {error}"
        if note:
            target.notes[session] = note
