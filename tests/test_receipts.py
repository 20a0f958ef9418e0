"""Receipts: only their board can sign them, nothing in them can be changed, and their chain outlives kills and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from edge_agent.attest.evidence import MAX_COUNT, NO_DIGEST
from edge_agent.attest.receipts import (
    AAD,
    Chain,
    Receipt,
    open_receipt,
    receipt_digest,
    sign_receipt,
    unverified_receipt,
    why_not,
)
from edge_agent.core.cbor import encode
from edge_agent.core.chat import CHAT, Finish, Turn, TurnEnd
from edge_agent.core.cose import Signer, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import (
    MAX_PARENTS,
    MAX_RECEIPT_BYTES,
    DataClass,
    EnergyKind,
    InferenceRequest,
    Limits,
    Tensor,
    TrustTier,
)
from edge_agent.node.streams import counted, end_tensor, turn_request
from edge_agent.store import ledger as ledger_module
from edge_agent.store.ledger import MIGRATIONS, Bounds, Ledger
from tests.proofs import SIGNERS, PaperFleet, find_key, request, result
from tests.test_kill import killed_while

SIGNER = SIGNERS["desk"]
CYCLES = 30


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db", Bounds(receipts_count=4)) as opened:
        yield opened


def signed(**changes: Any) -> bytes:
    return sign_receipt(replace(of(PaperFleet(("desk",)).run("desk")), **changes), SIGNER)


def of(message: bytes) -> Receipt:
    return open_receipt(message, find_key)


def appended(chain: Chain, numbers: range) -> list[bytes]:
    asked = [request(number) for number in numbers]
    return [chain.append(each, result(each, "desk"), 3, 1_000_000) for each in asked]


# one receipt


def test_a_receipt_says_what_was_signed() -> None:
    largest = of(
        signed(parents=(b"\1" * 32,) * MAX_PARENTS, model="m" * 64, counter=MAX_COUNT, previous=b"\2" * 32, busy_us=MAX_COUNT)
    )
    message = sign_receipt(largest, SIGNER)
    assert of(message) == largest == unverified_receipt(message) and len(message) < MAX_RECEIPT_BYTES / 2
    assert sign_receipt(largest, SIGNER) == message


def test_every_single_bit_flip_of_a_receipt_is_refused() -> None:
    message = signed(parents=(b"\1" * 32,))
    for bit in range(8 * len(message)):
        changed = bytearray(message)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RefusedError):
            of(bytes(changed))


def test_every_truncation_of_a_receipt_and_every_byte_after_it_is_refused() -> None:
    message = signed(parents=(b"\1" * 32,))
    for wrong in [message[:length] for length in range(len(message))] + [message + bytes((last,)) for last in range(256)]:
        with pytest.raises(RefusedError):
            of(wrong)


@pytest.mark.parametrize("signer", [SIGNERS["hall"], Signer(b"desk", b"\5" * 32), Signer(b"stranger", b"\5" * 32)])
def test_a_receipt_of_another_signer_is_refused(signer: Signer) -> None:
    with pytest.raises(RefusedError, match="a board's own signature|one that does not fit|the key id of an enrolled board"):
        of(sign_receipt(of(signed()), signer))


def test_a_signature_for_another_purpose_is_no_receipt() -> None:
    payload = encode(of(signed()).to_map())
    assert of(sign1(payload, SIGNER, AAD))
    for purpose in (b"", b"sly/1/quote", b"sly/1/result"):
        with pytest.raises(RefusedError, match="one that does not fit"):
            of(sign1(payload, SIGNER, purpose))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (1, "Desk"), (2, -1), (3, MAX_COUNT + 1), (4, 0), (4, True), (5, bytes(31)), (5, b"\1" * 32), (6, bytes(15)), (7, b""),
        (8, ""), (9, bytes(33)), (10, bytes(31)), (11, bytes(31)), (12, []), (12, [bytes(31)]), (12, [bytes(32)] * 17), (13, -1),
        (13, 2**63), (14, -1), (15, 1.5), (16, "guessed"), (17, 0), (16, None),
    ],
)  # fmt: skip
def test_a_receipt_with_a_wrong_field_is_refused_though_it_is_signed(key: int, value: object) -> None:
    entry = {**of(signed()).to_map(), key: value}
    with pytest.raises(RefusedError, match="allowed: "):
        of(sign1(encode(entry), SIGNER, AAD))


@pytest.mark.parametrize("key", [*range(1, 12), *range(13, 17)])
def test_a_receipt_without_a_field_is_refused(key: int) -> None:
    entry = of(signed()).to_map()
    del entry[key]
    with pytest.raises(RefusedError, match=f"key {key} .* is missing"):
        of(sign1(encode(entry), SIGNER, AAD))


def test_only_the_first_receipt_follows_none() -> None:
    with pytest.raises(RefusedError, match="zeros for the first, and for it alone"):
        signed(counter=2)


# a receipt against an answer


def test_the_receipt_of_an_answer_fits_it() -> None:
    asked = request(1)
    given = result(asked, "desk")
    assert why_not(of(PaperFleet(("desk",)).run("desk")), asked, given) == ""


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("board", {"board": "hall"}), ("model digest", {"model_digest": bytes(32)}), ("model", {"model": "talker"}),
        ("outputs", {"outputs": {}}), ("busy time", {"busy_us": 1}), ("energy", {"energy_uj": 1}),
        ("energy", {"energy_kind": EnergyKind.ESTIMATED}), ("request id of the answer", {"request_id": "f" * 32}),
    ],
)  # fmt: skip
def test_a_receipt_of_another_answer_is_no_proof(what: str, changes: dict[str, Any]) -> None:
    asked = request(1)
    receipt = of(PaperFleet(("desk",)).run("desk"))
    assert why_not(receipt, asked, replace(result(asked, "desk"), **changes)) == f"its receipt is of another {what}"


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("request", {"session": "s"}), ("request", {"data": DataClass.PUBLIC}), ("inputs", {"inputs": {}}),
        ("request", {"limits": Limits(trust=TrustTier.WARNING)}), ("request and another parents", {"parents": (bytes(32),)}),
        ("request", {"task": "classify"}),
        ("inputs", {"inputs": {"image": Tensor("int8", (4,), (1).to_bytes(4, "little"))}}),
    ],
)  # fmt: skip
def test_a_receipt_of_another_request_is_no_proof(what: str, changes: dict[str, Any]) -> None:
    asked = request(1)
    receipt = of(PaperFleet(("desk",)).run("desk"))
    assert why_not(receipt, replace(asked, **changes), result(asked, "desk")) == f"its receipt is of another {what}"


def test_what_placement_sets_is_not_in_a_receipt() -> None:
    asked = request(1)
    receipt = of(PaperFleet(("desk",)).run("desk"))
    placed = replace(asked.placed("detector", 5), answer_tokens=7, recheck=False)
    assert why_not(receipt, placed, result(asked, "desk")) == ""


def test_tokens_that_are_counted_later_do_not_matter_but_the_text_and_its_end_do() -> None:
    asked = turn(text="hello")
    end = TurnEnd("good day", Finish.STOP, 3, 0, 2)
    given = replace(result(asked, "desk"), outputs=end_tensor(end))
    message = PaperFleet(("desk",)).boards["desk"].receipt(asked, given)
    assert why_not(of(message), asked, counted(given, 5, asked)) == ""
    for other in (replace(end, text="good night"), replace(end, finish=Finish.LENGTH)):
        assert "outputs" in why_not(of(message), asked, replace(given, outputs=end_tensor(other)))
    assert "end of a turn" in why_not(of(message), asked, replace(given, outputs={"turn": Tensor("uint8", (1,), b"\0")}))


def turn(text: str) -> InferenceRequest:
    asked = turn_request(f"{7:032x}", Turn(prompt=text), None, Limits())
    assert asked.task == CHAT
    return asked


# the chain


def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    messages: list[bytes] = []
    for boot in (1, 2, 3):
        with Ledger(path) as opened:
            chain = Chain(opened, "desk", boot, SIGNER)
            assert chain.count == len(messages)
            assert chain.head == (receipt_digest(messages[-1]) if messages else NO_DIGEST)
            messages += appended(chain, range(3 * boot, 3 * boot + 3))
            assert chain.after(0) == chain.recent(99) == messages
    receipts = [of(message) for message in messages]
    assert [each.counter for each in receipts] == list(range(1, 10))
    assert [each.bootcount for each in receipts] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [each.previous for each in receipts] == [NO_DIGEST, *map(receipt_digest, messages[:-1])]


def test_what_is_appended_fits_its_answer(ledger: Ledger) -> None:
    asked = request(1, [b"\7" * 32])
    given = result(asked, "desk")
    receipt = of(Chain(ledger, "desk", 4, SIGNER).append(asked, given, 5, 6))
    assert why_not(receipt, asked, given) == ""
    assert (receipt.board, receipt.bootcount, receipt.quote, receipt.started_us) == ("desk", 4, 5, 6)


def test_old_receipts_are_dropped_and_counted_and_the_anchor_is_kept(ledger: Ledger) -> None:
    chain = Chain(ledger, "desk", 1, SIGNER)
    assert (chain.count, chain.dropped, chain.anchor, chain.recent(5), chain.after(0)) == (0, 0, NO_DIGEST, [], [])
    messages = appended(chain, range(10))
    assert (chain.count, chain.dropped) == (10, 6)
    assert chain.after(0) == messages[6:] and chain.after(8) == messages[8:] and chain.after(7, 1) == messages[7:8]
    assert chain.recent(2) == messages[8:] and chain.recent(0) == [] and chain.recent(99) == messages[6:]
    assert chain.anchor == receipt_digest(messages[5]) and chain.head == receipt_digest(messages[9])


def test_a_receipt_becomes_durable_with_what_the_caller_does_or_not_at_all(ledger: Ledger) -> None:
    chain = Chain(ledger, "desk", 1, SIGNER)
    (first,) = appended(chain, range(1))
    with pytest.raises(ZeroDivisionError), ledger.transaction():
        appended(chain, range(1, 3))
        assert chain.count == 3
        raise ZeroDivisionError
    assert (chain.count, chain.head) == (1, receipt_digest(first))
    with ledger.transaction():
        ledger.accept("r", b"")
        (second,) = appended(chain, range(1, 2))
        ledger.answer("r", b"", None)
    assert of(second).previous == receipt_digest(first)


def test_an_answer_without_a_model_gets_no_receipt(ledger: Ledger) -> None:
    chain = Chain(ledger, "desk", 1, SIGNER)
    with pytest.raises(RefusedError, match="receipt model"):
        chain.append(request(1), replace(result(request(1), "desk"), model=""), 0, 0)
    assert chain.count == 0


@pytest.mark.parametrize("counter", [0, 1, 3, -1])
def test_the_ledger_takes_no_receipt_but_the_next(ledger: Ledger, counter: int) -> None:
    ledger.receipts.append(1, b"one")
    with pytest.raises(RuntimeError, match=f"receipt {counter} does not follow receipt 1"):
        ledger.receipts.append(counter, b"other")
    assert ledger.receipts.after(0, 9) == [(1, b"one")]


def test_the_ledgers_receipts_are_bounded_one_by_one_and_together(ledger: Ledger) -> None:
    with pytest.raises(RefusedError, match="receipt 1: got 4097 bytes; allowed: at most 4096 bytes"):
        ledger.receipts.append(1, bytes(4097))
    with pytest.raises(RefusedError, match="receipts_count"):
        Bounds(receipts_count=0)
    with pytest.raises(ValueError, match="a limit of 0"):
        ledger.receipts.after(0, 0)
    for counter in range(1, 20):
        ledger.receipts.append(counter, bytes(4096))
    assert [each for each, _ in ledger.receipts.after(0, 99)] == [16, 17, 18, 19]


def test_a_receipt_that_finds_no_room_because_none_can_be_dropped_is_not_there(ledger: Ledger) -> None:
    for counter in range(1, 5):
        ledger.receipts.append(counter, b"")
    ledger._database.execute("CREATE TRIGGER stuck BEFORE DELETE ON receipt BEGIN SELECT RAISE(ABORT, 'stuck'); END")
    with pytest.raises(RuntimeError, match="stuck"):
        ledger.receipts.append(5, b"")
    assert [each for each, _ in ledger.receipts.after(0, 99)] == [1, 2, 3, 4]


def test_a_ledger_from_before_receipts_gets_their_table_and_keeps_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    with monkeypatch.context() as earlier:
        earlier.setattr(ledger_module, "MIGRATIONS", MIGRATIONS[:1])
        with Ledger(path) as old:
            old.increment("boot_epoch")
            with pytest.raises(RuntimeError, match="no such table: receipt"):
                old.receipts.append(1, b"")
    with Ledger(path) as opened:
        assert opened.count("boot_epoch") == 1
        assert appended(Chain(opened, "desk", 2, SIGNER), range(2))


RUNNING = """
import sys
from pathlib import Path
from edge_agent.attest.receipts import Chain, open_receipt
from edge_agent.store.ledger import Bounds, Ledger, Owed
from tests.proofs import SIGNERS, find_key, request, result

