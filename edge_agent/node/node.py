"""The agent's heart: every decision of a board, with no socket, no clock and no process in sight.

``handle(event, now_us) -> effects``.  Rules:

* The only things that change outside this object are the ledger (inside the caller's transaction) and what the effects ask.
* A message is acknowledged by the same list of effects that makes it durable or finds it worthless.
* Bad data from a peer is dropped with one line in the log; it never raises out of ``handle``.
* Only the ingress board places a request; nobody re-routes another's.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_agent.core import wire
from edge_agent.core.cose import verify1
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import InferenceResult, Status
from edge_agent.gossip.presence import Presence, Standing, open_presence
from edge_agent.gossip.record import BoardRecord, open_record
from edge_agent.gossip.state import FleetState
from edge_agent.node.announcer import Announcer
from edge_agent.node.events import (
    Abandoned,
    Acknowledge,
    Drain,
    Effect,
    Event,
    Executed,
    Hosted,
    Log,
    Publish,
    Sensed,
    Submitted,
    Subscribe,
    Tick,
    Withdrawn,
)
from edge_agent.node.execution import Execution, Job
from edge_agent.node.ingress import LocalClient, RemoteClient
from edge_agent.node.mailbox import Mailbox
from edge_agent.node.routing import CLIENT_REPLY_EXPIRY_S, Router
from edge_agent.node.settings import NodeSettings
from edge_agent.node.voice import Voice, failure, seconds
from edge_agent.store.ledger import Ledger
from edge_agent.transport.link import MAX_PAYLOAD_BYTES, Delivered, LinkDown, LinkUp, Message, Published, Rejected
from edge_agent.transport.topics import Kind

RESTARTED_REPLY_EXPIRY_S = 60


class Node:
    def __init__(self, settings: NodeSettings, ledger: Ledger) -> None:
        self.settings = settings
        self.board = settings.board
        self.fleet = FleetState()
        self.execution = Execution(settings.queue)
        self.draining = False
        self.sensed = Sensed(None, None)
        self._ledger = ledger
        self._mailbox = Mailbox(ledger)
        self._announcer = Announcer()
        self._voice = Voice(settings)
        self.router = Router(settings, self.fleet, self.execution, self._mailbox, self._voice)
        self._handlers = {
            Submitted: self._submitted, Abandoned: self._abandoned, Executed: self._executed, Hosted: self._hosted,
            Withdrawn: self._withdrawn, Sensed: self._sense, Tick: self._tick, Drain: self._drain, LinkUp: self._link_up,
            LinkDown: self._link_down, Delivered: self._delivered, Published: self._published,
            Rejected: self._rejected,
        }  # fmt: skip

    def handle(self, event: Event, now_us: int) -> list[Effect]:
        """One event in, the effects out, in the order in which they must be carried out."""
        return [*self._handlers[type(event)](event, now_us), *self._continue(now_us)]  # type: ignore[operator]

    def recover(self, now_us: int) -> list[Effect]:
        """After a boot: take up what was accepted and not answered.

        Deadlines count anew, since no clock outlived the cut.  What another board had sent here is answered as failed: its
        ingress board has placed it elsewhere by now, or will on hearing this.
        """
        effects: list[Effect] = []
        for key, envelope in self._ledger.unanswered(self.settings.queue.max_requests):
            origin, request_id = key.split("/", 1)
            if origin in self.settings.members:
                reason = f"{self.board} was restarted before it ran this request"
                self._owe(origin, key, failure(request_id, Status.FAILED, self.board, reason), RESTARTED_REPLY_EXPIRY_S)
            else:
                request = wire.decode_request(envelope, self.board)
                effects += self.router.admit(request, RemoteClient(origin, key), now_us)
        return [*effects, *self._continue(now_us)]

    @property
    def idle(self) -> bool:
        """Nothing pending and nothing running: a drained node may stop."""
        return self.execution.idle and not len(self.router.ingress)

    @property
    def link_up(self) -> bool:
        return not self.router.link_state

    @property
    def online_boards(self) -> int:
        """How many boards, this one included, are there as far as this one knows."""
        return 1 + sum(self.fleet.standing(record.board) is Standing.ONLINE for record in self.fleet.records())

    def will(self) -> Message:
        """What the broker shall say when this board vanishes."""
        return self._voice.presence(Standing.OFFLINE)

    def farewell(self) -> Message:
        """What this board says when it stops cleanly."""
        return self._voice.presence(Standing.STOPPED)

    def _continue(self, now_us: int) -> Iterator[Effect]:
        """What any event may have made possible: the next job, what is owed, a word about ourselves."""
        if begin := self.execution.start_next(now_us):
            yield begin
        if self.link_up:
            yield from self._mailbox.to_publish()
            for record in self._announcer.due(self._record, now_us):
                yield Publish(self._voice.record(record))

    # this board: its clients, its engine, its sensors, its time

    def _submitted(self, event: Submitted, now_us: int) -> Iterator[Effect]:
        yield from self.router.admit(event.request, LocalClient(event.handle), now_us, refusal=self._stopping())

    def _abandoned(self, event: Abandoned, now_us: int) -> Iterator[Effect]:
        self.router.abandon(event.handle)
        yield from ()

    def _executed(self, event: Executed, now_us: int) -> Iterator[Effect]:
        job = self.execution.finish(event.key, event.result, now_us)
        if job is None:
            yield Log(f"the engine answered {event.key}, which is not running: dropped")
        elif job.ingress == self.board:
            yield from self.router.outcome(event.result, self.board, now_us)
        else:
            self._owe(job.ingress, job.key, event.result, seconds(job.deadline_us - now_us))

    def _hosted(self, event: Hosted, now_us: int) -> Iterator[Effect]:
        self.execution.host(event.offer)
        yield Log(f"hosting {event.offer.model} for {event.offer.task}: about {event.offer.busy_us} µs an inference")

    def _withdrawn(self, event: Withdrawn, now_us: int) -> Iterator[Effect]:
        self.execution.withdraw(event.model, event.reason)
        yield Log(f"{event.model} is withdrawn: {event.reason}")

    def _sense(self, event: Sensed, now_us: int) -> Iterator[Effect]:
        self.sensed = event
        known = event.temperature_mdegc is not None and event.trip_mdegc is not None
        self.router.headroom_mdegc = event.trip_mdegc - event.temperature_mdegc if known else None  # type: ignore[operator]
        yield from ()

    def _tick(self, event: Tick, now_us: int) -> Iterator[Effect]:
        for job in self.execution.expired(now_us):
            if job.ingress != self.board:
                self.execution.forget(job.key)
                reason = f"its deadline passed while it waited on {self.board}"
                self._owe(job.ingress, job.key, failure(job.request.request_id, Status.FAILED, self.board, reason), 1)
        self._mailbox.retry()
        yield from self.router.expire(now_us)

    def _drain(self, event: Drain, now_us: int) -> Iterator[Effect]:
        self.draining = True
        yield Log(f"draining: {len(self.router.ingress)} requests pending")

    def _stopping(self) -> str:
        return f"{self.board} is being stopped" if self.draining else ""

    # the link

    def _link_up(self, event: LinkUp, now_us: int) -> Iterator[Effect]:
        self.router.link_state = ""
        self._mailbox.restart()
        self._announcer.force()
        topics = self._voice.topics
        yield Log("connected to the broker")
        yield Subscribe(topics.every(Kind.ONLINE))
        yield Subscribe(topics.every(Kind.RECORD))
        yield Subscribe(topics.replies_to(self.board))
        yield Subscribe(topics.request(self.board))
        yield Publish(self._voice.presence(Standing.ONLINE))

    def _link_down(self, event: LinkDown, now_us: int) -> Iterator[Effect]:
        if self.link_up:
            yield Log(f"lost the broker: {event.reason}; going on alone")
        self.router.link_state = event.reason or "no reason given"
        yield from self.router.lose_boards(f"the broker link went down ({event.reason})", now_us)

    def _published(self, event: Published, now_us: int) -> Iterator[Effect]:
        self._mailbox.confirmed(event.ticket)
        self.router.delivered(event.ticket)
        yield from ()

    def _rejected(self, event: Rejected, now_us: int) -> Iterator[Effect]:
        yield Log(f"not sent{' (subscription ' + event.topic_filter + ')' if event.topic_filter else ''}: {event.reason}")
        self._mailbox.rejected(event.ticket)
        yield from self.router.undelivered(event.ticket, event.reason, now_us)

    def _delivered(self, event: Delivered, now_us: int) -> Iterator[Effect]:
        message = event.message
        try:
            topic = self._voice.topics.parse(message.topic)
            match topic.kind:
                case Kind.ONLINE:
                    yield from self._hear_presence(open_presence(message.payload, self._key_of), topic.board, now_us)
                case Kind.RECORD:
                    self._hear_record(open_record(message.payload, self._key_of), topic.board, now_us)
                case Kind.REPLY:
                    yield from self._hear_reply(message, topic.board, now_us)
                case Kind.REQUEST:
                    hear = self._hear_dispatch if wire.is_signed(message.payload) else self._hear_client
                    yield from hear(message, now_us)
        except RefusedError as error:
            yield Log(f"refused a message on {message.topic}: {error}")
        yield Acknowledge(event.token)

    def _hear_presence(self, presence: Presence, board: str, now_us: int) -> Iterator[Effect]:
        _must_agree("presence", presence.board, board)
        if board == self.board or not self.fleet.join_presence(presence):
            return
        yield Log(f"{board} is {presence.standing.value}")
        if presence.standing is not Standing.ONLINE:
            yield from self.router.lose_boards(f"{board} is {presence.standing.value}", now_us, board)

    def _hear_record(self, record: BoardRecord, board: str, now_us: int) -> None:
        _must_agree("record", record.board, board)
        if board != self.board:
            self.fleet.join(record, now_us)

    def _hear_reply(self, message: Message, board: str, now_us: int) -> Iterator[Effect]:
        signed = verify1(message.payload, self._key_of, wire.AAD_RESULT, max_bytes=MAX_PAYLOAD_BYTES)
        result = wire.decode_result(signed.payload, self.board)
        _must_agree("reply", result.board, board)
        _must_agree("reply's signer", signed.kid.decode("utf-8", "replace"), board)
        yield from self.router.outcome(result, board, now_us)

    def _hear_dispatch(self, message: Message, now_us: int) -> Iterator[Effect]:
        signed = verify1(message.payload, self._key_of, wire.AAD_REQUEST, max_bytes=MAX_PAYLOAD_BYTES)
        ingress = signed.kid.decode("utf-8", "replace")
        request = wire.decode_request(signed.payload, self.board)
        key = f"{ingress}/{request.request_id}"
        if not self._ledger.accept(key, b""):
            yield from self._say_again(key, ingress)
            return
        job = Job(key, request, request.model or "", now_us + request.limits.deadline_us, ingress)
        if reason := self._stopping() or self._not_hosted(job.model) or self.execution.full(job.size_bytes):
            self._owe(ingress, key, failure(request.request_id, Status.FAILED, self.board, reason), RESTARTED_REPLY_EXPIRY_S)
        else:
            self.execution.enqueue(job)

    def _hear_client(self, message: Message, now_us: int) -> Iterator[Effect]:
        reply = self._voice.topics.parse(message.response_topic or "")
        if reply.kind is not Kind.REPLY or reply.board != self.board or reply.client in self.settings.members:
            allowed = f"{self._voice.topics.reply(self.board, 'CLIENT')}, CLIENT being no board's name"
            raise RefusedError("response topic", message.response_topic, allowed)
        request_id = (message.correlation or b"").hex()
        key = f"{reply.client}/{request_id}"
        try:
            request = wire.decode_request(message.payload, self.board)
            _must_agree("correlation data", request.request_id, request_id)
        except RefusedError as error:
            if len(request_id) == 2 * wire.REQUEST_ID_BYTES and self._ledger.accept(key, b""):
                refused = failure(request_id, Status.REFUSED, self.board, str(error))
                self._owe(reply.client, key, refused, CLIENT_REPLY_EXPIRY_S)
            raise
        if self._ledger.accept(key, message.payload):
            yield from self.router.admit(request, RemoteClient(reply.client, key), now_us, refusal=self._stopping())
        else:
            yield from self._say_again(key, reply.client)

    def _say_again(self, key: str, addressee: str) -> Iterator[Effect]:
        """A request that came twice: its answer again if there is one, else it is being worked on."""
        if answer := self._ledger.answer_of(key):
            correlation = bytes.fromhex(key.split("/", 1)[1])
            yield Publish(Message(self._voice.topics.reply(self.board, addressee), answer, correlation=correlation))

    def _not_hosted(self, model: str) -> str:
        if model in self.execution.offers:
            return ""
        return self.execution.withdrawn.get(model) or f"{self.board} does not host {model!r}"

    def _owe(self, addressee: str, key: str, result: InferenceResult, expiry_s: int) -> None:
        self._mailbox.answer(key, self._voice.answer(result, addressee, key, expiry_s))

    def _record(self, sequence: int, now_us: int) -> BoardRecord:
        return BoardRecord(
            board=self.board,
            boot_epoch=self.settings.boot_epoch,
            sequence=sequence,
            hardware=self.settings.hardware,
            emulated=self.settings.emulated,
            serving=not self.draining,
            queue_us=self.execution.queue_us(now_us),
            temperature_mdegc=self.sensed.temperature_mdegc,
            trip_mdegc=self.sensed.trip_mdegc,
            offers=tuple(self.execution.offers[name] for name in sorted(self.execution.offers)),
        )

    def _key_of(self, kid: bytes) -> bytes | None:
        return self.settings.members.get(kid.decode("utf-8", "replace"))


def _must_agree(subject: str, inside: str, outside: str) -> None:
    if inside != outside:
        raise RefusedError(subject, f"{inside!r} inside, {outside!r} outside", "one and the same")
