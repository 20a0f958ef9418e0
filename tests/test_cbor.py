from __future__ import annotations

import json
import math
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import cbor2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.core.cbor import (
    MAX_CBOR_BYTES,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_MAP_ENTRIES,
    Tag,
    decode,
    encode,
    fields,
    list_of,
    map_of,
)
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import Status
from tests.fuzz_cbor import CORPUS, TAGS, check_decode, fuzz
from tests.needs import needs_shared

INTEGERS = st.integers(-(2**64), 2**64 - 1)
KEYS = INTEGERS | st.text(max_size=9) | st.binary(max_size=9)
LEAVES = KEYS | st.none() | st.booleans() | st.floats(allow_nan=False)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=9) | st.dictionaries(KEYS, inner, max_size=9), max_leaves=40)
ONE_KIND_OF_KEY = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.dictionaries(st.integers(0, 2**64 - 1), inner),
    max_leaves=20,
)


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        decode(data, **options)
    return str(caught.value)


def head(major: int, argument: int, size_bytes: int) -> bytes:
    """A head with an argument of ``size_bytes``, however small the argument is."""
    info = {1: 24, 2: 25, 4: 26, 8: 27}[size_bytes]
    return bytes((major << 5 | info,)) + argument.to_bytes(size_bytes, "big")


def test_of_rfc_8949_appendix_a_the_53_deterministic_cases_round_trip_and_the_29_others_are_refused() -> None:
    came: Counter[str] = Counter()
    for case in json.loads(needs_shared("vectors", "cbor", "appendix_a.json").read_text()):
        data = bytes.fromhex(case["hex"])
        try:
            value = decode(data)
        except RefusedError as error:
            reasons = ("tag", "simple value", "initial byte", "another encoding")
            came[next(reason for reason in reasons if f"got {reason}" in str(error))] += 1
            continue
        came["admitted"] += 1
        assert encode(value) == data
        assert case["roundtrip"]
        if "decoded" in case:
            assert value == case["decoded"] and type(value) is type(case["decoded"])
    assert came == {"admitted": 53, "tag": 8, "simple value": 4, "initial byte": 11, "another encoding": 6}


@given(VALUES)
@settings(deadline=None, max_examples=200)
def test_what_is_encoded_is_decoded_to_the_same_value(value: object) -> None:
    data = encode(value)
    assert decode(data) == value
    assert encode(decode(data)) == data


@given(
    st.binary(max_size=64)
    | st.sampled_from(CORPUS).flatmap(lambda seed: st.binary(max_size=3).map(lambda tail: seed[:-2] + tail))
)
@settings(deadline=None, max_examples=500)
@example(b"\xf9\x7e\x00")
@example(b"\xa1\xf9\x7e\x00\x00")
@example(b"\x61\xff")
@example(b"\xd8\x1c\x81\xd8\x1d\x00")
def test_any_bytes_are_refused_or_are_the_one_encoding_of_a_value(data: bytes) -> None:
    check_decode(data)


def test_20_000_mutated_messages_are_refused_or_are_the_one_encoding_of_a_value() -> None:
    tally = fuzz(20_000, seed=8949)
    assert tally.inputs == 20_000
    assert 0 < tally.admitted < 10_000


@pytest.mark.parametrize("level", [b"\x81", b"\xa1\x00", b"\xd2"], ids=["array", "map", "tag"])
def test_depth_of_nesting(level: bytes) -> None:
    decode(level * MAX_DEPTH + b"\x00", tags=[18])
    assert "16 levels" in refusal(level * (MAX_DEPTH + 1) + b"\x00", tags=[18])
    assert "16 levels" in refusal(level * 1_000_000, tags=[18])


@pytest.mark.parametrize("outer", [b"", b"\x82\x01", b"\xa1\x00"], ids=["bare", "in a list", "in a map"])
@pytest.mark.parametrize("major", [2, 3, 4, 5], ids=["bytes", "text", "array", "map"])
def test_length_lies(major: int, outer: bytes) -> None:
    for size_bytes in (1, 2, 4, 8):
        for argument in (101, 2 ** (8 * size_bytes - 1) - 1, 2 ** (8 * size_bytes) - 1):
            assert "length" in refusal(outer + head(major, argument, size_bytes) + bytes(100))


def test_every_truncation_is_refused() -> None:
    for data in CORPUS:
        for length_bytes in range(len(data)):
            refusal(data[:length_bytes], tags=TAGS)


@pytest.mark.parametrize("data", ["a200010002", "a3000001010001", "a2616100616101", "a24161004161 01", "81a2200020 00"])
def test_duplicate_keys(data: str) -> None:
    assert "Duplicate" in refusal(bytes.fromhex(data))


def test_colliding_keys() -> None:
    """More entries than the bound are refused on their head, before a dict can be filled: cbor2 would name the duplicate."""
    colliding = [n << 40 for n in range(MAX_MAP_ENTRIES)]
    assert len(decode(encode(dict.fromkeys(colliding)))) == MAX_MAP_ENTRIES  # type: ignore[arg-type]
    for entries in (MAX_MAP_ENTRIES + 1, 10_900):
        assert f"a map of {entries} entries" in refusal(head(5, entries, 2) + bytes(2 * entries))


