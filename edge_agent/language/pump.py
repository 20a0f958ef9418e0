"""The one caller of a language model's child: steps while turns live, calls between two steps, a new child after a death.

Rules:

* the next step is sent at once; what the last one gave is taken while the child computes; a call waits for what came before it;
* with nothing to do nothing runs;
* a child that dies is replaced, whoever talks is restored, and the call that it died in is made again; it counts against its
  model (``quarantine``), and a model in quarantine fails everybody with the reason;
* a fault of the agent's own ends the pump loudly: everybody is told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.language.child import ChildDiedError, Death, LanguageChild, StepReply
from edge_agent.runtime import quarantine

FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 30.0
"""Between two attempts to start a child that the machine, not the model, prevents."""
BURST_US = 20_000
"""So long the child may make steps before it tells what they gave; whoever has something to ask ends that after a step."""

T = TypeVar("T")
NewChild = Callable[[Callable[[Death], None]], Awaitable[LanguageChild]]
Work = Callable[[LanguageChild], Awaitable[T]]


class Turns(Protocol):
    """Whose turns are stepped. Nothing here may raise a ``SlyError`` that concerns one turn alone."""

    def live(self) -> int:
        """How many turns want steps."""
        ...

    def take(self, reply: StepReply) -> None:
        """Journal and show what a step gave."""
        ...

    async def restore(self, child: LanguageChild) -> None:
        """Bring every live turn into a new, empty child. Raises ``ChildDiedError``."""
        ...

    def lose(self, error: SlyError) -> None:
        """End every live and every waiting turn with ``error``."""
        ...


@dataclass(slots=True)
class _Call:
    work: Work[Any]
    done: asyncio.Future[Any]


class Pump:
    """``start``, then ``call`` and ``wake`` until ``close``. ``why`` says why nothing is served, empty when something is."""

    def __init__(
        self, name: str, new_child: NewChild, turns: Turns, record: quarantine.Record, report: Callable[[str], None]
    ) -> None:
        self._name, self._new_child, self._turns, self._report = name, new_child, turns, report
        self._record = record
        self._child: LanguageChild | None = None
        self._calls: deque[_Call] = deque()
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._dead: Death | None = None
        self._closing = self._barred = False
        self._released = asyncio.Event()
        self.why = "it is being loaded"
        self.deaths = 0

    @property
    def child(self) -> LanguageChild | None:
        return self._child

    async def start(self) -> None:
        """Raises what the first child cannot be started with."""
        self._child = await self._new_child(self._died)
        self.why = ""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"turns of {self._name}")
        self._task.add_done_callback(self._ended)

    def wake(self) -> None:
        """There may be turns to step."""
        self._woken.set()

    async def call(self, work: Work[T]) -> T:
        """Do ``work`` with the child between two steps. After a death it is done again, with the next child.

        Raises what ``work`` raises, ``UnavailableError`` if there will be no child.
        """
        if self._closing or self._barred or self._task is None or self._task.done():
            raise self._unavailable()
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._ask(_Call(work, done))
        return await done

    def post(self, work: Work[object]) -> None:
        """``call`` without waiting, in this very moment's order; its outcome is nobody's."""
        done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        done.add_done_callback(_heard)
        self._ask(_Call(work, done))

    def _ask(self, call: _Call) -> None:
        self._calls.append(call)
        self._woken.set()
        if self._child is not None:
            self._child.hurry()

    def release(self) -> None:
        """End a quarantine: the model is tried again."""
        self._released.set()

    async def close(self) -> None:
        """End the child; whoever still waits is told."""
        self._closing, self.why = True, self.why or "it was unloaded"
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._lose()
        if self._child is not None:
            await self._child.close()

    # the loop

    async def _run(self) -> None:
        while True:
            try:
                await self._serve()
            except ChildDiedError as error:
                await self._replace(error)

    async def _serve(self) -> None:
        """Step and call until the child dies."""
        reply: StepReply | None = None
        while True:
            if self._calls or not self._wanted(reply):
                self._taken(reply)
                reply = None
            if self._calls:
                await self._make_calls()
            elif self._wanted(reply):
                reply = await self._step(reply)
            else:
                self._woken.clear()
                await self._woken.wait()
            if self._dead is not None:
                raise ChildDiedError(f"model {self._name}", self._dead)

    def _wanted(self, reply: StepReply | None) -> bool:
        return (self._turns.live() if reply is None else reply.live) > 0

    def _taken(self, reply: StepReply | None) -> None:
        if reply is not None:
            self._turns.take(reply)

    async def _step(self, last: StepReply | None) -> StepReply | None:
        """Send a step, take what the ``last`` one gave, then wait for the answer."""
        assert self._child is not None
        stepping = asyncio.get_running_loop().create_task(self._child.step(BURST_US))
        try:
            await asyncio.sleep(0)
            self._taken(last)
            reply = await stepping
        except ChildDiedError:
            raise
        except UnavailableError as error:
            self._turns.lose(error)
            return None
        finally:
            stepping.cancel()
        self._record = quarantine.step(self._record, quarantine.Answered())
        return reply

    async def _make_calls(self) -> None:
        assert self._child is not None
        while self._calls:
            call = self._calls[0]
            try:
                outcome = None if call.done.cancelled() else await call.work(self._child)
            except ChildDiedError:
                raise
            except SlyError as error:
                _settle(call.done, error)
            else:
                _settle(call.done, outcome)
            self._calls.popleft()

    # a child's end

    def _died(self, death: Death) -> None:
        """Told by the child, also when nobody asks it anything."""
        self._dead = death
        self._woken.set()

    async def _replace(self, error: ChildDiedError) -> None:
        """A new child with everybody restored; returns when there is one."""
        self._hold_against(error.death)
        pause_s = FIRST_PAUSE_S
        while True:
            if self._record.quarantined:
                await self._until_released()
            self._dead = None
            try:
                self._child = await self._new_child(self._died)
                await self._turns.restore(self._child)
                break
            except ChildDiedError as again:
                self._hold_against(again.death)
            except RefusedError as refused:
                self._quarantine(f"in quarantine, for it does not load any more: {refused}")
                await self._until_released()
            except UnavailableError as unavailable:
                self._report(f"model {self._name}: no engine now, trying again in {pause_s:g} s: {unavailable}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LAST_PAUSE_S)
        self.why = ""
        self._report(f"model {self._name}: its engine runs again")

    def _hold_against(self, death: Death) -> None:
        self.deaths += 1
        self._record = quarantine.step(self._record, quarantine.Died(str(death)))
        count = len(self._record.deaths)
        self.why = f"its engine died and is started anew: {death}"
        self._report(f"model {self._name}: its engine died, death {count} of {self._record.max_deaths}: {death}")
        if self._record.quarantined:
            self._quarantine(f"in quarantine after {count} deaths: {'; '.join(self._record.reasons)}")

    def _quarantine(self, why: str) -> None:
        self.why, self._barred = why, True
        self._report(f"model {self._name}: {why}")
        self._lose()

    async def _until_released(self) -> None:
        self._released.clear()
        await self._released.wait()
        self._record, self._barred = quarantine.step(self._record, quarantine.Released()), False

    def _lose(self) -> None:
        error = self._unavailable()
        calls, self._calls = self._calls, deque()
        for call in calls:
            _settle(call.done, error)
        self._turns.lose(error)

    def _unavailable(self) -> UnavailableError:
        return UnavailableError(f"model {self._name}", self.why, "" if self._closing else "release it to try again")

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.why = f"its turns stopped by a fault of the agent: {error!r}"
            self._report(f"model {self._name}: {self.why}")
            self._lose()


def _settle(done: asyncio.Future[Any], outcome: object) -> None:
    if done.done():
        return
    if isinstance(outcome, SlyError):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


def _heard(done: asyncio.Future[object]) -> None:
    """A failure that nobody waits for is not a warning at the end."""
    if not done.cancelled():
        done.exception()
