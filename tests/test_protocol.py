"""``docs/protocol.cddl`` and the code say the same, message by message and bound by bound."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.attest.appraisal import AAD as APPRAISAL_AAD
from edge_agent.attest.appraisal import Appraisal, Vector, open_appraisal, sign_appraisal
from edge_agent.attest.epoch import (
    AAD_CHALLENGE,
    AAD_EPOCH,
    Challenge,
    EpochMark,
    open_challenge,
    open_epoch,
    sign_challenge,
    sign_epoch,
)
from edge_agent.attest.evidence import Quote, open_quote, sign_quote
from edge_agent.attest.proof import Asked, Proof, decode_proof, encode_proof
from edge_agent.attest.receipts import AAD as RECEIPT_AAD
from edge_agent.attest.receipts import Receipt, open_receipt
from edge_agent.attest.self_test import AAD as SELF_TEST_AAD
from edge_agent.attest.self_test import Check, SelfTest, Verdict, open_self_test, self_test_map
from edge_agent.attest.words import AAD as WORD_AAD
from edge_agent.attest.words import Action, OperatorWord, open_word, sign_word
from edge_agent.core import wire
from edge_agent.core.cbor import Tag, decode, encode
from edge_agent.core.cose import Signer, decode_sign1, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import KvAnswer, KvAsk, KvHome, KvItem, KvState, Place
from edge_agent.core.values import AnswerPart, EnergyKind, InferenceRequest, InferenceResult, Status, Tensor, TrustTier
from edge_agent.gateway.local import LENGTH_BYTES, LocalConnection, LocalServer
from edge_agent.gossip.agreement import AAD as DIGEST_AAD
from edge_agent.gossip.agreement import BoardDigest, Version, open_digest
from edge_agent.gossip.presence import AAD as PRESENCE_AAD
from edge_agent.gossip.presence import Presence, open_presence, sign_presence
from edge_agent.gossip.record import AAD as RECORD_AAD
from edge_agent.gossip.record import BoardRecord, open_record, sign_record
from tests import attested, update_messages
from tests.drawn import digests, parts, presences, records, requests, results
from tests.needs import needs_module
from tests.update_messages import by_code
from tests.virtual_board import TASK, offer

CDDL = Path(__file__).resolve().parents[1] / "docs" / "protocol.cddl"
SIGNER = Signer(b"b", b"\7" * 32)


@cache
def schema(rule: str) -> Any:
    """The protocol with ``rule`` as its root, in what pycddl 0.6 understands: it does not anchor regular expressions (RFC 8610,
    section 3.8.3), takes none for a key, knows no negative ranges, nor one beside another, and follows no .cbor inside an
    array."""
    import pycddl  # type: ignore[import-not-found,unused-ignore]

    text = re.sub(r'\.regexp "([^"]+)"', r'.regexp "^(\1)$"', CDDL.read_text())
    text = text.replace("-1000000..1000000", "int").replace("-128..-1 / 1..127", "int")
    text = text.replace("board-id =>", "text =>")
    text = re.sub(r"bytes \.cbor (protected-header|foreign-header|quote-measurements)", "bytes", text)
    return pycddl.Schema(f"root = {rule}\n{text}")


def is_a(rule: str, data: bytes) -> bool:
    needs_module("pycddl", "dev")
    import pycddl

    try:
        schema(rule).validate_cbor(data)
    except pycddl.ValidationError:
        return False
    return True


def key_of(kid: bytes) -> bytes | None:
    return SIGNER.public_key


def payload(message: bytes) -> bytes:
    return decode_sign1(message).payload


QUOTE = attested.a_quote(hardware="")
CLAIMS: Any = decode(payload(sign_quote(QUOTE, SIGNER)))


def measured(data: bytes) -> bytes:
    """A quote whose measurements are these bytes."""
    return sign1(encode({**CLAIMS, 273: [[60, data]]}), SIGNER)


RECEIPT = Receipt(
    "b", 1, 0, 2, b"\1" * 32, "ab" * 16, bytes(32), "small", bytes(32), bytes(32), bytes(32), (bytes(32),), 1, 2, 3,
    EnergyKind.MEASURED,
)  # fmt: skip
ASKED = Asked("ab" * 16, bytes(32), bytes(32), bytes(32), bytes(32))
MODEL_MAP = {1: "small", 2: bytes(32), 3: bytes(32)}
KV = KvState("small", bytes(32), 1, 1, 0, 1, homes=(KvHome(bytes(16), 9, Place.DISK),))
OFFER_MAP = {1: "small", 2: TASK, 3: bytes(32), 4: 1, 5: 1, 6: 1}
DEMAND_MAP = {1: TASK, 3: 5, 4: 16, 5: 1 << 20, 10: 500}
KV_MAP = {1: "small", 2: bytes(32), 3: 1, 4: 1, 5: 0, 6: 1, 7: 0, 8: 0, 9: 0, 10: 0, 11: []}
PASSED = {1: "clock", 2: "pass", 3: "set"}
EXAMPLES: dict[str, tuple[bytes, Callable[[bytes], bool]]] = {
    "request": (
        wire.encode_request(InferenceRequest("ab" * 16, TASK, {"image": Tensor("uint8", (2,), b"\1\2")}, "small"), "b"),
        by_code(lambda data: wire.decode_request(data, "b")),
    ),
    "result": (
        wire.encode_result(
            InferenceResult("ab" * 16, Status.OK, "b", "small", bytes(32), {"x": Tensor("float32", (0, 4), b"")}), "b"
        ),
        by_code(lambda data: wire.decode_result(data, "b")),
    ),
    "board-record": (
        encode(BoardRecord("b", 1, 2, "Orin", False, True, 5, 50_000, 85_000, (offer("small", 9),), (KV,)).to_map()),
        by_code(lambda data: open_record(sign1(data, SIGNER, RECORD_AAD), key_of)),
    ),
    "answer-part": (
        wire.encode_part(AnswerPart("ab" * 16, 7, "so far", 3), "b"),
        by_code(lambda data: wire.decode_part(data, "b")),
    ),
    "cancellation": (wire.encode_cancel("ab" * 16, "b"), by_code(lambda data: wire.decode_cancel(data, "b"))),
    "kv-ask": (
        wire.encode_kv_ask(KvAsk(bytes(16), bytes(32), KvItem.MANIFEST), "b"),
        by_code(lambda data: wire.decode_kv_ask(data, "b")),
    ),
    "kv-answer": (
        wire.encode_kv_answer(KvAnswer(bytes(16), KvItem.BLOCK, bytes(32), b"x"), "b"),
        by_code(lambda data: wire.decode_kv_answer(data, "b")),
    ),
    "digest": (
        encode(BoardDigest("b", 1, 2, bytes(32), bytes(32), bytes(32), 3, (Version("a", 1, 2),), (b"x",)).to_map()),
        by_code(lambda data: open_digest(sign1(data, SIGNER, DIGEST_AAD), key_of)),
    ),
    "quote-measurements": (CLAIMS[273][0][1], by_code(lambda data: open_quote(measured(data), key_of))),
    "epoch-mark": (
        payload(sign_epoch(EpochMark("b", 1, 2, bytes(16)), SIGNER)),
        by_code(lambda data: open_epoch(sign1(data, SIGNER, AAD_EPOCH), key_of)),
    ),
    "challenge": (
        payload(sign_challenge(Challenge("b", "c", bytes(16)), SIGNER)),
        by_code(lambda data: open_challenge(sign1(data, SIGNER, AAD_CHALLENGE), key_of)),
    ),
    "appraisal": (
        payload(
            sign_appraisal(
                Appraisal("b", 1, 2, "c", TrustTier.WARNING, Vector(2), ("new code",), bytes(32), 1, 2, 3, 4, (b"x",)), SIGNER
            )
        ),
        by_code(lambda data: open_appraisal(sign1(data, SIGNER, APPRAISAL_AAD), key_of)),
    ),
    "operator-word": (
        payload(sign_word(OperatorWord("b", "c", 1, Action.CLEAR, "mended"), SIGNER)),
        by_code(lambda data: open_word(sign1(data, SIGNER, WORD_AAD), key_of)),
    ),
    "receipt": (encode(RECEIPT.to_map()), by_code(lambda data: open_receipt(sign1(data, SIGNER, RECEIPT_AAD), key_of))),
    "proof": (encode_proof(Proof((b"x",), (b"y",), (b"z",), (ASKED,), {"b": (1, 2)})), by_code(decode_proof)),
    "asked": (encode(ASKED.to_map()), by_code(lambda data: Asked.from_map(decode(data)))),
    "presence": (
        encode({1: "b", 2: 1, 3: "online"}),
        by_code(lambda data: open_presence(sign1(data, SIGNER, PRESENCE_AAD), key_of)),
    ),
    "self-test": (
        encode(self_test_map(SelfTest("b", 1, 2, "0.1.0", (Check("disk", Verdict.FAIL, "full", "make room"),)))),
        by_code(lambda data: open_self_test(sign1(data, SIGNER, SELF_TEST_AAD), key_of)),
    ),
    **update_messages.EXAMPLES,
}


@given(requests)
def test_every_request_is_one_by_the_protocol(request: InferenceRequest) -> None:
    assert is_a("request", wire.encode_request(request, "a"))


@given(results)
def test_every_result_is_one_by_the_protocol(result: InferenceResult) -> None:
    assert is_a("result", wire.encode_result(result, "camera-1"))


@given(records)
def test_every_record_is_one_by_the_protocol(record: BoardRecord) -> None:
    assert is_a("board-record", encode(record.to_map()))


@given(digests)
def test_every_digest_is_one_by_the_protocol(digest: BoardDigest) -> None:
    assert is_a("digest", encode(digest.to_map()))


@given(parts)
def test_every_part_is_one_by_the_protocol(part: AnswerPart) -> None:
    assert is_a("answer-part", wire.encode_part(part, "camera-1"))


@given(presences)
def test_every_presence_is_one_by_the_protocol(presence: Presence) -> None:
    message = decode_sign1(sign_presence(presence, SIGNER))
    assert is_a("presence", message.payload)


@given(attested.quotes)
def test_every_quote_is_one_by_the_protocol(quote: Quote) -> None:
    claims: Any = decode(payload(sign_quote(quote, attested.signer(quote.board))))
    assert is_a("quote-claims", encode(claims)) and is_a("quote-measurements", claims[273][0][1])


@given(attested.marks, attested.challenges)
def test_every_mark_and_challenge_is_one_by_the_protocol(mark: EpochMark, challenge: Challenge) -> None:
    assert is_a("epoch-mark", payload(sign_epoch(mark, SIGNER)))
    assert is_a("challenge", payload(sign_challenge(challenge, SIGNER)))


@given(attested.appraisals, attested.words)
def test_every_appraisal_and_operators_word_is_one_by_the_protocol(appraisal: Appraisal, word: OperatorWord) -> None:
    assert is_a("appraisal", payload(sign_appraisal(appraisal, SIGNER)))
    assert is_a("operator-word", payload(sign_word(word, SIGNER)))


DERIVED = {259, 260}
"""Optional by the protocol, since they follow from the hardware's name; the code wants what follows."""


