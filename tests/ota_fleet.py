"""A fleet of boards that take a release by a rollout, on virtual time over the loopback broker.

Owns the operator's machine and what must hold across boards; ``tests.ota_weather`` has the faults.  Rules:

* Everything is drawn from one seed and happens in timers of one clock: a seed reproduces its run, to the same trace digest.
* Held at every decision of every board: nobody begins before the waves before it have truly settled; what serves is whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from random import Random

from edge_agent.core.clock import VirtualClock
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.transport.link import Delivered, LinkEvent, LinkUp, Message
from edge_agent.transport.loopback import Faults, LoopbackBroker, LoopbackLink
from edge_agent.transport.topics import Kind, Topics
from ota import events
from ota.chunks import Artefact, artefact_of, encode_chunk, open_wants
from ota.giving import Giving
from ota.manifest import CHUNK_BYTES, Release, ReleasedFile, encode_release, manifest_path
from ota.manifest import Kind as ReleaseKind
from ota.orders import sign_rollout
from ota.rollout import Action, Plan, Progress, Rollout, Standing, Step, Verdict, order_boards, ordered, waves
from tests.ota_board import FLEET, LIBRARY, LINK, MODEL, SOUND, UpdatingBoard

BACKENDS = ("jetson", "coral", "raspberry_pi")
OPERATOR = "ann"
NUMBER = 7
CARD = Path(__file__).parents[1] / "models" / "catalog" / f"{MODEL}.toml"
SETTLE_US = 600_000_000
WEATHER_US = 90_000_000
STEP_US = 500_000
BEGUN = (Step.FETCHING, Step.TRIAL, Step.CONFIRMED, Step.FAILED)
ENDS = (Standing.STOPPED, Standing.ABORTED, Standing.DONE)
Flaw = Callable[[str, str], str]
"""``flaw(board, when)``: what is wrong with the release there when it is loaded, probed or run."""


class BrokenPromiseError(AssertionError):
    """Something that must hold did not; the message says what, when and with which seed."""


def piece(data: bytes, index: int) -> bytes:
    return data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


def a_release(size_bytes: int = CHUNK_BYTES + 5_000) -> tuple[Release, bytes]:
    """A picture model of two pieces, whose golden answer is known for the simulated library; and its bytes."""
    data = Random(NUMBER).randbytes(size_bytes)
    pieces = [piece(data, index) for index in range(-(-size_bytes // CHUNK_BYTES))]
    digests = b"".join(sha256(each).digest() for each in pieces)
    file = ReleasedFile("model.tflite", size_bytes, sha256(data).digest(), digests)
    card = f'{CARD.read_text()}\n[golden]\n{LIBRARY} = "{SOUND.hex()}"\n'
    return Release(MODEL, NUMBER, ReleaseKind.PERCEPTION, (file,), card), data


class OperatorMachine:
    """Publishes the metadata and the rollout, and gives pieces, while it is there."""

    def __init__(self, fleet: OtaFleet) -> None:
        self.fleet = fleet
        self.signer = Signer(OPERATOR.encode(), sha256(OPERATOR.encode()).digest())
        release, data = a_release()
        manifest = encode_release(release)
        whole = Artefact(sha256(manifest).digest(), len(manifest))
        self.held = {whole.digest: (whole, manifest), release.files[0].digest: (artefact_of(release.files[0]), data)}
        self.targets = {manifest_path(MODEL, NUMBER): (len(manifest), whole.digest)}
        self.manifest = whole.digest
        self.rollout: Rollout | None = None
        self.there = False

    def come(self) -> None:
        if self.there:
            return
        self.fleet.note("the operator comes")
        self.there = True
        self.giving = Giving(OPERATOR, first=True)
        for artefact, _ in self.held.values():
            self.giving.hold(artefact)
        self.link = LoopbackLink(self.fleet.broker, OPERATOR, LINK)
        self.link.open(self._hear)

    def go(self) -> None:
        """Without a goodbye: its machine is shut."""
        if self.there:
            self.fleet.note("the operator goes")
            self.there = False
            self.link.crash()

    def order(self, rollout: Rollout) -> None:
        self.fleet.note(f"{rollout.action.value}, revision {rollout.revision}")
        self.rollout = rollout
        self._say()

    def change(self, action: Action) -> None:
        """The next word on the plan, if there is one."""
        if self.rollout is not None and self.there:
            with suppress(RefusedError):
                self.order(ordered(self.rollout, OPERATOR, action, "as the dice fell"))

    def _hear(self, event: LinkEvent) -> None:
        match event:
            case LinkUp():
                self.link.subscribe(self.fleet.topics.every(Kind.OTA_WANT))
                self._say()
            case Delivered(message, token):
                with suppress(RefusedError):
                    self.giving.heard_wants(open_wants(message.payload, self.fleet.key_of), self.fleet.now_us)
                self.link.acknowledge(token)
                self._give()

    def _say(self) -> None:
        topics = self.fleet.topics
        with suppress(UnavailableError):
            self.link.publish(Message(topics.ota_meta("timestamp"), b"version 1", retain=True))
            if self.rollout is not None:
                self.link.publish(Message(topics.rollout(MODEL), sign_rollout(self.rollout, self.signer), retain=True))

    def _give(self) -> None:
        while self.there and self.link.up and (due := self.giving.next(self.fleet.now_us)):
            digest, index = due
            artefact, data = self.held[digest]
            payload = data[index * artefact.step_bytes :][: artefact.piece_bytes(index)]
            self.link.publish(Message(self.fleet.topics.ota_chunk(digest.hex()), encode_chunk(index, payload)))
            self.giving.sent(digest, index, self.fleet.now_us)
        if self.there and (next_us := self.giving.next_us(self.fleet.now_us)) is not None:
            self.fleet.after(max(1_000, next_us - self.fleet.now_us), self._give_again)

    def _give_again(self) -> None:
        if self.there and self.link.up:
            self._give()


class OtaFleet:
    """``boards`` boards of three classes of hardware, an operator, and a release whose ``flaw`` is told by board and occasion."""

    def __init__(self, seed: int | str, boards: int, flaw: Flaw, verbose: bool = False) -> None:
        self.seed, self.verbose, self._flaw = seed, verbose, flaw
        self.random = Random(f"ota {seed}")
        self.clock = VirtualClock()
        self.broker = LoopbackBroker(self.clock, seed)
        self.topics = Topics(FLEET)
        self._trace = sha256()
        self.settled: set[str] = set()
        self.begun: set[str] = set()
        names = [f"b{i:02d}" for i in range(boards)]
        self.backends = {name: BACKENDS[i % len(BACKENDS)] for i, name in enumerate(names)}
        self.boards = {name: UpdatingBoard(self, name, self.backends[name]) for name in names}
        self.keys = {name: board.signer.public_key for name, board in self.boards.items()}
        self.operator = OperatorMachine(self)
        self.operators = {OPERATOR: self.operator.signer.public_key}
        self.plan: Plan | None = None

    # what the boards see of it

    @property
    def now_us(self) -> int:
        return self.clock.monotonic_us()

    def after(self, interval_us: int, callback: Callable[[], object]) -> None:
        self.clock.call_at(self.now_us + interval_us, callback)

    def key_of(self, kid: bytes) -> bytes | None:
        return self.keys.get(kid.decode("utf-8", "replace"))

    def listed(self, offered: events.List) -> events.Listed | events.NotListed:
        targets = {path: self.operator.targets[path] for path in offered.wanted if path in self.operator.targets}
        return events.Listed(targets, {"tuf/timestamp/sim": 1})

    def flaw(self, release: int, board: str, when: str) -> str:
        return self._flaw(board, when) if release == NUMBER else ""

    def looked_at(self, board: UpdatingBoard) -> None:
        """A promise at every decision: nobody begins before its turn."""
        said = board.progress
        if said is None or self.plan is None or said.serial != self.plan.serial:
            return
        if said.step in BEGUN and board.name not in self.begun:
            self.begun.add(board.name)
            self._check_turn(self.plan, board.name)
        if said.lost or said.step in (Step.CONFIRMED, Step.REFUSED):
            self.settled.add(board.name)

    def _check_turn(self, plan: Plan, board: str) -> None:
        every = waves(plan)
        own = next(at for at, wave in enumerate(every) if board in wave)
        for at, wave in enumerate(every[:own]):
            settled, needed_permille = len(self.settled & set(wave)), plan.settled_permille if at else 1000
            kept = settled * 1000 >= needed_permille * len(wave)
            self.promise(kept, f"{board} of wave {own} begins when {settled} of {len(wave)} of wave {at} have settled")

    # the run

    def push(self, canary: int, wave: int, max_error_permille: int = 20, settled_permille: int = 900) -> None:
        order = order_boards(self.boards, self.backends, serial=1)
        self.plan = Plan(
            1_790_000_000_000_000, MODEL, NUMBER, self.operator.manifest, order, canary, wave, max_error_permille,
            settled_permille,
        )  # fmt: skip
        self.operator.order(Rollout(self.plan, OPERATOR))

    def boot(self) -> None:
        for board in self.boards.values():
            board.boot()
        self.operator.come()

    def run_for(self, interval_us: int) -> None:
        self.clock.advance(interval_us)

    def run_until(self, predicate: Callable[[], object], what: str, within_us: int = SETTLE_US) -> None:
        end_us = self.now_us + within_us
        while not predicate():
            self.promise(self.now_us < end_us, f"within {within_us // 1_000_000} s: {what}; {self.summary()}")
            self.run_for(STEP_US)

    def calm(self) -> None:
        """All faults end and whoever was away is back."""
        self.note("calm")
        self.broker.wire.faults = Faults()
        self.broker.heal()
        if not self.broker.running:
            self.broker.start()
        for board in self.boards.values():
            board.dies = ""
        for board in self.boards.values():
            board.boot()

    # what is known of it

    def verdicts(self) -> list[Verdict | None]:
        """Of every board that is up."""
        return [board.course.words.verdict(MODEL) for board in self.boards.values() if board.up]

    def agree_on(self, *states: Standing) -> bool:
        """Everybody is up and judges alike."""
        return self.agree_on_among(len(self.boards), *states)

    def agree_on_among(self, boards: int, *states: Standing) -> bool:
        """So many boards are up, and they judge alike."""
        verdicts = self.verdicts()
        return len(verdicts) == boards and all(each is not None and each.state in states for each in verdicts)

    def has_arrived(self) -> bool:
        """Everybody judges alike and serves what follows from that, by the records too; nobody is about to do anything."""
        verdicts = self.verdicts()
        first = verdicts[0] if verdicts else None
        if first is None or first.state not in ENDS or len(verdicts) < len(self.boards) or any(v != first for v in verdicts):
            return False
        return self.at_rest() and all(
            board.serving == board.slots.running.number == self._due(first, name) for name, board in self.boards.items()
        )

    def _due(self, verdict: Verdict, board: str) -> int:
        return 0 if verdict.over or board in verdict.lost else NUMBER

    def at_rest(self) -> bool:
        """Nobody is about to do anything."""
        return all(board.at_rest for board in self.boards.values())

    def progress(self) -> dict[str, Progress]:
        known = {name: board.progress for name, board in self.boards.items() if board.up}
        return {name: said for name, said in known.items() if said is not None}

    def summary(self) -> str:
        steps = Counter(said.step.value for said in self.progress().values())
        states = Counter(each.state.value if each else "nothing heard" for each in self.verdicts())
        serving = Counter(board.serving for board in self.boards.values())
        return f"steps {dict(steps)}, verdicts {dict(states)}, serving {dict(serving)}"

    @property
    def trace_digest(self) -> str:
        return self._trace.hexdigest()

    def note(self, text: str) -> None:
        line = f"{self.now_us / 1e6:10.6f} {text}"
        self._trace.update(line.encode())
        if self.verbose:
            print(line)

    def promise(self, kept: object, text: str) -> None:
        if not kept:
            remedy = f"reproduce it with: python -m tests.ota_weather {self.seed}"
            raise BrokenPromiseError(f"seed {self.seed} at {self.now_us / 1e6:.6f} s: not so: {text}; {remedy}")
