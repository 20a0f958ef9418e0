"""What the placement benchmark runs: fleets, workloads, placers and loads as values, and one run of each as a row of figures.

Rules: a case is a value, and equal cases give equal rows but for ``wall_s``; cases run in processes of their own and come back in
the order they were given; every placer meets the same requests at the same ingress boards.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from edge_agent.core.values import Status
from edge_agent.sim.baselines import Static
from edge_agent.sim.fleet import SimFleet, simulate
from edge_agent.sim.results import Run, metrics
from edge_agent.sim.scenario import ArrivalPlan, Fault, Scenario, load_scenario
from tests.bench.placement_static import STATIC

_Job = TypeVar("_Job")
_Done = TypeVar("_Done")

OURS = "table"
UNLIKE, ALIKE = "eight-boards", "eight-alike"
ALIKE_PROFILE = "orin_nano"

DURATION_S, WARMUP_S = 45, 10

Urgencies = Sequence[tuple[int, int, int]]
"""How requests are due: ms after they came, µs more a token of the answer that may come; and so many come in 1,000 s."""
ANY_MODEL: Urgencies = ((2_000, 30_000, 333), (10_000, 60_000, 200), (60_000, 200_000, 134))
BETTER_MODEL: Urgencies = ((4_000, 60_000, 167), (15_000, 100_000, 100), (60_000, 200_000, 66))
"""Somebody who waits, somebody who reads along, and work for later."""
ANY_ALIKE: Urgencies = ((2_000, 30_000, 667),)
BETTER_ALIKE: Urgencies = ((4_000, 60_000, 333),)
BETTER_QUALITY = 750


def _talk(kind: str, plain: Urgencies, better: Urgencies, prompt_permille: int, max_prompt_tokens: int) -> Iterator[ArrivalPlan]:
    """Talk at one request a second in all, two thirds of it content with any model, one third not."""
    plan = ArrivalPlan(kind, 1, prompt_permille=prompt_permille, answer_permille=250, max_prompt_tokens=max_prompt_tokens)
    for quality, urgencies in ((0, plain), (BETTER_QUALITY, better)):
        for deadline_ms, token_us, rate_mhz in urgencies:
            yield replace(
                plan, quality_permille=quality, rate_mhz=rate_mhz, deadline_ms=deadline_ms, deadline_token_us=token_us
            )  # fmt: skip


AZURE = tuple(_talk("azure", ANY_MODEL, BETTER_MODEL, 500, 1_024))
CAMERAS = (ArrivalPlan("camera", 400, task="detect_objects", period_ms=4_000),)
WORKLOADS: Mapping[str, tuple[ArrivalPlan, ...]] = {
    "azure": AZURE,
    "azure-alike": tuple(_talk("azure", ANY_ALIKE, BETTER_ALIKE, 500, 1_024)),
    "mooncake": tuple(_talk("mooncake", ANY_MODEL, BETTER_MODEL, 50, 2_000)),
    "mixed": (*AZURE, *CAMERAS),
}
"""Talk of three urgencies, or of one (``azure-alike``); cameras come on top."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run. ``plain_queue``: FIFO without shedding, how such systems are usually built,
    instead of the earliest deadline first with it. ``lost``: the board that dies half-way."""

    fleet: str
    workload: str
    placer: str
    load_permille: int
    seed: int = 0
    plain_queue: bool = False
    energy_us_per_mj: int | None = None
    lost: str = ""
    seconds: int = DURATION_S

    @property
    def name(self) -> str:
        """Of the placer with its queue, as it stands in tables."""
        return f"{self.placer}, FIFO" if self.plain_queue else self.placer


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one case; ``mj`` a request within its limits, dynamic; ``mj_all`` with the idle power of all boards."""

    case: Case
    requests: int
    offered_per_s: float
    goodput_per_s: float
    attainment: float
    attainment_steady: float
    goodput_late_per_s: float
    """Of the second half."""
    shed_rate: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_s: float
    mj: float
    mj_all: float
    migrations: int
    options: tuple[tuple[str, str, int], ...]
    """Board, model, OK answers."""
    trace_digest: str
    wall_s: float


