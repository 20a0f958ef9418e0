"""What an operator says of a board: the only thing that clears a contraindication, and what takes a board's key back.

Owns ``OperatorWord``, its bytes and its signature.  Rules: only an operator whose key the fleet knows can sign one; of one board
the larger ``serial`` counts, and no smaller one ever again; a word is kept on the broker, so that who was away hears it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from edge_agent.attest.evidence import MAX_COUNT
from edge_agent.core.values import BOARD_ID, bounded, checked

AAD = b"sly/1/operator"
MAX_WORD_BYTES = 1024


class Action(StrEnum):
    CLEAR = "clear"
    """What was held against it until now is forgotten; new evidence counts."""
    REVOKE = "revoke"
    """It is contraindicated until it is cleared, whatever it shows."""


@dataclass(frozen=True, slots=True)
class OperatorWord:
    """``serial``: ascending for each board, by convention the seconds since 1970 at which it was signed."""

    operator: str
    board: str
    serial: int
    action: Action
    reason: str = ""

    def __post_init__(self) -> None:
        checked(BOARD_ID, "operator", self.operator)
        checked(BOARD_ID, "operator's board", self.board)
        bounded("operator's serial", self.serial, 1, MAX_COUNT)
        bounded("operator's reason, length", len(self.reason), 0, 256, "characters")
