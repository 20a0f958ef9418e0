"""One board's accelerator on virtual time: what runs at once shares it, it warms, and heat slows it.

Owns the jobs that run, when each is done, and where time and energy went.  Rules: integers, so that a run is the same on every
machine; each perception job and each prefill is a stream, all turns of one model that decode are one (each step reads the weights
once for all of them); streams share the accelerator evenly; work is a fluid between events, so that a turn costs a handful of
events and not one a token.  Every microsecond of busy time and every nanojoule above idling is booked on a job.  Heat is the
two-node plant of ``board_support.plant`` with the profile's trip points: emulated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from board_support.plant import ThermalPlant
from board_support.profile import Profile
from edge_agent.sim.costs import Costs, Spent
from edge_agent.sim.scenario import ModelPlan

PARTS = 10**9
"""Of one inference or prefill."""
TOKEN_PARTS = 10**6
PULSE_US = 500_000
"""While it works it is looked at so often, because heat may change its clock."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a job: an inference (``tokens`` 0), a prefill, or a decode; ``context_tokens`` of KV are read with it."""

    model: ModelPlan
    decode: bool = False
    tokens: int = 0
    context_tokens: int = 0

    @property
    def parts(self) -> int:
        return self.tokens * TOKEN_PARTS if self.decode else PARTS


@dataclass(slots=True)
class Task:
    """``left`` of the parts of its first phase; one unit of parts takes ``unit_us`` of the whole accelerator."""

    key: str
    phases: list[Phase]
    ends_us: int
    began_us: int
    left: int = 0
    unit_us: int = 1
    unit_nj: int = 0
    beside: int = 1
    """How many share its stream."""
    cold: bool = False
    busy_ns: int = 0
    dynamic_nj: int = 0

    @property
    def unit(self) -> int:
        return TOKEN_PARTS if self.phases[0].decode else PARTS


@dataclass(slots=True)
class Totals:
    """Since the simulation began. ``dynamic_nj`` is above idling."""

    busy_us: int = 0
    dynamic_nj: int = 0
    up_us: int = 0
    throttled_us: int = 0
    hottest_mdegc: int = -273_000


@dataclass(frozen=True, slots=True)
class Done:
    """A job that is over: ``late`` when its time was up before its work was done."""

    task: Task
    late: bool


