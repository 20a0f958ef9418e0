"""The exact optimum of a short window of requests, and what any chooser makes of the same window.

Owns the *window*: a few requests with their arrivals over boards that are empty at its beginning.  Rules: inside a window a board
is one machine that runs one request at a time, for the modelled busy time of its option; transfer delays the start; nothing else
takes time.  That is a smaller world than the simulator's (no shared decode steps, no heat, no gossip delay), and it is the same
one for the optimum and for every chooser, so that the gap between them is of the decisions alone.  The optimum is clairvoyant: it
knows every arrival of the window, which no placer can; the gap is therefore an upper bound of what a placer could gain.
Solved by OR-tools CP-SAT (extra ``[bench]``), imported when it is asked for, with one worker and a deterministic limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import InferenceRequest
from edge_agent.core.wanted import shape_of
from edge_agent.node.routing import Chooser
from edge_agent.placement.options import BoardView, Option, Rules, choose

if TYPE_CHECKING:
    from ortools.sat.python import cp_model


@dataclass(frozen=True, slots=True)
class Arrival:
    """``request`` came in at ``ingress`` at ``at_us`` of the window's time."""

    at_us: int
    ingress: str
    request: InferenceRequest

    @property
    def due_us(self) -> int:
        return self.at_us + self.request.limits.deadline_us


@dataclass(frozen=True, slots=True)
class Window:
    """``arrivals`` in the order of time, over idle ``boards``, whose views hold the modelled costs."""

    arrivals: tuple[Arrival, ...]
    boards: tuple[BoardView, ...]
    rules: Rules

    def __post_init__(self) -> None:
        if list(self.arrivals) != sorted(self.arrivals, key=lambda a: a.at_us):
            raise ValueError("the arrivals of a window are in the order of time")

    def views(self, ingress: str, waiting_us: dict[str, int]) -> list[BoardView]:
        """What ``ingress`` sees while ``waiting_us`` of work waits on each board: fresh and true."""
        return [_loaded(view, view.board == ingress, waiting_us.get(view.board, 0)) for view in self.boards]


@dataclass(frozen=True, slots=True)
class Outcome:
    """So many requests of a window ended within their deadlines, for so much energy; ``proven``: nothing can be better."""

    within: int
    energy_uj: int
    proven: bool = False
    served: tuple[tuple[str, str, str, int], ...] = ()
    """Request id, board, model, start in µs: of those within their deadlines."""

    def gap(self, best: Outcome) -> float:
        """The share of the ``best`` outcome's requests that this one lacks."""
        return (best.within - self.within) / best.within if best.within else 0.0


@dataclass(slots=True)
class _Machine:
    """A board of a replay: what has reached it waits in ``jobs``, by deadline or by arrival."""

    free_us: int = 0
    jobs: list[tuple[int, int, Arrival, Option]] = field(default_factory=list)

    def waiting_us(self, now_us: int) -> int:
        return max(0, self.free_us - now_us) + sum(job[3].cost.busy_us for job in self.jobs)


class _Replay:
    def __init__(self, window: Window, chooses: Chooser, admission: bool) -> None:
        self._window, self._chooses, self._admission = window, chooses, admission
        self._machines = {view.board: _Machine() for view in window.boards}
        self._arriving: list[tuple[int, int, Arrival, Option]] = []
        """By when they reach their board, after their transfer."""
        self._on_the_way: dict[str, int] = {}
        self._within: list[tuple[str, str, str, int]] = []
        self._energy_uj = 0

    def outcome(self) -> Outcome:
        for number, arrival in enumerate(self._window.arrivals):
            self._deliver(arrival.at_us)
            self._run(arrival.at_us)
            self._place(number, arrival)
        self._deliver(None)
        self._run(None)
        return Outcome(len(self._within), self._energy_uj, served=tuple(self._within))

    def _place(self, number: int, arrival: Arrival) -> None:
        waiting_us = {
            board: machine.waiting_us(arrival.at_us) + self._on_the_way.get(board, 0) for board, machine in self._machines.items()
        }
        views = self._window.views(arrival.ingress, waiting_us)
        option = self._chooses(arrival.request, views, self._window.rules, arrival.request.limits.deadline_us).chosen
        if option is None:
            return
        self._on_the_way[option.board] = self._on_the_way.get(option.board, 0) + option.cost.busy_us
        heappush(self._arriving, (arrival.at_us + option.cost.transfer_us, number, arrival, option))

    def _deliver(self, until_us: int | None) -> None:
        """Let reach their boards what does by ``until_us``, the boards running up to each delivery."""
        while self._arriving and (until_us is None or self._arriving[0][0] <= until_us):
            at_us, number, arrival, option = heappop(self._arriving)
            self._run(at_us)
            machine = self._machines[option.board]
            self._on_the_way[option.board] -= option.cost.busy_us
            machine.free_us = max(machine.free_us, at_us)
            heappush(machine.jobs, (arrival.due_us if self._admission else at_us, number, arrival, option))

    def _run(self, until_us: int | None) -> None:
        """Begin on every board what it begins before ``until_us``."""
        for machine in self._machines.values():
            while machine.jobs and (until_us is None or machine.free_us < until_us):
                _, _, arrival, option = heappop(machine.jobs)
                self._begin(machine, arrival, option)

    def _begin(self, machine: _Machine, arrival: Arrival, option: Option) -> None:
        ends_us = machine.free_us + option.cost.busy_us
        if machine.free_us >= arrival.due_us or (self._admission and ends_us > arrival.due_us):
            return
        if ends_us <= arrival.due_us:
            self._within.append((arrival.request.request_id, option.board, option.offer.model, machine.free_us))
        self._energy_uj += _energy_uj(arrival, option)
        machine.free_us = ends_us


