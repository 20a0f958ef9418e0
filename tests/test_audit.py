"""A proof that was tampered with is found out, and the link that broke is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import count
from random import Random

import pytest

from edge_agent.attest import audit as audit_module
from edge_agent.attest import testimony as testimony_module
from edge_agent.attest.appraisal import sign_appraisal
from edge_agent.attest.audit import verify
from edge_agent.attest.evidence import Quote, sign_quote
from edge_agent.attest.proof import FORM, Proof, decode_proof, encode_proof
from edge_agent.attest.receipts import Receipt, receipt_digest, sign_receipt
from edge_agent.core.cbor import encode
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from tests.proofs import ANCHORS, MODELS, SIGNERS, PaperFleet, find_key, random_fleet

TAMPERINGS = 10_000
A_FLEET = 40
"""So many tamperings of each random fleet."""

Found = tuple[Proof | bytes, set[bytes]]
"""What a tampering made, and the digests of the links that may be named for it; bytes: it must not even be read."""


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the same bytes again is not worked out again: it is a pure function of them."""
    for module, name in (
        (audit_module, "open_receipt"), (testimony_module, "open_quote"), (testimony_module, "open_appraisal"),
    ):  # fmt: skip
        opened = lru_cache(maxsize=4096)(lambda message, real=getattr(module, name): real(message, find_key))
        monkeypatch.setattr(module, name, lambda message, _, opened=opened: opened(message))


def flipped(message: bytes, random: Random) -> bytes:
    at = random.randrange(8 * len(message))
    changed = bytearray(message)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def exchanged(messages: tuple[bytes, ...], old: bytes, new: bytes | None) -> tuple[bytes, ...]:
    return tuple(sorted({each for each in messages if each != old} | ({new} if new else set())))


