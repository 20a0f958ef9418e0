"""The charter: one encoding, nothing unknown, nothing out of bounds, and no key that belongs to two."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import pytest

from edge_agent.core.cbor import decode, encode
from edge_agent.core.config import PolicySection
from edge_agent.core.errors import RefusedError
from ota.charter import (
    MAX_CHARTER_BYTES,
    MAX_CHARTER_ITEMS,
    MAX_GROUPS,
    Charter,
    Enrolled,
    References,
    decode_charter,
    encode_charter,
)


def digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def charter_of(boards: int) -> Charter:
    enrolled = {
        f"board-{number:02}": Enrolled(digest(f"key {number}"), "raspberry_pi", ("canteen", f"floor-{number % 5}"))
        for number in range(boards)
    }
    golden = {(digest("model"), "ai-edge-litert 2.3 x86_64"): frozenset({digest("answer"), digest("another answer")})}
    references = References(frozenset({digest("code")}), frozenset({digest("library")}), frozenset({digest("model")}), golden)
    return Charter("home", 7, enrolled, {"ada": digest("ada")}, PolicySection(energy_us_per_mj=800), references)


CHARTER = charter_of(3)


def test_a_charter_is_read_back_as_it_was_written() -> None:
    with_everything = replace(
        CHARTER,
        boards={**CHARTER.boards, "attic": Enrolled(digest("attic"), endorser=b"e" * 65, revoked="stolen on 3 May")},
    )
    for charter in (CHARTER, with_everything, Charter("home", 1, {}, {})):
        assert decode_charter(encode_charter(charter)) == charter


def test_a_revoked_board_is_no_member_and_in_no_group() -> None:
    boards = {**CHARTER.boards, "board-01": replace(CHARTER.boards["board-01"], revoked="stolen")}
    charter = decode_charter(encode_charter(replace(CHARTER, boards=boards)))
    assert set(charter.members) == {"board-00", "board-02"}
    assert charter.group("all") == charter.group("canteen") == ("board-00", "board-02")
    assert charter.group("floor-1") == ()


def test_every_byte_counts() -> None:
    data = encode_charter(CHARTER)
    for end in range(0, len(data), 7):
        with pytest.raises(RefusedError):
            decode_charter(data[:end])
    with pytest.raises(RefusedError, match="trailing"):
        decode_charter(data + b"\0")
    for bit in range(0, len(data) * 8, 11):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with suppress(RefusedError):
            assert decode_charter(bytes(flipped)) != CHARTER


def changed(edit: Callable[[Any], None]) -> bytes:
    entries = decode(encode_charter(CHARTER), max_items=MAX_CHARTER_ITEMS)
    edit(entries)
    return encode(entries)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update({9: "new"}), "unknown key"),
        (lambda c: c[3]["board-00"].update({9: b"new"}), "unknown key"),
        (lambda c: c[6].update({9: []}), "unknown key"),
        (lambda c: c.pop(4), "is missing"),
        (lambda c: c[5].pop("gain_us"), "missing or unknown: 'gain_us'"),
        (lambda c: c[5].update(gain_factor=c[5].pop("gain_us")), "missing or unknown: 'gain_factor, gain_us'"),
        (lambda c: c[5].update(gain_us=True), "type bool"),
        (lambda c: c[5].update(gain_us=0), "policy gain_us"),
        (lambda c: c[3]["board-00"].update({1: b"short"}), "key, length"),
        (lambda c: c[3]["board-00"].update({3: ["z", "a"]}), "order of the alphabet"),
        (lambda c: c[3]["board-00"].update({3: []}), "another encoding"),
        (lambda c: c[3]["board-00"].update({3: [f"g{i:02}" for i in range(MAX_GROUPS + 1)]}), "at most 16"),
        (lambda c: c[3]["board-00"].update({5: "two\nlines"}), "one line"),
        (lambda c: c[3].update({"Attic": c[3].pop("board-00")}), "charter board"),
        (lambda c: c[3]["board-00"].update({1: c[3]["board-01"][1]}), "one key for board-00 and board-01"),
        (lambda c: c[4].update(eve=c[3]["board-01"][1]), "one key for board-01 and eve"),
        (lambda c: c[6][1].append(c[6][1][0]), "another encoding"),
        (lambda c: c[6][4][0][3].reverse(), "another encoding"),
        (lambda c: c[6][4].append(c[6][4][0]), "another encoding"),
        (lambda c: c[6][4][0].update({3: []}), "golden, answers"),
        (lambda c: c[6][2].append(b"short"), "libraries, length"),
        (lambda c: c.update({2: 0}), "charter serial"),
        (lambda c: c.update({1: "Home!"}), "charter of fleet"),
    ],
)
def test_a_charter_that_breaks_a_rule_is_refused_by_name(edit: Callable[[Any], None], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        decode_charter(changed(edit))


def test_one_key_on_two_boards_is_refused_before_it_is_signed() -> None:
    twin = {"attic": Enrolled(digest("key")), "cellar": Enrolled(digest("key"), revoked="sold")}
    with pytest.raises(RefusedError, match="one key for attic and cellar"):
        Charter("home", 1, twin, {})


def test_the_policy_travels_by_the_names_of_the_configuration() -> None:
    entries = decode(encode_charter(CHARTER), max_items=MAX_CHARTER_ITEMS)
    assert isinstance(entries, dict)
    assert entries[5] == asdict(PolicySection(energy_us_per_mj=800))


def test_a_charter_of_fifty_boards_is_small_and_of_a_thousand_fits() -> None:
    assert len(encode_charter(charter_of(50))) < 5_000
    assert decode_charter(encode_charter(charter_of(1024))).boards.keys() == charter_of(1024).boards.keys()


def test_a_charter_too_large_is_refused_before_it_is_signed() -> None:
    many = [frozenset(digest(f"{kind} {number}") for number in range(4096)) for kind in ("code", "libraries", "models")]
    answers = frozenset(digest(f"answer {number}") for number in range(16))
    golden = {(model, "library"): answers for model in many[2]}
    with pytest.raises(RefusedError, match=f"at most {MAX_CHARTER_BYTES} bytes"):
        encode_charter(replace(CHARTER, references=References(*many, golden=golden)))