def test_code_and_protocol_refuse_the_same_when_a_claim_of_a_quote_is_missing_unknown_or_of_another_type() -> None:
    claims: Any = decode(payload(sign_quote(attested.a_quote(endorsement=b"x"), SIGNER)))
    accepts = by_code(lambda data: open_quote(sign1(data, SIGNER), key_of))
    assert accepts(encode(claims)) and is_a("quote-claims", encode(claims))
    for key in claims:
        rest = {other: value for other, value in claims.items() if other != key}
        assert accepts(encode(rest)) == (is_a("quote-claims", encode(rest)) and key not in DERIVED), key
        for wrong in ({**claims, key: 1.5}, {**claims, key: None}, {**claims, key: []}, {**claims, 99: 0}):
            assert not accepts(encode(wrong)) and not is_a("quote-claims", encode(wrong)), (key, wrong)


CLAIM_BOUNDS = [
    (4, 2**53, CLAIMS[6]),
    (5, 0, CLAIMS[6] + 1),
    (6, 2**53, 2**53 + 1),
    (10, [bytes(16)] * 64, [bytes(16)] * 65),
    (10, bytes(16), bytes(17)),
    (10, [bytes(16)] * 2, [bytes(16)]),
    (261, 0, -1),
    (266, {"root": {-70_000: bytes(4096)}}, {"root": {-70_000: bytes(4097)}}),
    (266, {"root": {-70_000: b"x"}}, {"root": {-70_001: b"x"}}),
    (267, 2**53, 2**53 + 1),
    (268, b"x" * 32, bytes(31)),
    (271, [""], ["", ""]),
    (273, CLAIMS[273], []),
]


