"""Texts of boards, models, operators and files, as a terminal and a log may have them: shown, never obeyed.

Owns the replacing of control characters.  Rules: a text keeps its words; JSON and CBOR hold it as it came.
"""

from __future__ import annotations

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