class Tampering:
    """One attacker on one proof; each method is a way to tamper, and gives ``None`` where there is nothing to tamper with."""

    def __init__(self, fleet: PaperFleet, random: Random) -> None:
        self.fleet, self.random, self.proof = fleet, random, fleet.proof()
        self.receipts = {message: said for board in fleet.boards.values() for said, message in board.receipts}
        self.quotes = {message: said for board in fleet.boards.values() for said, message in board.quotes}
        self.appraisals = {message: said for said, message in fleet.appraisals}

    def one(self) -> tuple[bytes, Receipt]:
        message = self.random.choice(self.proof.receipts)
        return message, self.receipts[message]

    def after(self, message: bytes) -> set[bytes]:
        """What leans on a receipt: those that came from it, the next of its board, and who asked for it."""
        digest, said = receipt_digest(message), self.receipts[message]
        leaning = {
            receipt_digest(other)
            for other in self.proof.receipts
            if digest in self.receipts[other].parents
            or (self.receipts[other].board == said.board and self.receipts[other].counter > said.counter)
        }
        return leaning | {digest}

    def instead(self, old: bytes, new: bytes) -> Found:
        tampered = replace(self.proof, receipts=exchanged(self.proof.receipts, old, new))
        return tampered, self.after(old) | {receipt_digest(new)}

    def resigned(self, **changes: object) -> Found:
        """The board itself, hostile, signs another receipt in the place of one that it gave."""
        message, said = self.one()
        return self.instead(message, sign_receipt(replace(said, **changes), SIGNERS[said.board]))  # type: ignore[arg-type]

    def flip_receipt(self) -> Found:
        message, _ = self.one()
        changed = flipped(message, self.random)
        return replace(self.proof, receipts=exchanged(self.proof.receipts, message, changed)), {receipt_digest(changed)}

    def flip_quote(self) -> Found:
        message = self.random.choice(self.proof.quotes)
        changed = flipped(message, self.random)
        return replace(self.proof, quotes=exchanged(self.proof.quotes, message, changed)), {receipt_digest(changed)}

    def flip_appraisal(self) -> Found:
        message = self.random.choice(self.proof.appraisals)
        changed = flipped(message, self.random)
        return replace(self.proof, appraisals=exchanged(self.proof.appraisals, message, changed)), {receipt_digest(changed)}

    def flip_file(self) -> Found | None:
        """Anywhere in the file: what can still be read is another proof, and not a sound one."""
        changed = flipped(encode_proof(self.proof), self.random)
        try:
            return decode_proof(changed), set()
        except RefusedError:
            return changed, set()

    def cut_file(self) -> Found:
        data = encode_proof(self.proof)
        return data[: self.random.randrange(len(data))], set()

    def drop_receipt(self) -> Found:
        message, _ = self.one()
        return replace(self.proof, receipts=exchanged(self.proof.receipts, message, None)), self.after(message)

    def drop_appraisals(self) -> Found:
        _, said = self.one()
        left = tuple(each for each in self.proof.appraisals if self.appraisals[each].board != said.board)
        of_board = {receipt_digest(each) for each in self.proof.receipts if self.receipts[each].board == said.board}
        return replace(self.proof, appraisals=left), of_board

    def swap_answers(self) -> Found:
        one, other = self.random.sample(self.proof.asked, 2)
        swapped = {one.request_id: replace(one, outputs=other.outputs), other.request_id: replace(other, outputs=one.outputs)}
        asked = tuple(swapped.get(each.request_id, each) for each in self.proof.asked)
        return replace(self.proof, asked=asked), {one.receipt, other.receipt}

    def swap_receipts_of_requests(self) -> Found:
        one, other = self.random.sample(self.proof.asked, 2)
        swapped = {one.request_id: replace(one, receipt=other.receipt), other.request_id: replace(other, receipt=one.receipt)}
        asked = tuple(swapped.get(each.request_id, each) for each in self.proof.asked)
        return replace(self.proof, asked=asked), {one.receipt, other.receipt}

    def duplicate(self) -> Found:
        message, _ = self.one()
        return encode({1: FORM, 2: [*self.proof.receipts, message]}), set()

    def reorder(self) -> Found:
        receipts = list(self.proof.receipts)
        at, to = self.random.sample(range(len(receipts)), 2)
        receipts[at], receipts[to] = receipts[to], receipts[at]
        return encode({1: FORM, 2: receipts}), set()

    def reparent_by_a_stranger(self) -> Found:
        """Another board, or nobody of the fleet, signs in its name."""
        message, said = self.one()
        thief = self.random.choice([SIGNERS[name] for name in self.fleet.boards if name != said.board] + [STRANGER])
        signer = self.random.choice((thief, Signer(said.board.encode(), b"\5" * 32)))
        new = sign_receipt(replace(said, parents=self.other_parents(said)), signer)
        tampered, _ = self.instead(message, new)
        return tampered, {receipt_digest(new)}

    def reparent_by_itself(self) -> Found:
        message, said = self.one()
        return self.instead(message, sign_receipt(replace(said, parents=self.other_parents(said)), SIGNERS[said.board]))

    def other_parents(self, said: Receipt) -> tuple[bytes, ...]:
        others = [receipt_digest(each) for each in self.proof.receipts]
        parents = tuple(self.random.sample(others, min(len(others), self.random.randint(0, 3))))
        return parents if parents != said.parents else (*said.parents[1:], self.random.randbytes(32))

    def exchange_model(self) -> Found:
        return self.resigned(model_digest=self.random.randbytes(32))

    def exchange_released_model(self) -> Found:
        message, said = self.one()
        other = self.random.choice([digest for digest in MODELS.values() if digest != said.model_digest])
        return self.instead(message, sign_receipt(replace(said, model_digest=other), SIGNERS[said.board]))

    def exchange_outputs(self) -> Found:
        return self.resigned(outputs=self.random.randbytes(32))

    def count_again(self) -> Found | None:
        message, said = self.one()
        if said.counter == 1:
            return None
        counter = said.counter + self.random.randint(1, 40)
        return self.instead(message, sign_receipt(replace(said, counter=counter), SIGNERS[said.board]))

    def replay(self) -> Found | None:
        """An old receipt of the same board, in the place of the one that was asked for."""
        message, said = self.one()
        old = [other for other, each in self.receipts.items() if each.board == said.board and other not in self.proof.receipts]
        return self.instead(message, self.random.choice(old)) if old else None

    def add_old(self) -> Found | None:
        old = [other for other in self.receipts if other not in self.proof.receipts]
        if not old:
            return None
        stray = self.random.choice(old)
        tampered = replace(self.proof, receipts=tuple(sorted((*self.proof.receipts, stray))))
        return tampered, {receipt_digest(stray)}

    def add_fork(self) -> Found:
        """A second receipt of one number, for another request."""
        message, said = self.one()
        new = sign_receipt(replace(said, request_id="f" * 32), SIGNERS[said.board])
        tampered = replace(self.proof, receipts=tuple(sorted((*self.proof.receipts, new))))
        return tampered, {receipt_digest(new), receipt_digest(message)}

    def raise_appraisal(self) -> Found:
        """Somebody signs a better appraisal in the name of a verifier, or as the verifier that it is not."""
        message = self.random.choice(self.proof.appraisals)
        word = self.appraisals[message]
        thief = self.random.choice([SIGNERS[name] for name in self.fleet.boards if name != word.verifier])
        signer = self.random.choice((thief, Signer(word.verifier.encode(), b"\5" * 32)))
        new = sign_appraisal(replace(word, tier=TrustTier.AFFIRMING, issued_s=7), signer)
        return replace(self.proof, appraisals=exchanged(self.proof.appraisals, message, new)), {receipt_digest(new)}

    def contraindicate(self) -> Found:
        """All that a verifier says of a board is exchanged for what it says, honestly, since."""
        _, said = self.one()
        word = next(each for each in reversed(self.appraisals.values()) if each.board == said.board)
        new = sign_appraisal(replace(word, sequence=10**6, tier=TrustTier.CONTRAINDICATED), SIGNERS[word.verifier])
        of_board = {receipt_digest(each) for each in self.proof.receipts if self.receipts[each].board == said.board}
        return replace(self.proof, appraisals=tuple(sorted((*self.proof.appraisals, new)))), of_board

    def requote(self, **changes: object) -> Found:
        message = self.random.choice(self.proof.quotes)
        said: Quote = self.quotes[message]
        new = sign_quote(replace(said, **changes), SIGNERS[said.board])  # type: ignore[arg-type]
        leaning = {receipt_digest(each) for each, word in self.appraisals.items() if word.board == said.board}
        leaning |= {receipt_digest(each) for each, other in self.quotes.items() if other.board == said.board}
        tampered = replace(self.proof, quotes=exchanged(self.proof.quotes, message, new))
        return tampered, leaning | {receipt_digest(new)}

    def exchange_head(self) -> Found:
        """A hostile board shows another quote of one number than it showed its verifiers."""
        return self.requote(receipts_head=self.random.randbytes(32))

    def exchange_measurement(self) -> Found:
        return self.requote(uptime_s=self.random.randint(10, 10**6))


