"""Where each request of this ingress board goes, and on to the next board when one fails.

Owns the way of a request from its admission to its one answer.  Rules: the placement decides over the views built here; a
board that failed a request is barred for that request, and so is a model that failed it here; whatever ends a request ends it
once.  A board that is lost in the middle of an answer is followed by one that goes on after what the client has seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from edge_agent.core.chat import CHAT
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import AnswerPart, InferenceRequest, InferenceResult, Status, TrustTier, failure
from edge_agent.core.wanted import Wanted
from edge_agent.gossip.state import FleetState
from edge_agent.node.agreement import Agreement
from edge_agent.node.arrivals import Arrivals
from edge_agent.node.bookings import Bookings
from edge_agent.node.events import Cancel, Effect, Log, Publish, Reply, ReplyPart
from edge_agent.node.execution import Execution
from edge_agent.node.ingress import Client, Ingress, LocalClient, Pending, RemoteClient
from edge_agent.node.lanes import Job
from edge_agent.node.mailbox import Mailbox
from edge_agent.node.settings import NodeSettings
from edge_agent.node.streams import Assembly, PartStreams, all_shown, counted, end_of, end_tensor, taken_up, turn_of
from edge_agent.node.trust import Trust
from edge_agent.node.views import Views
from edge_agent.node.voice import CLIENT_REPLY_EXPIRY_S, Voice
from edge_agent.placement.admission import TooLate
from edge_agent.placement.options import BoardView, Decision, Rules

PART_TICKET = -(2**62)
"""Of every part: one that is not taken is lost, and nothing follows."""
MAX_DECISIONS = 1024
MAX_REMEMBERED = 16_384
"""Options and exclusions in all remembered decisions together: a few MiB."""


Chooser = Callable[[InferenceRequest, Sequence[BoardView], Rules, int], Decision]
"""What decides: ``placement.choose``, or what a simulation sets beside it."""


class Router:
    def __init__(
        self,
        settings: NodeSettings,
        fleet: FleetState,
        execution: Execution,
        mailbox: Mailbox,
        voice: Voice,
        tickets: Iterator[int],
        choose: Chooser,
        arrivals: Arrivals,
        agreement: Agreement,
        trust: Trust,
    ) -> None:
        self._settings, self._fleet, self._execution, self._mailbox, self._voice = settings, fleet, execution, mailbox, voice
        self._board, self._choose, self._arrivals, self._trust = settings.board, choose, arrivals, trust
        bookings = Bookings(settings.rules.policy.horizon_us)
        self.ingress = Ingress(settings.queue, bookings)
        self._too_late = TooLate()
        self.views = Views(settings, fleet, execution, agreement, bookings, trust)
        self.streams = PartStreams()
        self.decisions: OrderedDict[str, Decision] = OrderedDict()
        self._remembered = 0
        self._tickets = tickets
        self._dispatched: dict[int, str] = {}
        self._broken_off: OrderedDict[tuple[str, str], None] = OrderedDict()
        """By request and board: what was told to end, so that its end is no news."""

    def admit(self, request: InferenceRequest, client: Client, now_us: int, *, refusal: str = "") -> Iterator[Effect]:
        """Take a request in, or answer it at once with the reason why it is not taken."""
        pending = Pending(request, client, now_us + request.limits.deadline_us)
        if reason := refusal or self.ingress.full(request):
            yield from self._answer(pending, failure(request.request_id, Status.SHED, self._board, reason))
        else:
            self._arrivals.count(Wanted.of(request), now_us)
            self.ingress.add(pending)
            yield from self._place(pending, now_us)

    def preview(self, request: InferenceRequest, now_us: int) -> Decision:
        """What would be decided about ``request`` if it came in now; nothing is taken in, counted or remembered."""
        pending = Pending(request, LocalClient(0), now_us + request.limits.deadline_us)
        return self._choose(request, list(self.views.of(pending, now_us)), self._settings.rules, request.limits.deadline_us)

    def abandon(self, handle: int) -> Iterator[Effect]:
        """The client behind ``handle`` has gone: what it asked for is not begun any more, and talk is broken off."""
        placed_on = self.ingress.placed_for_client(handle)
        pending = self.ingress.remove_of_client(handle)
        if pending is not None:
            self._execution.forget(self._key(pending.request))
            yield from self._break_off(pending, [*pending.unheard, placed_on])

    def partial(self, part: AnswerPart, board: str, now_us: int) -> Iterator[Effect]:
        """``board``, this one or another, has made a part of an answer; only the one that has the request is listened to."""
        pending = self.ingress.get(part.request_id)
        if pending is None or pending.placed_on != board or pending.request.task != CHAT:
            return
        self.ingress.heard(pending, now_us)
        if pending.shown is None:
            pending.shown = Assembly(turn_of(pending.request).begun)
        for fresh in pending.shown.take(part):
            pending.shown_by.add(board)
            yield from self._show(pending.client, fresh, now_us)

    def _show(self, client: Client, part: AnswerPart, now_us: int) -> Iterator[Effect]:
        if isinstance(client, LocalClient):
            yield ReplyPart(client.handle, part)
        else:
            yield from self.send_part(client.journal_key, client.client, part, now_us)

    def send_part(self, key: str, addressee: str, part: AnswerPart, now_us: int) -> Iterator[Effect]:
        """A part for a board or a client behind the broker, gathered with what follows soon; lost while there is no link."""
        for to, gathered in self.streams.add(key, addressee, part, now_us):
            yield from self._publish_part(to, gathered)

    def flush_parts(self, now_us: int) -> Iterator[Effect]:
        for to, gathered in self.streams.flush(now_us):
            yield from self._publish_part(to, gathered)

    def _publish_part(self, addressee: str, part: AnswerPart) -> Iterator[Effect]:
        if not self.views.link_state:
            yield Publish(self._voice.part(part, addressee), PART_TICKET)

    def outcome(self, result: InferenceResult, board: str, now_us: int) -> Iterator[Effect]:
        """``board``, this one or another, has answered a request of this ingress."""
        pending = self.ingress.get(result.request_id)
        told_to_end = self._broken_off.pop((result.request_id, board), ...) is None
        if pending is None and told_to_end:
            yield from ()
        elif pending is None:
            yield Log(f"late answer of {board} to request {result.request_id}: dropped, it was answered before")
        elif not pending.was_given_to(board):
            yield Log(f"answer of {board} to request {result.request_id}: dropped, that board was not asked")
        elif self._trust.tier(board) is TrustTier.CONTRAINDICATED:
            yield Log(f"answer of {board} to request {result.request_id}: dropped, its appraisal is contraindicated")
        elif reason := self._trust.why_unproven(board, pending.given.get(board), result):
            yield from self._unproven(pending, board, reason, now_us)
        elif result.status is Status.OK and pending.placed_on != board and not _continues(pending, result):
            yield Log(f"late answer of {board} to request {result.request_id}: dropped, the client has seen another's beginning")
        elif result.status in (Status.OK, Status.REFUSED):
            base_tokens = pending.begun_tokens.get(board, 0)
            yield from self._resolve(pending, counted(result, base_tokens, pending.request))
            self._trust.taken(board, pending.given.get(board), result)
        elif pending.placed_on == board:
            yield from self._leave(pending, result.reason, now_us)

    def lose_boards(self, reason: str, now_us: int, board: str = "") -> Iterator[Effect]:
        """``board`` is gone (or, when empty, every other board is out of sight): what is there goes elsewhere."""
        if not board:
            self._dispatched.clear()
        lost = self.ingress.placed_on(board) if board else self.ingress.placed_elsewhere(self._board)
        for pending in lost:
            pending.unheard.append(pending.placed_on)
            yield from self._leave(pending, reason, now_us, may_answer=not board)

    def distrust(self, board: str, reason: str, now_us: int) -> Iterator[Effect]:
        """``board``, this one or another, is contraindicated: what it has goes elsewhere; what it has begun is given up."""
        for pending in self.ingress.shown_by(board):
            if pending.placed_on == self._board:
                yield from self._break_off(pending, [self._board])
            yield from self._shed(pending, f"{board} has made the beginning of the answer: {reason}")
        for pending in self.ingress.placed_on(board):
            if board == self._board:
                self._execution.forget(self._key(pending.request))
                yield from self._break_off(pending, [board])
            else:
                pending.unheard.append(board)
            yield from self._leave(pending, reason, now_us)

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
                self.views.fell_silent(pending.placed_on)
                pending.unheard.append(pending.placed_on)
                yield from self._leave(pending, "no answer came in time", now_us, may_answer=True)

    def _place(self, pending: Pending, now_us: int) -> Iterator[Effect]:
        if pending.shown is not None and (end := all_shown(pending.request, pending.shown)):
            result = InferenceResult(pending.request.request_id, Status.OK, self._board, pending.model, outputs=end_tensor(end))
            yield from self._resolve(pending, result)
            return
        budget_us = max(1, pending.deadline_us - now_us)
        try:
            request = self._as_it_stands(pending)
        except RefusedError as error:
            yield from self._shed(pending, f"no other board can go on with it: {error}")
            return
        decision = self._choose(request, list(self.views.of(pending, now_us)), self._settings.rules, budget_us)
        self._remember(decision)
        option = decision.chosen
        if option is None and pending.may_answer:
            self.ingress.wait(pending)
            return
        if option is None:
            yield from self._shed(pending, f"no board can serve it: {decision.why_shed()}")
            return
        if self._settings.queue.shed_late and (reason := self._too_late.why(decision, budget_us)):
            yield from self._shed(pending, reason)
            return
        local, model = option.board == self._board, option.offer.model
        self.ingress.place(pending, option, now_us, local=local)
        pending.begun_tokens[option.board] = pending.shown.base_tokens if pending.shown else 0
        pending.given[option.board] = request
        if local:
            self._execution.enqueue(Job(self._key(request), request, model, pending.deadline_us, self._board))
        else:
            pending.ticket = next(self._tickets)
            self._dispatched[pending.ticket] = request.request_id
            yield Publish(self._voice.dispatch(request.placed(model, budget_us), option.board), pending.ticket)
        if request.task == CHAT:
            yield from self._break_off(pending, pending.unheard)

    def _as_it_stands(self, pending: Pending) -> InferenceRequest:
        """The request, to be gone on with after what its client has seen of the answer."""
        if pending.shown is None:
            return pending.request
        pending.shown.handed_over()
        return taken_up(pending.request, pending.shown)

    def _remember(self, decision: Decision) -> None:
        """Keep a decision for who asks why; the oldest give way."""
        if earlier := self.decisions.pop(decision.request_id, None):
            self._remembered -= earlier.size
        self.decisions[decision.request_id] = decision
        self._remembered += decision.size
        while len(self.decisions) > MAX_DECISIONS or (self._remembered > MAX_REMEMBERED and len(self.decisions) > 1):
            self._remembered -= self.decisions.popitem(last=False)[1].size

    def _leave(self, pending: Pending, reason: str, now_us: int, *, may_answer: bool = False) -> Iterator[Effect]:
        """The board that has this request cannot do it: the next option is tried."""
        yield Log(f"request {pending.request.request_id} leaves {pending.placed_on}: {reason}")
        if pending.placed_on == self._board:
            self.ingress.leave_model(pending, reason)
        else:
            self.ingress.leave(pending, reason, may_answer=may_answer)
        yield from self._place(pending, now_us)

    def _unproven(self, pending: Pending, board: str, reason: str, now_us: int) -> Iterator[Effect]:
        """An answer without a receipt that fits is none; neither is what it was begun with."""
        yield Log(f"answer of {board} to request {pending.request.request_id}: not taken, {reason}")
        if board in pending.shown_by:
            yield from self._shed(pending, f"{board} has made an answer that it does not prove: {reason}")
        elif pending.placed_on == board:
            yield from self._leave(pending, reason, now_us)

    def _shed(self, pending: Pending, reason: str) -> Iterator[Effect]:
        yield from self._resolve(pending, failure(pending.request.request_id, Status.SHED, self._board, reason))

    def _resolve(self, pending: Pending, result: InferenceResult) -> Iterator[Effect]:
        placed_on = pending.placed_on
        self.ingress.remove(pending.request.request_id)
        self._execution.forget(self._key(pending.request))
        if isinstance(pending.client, RemoteClient):
            self.streams.end(pending.client.journal_key)
        yield from self._answer(pending, result)
        yield from self._break_off(pending, [each for each in (*pending.unheard, placed_on) if each != result.board])

    def _break_off(self, pending: Pending, boards: Sequence[str]) -> Iterator[Effect]:
        """Nobody waits for what ``boards`` make of a turn: they are told, so that they have room for the next one."""
        if pending.request.task != CHAT:
            return
        for board in boards:
            if board == self._board and self._execution.running_job(self._key(pending.request)) is not None:
                self._tell_to_end(pending, board)
                yield Cancel(self._key(pending.request))
            elif board not in ("", self._board) and not self.views.link_state:
                self._tell_to_end(pending, board)
                yield Publish(self._voice.cancel(pending.request.request_id, board), next(self._tickets))
        if not self.views.link_state:
            pending.unheard, pending.may_answer = [], False

    def _tell_to_end(self, pending: Pending, board: str) -> None:
        self._broken_off[pending.request.request_id, board] = None
        if len(self._broken_off) > MAX_DECISIONS:
            self._broken_off.popitem(last=False)

    def _answer(self, pending: Pending, result: InferenceResult) -> Iterator[Effect]:
        client = pending.client
        if isinstance(client, LocalClient):
            yield Reply(client.handle, result)
        else:
            yield from self._mailbox.answer(client.journal_key, client.client, result, CLIENT_REPLY_EXPIRY_S)

    def _key(self, request: InferenceRequest) -> str:
        return f"{self._board}/{request.request_id}"


def _continues(pending: Pending, result: InferenceResult) -> bool:
    """Does the answer of a board that was given up begin with what the client has seen since?"""
    return pending.shown is None or pending.shown.rest(end_of(result).text) is not None