@pytest.mark.parametrize(("key", "within", "beyond"), CLAIM_BOUNDS)
def test_code_and_protocol_have_the_same_bounds_of_claims(key: int, within: object, beyond: object) -> None:
    accepts = by_code(lambda data: open_quote(sign1(data, SIGNER), key_of))
    assert accepts(encode({**CLAIMS, key: within})) and is_a("quote-claims", encode({**CLAIMS, key: within}))
    assert not accepts(encode({**CLAIMS, key: beyond}))
    assert key in (4, 5) or not is_a("quote-claims", encode({**CLAIMS, key: beyond}))


@pytest.mark.parametrize("message", [sign_record(BoardRecord("b", 1, 1), SIGNER), sign1(b"", SIGNER, b"sly/1/request")])
def test_what_is_signed_is_one_by_the_protocol(message: bytes) -> None:
    assert is_a("signed", message) and is_a("protected-header", decode_sign1(message).protected)
    parts = decode_sign1(message)
    for wrong in (
        Tag(18, [parts.protected, {}, parts.payload, parts.signature[:63]]),
        Tag(18, [parts.protected, {}, parts.payload]),
        [parts.protected, {}, parts.payload, parts.signature],
    ):
        assert not is_a("signed", encode(wrong))


@pytest.mark.parametrize("kind", EXAMPLES)
def test_code_and_protocol_refuse_the_same_when_a_field_is_missing_unknown_or_of_another_type(kind: str) -> None:
    data, accepts = EXAMPLES[kind]
    entry = decode(data)
    assert isinstance(entry, dict) and accepts(data) and is_a(kind, data)
    for key in entry:
        rest = {other: value for other, value in entry.items() if other != key}
        for wrong in (encode(rest), encode({**entry, key: 1.5}), encode({**entry, key: None}), encode({**entry, 99: 0})):
            assert accepts(wrong) == is_a(kind, wrong), (key, decode(wrong))