STRANGER = Signer(b"stranger", b"\3" * 32)
WAYS: list[Callable[[Tampering], Found | None]] = [
    way for name, way in vars(Tampering).items() if name.split("_")[0] in (
        "flip", "cut", "drop", "swap", "duplicate", "reorder", "reparent", "exchange", "count", "replay", "add", "raise",
        "contraindicate",
    )
]  # fmt: skip


def why_unfound(made: Found, sound: Proof) -> str:
    """Why a tampering was not found, or not named for what it is; empty if it was."""
    tampered, names = made
    if isinstance(tampered, bytes):
        try:
            tampered = decode_proof(tampered)
        except RefusedError:
            return ""
        return "it was read" if tampered != sound else ""
    if tampered == sound:
        return ""
    broken = verify(tampered, ANCHORS, TrustTier.WARNING).broken
    if broken is None:
        return "nothing was found"
    return "" if not names or broken.digest in names else f"named instead: {broken.kind} {broken.name}, {broken.fault}"


def test_ten_thousand_random_tamperings_are_found_and_named(memory: None) -> None:
    random, missed = Random(5), []
    done: dict[str, int] = dict.fromkeys((way.__name__ for way in WAYS), 0)
    for seed in count():
        if sum(done.values()) >= TAMPERINGS:
            break
        tampering = Tampering(random_fleet(Random(seed)), random)
        assert verify(tampering.proof, ANCHORS, TrustTier.WARNING).broken is None
        for way in random.choices(WAYS, k=A_FLEET):
            made = way(tampering)
            if made is None or made[0] == tampering.proof:
                continue
            done[way.__name__] += 1
            if why := why_unfound(made, tampering.proof):
                missed.append((seed, way.__name__, why))
    assert not missed, (len(missed), missed[:20])
    assert min(done.values()) > 50, done
