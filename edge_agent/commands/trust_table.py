"""How far boards are trusted, on a terminal: one line a board, its claims and what is held against it below.

Rules: at most ``WIDTH`` columns; JSON keeps what is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_agent.commands.terminal import WIDTH, clipped, wrapped

MAX_BOARD = 20
INDENT = " " * 4
LOUD = "contraindicated"
CLAIMS = {
    "instance_identity": "identity", "configuration": "configuration", "executables": "executables", "file_system": "files",
    "hardware": "hardware", "runtime_opaque": "runtime", "storage_opaque": "storage", "sourced_data": "answers",
}  # fmt: skip


def trust_table(report: Mapping[str, Any]) -> str:
    """``report`` is what the agent answers to ``trust``."""
    if not report["attests"]:
        lines = [f"{report['board']} does not attest ([attest] on = false): this is what its operator says"]
        return "\n".join(lines + [f"{each['board']:<{MAX_BOARD}} {each['tier']}" for each in report["boards"]])
    heads = ("board", "standing", "trust", "key", "evidence", "receipts", "said by")
    rows = [_row(report["board"], each) for each in report["boards"]]
    widths = [max(map(len, column)) for column in zip(heads[:-1], *(row[:-1] for row in rows), strict=True)]
    lines = [_line(heads, widths)]
    for row, each in zip(rows, report["boards"], strict=True):
        lines += [_line(row, widths), *_below(each)]
    return "\n".join([*lines, _closing(report)])


def contraindicated(report: Mapping[str, Any]) -> list[str]:
    """The boards that are there, or were lately, and may run nothing."""
    return [each["board"] for each in report["boards"] if each["tier"] == LOUD and each["standing"] != "unknown"]


def _row(asked: str, board: Mapping[str, Any]) -> tuple[str, ...]:
    age_s, receipts = board["evidence_age_s"], board["receipts"]
    evidence = "own" if board["board"] == asked else "-" if age_s is None else f"{age_s} s ago"
    said = ", ".join(_said(each) for each in board["said"]) or "nobody"
    tier = board["tier"].upper() if board["tier"] == LOUD else board["tier"]
    counted = "-" if receipts is None else str(receipts)
    return clipped(board["board"], MAX_BOARD), board["standing"], tier, board["key"] or "-", evidence, counted, said


def _said(word: Mapping[str, Any]) -> str:
    return f"{word['verifier']} {word['tier']}{'' if word['counts'] else ' (away)'}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)]
    return clipped("  ".join([*aligned, cells[-1]]).rstrip(), WIDTH)


def _below(board: Mapping[str, Any]) -> list[str]:
    vector = board["vector"]
    claims = ", ".join(f"{words} {_meaning(vector[name])} ({vector[name]})" for name, words in CLAIMS.items() if name in vector)
    texts = [*([claims] if claims else []), *(f"- {reason}" for reason in board["reasons"])]
    return [line for text in texts for line in wrapped(text, INDENT, "  ")]


def _meaning(value: int) -> str:
    """Of a claim, by the ranges of AR4SI: those below -1 mean the same as their mirror images, by this verifier's own reasons."""
    size = value if value >= 0 else -value - 1
    if value in (-1, 0, 1):
        return "none"
    return "affirming" if size < 32 else "warning" if size < 96 else LOUD


def _closing(report: Mapping[str, Any]) -> str:
    checks = report["checks"]
    checked = f"; {checks['done']} answers of others run again here, {checks['differed']} differed" if checks else ""
    return f"seen by {report['board']} in its epoch {report['epoch']}: {report['receipts']} receipts signed here{checked}"
