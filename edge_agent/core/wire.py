"""Requests, results, parts of answers and cancellations as CBOR, field by field as in ``docs/protocol.cddl``.

Rules: maps have small integer keys; an unknown key is refused; what is absent is left out; a value is built only through
its validating dataclass.  Every message names whom it is meant for, so that a hostile broker cannot turn it to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from edge_agent.core.cbor import decode, encode, fields, list_of, map_of
from edge_agent.core.cose import decode_sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import KvAnswer, KvAsk, KvItem
from edge_agent.core.values import (
    MAX_PARENTS,
    MAX_PART_CHARS,
    MAX_RANK,
    MAX_TENSORS,
    AnswerPart,
    DataClass,
    EnergyKind,
    InferenceRequest,
    InferenceResult,
    Limits,
    Status,
    Tensor,
    TrustTier,
)

MAX_ENVELOPE_BYTES = 65 * 2**20
REQUEST_ID_BYTES = 16
AAD_REQUEST = b"sly/1/request"
AAD_RESULT = b"sly/1/result"
AAD_PART = b"sly/1/part"
AAD_CANCEL = b"sly/1/cancel"
MAX_PART_BYTES = 4 * MAX_PART_CHARS + 256
"""A part without its signature; with it at most ``MAX_SIGNED_PART_BYTES``."""
MAX_SIGNED_PART_BYTES = MAX_PART_BYTES + 256
MAX_CANCEL_BYTES = 512
AAD_KV_ASK = b"sly/1/kv-ask"
AAD_KV_ANSWER = b"sly/1/kv-answer"
MAX_KV_ASK_BYTES = 1024
LOCAL = "local"
"""The addressee of what never leaves a board's own socket."""

_REQUEST = {1: ("request_id", bytes), 2: ("task", str), 4: ("inputs", dict), 5: ("limits", dict), 6: ("addressee", str)}
_REQUEST_OPTIONAL = {
    3: ("model", str), 7: ("session", str), 8: ("data", str), 9: ("answer_tokens", int),
    10: ("parents", list), 11: ("recheck", bool),
}  # fmt: skip
_LIMITS = {1: ("deadline_us", int), 3: ("quality_permille", int)}
_LIMITS_OPTIONAL = {2: ("energy_uj", int), 4: ("trust", int)}
_RESULT = {
    1: ("request_id", bytes), 2: ("status", str), 3: ("board", str), 4: ("model", str), 5: ("model_digest", bytes),
    6: ("outputs", dict), 7: ("busy_us", int), 8: ("energy_uj", int), 9: ("energy_kind", str), 10: ("reason", str),
    11: ("addressee", str),
}  # fmt: skip
_RESULT_OPTIONAL = {12: ("receipt", bytes)}
_PART = {1: ("request_id", bytes), 2: ("offset", int), 3: ("text", str), 4: ("tokens", int), 5: ("addressee", str)}
_PART_HEAD = b"\xa5"
"""A map of five entries; a result has eleven or twelve."""
_CANCEL = {1: ("request_id", bytes), 6: ("addressee", str)}
_KV_ASK = {1: ("session", bytes), 2: ("fingerprint", bytes), 3: ("item", int), 4: ("name", bytes), 6: ("addressee", str)}
_KV_ANSWER = {
    1: ("session", bytes), 3: ("item", int), 4: ("name", bytes), 6: ("addressee", str), 7: ("payload", bytes),
    8: ("refusal", str),
}  # fmt: skip
_TENSOR = {1: ("dtype", str), 2: ("shape", list), 3: ("data", bytes)}

_Member = TypeVar("_Member", bound=StrEnum)


def is_signed(message: bytes) -> bool:
    """Does this look like a COSE_Sign1 (tag 18), as boards send to each other, rather than a client's plain envelope?"""
    return message[:1] == b"\xd2"


def is_part(message: bytes) -> bool:
    """Does this, from a reply topic, look like a part of an answer rather than the answer? Says nothing of its signature.

    Raises ``RefusedError`` for what is not signed at all.
    """
    if len(message) > MAX_SIGNED_PART_BYTES:
        return False
    return decode_sign1(message, MAX_SIGNED_PART_BYTES).payload[:1] == _PART_HEAD


