"""What runs and waits on a board, lane by lane, and two clocks of each lane: how far a job comes, and what it has of the board.

Rules: integers; lanes share the board evenly, and the jobs of one lane share each step (``placement.cost.JOINING``), so that what
a job took can be told as of one that ran alone, whatever ran beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from edge_agent.core.chat import CHAT
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import InferenceRequest, InferenceResult
from edge_agent.core.wanted import shape_of
from edge_agent.node.streams import end_of
from edge_agent.placement.cost import JOINING

FINE = 1024
"""The clocks count in such parts of a microsecond."""


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

    @property
    def talks(self) -> bool:
        return self.request.task == CHAT


def lane_of(task: str, model: str) -> str:
    """The queue of a model's jobs: its own for talk, one for all the rest."""
    return model if task == CHAT else ""


@dataclass(frozen=True, slots=True)
class Run:
    """A job that runs: when it began, what it had to do before it began to answer, and the clocks of its lane then."""

    job: Job
    began_us: int
    before_us: int
    alone: int
    share: int


@dataclass(slots=True)
class Lane:
    """``running`` by key."""

    running: dict[str, Run] = field(default_factory=dict)
    waiting_for: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many wait for each model, by the shape of their requests."""
    before_answers_us: int = 0
    """What those that wait have to do before they begin to answer."""
    alone: int = 0
    """How far a job has come that ran all the time, in 1/``FINE`` µs of what it takes alone."""
    share: int = 0
    """And how much of the board's time it had."""

    def done_us(self, run: Run) -> int:
        """How far a job has come, as was last counted, in µs of what it takes alone."""
        return (self.alone - run.alone) // FINE

    def had_us(self, run: Run) -> int:
        """How much of the board's time it had."""
        return (self.share - run.share) // FINE


def advance(lanes: Iterable[Lane], interval_us: int) -> None:
    """Time passed in which what runs did not change."""
    at_work = [lane for lane in lanes if lane.running]
    for lane in at_work:
        together = len(lane.running)
        lane.alone += interval_us * FINE * JOINING // (JOINING * len(at_work) + together - 1)
        lane.share += interval_us * FINE // (len(at_work) * together)


def answering_us(result: InferenceResult, done_us: int, elapsed_us: int, before_us: int) -> int:
    """The part of a turn that came after its first token; ``before_us`` is what was thought to come before."""
    try:
        end = end_of(result)
    except RefusedError:
        return max(1, done_us - before_us)
    after_us = end.decode_us or elapsed_us - end.first_token_us
    return done_us * min(after_us, elapsed_us) // max(1, elapsed_us)
