"""What a release is: one signed list of everything that a model, or the agent itself, consists of.

Owns ``Release``, its bytes and the names of its targets.  Rules: no I/O; one encoding; a key that is not known is refused, for it
may be one that matters; everything else of a release is found by a digest in here, so nothing of two releases can be mixed; a
release names the model and the boards that it is for, and a number that only grows; a manifest under another release's name is
refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, MODEL_NAME, bounded, checked

CHUNK_BYTES = 65_536
"""What is fetched, verified and kept as one; the last chunk of a file is shorter."""
MAX_FILE_BYTES = 4 * 2**30
MAX_FILES = 64
MAX_RELEASE_BYTES = 3 * 2**20
"""Of an encoded manifest: it travels as one message."""
MAX_CARD_BYTES = 256 * 2**10
MAX_CLASSES = 64
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
        bounded(f"board classes of {self.model}, count", len(self.classes), 0, MAX_CLASSES)
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


_RELEASE = {
    1: ("model", str), 2: ("number", int), 3: ("kind", str), 4: ("files", list), 5: ("card", str), 6: ("classes", list),
    7: ("min_agent", str),
}  # fmt: skip
_FILE = {1: ("name", str), 2: ("size_bytes", int), 3: ("digest", bytes), 4: ("chunks", bytes)}


def encode_release(release: Release) -> bytes:
    """The manifest, as it is signed. Raises ``RefusedError`` for one over ``MAX_RELEASE_BYTES``, which no message holds."""
    files = [{1: each.name, 2: each.size_bytes, 3: each.digest, 4: each.chunks} for each in release.files]
    manifest = encode(
        {
            1: release.model, 2: release.number, 3: release.kind.value, 4: files, 5: release.card, 6: list(release.classes),
            7: release.min_agent,
        }
    )  # fmt: skip
    if len(manifest) > MAX_RELEASE_BYTES:
        raise RefusedError(
            f"manifest of {release.model} {release.number}", f"{len(manifest)} bytes", f"at most {MAX_RELEASE_BYTES} bytes",
            "release fewer or smaller files: a 64 KiB chunk takes 32 bytes of the manifest",
        )  # fmt: skip
    return manifest


def decode_release(data: bytes, path: str = "") -> Release:
    """The release in a manifest that came from outside; ``path``: the TUF target that it was signed as.

    Raises ``RefusedError`` naming the field, also for a manifest of another release than its path names.
    """
    entry = fields(decode(data, MAX_RELEASE_BYTES, subject="manifest"), "manifest", _RELEASE)
    kind = entry.pop("kind")
    if kind not in list(Kind):
        raise RefusedError("manifest kind", shown(kind), ", ".join(Kind))
    files = [fields(each, "manifest file", _FILE) for each in list_of(entry.pop("files"), "manifest files", dict, MAX_FILES)]
    classes = tuple(list_of(entry.pop("classes"), "manifest classes", str, MAX_CLASSES))
    release = Release(**entry, kind=Kind(kind), files=tuple(ReleasedFile(**each) for each in files), classes=classes)
    if path and path != manifest_path(release.model, release.number):
        raise RefusedError(
            f"manifest {shown(path)}", f"release {release.number} of {release.model}", "the release of its own name"
        )
    return release