def encode_request(request: InferenceRequest, addressee: str) -> bytes:
    limits = request.limits
    trust = None if limits.trust is TrustTier.NONE else limits.trust.value
    return encode(
        _present(
            {
                1: bytes.fromhex(request.request_id),
                2: request.task,
                3: request.model,
                4: _tensors_out(request.inputs),
                5: _present({1: limits.deadline_us, 2: limits.energy_uj, 3: limits.quality_permille, 4: trust}),
                6: addressee,
                7: request.session or None,
                8: None if request.data is DataClass.PRIVATE else request.data.value,
                9: request.answer_tokens or None,
                10: list(request.parents) or None,
                11: None if request.recheck else False,
            }
        )
    )


def decode_request(data: bytes | memoryview, addressee: str) -> InferenceRequest:
    """The request in ``data``. Raises ``RefusedError`` if it is malformed or meant for another board."""
    entry = fields(decode(data, MAX_ENVELOPE_BYTES, subject="request"), "request", _REQUEST, _REQUEST_OPTIONAL)
    _meant_for("request", entry.pop("addressee"), addressee)
    entry["request_id"] = _request_id(entry["request_id"])
    entry["inputs"] = _tensors_in("request inputs", entry["inputs"])
    limits = fields(entry["limits"], "request limits", _LIMITS, _LIMITS_OPTIONAL)
    entry["limits"] = Limits(**{**limits, "trust": trust_in("request limits trust", limits.get("trust"))})
    entry["data"] = data_in("request data", entry.get("data"))
    if entry.get("answer_tokens") == 0:
        raise RefusedError("request answer_tokens", 0, "nothing, or how long the answer may be")
    if entry.get("recheck") is True or entry.get("parents") == []:
        raise RefusedError("request recheck and parents", "a default", "nothing, where it is the default")
    entry["parents"] = tuple(list_of(entry.get("parents", []), "request parents", bytes, MAX_PARENTS))
    return InferenceRequest(**entry)


def trust_in(subject: str, tier: int | None) -> TrustTier:
    """The floor under a board's appraisal, absent where there is none. Raises ``RefusedError`` naming ``subject``."""
    if tier is None:
        return TrustTier.NONE
    if tier in (TrustTier.WARNING, TrustTier.AFFIRMING):
        return TrustTier(tier)
    raise RefusedError(subject, tier, "nothing, 2 (warning) or 3 (affirming)")


def data_in(subject: str, data: str | None) -> DataClass:
    """How far inputs may travel, absent where they are private. Raises ``RefusedError`` naming ``subject``."""
    if data is None:
        return DataClass.PRIVATE
    if data in (DataClass.PUBLIC, DataClass.LOCAL):
        return DataClass(data)
    raise RefusedError(subject, data, "nothing, 'public' or 'local'")


def encode_result(result: InferenceResult, addressee: str) -> bytes:
    return encode(
        _present(
            {
                1: bytes.fromhex(result.request_id),
                2: result.status.value,
                3: result.board,
                4: result.model,
                5: result.model_digest,
                6: _tensors_out(result.outputs),
                7: result.busy_us,
                8: result.energy_uj,
                9: result.energy_kind.value,
                10: result.reason,
                11: addressee,
                12: result.receipt or None,
            }
        )
    )


def decode_result(data: bytes | memoryview, addressee: str) -> InferenceResult:
    """The result in ``data``. Raises ``RefusedError`` if it is malformed or meant for another client or board."""
    entry = fields(decode(data, MAX_ENVELOPE_BYTES, subject="result"), "result", _RESULT, _RESULT_OPTIONAL)
    _meant_for("result", entry.pop("addressee"), addressee)
    if entry.get("receipt") == b"":
        raise RefusedError("result receipt", "an empty one", "nothing, where there is none")
    entry["request_id"] = _request_id(entry["request_id"])
    entry["status"] = _member(Status, "result status", entry["status"])
    entry["energy_kind"] = _member(EnergyKind, "result energy kind", entry["energy_kind"])
    entry["outputs"] = _tensors_in("result outputs", entry["outputs"])
    return InferenceResult(**entry)


def encode_part(part: AnswerPart, addressee: str) -> bytes:
    return encode({1: bytes.fromhex(part.request_id), 2: part.offset, 3: part.text, 4: part.tokens, 5: addressee})


