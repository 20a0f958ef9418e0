from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings

from edge_agent.core.cbor import MAX_CBOR_BYTES, Tag, decode, encode
from edge_agent.core.cose import (
    EDDSA,
    MAX_SIGNED_BYTES,
    Sign1,
    Signed,
    Signer,
    decode_sign1,
    encode_sign1,
    sign1,
    to_be_signed,
    verify1,
    verify_signature,
)
from edge_agent.core.errors import RefusedError
from tests.needs import needs_shared

SIGNER = Signer(b"board-01", bytes(range(32)))
OTHER = Signer(b"board-02", bytes(range(1, 33)))
KEYS = {signer.kid: signer.public_key for signer in (SIGNER, OTHER)}
RECORD = b"sly/1/record"
PAYLOAD = encode({1: "board-01", 2: 7})
MESSAGE = sign1(PAYLOAD, SIGNER, RECORD)

EXAMPLES = (
    "eddsa-sig-01", "sign-pass-01", "sign-pass-02", "sign-pass-03",
    "sign-fail-01", "sign-fail-02", "sign-fail-03", "sign-fail-04", "sign-fail-06", "sign-fail-07",
)  # fmt: skip
LABELS = {"alg": 1, "ctyp": 3, "kid": 4}
ALGORITHMS = {"EdDSA": -8, "ES256": -7}
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
"""L of RFC 8032 section 5.1."""


def example_of(name: str) -> dict[str, Any]:
    example: dict[str, Any] = json.loads(needs_shared("vectors", "cose", f"{name}.json").read_text())
    return example


def protected_of(example: Mapping[str, Any]) -> bytes:
    """The protected header that the example's author signed, encoded."""
    sign0 = example["input"]["sign0"]
    changed = example["input"].get("failures", {}).get("ChangeProtected")
    if changed is not None:
        return bytes.fromhex(changed)
    return encode({LABELS[label]: ALGORITHMS.get(value, value) for label, value in sign0["protected"].items()})


def message_of(example: Mapping[str, Any]) -> bytes:
    return bytes.fromhex(example["output"]["cbor"])


def with_header(protected: Mapping[object, object], unprotected: Mapping[object, object] | None = None) -> bytes:
    """A message that is well signed by SIGNER, whatever its headers say."""
    header = encode(protected)
    signature = SIGNER.signature(to_be_signed(header, RECORD, PAYLOAD))
    return encode_sign1(Sign1(header, unprotected or {}, PAYLOAD, signature))


def refusal(message: bytes, aad: bytes = RECORD, **options: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        verify1(message, KEYS.get, aad, **options)
    assert PAYLOAD.hex() not in str(caught.value) and repr(PAYLOAD)[2:-1] not in str(caught.value)
    return str(caught.value)


# The examples of the COSE working group


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_bytes_to_be_signed_are_those_of_the_example(name: str) -> None:
    example = example_of(name)
    sign0 = example["input"]["sign0"]
    external_aad = bytes.fromhex(sign0.get("external", ""))
    signed_bytes = to_be_signed(protected_of(example), external_aad, example["input"]["plaintext"].encode())
    assert signed_bytes.hex() == example["intermediates"]["ToBeSign_hex"].lower()


def test_every_example_that_is_there_is_used() -> None:
    assert {path.stem for path in needs_shared("vectors", "cose").glob("*.json")} == set(EXAMPLES)


def test_the_eddsa_example_is_signed_verified_and_encoded_byte_for_byte() -> None:
    example = example_of("eddsa-sig-01")
    key, payload = example["input"]["sign0"]["key"], example["input"]["plaintext"].encode()
    signer = Signer(key["kid"].encode(), bytes.fromhex(key["d_hex"]))
    assert signer.public_key.hex() == key["x_hex"]
    protected = protected_of(example)
    signature = signer.signature(to_be_signed(protected, b"", payload))
    message = encode_sign1(Sign1(protected, {LABELS["kid"]: signer.kid}, payload, signature))
    assert message == message_of(example)
    assert encode_sign1(decode_sign1(message)) == message
    keys = {signer.kid: signer.public_key}
    assert verify1(message, keys.get, unprotected=[LABELS["kid"]]) == Signed(payload, signer.kid, EDDSA)
    with pytest.raises(RefusedError, match="unprotected header"):
        verify1(message, keys.get)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "fail" in name])