BOUNDS = [
    ("presence", 2, 2**53, 2**53 + 1),
    ("presence", 2, 0, -1),
    ("presence", 3, "stopped", "asleep"),
    ("board-record", 7, 10**15, 10**15 + 1),
    ("board-record", 8, -1_000_000, "cold"),
    ("board-record", 9, 1_000_000, "hot"),
    ("board-record", 10, [], [{}]),
    ("board-record", 11, [KV_MAP], []),
    ("board-record", 11, [{**KV_MAP, 3: 2**24}], [{**KV_MAP, 3: 2**24 + 1}]),
    ("board-record", 11, [{**KV_MAP, 8: 10**9}], [{**KV_MAP, 8: 10**9 + 1}]),
    ("board-record", 11, [{**KV_MAP, 11: [[bytes(16), 2**31, 2]]}], [{**KV_MAP, 11: [[bytes(16), 2**31, 3]]}]),
    ("board-record", 11, [{**KV_MAP, 11: [[bytes(16), 0, 0]]}], [{**KV_MAP, 11: [[bytes(15), 0, 0]]}]),
    ("board-record", 11, [{**KV_MAP, 2: b"x" * 32}], [{**KV_MAP, 2: b"x" * 31}]),
    ("board-record", 10, [{**OFFER_MAP, 7: 256}], [{**OFFER_MAP, 7: 257}]),
    ("board-record", 10, [{**OFFER_MAP, 7: 2}], [{**OFFER_MAP, 7: 1}]),
    ("board-record", 10, [{**OFFER_MAP, 8: [[127, 1, 10**15, 2**31]]}], [{**OFFER_MAP, 8: [[128, 1, 0, 0]]}]),
    ("board-record", 10, [{**OFFER_MAP, 8: [[0, 1, 0, 0]]}], [{**OFFER_MAP, 8: [[0, 0, 0, 0]]}]),
    (
        "board-record",
        10,
        [{**OFFER_MAP, 8: [[n, 1, 0, 0] for n in range(8)]}],
        [{**OFFER_MAP, 8: []}],
    ),
    ("board-record", 10, [{**OFFER_MAP, 9: 2**31}], [{**OFFER_MAP, 9: 0}]),
    ("board-record", 12, [DEMAND_MAP], []),
    ("board-record", 12, [{**DEMAND_MAP, 10: 10**9}], [{**DEMAND_MAP, 10: 10**9 + 1}]),
    ("board-record", 12, [{**DEMAND_MAP, 2: "m", 6: 10, 7: 8, 8: 3, 9: "local"}], [{**DEMAND_MAP, 8: 1}]),
    ("board-record", 12, [{**DEMAND_MAP, 9: "public"}], [{**DEMAND_MAP, 9: "private"}]),
    ("board-record", 12, [{**DEMAND_MAP, 4: 2**40}], [{**DEMAND_MAP, 4: 2**41}]),
    ("board-record", 13, [1, -1_000_000, 1_000_000], [1, 2]),
    ("board-record", 14, [5] * 9, [5] * 8),
    ("digest", 4, b"x" * 32, bytes(31)),
    ("digest", 7, 1024, 1025),
    ("digest", 8, [["a", 0, 2**53]], [["a", 0]]),
    ("digest", 8, [["a", 0, 0], ["b", 0, 0]], []),
    ("digest", 9, [b"x"] * 8, [b"x"] * 9),
    ("quote-measurements", 2, 2**53, 0),
    ("quote-measurements", 3, b"x" * 32, b""),
    ("quote-measurements", 4, "", "x" * 513),
    ("quote-measurements", 6, "tpm", "hsm"),
    ("quote-measurements", 9, "x" * 128, "x" * 513),
    ("quote-measurements", 11, b"x" * 32, b""),
    ("quote-measurements", 12, "x", ""),
    ("quote-measurements", 13, [], [{}]),
    ("quote-measurements", 13, [{**MODEL_MAP, 1: f"{n}"} for n in range(64)], [{**MODEL_MAP, 1: f"{n}"} for n in range(65)]),
    ("quote-measurements", 13, [{**MODEL_MAP, 4: b"x" * 32}], [{**MODEL_MAP, 4: b""}]),
    ("quote-measurements", 13, [{**MODEL_MAP, 5: 0}], [{**MODEL_MAP, 5: 1001}]),
    ("quote-measurements", 13, [{**MODEL_MAP, 6: 2**53}], [{**MODEL_MAP, 6: 0}]),
    ("quote-measurements", 13, [{**MODEL_MAP, 7: "x" * 32}], [{**MODEL_MAP, 7: ""}]),
    ("quote-measurements", 14, 2**53, 2**53 + 1),
    ("epoch-mark", 4, b"x" * 16, bytes(17)),
    ("epoch-mark", 3, 2**53, 2**53 + 1),
    ("challenge", 2, "d", "D"),
    ("challenge", 3, b"x" * 16, b""),
    ("appraisal", 5, 0, 4),
    ("appraisal", 6, {}, {0: 2, 8: 2}),
    ("appraisal", 6, {7: 127, 0: -128}, {0: "trusted"}),
    ("appraisal", 7, ["x" * 256] * 8, ["x"] * 9),
    ("appraisal", 7, ["x"], []),
    ("appraisal", 7, ["x"], [""]),
    ("appraisal", 8, b"x" * 32, b""),
    ("appraisal", 13, [bytes(24_576)] * 2, [b"x"] * 3),
    ("appraisal", 13, [b"x"], [bytes(24_577)]),
    ("appraisal", 13, [b"x"], []),
    ("operator-word", 3, 2**53, 0),
    ("operator-word", 4, "revoke", "pardon"),
    ("operator-word", 5, "x" * 256, ""),
    ("request", 5, {1: 1, 3: 0, 4: 3}, {1: 1, 3: 0, 4: 1}),
    ("request", 8, "local", "private"),
    ("request", 9, 2**20, 0),
    ("answer-part", 2, 2**20, 2**20 + 1),
    ("answer-part", 3, "x" * 16_384, ""),
    ("answer-part", 4, 2**20, 2**20 + 1),
    ("kv-ask", 1, b"x" * 16, bytes(15)),
    ("kv-ask", 2, b"x" * 32, bytes(31)),
    ("kv-ask", 3, 3, 4),
    ("kv-answer", 4, b"x" * 32, bytes(31)),
    ("kv-answer", 3, 1, 4),
    ("cancellation", 1, bytes(16), bytes(15)),
    ("receipt", 2, 2**53, 2**53 + 1),
    ("receipt", 3, 0, -1),
    ("receipt", 4, 2**53, 0),
    ("receipt", 6, bytes(16), bytes(15)),
    ("receipt", 9, b"x" * 32, bytes(31)),
    ("receipt", 12, [bytes(32)] * 16, []),
    ("receipt", 12, [bytes(32)], [bytes(31)]),
    ("receipt", 13, 2**63 - 1, 2**63),
    ("receipt", 16, "emulated", "guessed"),
    ("proof", 1, "sly/1/proof", "sly/2/proof"),
    ("proof", 2, [bytes(4096)], [bytes(4097)]),
    ("proof", 2, [b""], []),
    ("proof", 3, [bytes(24576)], [bytes(24577)]),
    ("proof", 4, [bytes(65536)], [bytes(65537)]),
    ("proof", 5, [ASKED.to_map()], [{}]),
    ("proof", 6, [["b", 1, 2**53]], [["b", 0, 1]]),
    ("proof", 6, [["b", 2, 2], ["c", 1, 1]], []),
    ("asked", 5, b"x" * 32, b""),
    ("request", 7, "s:1", "s 1"),
    ("request", 1, bytes(16), bytes(17)),
    ("request", 3, "m" * 64, "Not a model"),
    ("request", 5, {1: 3_600_000_000, 3: 1000}, {1: 3_600_000_001, 3: 1000}),
    ("request", 5, {1: 1, 3: 0}, {1: 0, 3: 0}),
    ("request", 5, {1: 1, 2: 10**12, 3: 0}, {1: 1, 2: 10**12 + 1, 3: 0}),
    ("request", 5, {1: 1, 3: 1000}, {1: 1, 3: 1001}),
    ("request", 4, {}, {"x": {1: "complex64", 2: [1], 3: bytes(8)}}),
    ("request", 4, {"x": {1: "bool", 2: [1] * 8, 3: b"\1"}}, {"x": {1: "bool", 2: [1] * 9, 3: b"\1"}}),
    ("result", 2, "shed", "fine"),
    ("result", 4, "", "Not a model"),
    ("result", 5, b"", bytes(31)),
    ("result", 7, 10**12, 10**12 + 1),
    ("result", 8, 10**15, 10**15 + 1),
    ("result", 9, "emulated", "guessed"),
    ("self-test", 2, 2**53, 2**53 + 1),
    ("self-test", 3, 2**53, 2**53 + 1),
    ("self-test", 4, "x" * 64, ""),
    ("self-test", 5, [PASSED], []),
    ("self-test", 5, [{**PASSED, 1: f"c{n}"} for n in range(16)], [{**PASSED, 1: f"c{n}"} for n in range(17)]),
    ("self-test", 5, [{**PASSED, 1: "c" * 32}], [{**PASSED, 1: "Clock"}]),
    ("self-test", 5, [{**PASSED, 2: "warn", 4: "do"}], [{**PASSED, 2: "warn"}]),
    ("self-test", 5, [{**PASSED, 2: "fail", 4: "do"}], [{**PASSED, 2: "lost", 4: "do"}]),
    ("self-test", 5, [{**PASSED, 3: "x" * 240}], [{**PASSED, 3: ""}]),
    ("self-test", 5, [{**PASSED, 2: "fail", 4: "x" * 240}], [{**PASSED, 2: "fail"}]),
    *update_messages.BOUNDS,
]


