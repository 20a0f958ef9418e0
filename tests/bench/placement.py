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
from itertools import product
from pathlib import Path

from edge_agent.core.errors import SlyError
from edge_agent.sim.baselines import ABLATIONS, BASELINES
from edge_agent.sim.flow_plot import flow
from edge_agent.sim.plots import Curve, curves, gantt, latency_cdf, pareto, temperatures
from edge_agent.sim.results import metrics
from tests.bench.__main__ import machine
from tests.bench.figures import progress
from tests.bench.placement_cases import ALIKE, OURS, UNLIKE, Case, rows_of, run_of
from tests.bench.placement_goals import SHARES
from tests.bench.placement_page import SIMPLE, Findings, WindowFigures, page, telling_load
from tests.bench.placement_static import STATIC
from tests.bench.placement_windows import Compared, compared, decision_times_us, names

ROOT = Path(__file__).resolve().parents[2]
TRACES = ROOT.parent / "shared" / "traces"
OUTPUT = ROOT / "docs" / "placement"
PROCESSES = min(2, os.cpu_count() or 1)
LOST = "orin-1"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run. ``loads``: permille of one request a second, by workload; the first one is looked at most closely.

    ``admitted``: the baselines that are swept with our queue, too, besides a FIFO queue; all are at ``close_loads``.
    """

    loads: Mapping[str, Sequence[int]]
    alike_loads: Sequence[int]
    close_loads: Sequence[int]
    """Of ablations and static plans."""
    baselines: Sequence[str]
    admitted: Sequence[str]
    ablations: Sequence[str]
    statics: Sequence[str]
    seeds: Sequence[int]
    other_seeds: Sequence[int]
    """Of the workloads besides the first."""
    seconds: int
    energy_worths: Sequence[int]
    windows: int
    window_requests: int
    window_limit_s: float

    @property
    def first(self) -> str:
        return next(iter(self.loads))


FULL = Plan(
    loads={
        "azure": (5_000, 8_000, 9_500, 11_500, 15_000),
        "azure-alike": (7_000, 10_000, 13_000),
        "mooncake": (7_000, 10_000, 14_000),
        "mixed": (7_000, 10_000, 13_000),
    },
    alike_loads=(6_000,), close_loads=(11_500,), baselines=tuple(BASELINES), admitted=("stale-greedy", "greedy-latency"),
    ablations=tuple(ABLATIONS), statics=tuple(STATIC), seeds=(0, 1, 2), other_seeds=(0, 1), seconds=45,
    energy_worths=(0, 100, 300, 700, 2_000, 10_000), windows=24, window_requests=24, window_limit_s=3.0,
)  # fmt: skip
QUICK = Plan(
    loads={"azure": (4_000, 16_000)}, alike_loads=(4_000,), close_loads=(16_000,), baselines=("random", "jsq2"), admitted=(),
    ablations=("without-table",), statics=("static-balanced",), seeds=(0,), other_seeds=(0,),
    seconds=20, energy_worths=(0, 1_000), windows=2,
    window_requests=5, window_limit_s=1.0,
)  # fmt: skip


def cases_of(plan: Plan) -> Iterator[Case]:
    """Everything that is simulated."""
    for workload, loads in plan.loads.items():
        for load, seed in product(loads, plan.seeds if workload == plan.first else plan.other_seeds):
            yield from _beside(plan, UNLIKE, workload, load, seed)
    for seed in plan.seeds:
        yield from _closely(plan, seed)
    for worth in plan.energy_worths:
        yield _worth(plan, worth)


def _beside(plan: Plan, fleet: str, workload: str, load: int, seed: int) -> Iterator[Case]:
    ours = Case(fleet, workload, OURS, load, seed, seconds=plan.seconds)
    yield ours
    for name in plan.baselines:
        yield replace(ours, placer=name, plain_queue=True)
        if name in plan.admitted:
            yield replace(ours, placer=name)


def _closely(plan: Plan, seed: int) -> Iterator[Case]:
    """The parts of ours, static plans, a board that is lost, and boards alike: on the first workload."""
    for load in plan.close_loads:
        ours = Case(UNLIKE, plan.first, OURS, load, seed, seconds=plan.seconds)
        yield from (ours, replace(ours, plain_queue=True))
        for name in (*plan.ablations, *plan.statics, *plan.baselines):
            yield replace(ours, placer=name)
    for load in plan.alike_loads:
        yield from _beside(plan, ALIKE, plan.first, load, seed)
        for name in plan.statics:
            yield Case(ALIKE, plan.first, name, load, seed, seconds=plan.seconds)
    for name in (OURS, "frozen"):
        yield Case(UNLIKE, plan.first, name, plan.close_loads[0], seed, lost=LOST, seconds=plan.seconds)


def _worth(plan: Plan, energy_us_per_mj: int) -> Case:
    return Case(UNLIKE, plan.first, OURS, plan.close_loads[0], energy_us_per_mj=energy_us_per_mj, seconds=plan.seconds)


def measured(plan: Plan, traces: Path | None, command: str, processes: int = PROCESSES) -> Findings:
    """Run a plan."""
    began = time.perf_counter()
    rows = rows_of(cases_of(plan), traces, processes, progress)
    windows = compared(plan.windows, plan.window_requests, plan.window_limit_s, progress, processes)
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
        curves(list(_goodput(found, workload)), folder / name, "offered load, requests/s", "goodput, requests/s")
        titles[name] = f"Goodput against offered load, {workload}: ours and each baseline with a FIFO queue."
    beside = {row.case.placer: (row.mean_s, row.mj / 1000) for row in map(found.rows.get, _beside_front(plan)) if row}
    pareto([(row.mean_s, row.mj / 1000, str(worth)) for worth, row in found.front], beside, folder / "pareto.svg")
    titles["pareto.svg"] = "Latency against energy: ours by the worth of a millijoule in µs, baselines with a FIFO queue."
    return titles | _of_one_run(plan, telling_load(found.contest(UNLIKE, plan.first)), traces, folder)


def _of_one_run(plan: Plan, load: int, traces: Path | None, folder: Path) -> dict[str, str]:
    """The pictures of the first workload at one load, ours and the baselines with a FIFO queue."""
    case = Case(UNLIKE, plan.first, OURS, load, plan.seeds[0], seconds=plan.seconds)
    ours = run_of(case, traces)
    others = {name: run_of(replace(case, placer=name, plain_queue=True), traces) for name in plan.baselines}
    latency_cdf({OURS: ours, **others}, folder / "latency.svg")
    flow(ours, folder / "flow.svg")
    gantt(ours, folder / "gantt.svg", plan.seconds / 3, plan.seconds / 2)
    temperatures(ours, folder / "heat.svg")
    at = f"{plan.first}, {metrics(ours).offered_per_s:.1f} requests a second"
    return {
        "latency.svg": f"Latency of all requests ({at}; baselines with a FIFO queue): what is shed is never answered.",
        "flow.svg": f"The scheduling flow of one run of ours ({at}); widths are counts of requests.",
        "gantt.svg": "Requests on boards, a part of that run.",
        "heat.svg": "Temperatures in that run.",
    }


def _beside_front(plan: Plan) -> list[Case]:
    """What stands beside the front in its picture."""
    ours = replace(_worth(plan, 0), energy_us_per_mj=None)
    return [replace(ours, placer=name, plain_queue=True) for name in plan.baselines]


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
            rivals = contest.swept(f"{name}{suffix}" for name in SIMPLE)
            if not rivals:
                continue
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