def test_the_fail_examples_are_refused(name: str) -> None:
    example = example_of(name)
    assert example["fail"]
    key = SIGNER.public_key
    with pytest.raises(RefusedError, match=r"tag 998|algorithm"):
        verify1(message_of(example), lambda kid: key, unprotected=[LABELS["kid"]])


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "fail" in name])
def test_the_fail_examples_done_to_our_own_message_are_refused(name: str) -> None:
    failure = example_of(name)["input"]["failures"]
    parts = decode_sign1(MESSAGE)
    header: Any = decode(parts.protected)
    match failure:
        case {"ChangeCBORTag": tag}:
            bad, reason = encode(Tag(tag, [parts.protected, {}, parts.payload, parts.signature])), f"tag {tag}"
        case {"ChangeTag": _}:
            bad, reason = encode_sign1(Sign1(parts.protected, {}, parts.payload[:-1] + b"\x08", parts.signature)), "signature"
        case {"ChangeAttr": {"alg": algorithm}}:
            bad, reason = encode_sign1(Sign1(encode(header | {1: algorithm}), {}, parts.payload, parts.signature)), "algorithm"
        case {"AddProtected": {"ctyp": content_type}}:
            bad, reason = encode_sign1(Sign1(encode(header | {3: content_type}), {}, parts.payload, parts.signature)), "signature"
        case {"RemoveProtected": {"ctyp": content_type}}:
            full = decode_sign1(with_header(header | {3: content_type}))
            bad, reason = encode_sign1(Sign1(parts.protected, {}, full.payload, full.signature)), "signature: got"
        case _:
            pytest.fail(f"a new kind of failure: {failure}")
    assert reason in refusal(bad)


# Signing


@given(st.binary(max_size=200), st.binary(max_size=40), st.binary(min_size=1, max_size=64), st.binary(min_size=32, max_size=32))
@settings(deadline=None)
def test_what_is_signed_is_verified_with_its_purpose_and_with_no_other(
    payload: bytes, aad: bytes, kid: bytes, seed: bytes
) -> None:
    signer = Signer(kid, seed)
    message = sign1(payload, signer, aad)
    assert message == sign1(payload, Signer(kid, seed), aad)
    assert decode(message, tags=[18]) == Tag(18, [encode({1: -19, 4: kid}), {}, payload, message[-64:]])
    assert verify1(message, {kid: signer.public_key}.get, aad) == Signed(payload, kid, -19)
    with pytest.raises(RefusedError, match="signature"):
        verify1(message, {kid: signer.public_key}.get, aad + b"\x00")


def test_a_signature_is_that_of_rfc_8032_section_7_1_test_3() -> None:
    seed = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
    assert Signer(b"3", seed).public_key.hex() == "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
    assert Signer(b"3", seed).signature(b"\xaf\x82").hex() == (
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
    )


def test_a_signer_shows_its_secret_to_nobody() -> None:
    seed = hashlib.sha256(b"secret").digest()
    signer = Signer(b"board-01", seed)
    for text in (repr(signer), str(signer), f"{signer}"):
        assert seed.hex() not in text and repr(seed)[2:-1] not in text
    assert "board-01" in repr(signer) and signer.public_key.hex() in repr(signer)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leak(signer)
    with pytest.raises(TypeError):
        vars(signer)


@pytest.mark.parametrize(("kid", "seed"), [(b"", bytes(32)), (bytes(65), bytes(32)), (b"k", bytes(31)), (b"k", bytes(64))])
def test_a_signer_takes_a_bounded_kid_and_a_whole_seed(kid: bytes, seed: bytes) -> None:
    with pytest.raises(ValueError):
        Signer(kid, seed)


# Messages that were changed on their way


