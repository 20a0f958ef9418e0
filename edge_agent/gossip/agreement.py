"""What a board says of the table that it holds: a signed digest of what it reckons from, and of what came out.

Owns ``BoardDigest``, its bytes and its signature.  Rules: only the board itself can sign it; the larger ``(boot_epoch,
sequence)`` counts; ``versions`` and ``passed_on`` are there only while somebody differs, so that what was lost is said again:
by the board whose word it is, which hears that somebody holds an older one, or by anybody, who passes on what that board signed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, MAX_BOARDS, bounded, checked
from edge_agent.gossip.presence import MAX_COUNT
from edge_agent.gossip.record import MAX_RECORD_BYTES

AAD = b"sly/1/digest"
MAX_PASSED_ON = 8
MAX_PASSED_ON_BYTES = MAX_RECORD_BYTES
"""Of all that is passed on in one message."""
MAX_DIGEST_BYTES = 2 * 2**16 + MAX_PASSED_ON_BYTES

_DIGEST = {
    1: ("board", str), 2: ("boot_epoch", int), 3: ("sequence", int), 4: ("facts", bytes), 5: ("table", bytes),
    6: ("rules", bytes), 7: ("boards", int),
}  # fmt: skip
_DIGEST_OPTIONAL = {8: ("versions", list), 9: ("passed_on", list)}


@dataclass(frozen=True, slots=True)
class Version:
    """Which record of ``board`` somebody holds."""

    board: str
    boot_epoch: int
    sequence: int

    def __post_init__(self) -> None:
        checked(BOARD_ID, "version's board", self.board)
        bounded("version's boot_epoch", self.boot_epoch, 0, MAX_COUNT)
        bounded("version's sequence", self.sequence, 0, MAX_COUNT)

    @property
    def number(self) -> tuple[int, int]:
        return (self.boot_epoch, self.sequence)


@dataclass(frozen=True, slots=True)
class BoardDigest:
    """``facts``, ``table``, ``rules``: SHA-256 each, of what the table was made from, of the table, and of what it was made by.

    ``boards``: how many of them it counts as there.  ``versions``: of their records, ascending; empty while nobody differs.
    ``passed_on``: presences and records of others, as they signed them.
    """

    board: str
    boot_epoch: int
    sequence: int
    facts: bytes
    table: bytes
    rules: bytes
    boards: int
    versions: tuple[Version, ...] = ()
    passed_on: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        checked(BOARD_ID, "digest board", self.board)
        bounded("digest boot_epoch", self.boot_epoch, 0, MAX_COUNT)
        bounded("digest sequence", self.sequence, 0, MAX_COUNT)
        bounded("digest boards", self.boards, 0, MAX_BOARDS)
        for name in ("facts", "table", "rules"):
            bounded(f"digest of the {name}, length", len(getattr(self, name)), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        names = [version.board for version in self.versions]
        if len(names) > MAX_BOARDS or any(one >= other for one, other in pairwise(names)):
            raise RefusedError("digest versions", f"{len(names)} versions", f"at most {MAX_BOARDS}, each board once, ascending")
        size_bytes = sum(map(len, self.passed_on))
        if len(self.passed_on) > MAX_PASSED_ON or size_bytes > MAX_PASSED_ON_BYTES:
            allowed = f"at most {MAX_PASSED_ON} messages of {MAX_PASSED_ON_BYTES} bytes together"
            raise RefusedError("digest passed_on", f"{len(self.passed_on)} messages of {size_bytes} bytes", allowed)

    @property
    def version(self) -> tuple[int, int]:
        return (self.boot_epoch, self.sequence)

    def to_map(self) -> dict[int, object]:
        known = {key: getattr(self, name) for key, (name, _) in _DIGEST.items()}
        if self.versions:
            known[8] = [[version.board, version.boot_epoch, version.sequence] for version in self.versions]
        if self.passed_on:
            known[9] = list(self.passed_on)
        return known

    @classmethod
    def from_map(cls, value: object) -> BoardDigest:
        """The digest in a decoded map. Raises ``RefusedError`` naming the field."""
        entry = fields(value, "digest", _DIGEST, _DIGEST_OPTIONAL)
        for name in ("versions", "passed_on"):
            if entry.get(name) == []:
                raise RefusedError(f"digest {name}", "an empty list", "nothing, where there is none")
        versions = list_of(entry.pop("versions", []), "digest versions", list, MAX_BOARDS)
        passed_on = list_of(entry.pop("passed_on", []), "digest passed_on", bytes, MAX_PASSED_ON)
        return cls(versions=tuple(map(_version_in, versions)), passed_on=tuple(passed_on), **entry)


def sign_digest(digest: BoardDigest, signer: Signer) -> bytes:
    return sign1(encode(digest.to_map()), signer, AAD)


def open_digest(message: bytes, find_key: Callable[[bytes], bytes | None]) -> BoardDigest:
    """The digest in a signed message. Raises ``RefusedError`` unless it is well-formed and signed by its own board."""
    signed = verify1(message, find_key, AAD, max_bytes=MAX_DIGEST_BYTES)
    digest = BoardDigest.from_map(decode(signed.payload, MAX_DIGEST_BYTES, subject="digest"))
    if signed.kid != digest.board.encode():
        raise RefusedError("digest", f"board {digest.board!r} signed by {signed.kid!r}", "a board's own signature")
    return digest


def _version_in(value: list[Any]) -> Version:
    match value:
        case [str(board), int(boot_epoch), int(sequence)]:
            return Version(board, boot_epoch, sequence)
    raise RefusedError("digest version", value, "[board, boot epoch, sequence]")
