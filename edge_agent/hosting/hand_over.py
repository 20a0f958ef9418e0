"""The hand-over from one release of a model to the next: loaded beside it, tried, and then one of the two goes.

Owns which releases are held.  Rules: a move is made at once and as a whole (``pair``), whatever takes time is before or after it;
what was confirmed goes when its last job has ended, what failed its trial goes at once, for the other one takes its jobs over;
releases are brought and sent away one at a time for each model.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import ModelOffer
from edge_agent.hosting.pair import Pair, PairState
from edge_agent.hosting.release import Release


class HandOver:
    """``changed`` is told the name of a model whose pair has changed; ``report`` gets a line for what people should know."""

    def __init__(self, changed: Callable[[str], None], report: Callable[[str], None]) -> None:
        self._changed, self._report = changed, report
        self._pairs: dict[str, Pair[Release]] = {}
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._closing = asyncio.Event()
        self._leaving: dict[Release, asyncio.Task[None]] = {}

    def __iter__(self) -> Iterator[Pair[Release]]:
        return iter(self._pairs.values())

    def pair(self, name: str) -> Pair[Release]:
        return self._pairs.get(name, Pair())

    async def load(self, name: str, load: Callable[[], Coroutine[Any, Any, Release]]) -> ModelOffer:
        """What is confirmed, at the start. Raises ``RuntimeError`` if there is something already."""
        async with self._busy[name]:
            before = self.pair(name)
            before.must_be(PairState.ALONE, "load a release")
            if before.old is not None and before.old.there:
                raise RuntimeError(f"{before.old} is loaded already")
            if before.old is not None:
                await before.old.close()
            release = await load()
            self._put(name, Pair(release))
        return release.offer

    async def bring(self, name: str, load: Callable[[], Coroutine[Any, Any, Release]]) -> None:
        """Load a release beside what serves, when what was there before has gone."""
        self.pair(name).must_be(PairState.ALONE, "bring a release")
        async with self._busy[name]:
            self.pair(name).must_be(PairState.ALONE, "bring a release")
            release = await load()
            self._put(name, self.pair(name).brought(release))
            self._report(f"{release} is loaded beside what serves")

    def hand_over(self, name: str) -> ModelOffer:
        handed = self.pair(name).handed()
        assert handed.new is not None
        if handed.old is not None:
            handed.new.take_over(handed.old)
        self._put(name, handed)
        self._report(f"new requests go to {handed.new}")
        return handed.new.offer

    def settle(self, name: str) -> None:
        old = self.pair(name).old
        self._put(name, self.pair(name).settled())
        if old is not None:
            self._send_away(old, at_once=False)

    def hand_back(self, name: str) -> ModelOffer:
        """Raises ``UnavailableError`` if there was nothing before."""
        before = self.pair(name)
        after = before.back()
        assert before.new is not None
        if before.old is not None:
            before.old.take_over(before.new)
        self._put(name, after)
        self._send_away(before.new, at_once=True)
        if before.old is None:
            raise UnavailableError(f"model {name}", "no release of it served before")
        self._report(f"new requests go to {before.old} again")
        return before.old.offer

    def discard(self, name: str) -> None:
        new = self.pair(name).new
        self._put(name, self.pair(name).discarded())
        assert new is not None
        self._send_away(new, at_once=True)

    async def all_gone(self) -> None:
        """Wait until what was sent away has gone."""
        while self._leaving:
            await asyncio.wait(set(self._leaving.values()))

    async def close(self) -> None:
        """Let everything go at once."""
        self._closing.set()
        await self.all_gone()
        for pair in list(self):
            for release in pair.held:
                await release.close()
        self._pairs.clear()

    def _put(self, name: str, pair: Pair[Release]) -> None:
        self._pairs[name] = pair
        self._changed(name)

    def _send_away(self, release: Release, at_once: bool) -> None:
        going = self._go(release, at_once)
        self._leaving[release] = asyncio.get_running_loop().create_task(going, name=f"{release} goes")
        self._leaving[release].add_done_callback(lambda task: self._leaving.pop(release, None))

    async def _go(self, release: Release, at_once: bool) -> None:
        async with self._busy[release.name]:
            await self._handed_on(release, at_once)
            self._changed(release.name)
            await release.close()
        self._report(f"{release} is gone")

    async def _handed_on(self, release: Release, at_once: bool) -> None:
        """Wait for that, unless everything is to go."""
        handing = asyncio.get_running_loop().create_task(release.hand_on(at_once))
        closing = asyncio.get_running_loop().create_task(self._closing.wait())
        await asyncio.wait([handing, closing], return_when=asyncio.FIRST_COMPLETED)
        handing.cancel()
        closing.cancel()
        await asyncio.wait([handing, closing])
        if not handing.cancelled() and (error := handing.exception()) is not None:
            self._report(f"{release} goes with what it has: {error}")
