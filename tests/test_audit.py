"""A proof that was tampered with is found out, and the link that broke is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import count
from random import Random
from typing import Any

import pytest

from edge_agent.attest import audit as audit_module
from edge_agent.attest import testimony as testimony_module
from edge_agent.attest.appraisal import sign_appraisal
from edge_agent.attest.audit import in_order, verify
from edge_agent.attest.evidence import Measurements, ModelMeasurement, Quote, sign_quote
from edge_agent.attest.links import Audit, Kind
from edge_agent.attest.proof import FORM, Asked, Proof, decode_proof, encode_proof, gathered
from edge_agent.attest.receipts import Receipt, receipt_digest, sign_receipt
from edge_agent.attest.testimony import Anchors
from edge_agent.core.cbor import encode
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from tests.proofs import ANCHORS, MEMBERS, MODELS, SIGNERS, PaperFleet, find_key, random_fleet, request, result

TAMPERINGS, MANY_TAMPERINGS = 1_500, 10_000
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
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))


def remembered(opens: Callable[..., object]) -> Callable[..., object]:
    opened = lru_cache(maxsize=4096)(lambda message: opens(message, find_key))
    return lambda message, _: opened(message)


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


@pytest.mark.parametrize("tamperings", [TAMPERINGS, pytest.param(MANY_TAMPERINGS, marks=pytest.mark.long)])
def test_random_tamperings_are_found_and_named(memory: None, tamperings: int) -> None:
    random, missed = Random(5), []
    done: dict[str, int] = dict.fromkeys((way.__name__ for way in WAYS), 0)
    for seed in count():
        if sum(done.values()) >= tamperings:
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
    assert min(done.values()) > tamperings // 200, done


# what an honest file shows, and what it need not


@pytest.mark.parametrize("seed", range(20))
def test_an_honest_file_is_sound_and_comes_back_as_it_was_written(seed: int) -> None:
    proof = random_fleet(Random(seed)).proof()
    assert decode_proof(encode_proof(proof)) == proof
    audit = verify(proof, ANCHORS, TrustTier.WARNING)
    assert audit.broken is None and len(audit.receipts) == len(proof.receipts)
    checks = ["signature", "request", "parents", "chain", "quotes", "model", "status"]
    assert all([check.what for check in link.checks] == checks for link in audit.receipts)


def test_parents_come_before_what_was_made_of_them() -> None:
    for seed in range(20):
        seen: set[bytes] = set()
        for link in verify(random_fleet(Random(seed)).proof(), ANCHORS).receipts:
            assert link.receipt is not None and set(link.receipt.parents) <= seen
            seen.add(link.digest)


def test_a_single_receipt_is_a_proof() -> None:
    fleet = PaperFleet(("desk", "hall"))
    fleet.run("desk", wanted=False)
    message = fleet.run("desk")
    audit = verify(gathered([message]), ANCHORS)
    assert audit.broken is None
    (link,) = audit.links
    assert notes(audit) == {
        "chain": "the only one, or the first, of its board here", "status": "none (nobody here says more)",
    }  # fmt: skip
    assert link.name == "desk #2"


def notes(audit: Audit) -> dict[str, str]:
    return {check.what: check.note for link in audit.receipts for check in link.checks if check.note}


# named attacks (SECURITY 28)


@pytest.fixture
def chain() -> PaperFleet:
    """Six receipts of the desk, a quote before them, one among them and one after them."""
    fleet = PaperFleet(("desk", "hall", "porch"))
    fleet.quote("desk")
    for number in range(6):
        fleet.run("desk")
        if number == 2:
            fleet.quote("desk")
    fleet.quote("desk")
    return fleet


def receipts_of(fleet: PaperFleet) -> list[bytes]:
    return [message for _, message in fleet.boards["desk"].receipts]


def without_asking(proof: Proof, **changes: object) -> Proof:
    """Nobody says what was asked for, so that only the chain can tell."""
    return replace(proof, asked=(), **changes)  # type: ignore[arg-type]


def fault(proof: Proof, floor: TrustTier = TrustTier.NONE) -> str:
    broken = verify(proof, ANCHORS, floor).broken
    return f"{broken.kind} {broken.name}, {broken.fault}" if broken else ""


def test_a_gap_in_a_chain_that_is_shown_whole_is_named(chain: PaperFleet) -> None:
    proof = chain.proof(desk=(1, 6))
    assert fault(proof) == ""
    gap = without_asking(proof, receipts=exchanged(proof.receipts, receipts_of(chain)[3], None))
    assert fault(gap) == "span desk #1 to #6, gap: #4 is not in the file, or not signed by desk"


def test_a_gap_that_is_not_claimed_to_be_none_is_said_and_is_no_fault(chain: PaperFleet) -> None:
    proof = chain.proof()
    gap = without_asking(proof, receipts=tuple(sorted(receipts_of(chain)[0:6:3])))
    assert fault(gap) == ""
    assert notes(verify(gap, ANCHORS))["chain"] == "2 between #1 and this are not in the file"


def test_a_chain_that_ends_before_what_its_board_told_of_is_named(chain: PaperFleet) -> None:
    proof = chain.proof(desk=(1, 5))
    cut = without_asking(proof, receipts=tuple(sorted(receipts_of(chain)[:5])))
    assert fault(cut) == "span desk #1 to #5, end: truncated: a quote of desk tells of 6 receipts"


def test_a_fork_is_named(chain: PaperFleet) -> None:
    """Two receipts of one number; and one that follows another than the file shows."""
    board = chain.boards["desk"]
    other = sign_receipt(replace(board.receipts[5][0], request_id="f" * 32), board.signer)
    quotes = (board.quotes[0][1],)
    both = gathered([*receipts_of(chain), other], quotes)
    assert fault(both) == "receipt desk #6, chain: fork: desk signed 2 receipts with number 6"
    third = sign_receipt(replace(board.receipts[2][0], outputs=b"\1" * 32), board.signer)
    another = gathered(exchanged(tuple(receipts_of(chain)), receipts_of(chain)[2], third), quotes)
    assert fault(another) == "receipt desk #4, chain: fork: it follows another #3 than the one in the file"


def test_a_fork_that_only_a_quote_tells_of_is_named(chain: PaperFleet) -> None:
    board = chain.boards["desk"]
    third = sign_receipt(replace(board.receipts[2][0], outputs=b"\1" * 32), board.signer)
    assert "fork: quote 2 of boot 1 tells of another receipt 3" in fault(gathered([third], [board.quotes[1][1]]))
    fourth = sign_receipt(replace(board.receipts[3][0], previous=b"\1" * 32), board.signer)
    assert "fork: quote 2 of boot 1 tells of another receipt 3 than it follows" in fault(gathered([fourth], [board.quotes[1][1]]))


def test_a_chain_that_was_counted_anew_is_named(chain: PaperFleet) -> None:
    """A ledger restored from a backup, or lost: numbers that were given are given again."""
    board = chain.boards["desk"]
    board.reboot()
    again = sign_receipt(replace(board.receipts[1][0], bootcount=2, request_id="f" * 32), board.signer)
    quotes = [message for _, message in board.quotes]
    assert "it was counted again: quote 2 of boot 1, from before it, tells of 3 receipts" in fault(gathered([again], quotes))
    both = gathered([receipts_of(chain)[4], again])
    assert fault(both) == "receipt desk #5, chain: reset: boot 1, quote 2, after #2 of boot 2"


def test_a_chain_that_was_cut_before_a_later_quote_is_named(chain: PaperFleet) -> None:
    board = chain.boards["desk"]
    board.quotes.pop()
    short = board.quote(receipts=4, receipts_head=receipt_digest(receipts_of(chain)[3]))
    wanted = "the chain was cut: quote 3 of boot 1, from after it, tells of 4 receipts"
    assert wanted in fault(gathered([receipts_of(chain)[5]], [short]))


def test_a_receipt_that_follows_another_number_than_its_own_is_named(chain: PaperFleet) -> None:
    board = chain.boards["desk"]
    skips = sign_receipt(replace(board.receipts[5][0], counter=9), board.signer)
    made = gathered([*receipts_of(chain)[:5], skips], [board.quotes[0][1]])
    assert fault(made) == "receipt desk #9, chain: reset: it follows desk #5 and calls itself #9"


# named attacks on a pipeline


def test_a_parent_that_is_missing_is_named() -> None:
    fleet = PaperFleet(("desk", "hall"))
    first = fleet.run("hall")
    fleet.run("desk", [first])
    proof = fleet.proof()
    digest = receipt_digest(first).hex()[:16]
    wanted = f"receipt desk #1, parents: receipt {digest}, which its inputs came from, is not in the file"
    assert fault(replace(proof, receipts=exchanged(proof.receipts, first, None))) == wanted


def test_a_parent_that_is_younger_is_named() -> None:
    board = PaperFleet(("desk",)).boards["desk"]
    younger = sign_receipt(replace(first_receipt(), counter=5, previous=b"\1" * 32, request_id="e" * 32), board.signer)
    child = sign_receipt(replace(first_receipt(), parents=(receipt_digest(younger),)), board.signer)
    assert fault(gathered([younger, child])) == "receipt desk #1, parents: its inputs came from desk #5, which is younger"


def first_receipt() -> Receipt:
    fleet = PaperFleet(("desk",))
    fleet.run("desk")
    return fleet.boards["desk"].receipts[0][0]


def test_a_parent_that_began_later_by_another_clock_is_said_and_is_no_fault() -> None:
    fleet = PaperFleet(("desk", "hall"))
    asked = request(1)
    first = fleet.boards["hall"].receipt(asked, result(asked, "hall"), started_us=2**60)
    second = request(2, [receipt_digest(first)])
    audit = verify(gathered([first, fleet.boards["desk"].receipt(second, result(second, "desk"))]), ANCHORS)
    assert audit.broken is None
    assert notes(audit)["parents"] == "by its own clock hall began #1 later than this"


def test_receipts_that_come_from_themselves_are_found_without_going_round_for_ever() -> None:
    """SHA-256 makes it impossible, so the order is shown here, not by signed receipts."""
    a, b, c, d = (bytes((each,)) for each in b"abcd")
    order, cyclic = in_order({d: [c], a: [b], b: [a], c: []}, lambda node: (node,))
    assert (order, cyclic) == ([c, d, a, b], {a, b})
    assert in_order({d: [a, c], a: [], c: [a]}, lambda node: (node,)) == ([a, c, d], set())


def test_two_receipts_for_one_request_are_named() -> None:
    fleet = PaperFleet(("desk", "hall"))
    asked = request(1)
    both = [fleet.boards[name].receipt(asked, result(asked, name)) for name in ("desk", "hall")]
    assert fault(gathered(both)) == f"receipt desk #1, request: 2 receipts for request {1:032x}"


def test_a_receipt_that_belongs_to_nothing_is_named() -> None:
    fleet = PaperFleet(("desk", "hall"))
    stray = fleet.run("hall", wanted=False)
    fleet.run("desk")
    proof = fleet.proof()
    wanted = "receipt hall #1, request: it belongs to nothing that was asked for, or that this came from"
    assert fault(replace(proof, receipts=tuple(sorted((*proof.receipts, stray))))) == wanted


def test_an_unreleased_model_is_named_and_without_releases_it_is_said() -> None:
    fleet = PaperFleet(("desk", "hall"))
    fleet.run("desk")
    proof, digest = fleet.proof(), MODELS["detector"].hex()[:16]
    unreleased = verify(proof, Anchors(MEMBERS, frozenset({MODELS["talker"]})))
    assert unreleased.broken is not None
    assert unreleased.broken.fault == f"model: detector {digest} is in no signed release"
    audit = verify(proof, Anchors(MEMBERS))
    assert audit.broken is None and notes(audit)["model"] == "not held against signed releases: none were given"


def test_a_model_that_was_not_mapped_as_it_was_offered_is_named() -> None:
    fleet = PaperFleet(("desk", "hall"))
    models = (ModelMeasurement("detector", MODELS["detector"], b"\1" * 32),)
    fleet.quote("desk", measurements=Measurements(bytes(32), bytes(32), "none", bytes(32), models=models))
    fleet.run("desk")
    assert "quotes: quote 1 of boot 1 tells that other bytes of detector were mapped than are offered" in fault(fleet.proof())


@pytest.mark.parametrize("field", ["request", "inputs", "outputs"])
def test_an_answer_to_something_else_is_named(field: str) -> None:
    fleet = PaperFleet(("desk", "hall"))
    fleet.run("desk")
    (asked,) = fleet.asked
    fleet.asked = [replace(asked, **{field: b"\1" * 32})]  # type: ignore[arg-type]
    assert fault(fleet.proof()) == f"asked {asked.request_id}, {field}: desk #1 is of another one"


@pytest.mark.parametrize("what", ["request itself", "answer itself", "parents"])
def test_what_was_asked_is_held_against_its_digests_if_it_is_in_the_file(what: str) -> None:
    fleet = PaperFleet(("desk",))
    asked = request(1)
    given = result(asked, "desk")
    named = (bytes(32),) if what == "parents" else ()
    message = fleet.boards["desk"].receipt(asked, given, parents=named)
    whole = Asked.of(asked, replace(given, receipt=message), whole=True)
    if what == "request itself":
        whole = replace(whole, asked_for=replace(asked, inputs={}))
    elif what == "answer itself":
        whole = replace(whole, answer=replace(given, outputs={}))
    proof = decode_proof(encode_proof(gathered([message], asked=[whole])))
    broken = [check.what for link in verify(proof, ANCHORS).links for check in link.checks if check.fault]
    assert what in broken and len(broken) == (2 if what == "parents" else 1)


def test_an_answer_without_a_receipt_is_nothing_to_prove() -> None:
    with pytest.raises(RefusedError, match="no receipt"):
        Asked.of(request(1), result(request(1), "desk"))


# status at the time


def appraised(*tiers: TrustTier, at: int | None = None) -> PaperFleet:
    """The desk's quotes, each appraised by hall and porch; ``at``: after which quote its one receipt was signed."""
    fleet = PaperFleet(("desk", "hall", "porch"))
    for number, tier in enumerate(tiers):
        if number == (len(tiers) if at is None else at):
            fleet.run("desk")
        fleet.quote("desk", tier)
    if at is None or at == len(tiers):
        fleet.run("desk")
    return fleet


