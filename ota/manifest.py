"""What a release is: one signed list of everything that a model, or the agent itself, consists of.

Owns ``Release``, its bytes and the names of its targets.  Rules: no I/O; one encoding; a key that is not known is refused, for it
may be one that matters; everything else of a release is found by a digest in here, so nothing of two releases can be mixed; a
release names the model and the boards that it is for, and a number that only grows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, MODEL_NAME, bounded, checked

CHUNK_BYTES = 65_536
"""What is fetched, verified and kept as one; the last chunk of a file is shorter."""
MAX_FILE_BYTES = 4 * 2**30
MAX_FILES = 64
MAX_RELEASE_BYTES = 3 * 2**20
"""Of an encoded manifest: it travels as one message."""
MAX_CARD_BYTES = 256 * 2**10
MAX_NUMBER = 2**31 - 1
AGENT = "sly-agent"
"""What a release of the agent itself is called in the place of a model."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
VERSION = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){1,3}")


class Kind(StrEnum):
    PERCEPTION = "perception"
    LANGUAGE = "language"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class ReleasedFile:
    """``digest``: SHA-256 of the whole; ``chunks``: SHA-256 of every ``CHUNK_BYTES`` of it, one after another."""

    name: str
    size_bytes: int
    digest: bytes
    chunks: bytes = field(repr=False)

    def __post_init__(self) -> None:
        checked(FILE_NAME, "released file", self.name)
        bounded(f"size of {self.name}", self.size_bytes, 1, MAX_FILE_BYTES, "bytes")
        bounded(f"digest of {self.name}, length", len(self.digest), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        expected_bytes = -(-self.size_bytes // CHUNK_BYTES) * DIGEST_BYTES
        bounded(f"chunk list of {self.name}, length", len(self.chunks), expected_bytes, expected_bytes, "bytes")

    @property
    def chunk_count(self) -> int:
        return len(self.chunks) // DIGEST_BYTES

    def chunk_digest(self, index: int) -> bytes:
        return self.chunks[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    def chunk_bytes(self, index: int) -> int:
        """The length of chunk ``index``."""
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class Release:
    """``number`` grows with every release of ``model``; ``card``: its TOML as text (``models.card`` or ``models.language_card``),
    empty for the agent.  ``classes``: the board backends that it is for, empty for all; ``min_agent``: the oldest agent that can
    run it.

    Raises ``RefusedError`` naming the field for a value outside its bounds.
    """

    model: str
    number: int
    kind: Kind
    files: tuple[ReleasedFile, ...]
    card: str = field(default="", repr=False)
    classes: tuple[str, ...] = ()
    min_agent: str = "0.0.0"

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "released model", self.model)
        bounded(f"release number of {self.model}", self.number, 1, MAX_NUMBER)
        bounded(f"card of {self.model}, length", len(self.card.encode()), 0, MAX_CARD_BYTES, "bytes")
        bounded(f"files of {self.model}, count", len(self.files), 1, MAX_FILES)
        checked(VERSION, f"minimum agent of {self.model}", self.min_agent)
        for each in self.classes:
            checked(BOARD_ID, f"board class of {self.model}", each)
        names = [each.name for each in self.files]
        if len(set(names)) != len(names):
            raise RefusedError(f"files of {self.model}", f"{', '.join(sorted(names))}"[:100], "every name once")
        if (self.kind is Kind.AGENT) != (self.model == AGENT):
            raise RefusedError(f"kind of {self.model}", self.kind.value, f"{Kind.AGENT.value} for {AGENT} and nothing else")

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.files)


def manifest_path(model: str, number: int) -> str:
    """The TUF target that a release's manifest is."""
    return f"releases/{checked(MODEL_NAME, 'released model', model)}/{number}/release.cbor"
