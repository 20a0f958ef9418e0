"""The verbs of the local socket that have one answer each: ``infer``, ``explain``, ``place``, ``table``, ``status``,
``trust``, ``evidence``, ``sessions``, ``drop``.

Rules: a body that is not the verb's is refused like a verb that does not exist; what only asks changes nothing that decides.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.core import wire
from edge_agent.core.cbor import list_of
from edge_agent.core.clock import Clock
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_BOARDS, REQUEST_ID, InferenceRequest, checked
from edge_agent.hosting import Host
from edge_agent.node.node import Node
from edge_agent.node.report import decision_report, fleet_report, shares_of, table_report
from edge_agent.node.trust_report import evidence_of, trust_report
from edge_agent.placement.options import Decision
from edge_agent.shell.answers import Answers
from edge_agent.shell.imagined import imagined
from edge_agent.shell.jobs import Jobs
from edge_agent.shell.work_loop import WorkLoop

NEWEST = "last"
"""Instead of a request's id: the request that was placed last."""


class Verbs:
    """``node`` gives the one that decides now; ``disk``, whether that is kept, and what ails the disk."""

    def __init__(
        self, node: Callable[[], Node], work: WorkLoop, clock: Clock, host: Host, answers: Answers, jobs: Jobs,
        disk: Callable[[], dict[str, object]],
    ) -> None:  # fmt: skip
        self._deciding, self._work, self._clock = node, work, clock
        self._host, self._answers, self._jobs, self._disk = host, answers, jobs, disk

    @property
    def _node(self) -> Node:
        return self._deciding()

    async def handle(self, verb: str, body: object) -> object:
        """The answer to one call. Raises ``RefusedError``."""
        match verb, body:
            case "infer", bytes():
                result = await self._answers.submit(wire.decode_request(body, wire.LOCAL))
                return wire.encode_result(result, wire.LOCAL)
            case "explain", str():
                return self._explained(body)
            case "place", dict():
                return self._previewed(imagined(body))
            case "table", None:
                return table_report(self._node, self._clock.monotonic_us())
            case "status", int() | None:
                await self._work.until(lambda: self._node.online_boards >= (body or 1))
                return fleet_report(self._node, self._clock.monotonic_us()) | self._disk()
            case "trust", None:
                return trust_report(self._node, self._clock.monotonic_us())
            case "evidence", list():
                boards = list_of(body, "boards", str, MAX_BOARDS)
                return [list(each) for each in evidence_of(self._node, boards)]
            case "sessions", None:
                return [list(kept) for speaker in self._host.speakers.values() for kept in speaker.sessions()]
            case "drop", str():
                await self._drop(body)
                return None
        raise RefusedError("call", verb, "infer, explain, place, table, status, trust, evidence, talk, sessions or drop")

    def _explained(self, request_id: str) -> object:
        decisions = self._node.router.decisions
        if request_id == NEWEST:
            request_id = next(reversed(decisions), "")
            if not request_id:
                raise RefusedError("request last", "none was placed here yet", "the id of a request that was")
        decision = decisions.get(checked(REQUEST_ID, "request id", request_id))
        if decision is None:
            raise RefusedError(f"request {request_id}", "an id that is not remembered here", "one of the last requests")
        return self._told(decision)

    def _previewed(self, request: InferenceRequest) -> object:
        node, now_us = self._node, self._clock.monotonic_us()
        refused = f"{node.board} is being stopped" if node.draining else node.router.ingress.full(request)
        return self._told(node.router.preview(request, now_us)) | {"request": "", "refused": refused}

    def _told(self, decision: Decision) -> dict[str, object]:
        wanted = decision.wanted
        return decision_report(decision, shares_of(self._node.agreement.table, self._node.board, wanted) if wanted else None)

    async def _drop(self, session: str) -> None:
        if not any([await speaker.drop(session) for speaker in self._host.speakers.values()]):
            raise RefusedError("session", session, "one that is kept here", "see: sly sessions list")
        self._jobs.tell_kv()
