"""What a terminal shows: how wide, and nothing that it would obey.

Rules: texts of boards, models and files pass through here on their way to a terminal; JSON output holds them as they are.
"""

from __future__ import annotations

import textwrap

WIDTH = 130
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
}  # fmt: skip
"""C0, DEL and C1 (ECMA-48) as Unicode's pictures of them: an escape sequence is shown, not obeyed."""


def harmless(text: str) -> str:
    """``text`` without what a terminal would obey; line ends and tabs stay."""
    return text.translate(_CONTROLS)


def on_one_line(text: str) -> str:
    """``harmless``, each run of spaces and line ends as one space, and nothing invisible: it could turn a line around."""
    return "".join(each if each.isprintable() else "\ufffd" for each in harmless(" ".join(text.split())))


def clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def wrapped(text: str, indent: str = "", below: str = "") -> list[str]:
    """``text`` on lines of at most ``WIDTH`` columns, the first after ``indent``, the others after ``indent`` and ``below``."""
    return textwrap.wrap(on_one_line(text), WIDTH, initial_indent=indent, subsequent_indent=indent + below)
