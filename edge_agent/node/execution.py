"""The jobs of this board: in each lane some run, the others wait in order.

Owns the local queue, the offers of the hosted models and how their cost estimates learn.  Rules: the queue is bounded in
requests and bytes over all lanes; a job whose deadline has passed is never started; the models of perception share one lane
in which one job runs at a time, because one accelerator serves one inference at a time; a language model has a lane of its
own, in which ``parallel`` jobs run at once, because its engine shares each step among them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace

from edge_agent.core.chat import CHAT
from edge_agent.core.config import QueueSection
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import KvState
from edge_agent.core.values import MAX_COST, InferenceRequest, InferenceResult, ModelOffer, Status
from edge_agent.core.wanted import shape_of
from edge_agent.node.deadlines import Deadlines
from edge_agent.node.events import Execute
from edge_agent.node.streams import end_of
from edge_agent.placement.cost import CostBook


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

    @property
    def shape(self) -> int:
        return shape_of(self.request)

    @property
    def lane(self) -> str:
        return lane_of(self.request.task, self.model)


def lane_of(task: str, model: str) -> str:
    """The queue of a model's jobs: its own for talk, one for all the rest."""
    return model if task == CHAT else ""


@dataclass(slots=True)
class _Lane:
    """``waiting`` by key, oldest first; ``running`` by key, each with when it began."""

    waiting: OrderedDict[str, Job] = field(default_factory=OrderedDict)
    running: dict[str, tuple[Job, int]] = field(default_factory=dict)
    waiting_for: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many wait for each model, by the shape of their requests."""


class Execution:
    def __init__(self, limits: QueueSection) -> None:
        self.limits = limits
        self.costs = CostBook()
        self.withdrawn: dict[str, str] = {}
        self.kv: dict[str, KvState] = {}
        """Of the language models, as they last said."""
        self.waiting_bytes = 0
        self._lanes: dict[str, _Lane] = {}
        self._running: set[str] = set()
        self._deadlines = Deadlines()

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._deadlines)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def offers(self) -> dict[str, ModelOffer]:
        """The hosted models, at what they cost here by all that was measured."""
        return self.costs.offers

    def host(self, offer: ModelOffer) -> None:
        self.costs.host(offer)
        self.withdrawn.pop(offer.model, None)

    def withdraw(self, model: str, reason: str) -> None:
        self.costs.withdraw(model)
        self.kv.pop(model, None)
        self.withdrawn[model] = reason

    @property
    def idle(self) -> bool:
        return not self._running and not len(self)

    def full(self, size_bytes: int) -> str:
        """Why a job of this size cannot wait here; empty if it can."""
        if len(self) >= self.limits.max_requests:
            return f"the queue is full: {len(self)} requests wait"
        if self.waiting_bytes + size_bytes > self.limits.max_bytes:
            return f"the queue is full: {self.waiting_bytes} of {self.limits.max_bytes} bytes wait, {size_bytes} more asked"
        return ""

    def queue_us(self, now_us: int, lane: str = "") -> int:
        """The modelled work that a new job of a lane would wait for: none while one more may run at once."""
        queue = self._lanes.get(lane)
        if queue is None:
            return 0
        parallel = self._parallel(lane)
        if len(queue.running) + len(queue.waiting) < parallel:
            return 0
        work_us = sum(self._estimate_us(*kind) * count for kind, count in queue.waiting_for.items())
        for job, started_us in queue.running.values():
            work_us += max(0, self._estimate_us(job.model, job.shape) - (now_us - started_us))
        return min(work_us // parallel, MAX_COST)

    def kv_states(self, now_us: int) -> list[KvState]:
        """Of the language models that are hosted, with what a new turn waits."""
        hosted = [self.kv[model] for model in sorted(self.kv) if model in self.offers]
        return [replace(state, queue_us=self.queue_us(now_us, state.model)) for state in hosted]

    def enqueue(self, job: Job) -> None:
        """Let a job wait. Raises ``RuntimeError`` if the queue is full or holds the key: ask ``full`` first."""
        lane = self._lanes.setdefault(job.lane, _Lane())
        if any(job.key in each.waiting for each in self._lanes.values()) or self.full(job.size_bytes):
            raise RuntimeError(f"job {job.key} may not be queued: {self.full(job.size_bytes) or 'it is there already'}")
        lane.waiting[job.key] = job
        lane.waiting_for[job.model, job.shape] += 1
        self.waiting_bytes += job.size_bytes
        self._deadlines.set(job.key, job.deadline_us)

    def forget(self, key: str) -> Job | None:
        """Take a job out of the queue; ``None`` if it is not waiting (it may be running, and then goes on)."""
        lane = next((each for each in self._lanes.values() if key in each.waiting), None)
        if lane is None:
            return None
        job = lane.waiting.pop(key)
        kind = job.model, job.shape
        lane.waiting_for[kind] -= 1
        if not lane.waiting_for[kind]:
            del lane.waiting_for[kind]
        self.waiting_bytes -= job.size_bytes
        self._deadlines.discard(key)
        return job

    def running_job(self, key: str) -> Job | None:
        """The job of this key if it runs."""
        return next((lane.running[key][0] for lane in self._lanes.values() if key in lane.running), None)

    def start_next(self, now_us: int) -> Execute | None:
        """Begin the oldest waiting job of a lane that has room, if its time is not up."""
        for name, lane in self._lanes.items():
            if not lane.waiting or len(lane.running) >= self._parallel(name):
                continue
            job = next((job for job in lane.waiting.values() if job.key not in self._running), None)
            if job is None or job.deadline_us <= now_us:
                continue
            self.forget(job.key)
            self._running.add(job.key)
            lane.running[job.key] = (job, now_us)
            return Execute(job.key, job.request, job.model, job.deadline_us - now_us)
        return None

    def take_expired(self, now_us: int) -> list[Job]:
        """The waiting jobs whose deadline has passed, which wait no more."""
        expired = [self.forget(key) for key in self._deadlines.take_due(now_us)]
        return [job for job in expired if job is not None]

    def finish(self, key: str, result: InferenceResult, now_us: int) -> Job | None:
        """A running job is done; learn from a good one. ``None`` if ``key`` is not what runs.

        What is learned is how long the board was taken up, which is more than the engine's own time when a picture had to be
        decoded, or an emulated board is slower than what it emulates.  Of talk it is the time from the first token on: what comes
        before depends on where the session lies, and the placement adds it by its KV plan.
        """
        lane = next((each for each in self._lanes.values() if key in each.running), None)
        if lane is None:
            return None
        job, started_us = lane.running.pop(key)
        self._running.discard(key)
        if result.status is Status.OK:
            busy_us = now_us - started_us
            if job.request.task == CHAT:
                busy_us = _answering_us(result, busy_us)
            self.costs.learn(job.model, job.shape, busy_us, result.energy_uj)
        return job

    def _parallel(self, lane: str) -> int:
        offer = self.offers.get(lane) if lane else None
        return offer.parallel if offer else 1

    def _estimate_us(self, model: str, shape: int) -> int:
        return self.costs.cost(model, shape).busy_us if model in self.offers else 0


def _answering_us(result: InferenceResult, elapsed_us: int) -> int:
    """How long a turn took after its first token; ``elapsed_us`` in all."""
    try:
        end = end_of(result)
    except RefusedError:
        return elapsed_us
    return end.decode_us or elapsed_us - end.first_token_us
