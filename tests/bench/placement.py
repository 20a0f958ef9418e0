"""``python -m tests.bench.placement [--traces FOLDER] [--quick] [--output FOLDER]``: placers side by side on simulated fleets.

Owns which cases are run and the pictures; writes ``FOLDER.md`` (docs/placement.md) and its pictures into ``FOLDER``.  Rules: the
traces are read where they lie, ``../shared/traces`` beside the checkout if nothing is said, and never copied; without them
requests are drawn by their summary statistics; the same commit and traces give the same page but for its wall-clock figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.core.errors import SlyError
from edge_agent.sim.baselines import ABLATIONS, BASELINES
from edge_agent.sim.flow_plot import flow
from edge_agent.sim.plots import Curve, curves, gantt, latency_cdf, pareto, temperatures
from tests.bench.__main__ import machine
from tests.bench.figures import progress
from tests.bench.placement_cases import ALIKE, OURS, UNLIKE, Case, rows_of, run_of
from tests.bench.placement_goals import SHARES
from tests.bench.placement_page import SIMPLE, Findings, WindowFigures, page, telling_load
from tests.bench.placement_windows import Compared, compared, decision_times_us, names

ROOT = Path(__file__).resolve().parents[2]
TRACES = ROOT.parent / "shared" / "traces"
OUTPUT = ROOT / "docs" / "placement"
PROCESSES = min(2, os.cpu_count() or 1)
LOST = "orin-1"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run. ``loads``: permille of one request a second, by workload."""

    loads: Mapping[str, Sequence[int]]
    baselines: Sequence[str]
    ablations: Sequence[str]
    seeds: Sequence[int]
    seconds: int
    energy_worths: Sequence[int]
    windows: int
    window_requests: int
    window_limit_s: float


FULL = Plan(
    loads={
        "azure": (4_000, 5_500, 7_500, 10_000, 13_500, 18_000),
        "mooncake": (4_000, 6_000, 9_000, 13_500),
        "mixed": (4_000, 6_000, 9_000, 13_500),
    },
    baselines=tuple(BASELINES), ablations=tuple(ABLATIONS), seeds=(0, 1, 2), seconds=60,
    energy_worths=(0, 50, 200, 1_000, 5_000, 20_000), windows=40, window_requests=14, window_limit_s=4.0,
)  # fmt: skip
QUICK = replace(
    FULL, loads={"azure": (4_000, 16_000)}, baselines=("random", "jsq2"), ablations=("without-table",), seeds=(0,), seconds=20,
    energy_worths=(0, 1_000), windows=2, window_requests=5, window_limit_s=1.0,
)  # fmt: skip


