"""What so many boards' broker sends, over the size of their cells, as a picture: computed, not counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edge_agent.core.values import MAX_BOARDS
from edge_agent.sim.plots import GREYS, OURS_COLOUR, picture
from edge_agent.sim.traffic import Cell, flows, total

SIZES = (8, 10, 12, 14, 15, 17, 20, 25, 30, 40, 50, 70, 100, 150, 200, 300, 500, 700, MAX_BOARDS)
"""Boards of a cell. Up to 14 of them all hear each quote and epoch, from 15 on the neighbours alone."""
ONE_BROKER_HZ = 57_000
"""What one core of Mosquitto sends (docs/cluster.md, as measured)."""


def sent(path: Path, boards: int, at_work: Cell) -> None:
    """Messages a second that go out for ``boards``, in cells of ``SIZES``, with as large a part of sources as ``at_work`` has."""
    sizes = [size for size in SIZES if size <= boards]
    share = at_work.sources / at_work.boards
    lines: tuple[tuple[str, str, Callable[[int], Cell]], ...] = (
        ("at work", OURS_COLOUR, lambda size: replace(at_work, boards=size, sources=round(size * share))),
        ("at rest", GREYS[1], lambda size: Cell(size)),
    )
    with picture(path, note=f"computed for {boards:,} boards, by sly fleet traffic") as axes:
        for name, colour, cell in lines:
            out_hz = [total(flows(cell(size)), -(-boards // size)).out_hz for size in sizes]
            axes.plot(sizes, out_hz, color=colour, marker="o", markersize=3, linewidth=2, label=name)
        axes.axhline(ONE_BROKER_HZ, color="#94a3b8", linestyle="--", linewidth=0.9, label="one Mosquitto, full")
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [size for size in (10, 20, 50, 100, 200, 500, 1_000) if size <= boards]
        axes.set_xticks(ticks, [str(size) for size in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("boards a cell")
        axes.set_ylabel("messages a second out of the broker")
        axes.legend(loc="upper left")
