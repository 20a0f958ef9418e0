"""One board on virtual time, for the tests: the simulator's shell around ``Node`` (``edge_agent.sim.shell``).

Owns the engine as a delay, the store of sessions, and the checks that every event must pass.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from edge_agent.core.chat import CHAT
from edge_agent.core.config import QueueSection
from edge_agent.core.cose import Signer
from edge_agent.core.kv import KvAsk, KvHome, KvItem, KvState, Place, session_hash
from edge_agent.core.values import AnswerPart, EnergyKind, InferenceRequest, InferenceResult, ModelOffer, Status, Tensor, failure
from edge_agent.gossip.presence import Standing
from edge_agent.node.events import (
    Abandoned,
    Effect,
    Event,
    Execute,
    Executed,
    Hosted,
    KvChanged,
    KvFind,
    KvFound,
    KvGave,
    KvGive,
    KvPut,
    KvStored,
    Partial,
    Publish,
    Submitted,
)
from edge_agent.node.lanes import lane_of
from edge_agent.node.node import Node
from edge_agent.node.routing import MAX_DECISIONS
from edge_agent.node.settings import NodeSettings
from edge_agent.node.streams import Assembly, end_of, end_tensor, turn_of
from edge_agent.placement.options import Rules
from edge_agent.sim.shell import BoardShell
from edge_agent.store.ledger import Bounds
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.link import MAX_OWED_MESSAGES, Delivered, Message
from edge_agent.transport.loopback import LoopbackLink, LoopbackOptions
from edge_agent.transport.topics import Kind
from tests.scripted_speaker import answer_to, end_of_turn

if TYPE_CHECKING:
    from tests.virtual_fleet import VirtualFleet

FLEET = "home"
TASK = "detect_faces"
LINK = LoopbackOptions(
    keepalive_us=3_000_000,
    connect_timeout_us=2_000_000,
    session_expiry_us=60_000_000,
    backoff=BackoffLimits(base_us=100_000, cap_us=2_000_000, sound_us=1_000_000),
)
WORD_US = 20_000
"""What a language model takes for a word on virtual boards."""
STORE_US, KV_TOKENS, ROWS = 2_000, 1000, b"rows"
REFUSABLE = 255
"""A request whose input begins with this byte is refused by every engine."""


def seed_of(board: str) -> bytes:
    return sha256(b"key of " + board.encode()).digest()


def offer(model: str, busy_us: int, quality_permille: int = 800, task: str = TASK) -> ModelOffer:
    return ModelOffer(model, task, sha256(model.encode()).digest(), quality_permille, busy_us, busy_us)


RULES = Rules(releases=frozenset(sha256(model.encode()).digest() for model in ("small", "large", "tiny", "parrot")))
"""What is released on virtual boards: models whose digest is that of their name."""


def echo(request: InferenceRequest, board: str, model: str, busy_us: int) -> InferenceResult:
    """What the emulated engine answers: the request's own id, so that a mixed-up answer is seen."""
    if any(tensor.data[:1] == bytes((REFUSABLE,)) for tensor in request.inputs.values()):
        return failure(request.request_id, Status.REFUSED, board, "this input is refused by every engine", model)
    outputs = {"echo": Tensor("uint8", (16,), bytes.fromhex(request.request_id))}
    digest = sha256(model.encode()).digest()
    return InferenceResult(request.request_id, Status.OK, board, model, digest, outputs, busy_us, busy_us, EnergyKind.EMULATED)


def kv_of(session: str) -> dict[bytes, bytes]:
    blocks = [sha256(f"{session} {number}".encode()).digest() for number in range(7)]
    return {ROWS: b"rows of " + session.encode(), **{name: b"block " + name for name in blocks}}


def spoken(job: Execute, board: str) -> InferenceResult:
    """The end of a turn on a virtual board."""
    outputs, digest = end_tensor(end_of_turn(turn_of(job.request), job.request.session)), sha256(job.model.encode()).digest()
    return InferenceResult(job.request.request_id, Status.OK, board, job.model, digest, outputs, 1, 1, EnergyKind.EMULATED)


