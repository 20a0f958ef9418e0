"""What the agent and an engine child say to each other over their socket pair: small CBOR messages, one a datagram.

Rules: tensors never travel here, only where they lie in the arena.  The child is not trusted once it has read a model, so
everything that it says is decoded strictly and bounded; its texts are cut and made printable before anybody sees them.
Each request has a sequence number and gets exactly one answer with the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

from board_support.board import Delegate
from board_support.roofline import ModelWork
from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TensorSpec
from edge_agent.runtime.arena import Place, Placed, places
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.signature import Signature
from models.card import Card

MAX_DOORBELL_BYTES = 64 * 2**10
MAX_HANDSHAKE_BYTES = 4 * 2**20
MAX_TEXT_CHARS = 400
MAX_LAYERS = 16
HANDSHAKE = 0
"""The sequence number of the answer to ``Order``."""


@dataclass(frozen=True, slots=True)
class Order:
    """The first message, agent to child: what to load and how."""

    model: str
    digest: bytes
    settings: EngineSettings
    delegate: Delegate | None
    card: Card | None

    def encode(self) -> bytes:
        settings = self.settings
        return encode(
            {
                "model": self.model,
                "digest": self.digest,
                "engine": settings.engine,
                "runtime": settings.runtime,
                "threads": settings.threads,
                "memory_bytes": settings.memory_bytes,
                "invoke_limit_us": settings.invoke_limit_us,
                "unsafe_without_seccomp": settings.unsafe_without_seccomp,
                "delegate": [self.delegate.library, dict(self.delegate.options)] if self.delegate else None,
                "card": self.card.to_mapping() if self.card else None,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Order:
        entry = decode(data, max_bytes=MAX_DOORBELL_BYTES)
        assert isinstance(entry, dict), "the agent speaks first, and is trusted"
        rest = {name: entry.pop(name) for name in ("model", "digest", "delegate", "card")}
        return cls(
            rest["model"],
            rest["digest"],
            EngineSettings(**entry),
            Delegate(*rest["delegate"]) if rest["delegate"] else None,
            Card.from_mapping(rest["card"]) if rest["card"] else None,
        )


@dataclass(frozen=True, slots=True)
class Ready:
    """The child's account of itself once the model is loaded. It travels in the arena: a model may have many operators."""

    signature: Signature
    work: ModelWork
    library: str
    delegate: str
    confinement: tuple[str, ...]
    resident_bytes: int

    def encode(self) -> bytes:
        return encode(
            [
                [_spec_out(spec) for spec in self.signature.inputs],
                [_spec_out(spec) for spec in self.signature.outputs],
                self.work.to_list(),
                self.library,
                self.delegate,
                list(self.confinement),
                self.resident_bytes,
            ]
        )

    @classmethod
    def decode(cls, data: bytes) -> Ready:
        """Raises ``RefusedError`` for anything that a sound child would not say."""
        inputs, outputs, work, library, delegate, layers, resident_bytes = _items(
            decode(data, max_bytes=MAX_HANDSHAKE_BYTES), "handshake", 7
        )
        signature = Signature(_specs_in(inputs), _specs_in(outputs))
        if not isinstance(layers, (list, tuple)) or len(layers) > MAX_LAYERS:
            raise RefusedError("handshake layers", layers, f"a list of at most {MAX_LAYERS}")
        return cls(
            signature,
            ModelWork.from_list(work),
            printable(library),
            printable(delegate),
            tuple(printable(layer) for layer in layers),
            _natural(resident_bytes),
        )


def _spec_out(spec: TensorSpec) -> list[object]:
    return [spec.name, spec.dtype, list(spec.shape)]


def _specs_in(value: object) -> tuple[TensorSpec, ...]:
    if not isinstance(value, (list, tuple)):
        raise RefusedError("handshake tensors", value, "a list")
    found = []
    for item in value:
        name, dtype, shape = _items(item, "handshake tensor", 3)
        if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, (list, tuple))):
            raise RefusedError("handshake tensor", item, "name, dtype, shape")
        found.append(TensorSpec(name, dtype, tuple(shape)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Request:
    """Run the model on the tensors at these places; as its card's whole task if ``whole_task``."""

    sequence: int
    whole_task: bool
    inputs: tuple[Placed, ...]


def encode_request(sequence: int, whole_task: bool, inputs: list[Place]) -> bytes:
    return encode([sequence, whole_task, inputs])


def decode_request(data: bytes, arena_bytes: int) -> Request:
    sequence, whole_task, inputs = _items(decode(data, max_bytes=MAX_DOORBELL_BYTES), "request", 3)
    return Request(_natural(sequence), whole_task is True, places(inputs, arena_bytes))


@dataclass(frozen=True, slots=True)
class Loaded:
    """The handshake lies in the first ``size_bytes`` of the arena."""

    sequence: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    sequence: int
    elapsed_us: int
    outputs: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The data is at fault: the model file, or this request's inputs."""

    sequence: int
    error: RefusedError


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not be done, and the child lives on."""

    sequence: int
    reason: str


Reply = Loaded | Done | Refused | Failed


def encode_loaded(size_bytes: int) -> bytes:
    return encode(["loaded", HANDSHAKE, size_bytes])


def encode_done(sequence: int, elapsed_us: int, outputs: list[Place]) -> bytes:
    return encode(["done", sequence, elapsed_us, outputs])


def encode_refused(sequence: int, error: RefusedError) -> bytes:
    got = error.got if error.got is None or isinstance(error.got, str) else repr(error.got)
    texts = [error.subject, got, error.allowed, error.remedy]
    return encode(["refused", sequence, *(None if text is None else text[:MAX_TEXT_CHARS] for text in texts)])


def encode_failed(sequence: int, reason: str) -> bytes:
    return encode(["failed", sequence, reason[:MAX_TEXT_CHARS]])


def decode_reply(data: bytes, arena_bytes: int) -> Reply:
    """Raises ``RefusedError`` for anything that a sound child would not say."""
    entry = decode(data, max_bytes=MAX_DOORBELL_BYTES)
    kind = entry[0] if isinstance(entry, (list, tuple)) and entry else None
    if kind == "done":
        _, sequence, elapsed_us, outputs = _items(entry, "reply", 4)
        return Done(_natural(sequence), _natural(elapsed_us), places(outputs, arena_bytes))
    if kind == "refused":
        _, sequence, subject, got, allowed, remedy = _items(entry, "reply", 6)
        texts = [None if text is None else printable(text) for text in (got, allowed, remedy)]
        return Refused(_natural(sequence), RefusedError(printable(subject), texts[0], texts[1] or "", texts[2] or ""))
    if kind == "failed":
        _, sequence, reason = _items(entry, "reply", 3)
        return Failed(_natural(sequence), printable(reason))
    if kind == "loaded":
        _, sequence, size_bytes = _items(entry, "reply", 3)
        if _natural(size_bytes) > min(MAX_HANDSHAKE_BYTES, arena_bytes):
            raise RefusedError("handshake", f"{size_bytes} bytes", f"at most {MAX_HANDSHAKE_BYTES}")
        return Loaded(_natural(sequence), size_bytes)
    raise RefusedError("reply", kind, "loaded, done, refused, failed")


def printable(text: object) -> str:
    """A text of the child on one line, cut, with nothing in it that a terminal would obey."""
    if not isinstance(text, str):
        raise RefusedError("text", text, "text")
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT_CHARS])


def _items(value: object, subject: str, count: int) -> list:  # type: ignore[type-arg]
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise RefusedError(subject, value, f"a list of {count}")
    return list(value)


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise RefusedError("number", value, "a whole number from 0")
    return value
