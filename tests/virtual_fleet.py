"""A fleet on virtual time: real nodes, real ledgers and real clients over the loopback broker, with a fault for every occasion.

Owns the clients, the trace and what must hold across boards.  Rules:

* Everything is drawn from one seed and happens in timers of one clock: a seed reproduces its run, to the same trace digest.
* A killed board comes back with a higher boot epoch and ``recover``.
* A promise that breaks raises ``BrokenPromiseError`` at the event that broke it.

Run one seed, with its trace: ``python -m tests.virtual_fleet SEED``; many: ``python -m tests.virtual_fleet FIRST COUNT``.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from random import Random

from edge_agent.broker_client import BrokerClient
from edge_agent.core.chat import CHAT, ChatMessage, Turn, TurnEnd
from edge_agent.core.clock import VirtualClock
from edge_agent.core.config import QueueSection
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import AnswerPart, InferenceRequest, InferenceResult, Limits, ModelOffer, Status, Tensor
from edge_agent.gossip.presence import Standing, open_presence
from edge_agent.gossip.record import open_record
from edge_agent.node.streams import end_of, turn_of, turn_request
from edge_agent.sim.shell import TICK_US
from edge_agent.store.ledger import Bounds
from edge_agent.transport.link import Message
from edge_agent.transport.loopback import Faults, LoopbackBroker, LoopbackLink
from edge_agent.transport.topics import Kind, Topics
from tests.scripted_speaker import answer_to
from tests.virtual_board import FLEET, LINK, TASK, Asked, VirtualBoard, seed_of

MEMORY_FOLDER = Path("/dev/shm")


class BrokenPromiseError(AssertionError):
    """Something that must hold did not; the message says what, when and with which seed."""


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

    def turn(self, tokens: int = 20, deadline_us: int = 60_000_000, session: str = "") -> InferenceRequest:
        """A new turn of talk, its answer ``tokens`` words that nobody else gets."""
        self._requests += 1
        request_id = sha256(f"{self.seed} {self._requests}".encode()).digest()[:16].hex()
        turn = Turn((ChatMessage("user", f"{self._requests:x}~{request_id}"),), max_tokens=tokens, session=session)
        return turn_request(request_id, turn, None, Limits(deadline_us))

    def show(self, asked: Asked, part: AnswerPart) -> None:
        """A client is given a part of its answer."""
        whole = answer_to(turn_of(asked.request))[0]
        here = whole[part.offset : part.end]
        self.promise(part.text == here, f"request {part.request_id} is shown {part.text!r} for {here!r}")
        asked.parts += 1
        for _ in asked.seen.take(part):
            pass

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
        on_part = (lambda part: self.show(asked, part)) if request.task == CHAT else None
        asked.future = self.clients[client].ask(request, *boards, on_part=on_part)
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
        if result.status is Status.OK and asked.request.task == CHAT:
            self._check_turn(asked, end_of(result))
        elif result.status is Status.OK:
            self.promise(result.outputs["echo"].data == bytes.fromhex(request_id), f"request {request_id} got another's outputs")
        asked.answers.append(result)

    def _check_turn(self, asked: Asked, end: TurnEnd) -> None:
        turn = turn_of(asked.request)
        whole, request_id = answer_to(turn)[0], asked.request.request_id
        self.promise(end.text == whole, f"the answer to turn {request_id} is whole: {end.text!r} for {whole!r}")
        self.promise(end.completion_tokens == turn.max_tokens, f"turn {request_id} counts {end.completion_tokens} tokens")
        seen = asked.seen.text
        self.promise(whole.startswith(seen), f"what turn {request_id} was shown is the beginning of its answer")
        self.promise(not asked.client or seen == whole, f"turn {request_id} was shown all of it before its end")

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
        """Every board knows every other one as online, by the same record, and holds the same table."""

        def agreed() -> bool:
            known = [{record.board: record.version for record in board.node.fleet.records()} for board in self.boards.values()]
            newest = {name: version for records in known for name, version in records.items()}
            everyone = all(board.node.online_boards == len(self.boards) for board in self.boards.values())
            tables = {board.node.agreement.digest for board in self.boards.values()}
            same = all(newest[name] == version for records in known for name, version in records.items())
            return everyone and same and len(tables) == 1

        self.run_until(agreed, within_us, "all boards know each other, by the same records, and hold the same table")

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
        if seed > first and (seed - first) % 500 == 0:
            print(f"{seed - first} of {count} seeds, {broken} broken", flush=True)
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
