"""What was signed of boards lately, as it was signed: for proof files.

Rules: bounded, two quotes a board and two appraisals a verifier and board, the newest; nothing here decides anything, and what is
given out was believed when it came in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

KEPT = 2
"""The newest, and the one before, which was in force when a late receipt was signed."""


class Archive:
    def __init__(self) -> None:
        self._quotes: dict[str, deque[bytes]] = {}
        self._appraisals: dict[tuple[str, str], deque[bytes]] = {}

    def keep_quote(self, board: str, message: bytes) -> None:
        _keep(self._quotes.setdefault(board, deque(maxlen=KEPT)), message)

    def keep_appraisal(self, verifier: str, board: str, message: bytes) -> None:
        _keep(self._appraisals.setdefault((verifier, board), deque(maxlen=KEPT)), message)

    def of(self, boards: Iterable[str]) -> dict[str, list[bytes]]:
        """The quotes of ``boards`` and the appraisals of them."""
        wanted = sorted(set(boards))
        quotes = [message for board in wanted for message in self._quotes.get(board, ())]
        held = sorted(self._appraisals)
        said = [message for by, board in held if board in wanted for message in self._appraisals[by, board]]
        return {"quotes": quotes, "appraisals": said}


def _keep(held: deque[bytes], message: bytes) -> None:
    if message not in held:
        held.append(message)
