"""Which boards there are, and which of them this machine is.

Rules: boards come from the entry-point group ``sly.boards`` in the order of their numeric prefix; every refusal is kept and
shown; nothing falls back to emulation: an emulated board runs only when it is named.
"""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points

from board_support.board import Board, BoardInfo, BoardSettings, Unavailable
from edge_agent.core.errors import RefusedError, UnavailableError

GROUP = "sly.boards"
AUTO = "auto"


def board_classes() -> list[type[Board]]:
    """Every kind of board that can be imported, in probing order."""
    return [found for found in _found() if not isinstance(found, Unavailable)]


def probe_all(settings: BoardSettings) -> list[BoardInfo | Unavailable]:
    """Every registered board: what it is, or all reasons why it is not here."""
    return [found if isinstance(found, Unavailable) else found(settings).probe() for found in _found()]


def open_board(backend: str, settings: BoardSettings) -> Board:
    """The board named ``backend``, or for "auto" the first real one that is here.

    Raises ``RefusedError`` for an unknown name, ``UnavailableError`` with every reason for a board that is not here.
    """
    if backend == AUTO:
        return _first_real(settings)
    kinds = {kind.backend: kind for kind in board_classes()}
    if backend not in kinds:
        raise RefusedError("board backend", backend, f"{AUTO}, {', '.join(kinds)}")
    board = kinds[backend](settings)
    found = board.probe()
    if isinstance(found, Unavailable):
        raise UnavailableError(f"board {backend}", "; ".join(found.reasons), "sly board probe shows every board")
    return board


def _first_real(settings: BoardSettings) -> Board:
    refusals = []
    for found in _found():
        if isinstance(found, Unavailable):
            refusals.append(found)
        elif not found.emulated:
            board = found(settings)
            info = board.probe()
            if not isinstance(info, Unavailable):
                return board
            refusals.append(info)
    reasons = [f"{refusal.backend}: {'; '.join(refusal.reasons)}" for refusal in refusals]
    raise UnavailableError(
        "board auto",
        "no known board is here (" + " | ".join(reasons or [f"nothing is registered in {GROUP}"]) + ")",
        'to emulate one, name it: backend = "jalapeno", profile = "raspberry_pi_5"',
    )


def _found() -> list[type[Board] | Unavailable]:
    return [_load(entry) for entry in sorted(entry_points(group=GROUP), key=_order)]


def _order(entry: EntryPoint) -> tuple[int, str]:
    prefix = re.match(r"\d+", entry.name)
    return (int(prefix[0]) if prefix else 10**6, entry.name)


def _load(entry: EntryPoint) -> type[Board] | Unavailable:
    name = entry.name.partition("-")[2] or entry.name
    try:
        kind = entry.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        return Unavailable(name, (f"entry point {entry.value}: {error}",))
    if isinstance(kind, type) and issubclass(kind, Board):
        return kind
    return Unavailable(name, (f"entry point {entry.value}: not a Board",))
