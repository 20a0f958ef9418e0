"""What a simulated run gave, as frozen values, and the figures that are read from it.

Owns ``Run`` and ``metrics``.  Rules: integers in what was recorded, floats only in figures for people; what has no answer
at the end is ``pending``, never counted as answered; every joule is there (``energy_uj`` holds the idle boards too,
``dynamic_uj`` only what the requests cost above idling, those that came to nothing included).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edge_agent.core.values import Status
from edge_agent.core.wanted import Wanted
from edge_agent.placement.kv import KvAction
from edge_agent.sim.scenario import Scenario

PLANT = "simulated plant: emulated boards, modelled time, energy and heat"


@dataclass(frozen=True, slots=True)
class Served:
    """One request and its one answer. Times are of the simulation's clock.

    ``began_us`` and ``ended_us``: when the board that answered began to run it and was done with it; 0 if none ran it.
    ``busy_us``: its share of that board's accelerator.  ``energy_uj``: with the idle power of that share, as a board reports it.
    ``kv_action``: where the past of its session came from (``placement.kv.KvAction``).
    """

    request_id: str
    ingress: str
    wanted: Wanted
    session: str
    arrived_us: int
    began_us: int
    ended_us: int
    answered_us: int
    board: str
    model: str
    status: Status
    reason: str
    busy_us: int
    energy_uj: int
    quality_permille: int
    kv_action: str

    @property
    def latency_us(self) -> int:
        return self.answered_us - self.arrived_us

    @property
    def within_limits(self) -> bool:
        """OK, within its deadline, not under its quality floor, not over its energy ceiling."""
        return (
            self.status is Status.OK
            and self.latency_us <= self.wanted.deadline_us
            and self.quality_permille >= self.wanted.quality_permille
            and (not self.wanted.energy_uj or self.energy_uj <= self.wanted.energy_uj)
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """A board at one moment. ``queue_us``: the work that is still to be done there, running and waiting."""

    at_us: int
    board: str
    temperature_mdegc: int
    power_mw: int
    queue_us: int
    running: int


@dataclass(frozen=True, slots=True)
class BoardUse:
    """What one board did in the whole run. ``energy_uj`` includes idling while it was up."""

    board: str
    profile: str
    answers: int
    up_us: int
    busy_us: int
    energy_uj: int
    dynamic_uj: int
    hottest_mdegc: int
    throttled_us: int


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run. ``load_us`` is how long requests came in, ``virtual_us`` how long it went on until all were answered."""

    scenario: Scenario
    seed: int
    placer: str
    served: tuple[Served, ...]
    pending: tuple[str, ...]
    """Request ids that had no answer when the run ended."""
    samples: tuple[Sample, ...]
    boards: tuple[BoardUse, ...]
    incidents: tuple[tuple[int, str], ...]
    trace_digest: str
    load_us: int
    virtual_us: int

    @property
    def energy_uj(self) -> int:
        """Of all boards, idling included."""
        return sum(each.energy_uj for each in self.boards)

    @property
    def dynamic_uj(self) -> int:
        """Of all boards, above idling."""
        return sum(each.dynamic_uj for each in self.boards)

    @property
    def label(self) -> str:
        return PLANT


@dataclass(frozen=True, slots=True)
class Metrics:
    """``attainment``: the share of requests within their limits, of all that came (pending ones are not);
    ``attainment_steady`` of those that came after the warm-up.

    Latencies are of OK answers, 0 if there is none; ``mj_per_request`` is the dynamic energy a request within its limits;
    ``by_option`` counts OK answers by (board, model).
    """

    requests: int
    offered_per_s: float
    goodput_per_s: float
    attainment: float
    attainment_steady: float
    shed_rate: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mj_per_request: float
    j_total: float
    migrations: int
    by_option: Counter[tuple[str, str]]


def metrics(run: Run, warmup_us: int = 0) -> Metrics:
    """The figures of a run; requests that came before ``warmup_us`` are left out of ``attainment_steady`` alone."""
    served, load_s = run.served, run.load_us / 1e6
    requests = len(served) + len(run.pending)
    good = sum(each.within_limits for each in served)
    latencies_us = sorted(each.latency_us for each in served if each.status is Status.OK)
    return Metrics(
        requests=requests,
        offered_per_s=requests / load_s,
        goodput_per_s=good / load_s,
        attainment=_share(good, requests),
        attainment_steady=_steady(run, warmup_us),
        shed_rate=_share(sum(each.status is Status.SHED for each in served), requests),
        p50_ms=percentile(latencies_us, 500) / 1000,
        p95_ms=percentile(latencies_us, 950) / 1000,
        p99_ms=percentile(latencies_us, 990) / 1000,
        mj_per_request=run.dynamic_uj / 1000 / good if good else 0.0,
        j_total=run.energy_uj / 1e6,
        migrations=sum(each.kv_action == KvAction.PEER for each in served),
        by_option=Counter((each.board, each.model) for each in served if each.status is Status.OK),
    )


def percentile(ascending: Sequence[int], permille: int) -> int:
    """The smallest value that so many permille of ``ascending`` do not exceed (nearest rank); 0 of nothing."""
    if not ascending:
        return 0
    return ascending[max(0, -(-len(ascending) * permille // 1000) - 1)]


def _steady(run: Run, warmup_us: int) -> float:
    late: Iterable[Served] = [each for each in run.served if each.arrived_us >= warmup_us]
    flags = [each.within_limits for each in late]
    return _share(sum(flags), len(flags) + len(run.pending))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
