"""The boards as this one sees them at the moment of a decision: what they said, what was sent there since, what the table books.

Rules: a board that must not be used says why; a record is aged by the time since it came in; the wait that a view tells is that
of the very request that is decided, which under the earliest deadline first is only what is more urgent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edge_agent.core.chat import CHAT
from edge_agent.core.kv import KvState
from edge_agent.core.values import ModelOffer
from edge_agent.core.waits import wait_us
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.record import BoardRecord
from edge_agent.gossip.state import FleetState
from edge_agent.node.agreement import Agreement
from edge_agent.node.bookings import Ahead, Bookings
from edge_agent.node.execution import Execution
from edge_agent.node.ingress import Pending
from edge_agent.node.settings import NodeSettings
from edge_agent.node.trust import Trust
from edge_agent.node.voice import ENVELOPE_BYTES
from edge_agent.placement.options import BoardView
from edge_agent.transport.link import MAX_PAYLOAD_BYTES


class Views:
    """``link_state`` is why there is no link, empty when there is; ``headroom_mdegc`` this board's own."""

    def __init__(
        self,
        settings: NodeSettings,
        fleet: FleetState,
        execution: Execution,
        agreement: Agreement,
        bookings: Bookings,
        trust: Trust,
    ) -> None:
        self._settings, self._fleet, self._execution, self._trust = settings, fleet, execution, trust
        self._agreement, self._bookings = agreement, bookings
        self._board = settings.board
        self.link_state = "not connected yet"
        self.headroom_mdegc: int | None = None
        self._silent: dict[str, tuple[int, int]] = {}
        """Boards that did not answer in time, each with the version of its last record then: a later one clears it."""

    def fell_silent(self, board: str) -> None:
        """It did not answer in time: it is left out until it speaks again."""
        self._silent[board] = self._fleet.version(board)

    def of(self, pending: Pending, now_us: int) -> Iterator[BoardView]:
        """Every board that is known, this one first, for the decision on ``pending``."""
        request, slack_us = pending.request, max(1, pending.deadline_us - now_us)
        offers = self._execution.offers.values()
        yield BoardView(
            self._board,
            tuple(offer for offer in offers if not offer.cloud),
            self._execution.queue_us(now_us, due_us=pending.deadline_us),
            local=True,
            headroom_mdegc=self.headroom_mdegc,
            barred=self._execution.full(request.size_bytes, self._board),
            barred_models=pending.failed_models,
            kv={state.model: self._own_kv(state, pending, now_us) for state in self._execution.kv_states(now_us)},
            trust=self._trust.tier(self._board),
            distrust=self._trust.why(self._board),
            booked_us=self._booked_us(self._board, now_us),
        )
        if request.task == CHAT:
            yield from self._clouds([offer for offer in offers if offer.cloud], pending, now_us)
        for record in self._fleet.records():
            queue_us = wait_us(record.queue_us, record.waits_us, slack_us)
            yield BoardView(
                record.board,
                record.offers,
                self._wait_us(record, "", queue_us, pending, now_us),
                headroom_mdegc=record.headroom_mdegc,
                barred=pending.failed.get(record.board) or self._unreachable(record, request.size_bytes),
                kv={state.model: self._kv(record, state, pending, now_us) for state in record.kv},
                trust=self._trust.tier(record.board),
                distrust=self._trust.why(record.board),
                booked_us=self._booked_us(record.board, now_us),
            )

    def _clouds(self, offers: list[ModelOffer], pending: Pending, now_us: int) -> Iterator[BoardView]:
        """What runs elsewhere on behalf of this board: it takes nothing of the board's time, and its heat is nothing to it."""
        for offer in offers:
            wait = self._execution.queue_us(now_us, offer.model, pending.deadline_us)
            barred = self._execution.full(pending.request.size_bytes, self._board)
            yield BoardView(self._board, (offer,), wait, local=True, barred=barred, barred_models=pending.failed_models)

    def _booked_us(self, board: str, now_us: int) -> int:
        """What the table books ``board`` for, and how much more, or less, this board has sent there than is its part of that."""
        table = self._agreement.table
        beyond_us = self._bookings.recent_us(board, now_us) - table.planned_us(self._board, board)
        return max(0, table.booked_us(board) + beyond_us)

    def _own_kv(self, state: KvState, pending: Pending, now_us: int) -> KvState:
        return replace(state, queue_us=self._execution.queue_us(now_us, state.model, pending.deadline_us), waits_us=())

    def _kv(self, record: BoardRecord, state: KvState, pending: Pending, now_us: int) -> KvState:
        """A board's word on its language model, with what this request would wait there, and what talks beside it."""
        queue_us = wait_us(state.queue_us, state.waits_us, pending.deadline_us - now_us)
        parallel = next((offer.parallel for offer in record.offers if offer.model == state.model), 1)
        fresh = self._ahead(record, state.model, pending).fresh_jobs
        return replace(
            state,
            queue_us=self._wait_us(record, state.model, queue_us, pending, now_us),
            waits_us=(),
            running=min(state.running + fresh, parallel),
        )

    def _wait_us(self, record: BoardRecord, lane: str, said_us: int, pending: Pending, now_us: int) -> int:
        """``said_us`` was the wait when the record came in: now less by the time since, more by what was sent there.

        What is unanswered is a floor under it, whatever the board says: what a board that lies about its load can draw to itself
        is bounded by that.
        """
        parallel = next((offer.parallel for offer in record.offers if offer.model == lane), 1) if lane else 1
        ahead = self._ahead(record, lane, pending)
        if not said_us and ahead.jobs < parallel:
            return 0
        aged_us = max(0, said_us - (now_us - self._fleet.heard_us(record.board))) + (ahead.fresh_us if said_us else 0)
        waiting = max(0, ahead.jobs - parallel + 1)
        return max(aged_us, ahead.unanswered_us * waiting // max(1, ahead.jobs))

    def _ahead(self, record: BoardRecord, lane: str, pending: Pending) -> Ahead:
        """This board's own work there that is due before ``pending``; what it sent just before the record came is not in that."""
        since_us = self._fleet.heard_us(record.board) - 2 * self._settings.rules.policy.link_latency_us
        return self._bookings.ahead((record.board, lane), pending.deadline_us, since_us)

    def _unreachable(self, record: BoardRecord, size_bytes: int) -> str:
        if self.link_state:
            return f"the broker link is down ({self.link_state})"
        if (standing := self._fleet.standing(record.board)) is not Standing.ONLINE:
            return f"it is {standing.value}"
        if self._silent.get(record.board) == record.version:
            return "it did not answer in time, and has said nothing since"
        if not record.serving:
            return "it is being stopped and takes nothing new"
        if size_bytes + ENVELOPE_BYTES > MAX_PAYLOAD_BYTES:
            return f"{size_bytes} bytes do not fit into one message of at most {MAX_PAYLOAD_BYTES} bytes"
        return ""
