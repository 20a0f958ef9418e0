"""A decision as a table for a terminal: the options with their costs taken apart, what is excluded, and why the first one won.

Rules: at most ``WIDTH`` columns; a cost part that is nothing for every option has no column; JSON keeps what is left out here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 130
PARTS = ("busy", "wait", "transfer", "kv", "energy", "lateness", "quality", "congestion", "price")
MIN_NAME, MAX_KV = 20, 22

Row = tuple[str, ...]


def decision_table(report: Mapping[str, Any]) -> str:
    """``report`` is what the agent answers to ``explain`` and ``place``."""
    options = report["options"]
    lines = [f"request class: {report['class']}"] if report.get("class") else []
    if options:
        lines += _option_lines(options)
    for each in report["excluded"]:
        lines += _wrapped(f"x  {_named(each)}: {each['reason']}", "     ")
    return "\n".join([*lines, *_wrapped(report["why"]["text"], "  ")])


def clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def milliseconds(time_us: int) -> str:
    """With two decimals while there is room for them."""
    return f"{time_us / 1000:.2f}" if time_us < 1_000_000 else f"{time_us / 1000:.0f}"


def _option_lines(options: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = [part for part in PARTS if any(option[f"{part}_us"] for option in options)]
    shared = any(option["share_permille"] is not None for option in options)
    moved = any(option["kv_action"] != "none" for option in options)
    heads = [*(["share"] if shared else []), "cost ms", *(f"{'+' if at else '='} {part}" for at, part in enumerate(parts))]
    rows = [
        [*([_share(option)] if shared else []), *(milliseconds(option[f"{part}_us"]) for part in ("total", *parts))]
        for option in options
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    kv = [_kv(option) if moved else "" for option in options]
    kv_width = max(len("kv from"), *map(len, kv)) + 2 if moved else 0
    room = max(MIN_NAME, WIDTH - 3 - sum(widths) - 2 * len(widths) - kv_width)
    names = [clipped(_named(option), room) for option in options]
    name_width = max(len("board/model"), *map(len, names))
    lines = [_line("", "board/model", heads, "kv from" if moved else "", name_width, widths)]
    return lines + [
        _line("->" if at == 0 else "", name, row, way, name_width, widths)
        for at, (name, row, way) in enumerate(zip(names, rows, kv, strict=True))
    ]


def _line(mark: str, name: str, cells: Sequence[str], kv: str, name_width: int, widths: Sequence[int]) -> str:
    numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{mark:<2} {name:<{name_width}}{numbers}  {kv}".rstrip()


def _named(each: Mapping[str, Any]) -> str:
    return f"{each['board']}/{each['model']}" if each["model"] else each["board"]


def _share(option: Mapping[str, Any]) -> str:
    share = option["share_permille"]
    return "-" if not share else f"{share / 10:.0f} %"


def _kv(option: Mapping[str, Any]) -> str:
    """Where the past of the session comes from, and how many tokens of it."""
    if option["kv_action"] == "none":
        return "-"
    source = f" {option['kv_source']}" if option["kv_source"] else ""
    return clipped(f"{option['kv_action']}{source} {option['kv_tokens']}", MAX_KV)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