GOOD, FAIR, UNKNOWN, BAD = TrustTier.AFFIRMING, TrustTier.WARNING, TrustTier.NONE, TrustTier.CONTRAINDICATED


@pytest.mark.parametrize(
    ("fleet", "tier"),
    [
        (appraised(GOOD), GOOD), (appraised(FAIR, GOOD), GOOD), (appraised(GOOD, FAIR), FAIR),
        (appraised(GOOD, UNKNOWN), UNKNOWN),
        (appraised(GOOD, FAIR, at=1), GOOD), (appraised(FAIR, GOOD, at=1), FAIR), (appraised(GOOD, FAIR, at=0), GOOD),
        (appraised(), UNKNOWN), (appraised(GOOD, UNKNOWN, at=1), GOOD), (appraised(GOOD, BAD, at=1), BAD),
        (appraised(GOOD, BAD, GOOD, at=1), BAD), (appraised(BAD, GOOD, at=2), GOOD), (appraised(GOOD, GOOD, BAD, at=0), BAD),
    ],
)  # fmt: skip
def test_the_last_word_before_a_receipt_counts_and_any_contraindication_after_it(fleet: PaperFleet, tier: TrustTier) -> None:
    (link,) = verify(fleet.proof(), ANCHORS).receipts
    assert link.status.tier is tier and set(link.status.words) == ({"hall", "porch"} if fleet.appraisals else set())
    for floor in (UNKNOWN, FAIR, GOOD):
        assert bool(fault(fleet.proof(), floor)) == (tier < floor or tier is BAD)


