"""One stage of a running pipeline: its state, its requests, and what has been answered so far.

=========  ==============================================================================================
state      how a stage leaves it
=========  ==============================================================================================
WAITING    to RUNNING when its requests go out; to DONE without items; to SKIPPED by its gate or for want of
           an upstream stage; to FAILED if no time or energy is left, or its input cannot be made
RUNNING    to DONE when every request is answered; to FAILED with the first that is not OK
DONE, SKIPPED, FAILED    never
=========  ==============================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from edge_agent.core.values import InferenceRequest, InferenceResult
from edge_agent.runtime.pipeline import Stage
from edge_agent.runtime.ports import Form, Found

NOTHING = "nothing"
"""What a prompt calls the label of a stage that found nothing."""


class StageState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"


_MOVES = {
    StageState.WAITING: (StageState.RUNNING, StageState.DONE, StageState.SKIPPED, StageState.FAILED),
    StageState.RUNNING: (StageState.DONE, StageState.FAILED),
}


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """One request of a stage, its result, and what that says; ``None`` for a result that is not OK or cannot be read."""

    request: InferenceRequest
    result: InferenceResult
    found: Found | None


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What became of a stage: its answers in the order of its items. ``left_out``: items beyond the stage's ``at_most``."""

    stage: Stage
    state: StageState
    reason: str
    answers: tuple[StageAnswer, ...]
    left_out: int


@dataclass(slots=True)
class StageProgress:
    stage: Stage
    form: Form
    state: StageState = StageState.WAITING
    reason: str = ""
    cause: str = ""
    """What the stages that need this one are told, if it is not DONE."""
    left_out: int = 0
    requests: dict[str, InferenceRequest] = field(default_factory=dict)
    results: dict[str, InferenceResult] = field(default_factory=dict)
    found: dict[str, Found] = field(default_factory=dict)

    def become(self, state: StageState, reason: str = "", cause: str = "") -> None:
        if state not in _MOVES.get(self.state, ()):
            raise RuntimeError(f"stage {self.stage.name} is {self.state} and cannot become {state}")
        self.state, self.reason, self.cause = state, reason, cause or f"stage {self.stage.name} {state}: {reason}"

    @property
    def unanswered(self) -> list[InferenceRequest]:
        return [request for request_id, request in self.requests.items() if request_id not in self.results]

    def says(self) -> list[tuple[InferenceResult, Found]]:
        """The answers so far, in the order of their requests."""
        return [(self.results[each], self.found[each]) for each in self.requests if each in self.found]

    def best(self) -> tuple[str, float]:
        """The label with the highest score, the first of equals."""
        every = [(score, label) for _, found in self.says() for score, label in zip(found.scores, found.labels, strict=True)]
        score, label = max(every, key=lambda pair: pair[0], default=(0.0, NOTHING))
        return label, score

    def outcome(self) -> StageOutcome:
        answers = tuple(
            StageAnswer(request, self.results[name], self.found.get(name))
            for name, request in self.requests.items()
            if name in self.results
        )
        return StageOutcome(self.stage, self.state, self.reason, answers, self.left_out)
