"""Driving the run of a pipeline: submitting what is ready, side by side, and what is known at the end.

Owns ``PipelineResult`` and the threads that wait for answers.  Rules: every stage is a request like any other, placed by the
agent that it is asked of; at most ``MAX_AT_ONCE`` are in flight; an agent that goes away fails the stage, never the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_agent.core.cbor import list_of
from edge_agent.core.clock import Clock, SystemClock
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError, shown
from edge_agent.core.values import InferenceRequest, InferenceResult
from edge_agent.runtime.pipeline_run import Run
from edge_agent.runtime.stage_progress import StageAnswer, StageOutcome, StageState

if TYPE_CHECKING:
    from edge_agent.attest.proof import Proof

MAX_AT_ONCE = 8
MAX_EVIDENCE = 1024
"""Quotes, and appraisals, of each: what a proof holds (``attest.proof``)."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Quotes and appraisals as they were signed, by nobody judged yet."""

    quotes: frozenset[bytes] = frozenset()
    appraisals: frozenset[bytes] = frozenset()

    @classmethod
    def read(cls, answer: object) -> Evidence:
        """What an agent answers to ``evidence``. Raises ``RefusedError`` for anything else."""
        match answer:
            case [list(), list()]:
                quotes, appraisals = (frozenset(list_of(each, "evidence", bytes, MAX_EVIDENCE)) for each in answer)
                return cls(quotes, appraisals)
        raise RefusedError("evidence", shown(answer), "[quotes, appraisals]")

    @classmethod
    def of(cls, every: Iterable[Evidence]) -> Evidence:
        """All of it."""
        parts = list(every)
        return cls(frozenset().union(*(each.quotes for each in parts)), frozenset().union(*(each.appraisals for each in parts)))


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """``stages`` by name, in the order in which they depend on each other. ``elapsed_us``: of the whole."""

    pipeline: str
    stages: Mapping[str, StageOutcome]
    results: tuple[str, ...]
    elapsed_us: int
    evidence: Evidence = Evidence()

    @property
    def ok(self) -> bool:
        """No stage failed. A stage that its gate kept from running did not fail."""
        return all(each.state is not StageState.FAILED for each in self.stages.values())

    @property
    def answers(self) -> tuple[StageAnswer, ...]:
        """Every answer, upstream ones first."""
        return tuple(answer for outcome in self.stages.values() for answer in outcome.answers)

    def proof(self, *, whole: bool = False) -> Proof:
        """What ``sly verify`` checks, for ``attest.proof.write_proof``: every receipt, what was asked for it, the evidence then.

        ``whole``: with the requests and answers themselves.  Raises ``RefusedError`` if no board signed a receipt.
        """
        from edge_agent.attest.proof import Asked, gathered

        signed = [(each.request, each.result) for each in self.answers if each.result.receipt]
        if not signed:
            raise RefusedError(
                f"proof of {self.pipeline}", "no receipt", "answers of boards that attest", "see [attest] in docs/running.md"
            )
        asked = [Asked.of(request, result, whole=whole) for request, result in signed]
        return gathered([result.receipt for _, result in signed], self.evidence.quotes, self.evidence.appraisals, asked)


def drive(
    run: Run, submit: Callable[[InferenceRequest], InferenceResult], clock: Clock | None = None
) -> Mapping[str, StageOutcome]:
    """Submit a run's requests as they become ready, each in a thread, until it is done; what became of its stages.

    ``submit`` is called from several threads; what it raises of ``SlyError`` fails the stage.
    """
    clock = clock or SystemClock()
    in_flight = dict[Future[InferenceResult], InferenceRequest]()
    with ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="stage") as threads:
        while True:
            for request in run.ready(clock.monotonic_us()):
                in_flight[threads.submit(submit, request)] = request
            if not in_flight:
                return run.outcomes
            for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                _take(run, in_flight.pop(future), future)


def _take(run: Run, request: InferenceRequest, future: Future[InferenceResult]) -> None:
    try:
        result = future.result()
        if result.request_id != request.request_id:
            raise RefusedError("answer", f"of request {result.request_id}", f"of request {request.request_id}")
    except SlyError as error:
        run.lost(request.request_id, str(error))
    else:
        run.answered(result)


def offered_by(report: Any) -> frozenset[str]:
    """The models that boards which are there offer, by what an agent answers to ``status``."""
    there = [each for each in _boards(report) if each["standing"] in ("serving", "online")]
    return frozenset(str(model) for each in there for model in each["models"])


def _boards(report: Any) -> list[dict[str, Any]]:
    try:
        boards = list(report["boards"])
        if all({"standing", "models"} <= set(each) for each in boards):
            return boards
        reason = "a board without its standing or models"
    except (TypeError, KeyError) as error:
        reason = repr(error)
    raise UnavailableError("status of the fleet", f"it cannot be read ({reason})", "run the same version everywhere")
