"""How wide a terminal is, and how a text is cut or wrapped to that; what boards said is shown there, not obeyed."""

from __future__ import annotations

import textwrap

from edge_agent.core.printable import on_one_line

WIDTH = 130


def clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def wrapped(text: str, indent: str = "", below: str = "") -> list[str]:
    """``text`` on lines of at most ``WIDTH`` columns, the first after ``indent``, the others after ``indent`` and ``below``."""
    return textwrap.wrap(on_one_line(text), WIDTH, initial_indent=indent, subsequent_indent=indent + below)