@pytest.mark.parametrize(("kind", "key", "within", "beyond"), BOUNDS)
def test_code_and_protocol_have_the_same_bounds(kind: str, key: int, within: object, beyond: object) -> None:
    data, accepts = EXAMPLES[kind]
    entry = decode(data)
    assert isinstance(entry, dict)
    for value, fits in ((within, True), (beyond, False)):
        changed = encode({**entry, key: value})
        assert accepts(changed) == is_a(kind, changed) == fits, value


@pytest.mark.parametrize(("within", "beyond"), update_messages.CHUNK_BOUNDS)
def test_code_and_protocol_have_the_same_bounds_of_pieces(within: object, beyond: object) -> None:
    for value, fits in ((within, True), (beyond, False)):
        assert update_messages.takes_chunk(encode(value)) == is_a("chunk", encode(value)) == fits
    assert is_a("chunk", update_messages.CHUNK)


@given(st.sampled_from(sorted(EXAMPLES)), st.data())
def test_what_the_code_takes_is_always_within_the_protocol(kind: str, data: st.DataObject) -> None:
    example, accepts = EXAMPLES[kind]
    entry = decode(example)
    assert isinstance(entry, dict)
    key = data.draw(st.sampled_from([*entry, 3, 42]))
    value = data.draw(st.none() | st.booleans() | st.integers(-10, 2**60) | st.text(max_size=4))
    changed = encode({**entry, key: value})
    assert is_a(kind, changed) or not accepts(changed)