def cases_of(plan: Plan) -> Iterator[Case]:
    """Everything that is simulated."""
    for workload, loads in plan.loads.items():
        for load in loads:
            for seed in plan.seeds:
                yield from _beside(plan, UNLIKE, workload, load, seed)
    first, loads = next(iter(plan.loads.items()))
    for seed in plan.seeds:
        for load in loads:
            for name in plan.ablations:
                yield Case(UNLIKE, first, name, load, seed, seconds=plan.seconds)
            yield Case(UNLIKE, first, OURS, load, seed, plain_queue=True, seconds=plan.seconds)
        for load in loads[::2]:
            yield from _beside(plan, ALIKE, first, load, seed)
        for name in (OURS, *(set(plan.ablations) & {"frozen"})):
            yield Case(UNLIKE, first, name, loads[len(loads) // 2], seed, lost=LOST, seconds=plan.seconds)
    for worth in plan.energy_worths:
        yield _worth(plan, worth)


def _beside(plan: Plan, fleet: str, workload: str, load: int, seed: int) -> Iterator[Case]:
    yield Case(fleet, workload, OURS, load, seed, seconds=plan.seconds)
    for name in plan.baselines:
        for plain in (False, True):
            yield Case(fleet, workload, name, load, seed, plain_queue=plain, seconds=plan.seconds)


def _worth(plan: Plan, energy_us_per_mj: int) -> Case:
    workload, loads = next(iter(plan.loads.items()))
    return Case(UNLIKE, workload, OURS, loads[len(loads) // 2], energy_us_per_mj=energy_us_per_mj, seconds=plan.seconds)


def measured(plan: Plan, traces: Path | None, command: str, processes: int = PROCESSES) -> Findings:
    """Run a plan."""
    began = time.perf_counter()
    rows = rows_of(cases_of(plan), traces, processes, progress)
    windows = compared(plan.windows, plan.window_requests, plan.window_limit_s, progress)
    decision_us = decision_times_us()
    seconds = time.perf_counter() - began
    source = "the traces of Azure (2023, conversation) and Mooncake (FAST'25)" if traces else "drawn by the traces' statistics"
    return Findings(
        command, machine(), source, seconds, rows, tuple(_figures(windows)), sum(each.best.proven for each in windows),
        plan.window_requests, decision_us, tuple((worth, rows[_worth(plan, worth)]) for worth in plan.energy_worths),
    )  # fmt: skip


def _figures(windows: Sequence[Compared]) -> Iterator[WindowFigures]:
    for name in names():
        made = [(each.made[name], each.best) for each in windows]
        alike = [(mine.energy_uj, best.energy_uj) for mine, best in made if mine.within == best.within and best.energy_uj]
        yield WindowFigures(name, tuple(m.gap(best) for m, best in made), tuple(mine / best for mine, best in alike))


def drawn(found: Findings, plan: Plan, traces: Path | None, folder: Path) -> dict[str, str]:
    """Draw every picture into ``folder``: the title of each by its file's name."""
    titles = {}
    for workload in found.workloads:
        name = f"goodput-{workload}.svg"
        curves(_goodput(found, workload), folder / name, "offered load, requests/s", "goodput, requests/s")
        titles[name] = f"Goodput against offered load, {workload}: ours and each baseline with a FIFO queue."
    workload = found.workloads[0]
    load = telling_load(found.contest(UNLIKE, workload))
    ours = Case(UNLIKE, workload, OURS, load, plan.seeds[0], seconds=plan.seconds)
    runs = {OURS: run_of(ours, traces)}
    for name in plan.baselines:
        runs[name] = run_of(replace(ours, placer=name, plain_queue=True), traces)
    latency_cdf(runs, folder / "latency.svg")
    titles["latency.svg"] = (
        f"Latency of all requests at one load ({workload}, baselines with a FIFO queue): what is shed is never answered."
    )
    others = [
        row
        for row in found.rows.values()
        if row.case in {replace(_worth(plan, 0), placer=n, energy_us_per_mj=None, plain_queue=True) for n in plan.baselines}
    ]
    pareto(
        [(row.mean_s, row.mj / 1000, str(worth)) for worth, row in found.front],
        {row.case.placer: (row.mean_s, row.mj / 1000) for row in others},
        folder / "pareto.svg",
    )
    titles["pareto.svg"] = "Latency against energy: ours by the worth of a millijoule in µs, baselines with a FIFO queue."
    flow(runs[OURS], folder / "flow.svg")
    titles["flow.svg"] = "The scheduling flow of one run of ours; widths are counts of requests."
    gantt(runs[OURS], folder / "gantt.svg", plan.seconds / 3, plan.seconds / 2)
    titles["gantt.svg"] = "Requests on boards, a part of that run."
    temperatures(runs[OURS], folder / "heat.svg")
    titles["heat.svg"] = "Temperatures in that run."
    return titles


def _goodput(found: Findings, workload: str) -> Iterator[Curve]:
    contest = found.contest(UNLIKE, workload)
    for name in (OURS, *(f"{name}, FIFO" for name in BASELINES)):
        if name in contest.sweeps:
            columns = zip(*(sweep.rows for sweep in contest.sweeps[name].values()), strict=True)
            points = [
                [sum(getattr(row, axis) for row in at) / len(at) for axis in ("offered_per_s", "goodput_per_s")] for at in columns
            ]
            yield Curve(name, tuple((x, y) for x, y in points))


def summary(found: Findings) -> str:
    """A few lines for the terminal."""
    lines = []
    for workload in found.workloads:
        contest = found.contest(UNLIKE, workload)
        for suffix in (", FIFO", ""):
            rivals = [f"{name}{suffix}" for name in SIMPLE if f"{name}{suffix}" in contest.sweeps]
            best = contest.best(rivals, SHARES[0])
            ratio = contest.load_ratio(OURS, best, SHARES[0])
            saved = contest.energy_saved(OURS, best, SHARES[0], with_idle=False)
            lines.append(
                f"{workload}: best simple baseline {best} sustains {contest.sustained(best, SHARES[0]).text()} requests/s, ours "
                f"{contest.sustained(OURS, SHARES[0]).text()}: {ratio.text() if ratio else '–'}x the load, "
                f"{saved.text() if saved else '–'} of its dynamic energy a request saved"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.placement", description="Placers side by side on simulated fleets."
    )
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help=f"the public traces (default: {TRACES} if it is there)")
    parser.add_argument("--quick", action="store_true", help="a tiny part of it, to see that it works")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="pictures go there, the page to FOLDER.md")
    parser.add_argument("--processes", type=int, default=PROCESSES, metavar="N", help=f"runs at a time (default: {PROCESSES})")
    arguments = parser.parse_args()
    traces = arguments.traces or (TRACES if TRACES.is_dir() else None)
    plan = QUICK if arguments.quick else FULL
    command = "python -m tests.bench.placement --quick" if arguments.quick else "make bench-placement"
    try:
        found = measured(plan, traces, command, arguments.processes)
        found = replace(found, pictures=drawn(found, plan, traces, arguments.output))
    except SlyError as error:
        print(f"bench: placement: {error}", file=sys.stderr)
        return 2
    progress("")
    arguments.output.with_suffix(".md").write_text(page(found, arguments.output.name))
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
