"""Where each request of this ingress board goes, and on to the next board when one fails.

Owns the way of a request from its admission to its one answer.  Rules: the placement decides over the views built here; a
board that failed a request is barred for that request, and so is a model that failed it here; whatever ends a request ends it
once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from edge_agent.core.values import InferenceRequest, InferenceResult, Status, failure
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.record import BoardRecord
from edge_agent.gossip.state import FleetState
from edge_agent.node.events import Effect, Log, Publish, Reply
from edge_agent.node.execution import Execution, Job
from edge_agent.node.ingress import Client, Ingress, LocalClient, Pending
from edge_agent.node.mailbox import Mailbox
from edge_agent.node.settings import NodeSettings
from edge_agent.node.voice import CLIENT_REPLY_EXPIRY_S, ENVELOPE_BYTES, Voice
from edge_agent.placement.options import BoardView, Decision, choose
from edge_agent.transport.link import MAX_PAYLOAD_BYTES

MAX_DECISIONS = 1024
MAX_REMEMBERED = 16_384
"""Options and exclusions in all remembered decisions together: a few MiB."""


class Router:
    def __init__(
        self,
        settings: NodeSettings,
        fleet: FleetState,
        execution: Execution,
        mailbox: Mailbox,
        voice: Voice,
        tickets: Iterator[int],
    ) -> None:
        self._settings, self._fleet, self._execution, self._mailbox, self._voice = settings, fleet, execution, mailbox, voice
        self._board = settings.board
        self.ingress = Ingress(settings.queue)
        self.decisions: OrderedDict[str, Decision] = OrderedDict()
        self.link_state = "not connected yet"
        self.headroom_mdegc: int | None = None
        self._remembered = 0
        self._tickets = tickets
        self._dispatched: dict[int, str] = {}
        self._silent: dict[str, tuple[int, int]] = {}
        """Boards that did not answer in time, each with the version of its last record then: a later one clears it."""

    def admit(self, request: InferenceRequest, client: Client, now_us: int, *, refusal: str = "") -> Iterator[Effect]:
        """Take a request in, or answer it at once with the reason why it is not taken."""
        pending = Pending(request, client, now_us + request.limits.deadline_us)
        if reason := refusal or self.ingress.full(request):
            yield from self._answer(pending, failure(request.request_id, Status.SHED, self._board, reason))
        else:
            self.ingress.add(pending)
            yield from self._place(pending, now_us)

    def abandon(self, handle: int) -> None:
        """The client behind ``handle`` has gone: what it asked for is not begun any more."""
        pending = self.ingress.remove_of_client(handle)
        if pending is not None:
            self._execution.forget(self._key(pending.request))

    def outcome(self, result: InferenceResult, board: str, now_us: int) -> Iterator[Effect]:
        """``board``, this one or another, has answered a request of this ingress."""
        pending = self.ingress.get(result.request_id)
        if pending is None:
            yield Log(f"late answer of {board} to request {result.request_id}: dropped, it was answered before")
        elif not pending.was_given_to(board):
            yield Log(f"answer of {board} to request {result.request_id}: dropped, that board was not asked")
        elif result.status in (Status.OK, Status.REFUSED):
            yield from self._resolve(pending, result)
        elif pending.placed_on == board:
            yield from self._leave(pending, result.reason, now_us)

    def lose_boards(self, reason: str, now_us: int, board: str = "") -> Iterator[Effect]:
        """``board`` is gone (or, when empty, every other board is out of sight): what is there goes elsewhere."""
        if not board:
            self._dispatched.clear()
        lost = self.ingress.placed_on(board) if board else self.ingress.placed_elsewhere(self._board)
        for pending in lost:
            yield from self._leave(pending, reason, now_us, may_answer=not board)

    def delivered(self, ticket: int) -> None:
        """The broker has the dispatched request of this ticket."""
        self._dispatched.pop(ticket, None)

    def undelivered(self, ticket: int, reason: str, now_us: int) -> Iterator[Effect]:
        """The link would not take the dispatched request of this ticket."""
        pending = self.ingress.get(self._dispatched.pop(ticket, ""))
        if pending is not None and pending.ticket == ticket:
            yield from self._leave(pending, reason, now_us)

    def expire(self, now_us: int) -> Iterator[Effect]:
        """Deadlines that passed, and boards that did not answer in time."""
        for pending in self.ingress.take_due(now_us):
            if pending.deadline_us <= now_us:
                where = f"while it was on {pending.placed_on}" if pending.placed_on else f"after {', '.join(pending.failed)}"
                yield from self._shed(pending, f"its deadline of {pending.request.limits.deadline_us} µs passed {where}")
            else:
                self._silent[pending.placed_on] = self._fleet.version(pending.placed_on)
                yield from self._leave(pending, "no answer came in time", now_us, may_answer=True)

    def _place(self, pending: Pending, now_us: int) -> Iterator[Effect]:
        request, budget_us = pending.request, max(1, pending.deadline_us - now_us)
        decision = choose(request, self._views(pending, now_us), self._settings.policy, budget_us)
        self._remember(decision)
        option = decision.chosen
        if option is None and pending.may_answer:
            self.ingress.wait(pending)
            return
        if option is None:
            yield from self._shed(pending, f"no board can serve it: {decision.why_shed()}")
            return
        local, model = option.board == self._board, option.offer.model
        self.ingress.place(pending, option, now_us, local=local)
        if local:
            self._execution.enqueue(Job(self._key(request), request, model, pending.deadline_us, self._board))
        else:
            pending.ticket = next(self._tickets)
            self._dispatched[pending.ticket] = request.request_id
            yield Publish(self._voice.dispatch(request.placed(model, budget_us), option.board), pending.ticket)

    def _remember(self, decision: Decision) -> None:
        """Keep a decision for who asks why; the oldest give way."""
        if earlier := self.decisions.pop(decision.request_id, None):
            self._remembered -= earlier.size
        self.decisions[decision.request_id] = decision
        self._remembered += decision.size
        while len(self.decisions) > MAX_DECISIONS or (self._remembered > MAX_REMEMBERED and len(self.decisions) > 1):
            self._remembered -= self.decisions.popitem(last=False)[1].size

    def _views(self, pending: Pending, now_us: int) -> Iterator[BoardView]:
        size_bytes = pending.request.size_bytes
        yield BoardView(
            self._board,
            tuple(self._execution.offers.values()),
            self._execution.queue_us(now_us),
            local=True,
            headroom_mdegc=self.headroom_mdegc,
            barred=self._execution.full(size_bytes),
            barred_models=pending.failed_models,
        )
        for record in self._fleet.records():
            since_heard_us = now_us - self._fleet.heard_us(record.board)
            yield BoardView(
                record.board,
                record.offers,
                max(record.queue_us - since_heard_us, self.ingress.outstanding_us(record.board)),
                headroom_mdegc=record.headroom_mdegc,
                barred=pending.failed.get(record.board) or self._unreachable(record, size_bytes),
            )

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

    def _leave(self, pending: Pending, reason: str, now_us: int, *, may_answer: bool = False) -> Iterator[Effect]:
        """The board that has this request cannot do it: the next option is tried."""
        yield Log(f"request {pending.request.request_id} leaves {pending.placed_on}: {reason}")
        if pending.placed_on == self._board:
            self.ingress.leave_model(pending, reason)
        else:
            self.ingress.leave(pending, reason, may_answer=may_answer)
        yield from self._place(pending, now_us)

    def _shed(self, pending: Pending, reason: str) -> Iterator[Effect]:
        yield from self._resolve(pending, failure(pending.request.request_id, Status.SHED, self._board, reason))

    def _resolve(self, pending: Pending, result: InferenceResult) -> Iterator[Effect]:
        self.ingress.remove(pending.request.request_id)
        self._execution.forget(self._key(pending.request))
        yield from self._answer(pending, result)

    def _answer(self, pending: Pending, result: InferenceResult) -> Iterator[Effect]:
        client = pending.client
        if isinstance(client, LocalClient):
            yield Reply(client.handle, result)
        else:
            yield from self._mailbox.answer(client.journal_key, client.client, result, CLIENT_REPLY_EXPIRY_S)

    def _key(self, request: InferenceRequest) -> str:
        return f"{self._board}/{request.request_id}"
