"""What the agent and an engine child say to each other over their socket pair: small CBOR messages, one a datagram.

Rules: tensors never travel here, only where they lie in the arena.  The child is not trusted once it has read a model, so
everything that it says is decoded strictly and bounded; its texts are cut and made printable before anybody sees them.
Each request has a sequence number and gets exactly one answer with the same number.

A message is a head of two 64-bit numbers (big endian: the sequence number; in an answer, the elapsed µs) and a CBOR body.
What changes with each request stands in the head, so that the body of a model's requests is mostly the same bytes again:
the last few bodies and their meanings are remembered, which saves some 50 µs of a request.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError
from edge_agent.runtime.arena import Place, Placed, places

MAX_DOORBELL_BYTES = 64 * 2**10
MAX_HANDSHAKE_BYTES = 4 * 2**20
MAX_TEXT_CHARS = 400
REMEMBERED = 8
HEAD = struct.Struct(">QQ")
HANDSHAKE = 0
"""The sequence number of the answer to ``Order``."""
HURRY = b"\x00"
"""A message without an answer: a call that may end early is to do so."""


@dataclass(frozen=True, slots=True)
class Request:
    """Run the model on the tensors at these places; as its card's whole task if ``whole_task``."""

    sequence: int
    whole_task: bool
    inputs: tuple[Placed, ...]


def encode_request(sequence: int, whole_task: bool, inputs: tuple[Place, ...]) -> bytes:
    return HEAD.pack(sequence, 0) + _request_body(whole_task, inputs)


@lru_cache(REMEMBERED)
def _request_body(whole_task: bool, inputs: tuple[Place, ...]) -> bytes:
    return encode([whole_task, inputs])


def decode_request(message: bytes, arena_bytes: int) -> Request:
    sequence, _, body = _split(message)
    return Request(sequence, *_request_meaning(body, arena_bytes))


@lru_cache(REMEMBERED)
def _request_meaning(body: bytes, arena_bytes: int) -> tuple[bool, tuple[Placed, ...]]:
    whole_task, inputs = items(decode(body), "request", 2)
    return whole_task is True, places(inputs, arena_bytes)


@dataclass(frozen=True, slots=True)
class Call:
    """Do ``verb`` with ``body``, any CBOR value, and the first ``bulk_bytes`` of the arena."""

    sequence: int
    verb: str
    body: object
    bulk_bytes: int


def encode_call(sequence: int, verb: str, body: object, bulk_bytes: int) -> bytes:
    return HEAD.pack(sequence, 0) + encode([verb, body, bulk_bytes])


def decode_call(message: bytes, arena_bytes: int) -> Call:
    sequence, _, data = _split(message)
    verb, body, bulk_bytes = items(decode(data, max_bytes=MAX_DOORBELL_BYTES), "call", 3)
    return Call(sequence, printable(verb), body, _inside(bulk_bytes, arena_bytes))


def _inside(bulk_bytes: object, arena_bytes: int) -> int:
    if natural(bulk_bytes) > arena_bytes:
        raise RefusedError("bulk", f"{bulk_bytes} bytes", f"at most the arena's {arena_bytes}")
    return natural(bulk_bytes)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The handshake lies in the first ``size_bytes`` of the arena."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    outputs: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """The answer to a ``Call``: any CBOR value, and the first ``bulk_bytes`` of the arena."""

    body: object
    bulk_bytes: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The data is at fault: the model file, or this request's inputs."""

    subject: str
    got: str | None
    allowed: str
    remedy: str

    def error(self) -> RefusedError:
        return RefusedError(self.subject, self.got, self.allowed, self.remedy)


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not be done, and the child lives on."""

    reason: str


Reply = Loaded | Done | Said | Refused | Failed


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the child to request ``sequence``, after ``elapsed_us`` in it."""

    sequence: int
    elapsed_us: int
    reply: Reply


def encode_loaded(size_bytes: int) -> bytes:
    return HEAD.pack(HANDSHAKE, 0) + encode(["loaded", size_bytes])


