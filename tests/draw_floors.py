"""Draws ``docs/architecture.svg`` from the imports that the code really has: ``python -m tests.draw_floors``.

Rooms stand on the floors of the import contract in ``setup.cfg``; the area of a room grows with its lines, and a line between
two rooms is as strong as the number of imports behind it.
"""

from __future__ import annotations

import configparser
from collections import Counter
from itertools import chain
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGES = ("edge_agent", "board_support", "models")
WIDTH, FLOOR, ROOM_HEIGHT, TOP = 1180, 96, 46, 24
STYLE = 'font-family="sans-serif" text-anchor="middle"'


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest first, as the contract names them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = config["importlinter:contract:floors"]["layers"].split("\n")
    return [[room.strip() for room in layer.split("|")] for layer in layers if layer.strip()]


def lines_of(room: str) -> int:
    path = ROOT.joinpath(*room.split("."))
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return sum(len(file.read_text("utf-8").splitlines()) for file in files)


def imports_between(rooms: list[str]) -> Counter[tuple[str, str]]:
    """How many imports lead from a module of one room into a module of another."""
    graph = grimp.build_graph(*PACKAGES)
    found: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = (_room_of(module, rooms), _room_of(imported, rooms))
            if all(pair) and pair[0] != pair[1]:
                found[pair] += 1
    return found


def _room_of(module: str, rooms: list[str]) -> str:
    return next((room for room in rooms if module == room or module.startswith(room + ".")), "")


def drawing() -> str:
    """The picture as SVG text, the same for the same code."""
    stacked = floors()
    places = {
        room: (WIDTH * (2 * i + 1) / (2 * len(rooms)), TOP + level * FLOOR)
        for level, rooms in enumerate(stacked)
        for i, room in enumerate(rooms)
    }
    height = TOP + FLOOR * len(stacked)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for (source, target), count in sorted(imports_between(list(chain(*stacked))).items()):
        (x1, y1), (x2, y2) = places[source], places[target]
        parts.append(
            f'<line x1="{x1:.0f}" y1="{y1 + ROOM_HEIGHT:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="#5f6368" '
            f'stroke-opacity="{min(0.7, 0.12 + 0.04 * count):.2f}" stroke-width="{min(5, 0.6 + 0.25 * count):.2f}"/>'
        )
    for room, (x, y) in places.items():
        parts += _box(room, x, y)
    return "\n".join([*parts, "</svg>", ""])


def _box(room: str, x: float, y: float) -> list[str]:
    width = min(150, WIDTH / 8)
    frame = f'x="{x - width / 2:.0f}" y="{y}" width="{width:.0f}" height="{ROOM_HEIGHT}" rx="6"'
    return [
        f'<rect {frame} fill="#e8f0fe" stroke="#1a73e8"/>',
        f'<text x="{x:.0f}" y="{y + 20}" {STYLE} font-size="14">{escape(room.removeprefix("edge_agent."))}</text>',
        f'<text x="{x:.0f}" y="{y + 37}" {STYLE} font-size="11" fill="#5f6368">{lines_of(room)} lines</text>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(drawing(), "utf-8")
    print(PICTURE)