def scenario_of(case: Case, traces: Path | None) -> Scenario:
    """The world of a case."""
    world = load_scenario(UNLIKE)
    if case.fleet == ALIKE:
        world = replace(world, boards=tuple(replace(board, profile=ALIKE_PROFILE) for board in world.boards))
    duration_us = case.seconds * 1_000_000
    world = replace(
        world, name=f"{case.fleet}/{case.workload}", arrivals=WORKLOADS[case.workload], traces=traces, duration_us=duration_us,
        warmup_us=min(WARMUP_S * 1_000_000, duration_us // 4), outages=(), faults=_faults(case),
    )  # fmt: skip
    if case.plain_queue:
        world = replace(world, queue=replace(world.queue, order="fifo", shed_late=False))
    if case.energy_us_per_mj is not None:
        world = replace(world, policy=replace(world.policy, energy_us_per_mj=case.energy_us_per_mj))
    return world.at_load(case.load_permille)


def _faults(case: Case) -> tuple[Fault, ...]:
    return (Fault("kill", (case.lost,), from_ms=case.seconds * 500),) if case.lost else ()


def run_of(case: Case, traces: Path | None) -> Run:
    """The run of a case; a placer named in ``STATIC`` plans in hindsight."""
    scenario = scenario_of(case, traces)
    if case.placer not in STATIC:
        return simulate(scenario, case.seed, case.placer)
    with SimFleet(scenario, case.seed) as fleet:
        fleet.choose, fleet.placer = Static(STATIC[case.placer](scenario, case.seed)), case.placer
        return fleet.run()


def row_of(case: Case, traces: Path | None) -> Row:
    """Run a case."""
    began = time.perf_counter()
    run = run_of(case, traces)
    wall_s = time.perf_counter() - began
    all_of_it = metrics(run, run.scenario.warmup_us)
    good = sum(each.within_limits for each in run.served)
    half_us = run.scenario.duration_us // 2
    late = sum(each.within_limits and each.arrived_us >= half_us for each in run.served)
    latencies = [each.latency_us for each in run.served if each.status is Status.OK]
    return Row(
        case=case, requests=all_of_it.requests, offered_per_s=all_of_it.offered_per_s, goodput_per_s=all_of_it.goodput_per_s,
        attainment=all_of_it.attainment, attainment_steady=all_of_it.attainment_steady,
        goodput_late_per_s=late * 2e6 / run.scenario.duration_us, shed_rate=all_of_it.shed_rate,
        p50_ms=all_of_it.p50_ms, p95_ms=all_of_it.p95_ms, p99_ms=all_of_it.p99_ms,
        mean_s=sum(latencies) / 1e6 / len(latencies) if latencies else 0.0,
        mj=all_of_it.mj_per_request, mj_all=run.energy_uj / 1000 / good if good else 0.0, migrations=all_of_it.migrations,
        options=tuple(sorted((board, model, count) for (board, model), count in all_of_it.by_option.items())),
        trace_digest=run.trace_digest, wall_s=wall_s,
    )  # fmt: skip


def rows_of(cases: Iterable[Case], traces: Path | None, processes: int, told: Callable[[str], None]) -> dict[Case, Row]:
    """Run every case once, ``processes`` at a time; ``told`` hears how far it is."""
    wanted = list(dict.fromkeys(cases))
    rows: dict[Case, Row] = {}
    for row in in_processes(_job, [(case, traces) for case in wanted], processes):
        rows[row.case] = row
        told(f"{len(rows)} of {len(wanted)} runs: {row.case.workload}, {row.case.name}")
    return rows


def in_processes(work: Callable[[_Job], _Done], jobs: Sequence[_Job], processes: int) -> Iterator[_Done]:
    """What comes of every job, in their order."""
    if processes < 2:
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(work, jobs)


def _job(job: tuple[Case, Path | None]) -> Row:
    return row_of(*job)
