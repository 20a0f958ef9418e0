"""One model and the child that runs it now: its queue, its restarts, and the end of patience with it.

============  ===================================================
state         what ``invoke`` does
============  ===================================================
READY         runs
RESTARTING    waits, within its budget, for the new child
QUARANTINED   raises, and says how often and why the model died
CLOSED        raises
============  ===================================================
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from board_support.board import Delegate
from board_support.roofline import ModelWork
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.values import Tensor
from edge_agent.runtime import quarantine
from edge_agent.runtime.child import ChildDiedError, Death
from edge_agent.runtime.sandbox import Sandbox
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.signature import Signature, check_inputs
from models.card import Card

WHOLE_TASK_INPUT = "image"
REGION_INPUT = "region"
"""Optional beside it: the box of the upright picture to look at, checked in the child, which knows the picture's size."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 30.0
"""Between two attempts to start a child that the machine, not the model, prevents."""


class EngineState(StrEnum):
    READY = "ready"
    RESTARTING = "restarting"
    QUARANTINED = "quarantined"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready. ``resident_bytes`` is the child's own account of its share of memory (PSS)."""

    signature: Signature
    work: ModelWork
    library: str
    delegate: str
    resident_bytes: int
    confinement: tuple[str, ...]
    delegated_permille: int | None = None
    """How many of the model's operators the delegate took on; ``None`` without one, or if the library does not tell."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """``elapsed_us``: time in the child, from its waking to the outputs lying in the arena."""

    outputs: dict[str, Tensor]
    elapsed_us: int


class Supervised:
    """One model and the child that runs it now."""

    def __init__(
        self, name: str, model_fd: int, digest: bytes, card: Card | None, settings: EngineSettings,
        delegate: Delegate | None, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.name, self._digest, self._card = name, digest, card
        self._settings, self._delegate, self._report = settings, delegate, report
        self._loop = asyncio.get_running_loop()
        self._model_fd = os.dup(model_fd)
        self._record = quarantine.Record(settings.max_deaths, settings.death_window)
        self.state = EngineState.RESTARTING
        self._sandbox: Sandbox | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._why = ""
        self._signature: Signature | None = None

    async def start(self) -> Loaded:
        try:
            await self._new_child()
        except BaseException:
            await self.close()
            raise
        assert self._sandbox is not None
        ready = self._sandbox.ready
        self._signature = ready.signature
        return Loaded(
            ready.signature, ready.work, ready.library, ready.delegate, ready.resident_bytes, ready.confinement,
            ready.delegated_permille,
        )  # fmt: skip

    @property
    def model_fd(self) -> int:
        """The descriptor that every child of this model maps; good until ``close``. Who keeps it makes a copy."""
        return self._model_fd

    @property
    def idle(self) -> bool:
        """Whether a request would run at once."""
        sandbox = self._sandbox
        return self.state is EngineState.READY and not self._waiting and sandbox is not None and not sandbox.busy

    @property
    def deaths(self) -> tuple[str, ...]:
        return self._record.reasons

    async def invoke(self, inputs: Mapping[str, Tensor], budget_us: int) -> Invocation:
        whole_task = self._checked(inputs)
        if self._waiting >= self._settings.max_waiting:
            raise UnavailableError(f"model {self.name}", f"{self._waiting} requests wait already", "send it later or elsewhere")
        self._waiting += 1
        try:
            async with asyncio.timeout(budget_us / 1e6), self._turn:
                return await self._run(inputs, whole_task)
        except TimeoutError:
            raise UnavailableError(f"model {self.name}", f"no answer within the {budget_us} µs it was given") from None
        finally:
            self._waiting -= 1

    async def _run(self, inputs: Mapping[str, Tensor], whole_task: bool) -> Invocation:
        sandbox = await self._running()
        started = self._loop.time()
        try:
            done, elapsed_us = await sandbox.invoke(inputs, whole_task)
            outputs = sandbox.take(done)
        except ChildDiedError:
            raise
        except SlyError:
            self._answered()
            raise
        self._answered()
        return Invocation(outputs, min(elapsed_us, int((self._loop.time() - started) * 1e6)))

    def _answered(self) -> None:
        if not self._record.quarantined:
            self._record = quarantine.step(self._record, quarantine.Answered())

    def _checked(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether ``inputs`` are a picture for the card's whole task; raises ``RefusedError`` if they are no input at all."""
        if self._signature is None:
            raise UnavailableError(f"model {self.name}", "it is still being loaded")
        whole_task = self._is_whole_task(self._signature, inputs)
        if not whole_task:
            check_inputs(self.name, self._signature, inputs)
        return whole_task

    def _is_whole_task(self, signature: Signature, inputs: Mapping[str, Tensor]) -> bool:
        if self._card is None or set(inputs) - {REGION_INPUT} != {WHOLE_TASK_INPUT}:
            return False
        image = inputs[WHOLE_TASK_INPUT]
        own = next((spec for spec in signature.inputs if spec.name == WHOLE_TASK_INPUT), None)
        return image.dtype == "uint8" and len(image.shape) == 1 and (own is None or len(own.shape) != 1)

    async def _running(self) -> Sandbox:
        """The child, alive and idle; waits for both. Raises ``UnavailableError`` if there will be none."""
        while True:
            if self.state is EngineState.QUARANTINED:
                raise UnavailableError(f"model {self.name}", self._why, "release it to try again")
            if self.state is EngineState.CLOSED:
                raise UnavailableError(f"model {self.name}", "it was unloaded")
            sandbox = self._sandbox if self.state is EngineState.READY else None
            if sandbox is not None and sandbox.busy:
                await sandbox.becomes_idle()
            elif sandbox is not None and sandbox.alive:
                return sandbox
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _new_child(self) -> None:
        sandbox = await Sandbox.start(
            self.name, self._model_fd, self._digest, self._settings, self._delegate, self._card, self._died
        )
        if self.state is EngineState.CLOSED:
            await sandbox.close()
            raise UnavailableError(f"model {self.name}", "it was unloaded while it loaded")
        self._sandbox = sandbox
        self._become(EngineState.READY)

    def _become(self, state: EngineState) -> None:
        self.state = state
        self._changed.set()

    def _died(self, death: Death) -> None:
        if self.state is EngineState.READY:
            self._held_against(str(death))
            self._begin_restart()

    def _begin_restart(self) -> None:
        if self.state is EngineState.RESTARTING:
            self._restarting = self._loop.create_task(self._restart(), name=f"restart {self.name}")

    def _held_against(self, reason: str) -> None:
        self._record = quarantine.step(self._record, quarantine.Died(reason))
        times = f"death {len(self._record.deaths)} of {self._settings.max_deaths}"
        self._report(f"model {self.name}: its engine died, {times}: {reason}")
        self._become(EngineState.RESTARTING)
        if self._record.quarantined:
            self._quarantine(f"in quarantine after {len(self._record.deaths)} deaths: {'; '.join(self._record.reasons)}")

    def _quarantine(self, why: str) -> None:
        self._why = why
        self._become(EngineState.QUARANTINED)
        self._report(f"model {self.name}: {why}")

    async def _restart(self) -> None:
        pause_s = FIRST_PAUSE_S
        while self.state is EngineState.RESTARTING:
            try:
                await self._new_child()
                self._report(f"model {self.name}: its engine runs again")
            except ChildDiedError as error:
                self._held_against(str(error.death))
            except RefusedError as error:
                self._quarantine(f"in quarantine, for it does not load any more: {error}")
            except UnavailableError as error:
                self._report(f"model {self.name}: no engine now, trying again in {pause_s:g} s: {error}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def release(self) -> None:
        if self.state is EngineState.QUARANTINED:
            self._record = quarantine.step(self._record, quarantine.Released())
            self._become(EngineState.RESTARTING)
            self._begin_restart()

    async def close(self) -> None:
        if self.state is EngineState.CLOSED:
            return
        self._become(EngineState.CLOSED)
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait([self._restarting])
        if self._sandbox is not None:
            await self._sandbox.close()
        os.close(self._model_fd)
