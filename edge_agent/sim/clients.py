"""The clients of a simulated fleet: what they ask, whom they ask next, and what they were answered.

Rules: a client waits at one board, by that board's own socket; when the agent there dies it asks the next board, under the same
request id, with what is left of its deadline; it is answered once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edge_agent.core.values import InferenceResult, Status, failure
from edge_agent.core.wanted import Wanted
from edge_agent.sim.arrivals import Arrival
from edge_agent.sim.board import Ran
from edge_agent.sim.results import Served

if TYPE_CHECKING:
    from edge_agent.sim.fleet import SimFleet

ASK_AGAIN_US = 500_000


class BrokenPromiseError(RuntimeError):
    """Something that must hold in every run did not; a fault of the product or of the simulator."""


@dataclass(slots=True)
class _Asked:
    """A request whose client waits. ``tried`` counts the boards whose agent died on it."""

    arrival: Arrival
    arrived_us: int
    tried: int = 0
    runs: dict[str, Ran] = field(default_factory=dict)
    """By the board that ran it."""

    @property
    def deadline_us(self) -> int:
        return self.arrived_us + self.arrival.request.limits.deadline_us


class Clients:
    """``start_us``: when the load begins; what is served counts from there."""

    def __init__(self, fleet: SimFleet, start_us: int) -> None:
        self._fleet, self._start_us = fleet, start_us
        self.served: list[Served] = []
        self.last_deadline_us = 0
        self._asked: dict[str, _Asked] = {}
        self._homeless: list[str] = []

    @property
    def pending(self) -> tuple[str, ...]:
        """Requests without an answer."""
        return tuple(self._asked)

    def come(self, arrival: Arrival) -> None:
        """A client asks."""
        asked = _Asked(arrival, self._fleet.now_us)
        if arrival.request.request_id in self._asked:
            raise BrokenPromiseError(f"request {arrival.request.request_id} comes twice")
        self._asked[arrival.request.request_id] = asked
        self.last_deadline_us = max(self.last_deadline_us, asked.deadline_us)
        self._ask(asked)

    def _ask(self, asked: _Asked) -> None:
        """At its own board, or at the next one that is there."""
        request, left_us = asked.arrival.request, asked.deadline_us - self._fleet.now_us
        names = list(self._fleet.boards)
        first = names.index(asked.arrival.ingress) + asked.tried
        there = [each for i in range(len(names)) if (each := self._fleet.boards[names[(first + i) % len(names)]]).up]
        if left_us <= 0:
            reason = "its client gave up: no board that it asked had an answer in time"
            self.answered(request.request_id, failure(request.request_id, Status.SHED, asked.arrival.ingress, reason))
        elif not there:
            self._homeless.append(request.request_id)
            self._fleet.clock.call_at(min(self._fleet.now_us + ASK_AGAIN_US, asked.deadline_us), self.house_homeless)
        else:
            limits = request.limits if not asked.tried else replace(request.limits, deadline_us=left_us)
            there[0].ask(replace(request, limits=limits))

    def ask_elsewhere(self, request_id: str) -> None:
        """The agent that a client was asking has died."""
        asked = self._asked[request_id]
        asked.tried += 1
        self._ask(asked)

    def house_homeless(self) -> None:
        """Clients that found no board at all ask again."""
        homeless, self._homeless = self._homeless, []
        for request_id in homeless:
            self._ask(self._asked[request_id])

    def answered(self, request_id: str, result: InferenceResult) -> None:
        asked = self._asked.pop(request_id, None)
        if asked is None:
            raise BrokenPromiseError(f"request {request_id} was answered twice, the second time by {result.board}")
        self.served.append(self._entry(asked, result))

    def _entry(self, asked: _Asked, result: InferenceResult) -> Served:
        request = asked.arrival.request
        ran = asked.runs.get(result.board) if result.status is Status.OK else None
        quality = self._fleet.scenario.model(result.model).quality_permille if result.model else 0
        return Served(
            request_id=request.request_id, ingress=asked.arrival.ingress, wanted=Wanted.of(request), session=request.session,
            arrived_us=asked.arrived_us - self._start_us, began_us=ran.began_us - self._start_us if ran else 0,
            ended_us=ran.ended_us - self._start_us if ran else 0, answered_us=self._fleet.since_start_us, board=result.board,
            model=result.model, status=result.status, reason=result.reason, busy_us=result.busy_us, energy_uj=result.energy_uj,
            quality_permille=quality, kv_action=ran.kv_action if ran else "none",
        )  # fmt: skip

    def lengths(self, request_id: str) -> tuple[int, int]:
        """Tokens of a turn's prompt and of its answer; a board that runs what nobody waits for gets the least."""
        asked = self._asked.get(request_id)
        return (asked.arrival.prompt_tokens, asked.arrival.answer_tokens) if asked else (1, 1)

    def ran(self, board: str, request_id: str, run: Ran) -> None:
        if asked := self._asked.get(request_id):
            asked.runs[board] = run
