"""Plain values as TOML text that ``tomllib`` reads back: what cards are written in.

Rules: whole numbers, truth values, printable texts, lists of those, tables, and lists of tables; nothing else is asked for.  Of
such values JSON and TOML 1.0 write numbers, texts and lists alike; tables come after the plain values of their table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(table: Mapping[str, object]) -> str:
    return "".join(_table("", table))


def _table(prefix: str, table: Mapping[str, object]) -> list[str]:
    lines = [f"{_key(key)} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items() if not _deeper(value)]
    for key, value in table.items():
        path = f"{prefix}{_key(key)}"
        if isinstance(value, Mapping):
            inner = _table(f"{path}.", value)
            lines += ([f"\n[{path}]\n"] if not inner or not inner[0].startswith("\n") else []) + inner
        elif isinstance(value, list) and _deeper(value):
            for each in value:
                lines += [f"\n[[{path}]]\n", *_table(f"{path}.", each)]
    return lines


def _deeper(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else json.dumps(key, ensure_ascii=False)
