"""A fleet on virtual time: real nodes, real ledgers and real clients over the loopback broker, with a fault for every occasion.

Owns the shell around ``Node`` that ``edge_agent/agent.py`` is in production (a transaction around the decisions, then the
effects; what cannot be published comes back as ``Rejected``), and the checks that every event must pass.  Rules:

* Everything is drawn from one seed and happens in timers of one clock: a seed reproduces its run, to the same trace digest.
* An engine is a delay.  A killed board loses all but its ledger; it comes back with a higher boot epoch and ``recover``.
* A promise that breaks raises ``BrokenPromiseError`` at the event that broke it.

Run one seed, with its trace: ``python -m tests.virtual_fleet SEED``; many: ``python -m tests.virtual_fleet FIRST COUNT``.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import assert_never

from edge_agent.broker_client import BrokerClient
from edge_agent.core.clock import VirtualClock
from edge_agent.core.config import QueueSection
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import EnergyKind, InferenceRequest, InferenceResult, Limits, ModelOffer, Status, Tensor, failure
from edge_agent.gossip.presence import Standing, open_presence
from edge_agent.gossip.record import open_record
from edge_agent.node.events import (
    Abandoned,
    Acknowledge,
    Drain,
    Effect,
    Event,
    Execute,
    Executed,
    Hosted,
    Log,
    Publish,
    Reply,
    Submitted,
    Subscribe,
    Tick,
)
from edge_agent.node.node import Node
from edge_agent.node.routing import MAX_DECISIONS
from edge_agent.node.settings import NodeSettings
from edge_agent.store.ledger import Bounds, Ledger
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.link import MAX_OWED_MESSAGES, Delivered, Message, Rejected, Will
from edge_agent.transport.loopback import Faults, LoopbackBroker, LoopbackLink, LoopbackOptions
from edge_agent.transport.topics import Kind, Topics

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
REFUSABLE = 255
"""A request whose input begins with this byte is refused by every engine."""
MEMORY_FOLDER = Path("/dev/shm")


class BrokenPromiseError(AssertionError):
    """Something that must hold did not; the message says what, when and with which seed."""


def seed_of(board: str) -> bytes:
    return sha256(b"key of " + board.encode()).digest()


def offer(model: str, busy_us: int, quality_permille: int = 800, task: str = TASK) -> ModelOffer:
    return ModelOffer(model, task, sha256(model.encode()).digest(), quality_permille, busy_us, busy_us)


def echo(request: InferenceRequest, board: str, model: str, busy_us: int) -> InferenceResult:
    """What the emulated engine answers: the request's own id, so that a mixed-up answer is seen."""
    if any(tensor.data[:1] == bytes((REFUSABLE,)) for tensor in request.inputs.values()):
        return failure(request.request_id, Status.REFUSED, board, "this input is refused by every engine", model)
    outputs = {"echo": Tensor("uint8", (16,), bytes.fromhex(request.request_id))}
    digest = sha256(model.encode()).digest()
    return InferenceResult(request.request_id, Status.OK, board, model, digest, outputs, busy_us, busy_us, EnergyKind.EMULATED)


@dataclass(slots=True)
class Asked:
    """A client's request and what came of it. ``gone``: the client does not wait any more."""

    request: InferenceRequest
    boards: deque[str]
    client: str = ""
    answers: list[InferenceResult] = field(default_factory=list)
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
        self._running = ""
        self._heard: dict[str, tuple[int, Standing]] = {}

    def boot(self) -> None:
        if self.up:
            return
        self._life += 1
        self.up, self._running = True, ""
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
            queue=self.queue,
        )
        self.node = Node(settings, self.ledger)
        self.fleet.note(f"{self.name} boots for the {boot_epoch}th time")
        for each in self.offers:
            self.feed(Hosted(each))
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
                case Reply(handle, result):
                    self.fleet.promise(handle in self._waiting, f"{self.name} answers handle {handle} that waits for nothing")
                    self.fleet.answered(self._waiting.pop(handle), result)
                case Publish() | Subscribe() | Acknowledge():
                    self._use_link(effect)
                case Log():
                    pass
                case _:
                    assert_never(effect)

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
        self.fleet.promise(not self._running, f"{self.name} runs {self._running} and begins {job.key}")
        self.fleet.promise(job.budget_us > 0, f"{self.name} begins {job.key} without any time left")
        self._running = job.key
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
        self._running = ""
        self.feed(Executed(key, result))

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
        return self.node.idle and empty and not len(self.node.returns) and not len(self.node.mailbox)