def test_every_single_bit_flip_of_a_signed_message_is_refused() -> None:
    for bit in range(8 * len(MESSAGE)):
        flipped = bytearray(MESSAGE)
        flipped[bit // 8] ^= 1 << bit % 8
        refusal(bytes(flipped))


def test_every_truncation_and_extension_of_a_signed_message_is_refused() -> None:
    for length_bytes in range(len(MESSAGE)):
        refusal(MESSAGE[:length_bytes])
    for last in range(256):
        refusal(MESSAGE + bytes((last,)))


def test_every_single_bit_flip_of_the_purpose_is_refused() -> None:
    for bit in range(8 * len(RECORD)):
        purpose = bytearray(RECORD)
        purpose[bit // 8] ^= 1 << bit % 8
        refusal(MESSAGE, bytes(purpose))


def test_bytes_moved_between_header_purpose_and_payload_are_refused() -> None:
    parts = decode_sign1(MESSAGE)
    moved = encode_sign1(Sign1(parts.protected, {}, RECORD[-1:] + PAYLOAD, parts.signature))
    refusal(moved, RECORD[:-1])


def test_the_signature_of_another_board_is_refused() -> None:
    parts = decode_sign1(sign1(PAYLOAD, OTHER, RECORD))
    assert "signature" in refusal(encode_sign1(Sign1(decode_sign1(MESSAGE).protected, {}, PAYLOAD, parts.signature)))


def test_an_unknown_kid_is_refused() -> None:
    assert "kid" in refusal(sign1(PAYLOAD, Signer(b"stranger", bytes(32)), RECORD))


def test_a_message_over_the_cap_is_refused_by_its_length() -> None:
    big = sign1(bytes(MAX_SIGNED_BYTES), SIGNER, RECORD)
    assert "length" in refusal(big)
    assert len(verify1(big, KEYS.get, RECORD, max_bytes=MAX_CBOR_BYTES).payload) == MAX_SIGNED_BYTES


def test_a_byte_moved_from_the_front_of_what_was_signed_to_the_end_of_the_signature_is_refused() -> None:
    protected = decode_sign1(MESSAGE).protected
    signature = SIGNER.signature(b"\x00" + to_be_signed(protected, RECORD, PAYLOAD))
    assert "65 bytes" in refusal(encode_sign1(Sign1(protected, {}, PAYLOAD, signature + b"\x00")))


def test_a_stranger_can_make_the_verifier_read_only_small_headers() -> None:
    flood: dict[object, object] = dict.fromkeys(range(100, 200), 0)
    assert "at most 64 items" in refusal(with_header({1: -19, 4: SIGNER.kid}, flood))
    assert "at most 64 items" in refusal(with_header({1: -19, 4: SIGNER.kid, **flood}))
    assert "protected header length" in refusal(with_header({1: -19, 4: SIGNER.kid, 5: bytes(1_024)}))


# Headers


@pytest.mark.parametrize("algorithm", [-8, -19])
def test_both_names_of_ed25519_are_accepted(algorithm: int) -> None:
    assert verify1(with_header({1: algorithm, 4: SIGNER.kid}), KEYS.get, RECORD).algorithm == algorithm


@pytest.mark.parametrize("algorithm", [-7, -35, -36, -53, -999, 0, 5, -8.0, "EdDSA", "Ed25519", b"\xf8", None, [-8], True])
def test_every_other_algorithm_is_refused(algorithm: object) -> None:
    assert "algorithm" in refusal(with_header({1: algorithm, 4: SIGNER.kid}))


def test_no_algorithm_or_one_outside_the_signature_is_refused() -> None:
    assert "algorithm" in refusal(with_header({4: SIGNER.kid}))
    assert "unprotected header: got label 1" in refusal(with_header({4: SIGNER.kid}, {1: -19}), unprotected=[1])


def test_an_empty_protected_header_is_refused_in_both_its_forms() -> None:
    signature = SIGNER.signature(to_be_signed(b"", RECORD, PAYLOAD))
    for protected in (b"", b"\xa0"):
        assert "algorithm" in refusal(encode_sign1(Sign1(protected, {}, PAYLOAD, signature)))


@pytest.mark.parametrize("kid", [b"", bytes(65), "board-01", 1, None, [b"board-01"]])
def test_a_kid_that_is_not_1_to_64_bytes_is_refused(kid: object) -> None:
    assert "1 to 64 bytes" in refusal(with_header({1: -19, 4: kid}))
    assert "1 to 64 bytes" in refusal(with_header({1: -19}))


@pytest.mark.parametrize("critical", [[3], [1, 15], ["reg"], [-19], [4, 33], [], 4, [[4]], [b"\x04"], None])
def test_a_critical_header_that_is_not_understood_is_refused(critical: object) -> None:
    header = {1: -19, 2: critical, 3: 0, 4: SIGNER.kid, 15: {}, 33: b"", "reg": 0, -19: 0}
    assert "crit" in refusal(with_header(header))


def test_a_critical_header_that_is_not_there_is_refused() -> None:
    assert "crit" in refusal(with_header({1: -19, 2: [4]}, {4: SIGNER.kid}), unprotected=[4])


def test_a_critical_header_that_is_understood_is_accepted() -> None:
    assert verify1(with_header({1: -19, 2: [4, 1], 4: SIGNER.kid}), KEYS.get, RECORD).payload == PAYLOAD


def test_a_header_that_is_not_critical_may_be_unknown() -> None:
    assert verify1(with_header({1: -19, 3: 0, 4: SIGNER.kid, 99: {}}), KEYS.get, RECORD).payload == PAYLOAD


@pytest.mark.parametrize("label", [1, 4, 99])
def test_a_label_in_both_headers_is_refused(label: int) -> None:
    header: dict[object, object] = {1: -19, 4: SIGNER.kid, 99: 0}
    message = with_header(header, {label: header[label]})
    assert f"label {label} in both headers" in refusal(message, unprotected=[label])


@pytest.mark.parametrize("label", [2, 3, 5, 7, -1, 33, "x", b""])
def test_anything_outside_the_signature_is_refused(label: object) -> None:
    assert "unprotected header" in refusal(with_header({1: -19, 4: SIGNER.kid}, {label: [4]}))


def test_crit_outside_the_signature_is_refused_even_if_it_is_allowed() -> None:
    assert "label 2" in refusal(with_header({1: -19, 4: SIGNER.kid}, {2: [4]}), unprotected=[2])


@pytest.mark.parametrize(
    "protected", [b"\x80", b"\x01", b"\xf6", b"\xa1\x01", b"\xa2\x04\x41k\x01\x32", b"\xa2\x01\x32\x01\x32", b"\xbf\xff"]
)
def test_a_protected_header_that_is_no_deterministic_map_is_refused(protected: bytes) -> None:
    signature = SIGNER.signature(to_be_signed(protected, RECORD, PAYLOAD))
    assert "protected header" in refusal(encode_sign1(Sign1(protected, {}, PAYLOAD, signature)))


@pytest.mark.parametrize(
    "value",
    [
        0, [], b"", {}, Tag(18, []), Tag(18, b""), Tag(18, [b"", {}, b""]), Tag(18, [b"", {}, b"", b"", b""]),
        Tag(18, [b"", {}, None, bytes(64)]), Tag(18, [{}, {}, b"", bytes(64)]), Tag(18, [b"", b"", b"", bytes(64)]),
        Tag(18, [b"", {}, "", bytes(64)]), Tag(18, [b"", {}, b"", None]), Tag(18, [b"", {}, b"", bytes(63)]),
        Tag(18, [b"", {}, b"", bytes(65)]), Tag(18, Tag(18, [b"", {}, b"", bytes(64)])), [b"", {}, b"", bytes(64)],
        Tag(98, [b"", {}, b"", []]), Tag(17, [b"", {}, b"", bytes(64)]),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_sign1_message_is_refused(value: object) -> None:
    refusal(encode(value))


# Keys and signatures that fit too much

SMALL_ORDER = tuple(
    bytes.fromhex(y)[:31] + bytes((bytes.fromhex(y)[31] & 0x7F | sign,))
    for y in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
    for sign in (0, 0x80)
)
"""Every encoding, canonical or not, of the points of order 1, 2, 4 and 8 on edwards25519."""


@pytest.mark.parametrize("key", SMALL_ORDER, ids=bytes.hex)
def test_a_key_of_small_order_is_refused_before_its_signature_is_looked_at(key: bytes) -> None:
    """R = A or the neutral point, S = 0: RFC 8032's equation holds for one message in eight or more."""
    for r in (key, SMALL_ORDER[2]):
        with pytest.raises(RefusedError, match="public key"):
            verify_signature(key, b"anything", r + bytes(32))


def test_a_key_with_a_part_of_small_order_is_refused() -> None:
    order_8 = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
    mixed = bindings.crypto_core_ed25519_add(SIGNER.public_key, order_8)
    with pytest.raises(RefusedError, match="public key"):
        verify1(MESSAGE, lambda kid: mixed, RECORD)


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), b"\x04" + bytes(64), b"\x02" * 32, b"\xff" * 32], ids=bytes.hex)
def test_what_is_no_ed25519_key_is_refused(key: bytes) -> None:
    with pytest.raises(RefusedError, match="public key"):
        verify1(MESSAGE, lambda kid: key, RECORD)


def test_a_signature_whose_scalar_is_not_reduced_is_refused() -> None:
    parts = decode_sign1(MESSAGE)
    scalar = int.from_bytes(parts.signature[32:], "little")
    for added in range(1, 15):
        again = (scalar + added * GROUP_ORDER).to_bytes(32, "little")
        bad = encode_sign1(Sign1(parts.protected, {}, PAYLOAD, parts.signature[:32] + again))
        assert "signature" in refusal(bad)


@pytest.mark.parametrize("r", SMALL_ORDER, ids=bytes.hex)
def test_a_signature_with_an_r_of_small_order_is_refused(r: bytes) -> None:
    """The key's owner can make S fit such an R; one signature then fits whoever adds a point of small order to it."""
    signed_bytes = to_be_signed(decode_sign1(MESSAGE).protected, RECORD, PAYLOAD)
    digest = hashlib.sha512(bytes(range(32))).digest()
    secret = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | 1 << 254
    challenge = int.from_bytes(hashlib.sha512(r + SIGNER.public_key + signed_bytes).digest(), "little")
    scalar = challenge * secret % GROUP_ORDER
    with pytest.raises(RefusedError, match="signature"):
        verify_signature(SIGNER.public_key, signed_bytes, r + scalar.to_bytes(32, "little"))