def test_frames_on_a_boards_own_socket_are_calls_and_answers_by_the_protocol(tmp_path: Path) -> None:
    frames: list[bytes] = []

    async def handle(verb: str, body: object) -> object:
        if verb == "explain":
            raise RefusedError("request", body, "an id that is remembered")
        return {"verb": verb}

    class Overheard(LocalConnection):
        def connect(self) -> None:
            super().connect()
            assert self._socket is not None

        def _receive(self, size_bytes: int) -> bytes:
            data = super()._receive(size_bytes)
            frames.append(data)
            return data

    def ask() -> None:
        with Overheard(tmp_path / "s") as connection:
            connection.call("status")
            with pytest.raises(RefusedError):
                connection.call("explain", "ab" * 16)

    async def play() -> None:
        server = LocalServer(tmp_path / "s", handle)
        await server.start()
        await asyncio.to_thread(ask)
        await server.close()

    asyncio.run(play())
    answers = [frame for frame in frames if len(frame) > LENGTH_BYTES]
    assert len(answers) == 2 and all(is_a("answer", answer) for answer in answers)
    for verb, body in (("infer", EXAMPLES["request"][0]), ("explain", "ab" * 16), ("status", None), ("status", 4)):
        assert is_a("call", encode({0: 1, 1: verb, 2: body}))
    assert not is_a("call", encode({0: 1, 1: "reboot", 2: None}))