class VirtualFleet:
    """``with VirtualFleet(seed) as fleet``: a broker, boards and clients, to be driven by hand or by ``tests/fleet_weather``.

    Must be used inside a coroutine, because the broker clients make futures.
    """

    def __init__(self, seed: int | str = 0, verbose: bool = False) -> None:
        self.seed, self.verbose = seed, verbose
        self.random = Random(f"fleet {seed}")
        self.clock = VirtualClock()
        self.broker = LoopbackBroker(self.clock, seed)
        self.topics = Topics(FLEET)
        self.boards: dict[str, VirtualBoard] = {}
        self.keys: dict[str, bytes] = {}
        self.clients: dict[str, BrokerClient] = {}
        self.asked: list[Asked] = []
        self.submitted: set[tuple[str, str]] = set()
        self.given: set[tuple[str, str, str]] = set()
        self.executions: Counter[tuple[str, str, str]] = Counter()
        self._links: dict[str, LoopbackLink] = {}
        self._homeless: list[Asked] = []
        self._said: dict[tuple[str, bytes], tuple[str, int, Standing | None] | None] = {}
        self._trace = sha256()
        self._requests = 0
        self._entering: set[asyncio.Task[BrokerClient]] = set()

    def __enter__(self) -> VirtualFleet:
        parent = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
        self._folder = tempfile.TemporaryDirectory(prefix="sly-fleet-", dir=parent)
        self.folder = Path(self._folder.name)
        return self

    def __exit__(self, *_: object) -> None:
        for board in self.boards.values():
            if board.up:
                board.up = False
                board.ledger.close()
        for entering in self._entering:
            entering.cancel()
        self._folder.cleanup()

    @property
    def now_us(self) -> int:
        return self.clock.monotonic_us()

    def after(self, interval_us: int, callback: Callable[[], object]) -> None:
        self.clock.call_at(self.now_us + interval_us, callback)

    @property
    def trace_digest(self) -> str:
        return self._trace.hexdigest()

    def add_board(
        self,
        name: str,
        *offers: ModelOffer,
        queue: QueueSection | None = None,
        bounds: Bounds | None = None,
    ) -> VirtualBoard:
        """Add them all before the first one boots: the fleet's keys are given to each at its boot."""
        self.keys[name] = Signer(name.encode(), seed_of(name)).public_key
        board = self.boards[name] = VirtualBoard(self, name, offers, queue or QueueSection(), bounds)
        return board

    def boot(self) -> None:
        for board in self.boards.values():
            board.boot()

    async def add_client(self, name: str) -> BrokerClient:
        """A client behind the broker."""
        link = self._links[name] = LoopbackLink(self.broker, name, LINK)
        client = self.clients[name] = BrokerClient(link, FLEET, name, self.keys, later=self._later)
        self._entering.add(asyncio.ensure_future(client.__aenter__()))
        await asyncio.sleep(0)
        return client

    def _later(self, interval_us: int, callback: Callable[[], None]) -> object:
        return self.clock.call_at(self.now_us + interval_us, callback)

    def lose_client(self, name: str) -> None:
        """A client behind the broker goes and does not come back."""
        self.note(f"client {name} goes")
        self.clients.pop(name)
        self._links[name].crash()
        for asked in self.asked:
            asked.gone |= asked.client == name

    def request(self, deadline_us: int = 5_000_000, **settings: object) -> InferenceRequest:
        """A new request, its id from the seed. ``byte``: what its input begins with; ``size_bytes``; ``model``; ``quality``."""
        self._requests += 1
        request_id = sha256(f"{self.seed} {self._requests}".encode()).digest()[:16].hex()
        size_bytes = int(str(settings.get("size_bytes", 16)))
        data = bytes((int(str(settings.get("byte", 0))),)) * size_bytes
        model = settings.get("model")
        limits = Limits(deadline_us, quality_permille=int(str(settings.get("quality", 0))))
        return InferenceRequest(
            request_id, TASK, {"image": Tensor("uint8", (size_bytes,), data)}, str(model) if model else None, limits
        )

    def ask(self, request: InferenceRequest, *boards: str) -> Asked:
        """A client on the first board's own socket; when its agent dies it asks the next one, under the same id."""
        asked = Asked(request, deque(boards))
        self.asked.append(asked)
        self._ask_at(asked)
        return asked

    def ask_by_broker(self, client: str, request: InferenceRequest, *boards: str) -> Asked:
        asked = Asked(request, deque(boards), client)
        self.asked.append(asked)
        for board in boards:
            self.submitted.add((board, request.request_id))
        asked.future = self.clients[client].ask(request, *boards)
        return asked

    def ask_elsewhere(self, asked: Asked) -> None:
        """The agent that a local client was asking has died."""
        if not asked.gone:
            asked.boards.rotate(-1)
            self._ask_at(asked)

    def house_homeless(self) -> None:
        """Local clients that no agent would serve ask again."""
        homeless, self._homeless = self._homeless, []
        for asked in homeless:
            if not asked.gone:
                self._ask_at(asked)

    def answered(self, asked: Asked, result: InferenceResult) -> None:
        request_id = asked.request.request_id
        self.promise(not asked.answers, f"request {request_id} was answered twice")
        self.promise(result.request_id == request_id, f"request {request_id} got the answer to {result.request_id}")
        if result.status is Status.OK:
            self.promise(result.outputs["echo"].data == bytes.fromhex(request_id), f"request {request_id} got another's outputs")
        asked.answers.append(result)

    def check_execution(self, board: str, origin: str, request_id: str) -> None:
        if origin == board:
            self.promise((board, request_id) in self.submitted, f"{board} runs {request_id}, which no client asked it for")
            return
        self.promise((origin, request_id, board) in self.given, f"{board} runs {request_id}, which {origin} did not give it")
        self.executions[origin, request_id, board] += 1
        count = self.executions[origin, request_id, board]
        self.promise(count == 1, f"{board} runs {request_id} of {origin} for the {count}th time")

    def collect(self) -> None:
        """What the clients behind the broker have got."""
        for asked in self.asked:
            if asked.future is not None and asked.future.done() and not asked.answers:
                self.answered(asked, asked.future.result())

    def run_for(self, interval_us: int) -> None:
        self.clock.advance(interval_us)
        self.collect()

    def run_until(self, predicate: Callable[[], object], within_us: int, what: str) -> None:
        """Let time pass until ``predicate`` holds; a broken promise if that takes longer than ``within_us``."""
        end_us = self.now_us + within_us
        while not predicate():
            self.promise(self.now_us < end_us, f"within {within_us // 1_000_000} s: {what}")
            self.run_for(TICK_US)
        self.collect()

    def settle(self, within_us: int) -> None:
        """All clients have their answers, and every queue is empty."""
        self.run_until(lambda: all(asked.settled for asked in self.asked), within_us, "every client has its answer")
        self.run_until(lambda: all(board.quiet for board in self.boards.values()), within_us, "every queue is empty")

    def agree(self, within_us: int) -> None:
        """Every board knows every other one as online, by the same record."""

        def agreed() -> bool:
            known = [{record.board: record.version for record in board.node.fleet.records()} for board in self.boards.values()]
            newest = {name: version for records in known for name, version in records.items()}
            everyone = all(board.node.online_boards == len(self.boards) for board in self.boards.values())
            return everyone and all(newest[name] == version for records in known for name, version in records.items())

        self.run_until(agreed, within_us, "all boards know each other, by the same records")

    def link_of(self, name: str) -> LoopbackLink:
        """An adversary's or a client's own link."""
        return self._links.setdefault(name, LoopbackLink(self.broker, name, LINK))

    def calm(self) -> None:
        """All faults end and whoever was away is back."""
        self.broker.wire.faults = Faults()
        self.broker.heal()
        if not self.broker.running:
            self.broker.start()
        for board in self.boards.values():
            board.engine_ok_permille = 1000
            if board.up and board.node.draining:
                board.kill()
        self.boot()

    def note(self, text: str, payload: bytes | memoryview = b"") -> None:
        line = f"{self.now_us / 1e6:10.6f} {text}"
        self._trace.update(line.encode() + payload)
        if self.verbose:
            print(line)

    def promise(self, kept: object, text: str) -> None:
        if not kept:
            remedy = f"reproduce it with: python -m tests.virtual_fleet {self.seed}"
            raise BrokenPromiseError(f"seed {self.seed} at {self.now_us / 1e6:.6f} s: not so: {text}; {remedy}")

    def said_of_a_board(self, message: Message) -> tuple[str, int, Standing | None] | None:
        """A board, its boot epoch, and its standing if that is what the message is about; each message is verified once."""
        said = message.topic, message.payload
        if said not in self._said:
            self._said[said] = self._read(message)
        return self._said[said]

    def _read(self, message: Message) -> tuple[str, int, Standing | None] | None:
        with suppress(RefusedError):
            topic = self.topics.parse(message.topic)
            if topic.kind is Kind.ONLINE:
                presence = open_presence(message.payload, self.key_of)
                return (topic.board, presence.boot_epoch, presence.standing) if presence.board == topic.board else None
            if topic.kind is Kind.RECORD:
                record = open_record(message.payload, self.key_of)
                return (topic.board, record.boot_epoch, None) if record.board == topic.board else None
        return None

    def key_of(self, kid: bytes) -> bytes | None:
        return self.keys.get(kid.decode("utf-8", "replace"))

    def _ask_at(self, asked: Asked) -> None:
        for _ in range(len(asked.boards)):
            board = self.boards[asked.boards[0]]
            if board.up and not board.node.draining:
                board.ask(asked)
                return
            asked.boards.rotate(-1)
        self._homeless.append(asked)


def main(arguments: list[str]) -> int:
    from tests.fleet_weather import ride_out

    if not 1 <= len(arguments) <= 2:
        print(__doc__)
        return 2
    if len(arguments) == 1:
        print(asyncio.run(ride_out(int(arguments[0]), verbose=True)))
        return 0
    first, count = map(int, arguments)
    started_s, broken, total = time.perf_counter(), 0, Counter[str]()
    for seed in range(first, first + count):
        try:
            total += asyncio.run(ride_out(seed)).outcomes
        except Exception as error:  # noqa: BLE001  (every kind of failure is counted and shown)
            broken += 1
            print(f"{type(error).__name__}: {error}; python -m tests.virtual_fleet {seed}", flush=True)
    elapsed_s = time.perf_counter() - started_s
    print(f"{count} seeds, {broken} broken, {count / elapsed_s:.1f} seeds/s; {dict(total)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