def test_a_word_on_another_boot_does_not_count_but_a_contraindication_that_stands_does() -> None:
    fleet = appraised(GOOD)
    fleet.boards["desk"].reboot()
    fleet.run("desk")
    assert [link.status.tier for link in verify(fleet.proof(), ANCHORS).receipts] == [GOOD, UNKNOWN]
    for verifier in ("hall", "porch"):
        fleet.appraise(verifier, "desk", BAD, evidence=b"", bootcount=0, counter=0)
    assert [link.status.tier for link in verify(fleet.proof(), ANCHORS).receipts] == [BAD, BAD]


def test_only_counted_verifiers_count_and_as_many_as_must_agree() -> None:
    fleet = PaperFleet(("desk", "hall", "porch"))
    fleet.boards["desk"].quote()
    fleet.run("desk")
    fleet.appraise("desk", "desk", GOOD)
    fleet.appraise("hall", "desk", GOOD)
    fleet.appraise("porch", "desk", FAIR)

    def tier(verifiers: set[str], agree: int, **ceilings: TrustTier) -> TrustTier:
        anchors = Anchors(MEMBERS, None, frozenset(verifiers), agree, ceilings)
        return verify(fleet.proof(), anchors).receipts[0].status.tier

    assert tier(set(), 1) is GOOD and tier({"porch"}, 1) is FAIR and tier({"desk"}, 1) is UNKNOWN
    assert tier(set(), 2) is FAIR and tier(set(), 3) is UNKNOWN and tier({"hall"}, 2) is UNKNOWN
    assert tier(set(), 1, desk=FAIR) is FAIR and tier(set(), 1, desk=BAD) is BAD


