"""What comes in from the broker: heard, checked, and either taken in durably or refused.

Owns the reading of presence, records, replies and requests.  Rules: bad data from outside is dropped with one line in the
log, changes nothing and is acknowledged; a good message is acknowledged by the same list of effects that makes it durable, or
when the broker has the answer to it; a request is accepted once, and only its answer is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_agent.core import wire
from edge_agent.core.chat import CHAT
from edge_agent.core.cose import verify1
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import InferenceRequest, InferenceResult, Status, TrustTier, failure
from edge_agent.gossip.agreement import BoardDigest, open_digest
from edge_agent.gossip.presence import Presence, Standing, is_presence, open_presence
from edge_agent.gossip.record import BoardRecord, open_record
from edge_agent.gossip.state import FleetState
from edge_agent.node.agreement import Agreement
from edge_agent.node.announcer import Announcer
from edge_agent.node.events import Acknowledge, Cancel, Effect, Log
from edge_agent.node.execution import Execution
from edge_agent.node.ingress import RemoteClient
from edge_agent.node.lanes import Job
from edge_agent.node.mailbox import Mailbox
from edge_agent.node.moves import Moves
from edge_agent.node.returns import Returns
from edge_agent.node.routing import Router
from edge_agent.node.settings import NodeSettings
from edge_agent.node.trust import Trust
from edge_agent.node.voice import CLIENT_REPLY_EXPIRY_S, Voice
from edge_agent.placement.options import why_not_trusted
from edge_agent.store.ledger import Ledger
from edge_agent.transport.link import MAX_PAYLOAD_BYTES, Delivered, Message
from edge_agent.transport.topics import Kind

REFUSED_DISPATCH_EXPIRY_S = 60


class Inbound:
    def __init__(
        self,
        settings: NodeSettings,
        ledger: Ledger,
        fleet: FleetState,
        execution: Execution,
        announcer: Announcer,
        mailbox: Mailbox,
        returns: Returns,
        router: Router,
        voice: Voice,
        moves: Moves,
        agreement: Agreement,
        trust: Trust,
    ) -> None:
        self._settings, self._board, self._ledger, self._fleet = settings, settings.board, ledger, fleet
        self._execution, self._announcer, self._mailbox = execution, announcer, mailbox
        self._returns, self._router, self._voice, self._moves = returns, router, voice, moves
        self._agreement, self._trust = agreement, trust
        self.draining = False

    @property
    def stopping(self) -> str:
        """Why nothing new is taken in; empty if it is."""
        return f"{self._board} is being stopped" if self.draining else ""

    def hear(self, event: Delivered, now_us: int) -> Iterator[Effect]:
        """One message from the broker. Whoever sent it, this raises nothing but what a failing disk raises."""
        message = event.message
        try:
            topic = self._voice.topics.parse(message.topic)
            match topic.kind:
                case Kind.ONLINE:
                    presence = open_presence(message.payload, self._key_of)
                    _must_agree("presence", presence.board, topic.board)
                    yield from self._hear_presence(presence, message.payload, now_us)
                case Kind.RECORD:
                    record = open_record(message.payload, self._key_of)
                    _must_agree("record", record.board, topic.board)
                    self._hear_record(record, message.payload, now_us)
                case Kind.DIGEST if topic.board != self._board:
                    yield from self._hear_digest(open_digest(message.payload, self._key_of), topic.board, now_us)
                case Kind.DIGEST:
                    pass
                case Kind.REPLY:
                    yield from self._hear_reply(message, topic.board, now_us)
                case Kind.KV:
                    yield from self._hear_kv(message, topic.peer, now_us)
                case Kind.CANCEL:
                    yield from self._hear_cancel(message)
                case Kind.REQUEST:
                    hear = self._hear_dispatch if wire.is_signed(message.payload) else self._hear_client
                    yield from hear(event, now_us)
                case _ if self._trust.listens_to(topic.kind):
                    yield from self._trust.hear(topic, message, now_us)
                case _:
                    raise RefusedError(
                        "topic", topic.kind.value, "presence, records, digests, replies, requests, cancellations and KV"
                    )
        except RefusedError as error:
            yield Log(f"refused a message on {message.topic}: {error}")
        if not self._returns.holds(event.token):
            yield Acknowledge(event.token)

    def recover(self, now_us: int) -> Iterator[Effect]:
        """Take up what was accepted before this boot and not answered. Raises ``UnavailableError`` as the ledger does."""
        last = None
        while batch := self._ledger.unanswered(self._settings.queue.max_requests, last):
            for key, envelope in batch:
                last = key
                origin, request_id = key.split("/", 1)
                try:
                    request = wire.decode_request(envelope, self._board) if envelope else None
                except RefusedError as error:
                    refused = failure(request_id, Status.REFUSED, self._board, str(error))
                    yield from self._mailbox.answer(key, origin, refused, CLIENT_REPLY_EXPIRY_S)
                    continue
                if request is not None:
                    yield from self._router.admit(request, RemoteClient(origin, key), now_us)
                else:
                    reason = f"{self._board} was restarted before it ran this request"
                    yield from self._fail(key, origin, request_id, reason)

    def _hear_presence(self, presence: Presence, message: bytes, now_us: int) -> Iterator[Effect]:
        board = presence.board
        if board == self._board:
            yield from self._hear_of_itself(presence)
        elif self._fleet.join_presence(presence, message):
            yield Log(f"{board} is {presence.standing.value}")
            if presence.standing is not Standing.ONLINE:
                self._moves.lose(board, now_us)
                yield from self._router.lose_boards(f"{board} is {presence.standing.value}", now_us, board)

    def _hear_of_itself(self, presence: Presence) -> Iterator[Effect]:
        """A will that came late, or that the broker repeats, is contradicted; nobody else can."""
        if presence.boot_epoch > self._settings.boot_epoch:
            epochs = f"boot {presence.boot_epoch} of {self._board} is on the broker, and this is boot {self._settings.boot_epoch}"
            yield Log(f"{epochs}: another board has this key, or the ledger was put back to an older state")
        elif presence.standing is not Standing.ONLINE and not self.draining:
            self._announcer.repeat()

    def _hear_record(self, record: BoardRecord, message: bytes, now_us: int) -> None:
        if record.board != self._board:
            self._fleet.join(record, now_us, message)

    def _hear_digest(self, digest: BoardDigest, board: str, now_us: int) -> Iterator[Effect]:
        """What a board says of its table, and what others signed that it passes on: as good as from themselves."""
        _must_agree("digest", digest.board, board)
        yield from self._agreement.hear(digest, now_us)
        for message in digest.passed_on:
            if is_presence(message):
                yield from self._hear_presence(open_presence(message, self._key_of), message, now_us)
            else:
                self._hear_record(open_record(message, self._key_of), message, now_us)

    def _hear_reply(self, message: Message, board: str, now_us: int) -> Iterator[Effect]:
        if wire.is_part(message.payload):
            yield from self._hear_part(message, board, now_us)
            return
        signed = verify1(message.payload, self._key_of, wire.AAD_RESULT, max_bytes=MAX_PAYLOAD_BYTES)
        result = wire.decode_result(signed.payload, self._board)
        _must_agree("reply", result.board, board)
        _must_agree("reply's signer", signed.kid.decode("utf-8", "replace"), board)
        yield from self._router.outcome(result, board, now_us)

    def _hear_part(self, message: Message, board: str, now_us: int) -> Iterator[Effect]:
        signed = verify1(message.payload, self._key_of, wire.AAD_PART, max_bytes=wire.MAX_SIGNED_PART_BYTES)
        _must_agree("part's signer", signed.kid.decode("utf-8", "replace"), board)
        yield from self._router.partial(wire.decode_part(signed.payload, self._board), board, now_us)

    def _hear_kv(self, message: Message, peer: str, now_us: int) -> Iterator[Effect]:
        """A board asks for the KV of a session, or gives what this one asked for."""
        asks = wire.is_kv_ask(message.payload)
        aad = wire.AAD_KV_ASK if asks else wire.AAD_KV_ANSWER
        signed = verify1(message.payload, self._key_of, aad, max_bytes=MAX_PAYLOAD_BYTES)
        _must_agree("KV message's signer", signed.kid.decode("utf-8", "replace"), peer)
        if peer == self._board:
            raise RefusedError("KV message", "one of this board's own", "one of another board")
        if reason := why_not_trusted(self._trust.tier(peer), TrustTier.NONE, self._trust.why(peer)):
            raise RefusedError("KV message", f"one of {peer}: {reason}", "one of a board that is trusted with a session")
        if asks:
            yield from self._moves.asked(peer, wire.decode_kv_ask(signed.payload, self._board))
        else:
            yield from self._moves.answered(peer, wire.decode_kv_answer(signed.payload, self._board), now_us)

    def _hear_cancel(self, message: Message) -> Iterator[Effect]:
        """The board that gave this one a request wants it no more: it is not begun, or ended."""
        signed = verify1(message.payload, self._key_of, wire.AAD_CANCEL, max_bytes=wire.MAX_CANCEL_BYTES)
        request_id = wire.decode_cancel(signed.payload, self._board)
        ingress = signed.kid.decode("utf-8", "replace")
        if ingress == self._board:
            raise RefusedError("cancellation", "one of this board's own", "one of a board that gave this one a request")
        key = f"{ingress}/{request_id}"
        if self._execution.forget(key) is not None:
            yield from self._fail(key, ingress, request_id, f"{ingress} wants it no more")
        elif (job := self._execution.running_job(key)) is not None and job.request.task == CHAT:
            yield Cancel(key)

    def _hear_dispatch(self, event: Delivered, now_us: int) -> Iterator[Effect]:
        """Another board wants this one to run a request. What it is sent back, it may place elsewhere."""
        signed = verify1(event.message.payload, self._key_of, wire.AAD_REQUEST, max_bytes=MAX_PAYLOAD_BYTES)
        ingress = signed.kid.decode("utf-8", "replace")
        request = wire.decode_request(signed.payload, self._board)
        key = f"{ingress}/{request.request_id}"
        try:
            new = self._ledger.accept(key, b"")
        except UnavailableError as error:
            yield from self._return(event.token, failure(request.request_id, Status.FAILED, self._board, str(error)), ingress)
            return
        if not new:
            yield from self._say_again(event.token, key, ingress)
            return
        job = Job(key, request, request.model or "", now_us + request.limits.deadline_us, ingress)
        if reason := self._refusal or self._not_hosted(job.model) or self._execution.full(job.size_bytes, ingress):
            yield from self._fail(key, ingress, request.request_id, reason)
        else:
            self._execution.enqueue(job)

    def _hear_client(self, event: Delivered, now_us: int) -> Iterator[Effect]:
        message = event.message
        reply = self._voice.topics.parse(message.response_topic or "")
        if reply.kind is not Kind.REPLY or reply.board != self._board or reply.client in self._settings.members:
            allowed = f"{self._voice.topics.reply(self._board, 'CLIENT')}, CLIENT being no board's name"
            raise RefusedError("response topic", message.response_topic, allowed)
        request_id = (message.correlation or b"").hex()
        if len(request_id) != 2 * wire.REQUEST_ID_BYTES:
            raise RefusedError("correlation data", message.correlation, f"{wire.REQUEST_ID_BYTES} bytes, the request id")
        key = f"{reply.client}/{request_id}"
        request, fault = self._read(message, request_id)
        try:
            new = self._ledger.accept(key, message.payload if request else b"")
        except UnavailableError as error:
            yield from self._return(event.token, failure(request_id, Status.SHED, self._board, str(error)), reply.client)
            return
        if not new:
            yield from self._say_again(event.token, key, reply.client)
        elif request is None:
            refused = failure(request_id, Status.REFUSED, self._board, fault)
            yield Log(f"refused a request of {reply.client}: {fault}")
            yield from self._mailbox.answer(key, reply.client, refused, CLIENT_REPLY_EXPIRY_S)
        else:
            yield from self._router.admit(request, RemoteClient(reply.client, key), now_us, refusal=self._refusal)

    def _read(self, message: Message, request_id: str) -> tuple[InferenceRequest | None, str]:
        """A client's request, or what is wrong with it."""
        try:
            request = wire.decode_request(message.payload, self._board)
            _must_agree("correlation data", request.request_id, request_id)
        except RefusedError as error:
            return None, str(error)
        return request, ""

    def _say_again(self, token: int, key: str, addressee: str) -> Iterator[Effect]:
        """A request that came twice: its answer again if there is one, else it is being worked on."""
        answer = self._ledger.answer_of(key)
        if answer is not None and not self._mailbox.is_under_way(key):
            request_id = key.split("/", 1)[1]
            yield from self._returns.give(token, self._voice.repeated(answer, request_id, addressee))

    def _return(self, token: int, result: InferenceResult, addressee: str) -> Iterator[Effect]:
        """The ledger has no room for a request: it is answered without, and the broker keeps it until it has the answer."""
        yield Log(f"request {result.request_id} of {addressee} is not taken in: {result.reason}")
        yield from self._returns.give(token, self._voice.reply(result, addressee))

    def _fail(self, key: str, ingress: str, request_id: str, reason: str) -> Iterator[Effect]:
        result = failure(request_id, Status.FAILED, self._board, reason)
        yield from self._mailbox.answer(key, ingress, result, REFUSED_DISPATCH_EXPIRY_S)

    @property
    def _refusal(self) -> str:
        return self.stopping or self._mailbox.congested

    def _not_hosted(self, model: str) -> str:
        """Why another board may not have this model run here; what this board has in a cloud is for its own requests alone."""
        offer = self._execution.offers.get(model)
        if offer is not None and not offer.cloud:
            return ""
        return self._execution.withdrawn.get(model) or f"{self._board} does not host {model!r}"

    def _key_of(self, kid: bytes) -> bytes | None:
        return self._settings.members.get(kid.decode("utf-8", "replace"))


def _must_agree(subject: str, inside: str, outside: str) -> None:
    if inside != outside:
        raise RefusedError(subject, f"{inside!r} inside, {outside!r} outside", "one and the same")
