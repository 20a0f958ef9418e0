"""Quotes on their way to what vouches for them, and back.

Rules: the agent waits for nothing here: an endorsement comes back as an event, or the reason why there is none; few may be on
their way at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from edge_agent.attest.evidence import Measurements
from edge_agent.core.errors import SlyError
from edge_agent.node.events import Endorsed, Event
from edge_agent.shell.endorsers import Endorser
from edge_agent.shell.tasks import Tasks

MAX_ON_THEIR_WAY = 4


class Endorsing:
    """``endorser``: ``None`` where only a key file vouches."""

    def __init__(self, endorser: Endorser | None, tasks: Tasks, feed: Callable[[Event], None]) -> None:
        self._endorser, self._tasks, self._feed = endorser, tasks, feed
        self._on_their_way = 0

    def prepare(self) -> None:
        """Find or make the key, which may take longer than an endorsement. What fails is tried again for each quote."""
        if self._endorser is not None:
            self._tasks.spawn(_prepare(self._endorser), "attestation key")

    def loaded(self, measurements: Measurements) -> None:
        """These models run: what measures them may be endorsed next."""
        if self._endorser is not None:
            self._endorser.loaded(model.mapped for model in measurements.models)

    def begin(self, challenge: bytes) -> None:
        """Ask for an endorsement; ``Endorsed`` is fed, at once or later."""
        if self._endorser is None:
            self._feed(Endorsed(challenge, refusal="no hardware here vouches for this board"))
        elif self._on_their_way == MAX_ON_THEIR_WAY:
            self._feed(Endorsed(challenge, refusal=f"{MAX_ON_THEIR_WAY} quotes wait for it already"))
        else:
            self._on_their_way += 1
            self._tasks.spawn(self._endorse(self._endorser, challenge), "endorse")

    async def _endorse(self, endorser: Endorser, challenge: bytes) -> None:
        try:
            endorsed = Endorsed(challenge, await endorser.endorse(challenge))
        except SlyError as error:
            endorsed = Endorsed(challenge, refusal=str(error))
        finally:
            self._on_their_way -= 1
        self._feed(endorsed)


async def _prepare(endorser: Endorser) -> None:
    with suppress(SlyError):
        await endorser.public_key()
