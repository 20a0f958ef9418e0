"""A fleet on paper: boards that sign receipts, quotes and appraisals as real ones do, without running anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from random import Random

from edge_agent.attest.appraisal import Appraisal, Vector, sign_appraisal
from edge_agent.attest.evidence import NO_DIGEST, Measurements, ModelMeasurement, Quote, quote_digest, sign_quote
from edge_agent.attest.proof import Asked, Proof, gathered
from edge_agent.attest.receipts import Receipt, receipt_digest, sign_receipt
from edge_agent.attest.testimony import Anchors
from edge_agent.core.cose import Signer
from edge_agent.core.digests import output_digest, request_digest, tensors_digest
from edge_agent.core.values import EnergyKind, InferenceRequest, InferenceResult, Status, Tensor, TrustTier

BOARDS = ("attic", "cellar", "desk", "hall", "porch")
MODELS = {name: sha256(name.encode()).digest() for name in ("detector", "landmarks", "talker")}
SIGNERS = {board: Signer(board.encode(), sha256(board.encode()).digest()) for board in BOARDS}
MEMBERS = {board: signer.public_key for board, signer in SIGNERS.items()}
RELEASES = frozenset(MODELS.values())
ANCHORS = Anchors(MEMBERS, RELEASES)
START_US = 1_700_000_000_000_000


def find_key(kid: bytes) -> bytes | None:
    return MEMBERS.get(kid.decode("utf-8", "replace"))


def request(number: int, parents: Sequence[bytes] = ()) -> InferenceRequest:
    pixels = number.to_bytes(4, "little")
    return InferenceRequest(f"{number:032x}", "detect_faces", {"image": Tensor("uint8", (4,), pixels)}, parents=tuple(parents))


def result(asked: InferenceRequest, board: str, model: str = "detector") -> InferenceResult:
    outputs = {"boxes": Tensor("uint8", (4,), sha256(asked.request_id.encode()).digest()[:4])}
    return InferenceResult(asked.request_id, Status.OK, board, model, MODELS[model], outputs, 1200, 340, EnergyKind.MEASURED)


@dataclass
class PaperBoard:
    """One board's boot, quotes and chain; ``receipts`` and ``quotes`` are as signed, with what they say."""

    name: str
    bootcount: int = 1
    quotes: list[tuple[Quote, bytes]] = field(default_factory=list)
    receipts: list[tuple[Receipt, bytes]] = field(default_factory=list)

    @property
    def signer(self) -> Signer:
        return SIGNERS[self.name]

    @property
    def quote_number(self) -> int:
        return sum(quote.bootcount == self.bootcount for quote, _ in self.quotes)

    @property
    def head(self) -> bytes:
        return receipt_digest(self.receipts[-1][1]) if self.receipts else NO_DIGEST

    def quote(self, **changes: object) -> bytes:
        own = [message for quote, message in self.quotes if quote.bootcount == self.bootcount]
        models = tuple(ModelMeasurement(name, digest, digest) for name, digest in sorted(MODELS.items()))
        quote = Quote(
            board=self.name,
            nonces=(),
            bootcount=self.bootcount,
            bootseed=sha256(f"{self.name} {self.bootcount}".encode()).digest(),
            counter=len(own) + 1,
            previous=quote_digest(own[-1]) if own else NO_DIGEST,
            issued_s=START_US // 1_000_000,
            uptime_s=1,
            hardware="paper",
            emulated=True,
            version="0.1.0",
            measurements=Measurements(bytes(32), bytes(32), "none", bytes(32), models=models),
            receipts=len(self.receipts),
            receipts_head=self.head,
        )
        quote = replace(quote, **changes)  # type: ignore[arg-type]
        message = sign_quote(quote, self.signer)
        self.quotes.append((quote, message))
        return message

    def receipt(self, asked: InferenceRequest, given: InferenceResult, **changes: object) -> bytes:
        receipt = Receipt(
            board=self.name,
            bootcount=self.bootcount,
            quote=self.quote_number,
            counter=len(self.receipts) + 1,
            previous=self.head,
            request_id=asked.request_id,
            request=request_digest(asked),
            model=given.model,
            model_digest=given.model_digest,
            inputs=tensors_digest(asked.inputs),
            outputs=output_digest(asked.task, given.outputs),
            parents=asked.parents,
            started_us=START_US + int(asked.request_id, 16),
            busy_us=given.busy_us,
            energy_uj=given.energy_uj,
            energy_kind=given.energy_kind,
        )
        receipt = replace(receipt, **changes)  # type: ignore[arg-type]
        message = sign_receipt(receipt, self.signer)
        self.receipts.append((receipt, message))
        return message

    def reboot(self) -> None:
        self.bootcount += 1