@dataclass(slots=True)
class Accelerator:
    """``advance`` brings it to a time; every other call means the time that it was brought to."""

    costs: Costs
    plant: ThermalPlant
    now_us: int
    totals: Totals = field(default_factory=Totals)
    powered: bool = True
    clock_permille: int = 1000
    power_mw: int = 0
    """Of the last stretch."""
    tasks: dict[str, Task] = field(default_factory=dict)
    _on_chip: str = ""
    _streams: int = 0

    @property
    def profile(self) -> Profile:
        return self.costs.profile

    def begin(self, key: str, phases: Iterable[Phase], budget_us: int) -> None:
        """A job comes in. Raises ``RuntimeError`` for one that runs."""
        if key in self.tasks:
            raise RuntimeError(f"{key} runs already")
        task = self.tasks[key] = Task(key, list(phases), self.now_us + budget_us, self.now_us)
        self._enter(task)
        self._share()

    def abort(self, key: str) -> Task | None:
        """A job ends here and now."""
        task = self.tasks.pop(key, None)
        self._share()
        return task

    def clear(self) -> None:
        """The power goes."""
        self.tasks.clear()
        self._on_chip = ""
        self._share()

    def advance(self, until_us: int) -> list[Done]:
        """Work until ``until_us``, which must not be later than ``next_us``; the jobs that are over now."""
        span_us = until_us - self.now_us
        spent_nj = self._work(span_us)
        self._warm(until_us, span_us, spent_nj)
        self.now_us = until_us
        done = [each for task in list(self.tasks.values()) if (each := self._over(task))]
        for each in done:
            del self.tasks[each.task.key]
        self._share()
        return done

    def next_us(self) -> int | None:
        """When it must be looked at next: something ends, or heat may have changed; ``None`` when it is idle."""
        if not self.tasks:
            return None
        due = [min(self._finish_us(task), task.ends_us) for task in self.tasks.values()]
        return min(self.now_us + PULSE_US, *due)

    def remaining_us(self) -> int:
        """The work of all that runs, in time of the whole accelerator."""
        return sum(self._rest_us(task) for task in self.tasks.values())

    def _rest_us(self, task: Task) -> int:
        here_us = -(-task.left * task.unit_us // (task.unit * task.beside))
        return here_us + sum(self._phase_cost(phase, 1).busy_us * max(1, phase.tokens) for phase in task.phases[1:])

    def _finish_us(self, task: Task) -> int:
        return self.now_us + max(1, -(-task.left * task.unit_us * self._streams // task.unit))

    def _over(self, task: Task) -> Done | None:
        while task.left <= 0:
            task.phases.pop(0)
            if not task.phases:
                return Done(task, late=False)
            self._enter(task)
        return Done(task, late=True) if self.now_us >= task.ends_us else None

    def _enter(self, task: Task) -> None:
        """The first phase begins."""
        phase = task.phases[0]
        task.left = phase.parts
        task.cold = self._on_chip != phase.model.name
        self._on_chip = phase.model.name

    def _share(self) -> None:
        """Who runs beside whom, and what a unit of each takes now."""
        self.clock_permille = self.profile.clock_permille(self.plant.temperature_mdegc)
        groups: dict[str, list[Task]] = {}
        single = 0
        for task in self.tasks.values():
            phase = task.phases[0]
            if phase.decode:
                groups.setdefault(phase.model.name, []).append(task)
            else:
                single += 1
                self._price(task, self._phase_cost(phase, 1, task.cold), 1)
        for members in groups.values():
            model, context = members[0].phases[0].model, sum(each.phases[0].context_tokens for each in members)
            step = self.costs.step(model, len(members), context, self.clock_permille)
            for each in members:
                self._price(each, step, len(members))
        self._streams = single + len(groups)

    def _price(self, task: Task, spent: Spent, beside: int) -> None:
        task.unit_us, task.unit_nj, task.beside = max(1, spent.busy_us), spent.dynamic_nj // beside, beside

    def _phase_cost(self, phase: Phase, turns: int, cold: bool = False) -> Spent:
        """Of one unit of a phase."""
        if phase.decode:
            return self.costs.step(phase.model, turns, phase.context_tokens, self.clock_permille)
        if phase.tokens:
            return self.costs.prefill(phase.model, phase.tokens, phase.context_tokens, self.clock_permille)
        return self.costs.inference(phase.model, self.clock_permille, cold=cold)

    def _work(self, span_us: int) -> int:
        """Every task gets its share; the dynamic energy of all."""
        if not self.tasks or span_us <= 0:
            return 0
        spent_nj = 0
        for task in self.tasks.values():
            progress = min(task.left, span_us * task.unit // (task.unit_us * self._streams))
            used_nj = task.unit_nj * progress // task.unit
            task.left -= progress
            task.dynamic_nj += used_nj
            task.busy_ns += span_us * 1000 // (self._streams * task.beside)
            spent_nj += used_nj
        self.totals.busy_us += span_us
        self.totals.throttled_us += span_us if self.clock_permille < 1000 else 0
        self.totals.dynamic_nj += spent_nj
        return spent_nj

    def _warm(self, until_us: int, span_us: int, spent_nj: int) -> None:
        """nJ / µs = mW."""
        if span_us > 0:
            self.power_mw = (self.profile.idle_mw if self.powered else 0) + spent_nj // span_us
            self.totals.up_us += span_us if self.powered else 0
            self.plant.advance(until_us, self.power_mw)
        self.totals.hottest_mdegc = max(self.totals.hottest_mdegc, self.plant.temperature_mdegc)
