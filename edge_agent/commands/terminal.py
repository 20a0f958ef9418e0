"""How wide a terminal is, and how a text is cut or wrapped to that; what boards said is shown there, not obeyed."""

from __future__ import annotations

import os
import textwrap
from typing import TextIO

from edge_agent.core.printable import on_one_line

WIDTH = 130
MIN_WIDTH = 40


def columns(stream: TextIO) -> int:
    """How wide ``stream`` is: a terminal as it is now, within ``MIN_WIDTH`` and ``WIDTH``; anything else is ``WIDTH``."""
    if not stream.isatty():
        return WIDTH
    return max(MIN_WIDTH, min(WIDTH, os.get_terminal_size(stream.fileno()).columns or WIDTH))


def clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def counted(count: int, what: str) -> str:
    """``1 board``, ``2 boards``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def wrapped(text: str, indent: str = "", below: str = "", width: int = WIDTH) -> list[str]:
    """``text`` on lines of at most ``width`` columns, the first after ``indent``, the others after ``indent`` and ``below``."""
    return textwrap.wrap(
        on_one_line(text), width, initial_indent=indent, subsequent_indent=indent + below, break_on_hyphens=False
    )