class PaperFleet:
    """Every board appraises every other one."""

    def __init__(self, boards: Iterable[str] = BOARDS) -> None:
        self.boards = {name: PaperBoard(name) for name in boards}
        self.appraisals: list[tuple[Appraisal, bytes]] = []
        self.asked: list[Asked] = []
        self.wanted: set[bytes] = set()
        """What belongs into the proof."""
        self._sequences: dict[str, int] = defaultdict(int)
        self._numbers = 0

    def quote(self, board: str, tier: TrustTier = TrustTier.AFFIRMING, **changes: object) -> bytes:
        """A quote, appraised by all others."""
        message = self.boards[board].quote(**changes)
        for verifier in self.boards:
            if verifier != board:
                self.appraise(verifier, board, tier)
        return message

    def appraise(self, verifier: str, board: str, tier: TrustTier, **changes: object) -> bytes:
        self._sequences[verifier] += 1
        quote, message = self.boards[board].quotes[-1]
        word = Appraisal(
            verifier, 1, self._sequences[verifier], board, tier, Vector(), evidence=quote_digest(message),
            bootcount=quote.bootcount, counter=quote.counter,
        )  # fmt: skip
        word = replace(word, **changes)  # type: ignore[arg-type]
        signed = sign_appraisal(word, SIGNERS[verifier])
        self.appraisals.append((word, signed))
        return signed

    def run(self, board: str, parents: Sequence[bytes] = (), model: str = "detector", wanted: bool = True) -> bytes:
        """One request that ``board`` answers; its signed receipt. ``wanted``: the proof shall show it."""
        self._numbers += 1
        asked = request(self._numbers, [receipt_digest(each) for each in parents])
        given = result(asked, board, model)
        message = self.boards[board].receipt(asked, given)
        if wanted:
            self.wanted.add(message)
            self.asked.append(Asked.of(asked, replace(given, receipt=message)))
        return message

    def proof(self, **spans: tuple[int, int]) -> Proof:
        quotes = [message for board in self.boards.values() for _, message in board.quotes]
        return gathered(self.wanted, quotes, [message for _, message in self.appraisals], self.asked, spans)


def random_fleet(random: Random) -> PaperFleet:
    """3 to 20 receipts over 3 to 5 boards, with requests of others between them, quotes, and a reboot here and there."""
    fleet = PaperFleet(random.sample(BOARDS, random.randint(3, 5)))
    names = list(fleet.boards)
    for name in names:
        fleet.quote(name, random.choice((TrustTier.AFFIRMING, TrustTier.WARNING)))
    made: list[bytes] = []
    for _ in range(random.randint(3, 20)):
        board = random.choice(names)
        if random.random() < 0.1:
            fleet.boards[board].reboot()
            fleet.quote(board)
        elif random.random() < 0.1:
            fleet.quote(board)
        if random.random() < 0.2:
            fleet.run(board, wanted=False)
        parents = random.sample(made, min(len(made), random.choice((0, 1, 1, 2, 3))))
        made.append(fleet.run(board, parents, random.choice(list(MODELS))))
    return fleet
