"""Births, farewells and wills: signed words on whether a board is there, each stamped with its boot epoch.

Rules: a word of an older boot never counts against a newer one; the will is signed when the connection is made, so the
broker can withhold it or send it early, but not invent it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.core.cbor import decode, encode, fields
from edge_agent.core.cose import Signer, decode_sign1, sign1, verify1
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import BOARD_ID, bounded, checked

AAD = b"sly/1/presence"
MAX_PRESENCE_BYTES = 512
MAX_COUNT = 2**53
_HEAD = b"\xa3"
"""A map of three entries; a record has more."""
_PRESENCE = {1: ("board", str), 2: ("boot_epoch", int), 3: ("standing", str)}


class Standing(StrEnum):
    ONLINE = "online"
    STOPPED = "stopped"
    """It said goodbye."""
    OFFLINE = "offline"
    """Its will was delivered."""


@dataclass(frozen=True, slots=True)
class Presence:
    board: str
    boot_epoch: int
    standing: Standing

    def __post_init__(self) -> None:
        checked(BOARD_ID, "presence board", self.board)
        bounded("presence boot_epoch", self.boot_epoch, 0, MAX_COUNT)


def sign_presence(presence: Presence, signer: Signer) -> bytes:
    return sign1(encode({1: presence.board, 2: presence.boot_epoch, 3: presence.standing.value}), signer, AAD)


def is_presence(message: bytes) -> bool:
    """Does this signed message look like a presence rather than a record? Says nothing of its signature.

    Raises ``RefusedError`` for what is not signed at all.
    """
    return decode_sign1(message).payload[:1] == _HEAD


def open_presence(message: bytes, find_key: Callable[[bytes], bytes | None]) -> Presence:
    """The presence in a signed message. Raises ``RefusedError`` unless it is well-formed and signed by its own board."""
    signed = verify1(message, find_key, AAD, max_bytes=MAX_PRESENCE_BYTES)
    entry = fields(decode(signed.payload, MAX_PRESENCE_BYTES, subject="presence"), "presence", _PRESENCE)
    if signed.kid != entry["board"].encode():
        raise RefusedError("presence", f"board {entry['board']!r} signed by {signed.kid!r}", "a board's own signature")
    if entry["standing"] not in list(Standing):
        raise RefusedError("presence standing", entry["standing"], ", ".join(Standing))
    return Presence(entry["board"], entry["boot_epoch"], Standing(entry["standing"]))
