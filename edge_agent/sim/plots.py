"""Pictures of simulated runs, as SVG (or PNG, by the file's ending).

Rules: a picture shows only what its runs hold; every one says "simulated plant"; equal runs give equal bytes (no date, fixed
ids); matplotlib (extra ``[bench]``) is imported when a picture is drawn.  Times of a run are in seconds since its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from board_support.profile import load_profile
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import Status
from edge_agent.sim.results import PLANT, Run, Sample, Served

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "table"
OURS_COLOUR = "#c2410c"
GREYS = ("#0f172a", "#1d4ed8", "#0f766e", "#7e22ce", "#64748b", "#a16207", "#be185d", "#4d7c0f")
"""Of what stands beside ours, in the order given."""
LATE_COLOUR = "#dc2626"
MAX_BARS = 900
"""Of one Gantt chart: it is drawn as far as they reach."""
MAX_LANES = 6
"""Of one board of a Gantt chart; what runs beside so many is drawn over the last."""
FINEST = 900
"""A bar is at least this part of its picture wide."""
MAX_POINTS = 400
"""Of one curve."""
STYLE: Mapping[Any, Any] = {
    "svg.hashsalt": "sly",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """What one placer reaches: ``points`` of (x, y), by x."""

    name: str
    points: tuple[tuple[float, float], ...]


@contextmanager
def picture(path: Path, width_in: float = 9.0, height_in: float = 3.8, *, note: str = PLANT) -> Iterator[Axes]:
    """Axes to draw on, written to ``path`` at the end. Raises ``UnavailableError`` without matplotlib or a place to write."""
    try:
        import matplotlib
    except ImportError as error:
        raise UnavailableError("the picture", "matplotlib is not installed", "pip install 'slyos-edge[bench]'") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.add_subplot()
        figure.supxlabel(note, fontsize=8, color="#64748b", x=0.995, ha="right")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
        except OSError as error:
            raise UnavailableError(f"picture {path}", error.strerror or str(error), "choose another --output") from error


def gantt(run: Run, path: Path, from_s: float = 0.0, until_s: float | None = None) -> None:
    """Who ran what when: a strip a board, a bar a request from its beginning to its end there, those over their limits in red."""
    ran = _shown(run, from_s, until_s)
    boards = sorted({each.board for each in run.samples} | {each.board for each in ran})
    tasks = sorted({task_of(each) for each in ran})
    ends_s = max((each.ended_us / 1e6 for each in ran), default=from_s + 1)
    with picture(path, height_in=0.8 + 0.5 * max(1, len(boards))) as axes:
        for row, board in enumerate(boards):
            _strip(axes, row, [each for each in ran if each.board == board], tasks, (ends_s - from_s) / FINEST)
        axes.set_xlim(from_s, ends_s)
        axes.set_yticks(range(len(boards)), boards)
        axes.set_ylim(len(boards) - 0.4, -0.6)
        axes.set_xlabel("s")
        axes.grid(axis="y", visible=False)
        colours = {**{task: GREYS[1 + n % (len(GREYS) - 1)] for n, task in enumerate(tasks)}, "over its limits": LATE_COLOUR}
        handles = [axes.barh(0, 0, color=colour, label=name) for name, colour in colours.items()]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderaxespad=0.2)


def _shown(run: Run, from_s: float, until_s: float | None) -> list[Served]:
    until_us = 1e6 * until_s if until_s is not None else float("inf")
    ran = [each for each in run.served if each.ended_us and from_s * 1e6 <= each.began_us < until_us]
    return sorted(ran, key=lambda each: (each.began_us, each.request_id))[:MAX_BARS]


def _strip(axes: Axes, row: int, ran: Sequence[Served], tasks: Sequence[str], least_s: float) -> None:
    """The bars of one board, those at the same time under each other, each at least ``least_s`` wide."""
    lanes = list(in_lanes(ran))
    depth = max((lane for _, lane in lanes), default=0) + 1
    height = 0.8 / depth
    for colour in (*GREYS, LATE_COLOUR):
        for lane in range(depth):
            bars = [
                (each.began_us / 1e6, max(least_s, (each.ended_us - each.began_us) / 1e6))
                for each, at in lanes
                if at == lane and _bar_colour(each, tasks) == colour
            ]
            axes.broken_barh(bars, (row - 0.4 + lane * height, height * 0.92), facecolors=colour, linewidth=0)


def _bar_colour(each: Served, tasks: Sequence[str]) -> str:
    return GREYS[1 + tasks.index(task_of(each)) % (len(GREYS) - 1)] if each.within_limits else LATE_COLOUR


def in_lanes(ran: Iterable[Served]) -> Iterator[tuple[Served, int]]:
    """Each with the first lane that is free when it begins; ``ran`` by beginning."""
    free_us: list[int] = []
    for each in ran:
        lane = next((n for n, at in enumerate(free_us) if at <= each.began_us), len(free_us))
        lane = min(lane, MAX_LANES - 1)
        free_us[lane : lane + 1] = [each.ended_us]
        yield each, lane


def temperatures(run: Run, path: Path) -> None:
    """Each board's temperature over time, its kind's first trip point dashed."""
    profiles = {each.board: each.profile for each in run.boards}
    kinds = sorted(set(profiles.values()))
    with picture(path) as axes:
        hottest = max((sample.temperature_mdegc for sample in run.samples), default=0)
        for number, kind in enumerate(kinds):
            boards = sorted(board for board, profile in profiles.items() if profile == kind)
            for nth, board in enumerate(boards):
                xs, ys = _curve(run.samples, board)
                label = f"{kind} ({', '.join(boards)})" if not nth else None
                axes.plot(
                    xs, ys, color=GREYS[number % len(GREYS)], linewidth=1.3, alpha=1 - 0.45 * nth / len(boards), label=label
                )
            for trip in load_profile(kind).trips[:1]:
                hottest = max(hottest, trip.at_mdegc)
                axes.axhline(trip.at_mdegc / 1000, color=GREYS[number % len(GREYS)], linestyle=(number, (4, 4)), linewidth=0.9)
        axes.text(0.005, hottest / 1000, "first trip points", fontsize=8, va="bottom", transform=axes.get_yaxis_transform())
        _incidents(axes, run)
        axes.set_xlabel("s")
        axes.set_ylabel("°C")
        _legend(axes)


def _curve(samples: Sequence[Sample], board: str) -> tuple[list[float], list[float]]:
    mine = [sample for sample in samples if sample.board == board]
    thinned = mine[:: -(-len(mine) // MAX_POINTS) or 1]
    return [sample.at_us / 1e6 for sample in thinned], [sample.temperature_mdegc / 1000 for sample in thinned]


def _incidents(axes: Axes, run: Run) -> None:
    """What happened after requests began to come."""
    for at_us, text in run.incidents:
        if at_us <= 0:
            continue
        axes.axvline(at_us / 1e6, color="#94a3b8", linewidth=0.8)
        axes.text(at_us / 1e6, 0.01, f" {text}", fontsize=7, rotation=90, va="bottom", transform=axes.get_xaxis_transform())


def latency_cdf(runs: Mapping[str, Run], path: Path) -> None:
    """The share of all requests that were answered within a time, by placer: what was shed or failed never is."""
    with picture(path) as axes:
        for name, colour, width in styles(runs):
            run = runs[name]
            latencies = sorted(each.latency_us / 1e6 for each in run.served if each.status is Status.OK)
            requests = max(1, len(run.served) + len(run.pending))
            ranks = sorted({len(latencies) * (n + 1) // MAX_POINTS for n in range(MAX_POINTS)} - {0})
            xs, ys = [latencies[rank - 1] for rank in ranks], [rank / requests for rank in ranks]
            axes.plot(xs, ys, color=colour, linewidth=width, zorder=width, label=name)
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.set_xlabel("latency, s")
        axes.set_ylabel("share of requests")
        _legend(axes)


def curves(drawn: Sequence[Curve], path: Path, x: str, y: str, *, goal_y: float | None = None) -> None:
    """One line a placer, ours thick; ``goal_y`` a dashed line."""
    by_name = {curve.name: curve for curve in drawn}
    with picture(path) as axes:
        for name, colour, width in styles(by_name):
            xs, ys = zip(*by_name[name].points, strict=True)
            axes.plot(xs, ys, color=colour, linewidth=width, marker="o", markersize=3, zorder=width, label=name)
        if goal_y is not None:
            axes.axhline(goal_y, color="#94a3b8", linestyle="--", linewidth=0.9)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _legend(axes)


def pareto(front: Sequence[tuple[float, float, str]], others: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Latency (s) against energy (J a request): ours for each worth of energy, joined, with its label; others as points."""
    with picture(path, height_in=4.2) as axes:
        ordered = sorted(front)
        axes.plot([p[0] for p in ordered], [p[1] for p in ordered], color=OURS_COLOUR, marker="o", linewidth=2, label=OURS)
        for x, y, label in ordered:
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, color=OURS_COLOUR)
        for name, colour, _ in styles(others):
            axes.plot(*others[name], color=colour, marker="s", linestyle="", label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("latency, s (mean of answers)")
        axes.set_ylabel("dynamic J a request within its limits")
        _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)


def styles(names: Iterable[str]) -> list[tuple[str, str, float]]:
    """(name, colour, line width) of each, ours first."""
    others = [name for name in names if name != OURS]
    drawn = [(name, GREYS[number % len(GREYS)], 1.2) for number, name in enumerate(others)]
    return [(OURS, OURS_COLOUR, 2.6), *drawn] if OURS in names else drawn


def task_of(each: Served) -> str:
    return each.wanted.task.replace("_", " ")
