"""A board that attests by hand, honestly or not, and a verifier with its epochs that hears what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from edge_agent.attest.appraisal import Appraisal, open_appraisal, sign_appraisal
from edge_agent.attest.epoch import Epochs
from edge_agent.attest.evidence import NO_DIGEST, Measurements, ModelMeasurement, Quote, open_quote, quote_digest, sign_quote
from edge_agent.attest.receipts import Receipt, open_receipt, receipt_digest, sign_receipt
from edge_agent.attest.settings import AttestSettings, References
from edge_agent.attest.verifier import Verifier
from edge_agent.attest.words import Action, OperatorWord
from edge_agent.core.values import EnergyKind, TrustTier
from tests.attested import digest, signer

EPOCH_US = 30_000_000
MODEL = ModelMeasurement("blazeface", digest("blazeface"), digest("blazeface"), digest("golden"))
GOOD = Measurements(digest("code"), digest("library"), "litert", digest("policy"), models=(MODEL,))
REFERENCES = References(
    code=frozenset({digest("code")}),
    libraries=frozenset({digest("library"), digest("delegate")}),
    models=frozenset({digest("blazeface")}),
    golden={(digest("blazeface"), "litert"): frozenset({digest("golden")})},
    policy=frozenset({digest("policy")}),
)
HOUSE = ("a", "b", "c", "d")


def keys_of(boards: tuple[str, ...]) -> dict[str, bytes]:
    return {board: signer(board).public_key for board in boards}


def settings(**changes: Any) -> AttestSettings:
    basis = {"references": REFERENCES, "software_tier": TrustTier.AFFIRMING}
    return AttestSettings(secret=digest("secret"), bootseed=digest("boot"), **{**basis, **changes})


@dataclass
class Board:
    """What a board that attests has: its key, its counters. ``replace`` and ``copy`` make those that cheat."""

    name: str = "b"
    bootcount: int = 1
    counter: int = 0
    previous: bytes = NO_DIGEST
    receipts: int = 0
    head: bytes = NO_DIGEST
    measured: Measurements = GOOD
    seed: bytes = b""

    def boot(self) -> None:
        self.bootcount, self.counter, self.previous, self.seed = self.bootcount + 1, 0, NO_DIGEST, b""

    def copy(self) -> Board:
        return replace(self)

    def quote(self, *nonces: bytes, **changes: Any) -> bytes:
        """The next quote, signed."""
        self.counter += 1
        quote = Quote(
            board=self.name, nonces=nonces, bootcount=self.bootcount, counter=self.counter, previous=self.previous,
            bootseed=self.seed or digest(f"{self.name}{self.bootcount}"), issued_s=0, uptime_s=0, hardware="", emulated=False,
            version="1", measurements=self.measured, receipts=self.receipts, receipts_head=self.head,
        )  # fmt: skip
        message = sign_quote(replace(quote, **changes), signer(self.name))
        self.previous = quote_digest(message)
        return message

    def receipt(self, request: int = 0, **changes: Any) -> bytes:
        """The next receipt, signed."""
        self.receipts += 1
        number = digest(f"request {request or self.receipts}")
        receipt = Receipt(
            board=self.name, bootcount=self.bootcount, quote=self.counter, counter=self.receipts, previous=self.head,
            request_id=number.hex()[:32], request=number, model="blazeface", model_digest=digest("blazeface"), inputs=number,
            outputs=number, parents=(), started_us=0, busy_us=1, energy_uj=0, energy_kind=EnergyKind.ESTIMATED,
        )  # fmt: skip
        message = sign_receipt(replace(receipt, **changes), signer(self.name))
        self.head = receipt_digest(message)
        return message


@dataclass
class Watch:
    """A verifier at work: its epochs, its ledger, its time."""

    name: str = "a"
    members: tuple[str, ...] = HOUSE
    attest: AttestSettings = field(default_factory=settings)
    boot_epoch: int = 1
    now_us: int = 0
    kept: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start()

    def start(self, kept: dict[str, bytes] | None = None) -> None:
        """The verifier starts, with what was kept: it forgets the rest, its nonces too."""
        secret = digest(f"secret {self.name} {self.boot_epoch}")
        self.verifier = Verifier(self.name, self.boot_epoch, keys_of(self.members), self.attest)
        self.epochs = Epochs(self.name, self.boot_epoch, secret, EPOCH_US)
        for board, data in (kept or {}).items():
            self.verifier.recall(board, data)
        self.turn()

    def restart(self, *, lost: bool = False) -> None:
        self.boot_epoch += 1
        self.start({} if lost else self.kept)

    def turn(self, link_was_up: bool = True) -> None:
        mark = self.epochs.turn(self.now_us)
        assert mark is not None
        self.nonce = mark.nonce
        self.verifier.epoch_over(self.now_us, link_was_up)

    def turn_after(self, interval_us: int, link_was_up: bool = True) -> None:
        self.now_us += interval_us
        self.turn(link_was_up)

    def epoch(self, link_was_up: bool = True) -> tuple[str, ...]:
        """A whole epoch goes by: who was challenged in it."""
        self.now_us += EPOCH_US // 2
        asked = self.verifier.to_challenge(self.now_us)
        self.now_us += EPOCH_US // 2
        self.turn(link_was_up)
        self.keep()
        return asked

    def keep(self, everything: bool = False) -> None:
        self.kept |= self.verifier.to_keep(self.now_us, everything)

    def challenge(self, board: str) -> bytes:
        challenge = self.epochs.challenge(board)
        assert challenge is not None
        return challenge.nonce

    def hear(self, *messages: bytes) -> str:
        """Quotes, as the broker brings them. Returns what the verifier says of the last."""
        for message in messages:
            quote = open_quote(message, self.key)
            why = self.verifier.hear_quote(message, quote, self.epochs.fresh(quote))
        self.keep()
        return why

    def hear_receipt(self, message: bytes) -> str:
        why = self.verifier.hear_receipt(message, open_receipt(message, self.key))
        self.keep()
        return why

    def tell(self, *others: Watch) -> list[Appraisal]:
        """What is due is published, and heard by others as it is on the wire."""
        due = self.verifier.appraisals_due(self.now_us)
        for appraisal in due:
            message = sign_appraisal(appraisal, signer(self.name))
            for other in others:
                other.verifier.hear_appraisal(open_appraisal(message, other.key))
                other.keep()
        return due

    def word(self, board: str, action: Action, serial: int = 1) -> bool:
        taken = self.verifier.hear_word(OperatorWord("ops", board, serial, action, "as it is"))
        self.keep()
        return taken

    def tier(self, board: str = "b") -> TrustTier:
        return self.verifier.verdict(board).tier

    def reasons(self, board: str = "b") -> str:
        return "; ".join(self.verifier.verdict(board).reasons)

    def key(self, kid: bytes) -> bytes | None:
        return keys_of(self.members).get(kid.decode())