def test_keys_that_are_equal_in_python_but_not_on_the_wire_are_refused() -> None:
    for key in ("f4", "f5", "f6", "f90000", "f93c00", "80", "a0", "c100"):
        refusal(bytes.fromhex(f"a1{key}00"), tags=[1])
        refusal(bytes.fromhex(f"a2 00 00 {key} 00"), tags=[1])


def test_banned_tags() -> None:
    for number in (*range(1_100), 43_000, 55_799, 65_535, 2**32, 2**64 - 1):
        tagged = encode(Tag(number, []))
        assert f"got tag {number};" in refusal(tagged)
        assert f"got tag {number};" in refusal(encode([[], {1: Tag(number, [])}]), tags=[number + 1])


def test_a_tag_that_is_named_comes_as_a_tag_and_is_never_acted_upon() -> None:
    for number in (0, 1, 2, 3, 4, 5, 18, 25, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 261, 1_004, 43_000, 55_799):
        inners: tuple[object, ...] = ([], 0, b"\x01", "2013-03-21T20:04:00Z")
        for inner in inners:
            assert decode(encode(Tag(number, inner)), tags=[number]) == Tag(number, inner)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("1817", "int in a longer head"),
        ("190018", "int in a longer head"),
        ("1a0000ffff", "int in a longer head"),
        ("1b00000000ffffffff", "int in a longer head"),
        ("3800", "negative int in a longer head"),
        ("580100", "bytes with a longer length"),
        ("780161", "text with a longer length"),
        ("980100", "array with a longer length"),
        ("b8010000", "map with a longer length"),
        ("d81200", "tag in a longer head"),
        ("fa3f800000", "float32 that fits 16 bits"),
        ("fb3ff0000000000000", "float64 that fits 16 bits"),
        ("fb3ff0000020000000", "float64 that fits 32 bits"),
        ("f97e01", "NaN with a payload"),
        ("f9fe00", "negative NaN"),
        ("fa7fc00000", "longer NaN"),
        ("a201000000", "keys in falling order"),
        ("a2 20 00 00 00", "negative key before an unsigned one"),
        ("a2 20 00 1903e8 00", "the length-first order of RFC 7049"),
        ("a2 6161 00 4161 00", "text key before a bytes key"),
    ],
)
def test_non_canonical(data: str, what: str) -> None:
    raw = bytes.fromhex(data)
    assert "deterministic" in refusal(raw, tags=[18]), what
    assert "deterministic" in refusal(b"\x81" + raw, tags=[18]), what


def test_indefinite_lengths_and_reserved_forms_are_refused() -> None:
    for major in range(8):
        for info in (28, 29, 30, 31):
            assert "definite lengths" in refusal(bytes((major << 5 | info,)) + b"\x00\x00\xff")


def test_trailing_bytes() -> None:
    for data in CORPUS:
        for last in range(256):
            assert "trailing" in refusal(data + bytes((last,)), tags=TAGS)


def test_no_bytes_at_all_are_refused() -> None:
    assert "the end of the data" in refusal(b"")


