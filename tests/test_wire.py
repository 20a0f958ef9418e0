"""Requests and results on the wire: every one comes back as it was, and nothing else comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import wire
from edge_agent.core.cbor import decode, encode
from edge_agent.core.cose import Signer, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import KvAnswer, KvAsk, KvItem
from edge_agent.core.values import (
    MAX_ANSWER_CHARS,
    MAX_ANSWER_TOKENS,
    MAX_NAME_CHARS,
    MAX_PART_CHARS,
    MAX_RANK,
    MAX_TENSORS,
    AnswerPart,
    DataClass,
    InferenceRequest,
    InferenceResult,
    Status,
    Tensor,
    TrustTier,
)
from tests.drawn import board_ids, parts, requests, results

REQUEST = InferenceRequest("ab" * 16, "detect_faces", {"image": Tensor("uint8", (2,), b"\1\2")})
RESULT = InferenceResult("ab" * 16, Status.OK, "b", "small", bytes(32), {"boxes": Tensor("float32", (0, 4), b"")})
PART = AnswerPart("ab" * 16, 7, "ü", 3)
ASK = KvAsk(bytes(16), bytes(32), KvItem.BLOCK, b"n" * 32)
ANSWER = KvAnswer(bytes(16), KvItem.BLOCK, b"n" * 32, b"payload")
MESSAGES = [
    pytest.param(wire.encode_request(REQUEST, "a"), wire.decode_request, id="request"),
    pytest.param(wire.encode_result(RESULT, "a"), wire.decode_result, id="result"),
    pytest.param(wire.encode_part(PART, "a"), wire.decode_part, id="part"),
    pytest.param(wire.encode_cancel("ab" * 16, "a"), wire.decode_cancel, id="cancellation"),
    pytest.param(wire.encode_kv_ask(ASK, "a"), wire.decode_kv_ask, id="KV ask"),
    pytest.param(wire.encode_kv_answer(ANSWER, "a"), wire.decode_kv_answer, id="KV answer"),
]


@given(requests, board_ids)
def test_a_request_comes_back_as_it_was(request: InferenceRequest, board: str) -> None:
    data = wire.encode_request(request, board)
    assert wire.decode_request(data, board) == request
    assert wire.encode_request(wire.decode_request(data, board), board) == data


@given(results, board_ids)
def test_a_result_comes_back_as_it_was(result: InferenceResult, board: str) -> None:
    data = wire.encode_result(result, board)
    assert wire.decode_result(data, board) == result
    assert wire.encode_result(wire.decode_result(data, board), board) == data


@given(parts, board_ids)
def test_a_part_comes_back_as_it_was(part: AnswerPart, board: str) -> None:
    data = wire.encode_part(part, board)
    assert wire.decode_part(data, board) == part
    assert len(data) <= wire.MAX_PART_BYTES


@pytest.mark.parametrize("read", [wire.decode_part, wire.decode_cancel])
def test_a_part_and_a_cancellation_for_another_board_are_refused(read: object) -> None:
    data = wire.encode_part(PART, "b") if read is wire.decode_part else wire.encode_cancel(PART.request_id, "b")
    with pytest.raises(RefusedError, match="addressee"):
        read(data, "a")  # type: ignore[operator]


def test_what_is_asked_of_a_session_and_what_is_given_come_back_as_they_were_and_are_told_apart() -> None:
    signer = Signer(b"b" * 32, bytes(32))
    refused = KvAnswer(bytes(16), KvItem.ROWS, refusal="it is not here")
    assert wire.decode_kv_ask(wire.encode_kv_ask(ASK, "a" * 32), "a" * 32) == ASK
    for answer in (ANSWER, refused):
        data = wire.encode_kv_answer(answer, "a" * 32)
        assert wire.decode_kv_answer(data, "a" * 32) == answer
        assert not wire.is_kv_ask(sign1(data, signer, wire.AAD_KV_ANSWER))
    ask = sign1(wire.encode_kv_ask(ASK, "a" * 32), signer, wire.AAD_KV_ASK)
    assert wire.is_kv_ask(ask) and len(ask) <= wire.MAX_KV_ASK_BYTES


@pytest.mark.parametrize("item", [4, -1])
def test_an_item_that_does_not_exist_is_refused_with_those_that_do(item: int) -> None:
    entry = decode(wire.encode_kv_ask(ASK, "a"))
    assert isinstance(entry, dict)
    with pytest.raises(RefusedError, match="0 manifest, 1 block, 2 rows or 3 moved"):
        wire.decode_kv_ask(encode({**entry, 3: item}), "a")


def test_the_longest_part_there_is_fits_and_is_told_from_a_result() -> None:
    signer = Signer(b"b" * 32, bytes(32))
    longest = AnswerPart("ab" * 16, MAX_ANSWER_CHARS, "\U0001f600" * MAX_PART_CHARS, MAX_ANSWER_TOKENS)
    part = sign1(wire.encode_part(longest, "A" * 64), signer, wire.AAD_PART)
    assert len(part) <= wire.MAX_SIGNED_PART_BYTES and wire.is_part(part)
    assert not wire.is_part(sign1(wire.encode_result(RESULT, "a"), signer, wire.AAD_RESULT))
    with pytest.raises(RefusedError):
        wire.is_part(b"\xa5")


@given(requests, board_ids, board_ids)
def test_what_is_meant_for_another_board_is_refused(request: InferenceRequest, board: str, other: str) -> None:
    if board != other:
        with pytest.raises(RefusedError, match="request's addressee"):
            wire.decode_request(wire.encode_request(request, board), other)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_are_refused(data: bytes) -> None:
    for read in (
        wire.decode_request,
        wire.decode_result,
        wire.decode_part,
        wire.decode_cancel,
        wire.decode_kv_ask,
        wire.decode_kv_answer,
    ):
        with pytest.raises(RefusedError):
            read(data, "a")


@pytest.mark.parametrize(("data", "read"), MESSAGES)
def test_no_truncation_and_nothing_after_the_end_is_taken(data: bytes, read: object) -> None:
    for wrong in [data[:size] for size in range(len(data))] + [data + b"\0", data + data]:
        with pytest.raises(RefusedError):
            read(wrong, "a")  # type: ignore[operator]


@pytest.mark.parametrize(("data", "read"), MESSAGES)
def test_a_key_that_is_missing_or_unknown_or_of_another_type_is_refused(data: bytes, read: object) -> None:
    entry = decode(data)
    assert isinstance(entry, dict)
    for key in entry:
        for wrong in (
            {k: v for k, v in entry.items() if k != key},
            {**entry, key: 1.5},
            {**entry, 99: 0},
            {**entry, str(key): 0},
        ):
            with pytest.raises(RefusedError):
                read(encode(wrong), "a")  # type: ignore[operator]


@pytest.mark.parametrize(("data", "read"), MESSAGES)
@pytest.mark.parametrize("request_id", [b"", bytes(15), bytes(17)])
def test_a_request_id_of_another_length_is_refused(data: bytes, read: object, request_id: bytes) -> None:
    entry = decode(data)
    assert isinstance(entry, dict)
    with pytest.raises(RefusedError, match="request id|KV a.* session length"):
        read(encode({**entry, 1: request_id}), "a")  # type: ignore[operator]


@pytest.mark.parametrize(
    "tensor",
    [
        {1: "uint8", 2: [2], 3: b"\1"},
        {1: "uint8", 2: [2]},
        {1: "uint8", 2: [-1], 3: b""},
        {1: "uint8", 2: [1.0], 3: b"\1"},
        {1: "uint8", 2: [1] * (MAX_RANK + 1), 3: b"\1"},
        {1: "uint8", 2: [2**40], 3: b"\1"},
        {1: "string", 2: [1], 3: b"\1"},
        {1: "uint8", 2: [1], 3: "text"},
        b"\1",
        None,
    ],
)
def test_42_a_tensor_that_is_wrong_is_refused_naming_it(tensor: object) -> None:
    entry = decode(wire.encode_request(REQUEST, "a"))
    assert isinstance(entry, dict)
    with pytest.raises(RefusedError, match="image|tensor"):
        wire.decode_request(encode({**entry, 4: {"image": tensor}}), "a")


@pytest.mark.parametrize("key", [2, 9])
def test_a_status_or_an_energy_kind_that_does_not_exist_is_refused_with_those_that_do(key: int) -> None:
    entry = decode(wire.encode_result(RESULT, "a"))
    assert isinstance(entry, dict)
    with pytest.raises(RefusedError, match="ok, failed, refused, shed" if key == 2 else "measured, estimated, emulated"):
        wire.decode_result(encode({**entry, key: "fine"}), "a")


def test_more_tensors_than_allowed_are_refused() -> None:
    entry = decode(wire.encode_request(REQUEST, "a"))
    assert isinstance(entry, dict)
    many = {f"t{i}": {1: "uint8", 2: [0], 3: b""} for i in range(MAX_TENSORS + 1)}
    with pytest.raises(RefusedError, match=f"at most {MAX_TENSORS}"):
        wire.decode_request(encode({**entry, 4: many}), "a")


def test_what_a_board_signed_is_told_from_what_a_client_sent() -> None:
    data = wire.encode_request(REQUEST, "a")
    assert not wire.is_signed(data) and not wire.is_signed(b"")
    assert wire.is_signed(sign1(data, Signer(b"a", bytes(32)), wire.AAD_REQUEST))


def test_a_hostile_text_does_not_fill_the_log() -> None:
    entry = decode(wire.encode_request(REQUEST, "a"))
    assert isinstance(entry, dict)
    with pytest.raises(RefusedError) as caught:
        wire.decode_request(encode({**entry, 6: "evil\n" * 10_000}), "a")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_the_longest_names_there_are_fit_beside_the_tensors() -> None:
    names = {chr(0x10000 + i) * MAX_NAME_CHARS: Tensor("float32", (1,) * 8, b"1234") for i in range(MAX_TENSORS)}
    request = InferenceRequest("ab" * 16, "t" * 32, names, "m" * 64)
    data = sign1(wire.encode_request(request, "a" * 32), Signer(b"b" * 32, bytes(32)), wire.AAD_REQUEST)
    from edge_agent.node.voice import ENVELOPE_BYTES

    assert len(data) - request.size_bytes <= ENVELOPE_BYTES


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({5: {1: 1, 3: 0, 4: 1}}, "trust"),
        ({5: {1: 1, 3: 0, 4: 0}}, "trust"),
        ({5: {1: 1, 3: 0, 4: 4}}, "trust"),
        ({8: "private"}, "data"),
        ({8: "secret"}, "data"),
        ({8: ""}, "data"),
        ({9: 0}, "answer_tokens"),
        ({9: -1}, "answer_tokens"),
        ({9: MAX_ANSWER_TOKENS + 1}, "answer_tokens"),
    ],
)
def test_limits_on_where_a_request_may_run_are_read_strictly(changes: dict[int, object], named: str) -> None:
    entry = decode(wire.encode_request(REQUEST, "a"))
    assert isinstance(entry, dict)
    with pytest.raises(RefusedError, match=named):
        wire.decode_request(encode({**entry, **changes}), "a")


def test_a_request_without_the_newer_fields_is_private_needs_no_trust_and_is_written_as_it_was() -> None:
    data = encode({1: bytes.fromhex("ab" * 16), 2: "detect_faces", 4: {}, 5: {1: 5, 3: 0}, 6: "a"})
    request = wire.decode_request(data, "a")
    assert (request.data, request.limits.trust, request.answer_tokens) == (DataClass.PRIVATE, TrustTier.NONE, 0)
    assert wire.encode_request(request, "a") == data
