"""Models of perception: each release in an engine child of its own, and one job on it with what the board says it cost.

Rules: on an emulated board the modelled time is waited out when it is paced; every way a job can fail is a result with its
reason.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque

from board_support.board import Board
from board_support.roofline import estimate
from edge_agent.attest.golden import golden_inputs
from edge_agent.attest.measure import MappedFile, MappedModel
from edge_agent.core.clock import Clock
from edge_agent.core.digests import tensors_digest
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.values import InferenceResult, ModelOffer, Status, Tensor, failure
from edge_agent.hosting.cached import CachedFiles
from edge_agent.hosting.release import Release
from edge_agent.node.events import Execute
from edge_agent.runtime.supervisor import EngineState, EngineSupervisor, Invocation, Loaded
from models.card import Card
from ota.health import unsound

GOLDEN_BUDGET_US = 5_000_000
RECENT_JOBS = 32


class PictureRelease(Release):
    """``engine``: what the supervisor calls its child."""

    def __init__(self, offer: ModelOffer, number: int, engine: str, loaded: Loaded, house: Pictures) -> None:
        super().__init__(offer, number)
        self.engine, self.loaded, self._house = engine, loaded, house
        self._took_us: deque[int] = deque(maxlen=RECENT_JOBS)

    @property
    def longest_us(self) -> int:
        """Of the last jobs that it did, with what the board waited out; 0 before the first."""
        return max(self._took_us, default=0)

    @property
    def there(self) -> bool:
        return super().there and self.engine in self._house.supervisor.loaded()

    @property
    def rests(self) -> bool:
        """Whether a job would run at once."""
        return self.there and self._house.supervisor.idle(self.engine)

    @property
    def quarantined(self) -> bool:
        return self._house.supervisor.state(self.engine) is EngineState.QUARANTINED

    @property
    def deaths(self) -> tuple[str, ...]:
        return self._house.supervisor.deaths(self.engine)

    async def run(self, job: Execute, budget_us: int) -> InferenceResult:
        with self.at_work():
            started_us = self._house.clock.monotonic_us()
            result = await self._house.run(self, job, budget_us)
            if result.status is Status.OK:
                self._took_us.append(self._house.clock.monotonic_us() - started_us)
        return result

    async def invoke_golden(self) -> tuple[dict[str, Tensor], int]:
        """What it gives for its golden input, and how many µs it took; nothing if it has no such input. Raises ``SlyError``."""
        inputs = await asyncio.to_thread(golden_inputs, self.loaded.signature.inputs)
        if not inputs:
            return {}, 0
        with self.at_work():
            invocation = await self._house.supervisor.invoke(self.engine, inputs, GOLDEN_BUDGET_US)
        return self._house.handed_over(invocation), invocation.elapsed_us

    async def golden(self) -> tuple[bytes, str]:
        try:
            outputs, _ = await self.invoke_golden()
        except SlyError as error:
            return b"", str(error)
        return (tensors_digest(outputs), unsound(outputs)) if outputs else (b"", "")

    def mapped(self, slot: str) -> MappedModel | None:
        fd = self._house.supervisor.loaded().get(self.engine)
        if fd is None:
            return None
        file = MappedFile(self._house.cache.blobs.path_of(self.digest), self.digest, fd)
        return MappedModel(self.name, self.digest, (file,), bytes, self.loaded.delegated_permille, self.number, slot)

    async def end(self) -> None:
        if self.engine in self._house.supervisor.loaded():
            await self._house.supervisor.unload(self.engine)
        self._house.cache.give_back([self.digest])


class Pictures:
    """What picture models of this board share."""

    def __init__(self, board: Board, board_id: str, supervisor: EngineSupervisor, cache: CachedFiles, clock: Clock) -> None:
        self._board, self._board_id = board, board_id
        self.supervisor, self.cache, self.clock = supervisor, cache, clock

    async def load(self, name: str, number: int, card: Card, descriptor: int) -> PictureRelease:
        """A release whose file ``descriptor`` has open, and which is pinned; both are taken over.

        Raises ``RefusedError`` or ``UnavailableError``.
        """
        digest, engine = bytes.fromhex(card.source.sha256), self._engine_name(name, number)
        try:
            loaded = await self.supervisor.load(engine, descriptor, digest, card)
        except BaseException:
            self.cache.give_back([digest])
            raise
        finally:
            os.close(descriptor)
        prior = estimate(loaded.work, self._board.profile)
        offer = ModelOffer(name, card.task, digest, card.quality_permille, max(1, prior.busy_us), prior.energy_uj)
        return PictureRelease(offer, number, engine, loaded, self)

    def _engine_name(self, name: str, number: int) -> str:
        """What people read of it in the log; no two engines at once have the same."""
        engine = f"{name}@{number}" if number else name
        while engine in self.supervisor.loaded():
            engine += "'"
        return engine

    async def run(self, release: PictureRelease, job: Execute, budget_us: int) -> InferenceResult:
        """One job on a release; every way it can fail is a result with its reason."""
        started_us = self.clock.monotonic_us()
        try:
            invocation = await self.supervisor.invoke(release.engine, job.request.inputs, budget_us)
        except RefusedError as error:
            return self._failure(job, Status.REFUSED, str(error))
        except UnavailableError as error:
            return self._failure(job, Status.FAILED, str(error))
        spent = self._board.execution(release.loaded.work, started_us, invocation.elapsed_us)
        outputs = self.handed_over(invocation)
        if self._board.emulated and not await self._pace(started_us, spent.busy_us, budget_us):
            reason = f"the emulated board took {spent.busy_us} µs, it had {budget_us} µs"
            return self._failure(job, Status.FAILED, reason)
        return InferenceResult(
            job.request.request_id, Status.OK, self._board_id, job.model, release.digest, outputs, spent.busy_us,
            spent.energy_uj, spent.energy_kind,
        )  # fmt: skip

    def handed_over(self, invocation: Invocation) -> dict[str, Tensor]:
        """The outputs as this board hands them over: an emulated one may have injected bit flips."""
        if not self._board.emulated:
            return invocation.outputs
        corrupt = self._board.corrupt
        return {name: Tensor(each.dtype, each.shape, corrupt(bytes(each.data))) for name, each in invocation.outputs.items()}

    async def _pace(self, started_us: int, busy_us: int, budget_us: int) -> bool:
        """Wait out the modelled time of a paced emulated board; ``False`` if the budget was over before."""
        if not self._board.settings.paced:
            return True
        left_us = started_us + min(busy_us, budget_us) - self.clock.monotonic_us()
        await asyncio.sleep(max(0, left_us) / 1e6)
        return busy_us <= budget_us

    def _failure(self, job: Execute, status: Status, reason: str) -> InferenceResult:
        return failure(job.request.request_id, status, self._board_id, reason, job.model)
