"""What an operator says of a board: the only thing that clears a contraindication, and what takes a board's key back.

Owns ``OperatorWord``, its bytes and its signature.  Rules: only an operator whose key the fleet knows can sign one; of one board
the larger ``serial`` counts, and no smaller one ever again; a word is kept on the broker, so that who was away hears it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.attest.evidence import MAX_COUNT
from edge_agent.core.cbor import decode, encode, fields
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, bounded, checked

AAD = b"sly/1/operator"
MAX_WORD_BYTES = 2048
MAX_WORD_REASON_CHARS = 256


class Action(StrEnum):
    CLEAR = "clear"
    """What was held against it until now is forgotten; new evidence counts."""
    REVOKE = "revoke"
    """It is contraindicated until it is cleared, whatever it shows."""


@dataclass(frozen=True, slots=True)
class OperatorWord:
    """``serial``: ascending for each board, by convention the microseconds since 1970 at which it was signed."""

    operator: str
    board: str
    serial: int
    action: Action
    reason: str = ""

    def __post_init__(self) -> None:
        checked(BOARD_ID, "operator", self.operator)
        checked(BOARD_ID, "operator's board", self.board)
        bounded("operator's serial", self.serial, 1, MAX_COUNT)
        bounded("operator's reason, length", len(self.reason), 0, MAX_WORD_REASON_CHARS, "characters")


_WORD = {1: ("operator", str), 2: ("board", str), 3: ("serial", int), 4: ("action", str)}
_WORD_OPTIONAL = {5: ("reason", str)}


def sign_word(word: OperatorWord, signer: Signer) -> bytes:
    known: dict[int, object] = {1: word.operator, 2: word.board, 3: word.serial, 4: word.action.value}
    return sign1(encode(known | ({5: word.reason} if word.reason else {})), signer, AAD)


def open_word(message: bytes, find_key: Callable[[bytes], bytes | None]) -> OperatorWord:
    """The word in a signed message; ``find_key`` knows operators, not boards.

    Raises ``RefusedError`` unless it is well-formed and signed by its own operator.
    """
    signed = verify1(message, find_key, AAD, MAX_WORD_BYTES)
    entry = fields(decode(signed.payload, MAX_WORD_BYTES, subject="word"), "word", _WORD, _WORD_OPTIONAL)
    if signed.kid != entry["operator"].encode():
        raise RefusedError("word", f"operator {entry['operator']!r} signed by {shown(signed.kid)}", "an operator's own signature")
    if entry["action"] not in list(Action):
        raise RefusedError("word action", shown(entry["action"]), ", ".join(Action))
    if entry.get("reason") == "":
        raise RefusedError("word reason", "an empty text", "nothing, where there is none")
    return OperatorWord(**{**entry, "action": Action(entry["action"])})
