"""The jobs of this board: one runs, the others wait in order.

Owns the local queue, the offers of the hosted models and how their cost estimates learn.  Rules: the queue is bounded in
requests and bytes; a job whose deadline has passed is never started; one job runs at a time, because one accelerator
serves one inference at a time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, replace

from edge_agent.core.config import QueueSection
from edge_agent.core.values import MAX_COST, InferenceRequest, InferenceResult, ModelOffer, Status
from edge_agent.node.deadlines import Deadlines
from edge_agent.node.events import Execute
from edge_agent.placement.cost import corrected


@dataclass(frozen=True, slots=True)
class Job:
    """A request that this board is to run. ``ingress`` is the board that will answer the client."""

    key: str
    request: InferenceRequest
    model: str
    deadline_us: int
    ingress: str

    @property
    def size_bytes(self) -> int:
        return self.request.size_bytes


class Execution:
    def __init__(self, limits: QueueSection) -> None:
        self.limits = limits
        self.offers: dict[str, ModelOffer] = {}
        self.withdrawn: dict[str, str] = {}
        self.waiting_bytes = 0
        self._waiting: OrderedDict[str, Job] = OrderedDict()
        self._waiting_for: Counter[str] = Counter()
        self._deadlines = Deadlines()
        self._running: tuple[Job, int] | None = None

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def host(self, offer: ModelOffer) -> None:
        self.offers[offer.model] = offer
        self.withdrawn.pop(offer.model, None)

    def withdraw(self, model: str, reason: str) -> None:
        self.offers.pop(model, None)
        self.withdrawn[model] = reason

    @property
    def idle(self) -> bool:
        return self._running is None and not self._waiting

    def full(self, size_bytes: int) -> str:
        """Why a job of this size cannot wait here; empty if it can."""
        if len(self._waiting) >= self.limits.max_requests:
            return f"the queue is full: {len(self._waiting)} requests wait"
        if self.waiting_bytes + size_bytes > self.limits.max_bytes:
            return f"the queue is full: {self.waiting_bytes} of {self.limits.max_bytes} bytes wait, {size_bytes} more asked"
        return ""

    def queue_us(self, now_us: int) -> int:
        """The modelled work that a new job would wait for."""
        work_us = sum(self._estimate_us(model) * count for model, count in self._waiting_for.items())
        if self._running is not None:
            job, started_us = self._running
            work_us += max(0, self._estimate_us(job.model) - (now_us - started_us))
        return min(work_us, MAX_COST)

    def enqueue(self, job: Job) -> None:
        """Let a job wait. Raises ``RuntimeError`` if the queue is full or holds the key: ask ``full`` first."""
        if job.key in self._waiting or self.full(job.size_bytes):
            raise RuntimeError(f"job {job.key} may not be queued: {self.full(job.size_bytes) or 'it is there already'}")
        self._waiting[job.key] = job
        self._waiting_for[job.model] += 1
        self.waiting_bytes += job.size_bytes
        self._deadlines.set(job.key, job.deadline_us)

    def forget(self, key: str) -> Job | None:
        """Take a job out of the queue; ``None`` if it is not waiting (it may be running, and then goes on)."""
        job = self._waiting.pop(key, None)
        if job is not None:
            self.waiting_bytes -= job.size_bytes
            self._waiting_for[job.model] -= 1
            if not self._waiting_for[job.model]:
                del self._waiting_for[job.model]
            self._deadlines.discard(key)
        return job

    def start_next(self, now_us: int) -> Execute | None:
        """Begin the oldest waiting job if none runs and its time is not up."""
        if self._running is not None or not self._waiting:
            return None
        job = next(iter(self._waiting.values()))
        if job.deadline_us <= now_us:
            return None
        self.forget(job.key)
        self._running = (job, now_us)
        return Execute(job.key, job.request, job.model, job.deadline_us - now_us)

    def take_expired(self, now_us: int) -> list[Job]:
        """The waiting jobs whose deadline has passed, which wait no more."""
        expired = [self.forget(key) for key in self._deadlines.take_due(now_us)]
        return [job for job in expired if job is not None]

    def finish(self, key: str, result: InferenceResult, now_us: int) -> Job | None:
        """The running job is done; learn from a good one. ``None`` if ``key`` is not what runs.

        What is learned is how long the board was taken up, which is more than the engine's own time when a picture had to be
        decoded, or an emulated board is slower than what it emulates.
        """
        if self._running is None or self._running[0].key != key:
            return None
        (job, started_us), self._running = self._running, None
        offer = self.offers.get(job.model)
        if offer is not None and result.status is Status.OK:
            self.offers[job.model] = replace(
                offer,
                busy_us=max(1, corrected(offer.busy_us, now_us - started_us)),
                energy_uj=corrected(offer.energy_uj, result.energy_uj),
            )
        return job

    def _estimate_us(self, model: str) -> int:
        offer = self.offers.get(model)
        return offer.busy_us if offer else 0
