"""One board on virtual time: the shell around ``Node`` that ``edge_agent/shell`` is in production.

Owns the transaction around the decisions, the effects after it (what cannot be published comes back as ``Rejected``), the engine
as a delay, and the checks that every event must pass.  Rule: a killed board keeps its ledger and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, assert_never

from edge_agent.core.chat import CHAT
from edge_agent.core.config import QueueSection
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import KvAsk, KvHome, KvItem, KvState, Place, session_hash
from edge_agent.core.values import AnswerPart, EnergyKind, InferenceRequest, InferenceResult, ModelOffer, Status, Tensor, failure
from edge_agent.gossip.presence import Standing
from edge_agent.node.events import (
    Abandoned,
    Acknowledge,
    Cancel,
    Drain,
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
    Log,
    Partial,
    Publish,
    Reply,
    ReplyPart,
    Submitted,
    Subscribe,
    Tick,
)
from edge_agent.node.execution import lane_of
from edge_agent.node.node import Node
from edge_agent.node.routing import MAX_DECISIONS
from edge_agent.node.settings import NodeSettings
from edge_agent.node.streams import Assembly, end_of, end_tensor, turn_of
from edge_agent.placement.options import Rules
from edge_agent.store.ledger import Bounds, Ledger
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.link import MAX_OWED_MESSAGES, Delivered, Message, Rejected, Will
from edge_agent.transport.loopback import LoopbackLink, LoopbackOptions
from edge_agent.transport.topics import Kind
from tests.scripted_speaker import answer_to, end_of_turn

if TYPE_CHECKING:
    from tests.virtual_fleet import VirtualFleet

FLEET = "home"
TASK = "detect_faces"
TICK_US = 100_000
IDLE_TICK_US = 1_000_000
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


class VirtualBoard:
    """What ``Agent`` is, with timers in place of asyncio and a delay in place of the engine."""

    def __init__(
        self, fleet: VirtualFleet, name: str, offers: Iterable[ModelOffer], queue: QueueSection, bounds: Bounds | None = None
    ) -> None:
        self.fleet, self.name, self.offers, self.queue, self.bounds = fleet, name, tuple(offers), queue, bounds
        self.up = False
        self.engine_ok_permille = 1000
        self._life = 0
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
        if self.up:
            return
        self._life += 1
        self.up = True
        self._running.clear()
        self._shown.clear()
        self._told = None
        self._events: deque[Event] = deque()
        self._pumping = False
        self._heard.clear()
        self.ledger = Ledger(self.fleet.folder / self.name / "ledger.db", self.bounds)
        with self.ledger.transaction():
            boot_epoch = self.ledger.increment("boot_epoch")
        settings = NodeSettings(
            board=self.name,
            boot_epoch=boot_epoch,
            signer=Signer(self.name.encode(), seed_of(self.name)),
            fleet=FLEET,
            members=self.fleet.keys,
            rules=RULES,
            queue=self.queue,
        )
        self.node = Node(settings, self.ledger)
        self.fleet.note(f"{self.name} boots for the {boot_epoch}th time")
        for each in self.offers:
            self.feed(Hosted(each))
        self._tell_kv()
        self._carry_out(self._decide(lambda: self.node.recover(self.fleet.now_us)))
        self.link = LoopbackLink(self.fleet.broker, self.name, LINK)
        self.link.open(self.feed, Will(self.node.will()))
        self._tick(self._life)
        self.fleet.house_homeless()

    def kill(self, power_cut: bool = False) -> None:
        """The plug is pulled: what is not in the ledger is gone, and local clients notice."""
        if not self.up:
            return
        self.fleet.note(f"{self.name} is killed")
        self.link.crash(power_cut)
        self._end()

    def stop(self) -> None:
        """SIGTERM: take nothing new, finish, say goodbye."""
        if self.up:
            self.fleet.note(f"{self.name} drains")
            self.feed(Drain())
            self._leave_when_idle(self._life)

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

    def feed(self, event: Event) -> None:
        self._events.append(event)
        if self._pumping:
            return
        self._pumping = True
        while self._events and self.up:
            self._carry_out(self._decide(self._handle_waiting))
        self._pumping = False
        if self.up:
            self._check_bounds()

    def _handle_waiting(self) -> list[Effect]:
        effects: list[Effect] = []
        while self._events:
            event = self._events.popleft()
            self._hear(event)
            self.fleet.note(f"{self.name} < {event!r}", event.message.payload if isinstance(event, Delivered) else b"")
            effects += self.node.handle(event, self.fleet.now_us)
        return effects

    def _decide(self, step: Callable[[], list[Effect]]) -> list[Effect]:
        with self.ledger.transaction():
            return step()

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.fleet.note(f"{self.name} > {effect!r}", effect.message.payload if isinstance(effect, Publish) else b"")
            match effect:
                case Execute():
                    self._execute(effect)
                case Cancel(key):
                    self._cancel(key)
                case ReplyPart(handle, part):
                    self.fleet.promise(handle in self._waiting, f"{self.name} shows a part to handle {handle} that is gone")
                    told = self._shown.get(handle, 0)
                    self.fleet.promise(part.offset == told, f"{self.name} shows {part.offset} after {told} characters")
                    self._shown[handle] = part.end
                    self.fleet.show(self._waiting[handle], part)
                case Reply(handle, result):
                    self.fleet.promise(handle in self._waiting, f"{self.name} answers handle {handle} that waits for nothing")
                    self.fleet.answered(self._waiting.pop(handle), result)
                case Publish() | Subscribe() | Acknowledge():
                    self._use_link(effect)
                case KvFind() | KvPut() | KvGive():
                    self._move(effect)
                case Log():
                    pass
                case _:
                    assert_never(effect)

    def _move(self, effect: KvFind | KvPut | KvGive) -> None:
        """The store takes a moment for each."""
        match effect:
            case KvFind(key, _, session, manifest):
                names = [manifest[at : at + 32] for at in range(0, len(manifest), 32)]
                here = self.kept.setdefault(session, {})
                found = KvFound(key, tuple(name for name in names if name not in here), ROWS not in here)
                self._later(STORE_US, lambda: self._stored(found))
            case KvPut(key, _, session, item, name, payload):
                self.kept.setdefault(session, {})[name or ROWS] = payload
                self._later(STORE_US, lambda: self._stored(KvStored(key, item, name)))
            case KvGive(board, ask):
                self._later(STORE_US, lambda: self._stored(self._given(board, ask)))

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
        homes = [KvHome(session_hash(each), KV_TOKENS, Place.RAM) for each in sorted(self.kept) if ROWS in self.kept[each]]
        state = KvState("parrot", b"f" * 32, 100, 200, 2**30, 4096, prefill_tok_s=200, homes=tuple(homes))
        if self.up and state != self._told and "parrot" in {each.model for each in self.offers}:
            self._told = state
            self.feed(KvChanged(state))

    def _use_link(self, effect: Publish | Subscribe | Acknowledge) -> None:
        try:
            match effect:
                case Publish(message, ticket):
                    self._check_dispatch(message)
                    self.link.publish(message, ticket)
                case Subscribe(topic_filter):
                    self.link.subscribe(topic_filter)
                case Acknowledge(token):
                    self.link.acknowledge(token)
        except (UnavailableError, RefusedError) as error:
            if isinstance(effect, Publish):
                self.feed(Rejected(str(error), effect.ticket))

    def _execute(self, job: Execute) -> None:
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
        self._later(busy_us, lambda: self._executed(job.key, result))

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
                self._later(due_us, lambda result=result: self._said(job.key, result))  # type: ignore[misc]
                return
            part = AnswerPart(job.request.request_id, length, word, number + 1)
            length += len(word)
            self._later(due_us, lambda part=part: self._said(job.key, part))  # type: ignore[misc]
        if job.moved_from:
            self.fleet.promise(self.kept[turn.session] == kv_of(turn.session), f"{self.name} has all of {turn.session}")
        self._later(due_us, lambda: self._said(job.key, spoken(job, self.name)))

    def _said(self, key: str, what: AnswerPart | InferenceResult) -> None:
        if key not in self._running:
            return
        if isinstance(what, AnswerPart):
            self.feed(Partial(key, what))
        else:
            self._executed(key, what)
            if what.status is Status.OK and (session := end_of(what).session):
                self.keep(session)

    def _cancel(self, key: str) -> None:
        """The engine breaks off; it takes a moment to say so."""
        self.fleet.promise(key in self._running, f"{self.name} breaks off {key}, which does not run")
        request_id = key.split("/")[1]
        result = failure(request_id, Status.FAILED, self.name, "broken off")
        self._later(1_000, lambda: self._said(key, result))

    def _tick(self, life: int) -> None:
        if self.up and life == self._life:
            self.feed(Tick())
            self._later(IDLE_TICK_US if self.node.idle else TICK_US, lambda: self._tick(life))

    def _leave_when_idle(self, life: int) -> None:
        if not self.up or life != self._life:
            return
        if not self.node.idle:
            self._later(TICK_US // 10, lambda: self._leave_when_idle(life))
            return
        if self.link.up:
            with suppress(UnavailableError):
                self.link.publish(self.node.farewell())
        self.link.close()
        self._end()

    def _end(self) -> None:
        self.up = False
        self._life += 1
        self.ledger.close()
        waiting, self._waiting = list(self._waiting.values()), {}
        for asked in waiting:
            self.fleet.ask_elsewhere(asked)

    def _later(self, interval_us: int, callback: Callable[[], object]) -> None:
        life = self._life
        self.fleet.after(interval_us, lambda: callback() if life == self._life else None)

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
