"""A decision as a table for a terminal: the options with their costs taken apart, what is excluded, and why the first one won.

Rules: at most ``WIDTH`` columns; a cost part that is nothing for every option has no column; JSON keeps what is left out here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_agent.commands.terminal import WIDTH, clipped

MIN_NAME, MIN_KV, MAX_KV = 20, 12, 22
NBSP = "\u00a0"


def decision_table(report: Mapping[str, Any]) -> str:
    """``report`` is what the agent answers to ``explain`` and ``place``."""
    options = report["options"]
    lines = [f"request class: {report['class']}"] if report.get("class") else []
    if options:
        lines += _option_lines(options)
    for each in report["excluded"]:
        lines += _wrapped(f"x  {_named(each)}: {each['reason']}", "     ")
    return "\n".join([*lines, *_wrapped(report["why"]["text"], "  ")])


def milliseconds(time_us: int) -> str:
    """In at most seven characters."""
    if time_us < 1_000_000:
        return f"{time_us / 1000:.2f}"
    return f"{time_us / 1000:.0f}" if time_us < 10**10 - 500 else f"{time_us / 1000:.1e}"


def _option_lines(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """As roomy as fits."""
    wide, narrow = (list(_lines(options, *layout)) for layout in ((2, ("= ", "+ "), MAX_KV), (1, ("", ""), MIN_KV)))
    return wide if max(map(len, wide)) <= WIDTH else narrow


def _lines(options: Sequence[Mapping[str, Any]], gap: int, signs: tuple[str, str], kv_width: int) -> Iterator[str]:
    from edge_agent.node.words import PARTS

    parts = [part for part in PARTS if any(option[f"{part}_us"] for option in options)]
    shared = any(option["share_permille"] is not None for option in options)
    moved = any(option["kv_action"] != "none" for option in options)
    heads = [*(["share"] if shared else []), "cost ms", *(f"{signs[at > 0]}{part}" for at, part in enumerate(parts))]
    rows = [
        [*([_share(option)] if shared else []), *(milliseconds(option[f"{part}_us"]) for part in ("total", *parts))]
        for option in options
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    ways = ["kv from", *(clipped(_kv(option), kv_width) for option in options)] if moved else [""] * (len(options) + 1)
    room = max(MIN_NAME, WIDTH - 3 - sum(widths) - gap * len(widths) - (gap + max(map(len, ways)) if moved else 0))
    names = ["board/model", *(clipped(_named(option), room) for option in options)]
    name_width = max(map(len, names))
    for at, (name, cells, way) in enumerate(zip(names, [heads, *rows], ways, strict=True)):
        numbers = "".join(f"{'':<{gap}}{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        yield f"{'->' if at == 1 else '':<2} {name:<{name_width}}{numbers}{'':<{gap}}{way}".rstrip()


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
    return f"{option['kv_action']} {option['kv_tokens']}{source}"


def _wrapped(text: str, indent: str) -> list[str]:
    """A figure stays with its unit."""
    bound = re.sub(r"(\d) (?=(s|ms|µs)\b)", rf"\1{NBSP}", text)
    return [line.replace(NBSP, " ") for line in textwrap.wrap(bound, WIDTH, subsequent_indent=indent, break_on_hyphens=False)]
