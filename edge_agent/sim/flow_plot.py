"""The scheduling flow of one run: ingress board -> request class -> (model, board) -> outcome, its widths counts of requests.

Rules: every request of the run is in it once, pending ones too; the smallest nodes of a column are gathered;
nothing is scaled but the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.core.values import Status
from edge_agent.core.wanted import Wanted, answer_tokens_of
from edge_agent.sim.plots import GREYS, picture
from edge_agent.sim.results import PLANT, Run, Served

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path as Outline

COLUMNS = ("came in at", "wants", "ran as", "outcome")
MAX_NODES = (16, 12, 14, 8)
"""Of each column; the smallest are gathered."""
NODE_WIDTH = 0.035
GAP = 0.012
"""Between the nodes of a column, as a share of the height."""
Way = tuple[str, str, str, str]


def flow(run: Run, path: Path) -> None:
    """Draw the flow of ``run``."""
    ways = gathered(ways_of(run))
    note = f"{sum(ways.values())} requests, placer {run.placer}, seed {run.seed}; {PLANT}"
    with picture(path, height_in=5.6, note=note) as axes:
        axes.set_axis_off()
        axes.set_xlim(-0.02, len(COLUMNS) - 1 + 0.42)
        axes.set_ylim(1.0, -0.06)
        _draw(axes, ways)


def ways_of(run: Run) -> Counter[Way]:
    """How many requests went each way through the columns."""
    ways = Counter((each.ingress, class_name(each.wanted), _option(each), outcome_name(each)) for each in run.served)
    if run.pending:
        ways["?", "?", "nowhere yet", "no answer yet"] = len(run.pending)
    return ways


def gathered(ways: Counter[Way]) -> Counter[Way]:
    """``ways`` with at most ``MAX_NODES`` names in each column."""
    for column, most in enumerate(MAX_NODES):
        sizes = _sizes(ways, column)
        if len(sizes) > most:
            kept = set(sorted(sizes, key=lambda name: (-sizes[name], name))[: most - 1])
            rest = f"{len(sizes) - len(kept)} others"
            merged = Counter[Way]()
            for way, count in ways.items():
                merged[_with(way, column, way[column] if way[column] in kept else rest)] += count
            ways = merged
    return ways


def class_name(wanted: Wanted) -> str:
    """What requests are told apart by here: task, how long the answer may be, floor of quality; not by the deadline."""
    kind = f"talk, {(answer_tokens_of(wanted.shape) + 1) // 2} tokens" if wanted.talks else wanted.task.replace("_", " ")
    return f"{kind}, ≥ {wanted.quality_permille} ‰" if wanted.quality_permille else kind


def outcome_name(each: Served) -> str:
    if each.within_limits:
        return "within its limits"
    if each.status is Status.OK:
        return "late" if each.latency_us > each.wanted.deadline_us else "over a limit"
    return each.status.value


def _option(each: Served) -> str:
    return f"{each.model} on {each.board}" if each.ended_us and each.model else "nowhere"


def _with(way: Way, column: int, name: str) -> Way:
    a, b, c, d = (name if n == column else part for n, part in enumerate(way))
    return a, b, c, d


def _sizes(ways: Counter[Way], column: int) -> Counter[str]:
    sizes = Counter[str]()
    for way, count in ways.items():
        sizes[way[column]] += count
    return sizes


def _draw(axes: Axes, ways: Counter[Way]) -> None:
    from matplotlib.patches import Rectangle

    classes = sorted(_sizes(ways, 1))
    scale = (1 - GAP * max(MAX_NODES)) / max(1, sum(ways.values()))
    columns = [_places(ways, column, scale) for column in range(len(COLUMNS))]
    for column, places in enumerate(columns):
        axes.text(column, -0.02, COLUMNS[column], fontsize=9, color="#64748b")
        for name, (top, height) in places.items():
            axes.add_patch(Rectangle((column, top), NODE_WIDTH, height, color="#334155", linewidth=0))
            share = round(height / scale)
            axes.text(column + NODE_WIDTH + 0.012, top + height / 2, f"{name}  {share}", fontsize=8, va="center")
    for left in range(len(COLUMNS) - 1):
        _ribbons(axes, ways, left, columns, scale, classes)


def _places(ways: Counter[Way], column: int, scale: float) -> dict[str, tuple[float, float]]:
    """The top and the height of each node, the outcomes by size, else by name."""
    sizes = _sizes(ways, column)
    names = sorted(sizes, key=lambda name: (-sizes[name], name)) if column == len(COLUMNS) - 1 else sorted(sizes)
    gap = (1 - sum(sizes.values()) * scale) / max(1, len(names))
    places, top = {}, 0.0
    for name in names:
        places[name] = (top, sizes[name] * scale)
        top += sizes[name] * scale + gap
    return places


def _ribbons(
    axes: Axes,
    ways: Counter[Way],
    left: int,
    columns: Sequence[dict[str, tuple[float, float]]],
    scale: float,
    classes: Sequence[str],
) -> None:
    """The ribbons between a column and the next, one a pair of nodes and a request class, in the order of the nodes."""
    from matplotlib.patches import PathPatch

    pairs = Counter[tuple[str, str, str]]()
    for way, count in ways.items():
        pairs[way[left], way[left + 1], way[1]] += count
    starts = {name: top for name, (top, _) in columns[left].items()}
    ends = {name: top for name, (top, _) in columns[left + 1].items()}
    for name, to, kind in sorted(pairs, key=lambda pair: (columns[left][pair[0]], columns[left + 1][pair[1]], pair[2])):
        height = pairs[name, to, kind] * scale
        colour = GREYS[1 + classes.index(kind) % (len(GREYS) - 1)]
        ribbon = _ribbon(left + NODE_WIDTH, starts[name], left + 1, ends[to], height)
        axes.add_patch(PathPatch(ribbon, facecolor=colour, alpha=0.38, linewidth=0))
        starts[name] += height
        ends[to] += height


def _ribbon(x0: float, y0: float, x1: float, y1: float, height: float) -> Outline:
    from matplotlib.path import Path as Outline

    middle = (x0 + x1) / 2
    there = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
    back = [(x1, y1 + height), (middle, y1 + height), (middle, y0 + height), (x0, y0 + height), (x0, y0)]
    codes = [Outline.MOVETO, *[Outline.CURVE4] * 3, Outline.LINETO, *[Outline.CURVE4] * 3, Outline.CLOSEPOLY]
    return Outline([*there, *back], codes)
