"""The first words between the agent and an engine child: what to load and how, and the account of what was loaded.

Rules: the order goes by doorbell and is trusted, for the agent speaks first; the account lies in the arena, because a model
may have many operators, and is decoded as strictly as all that a child says.
"""

from __future__ import annotations

from dataclasses import dataclass

from board_support.board import Delegate
from board_support.roofline import MAX_OPS, ModelWork
from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TensorSpec, bounded
from edge_agent.runtime.doorbell import MAX_DOORBELL_BYTES, MAX_HANDSHAKE_BYTES, items, natural, printable
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.signature import Signature
from models.card import Card

MAX_HANDSHAKE_ITEMS = 16 * MAX_OPS
MAX_LAYERS = 16


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
    delegated_permille: int | None = None

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
                self.delegated_permille,
            ]
        )

    @classmethod
    def decode(cls, data: bytes) -> Ready:
        """Raises ``RefusedError`` for anything that a sound child would not say."""
        inputs, outputs, work, library, delegate, layers, resident_bytes, delegated = items(
            decode(data, MAX_HANDSHAKE_BYTES, max_items=MAX_HANDSHAKE_ITEMS, subject="handshake"), "handshake", 8
        )
        signature = Signature(_specs_in(inputs), _specs_in(outputs))
        if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
            raise RefusedError("handshake layers", layers, f"a list of at most {MAX_LAYERS}")
        return cls(
            signature,
            ModelWork.from_list(work),
            printable(library),
            printable(delegate),
            tuple(printable(layer) for layer in layers),
            natural(resident_bytes),
            None if delegated is None else bounded("handshake delegated share", delegated, 0, 1000, "permille"),
        )


def _spec_out(spec: TensorSpec) -> list[object]:
    return [spec.name, spec.dtype, list(spec.shape)]


def _specs_in(value: object) -> tuple[TensorSpec, ...]:
    if not isinstance(value, list):
        raise RefusedError("handshake tensors", value, "a list")
    found = []
    for item in value:
        name, dtype, shape = items(item, "handshake tensor", 3)
        if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)):
            raise RefusedError("handshake tensor", item, "name, dtype, shape")
        found.append(TensorSpec(name, dtype, tuple(shape)))
    return tuple(found)