@dataclass(slots=True)
class Asked:
    """A client's request and what came of it. ``gone``: the client does not wait any more."""

    request: InferenceRequest
    boards: deque[str]
    client: str = ""
    answers: list[InferenceResult] = field(default_factory=list)
    seen: Assembly = field(default_factory=Assembly)
    """What the client has been shown of an answer that comes in parts."""
    parts: int = 0
    future: asyncio.Future[InferenceResult] | None = None
    gone: bool = False

    @property
    def settled(self) -> bool:
        return self.gone or bool(self.answers)


class VirtualBoard(BoardShell):
    """A shell with a delay in place of the engine; every event passes the checks below."""

    rules = RULES

    def __init__(
        self, fleet: VirtualFleet, name: str, offers: Iterable[ModelOffer], queue: QueueSection, bounds: Bounds | None = None
    ) -> None:
        super().__init__(fleet, name, bounds)
        self.fleet, self.offers, self.queue = fleet, tuple(offers), queue
        self.engine_ok_permille = 1000
        self._handles = 0
        self._waiting: dict[int, Asked] = {}
        self._running: dict[str, str] = {}
        """The lane of each job that runs, by key."""
        self._shown: dict[int, int] = {}
        """How many characters of its answer each local client has been given by this board."""
        self._heard: dict[str, tuple[int, Standing]] = {}
        self.kept: dict[str, dict[bytes, bytes]] = {}
        """On disk: of each session its blocks by name, and its rows."""
        self._told: KvState | None = None

    def boot(self) -> None:
        if not self.up:
            super().boot()
            self.fleet.house_homeless()

    def make_node(self, boot_epoch: int) -> Node:
        settings = NodeSettings(
            board=self.name,
            boot_epoch=boot_epoch,
            signer=Signer(self.name.encode(), seed_of(self.name)),
            fleet=FLEET,
            members=self.fleet.keys,
            rules=self.rules,
            queue=self.queue,
        )
        return Node(settings, self.ledger)

    def make_link(self) -> LoopbackLink:
        return LoopbackLink(self.fleet.broker, self.name, LINK)

    def furnish(self) -> Iterator[Event]:
        for forgotten in (self._running, self._shown, self._heard):
            forgotten.clear()
        self._told = None
        yield from map(Hosted, self.offers)
        yield from self._kv_news()

    def ask(self, asked: Asked) -> int:
        self._handles += 1
        self._waiting[self._handles] = asked
        self.fleet.submitted.add((self.name, asked.request.request_id))
        self.feed(Submitted(asked.request, self._handles))
        return self._handles

    def some_handle(self) -> int | None:
        """Of a local client that waits, if there is one."""
        return next(iter(self._waiting), None)

    def abandon(self, handle: int) -> None:
        """A local client goes without its answer."""
        asked = self._waiting.pop(handle)
        asked.gone = True
        self.feed(Abandoned(handle))

    def lose_clients(self) -> None:
        waiting, self._waiting = list(self._waiting.values()), {}
        for asked in waiting:
            self.fleet.ask_elsewhere(asked)

    def before_event(self, event: Event) -> None:
        self._hear(event)
        self.fleet.note(f"{self.name} < {event!r}", event.message.payload if isinstance(event, Delivered) else b"")

    def before_effect(self, effect: Effect) -> None:
        self.fleet.note(f"{self.name} > {effect!r}", effect.message.payload if isinstance(effect, Publish) else b"")

    def after_events(self) -> None:
        self._check_bounds()

    def before_publish(self, message: Message) -> None:
        self._check_dispatch(message)

    def reply_part(self, handle: int, part: AnswerPart) -> None:
        self.fleet.promise(handle in self._waiting, f"{self.name} shows a part to handle {handle} that is gone")
        told = self._shown.get(handle, 0)
        self.fleet.promise(part.offset == told, f"{self.name} shows {part.offset} after {told} characters")
        self._shown[handle] = part.end
        self.fleet.show(self._waiting[handle], part)

    def reply(self, handle: int, result: InferenceResult) -> None:
        self.fleet.promise(handle in self._waiting, f"{self.name} answers handle {handle} that waits for nothing")
        self.fleet.answered(self._waiting.pop(handle), result)

    def move(self, effect: KvFind | KvPut | KvGive) -> None:
        """The store takes a moment for each."""
        match effect:
            case KvFind(key, _, session, manifest):
                names = [manifest[at : at + 32] for at in range(0, len(manifest), 32)]
                here = self.kept.setdefault(session, {})
                found = KvFound(key, tuple(name for name in names if name not in here), ROWS not in here)
                self.later(STORE_US, lambda: self._stored(found))
            case KvPut(key, _, session, item, name, payload):
                self.kept.setdefault(session, {})[name or ROWS] = payload
                self.later(STORE_US, lambda: self._stored(KvStored(key, item, name)))
            case KvGive(board, ask):
                self.later(STORE_US, lambda: self._stored(self._given(board, ask)))

    def _stored(self, event: KvFound | KvStored | KvGave) -> None:
        self.feed(event)
        self._tell_kv()

    def _given(self, board: str, ask: KvAsk) -> KvGave:
        session = next((each for each in self.kept if session_hash(each) == ask.session), "")
        here = self.kept.get(session, {})
        if ROWS not in here:
            return KvGave(board, ask, refusal="session: it is not here")
        if ask.item is KvItem.MOVED:
            del self.kept[session]
            return KvGave(board, ask)
        payload = b"".join(name for name in here if name != ROWS) if ask.item is KvItem.MANIFEST else here[ask.name or ROWS]
        return KvGave(board, ask, payload)

    def keep(self, session: str) -> None:
        """A turn of the session has ended here: its KV is a function of its name."""
        self.kept[session] = kv_of(session)
        self._tell_kv()

    def _tell_kv(self) -> None:
        for event in self._kv_news():
            self.feed(event)

    def _kv_news(self) -> Iterator[Event]:
        """What is held here, when it is not what was told last."""
        homes = [KvHome(session_hash(each), KV_TOKENS, Place.RAM) for each in sorted(self.kept) if ROWS in self.kept[each]]
        state = KvState("parrot", b"f" * 32, 100, 200, 2**30, 4096, prefill_tok_s=200, homes=tuple(homes))
        if self.up and state != self._told and "parrot" in {each.model for each in self.offers}:
            self._told = state
            yield KvChanged(state)

    def execute(self, job: Execute) -> None:
        origin, request_id = job.key.split("/")
        self.fleet.check_execution(self.name, origin, request_id)
        lane = lane_of(job.request.task, job.model)
        self.fleet.promise(job.key not in self._running, f"{self.name} begins {job.key}, which runs")
        beside = sum(each == lane for each in self._running.values())
        parallel = next((each.parallel for each in self.offers if each.model == lane), 1)
        self.fleet.promise(beside < parallel, f"{self.name} begins {job.key} beside {beside} others in lane {lane!r}")
        self.fleet.promise(job.budget_us > 0, f"{self.name} begins {job.key} without any time left")
        self._running[job.key] = lane
        if job.request.task == CHAT:
            self._say(job)
            return
        busy_us = next((each.busy_us for each in self.offers if each.model == job.model), 1000)
        busy_us = busy_us * self.fleet.random.randrange(500, 1500) // 1000
        result = echo(job.request, self.name, job.model, busy_us)
        if self.fleet.random.randrange(1000) >= self.engine_ok_permille:
            result = failure(job.request.request_id, Status.FAILED, self.name, "the engine died", job.model)
        elif busy_us > job.budget_us:
            reason = f"not done within {job.budget_us} µs"
            busy_us, result = job.budget_us, failure(job.request.request_id, Status.FAILED, self.name, reason, job.model)
        self.later(busy_us, lambda: self._executed(job.key, result))

    def _executed(self, key: str, result: InferenceResult) -> None:
        del self._running[key]
        self.feed(Executed(key, result))

    def _say(self, job: Execute) -> None:
        """The answer to a turn, word by word; perhaps the engine dies in the middle of it."""
        turn = turn_of(job.request)
        words = answer_to(turn)[1]
        random, length, due_us = self.fleet.random, len(turn.begun), 0
        dies_at = random.randrange(len(words)) if random.randrange(1000) >= self.engine_ok_permille else -1
        for number, word in enumerate(words):
            due_us += WORD_US * random.randrange(500, 1500) // 1000
            if number == dies_at or due_us > job.budget_us:
                result = failure(job.request.request_id, Status.FAILED, self.name, "the engine died, or was late", job.model)
                self.later(due_us, lambda result=result: self._said(job.key, result))  # type: ignore[misc]
                return
            part = AnswerPart(job.request.request_id, length, word, number + 1)
            length += len(word)
            self.later(due_us, lambda part=part: self._said(job.key, part))  # type: ignore[misc]
        if job.moved_from:
            self.fleet.promise(self.kept[turn.session] == kv_of(turn.session), f"{self.name} has all of {turn.session}")
        self.later(due_us, lambda: self._said(job.key, spoken(job, self.name)))

    def _said(self, key: str, what: AnswerPart | InferenceResult) -> None:
        if key not in self._running:
            return
        if isinstance(what, AnswerPart):
            self.feed(Partial(key, what))
        else:
            self._executed(key, what)
            if what.status is Status.OK and (session := end_of(what).session):
                self.keep(session)

    def cancel(self, key: str) -> None:
        """The engine breaks off; it takes a moment to say so."""
        self.fleet.promise(key in self._running, f"{self.name} breaks off {key}, which does not run")
        request_id = key.split("/")[1]
        result = failure(request_id, Status.FAILED, self.name, "broken off")
        self.later(1_000, lambda: self._said(key, result))

    # checks, each by its own means

    def _hear(self, event: Event) -> None:
        """What this board was told about who is there."""
        if not isinstance(event, Delivered):
            return
        said = self.fleet.said_of_a_board(event.message)
        if said is not None:
            board, boot_epoch, standing = said
            held = self._heard.get(board, (-1, Standing.ONLINE))[0]
            if boot_epoch > held or (standing is not None and boot_epoch == held):
                self._heard[board] = boot_epoch, standing or Standing.ONLINE

    def _check_dispatch(self, message: Message) -> None:
        topic = self.fleet.topics.parse(message.topic)
        if topic.kind is not Kind.REQUEST:
            return
        standing = self._heard.get(topic.board, (0, Standing.ONLINE))[1]
        self.fleet.promise(
            standing is Standing.ONLINE, f"{self.name} sends a request to {topic.board}, which it knows is {standing.value}"
        )
        request_id = (message.correlation or b"").hex()
        self.fleet.given.add((self.name, request_id, topic.board))

    def _check_bounds(self) -> None:
        node, queue = self.node, self.queue
        ingress, execution = node.router.ingress, node.execution
        bounds = self.bounds or Bounds()
        for what, size, limit in (
            ("pending requests", len(ingress), queue.max_requests),
            ("pending bytes", ingress.size_bytes, queue.max_bytes),
            ("waiting jobs", len(execution), queue.max_requests),
            ("jobs that wait for KV", len(node.moves), execution.running),
            ("streams of parts", len(node.router.streams), 2 * queue.max_requests),
            ("waiting bytes", execution.waiting_bytes, queue.max_bytes),
            ("remembered decisions", len(node.decisions), MAX_DECISIONS),
            ("deliveries held", len(node.returns), MAX_OWED_MESSAGES),
            ("answers without room", len(node.mailbox), bounds.unanswered_count),
        ):
            self.fleet.promise(0 <= size <= limit, f"{self.name} holds {size} {what}, the limit is {limit}")

    @property
    def quiet(self) -> bool:
        """Nothing is pending, running, owed or unanswered."""
        empty = not self.ledger.unanswered(1) and not self.ledger.owed(1)
        return (
            self.node.idle
            and not self._running
            and not len(self.node.router.streams)
            and empty
            and not len(self.node.returns)
            and not len(self.node.mailbox)
        )
