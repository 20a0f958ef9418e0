"""What the ledger takes: its bounds, and the values that it keeps.

Rules: every length has its bound here, by name and with its unit; a value that exists may be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_TABLE_BYTES, bounded

MAX_NAME_BYTES = 256
"""Of a counter, a mark, a document, a request id, an owed key."""
MAX_NAMES = 4096
"""How many counters, marks and documents there may be, of each."""
MAX_TOPIC_BYTES = 512
MAX_CORRELATION_BYTES = 256
MAX_DOCUMENT_BYTES = MAX_TABLE_BYTES
"""The largest document is the agreed table."""
MAX_ENTRY_BYTES = 4 * 2**20 + 64 * 2**10
"""An envelope, an answer or an owed payload: as large as the largest packet of a link."""
MAX_BATCH_BYTES = 8 * 2**20
"""What one call of ``unanswered`` or ``owed`` holds in memory at most, unless a single entry is larger."""
MAX_EXPIRY_S = 2**32 - 1
MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much the ledger holds. Bytes are those of envelopes, answers and payloads.

    ``delivered_count`` is how many delivered keys are remembered, so that they are not owed again; ``receipts_count`` how many
    of the receipts that were signed last are kept, each of at most ``MAX_RECEIPT_BYTES``.
    """

    unanswered_count: int = 1024
    unanswered_bytes: int = 64 * 2**20
    answered_count: int = 4096
    answered_bytes: int = 64 * 2**20
    owed_count: int = 4096
    owed_bytes: int = 64 * 2**20
    delivered_count: int = 4096
    receipts_count: int = 4096

    def __post_init__(self) -> None:
        for bound in fields(self):
            bounded(f"ledger bound {bound.name}", getattr(self, bound.name), 1, 2**40)


@dataclass(frozen=True, slots=True)
class Owed:
    """A message for the outside that must arrive. ``key`` names it for ever; ``expiry_s`` is counted from its publication."""

    key: str
    topic: str
    payload: bytes = field(repr=False)
    correlation: bytes | None = None
    response_topic: str | None = None
    expiry_s: int | None = None

    def __post_init__(self) -> None:
        checked_name("owed key", self.key)
        for topic in (self.topic, self.response_topic):
            if topic is not None:
                checked_name(f"topic of {self.key}", topic, MAX_TOPIC_BYTES)
        checked_size(f"owed payload of {self.key}", self.payload, MAX_ENTRY_BYTES)
        checked_size(f"correlation of {self.key}", self.correlation or b"", MAX_CORRELATION_BYTES)
        if self.expiry_s is not None:
            bounded("owed expiry_s", self.expiry_s, 0, MAX_EXPIRY_S, "s")


def checked_name(subject: str, name: str, max_bytes: int = MAX_NAME_BYTES) -> str:
    """``name`` if it has 1 to ``max_bytes`` bytes of UTF-8; raises ``RefusedError`` naming ``subject`` otherwise."""
    if name.isprintable() and 0 < len(name.encode()) <= max_bytes:
        return name
    raise RefusedError(subject, name, f"1 to {max_bytes} bytes of printable text")


def checked_size(subject: str, data: bytes, max_bytes: int) -> bytes:
    """``data`` if it is no longer than ``max_bytes``; raises ``RefusedError`` naming ``subject`` otherwise."""
    if len(data) <= max_bytes:
        return data
    raise RefusedError(subject, f"{len(data)} bytes", f"at most {max_bytes} bytes")
