"""A child that answers calls by name, seen from the agent: ``call(verb, body, bulk) -> body, bulk``.

Rules: calls run one at a time, first come first served.  A caller that gives up leaves its call running, and the next one waits
for its end.  Bodies are small CBOR values in the datagram; bulk bytes lie at the beginning of the arena, in both directions.
What a body means is checked by who asked; ``breach`` ends a child whose answer a sound child would not give.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edge_agent.core.errors import RefusedError
from edge_agent.runtime import doorbell
from edge_agent.runtime.child import ChildDiedError, Death
from edge_agent.runtime.doorbell import MAX_DOORBELL_BYTES, Answer, Said
from edge_agent.runtime.watched import WatchedChild


@dataclass(frozen=True, slots=True)
class Reply:
    """``elapsed_us``: in the child."""

    body: object
    bulk: bytes = field(repr=False)
    elapsed_us: int


class VerbChild(WatchedChild):
    """``on_death`` is called once if the child ends without being closed; set it when the child is of use."""

    def __init__(self, model: str, on_death: Callable[[Death], None] = lambda death: None) -> None:
        super().__init__(model, on_death)
        self._one_at_a_time = asyncio.Lock()

    def spawn(self, worker: str, arena_bytes: int, model_fd: int, *more_fds: int) -> None:
        """Start the module ``worker``. Raises ``UnavailableError`` if the system cannot."""
        self._spawn(arena_bytes, model_fd, *more_fds, worker=worker)

    def watch(self, on_death: Callable[[Death], None]) -> None:
        """From now on tell a death to ``on_death``. Raises ``ChildDiedError`` if there was one already."""
        if self._exited.done():
            raise ChildDiedError(f"model {self._model}", self._exited.result())
        self._on_death = on_death

    async def call(self, verb: str, body: object, bulk: Iterable[bytes | memoryview], limit_us: int) -> Reply:
        """Raises ``RefusedError`` and ``UnavailableError`` as the child says them, ``ChildDiedError``."""
        task = self._loop.create_task(self.call_through(verb, body, bulk, limit_us), name=f"{verb} of {self._model}")
        task.add_done_callback(_seen)
        return await asyncio.shield(task)

    async def call_through(self, verb: str, body: object, bulk: Iterable[bytes | memoryview], limit_us: int) -> Reply:
        """``call`` in a task that is never cancelled."""
        async with self._one_at_a_time:
            if not self.alive:
                raise ChildDiedError(f"model {self._model}", await self._ended())
            message = doorbell.encode_call(self._sequence + 1, verb, body, self._arena.write(bulk))
            if len(message) > MAX_DOORBELL_BYTES:
                raise RefusedError(f"call {verb}", f"{len(message)} bytes", f"at most {MAX_DOORBELL_BYTES}")
            self._sequence += 1
            return await self._reply(await self._ask(message, limit_us))

    def hurry(self) -> None:
        """Let a call that may end early do so; nothing if none is under way."""
        if self.busy and self.alive:
            with contextlib.suppress(OSError):
                self._channel.send(doorbell.HURRY)

    async def _reply(self, answer: Answer) -> Reply:
        said = answer.reply
        if isinstance(said, Said):
            bulk = self._arena.head(said.bulk_bytes) if said.bulk_bytes else b""
            self._arena.trim()
            return Reply(said.body, bulk, answer.elapsed_us)
        self._raise_if_failed(answer)
        raise await self.breach("no answer to a call")

    async def breach(self, what: str) -> ChildDiedError:
        """End the child, for it broke the protocol by saying ``what``: the error to raise."""
        return ChildDiedError(f"model {self._model}", await self._breach(what))


def _seen(task: asyncio.Task[Reply]) -> None:
    """An error that nobody waits for any more is nobody's."""
    if not task.cancelled():
        task.exception()
