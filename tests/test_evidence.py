"""Quotes: what is in them, that only their own board can make them, in one form, and when two of them contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.attest import epoch, evidence, receipts, words
from edge_agent.attest.appraisal import AAD as APPRAISAL_AAD
from edge_agent.attest.appraisal import open_appraisal
from edge_agent.attest.epoch import open_challenge, open_epoch
from edge_agent.attest.evidence import (
    MAX_MODELS,
    MAX_NONCES,
    MAX_QUOTE_BYTES,
    NO_DIGEST,
    OEM_ID,
    PROFILE,
    KeyKind,
    ModelMeasurement,
    Quote,
    endorsed_digest,
    open_quote,
    quote_digest,
    sign_quote,
    ueid_of,
)
from edge_agent.attest.history import contradiction
from edge_agent.attest.words import open_word
from edge_agent.core import wire
from edge_agent.core.cbor import Tag, decode, encode
from edge_agent.core.cose import Sign1, Signer, decode_sign1, encode_sign1, sign1, to_be_signed
from edge_agent.core.errors import RefusedError
from edge_agent.gossip import agreement, presence, record
from tests.attested import MEASURED, a_quote, digest, find_key, key_of_any, quotes, refused_when_broken, signer

B = signer("b")


def claims_in(message: bytes) -> dict[int, Any]:
    claims = decode(decode_sign1(message).payload)
    assert isinstance(claims, dict)
    return claims


def ours_in(message: bytes) -> dict[int, Any]:
    ours = decode(claims_in(message)[273][0][1])
    assert isinstance(ours, dict)
    return ours


def saying(changes: dict[int, object], ours: dict[int, object] | None = None) -> bytes:
    """What board b signs when it says other claims than a quote has; ``...`` for none."""
    honest = sign_quote(a_quote(), B)
    inner = {key: value for key, value in {**ours_in(honest), **(ours or {})}.items() if value is not ...}
    claims = {**claims_in(honest), 273: [[60, encode(inner)]], **changes}
    return sign1(encode({key: value for key, value in claims.items() if value is not ...}), B)


@given(quotes)
def test_a_quote_comes_back_as_it_was_signed(quote: Quote) -> None:
    message = sign_quote(quote, signer(quote.board))
    assert open_quote(message, key_of_any) == quote


def test_a_quote_has_the_claims_of_rfc_9711_under_their_keys() -> None:
    quote = a_quote(endorsement=b"by hardware")
    claims = claims_in(sign_quote(quote, B))
    ours = claims.pop(273)
    assert claims == {
        6: 1_790_000_000, 10: quote.nonces[0], 256: ueid_of(B.public_key), 258: OEM_ID, 259: b"Raspberry Pi 4 Model B Rev 1.4",
        260: ["1.4"], 261: 61, 263: 0, 265: PROFILE, 266: {"root": {-70_000: b"by hardware"}}, 267: 3, 268: digest("seed"),
        270: "slyos-edge", 271: ["0.1.0"],
    }  # fmt: skip
    assert ours[0][0] == 60 and len(ours) == 1
    assert len(ueid_of(B.public_key)) == 17 and ueid_of(B.public_key)[0] == 1 and len(OEM_ID) == 16


def test_one_nonce_is_bytes_more_are_an_array_none_is_absent() -> None:
    one, two = digest("1")[:16], digest("2")[:16]
    assert claims_in(sign_quote(a_quote(nonces=(one, two)), B))[10] == [one, two]
    assert claims_in(sign_quote(a_quote(nonces=(one,)), B))[10] == one
    assert 10 not in claims_in(sign_quote(a_quote(nonces=()), B))


def test_a_long_hardware_name_is_whole_in_our_map_and_cut_in_hwmodel() -> None:
    name = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    message = sign_quote(a_quote(hardware=name), B)
    assert claims_in(message)[259] == name.encode()[:32] and 260 not in claims_in(message)
    assert open_quote(message, find_key).hardware == name


def test_every_bit_flip_and_truncation_of_a_quote_is_refused() -> None:
    quote = a_quote(endorsement=b"by hardware", key_kind=KeyKind.TPM)
    refused_when_broken(sign_quote(quote, B), lambda message: open_quote(message, find_key))


def test_a_quote_with_everything_in_it_fits() -> None:
    models = tuple(
        ModelMeasurement(f"{n:064}", digest("o"), digest("m"), digest("g"), 1000, 2**53, "s" * 32) for n in range(MAX_MODELS)
    )
    measured = replace(
        MEASURED, models=models, delegate=digest("d"), library_name="\U0001f40d" * 128, delegate_name="\U0001f40d" * 128
    )
    quote = a_quote(
        nonces=(digest("n")[:16],) * MAX_NONCES, measurements=measured, hardware="\U0001f40d" * 128, version="\U0001f40d" * 64,
        endorsement=bytes(4096), board="b" * 32, counter=2**53, bootcount=2**53, receipts=2**53, receipts_dropped=2**53,
    )  # fmt: skip
    message = sign_quote(quote, signer("b" * 32))
    assert open_quote(message, key_of_any) == quote and len(message) <= MAX_QUOTE_BYTES


@pytest.mark.parametrize(
    "changes",
    [
        {"nonces": (bytes(15),)}, {"nonces": (bytes(16),) * 65}, {"counter": 0}, {"bootcount": -1}, {"bootcount": 2**53 + 1},
        {"bootseed": bytes(31)}, {"previous": b""}, {"receipts_head": bytes(33)}, {"receipts_dropped": 8},
        {"hardware": "x" * 129}, {"version": "x" * 65}, {"endorsement": bytes(4097)}, {"board": "B"}, {"receipts": True},
    ],
)  # fmt: skip
def test_a_quote_out_of_bounds_cannot_be_built(changes: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        a_quote(**changes)


def test_a_board_cannot_measure_one_model_twice() -> None:
    with pytest.raises(RefusedError, match="each name once"):
        replace(MEASURED, models=MEASURED.models * 2)


# ---- only its own board -------------------------------------------------------------------------------------------------


def test_a_signer_does_not_sign_anothers_quote() -> None:
    with pytest.raises(ValueError, match="does not sign"):
        sign_quote(a_quote(), signer("c"))


def test_a_quote_signed_by_another_board_is_refused() -> None:
    payload = decode_sign1(sign_quote(a_quote(), B)).payload
    with pytest.raises(RefusedError, match="own signature"):
        open_quote(sign1(payload, signer("c")), find_key)


def test_a_quote_with_the_name_of_one_board_and_the_key_of_another_is_refused() -> None:
    impostor = Signer(b"b", digest("c"))
    with pytest.raises(RefusedError, match="does not fit"):
        open_quote(sign_quote(a_quote(), impostor), find_key)


def test_a_relayed_quote_whose_ueid_is_of_another_key_is_refused() -> None:
    with pytest.raises(RefusedError, match="ueid"):
        open_quote(saying({256: ueid_of(signer("c").public_key)}), find_key)


def test_a_quote_of_an_unknown_board_is_refused() -> None:
    with pytest.raises(RefusedError, match="enrolled"):
        open_quote(sign_quote(a_quote(board="z"), signer("z")), find_key)


# ---- one form -----------------------------------------------------------------------------------------------------------

OTHER_FORMS: dict[str, bytes] = {
    "another profile": saying({265: "tag:slyos-edge,2026:quote/2"}),
    "another manufacturer": saying({258: bytes(16)}),
    "debugging disabled": saying({263: 1}),
    "another software": saying({270: "slyos"}),
    "another model of hardware": saying({259: b"Raspberry Pi 5"}),
    "another version of hardware": saying({260: ["1.5"]}),
    "no version of hardware": saying({260: ...}),
    "a version with a scheme": saying({271: ["0.1.0", 1]}),
    "one nonce in an array": saying({10: [digest("nonce")[:16]]}),
    "an empty array of nonces": saying({10: []}),
    "a nonce of text": saying({10: "x" * 16}),
    "an empty endorsement": saying({266: {"root": {-70_000: b""}}}),
    "an empty submodule": saying({266: {"root": {}}}),
    "another submodule": saying({266: {"root": {-70_000: b"x"}, "other": {}}}),
    "a submodule that is a token": saying({266: {"root": b"x"}}),
    "another format of measurements": saying({273: [[61, b""]]}),
    "two measurements": saying({273: [[60, b"\xa0"]] * 2}),
    "measurements as a map": saying({273: [[60, {}]]}),
    "no measurements": saying({273: []}),
    "an unknown claim": saying({275: 1}),
    "a location": saying({264: {1: 0.5, 2: 0.5}}),
    "a time with a fraction": saying({6: 1.5}),
    "an expiry before it was issued": saying({4: 1_790_000_000}),
    "not yet valid when it was issued": saying({5: 1_790_000_001}),
    "an unknown key kind": saying({}, {6: "hsm"}),
    "an unknown entry": saying({}, {17: 0}),
    "an empty delegate": saying({}, {11: b""}),
    "an empty name of a delegate": saying({}, {12: ""}),
    "a model with an empty golden digest": saying({}, {13: [{1: "m", 2: NO_DIGEST, 3: NO_DIGEST, 4: b""}]}),
    "a model of version 0": saying({}, {13: [{1: "m", 2: NO_DIGEST, 3: NO_DIGEST, 6: 0}]}),
    "a model in an empty slot": saying({}, {13: [{1: "m", 2: NO_DIGEST, 3: NO_DIGEST, 7: ""}]}),
    "a number that is true": saying({}, {2: True}),
    "its envelope under tag 61": encode(Tag(61, decode(sign_quote(a_quote(), B), tags=(18,)))),
}


@pytest.mark.parametrize("what", OTHER_FORMS)
def test_what_is_not_the_one_form_of_a_quote_is_refused_even_from_its_own_board(what: str) -> None:
    with pytest.raises(RefusedError):
        open_quote(OTHER_FORMS[what], find_key)


def test_the_form_that_is_changed_above_is_good_as_it_is() -> None:
    assert open_quote(saying({}), find_key) == a_quote()
    assert open_quote(saying({4: 1_790_000_001, 5: 1_790_000_000}), find_key) == a_quote()


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.binary(max_size=40) | st.text(max_size=9) | st.just(1.5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers(-70_000, 300) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.data())
def test_whatever_a_board_signs_as_its_quote_is_refused_or_is_what_our_signer_would_have_written(data: st.DataObject) -> None:
    honest = sign_quote(a_quote(endorsement=b"by hardware"), B)
    claims, ours = claims_in(honest), ours_in(honest)
    for entries in (claims, ours, ours[13][0]):
        if data.draw(st.booleans()):
            entries[data.draw(st.sampled_from([*entries, 11, 12, 260, 99]))] = data.draw(anything)
    message = sign1(encode({**claims, 273: [[60, encode(ours)]]}), B)
    try:
        quote = open_quote(message, find_key)
    except RefusedError:
        return
    assert sign_quote(quote, B) == message


def as_others_write_it(alg: int = -8, unprotected: dict[object, object] | None = None) -> Sign1:
    """The quote with its key id outside the signature, as the library cwt has it."""
    protected, payload = encode({1: alg}), decode_sign1(sign_quote(a_quote(), B)).payload
    signature = B.signature(to_be_signed(protected, b"", payload))
    return Sign1(protected, {4: b"b"} if unprotected is None else unprotected, payload, signature)


@pytest.mark.parametrize("alg", [-8, -19])
def test_a_token_with_its_key_id_outside_the_signature_is_taken(alg: int) -> None:
    assert open_quote(encode_sign1(as_others_write_it(alg)), find_key) == a_quote()


@pytest.mark.parametrize("unprotected", [{}, {4: b"c"}, {4: b"b", 33: b""}, {1: -8, 4: b"b"}, {4: "b"}])
def test_nothing_else_may_stand_outside_the_signature(unprotected: dict[object, object]) -> None:
    with pytest.raises(RefusedError):
        open_quote(encode_sign1(as_others_write_it(unprotected=unprotected)), find_key)


def test_nobody_makes_a_second_form_of_a_signed_quote_by_moving_its_key_id() -> None:
    ours, theirs = decode_sign1(sign_quote(a_quote(), B)), as_others_write_it(-19)
    for moved in (
        replace(ours, unprotected={4: b"b"}),
        replace(ours, protected=encode({1: -19}), unprotected={4: b"b"}),
        replace(theirs, protected=encode({1: -19, 4: b"b"}), unprotected={}),
        replace(theirs, protected=encode({1: -8})),
    ):
        with pytest.raises(RefusedError):
            open_quote(encode_sign1(moved), find_key)


# ---- a quote is nothing else, nothing else is a quote -------------------------------------------------------------------

OTHERS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "epoch": (epoch.AAD_EPOCH, lambda message: open_epoch(message, find_key)),
    "challenge": (epoch.AAD_CHALLENGE, lambda message: open_challenge(message, find_key)),
    "appraisal": (APPRAISAL_AAD, lambda message: open_appraisal(message, find_key)),
    "word": (words.AAD, lambda message: open_word(message, find_key)),
    "record": (record.AAD, lambda message: record.open_record(message, find_key)),
    "presence": (presence.AAD, lambda message: presence.open_presence(message, find_key)),
    "digest": (agreement.AAD, lambda message: agreement.open_digest(message, find_key)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_quote_is_no_other_message_and_no_other_message_is_a_quote(kind: str) -> None:
    aad, open_other = OTHERS[kind]
    quote = sign_quote(a_quote(measurements=replace(MEASURED, models=()), hardware="", nonces=(), version=""), B)
    with pytest.raises(RefusedError, match="does not fit|at most 512 bytes"):
        open_other(quote)
    with pytest.raises(RefusedError, match="does not fit"):
        open_other(sign1(b"\xa0", B))
    with pytest.raises(RefusedError, match="does not fit"):
        open_quote(sign1(decode_sign1(quote).payload, B, aad), find_key)


def test_only_a_quote_is_signed_without_a_purpose() -> None:
    rooms = (agreement, presence, record, wire, epoch, words, receipts)
    purposes = [value for room in rooms for name, value in vars(room).items() if name.startswith("AAD")] + [APPRAISAL_AAD]
    assert evidence.AAD == b"" and len(purposes) >= 14
    assert all(purposes) and len(set(purposes)) == len(purposes)


# ---- what hardware endorses ---------------------------------------------------------------------------------------------


def test_what_hardware_endorses_is_all_of_the_quote_but_the_endorsement() -> None:
    quote = a_quote()
    assert endorsed_digest(quote) == endorsed_digest(replace(quote, endorsement=b"by hardware"))
    other_model = replace(MEASURED, models=(replace(MEASURED.models[0], mapped=NO_DIGEST), *MEASURED.models[1:]))
    others = [
        a_quote(**change)
        for change in (
            {"board": "c"}, {"nonces": ()}, {"bootcount": 4}, {"bootseed": NO_DIGEST}, {"counter": 3}, {"previous": NO_DIGEST},
            {"issued_s": 1}, {"uptime_s": 1}, {"hardware": "x"}, {"emulated": True}, {"version": "0.1.1"}, {"receipts": 8},
            {"receipts_head": NO_DIGEST}, {"receipts_dropped": 0}, {"key_kind": KeyKind.TPM}, {"measurements": other_model},
        )
    ]  # fmt: skip
    assert len({endorsed_digest(each) for each in (quote, *others)}) == 1 + len(others)


# ---- contradiction ------------------------------------------------------------------------------------------------------


def contradict(a: Quote, b: Quote) -> str:
    return contradiction(a, sign_quote(a, B), b, sign_quote(b, B))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"issued_s": 5}, "two quotes with number 2 of boot 3"),
        ({"counter": 9, "bootseed": NO_DIGEST}, "boot 3 with two seeds"),
        ({"counter": 3, "previous": digest("another")}, "quote 3 of boot 3 follows another quote 2 than was shown"),
        ({"counter": 4, "receipts": 6, "receipts_head": digest("sixth")}, "receipts went back from 7 to 6"),
        ({"bootcount": 4, "bootseed": NO_DIGEST, "counter": 1, "receipts": 6}, "receipts went back from 7 to 6"),
        ({"counter": 4, "receipts_head": digest("other")}, "two heads of the chain of 7 receipts"),
        ({"bootcount": 2, "counter": 8, "receipts": 8}, "receipts went back from 8 to 7"),
    ],
)
def test_two_quotes_of_one_board_that_contradict_each_other(changes: dict[str, Any], why: str) -> None:
    one, other = a_quote(), a_quote(**changes)
    assert contradict(one, other) == contradict(other, one) == why


def test_quotes_of_two_boards_contradict_nothing() -> None:
    one, other = a_quote(), a_quote(board="c", issued_s=5)
    assert contradiction(one, sign_quote(one, B), other, sign_quote(other, signer("c"))) == ""


def test_contradiction_is_what_no_honest_board_can_say_over_all_small_cases() -> None:
    """Against the laws of an honest board, each said as it is: for every pair of 216 quotes."""
    cases = [
        (a_quote(bootcount=boot, bootseed=seed, counter=counter, previous=previous, receipts=count, receipts_head=head,
                 receipts_dropped=0), message)
        for boot, seed, counter, previous, (count, head) in product(
            (1, 2), (digest("s"), digest("t")), (1, 2, 3), (NO_DIGEST, quote_digest(b"0"), quote_digest(b"1")),
            ((0, NO_DIGEST), (1, digest("h")), (1, digest("i"))),
        )
        for message in (b"0", b"1")
    ]  # fmt: skip

    def honest(a: Quote, a_bytes: bytes, b: Quote, b_bytes: bytes) -> bool:
        numbered_once = a.number != b.number
        seeded_once = a.bootcount != b.bootcount or a.bootseed == b.bootseed
        forwards = all(x.receipts <= y.receipts for x, y in ((a, b), (b, a)) if x.number < y.number)
        one_chain = a.receipts != b.receipts or a.receipts_head == b.receipts_head
        linked = all(
            y.previous == quote_digest(x_bytes)
            for x, x_bytes, y in ((a, a_bytes, b), (b, b_bytes, a))
            if x.bootcount == y.bootcount and x.counter + 1 == y.counter
        )
        return numbered_once and seeded_once and forwards and one_chain and linked

    assert len(cases) == 216
    for (a, a_bytes), (b, b_bytes) in product(cases, repeat=2):
        if a_bytes != b_bytes:
            found = contradiction(a, a_bytes, b, b_bytes)
            assert bool(found) != honest(a, a_bytes, b, b_bytes), (a, b, found)
            assert found == contradiction(b, b_bytes, a, a_bytes)


@given(st.lists(st.tuples(st.sampled_from(["quote", "receipt", "boot", "clock"]), st.integers(0, 2**32)), max_size=25))
def test_an_honest_board_never_contradicts_itself_whatever_is_lost_or_late(steps: list[tuple[str, int]]) -> None:
    quote = a_quote(counter=1, previous=NO_DIGEST, receipts=0, receipts_head=NO_DIGEST, receipts_dropped=0)
    said = [(quote, sign_quote(quote, B))]
    for what, number in steps:
        message = said[-1][1]
        if what == "receipt":
            quote = replace(quote, receipts=quote.receipts + 1, receipts_head=digest(f"{quote.receipts} {number}"))
            continue
        if what == "boot":
            quote = replace(quote, bootcount=quote.bootcount + 1, bootseed=digest(str(number)), counter=1, previous=NO_DIGEST)
        elif what == "clock":
            quote = replace(quote, issued_s=number)
            continue
        else:
            quote = replace(quote, counter=quote.counter + 1, previous=quote_digest(message), nonces=(digest(str(number))[:16],))
        said.append((quote, sign_quote(quote, B)))
    assert not [1 for (a, a_bytes), (b, b_bytes) in product(said, repeat=2) if contradiction(a, a_bytes, b, b_bytes)]