def encode_done(sequence: int, elapsed_us: int, outputs: tuple[Place, ...]) -> bytes:
    return HEAD.pack(sequence, elapsed_us) + _done_body(outputs)


@lru_cache(REMEMBERED)
def _done_body(outputs: tuple[Place, ...]) -> bytes:
    return encode(["done", outputs])


def encode_said(sequence: int, elapsed_us: int, body: object, bulk_bytes: int) -> bytes:
    return HEAD.pack(sequence, elapsed_us) + encode(["said", body, bulk_bytes])


def encode_refused(sequence: int, error: RefusedError) -> bytes:
    got = error.got if error.got is None or isinstance(error.got, str) else repr(error.got)
    texts = [None if text is None else printable(text) for text in (error.subject, got, error.allowed, error.remedy)]
    return HEAD.pack(sequence, 0) + encode(["refused", *texts])


def encode_failed(sequence: int, reason: str) -> bytes:
    return HEAD.pack(sequence, 0) + encode(["failed", printable(reason)])


def decode_answer(message: bytes, arena_bytes: int) -> Answer:
    """Raises ``RefusedError`` for anything that a sound child would not say."""
    sequence, elapsed_us, body = _split(message)
    return Answer(sequence, elapsed_us, _reply(body, arena_bytes))


@lru_cache(REMEMBERED)
def _reply(body: bytes, arena_bytes: int) -> Reply:
    value = decode(body, max_bytes=MAX_DOORBELL_BYTES)
    if not isinstance(value, list) or not value or value[0] not in _READERS:
        raise RefusedError("reply", value, "a list that begins with loaded, done, said, refused or failed")
    return _READERS[value[0]](value, arena_bytes)


def _read_loaded(value: object, arena_bytes: int) -> Reply:
    size_bytes = natural(items(value, "reply", 2)[1])
    if size_bytes > min(MAX_HANDSHAKE_BYTES, arena_bytes):
        raise RefusedError("handshake", f"{size_bytes} bytes", f"at most {MAX_HANDSHAKE_BYTES}")
    return Loaded(size_bytes)


def _read_done(value: object, arena_bytes: int) -> Reply:
    return Done(places(items(value, "reply", 2)[1], arena_bytes))


def _read_said(value: object, arena_bytes: int) -> Reply:
    _, body, bulk_bytes = items(value, "reply", 3)
    return Said(body, _inside(bulk_bytes, arena_bytes))


def _read_refused(value: object, arena_bytes: int) -> Reply:
    _, subject, got, allowed, remedy = items(value, "reply", 5)
    return Refused(printable(subject), None if got is None else printable(got), printable(allowed), printable(remedy))


def _read_failed(value: object, arena_bytes: int) -> Reply:
    return Failed(printable(items(value, "reply", 2)[1]))


_READERS: dict[object, Callable[[object, int], Reply]] = {
    "loaded": _read_loaded,
    "done": _read_done,
    "said": _read_said,
    "refused": _read_refused,
    "failed": _read_failed,
}


def _split(message: bytes) -> tuple[int, int, bytes]:
    if not HEAD.size < len(message) <= MAX_DOORBELL_BYTES:
        raise RefusedError("message", f"{len(message)} bytes", f"{HEAD.size + 1} to {MAX_DOORBELL_BYTES} bytes")
    return *HEAD.unpack_from(message), message[HEAD.size :]


def printable(text: object) -> str:
    """A text of the child on one line, cut, with nothing in it that a terminal would obey."""
    if not isinstance(text, str):
        raise RefusedError("text", text, "text")
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT_CHARS])


def items(value: object, subject: str, count: int) -> list:  # type: ignore[type-arg]
    if not isinstance(value, list) or len(value) != count:
        raise RefusedError(subject, value, f"a list of {count}")
    return list(value)


def natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise RefusedError("number", value, "a whole number from 0")
    return value
