"""The requests that came in at this board, until each has its one answer.

Owns the table of pending requests and where each is placed.  Rules: only this board places and re-places them; a request
is tried at most once on another board, and here once with each model; the first answer wins and a later one is dropped; when
the deadline passes, that is the answer.  Whatever is asked at every event is kept up to date, not summed up anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edge_agent.core.config import QueueSection
from edge_agent.core.values import InferenceRequest
from edge_agent.node.bookings import Bookings
from edge_agent.node.deadlines import Deadlines
from edge_agent.node.lanes import lane_of
from edge_agent.node.streams import Assembly
from edge_agent.placement.options import Option

PATIENCE_US = 2_000_000
PATIENCE_FACTOR = 4
"""A remote board from which nothing has come for 2 s plus four times the predicted latency is tried no longer."""


@dataclass(frozen=True, slots=True)
class LocalClient:
    """A client on a socket of this board, or in its process; ``handle`` is of this one request."""

    handle: int


@dataclass(frozen=True, slots=True)
class RemoteClient:
    """A client behind the broker: its request is in the ledger under ``journal_key``, its answer goes to its reply topic."""

    client: str
    journal_key: str


Client = LocalClient | RemoteClient


@dataclass(slots=True)
class Pending:
    request: InferenceRequest
    client: Client
    deadline_us: int
    placed_on: str = ""
    ticket: int = 0
    """Of the last dispatch: negative, so that it is never one of the ledger's."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why each board that was tried is tried no more."""
    model: str = ""
    failed_models: dict[str, str] = field(default_factory=dict)
    """Why each model that was tried here is tried no more."""

    may_answer: bool = False
    """One of those fell silent, or was lost from sight, and may answer yet."""
    unheard: list[str] = field(default_factory=list)
    """Boards that were given up and may be at work on it: they are to be told that nobody waits."""
    patience_us: int = 0
    """How long the remote board that has it may say nothing."""
    shown: Assembly | None = None
    """What the client has seen of the answer, if it comes in parts."""
    begun_tokens: dict[str, int] = field(default_factory=dict)
    """How many tokens of the answer were made before each board went on with it."""
    given: dict[str, InferenceRequest] = field(default_factory=dict)
    """The request as each board was given it: a turn that is gone on with has other inputs."""
    shown_by: set[str] = field(default_factory=set)
    """Whose text the client has seen."""

    @property
    def lane(self) -> str:
        return lane_of(self.request.task, self.model)

    def was_given_to(self, board: str) -> bool:
        return board == self.placed_on or board in self.failed


class Ingress:
    """The pending requests by request id, bounded in number and bytes."""

    def __init__(self, limits: QueueSection, bookings: Bookings) -> None:
        self._limits, self._bookings = limits, bookings
        self._pending: dict[str, Pending] = {}
        self._handles: dict[int, str] = {}
        self._deadlines = Deadlines()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._pending)

    def get(self, request_id: str) -> Pending | None:
        return self._pending.get(request_id)

    def full(self, request: InferenceRequest) -> str:
        """Why this request cannot be taken in; empty if it can."""
        if request.request_id in self._pending:
            return f"request {request.request_id} is being served already"
        if len(self._pending) >= self._limits.max_requests:
            return f"{len(self._pending)} requests are pending, the limit is {self._limits.max_requests}"
        came_bytes = request.size_bytes
        if self.size_bytes + came_bytes > self._limits.max_bytes:
            return f"{self.size_bytes} bytes of requests are pending and {came_bytes} came, the limit is {self._limits.max_bytes}"
        return ""

    def add(self, pending: Pending) -> None:
        """Take a request in. Ask ``full`` first."""
        request_id = pending.request.request_id
        self._pending[request_id] = pending
        self.size_bytes += pending.request.size_bytes
        self._deadlines.set(request_id, pending.deadline_us)
        if isinstance(pending.client, LocalClient):
            self._handles[pending.client.handle] = request_id

    def remove(self, request_id: str) -> Pending | None:
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            self.size_bytes -= pending.request.size_bytes
            self._deadlines.discard(request_id)
            self._unplace(pending)
            if isinstance(pending.client, LocalClient):
                self._handles.pop(pending.client.handle, None)
        return pending

    def remove_of_client(self, handle: int) -> Pending | None:
        return self.remove(self._handles.get(handle, ""))

    def placed_for_client(self, handle: int) -> str:
        """The board that has the request of this client; empty if none has."""
        pending = self._pending.get(self._handles.get(handle, ""))
        return pending.placed_on if pending else ""

    def place(self, pending: Pending, option: Option, now_us: int, *, local: bool) -> None:
        """The request goes to ``option.board``, and is looked at again when that board's time is up."""
        pending.placed_on, pending.model = option.board, option.offer.model
        lane = (option.board, pending.lane)
        cost = replace(option.cost, work_us=0) if option.offer.cloud else option.cost
        self._bookings.give(pending.request.request_id, lane, cost, pending.deadline_us, now_us)
        pending.patience_us = 0 if local else PATIENCE_US + PATIENCE_FACTOR * option.cost.latency_us
        self.heard(pending, now_us)

    def heard(self, pending: Pending, now_us: int) -> None:
        """The board that has the request was given it now, or has sent a part of its answer: its patience begins anew."""
        patient_us = now_us + pending.patience_us if pending.patience_us else pending.deadline_us
        self._deadlines.set(pending.request.request_id, min(pending.deadline_us, patient_us))

    def leave(self, pending: Pending, reason: str, *, may_answer: bool) -> None:
        """The board that has the request is tried no more, and why; the request must be placed anew, wait, or be removed."""
        pending.failed[pending.placed_on] = reason
        pending.may_answer |= may_answer
        self._unplace(pending)

    def wait(self, pending: Pending) -> None:
        """There is nothing to be done for the request but to wait for a late answer."""
        self._deadlines.set(pending.request.request_id, pending.deadline_us)

    def leave_model(self, pending: Pending, reason: str) -> None:
        """The model that this board ran the request on is tried no more, and why."""
        pending.failed_models[pending.model] = reason
        self._unplace(pending)

    def placed_on(self, board: str) -> list[Pending]:
        return [pending for pending in self._pending.values() if pending.placed_on == board]

    def shown_by(self, board: str) -> list[Pending]:
        return [pending for pending in self._pending.values() if board in pending.shown_by]

    def placed_elsewhere(self, board: str) -> list[Pending]:
        return [pending for pending in self._pending.values() if pending.placed_on not in ("", board)]

    def take_due(self, now_us: int) -> list[Pending]:
        """The requests whose deadline or patience has run out: each must now be placed anew, wait, or be removed."""
        return [self._pending[request_id] for request_id in self._deadlines.take_due(now_us)]

    def _unplace(self, pending: Pending) -> None:
        if pending.placed_on:
            self._bookings.take_back(pending.request.request_id, (pending.placed_on, pending.lane))
            pending.placed_on = ""