def test_a_contraindicated_verifier_vouches_for_nobody() -> None:
    fleet = PaperFleet(("desk", "hall", "porch"))
    fleet.boards["desk"].quote()
    fleet.boards["hall"].quote()
    fleet.appraise("hall", "desk", GOOD)
    fleet.run("desk")
    assert verify(fleet.proof(), ANCHORS).receipts[0].status.tier is GOOD
    fleet.appraise("porch", "hall", BAD)
    assert verify(fleet.proof(), ANCHORS).receipts[0].status.tier is UNKNOWN


def test_two_quotes_of_one_number_are_named_and_contraindicate_their_board() -> None:
    fleet = appraised(GOOD)
    other = fleet.boards["desk"].quote(counter=1, previous=bytes(32), uptime_s=2)
    audit = verify(fleet.proof(), ANCHORS)
    assert audit.broken is not None and audit.broken.kind in (Kind.QUOTE, Kind.APPRAISAL)
    assert audit.receipts[0].status.tier is BAD
    fleet.boards["desk"].quotes.pop()
    fleet.appraise("porch", "desk", GOOD, raw=(fleet.boards["desk"].quotes[0][1], other))
    assert "two quotes with number 1 of boot 1" in fault(fleet.proof())


def test_two_words_of_a_verifier_under_one_number_are_named() -> None:
    fleet = appraised(GOOD)
    fleet._sequences["hall"] -= 1
    fleet.appraise("hall", "desk", BAD)
    assert "hall said two things of desk under one number" in fault(fleet.proof())


