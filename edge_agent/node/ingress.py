"""The requests that came in at this board, until each has its one answer.

Owns the table of pending requests and where each is placed.  Rules: only this board places and re-places them; a request
is tried at most once on a board; the first answer wins and a later one is dropped; when the deadline passes, that is the
answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_agent.core.config import QueueSection
from edge_agent.core.values import InferenceRequest
from edge_agent.placement.options import Option

PATIENCE_US = 2_000_000
PATIENCE_FACTOR = 4
"""A remote board that has not answered after 2 s plus four times the predicted latency is tried no longer."""


@dataclass(frozen=True, slots=True)
class LocalClient:
    """A client on a socket of this board, or in its process."""

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
    predicted_us: int = 0
    retry_us: int = 0
    ticket: int = 0
    """Of the last dispatch: negative, so that it is never one of the ledger's."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why each board that was tried is tried no more."""

    def place(self, option: Option, now_us: int, *, local: bool) -> None:
        self.placed_on, self.predicted_us = option.board, option.offer.busy_us
        patience_us = PATIENCE_US + PATIENCE_FACTOR * option.cost.latency_us
        self.retry_us = self.deadline_us if local else min(self.deadline_us, now_us + patience_us)

    def fail(self, reason: str) -> None:
        self.failed[self.placed_on] = reason
        self.placed_on = ""


class Ingress:
    """The pending requests by request id, bounded in number and bytes."""

    def __init__(self, limits: QueueSection) -> None:
        self._limits = limits
        self._pending: dict[str, Pending] = {}
        self._bytes = 0

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
        size_bytes = request.size_bytes
        if self._bytes + size_bytes > self._limits.max_bytes:
            return f"{self._bytes} bytes of requests are pending and {size_bytes} came, the limit is {self._limits.max_bytes}"
        return ""

    def add(self, pending: Pending) -> None:
        self._pending[pending.request.request_id] = pending
        self._bytes += pending.request.size_bytes

    def remove(self, request_id: str) -> Pending | None:
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            self._bytes -= pending.request.size_bytes
        return pending

    def placed_on(self, board: str) -> list[Pending]:
        return [pending for pending in self._pending.values() if pending.placed_on == board]

    def placed_elsewhere(self, board: str) -> list[Pending]:
        return [pending for pending in self._pending.values() if pending.placed_on not in ("", board)]

    def of_client(self, handle: int) -> list[Pending]:
        return [p for p in self._pending.values() if isinstance(p.client, LocalClient) and p.client.handle == handle]

    def outstanding_us(self, board: str) -> int:
        """The modelled work that this board has sent to ``board`` and that is not answered yet."""
        return sum(pending.predicted_us for pending in self._pending.values() if pending.placed_on == board)

    def due(self, now_us: int) -> list[Pending]:
        """The requests whose deadline or patience has run out."""
        return [pending for pending in self._pending.values() if min(pending.deadline_us, pending.retry_us) <= now_us]

