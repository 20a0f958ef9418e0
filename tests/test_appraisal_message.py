"""Appraisals and operators' words as messages, and what two quotes inside an appraisal prove to everybody."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from edge_agent.attest.appraisal import (
    AAD,
    MAX_APPRAISAL_BYTES,
    MAX_RAW,
    MAX_REASON_CHARS,
    MAX_REASONS,
    Appraisal,
    Vector,
    open_appraisal,
    proof_of,
    sign_appraisal,
)
from edge_agent.attest.evidence import MAX_QUOTE_BYTES, sign_quote
from edge_agent.attest.words import AAD as WORD_AAD
from edge_agent.attest.words import Action, OperatorWord, open_word, sign_word
from edge_agent.core.cbor import decode, encode
from edge_agent.core.cose import decode_sign1, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from tests.attested import a_quote, appraisals, digest, find_key, key_of_any, refused_when_broken, signer, words

A = signer("a")
B = signer("b")
APPRAISAL = Appraisal(
    "a", 2, 9, "b", TrustTier.WARNING, Vector(instance_identity=2, executables=33, runtime_opaque=-1), ("unknown code",),
    digest("quote"), 3, 2, 41, 1_790_000_000,
)  # fmt: skip
WORD = OperatorWord("a", "b", 1_790_000_000, Action.CLEAR, "model restored")


def payload_of(message: bytes) -> dict[int, Any]:
    payload = decode(decode_sign1(message).payload)
    assert isinstance(payload, dict)
    return payload


# ---- appraisals ---------------------------------------------------------------------------------------------------------


@given(appraisals)
def test_an_appraisal_comes_back_as_it_was_signed(appraisal: Appraisal) -> None:
    assert open_appraisal(sign_appraisal(appraisal, signer(appraisal.verifier)), key_of_any) == appraisal


def test_the_vector_has_the_numbers_of_ar4si_and_leaves_zeros_out() -> None:
    assert payload_of(sign_appraisal(APPRAISAL, A))[6] == {0: 2, 2: 33, 5: -1}


def test_every_bit_flip_and_truncation_of_an_appraisal_is_refused() -> None:
    quotes = (sign_quote(a_quote(hardware=""), B), b"a second one")
    message = sign_appraisal(replace(APPRAISAL, raw=quotes), A)
    refused_when_broken(message, lambda message: open_appraisal(message, find_key))


def test_an_appraisal_in_another_verifiers_name_is_refused() -> None:
    with pytest.raises(RefusedError, match="own signature"):
        open_appraisal(sign_appraisal(APPRAISAL, signer("c")), find_key)


@pytest.mark.parametrize(
    "change",
    [
        {5: 4}, {5: True}, {6: {0: 0}}, {6: {8: 2}}, {6: {0: 128}}, {6: {0: -129}}, {6: {"0": 2}}, {6: [2]}, {7: []}, {7: [""]},
        {7: ["x"] * (MAX_REASONS + 1)}, {7: ["x" * (MAX_REASON_CHARS + 1)]}, {7: [1]}, {8: b""}, {8: bytes(31)}, {9: -1},
        {10: 2**53 + 1}, {13: []}, {13: [b""]}, {13: [b"x"] * (MAX_RAW + 1)}, {13: [bytes(MAX_QUOTE_BYTES + 1)]}, {14: 0},
        {4: "B"},
    ],
)  # fmt: skip
def test_an_appraisal_out_of_bounds_or_said_in_another_way_is_refused(change: dict[int, object]) -> None:
    message = sign1(encode({**payload_of(sign_appraisal(APPRAISAL, A)), **change}), A, AAD)
    with pytest.raises(RefusedError):
        open_appraisal(message, find_key)


def test_an_appraisal_with_everything_in_it_fits() -> None:
    full = replace(APPRAISAL, reasons=("\U0001f40d" * MAX_REASON_CHARS,) * MAX_REASONS, raw=(bytes(MAX_QUOTE_BYTES),) * MAX_RAW)
    message = sign_appraisal(full, A)
    assert open_appraisal(message, find_key) == full and len(message) <= MAX_APPRAISAL_BYTES


# ---- proof --------------------------------------------------------------------------------------------------------------

ONE = sign_quote(a_quote(), B)
OTHER = sign_quote(a_quote(issued_s=5), B)
LATER = sign_quote(a_quote(counter=7), B)


def test_two_quotes_that_contradict_each_other_are_proof_whoever_shows_them() -> None:
    for raw in ((ONE, OTHER), (OTHER, ONE)):
        assert proof_of(replace(APPRAISAL, raw=raw), find_key) == "two quotes with number 2 of boot 3"
        assert proof_of(replace(APPRAISAL, verifier="c", tier=TrustTier.AFFIRMING, raw=raw), find_key)


C_ONE, C_OTHER = (sign_quote(a_quote(board="c", issued_s=n), signer("c")) for n in (1, 2))
NO_PROOFS: dict[str, tuple[bytes, ...]] = {
    "nothing": (),
    "one quote": (ONE,),
    "one quote twice": (ONE, ONE),
    "two that fit together": (ONE, LATER),
    "two of another board": (C_ONE, C_OTHER),
    "one each of two boards": (ONE, C_ONE),
    "one that another board signed": (ONE, sign1(decode_sign1(OTHER).payload, A)),
    "one whose signature is broken": (ONE, OTHER[:-1] + bytes([OTHER[-1] ^ 1])),
    "no quotes": (b"x", b"y"),
}


@pytest.mark.parametrize("what", NO_PROOFS)
def test_a_verifier_cannot_make_up_a_proof(what: str) -> None:
    assert proof_of(replace(APPRAISAL, raw=NO_PROOFS[what]), find_key) == ""


def test_quotes_of_a_board_that_is_not_enrolled_prove_nothing() -> None:
    raw = tuple(sign_quote(a_quote(board="z", issued_s=n), signer("z")) for n in (1, 2))
    appraisal = replace(APPRAISAL, board="z", raw=raw)
    assert proof_of(appraisal, key_of_any) and not proof_of(appraisal, find_key)


# ---- operators' words ---------------------------------------------------------------------------------------------------


@given(words)
def test_a_word_comes_back_as_it_was_signed(word: OperatorWord) -> None:
    assert open_word(sign_word(word, signer(word.operator)), key_of_any) == word


def test_every_bit_flip_and_truncation_of_a_word_is_refused() -> None:
    refused_when_broken(sign_word(WORD, A), lambda message: open_word(message, find_key))


def test_a_word_in_another_operators_name_is_refused() -> None:
    with pytest.raises(RefusedError, match="own signature"):
        open_word(sign_word(WORD, B), find_key)


def test_a_word_of_who_is_no_operator_is_refused() -> None:
    with pytest.raises(RefusedError, match="kid"):
        open_word(sign_word(replace(WORD, operator="z"), signer("z")), find_key)


@pytest.mark.parametrize("change", [{4: "pardon"}, {3: 0}, {3: 2**53 + 1}, {5: ""}, {5: "x" * 257}, {1: "A b"}, {6: 0}])
def test_a_word_out_of_bounds_is_refused(change: dict[int, object]) -> None:
    message = sign1(encode({**payload_of(sign_word(WORD, A)), **change}), A, WORD_AAD)
    with pytest.raises(RefusedError):
        open_word(message, find_key)


def test_a_word_with_everything_in_it_is_taken() -> None:
    word = OperatorWord("a", "b" * 32, 2**53, Action.REVOKE, "\U0001f40d" * 256)
    assert open_word(sign_word(word, A), find_key) == word


def test_a_word_is_no_appraisal_and_an_appraisal_no_word() -> None:
    with pytest.raises(RefusedError, match="does not fit"):
        open_appraisal(sign_word(WORD, A), find_key)
    with pytest.raises(RefusedError, match="does not fit"):
        open_word(sign_appraisal(APPRAISAL, A), find_key)


def test_an_appraisal_without_evidence_says_so_by_leaving_it_out() -> None:
    message = sign_appraisal(replace(APPRAISAL, evidence=b"", reasons=()), A)
    assert not {7, 8, 13} & set(payload_of(message)) and open_appraisal(message, find_key).evidence == b""