# the file


@pytest.mark.parametrize(
    "changed",
    [
        {1: "sly/2/proof"}, {2: []}, {2: None}, {2: [b"\2", b"\1"]}, {2: [b"\1", b"\1"]}, {2: ["text"]}, {2: [bytes(4097)]},
        {3: []}, {4: []}, {5: []}, {5: [{}]}, {6: []}, {6: [["desk", 2, 1]]},
        {6: [["desk", 0, 1]]}, {6: [["desk", 1]]}, {6: [["Desk", 1, 1]]}, {6: [["desk", "1", 2]]}, {6: [["desk", 1, 2**53 + 1]]},
        {6: [["desk", 1, 1], ["desk", 1, 2]]}, {6: [["desk", True, 1]]}, {7: 0},
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_refused(changed: dict[int, object]) -> None:
    good = {1: FORM, 2: [b"\1"]}
    assert decode_proof(encode(good)).receipts == (b"\1",)
    with pytest.raises(RefusedError, match="allowed: "):
        decode_proof(encode({key: value for key, value in {**good, **changed}.items() if value is not None}))


@pytest.mark.parametrize(("what", "max_count"), [("receipts", 4096), ("quotes", 1024), ("appraisals", 1024)])
def test_a_file_holds_a_bounded_number_of_each(what: str, max_count: int) -> None:
    many = [number.to_bytes(4, "big") for number in range(max_count + 1)]
    good: dict[str, Any] = {"receipts": [b"\1"], what: many[:-1]}
    assert len(getattr(gathered(**good), what)) == max_count
    with pytest.raises(RefusedError, match=f"proof {what}: got {max_count + 1}; allowed: at most {max_count}"):
        gathered(**{**good, what: many})


def test_an_answer_without_what_was_asked_is_refused() -> None:
    digests = (bytes(32),) * 4
    with pytest.raises(RefusedError, match="an answer without what was asked"):
        Asked(f"{1:032x}", *digests, answer=result(request(1), "desk"))


def test_a_file_of_a_later_form_says_so() -> None:
    with pytest.raises(RefusedError, match="proof form: got sly/2/proof; allowed: sly/1/proof; a newer sly may read it"):
        decode_proof(encode({1: "sly/2/proof", 9: "more"}))


def test_every_truncation_of_a_file_and_every_byte_after_it_is_refused() -> None:
    fleet = appraised(GOOD)
    data = encode_proof(fleet.proof())
    for wrong in [data[:length] for length in range(len(data))] + [data + b"\0"]:
        with pytest.raises(RefusedError):
            decode_proof(wrong)


def test_what_is_gathered_is_in_one_order_however_it_came() -> None:
    proof = random_fleet(Random(4)).proof()
    again = gathered(
        reversed(proof.receipts), [*proof.quotes, *proof.quotes], reversed(proof.appraisals), reversed(proof.asked), proof.spans
    )
    assert encode_proof(again) == encode_proof(proof)
