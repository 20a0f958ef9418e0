"""The placement benchmark: what its figures mean, and a tiny run of all of it that makes the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.sim.results import metrics
from tests.bench import placement
from tests.bench.placement_cases import ALIKE, OURS, UNLIKE, Case, Row, row_of, run_of, scenario_of
from tests.bench.placement_goals import Contest, Spread, Sweep
from tests.bench.placement_page import Findings, page
from tests.bench.placement_windows import compared, drawn, names
from tests.needs import needs_module


def row(load: int, attainment: float, placer: str = OURS, seed: int = 0, mj: float = 1000.0, **others: object) -> Row:
    """A made-up row: the offered load is ``load`` thousandths of a request a second."""
    case = Case(UNLIKE, "azure", placer, load, seed, **others)  # type: ignore[arg-type]
    offered = load / 1000
    return Row(
        case, 1000, offered, offered * attainment, attainment, attainment, offered * attainment, 0.0, 10.0, 20.0, 30.0, 0.01, mj,
        mj * 2, 0, (), "", 0.0,
    )  # fmt: skip


def rows_of(*rows: Row) -> Mapping[Case, Row]:
    return {each.case: each for each in rows}


def contest(*rows: Row) -> Contest:
    return Contest.of(rows_of(*rows), UNLIKE, "azure")


FALLING = ((1000, 1.0), (2000, 0.995), (4000, 0.955), (8000, 0.5))


def test_a_load_is_sustained_up_to_where_attainment_crosses_the_share() -> None:
    sweep = Sweep.of(row(load, attainment) for load, attainment in FALLING)
    assert sweep.sustained_per_s(0.99) == pytest.approx(2.0 + 2.0 * 0.005 / 0.04)
    assert sweep.sustained_per_s(0.5) == 8.0 and sweep.holds_to_the_end(0.5) and not sweep.holds_to_the_end(0.99)


def test_a_load_above_one_that_was_missed_is_not_sustained() -> None:
    sweep = Sweep.of([row(1000, 1.0), row(2000, 0.9), row(3000, 1.0)])
    assert sweep.sustained_per_s(0.99) < 2.0
    assert Sweep.of([row(1000, 0.98), row(2000, 1.0)]).sustained_per_s(0.99) == 0.0


def test_figures_between_two_loads_lie_on_the_line_and_beyond_the_sweep_on_its_end() -> None:
    sweep = Sweep.of([row(1000, 1.0, mj=100.0), row(3000, 1.0, mj=300.0)])
    assert [sweep.at(x, lambda r: r.mj) for x in (0.5, 1.0, 2.0, 3.0, 9.0)] == [100.0, 100.0, 200.0, 300.0, 300.0]


def test_the_load_ratio_is_of_sustained_loads_seed_by_seed() -> None:
    rows = [row(load, 1.0, OURS, seed) for load in (1000, 2000, 4000) for seed in (0, 1)]
    rows += [row(1000, 1.0, "jsq2", seed) for seed in (0, 1)]
    rows += [row(2000, 0.98, "jsq2", 0), row(2000, 0.99, "jsq2", 1), row(4000, 0.5, "jsq2", 0), row(4000, 0.5, "jsq2", 1)]
    ratio = contest(*rows).load_ratio(OURS, "jsq2", 0.99)
    assert ratio and ratio.high == pytest.approx(4 / 1.5) and ratio.low == pytest.approx(4 / 2)


def test_there_is_no_ratio_to_a_placer_that_sustains_nothing() -> None:
    never = contest(row(1000, 1.0), row(1000, 0.5, "random"))
    assert never.load_ratio(OURS, "random", 0.99) is None and never.goodput_beyond(OURS, "random", 0.99) is None
    assert never.energy_saved(OURS, "random", 0.99, with_idle=True) is None


def test_goodput_beyond_and_beside_are_read_at_the_same_load() -> None:
    rows = [row(1000, 1.0), row(1300, 1.0), row(1000, 0.99, "jsq2"), row(1300, 0.65, "jsq2")]
    both = contest(*rows)
    beyond, beside = both.goodput_beyond(OURS, "jsq2", 0.99), both.goodput_beside(OURS, "jsq2", 0.99)
    assert beyond and beyond.mean == pytest.approx(1.3 / 0.99)
    assert beside and beside.mean == pytest.approx(1.0 / 0.65)


def test_energy_is_compared_where_both_sustain_the_load() -> None:
    ours = [row(1000, 1.0, mj=600.0), row(2000, 1.0, mj=9000.0)]
    theirs = [row(1000, 0.99, "jsq2", mj=1000.0), row(2000, 0.5, "jsq2", mj=1.0)]
    saved = contest(*ours, *theirs).energy_saved(OURS, "jsq2", 0.99, with_idle=False)
    assert saved and saved.mean == pytest.approx(0.4)


def test_the_best_baseline_is_the_one_that_sustains_most() -> None:
    loads, most = (1000, 2000, 3000), {"a": 1000, "b": 2000}
    rows = [row(load, 1.0 if load <= most[name] else 0.5, name) for name in most for load in loads]
    assert contest(*rows).best(["a", "b"], 0.99) == "b"


def test_only_what_ran_at_every_load_is_compared() -> None:
    rows = [row(1000, 1.0), row(2000, 1.0), row(1000, 1.0, "jsq2"), row(2000, 0.5, "jsq2"), row(2000, 1.0, "frozen")]
    assert contest(*rows).swept([OURS, "jsq2", "frozen", "random"]) == [OURS, "jsq2"]


def test_a_spread_shows_its_ends_when_they_differ() -> None:
    assert (Spread.of([1.0, 1.0]).text(), Spread.of([1.0, 2.0]).text()) == ("1.00", "1.50 (1.00 to 2.00)")
    with pytest.raises(ValueError, match="no figure"):
        Spread.of([])


def test_a_missed_goal_says_so_on_the_page() -> None:
    rows = [row(load, share, OURS, seed, 990.0) for load, share in ((1000, 1.0), (2000, 0.9)) for seed in (0, 1)]
    rows += [row(load, share, name, seed, plain_queue=plain) for load, share in ((1000, 1.0), (2000, 0.8)) for seed in (0, 1)
             for name in ("random", "jsq2") for plain in (True, False)]  # fmt: skip
    text = page(Findings("make bench-placement", {}, "made up", 1.0, rows_of(*rows)), "placement")
    assert "*missed*" in text and "simulated plant" in text
    met = [replace(each, attainment_steady=1.0, mj=500.0) if each.case.placer == OURS else each for each in rows]
    better = page(Findings("make bench-placement", {}, "made up", 1.0, rows_of(*met)), "placement")
    assert "**50 % (50 to 50)**" in better and "**1.9" in better


def test_a_plain_queue_changes_the_queue_and_nothing_else() -> None:
    case = Case(UNLIKE, "azure", "jsq2", 1000)
    ours, plain = scenario_of(case, None), scenario_of(replace(case, plain_queue=True), None)
    assert (plain.queue.order, plain.queue.shed_late) == ("fifo", False)
    assert replace(plain, queue=ours.queue) == ours


def test_the_fleet_of_the_null_case_is_of_one_kind() -> None:
    assert len({board.profile for board in scenario_of(Case(ALIKE, "azure", OURS, 1000), None).boards}) == 1
    assert len({board.profile for board in scenario_of(Case(UNLIKE, "azure", OURS, 1000), None).boards}) > 2


def test_every_placer_meets_the_same_requests() -> None:
    met = []
    for placer in (OURS, "random"):
        run = run_of(Case(UNLIKE, "mixed", placer, 4_000, seconds=2), None)
        met.append(sorted((each.request_id, each.ingress, each.arrived_us, each.wanted) for each in run.served))
    assert met[0] == met[1] and met[0]


def test_equal_cases_give_equal_rows() -> None:
    case = Case(UNLIKE, "azure", OURS, 4_000, seconds=2)
    first, second = (replace(row_of(case, None), wall_s=0.0) for _ in range(2))
    assert first == second and first.requests == metrics(run_of(case, None)).requests


def test_no_placer_beats_the_optimum_of_a_window() -> None:
    needs_module("ortools", "bench")
    for window in compared(2, 5, 1.0, lambda _: None):
        assert set(window.made) == set(names())
        assert all(0 <= made.gap(window.best) <= 1 for made in window.made.values())


def test_a_window_is_the_same_every_time_and_has_talk_of_the_length_that_is_told() -> None:
    assert drawn(3, 6) == drawn(3, 6) != drawn(4, 6)
    assert all(arrival.request.answer_tokens & (arrival.request.answer_tokens - 1) == 0 for arrival in drawn(3, 6).arrivals)


def test_a_run_makes_the_page_and_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_module("ortools", "bench")
    needs_module("matplotlib", "bench")
    tiny = replace(placement.QUICK, loads={"azure": (4_000,)}, close_loads=(4_000,), baselines=("jsq2",), seconds=1, windows=1)
    monkeypatch.setattr(placement, "QUICK", replace(tiny, energy_worths=(0,)))
    monkeypatch.setattr("sys.argv", ["placement", "--quick", "--processes", "1", "--output", str(tmp_path / "placement")])
    assert placement.main() == 0
    text = (tmp_path / "placement.md").read_text()
    assert "simulated plant" in text and "--quick" in text
    assert {"jsq2, FIFO", "jsq2", "table", "without-table"} <= set(re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE))
    pictures = re.findall(r"\]\((placement/[^)]+)\)", text)
    assert len(pictures) == 6 and all((tmp_path / each).stat().st_size > 1000 for each in pictures)