with Ledger(Path(sys.argv[1]), Bounds(receipts_count=200)) as ledger:
    with ledger.transaction():
        boot = ledger.increment("boot_epoch")
    chain = Chain(ledger, "desk", boot, SIGNERS["desk"])
    while True:
        group = range(chain.count, chain.count + 2)
        with ledger.transaction():
            for number in group:
                asked = request(number)
                ledger.accept(asked.request_id, b"")
                message = chain.append(asked, result(asked, "desk"), 1, 1)
                ledger.answer(asked.request_id, message, None)
        for number in group:
            sys.stdout.write(f"signed {number}\\n")
            sys.stdout.flush()
"""


def test_a_kill_at_any_time_loses_no_receipt_whose_answer_is_there_and_forks_no_chain(tmp_path: Path) -> None:
    random, path = Random(3), tmp_path / "ledger.db"
    said: list[tuple[str, str]] = []
    seen: dict[int, bytes] = {}
    for _ in range(CYCLES):
        said += killed_while(RUNNING, path, random.randint(1, 12), random.uniform(0, 0.003))
        with Ledger(path, Bounds(receipts_count=200)) as opened:
            chain = Chain(opened, "desk", 0, SIGNER)
            messages = chain.after(chain.dropped)
            assert chain.count > max(int(number) for _, number in said)
            for message in messages:
                receipt = of(message)
                assert opened.answer_of(receipt.request_id) == message
                assert seen.setdefault(receipt.counter, message) == message, "another receipt under a number that was given"
            assert all(of(later).previous == receipt_digest(one) for one, later in pairwise(messages))
    assert sorted(seen) == list(range(1, chain_length(path) + 1))
    assert len(said) > 3 * CYCLES


def chain_length(path: Path) -> int:
    with Ledger(path) as opened:
        return opened.receipts.newest