def decode_part(data: bytes | memoryview, addressee: str) -> AnswerPart:
    """The part in ``data``. Raises ``RefusedError`` if it is malformed or meant for another client or board."""
    entry = fields(decode(data, MAX_PART_BYTES, subject="part"), "part", _PART)
    _meant_for("part", entry.pop("addressee"), addressee)
    entry["request_id"] = _request_id(entry["request_id"])
    return AnswerPart(**entry)


def encode_cancel(request_id: str, addressee: str) -> bytes:
    return encode({1: bytes.fromhex(request_id), 6: addressee})


def decode_cancel(data: bytes | memoryview, addressee: str) -> str:
    """The id of the request that is wanted no more. Raises ``RefusedError`` if it is malformed or meant for another board."""
    entry = fields(decode(data, MAX_CANCEL_BYTES, subject="cancellation"), "cancellation", _CANCEL)
    _meant_for("cancellation", entry["addressee"], addressee)
    return _request_id(entry["request_id"])


def is_kv_ask(message: bytes) -> bool:
    """Does this, from a KV topic, look like an ask rather than an answer? Says nothing of its signature.

    Raises ``RefusedError`` for what is not signed at all.
    """
    if len(message) > MAX_KV_ASK_BYTES:
        return False
    entry = decode(decode_sign1(message, MAX_KV_ASK_BYTES).payload, MAX_KV_ASK_BYTES, subject="KV message")
    return isinstance(entry, dict) and 2 in entry


def encode_kv_ask(ask: KvAsk, addressee: str) -> bytes:
    return encode({1: ask.session, 2: ask.fingerprint, 3: ask.item.value, 4: ask.name, 6: addressee})


def decode_kv_ask(data: bytes | memoryview, addressee: str) -> KvAsk:
    """What another board wants of a session. Raises ``RefusedError`` if it is malformed or meant for another board."""
    entry = fields(decode(data, MAX_KV_ASK_BYTES, subject="KV ask"), "KV ask", _KV_ASK)
    _meant_for("KV ask", entry.pop("addressee"), addressee)
    entry["item"] = _item(entry["item"])
    return KvAsk(**entry)


def encode_kv_answer(answer: KvAnswer, addressee: str) -> bytes:
    return encode({1: answer.session, 3: answer.item.value, 4: answer.name, 6: addressee, 7: answer.payload, 8: answer.refusal})


def decode_kv_answer(data: bytes | memoryview, addressee: str) -> KvAnswer:
    """What another board gives of a session. Raises ``RefusedError`` if it is malformed or meant for another board."""
    entry = fields(decode(data, MAX_ENVELOPE_BYTES, subject="KV answer"), "KV answer", _KV_ANSWER)
    _meant_for("KV answer", entry.pop("addressee"), addressee)
    entry["item"] = _item(entry["item"])
    return KvAnswer(**entry)


def _item(value: int) -> KvItem:
    try:
        return KvItem(value)
    except ValueError:
        raise RefusedError("KV item", value, "0 manifest, 1 block, 2 rows or 3 moved") from None


def _present(entries: Mapping[int, object]) -> dict[int, object]:
    return {key: value for key, value in entries.items() if value is not None}


def _request_id(raw: bytes) -> str:
    if len(raw) != REQUEST_ID_BYTES:
        raise RefusedError("request id", raw, f"{REQUEST_ID_BYTES} bytes")
    return raw.hex()


def _meant_for(subject: str, got: str, allowed: str) -> None:
    if got != allowed:
        raise RefusedError(f"{subject}'s addressee", got, allowed)


def _member(kind: type[_Member], subject: str, value: str) -> _Member:
    try:
        return kind(value)
    except ValueError:
        raise RefusedError(subject, value, ", ".join(kind)) from None


def _tensors_out(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    return {name: {1: tensor.dtype, 2: list(tensor.shape), 3: tensor.data} for name, tensor in tensors.items()}


def _tensors_in(subject: str, entries: object) -> dict[str, Tensor]:
    return {name: _tensor_in(f"{subject} {name!r}", entry) for name, entry in map_of(entries, subject, dict, MAX_TENSORS).items()}


def _tensor_in(subject: str, entry: dict[Any, Any]) -> Tensor:
    parts = fields(entry, subject, _TENSOR)
    return Tensor(parts["dtype"], tuple(list_of(parts["shape"], subject, int, MAX_RANK)), parts["data"])
