"""Honest boards through bad times: how often is one contraindicated that did nothing wrong?

Drives what a node attests and appraises with (``node.attestation`` with its attester, verifier, epochs, receipts and ledger) over
virtual time and a broker that loses, doubles, delays, reorders, keeps back for hours and repeats; boards reboot, lose power in
the middle of a transaction's effects, are cut off for hours, drift, have clocks that are decades off and jump, and are updated.
Rules: everything is drawn from one seed; every signature is made, and checked once, for all boards know the same keys.

``python -m tests.honest_hours 10000`` runs so many board-hours on all cores and prints what was in them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from heapq import heappop, heappush
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from random import Random

from edge_agent.attest.evidence import Measurements, ModelMeasurement
from edge_agent.attest.receipts import open_receipt
from edge_agent.attest.settings import AttestSettings, References
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import EnergyKind, InferenceRequest, InferenceResult, Limits, Status, Tensor, TrustTier
from edge_agent.gossip.record import BoardRecord
from edge_agent.gossip.state import FleetState
from edge_agent.node.attestation import Attestation
from edge_agent.node.events import Effect, Publish
from edge_agent.node.proofs import Proofs
from edge_agent.node.settings import NodeSettings
from edge_agent.node.voice import Voice
from edge_agent.sim.sharing import shared_work
from edge_agent.store.ledger import Ledger
from edge_agent.transport.link import Message
from edge_agent.transport.topics import Kind, Topics

MEMORY_FOLDER = Path("/dev/shm")
SECOND_US, HOUR_US = 1_000_000, 3_600_000_000
BOARDS = ("attic", "cellar", "kitchen", "study")
HOURS = 10
"""Of one fleet: so many board-hours are ``HOURS * len(BOARDS)``."""
EPOCHS_S = (300, 120, 600, 300, 600, 300, 600, 30)
"""By seed, one after the other."""
CALM_EPOCHS = 5
"""At the end nothing befalls anybody any more: then all must trust all."""
RETRY_US = 5 * SECOND_US
FAR_US = 40 * 365 * 24 * HOUR_US
VERSIONS = 4
"""Of the agent, of the interpreter library, and of the model."""


def digest_of(what: str, version: int = 0) -> bytes:
    return sha256(f"{what} {version}".encode()).digest()


REFERENCES = References(
    code=frozenset(digest_of("agent", version) for version in range(VERSIONS)),
    libraries=frozenset(digest_of("library", version) for version in range(VERSIONS)),
    models=frozenset(digest_of("model", version) for version in range(VERSIONS)),
    golden={
        (digest_of("model", model), f"library {library}"): frozenset({digest_of(f"golden {library}", model)})
        for model in range(VERSIONS)
        for library in range(VERSIONS)
    },
    policy=frozenset({digest_of("policy")}),
)
SIGNERS = {board: Signer(board.encode(), digest_of(board)) for board in BOARDS}
MEMBERS = {board: signer.public_key for board, signer in SIGNERS.items()}


def find_key(kid: bytes) -> bytes | None:
    return MEMBERS.get(kid.decode())


@dataclass(slots=True)
class Life:
    """What a board has while it runs."""

    attestation: Attestation
    proofs: Proofs
    began_us: int
    link_up: bool = False


class HonestBoard:
    def __init__(self, fleet: HonestFleet, name: str) -> None:
        self.fleet, self.name, self.random = fleet, name, fleet.random
        self.ledger = Ledger(fleet.folder / name / "ledger.db")
        self.life: Life | None = None
        self.lives = 0
        self.drift_ppm = self.random.randrange(-200, 201)
        self.wall_offset_us = self.random.randrange(-FAR_US, FAR_US)
        self.versions = [0, 0, 0]
        self.waiting: list[tuple[int, Message]] = []
        """What the broker holds for this board while its link is down, and since when."""
        self.reachable = True

    def now_us(self) -> int:
        """By this board's own clock, which begins at its boot and drifts."""
        assert self.life is not None
        passed_us = self.fleet.now_us - self.life.began_us
        return passed_us + passed_us * self.drift_ppm // 1_000_000

    # lives

    def boot(self) -> None:
        self.lives += 1
        with self.ledger.transaction():
            boot_epoch = self.ledger.increment("boot_epoch")
        attest = AttestSettings(
            secret=digest_of(f"secret {self.fleet.seed} {self.name}", self.lives),
            bootseed=digest_of(f"boot {self.fleet.seed} {self.name}", self.lives),
            epoch_us=self.fleet.epoch_us,
            references=REFERENCES,
        )
        settings = NodeSettings(self.name, boot_epoch, SIGNERS[self.name], "simulated", True, members=MEMBERS, attest=attest)
        state = FleetState(self.name)
        for board in BOARDS:
            state.join(BoardRecord(board, 0, 1, "simulated", True, True, 0))
        proofs = Proofs(settings, self.ledger)
        with self.ledger.transaction():
            attestation = Attestation(settings, attest, state, self.ledger, Voice(settings), proofs)
        self.life = Life(attestation, proofs, self.fleet.now_us)
        self.measure()
        self.tick(self.lives)
        self.connect()

    def die(self, *, cleanly: bool) -> None:
        """A clean stop keeps what it knows; when the power goes, what was about to be sent is gone."""
        if self.life is None:
            return
        self.fleet.look_at(self)
        if cleanly:
            with self.ledger.transaction():
                self.life.attestation.keep(self.now_us())
        else:
            self.decide(lambda: self.life.attestation.go_on(self.now_us()) if self.life else (), sent=False)
        self.life = None

    def measure(self) -> None:
        """Now and then it was updated, or has loaded another release of its model."""
        code, library, model = self.versions
        released = digest_of("model", model)
        golden = digest_of(f"golden {library}", model) if self.random.random() < 0.8 else b""
        measured = Measurements(
            digest_of("agent", code),
            digest_of("library", library),
            f"library {library}",
            digest_of("policy"),
            models=(ModelMeasurement("detector", released, released, golden),),
        )
        if self.life is not None:
            self.life.attestation.measured(measured, self.now_us())

    def update(self) -> None:
        """A rolling update restarts the agent; a new release of a model does not."""
        part = self.random.randrange(3)
        self.versions[part] = self.random.randrange(VERSIONS)
        if part == 2:
            self.measure()
        elif self.life is not None:
            self.die(cleanly=True)
            self.fleet.after(self.random.randrange(60 * SECOND_US), self.boot_if_down)

    def boot_if_down(self) -> None:
        if self.life is None:
            self.boot()

    # its link

    def connect(self) -> None:
        if self.life is None or self.life.link_up or not self.reachable:
            return
        self.life.link_up = True
        self.life.attestation.connected()
        self.go_on()
        forgets = self.random.random() < 0.3
        held, self.waiting = self.waiting, []
        retained = [(self.fleet.now_us, message) for message in self.fleet.retained.values()]
        for since_us, message in [*(() if forgets else held), *retained]:
            if not message.expiry_s or self.fleet.now_us - since_us < message.expiry_s * SECOND_US:
                self.fleet.carry(self, message)

    def disconnect(self) -> None:
        if self.life is not None and self.life.link_up:
            self.life.link_up = False
            self.life.attestation.disconnected()

    def hear(self, message: Message) -> None:
        if self.life is None or not self.life.link_up:
            self.waiting.append((self.fleet.now_us, message))
            return
        topic = self.fleet.topics.parse(message.topic)
        if topic.kind is Kind.CHALLENGE and topic.board != self.name:
            return
        self.fleet.counts[f"{topic.kind.name.lower()}s heard"] += 1
        attestation = self.life.attestation
        self.decide(lambda: (*attestation.hear(topic, message, self.now_us()), *attestation.go_on(self.now_us())))

    def hear_receipt(self, message: bytes) -> None:
        if self.life is not None:
            receipt = open_receipt(message, find_key)
            self.fleet.counts["receipts heard"] += 1
            self.fleet.promise(not self.life.attestation.hear_receipt(message, receipt), self, "a receipt contradicts")

    # its work

    def tick(self, life: int) -> None:
        if self.life is None or life != self.lives:
            return
        self.life.proofs.wall_offset_us = self.wall_offset_us
        self.go_on()
        period_us = self.fleet.epoch_us // 4
        self.fleet.after(self.random.randrange(period_us // 2, period_us), lambda: self.tick(life))

    def go_on(self) -> None:
        if self.life is not None:
            attestation = self.life.attestation
            self.decide(lambda: attestation.go_on(self.now_us()))

    def answer(self, asker: HonestBoard) -> None:
        """A request of ``asker`` ran here: its receipt, and not at once."""
        if self.life is None:
            return
        proofs, number = self.life.proofs, self.life.attestation.attester.number
        request_id = self.random.randbytes(16).hex()
        picture = Tensor("uint8", (4,), self.random.randbytes(4))
        request = InferenceRequest(request_id, "detect_faces", {"image": picture}, None, Limits(SECOND_US, None, 0))
        made = InferenceResult(
            request_id, Status.OK, self.name, "detector", digest_of("model", self.versions[2]), {"boxes": picture}, 10, 10,
            EnergyKind.EMULATED,
        )  # fmt: skip
        with self.ledger.transaction():
            result = proofs.signed(request, made, number, self.now_us())
        self.fleet.counts["receipts signed"] += 1
        for _ in range(1 + (self.random.random() < 0.05)):
            self.fleet.after(self.fleet.delay_us(), lambda: asker.hear_receipt(result.receipt))

    def decide(self, step: Callable[[], Iterable[Effect]], *, sent: bool = True) -> None:
        """What a shell does: all in one transaction, then the effects, unless the power goes in between."""
        try:
            with self.ledger.transaction():
                effects = list(step())
        except RefusedError as error:
            self.fleet.promise(False, self, f"an honest message is refused: {error}")
            return
        for effect in effects:
            if isinstance(effect, Publish) and sent:
                self.fleet.publish(self, effect.message)


class HonestFleet:
    """``counts``: what was in the run; ``found``: who was contraindicated, by whom and why."""

    def __init__(self, seed: int, folder: Path, hours: int = HOURS) -> None:
        self.seed, self.folder, self.random = seed, folder, Random(f"honest {seed}")
        self.topics = Topics("home")
        self.epoch_us = EPOCHS_S[seed % len(EPOCHS_S)] * SECOND_US
        self.now_us = 0
        self.end_us = hours * HOUR_US
        self.counts: Counter[str] = Counter()
        self.found: list[str] = []
        self.retained: dict[str, Message] = {}
        self._numbers = count()
        self._timers: list[tuple[int, int, Callable[[], object]]] = []
        self.boards = {name: HonestBoard(self, name) for name in BOARDS}
        self.loss, self.repeats = self.random.choice((0.0, 0.02, 0.2)), self.random.choice((0.0, 0.05))

    def after(self, interval_us: int, callback: Callable[[], object]) -> None:
        heappush(self._timers, (self.now_us + interval_us, next(self._numbers), callback))

    def run(self) -> None:
        """The bad times, then ``CALM_EPOCHS`` without any; at the end everybody trusts everybody again."""
        for board in self.boards.values():
            self.after(self.random.randrange(60 * SECOND_US), board.boot_if_down)
            self.after(self.random.randrange(HOUR_US), lambda board=board: self._befall(board))  # type: ignore[misc]
            self.after(self.random.randrange(HOUR_US), lambda board=board: self._ask(board))  # type: ignore[misc]
        self._run_until(self.end_us)
        self.loss = 0.0
        for board in self.boards.values():
            board.reachable = True
            board.boot_if_down()
            board.connect()
        self._run_until(self.end_us + CALM_EPOCHS * self.epoch_us)
        for board in self.boards.values():
            self.look_at(board)
            assert board.life is not None
            for name in BOARDS:
                tier = board.life.attestation.tier(name)
                self.promise(tier is TrustTier.WARNING, board, f"after the storm {name} is {tier.name}")

    def close(self) -> None:
        for board in self.boards.values():
            board.ledger.close()

    def promise(self, kept: bool, board: HonestBoard, text: str) -> None:
        if not kept:
            self.found.append(f"seed {self.seed}, {self.now_us / HOUR_US:.3f} h, {board.name}: {text}")

    def look_at(self, board: HonestBoard) -> None:
        """Is anything held against anybody?"""
        assert board.life is not None
        for name in board.life.attestation.verifier.boards:
            standing = board.life.attestation.verifier.standing(name)
            found = standing.found if standing else None
            self.promise(found is None, board, f"{name} is contraindicated: {found.reasons if found else ''}")
            self.counts["standings looked at"] += 1
        for name in BOARDS:
            agreed = board.life.attestation.agreed_tier(name)
            self.promise(agreed is not TrustTier.CONTRAINDICATED, board, f"{name} is agreed to be contraindicated")

    # the broker

    def delay_us(self) -> int:
        """Mostly milliseconds; now and then so long that everything else overtakes it."""
        if self.random.random() < 0.01:
            return self.random.randrange(4 * self.epoch_us)
        return self.random.randrange(1_000, 200_000)

    def publish(self, board: HonestBoard, message: Message) -> None:
        """A message that its board takes for sent; a broker that drops it, or a link that is dead unnoticed, tells nobody."""
        assert board.life is not None
        kind = self.topics.parse(message.topic).kind.name.lower()
        self.counts[f"{kind}s sent"] += 1
        if not board.life.link_up or self.random.random() < self.loss:
            self.counts["messages lost"] += 1
            return
        if message.retain:
            self.retained[message.topic] = message
        for other in self.boards.values():
            self.carry(other, message)

    def carry(self, board: HonestBoard, message: Message) -> None:
        if self.random.random() < self.loss:
            self.counts["messages lost"] += 1
            if self.random.random() < 0.5:
                return
            self.after(RETRY_US, lambda: self.carry(board, message))
            return
        self.after(self.delay_us(), lambda: board.hear(message))
        if self.random.random() < self.repeats:
            self.counts["messages repeated"] += 1
            self.after(self.random.randrange(3 * HOUR_US), lambda: board.hear(message))

    # what befalls boards

    def _ask(self, board: HonestBoard) -> None:
        asker = self.boards[self.random.choice(BOARDS)]
        for _ in range(self.random.choice((1, 1, 3, 12))):
            if asker is not board:
                board.answer(asker)
        self.after(self.random.randrange(HOUR_US // 2), lambda: self._ask(board))

    def _befall(self, board: HonestBoard) -> None:
        if self.now_us >= self.end_us:
            return
        random = self.random
        what = random.choice((self._reboot, self._power_cut, self._cut_off, self._jump, self._update, self._flap))
        self.counts[what.__name__.removeprefix("_").replace("_", " ")] += 1
        what(board)
        self.after(random.randrange(HOUR_US), lambda: self._befall(board))

    def _reboot(self, board: HonestBoard) -> None:
        board.die(cleanly=True)
        self.after(self._a_while_us(), board.boot_if_down)

    def _power_cut(self, board: HonestBoard) -> None:
        board.die(cleanly=False)
        self.after(self._a_while_us(), board.boot_if_down)

    def _cut_off(self, board: HonestBoard) -> None:
        board.reachable = False
        self.after(self.random.randrange(60 * SECOND_US), lambda: None if board.reachable else board.disconnect())
        self.after(self._a_while_us() + 60 * SECOND_US, lambda: self._heal(board))

    def _heal(self, board: HonestBoard) -> None:
        board.reachable = True
        board.disconnect()
        board.connect()

    def _flap(self, board: HonestBoard) -> None:
        for step in range(self.random.randrange(2, 8)):
            self.after(step * self.random.randrange(1, 10 * SECOND_US), board.connect if step % 2 else board.disconnect)
        self.after(80 * SECOND_US, board.connect)

    def _jump(self, board: HonestBoard) -> None:
        board.wall_offset_us = self.random.randrange(-FAR_US, FAR_US)

    def _update(self, board: HonestBoard) -> None:
        board.update()

    def _a_while_us(self) -> int:
        """Seconds to hours, as likely as each other."""
        return int(SECOND_US * 10 ** self.random.uniform(0, 4))

    def _run_until(self, end_us: int) -> None:
        while self._timers and self._timers[0][0] <= end_us:
            self.now_us, _, callback = heappop(self._timers)
            callback()
        self.now_us = end_us


@dataclass(frozen=True, slots=True)
class Hours:
    """What so many honest board-hours came to."""

    board_hours: int
    counts: Counter[str]
    found: tuple[str, ...]

    def __add__(self, other: Hours) -> Hours:
        return Hours(self.board_hours + other.board_hours, self.counts + other.counts, self.found + other.found)


NONE = Hours(0, Counter(), ())


def ride_out(seed: int, hours: int = HOURS) -> Hours:
    """One fleet for so many hours."""
    parent = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="sly-honest-", dir=parent) as folder, shared_work():
        fleet = HonestFleet(seed, Path(folder), hours)
        try:
            fleet.run()
        finally:
            fleet.close()
    boots = sum(board.lives for board in fleet.boards.values())
    return Hours(hours * len(BOARDS), fleet.counts + Counter(boots=boots), tuple(fleet.found))


def main(board_hours: int) -> int:
    began_s = time.monotonic()
    fleets = -(-board_hours // (HOURS * len(BOARDS)))
    total = NONE
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for each in pool.map(ride_out, range(fleets)):
            total += each
    for what, how_many in sorted(total.counts.items()):
        print(f"{how_many:12,}  {what}")
    print(*total.found, sep="\n")
    spent_s = time.monotonic() - began_s
    false = sum("contraindicat" in each for each in total.found)
    faults = f"{false} false contraindications, {len(total.found) - false} other faults"
    print(f"{total.board_hours:,} honest board-hours in {spent_s:.0f} s: {faults}")
    return 1 if total.found else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