def test_text_that_is_not_utf_8_is_refused() -> None:
    for text in (b"\xff", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"):
        assert "text string" in refusal(bytes((0x60 | len(text),)) + text)


def test_the_length_cap_comes_first() -> None:
    assert refusal(b"\xff" * 11, max_bytes=10, subject="record") == "record length: got 11 bytes; allowed: at most 10 bytes"
    assert "at most" in refusal(bytes(MAX_CBOR_BYTES + 1))
    with pytest.raises(RefusedError, match="80 bytes"):
        decode(memoryview(bytes(80)).cast("Q"), max_bytes=10)


def test_items_are_counted_before_anything_is_built() -> None:
    decode(encode([0] * (MAX_ITEMS - 1)))
    assert "items" in refusal(encode([0] * MAX_ITEMS))
    assert "items" in refusal(encode({1: 2}), max_items=2)
    flood = head(4, MAX_CBOR_BYTES - 8, 4) + b"\xa0" * (MAX_CBOR_BYTES - 8)
    assert peak_bytes(lambda: refusal(flood)) < 64 * 2**10


def test_a_tensor_of_4_mib_is_copied_once_when_it_is_decoded() -> None:
    tensor = bytes(MAX_CBOR_BYTES - 64)
    message = encode({1: "image", 2: tensor})
    assert peak_bytes(lambda: decode(message)) < 1.25 * MAX_CBOR_BYTES
    assert decode(message) == {1: "image", 2: tensor}


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_message_may_come_as_bytes_bytearray_or_memoryview() -> None:
    for data in CORPUS:
        same = [encode(decode(form, tags=TAGS)) for form in (data, bytearray(data), memoryview(data))]
        assert same == [data] * 3


def test_map_entries_are_in_the_bytewise_order_of_their_keys() -> None:
    keys = [b"", "z", -1, 100, 10, "aa", 1_000, -500]
    assert list(decode(encode(dict.fromkeys(keys)))) == [10, 100, 1_000, -1, -500, b"", "z", "aa"]  # type: ignore[call-overload]


def test_the_order_of_insertion_does_not_show() -> None:
    assert encode({1: 0, 2: {"a": 1, "b": 2}}) == encode({2: {"b": 2, "a": 1}, 1: 0})


@given(ONE_KIND_OF_KEY)
@settings(deadline=None)
def test_where_both_map_orders_agree_cbor2_writes_the_same_bytes(value: object) -> None:
    """Another encoder's word on heads, floats and text; keys of one kind sort alike under RFC 7049 and RFC 8949."""
    assert encode(value) == cbor2.dumps(value, canonical=True)


def test_every_16_bit_float_is_written_in_16_bits() -> None:
    for bits in range(2**16):
        packed = bits.to_bytes(2, "big")
        value = struct.unpack(">e", packed)[0]
        assert encode(value) == b"\xf9" + (packed if value == value else b"\x7e\x00")


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_a_32_bit_float_is_written_in_at_most_32_bits_and_reads_the_same(bits: int) -> None:
    value = struct.unpack(">f", bits.to_bytes(4, "big"))[0]
    data = encode(value)
    assert len(data) <= 5
    assert decode(data) == value or value != value


def test_minus_zero_and_nan_survive() -> None:
    assert math.copysign(1, decode(encode(-0.0))) == -1  # type: ignore[arg-type]
    assert math.isnan(decode(encode(math.nan)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        2**64, -(2**64) - 1, {True: 0}, {None: 0}, {1.0: 0}, {(1,): 0}, {1, 2}, object(), 1j, cbor2.undefined,
        cbor2.CBORSimpleValue(16), datetime(2026, 1, 1, tzinfo=UTC), "\ud800", dict.fromkeys(range(MAX_MAP_ENTRIES + 1)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_value_outside_the_domain_is_the_callers_bug(value: object) -> None:
    with pytest.raises(ValueError):
        encode(value)
    with pytest.raises(ValueError):
        encode([{1: value}])


def test_a_value_nested_too_deep_or_within_itself_is_the_callers_bug() -> None:
    value: list[object] = []
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    assert decode(encode(value)) == value
    loop: list[object] = []
    loop.append(loop)
    for bad in ([value], {0: value}, Tag(18, value), loop):
        with pytest.raises(ValueError, match="nested"):
            encode(bad)


def test_kin_of_the_domain_are_written_as_what_they_are() -> None:
    assert encode((1, memoryview(b"ab"), bytearray(b"cd"), Status.OK)) == encode([1, b"ab", b"cd", "ok"])
    assert encode(memoryview(struct.pack("<2I", 1, 2)).cast("I")) == encode(struct.pack("<2I", 1, 2))


@dataclass(frozen=True)
class Reading:
    board: str
    temperature_mdegc: int
    note: str = "none"


REQUIRED = {1: ("board", str), 2: ("temperature_mdegc", int)}
OPTIONAL = {3: ("note", str)}


def test_a_map_with_integer_keys_becomes_named_fields() -> None:
    assert Reading(**fields({1: "a", 2: 45_000}, "reading", REQUIRED, OPTIONAL)) == Reading("a", 45_000)
    assert Reading(**fields({1: "a", 2: 0, 3: "hot"}, "reading", REQUIRED, OPTIONAL)).note == "hot"
    assert fields({7: None}, "any", {7: ("anything", object)}) == {"anything": None}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "reading: got a value of type list; allowed: dict"),
        (None, "reading: got a value of type null; allowed: dict"),
        ({1: "a"}, "reading: key 2 (temperature_mdegc) is missing"),
        ({1: "a", 2: 3, 4: 0}, "reading: unknown key: got 4; allowed: 1 (board), 2 (temperature_mdegc), 3 (note)"),
        ({1: "a", 2: 3, "x" * 5_000: 0}, "reading: unknown key: got 'xxx"),
        ({1: "a", 2: True}, "reading temperature_mdegc: got a value of type bool; allowed: int"),
        ({1: b"a", 2: 3}, "reading board: got a value of type bytes; allowed: str"),
        ({1: "a", 2: 3, 3: None}, "reading note: got a value of type null; allowed: str"),
    ],
)
def test_a_map_that_is_not_as_agreed_is_refused_by_the_name_of_the_field(value: object, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        fields(value, "reading", REQUIRED, OPTIONAL)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


def test_lists_and_maps_of_one_type_are_bounded_and_checked() -> None:
    assert list_of([1, 2], "shape", int, 8) == [1, 2]
    assert map_of({"a": b""}, "tensors", bytes, 8) == {"a": b""}
    wrong: list[Callable[[], object]] = [
        lambda: list_of({}, "shape", int, 8),
        lambda: list_of([1, True], "shape", int, 8),
        lambda: list_of([0] * 9, "shape", int, 8),
        lambda: map_of([], "tensors", bytes, 8),
        lambda: map_of({"a": ""}, "tensors", bytes, 8),
        lambda: map_of({1: b""}, "tensors", bytes, 8),
        lambda: map_of({"a": b"", "b": b""}, "tensors", bytes, 1),
    ]
    for read in wrong:
        with pytest.raises(RefusedError):
            read()