def replay(window: Window, chooses: Chooser, *, admission: bool = True) -> Outcome:
    """What comes of a window when ``chooses`` decides each request as it arrives, seeing true queues.

    With ``admission`` boards run the earliest deadline first and begin nothing that ends late; without, they run in the order of
    arrival and begin whatever is not yet past its deadline.
    """
    return _Replay(window, chooses, admission).outcome()


def optimum(window: Window, limit_s: float = 10.0) -> Outcome:
    """The most requests of a window that can end within their deadlines, then the least energy for so many.

    ``limit_s`` is in CP-SAT's deterministic time; without a proof by then ``proven`` is false and the outcome is the best found.
    Raises ``UnavailableError`` without OR-tools.
    """
    model = _Model(window)
    most = model.solve(model.count, limit_s, most=True)
    if most is None:
        return Outcome(0, 0)
    model.go_on_from_here()
    model.model.add(model.count >= most.within)
    cheapest = model.solve(model.energy, limit_s, most=False)
    return replace(cheapest, proven=most.proven and cheapest.proven) if cheapest else replace(most, proven=False)


class _Model:
    """Unrelated machines with release times and deadlines: an optional interval an option, no two at once on a board."""

    def __init__(self, window: Window) -> None:
        try:
            from ortools.sat.python import cp_model
        except ImportError as error:
            raise UnavailableError("the exact optimum", "OR-tools is not installed", "pip install 'slyos-edge[bench]'") from error
        self._cp, self.model = cp_model, cp_model.CpModel()
        self._solver = cp_model.CpSolver()
        self._taken: dict[tuple[str, str, str], tuple[cp_model.IntVar, cp_model.IntVar, int]] = {}
        by_board: dict[str, list[cp_model.IntervalVar]] = {}
        for arrival in window.arrivals:
            taken = [self._option(arrival, option, by_board) for option in feasible(window, arrival)]
            self.model.add_at_most_one(taken)
        for intervals in by_board.values():
            self.model.add_no_overlap(intervals)
        self.count = sum(taken for taken, _, _ in self._taken.values())
        self.energy = sum(taken * energy_uj for taken, _, energy_uj in self._taken.values())

    def _option(self, arrival: Arrival, option: Option, by_board: dict[str, list[cp_model.IntervalVar]]) -> cp_model.IntVar:
        busy_us, name = option.cost.busy_us, (arrival.request.request_id, option.board, option.offer.model)
        taken = self.model.new_bool_var("/".join(name))
        start = self.model.new_int_var(arrival.at_us + option.cost.transfer_us, arrival.due_us - busy_us, "start")
        interval = self.model.new_optional_fixed_size_interval_var(start, busy_us, taken, "run")
        by_board.setdefault(option.board, []).append(interval)
        self._taken[name] = (taken, start, _energy_uj(arrival, option))
        return taken

    def solve(self, aim: cp_model.LinearExprT, limit_s: float, *, most: bool) -> Outcome | None:
        """The best outcome found within the limit; ``None`` if none was."""
        (self.model.maximize if most else self.model.minimize)(aim)
        self._solver.parameters.num_workers = 1
        self._solver.parameters.random_seed = 0
        self._solver.parameters.max_deterministic_time = limit_s
        status = self._solver.solve(self.model)
        if status not in (self._cp.OPTIMAL, self._cp.FEASIBLE):
            return None
        chosen = [(name, start, cost) for name, (taken, start, cost) in self._taken.items() if self._solver.value(taken)]
        served = sorted((*name, self._solver.value(start)) for name, start, _ in chosen)
        return Outcome(len(chosen), sum(cost for _, _, cost in chosen), status == self._cp.OPTIMAL, tuple(served))

    def go_on_from_here(self) -> None:
        """Begin the next search at what the last one found."""
        for taken, start, _ in self._taken.values():
            self.model.add_hint(taken, self._solver.value(taken))
            self.model.add_hint(start, self._solver.value(start))


def feasible(window: Window, arrival: Arrival) -> list[Option]:
    """The options of a request that pass every hard filter and could meet its deadline on idle boards."""
    views = window.views(arrival.ingress, {})
    ranked = choose(arrival.request, views, window.rules, arrival.request.limits.deadline_us).ranked
    return [each for each in ranked if each.cost.transfer_us + each.cost.busy_us <= arrival.request.limits.deadline_us]


def _energy_uj(arrival: Arrival, option: Option) -> int:
    return option.offer.cost_of(shape_of(arrival.request)).energy_uj


def _loaded(view: BoardView, local: bool, waiting_us: int) -> BoardView:
    kv = {model: replace(state, queue_us=waiting_us) for model, state in view.kv.items()}
    return replace(view, local=local, queue_us=waiting_us, kv=kv)
