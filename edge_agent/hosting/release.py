"""One release of a model, loaded: what every kind of model has of it.

Rules: it counts who works with it, so that it can go when the last job has ended; what its files are in the cache stays pinned
until it is closed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edge_agent.attest.measure import MappedModel
from edge_agent.core.chat import Turn
from edge_agent.core.values import ModelOffer

if TYPE_CHECKING:
    from edge_agent.hosting.between import GoingOn
    from edge_agent.speaking import Speaker


class Release(ABC):
    """``number`` 0 is the factory's."""

    speaker: Speaker | None = None
    """Of a language model."""

    def __init__(self, offer: ModelOffer, number: int) -> None:
        self.offer, self.number = offer, number
        self.spoiled = ""
        """What went wrong with it in its trial: nothing more is tried on it."""
        self._closed = False
        self._jobs = 0
        self._rests = asyncio.Event()
        self._rests.set()

    @property
    def name(self) -> str:
        return self.offer.model

    @property
    def digest(self) -> bytes:
        return self.offer.digest

    def __str__(self) -> str:
        return f"release {self.number} of {self.name}" if self.number else f"{self.name} as it was set up"

    @property
    def there(self) -> bool:
        """Whether it has an engine, be it a dead one that is started again."""
        return not self._closed

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Whoever is in here may use it."""
        self._jobs += 1
        self._rests.clear()
        try:
            yield
        finally:
            self._jobs -= 1
            if not self._jobs:
                self._rests.set()

    async def at_rest(self) -> None:
        """Wait until nobody uses it."""
        await self._rests.wait()

    @abstractmethod
    async def golden(self) -> tuple[bytes, str]:
        """SHA-256 of what it gives for its golden input, and why that is bad, empty if it is not."""

    @abstractmethod
    def mapped(self, slot: str) -> MappedModel | None:
        """Its files as they are held now; ``slot``: its part in an update."""

    def going(self, turn: Turn, budget_us: int, tell: Callable[[Any, str], None] | None) -> GoingOn:
        """A turn of a language model; ``tell``: of a trial."""
        raise RuntimeError(f"{self} does not speak")

    def take_over(self, other: Release) -> None:
        """From now on new jobs come here that went to ``other``."""
        return

    async def hand_on(self, at_once: bool) -> None:
        """Wait until nothing is left to be done here; ``at_once``: what is under way is done elsewhere."""
        if not at_once:
            await self.at_rest()

    async def close(self) -> None:
        """End its engine and let its files go; jobs that it still has fail. May be called twice."""
        if not self._closed:
            self._closed = True
            await self.end()

    @abstractmethod
    async def end(self) -> None:
        """What ``close`` does, once."""
