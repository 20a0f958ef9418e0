"""Pictures of runs: they hold what the run holds, and equal runs give equal bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.core.errors import UnavailableError
from edge_agent.sim import flow_plot, plots
from edge_agent.sim.results import Run
from tests.drawn_runs import drawn_run
from tests.needs import needs_module

RUN = drawn_run()
OTHERS = {"random": drawn_run(1, placer="random"), "table": RUN}
CURVES = [plots.Curve(name, ((1.0, 1.0), (2.0, 1.5))) for name in OTHERS]
FRONT = [(1.0, 9.0, "0"), (1.4, 7.0, "200")]

PICTURES: dict[str, Callable[[Path], None]] = {
    "gantt": lambda path: plots.gantt(RUN, path),
    "temperatures": lambda path: plots.temperatures(RUN, path),
    "latency": lambda path: plots.latency_cdf(OTHERS, path),
    "curves": lambda path: plots.curves(CURVES, path, "offered", "goodput", goal_y=1.2),
    "pareto": lambda path: plots.pareto(FRONT, {"random": (3.0, 9.0)}, path),
    "flow": lambda path: flow_plot.flow(RUN, path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_says_what_it_is_and_is_the_same_twice(name: str, tmp_path: Path) -> None:
    needs_module("matplotlib", "bench")
    for attempt in ("a.svg", "b.svg"):
        PICTURES[name](tmp_path / attempt)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert b"simulated plant" in drawn and drawn == (tmp_path / "b.svg").read_bytes()
    assert len(drawn) < 200_000, "small enough for a page"


def test_a_picture_is_a_png_when_its_name_says_so(tmp_path: Path) -> None:
    needs_module("matplotlib", "bench")
    plots.gantt(RUN, tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    needs_module("matplotlib", "bench")
    empty = dataclasses.replace(RUN, served=(), pending=(), samples=(), boards=(), incidents=())
    for draw in (plots.gantt, plots.temperatures, flow_plot.flow):
        draw(empty, tmp_path / f"{draw.__name__}.svg")
    plots.latency_cdf({"table": empty}, tmp_path / "cdf.svg")


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    needs_module("matplotlib", "bench")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="--output"):
        plots.gantt(RUN, tmp_path / "file" / "g.svg")


def test_the_flow_holds_every_request_once() -> None:
    ways = flow_plot.ways_of(RUN)
    assert sum(ways.values()) == len(RUN.served) + len(RUN.pending)
    outcomes = {name: sum(count for way, count in ways.items() if way[3] == name) for _, _, _, name in ways}
    assert outcomes["within its limits"] == sum(each.within_limits for each in RUN.served)
    assert sum(outcomes.values()) == sum(ways.values()) and outcomes["no answer yet"] == 1


def test_gathering_the_small_nodes_loses_no_request() -> None:
    many: Run = dataclasses.replace(
        RUN, served=tuple(dataclasses.replace(each, ingress=f"i{n % 40}") for n, each in enumerate(RUN.served))
    )
    ways = flow_plot.ways_of(many)
    gathered = flow_plot.gathered(ways)
    assert sum(gathered.values()) == sum(ways.values())
    assert all(len({way[column] for way in gathered}) <= most for column, most in enumerate(flow_plot.MAX_NODES))


def test_bars_of_one_lane_do_not_overlap() -> None:
    ran = sorted((each for each in RUN.served if each.ended_us and each.board == "b0"), key=lambda each: each.began_us)
    lanes = list(plots.in_lanes(ran))
    assert max(lane for _, lane in lanes) < plots.MAX_LANES - 1
    for lane in {lane for _, lane in lanes}:
        bars = [each for each, at in lanes if at == lane]
        assert all(a.ended_us <= b.began_us for a, b in zip(bars, bars[1:], strict=False))
