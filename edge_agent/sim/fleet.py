"""A simulated fleet: production nodes on virtual time, and what comes and goes around them.

Owns the clock, the schedule of outages and faults, the trace, and ``simulate``.  Rules: everything is drawn from the
scenario and one seed and happens in timers of one clock, so that a seed reproduces a run to the same trace digest; a client
whose agent dies asks the next board under the same request id; what must never happen raises ``BrokenPromiseError``.
Times that leave here count from the moment at which requests begin to come.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from edge_agent.core.clock import VirtualClock
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from edge_agent.node.events import Execute
from edge_agent.placement.options import Rules, choose
from edge_agent.sim.arrivals import Arrival, arrivals, sources
from edge_agent.sim.board import ClonedBoard, SimBoard, key_seed
from edge_agent.sim.clients import BrokenPromiseError, Clients
from edge_agent.sim.costs import digest_of
from edge_agent.sim.hostile import back_up, restart, restore
from edge_agent.sim.plans import DECEITS
from edge_agent.sim.results import Run, Sample
from edge_agent.sim.scenario import Fault, Outage, Scenario
from edge_agent.sim.sharing import shared_work
from edge_agent.sim.world import Network

if TYPE_CHECKING:
    from edge_agent.node.routing import Chooser

MEMORY_FOLDER = Path("/dev/shm")
START_US = 3_000_000
"""Boards that are there from the beginning boot so long before the first request."""
STEP_US = 250_000
DRAIN_US = 10_000_000
"""After the last deadline; what has no answer then is pending."""
SAMPLES = 600
"""Of each board, about."""
MAX_SESSIONS = 2**17
"""Talks of which it is remembered that they have a past."""
WALL_US = 1_790_000_000_000_000
"""The time of day at which simulations begin: in September 2026."""
TABLE = "table"


class Peek:
    """What a simulation lets a placer see that no board could: the truth at the moment of the decision."""

    def __init__(self, fleet: SimFleet) -> None:
        self._fleet = fleet

    @property
    def seed(self) -> int:
        """Of the run."""
        return self._fleet.seed

    @property
    def now_us(self) -> int:
        return self._fleet.now_us

    def queue_us(self, board: str, lane: str = "") -> int:
        """What a new job of a lane (a language model's name, or empty) would wait on a board by that board's own books, now."""
        there = self._fleet.boards[board]
        return there.node.execution.queue_us(there.monotonic_us(), lane) if there.up else 0

    def work_us(self, board: str) -> int:
        """All work that a board has still to do, in time of its whole accelerator."""
        return self._fleet.boards[board].work_us()


class SimFleet:
    """``with SimFleet(scenario, seed, placer) as fleet: run = fleet.run()``."""

    board_kind: type[SimBoard] = SimBoard

    def __init__(self, scenario: Scenario, seed: int = 0, placer: str = TABLE) -> None:
        self.scenario, self.seed, self.placer = scenario, seed, placer
        self.choose = self._chooser(placer)
        self.clock = VirtualClock(wall_offset_us=WALL_US)
        self.network = Network(self.clock, f"network {seed}", scenario.links)
        self.keys = {board.id: Signer(board.id.encode(), key_seed(board.id)).public_key for board in scenario.boards}
        self.trust = {board.id: TrustTier[board.trust.upper()] for board in scenario.boards}
        self.rules = Rules(scenario.policy, frozenset(digest_of(model.name) for model in scenario.models))
        self.liars = {name for fault in scenario.faults if fault.kind == "liar" for name in fault.boards}
        self.boards: dict[str, SimBoard] = {}
        self.clones: dict[str, ClonedBoard] = {}
        self.clients = Clients(self, START_US)
        self._samples: list[Sample] = []
        self._incidents: list[tuple[int, str]] = []
        self._against: dict[str, int] = {}
        """Of each board, how many others it is contraindicated on, as was last told."""
        self._sessions: OrderedDict[str, None] = OrderedDict()
        self._arrivals: Iterator[Arrival] = iter(())
        self._came_us = 0
        self._exhausted = False
        self._trace = sha256()

    def _chooser(self, placer: str) -> Chooser:
        """Raises ``RefusedError`` for an unknown name."""
        if placer == TABLE:
            return choose
        from edge_agent.sim.baselines import PLACERS

        if placer not in PLACERS:
            raise RefusedError("placer", placer, ", ".join(PLACERS))
        return PLACERS[placer](Peek(self))

    def __enter__(self) -> Self:
        parent = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
        self._folder = tempfile.TemporaryDirectory(prefix="sly-sim-", dir=parent)
        self.folder = Path(self._folder.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for board in (*self.boards.values(), *self.clones.values()):
            board.close()
        self._folder.cleanup()

    # time

    @property
    def now_us(self) -> int:
        return self.clock.monotonic_us()

    @property
    def since_start_us(self) -> int:
        return self.now_us - START_US

    def after(self, interval_us: int, callback: Callable[[], object]) -> None:
        self.clock.call_at(self.now_us + interval_us, callback)

    def note(self, text: str, payload: bytes | memoryview = b"") -> None:
        self._trace.update(f"\n{self.now_us} {text} ".encode())
        self._trace.update(payload)

    def tell(self, text: str) -> None:
        """An incident, for people."""
        self.note(text)
        self._incidents.append((self.since_start_us, text))

    # the run

    def run(self, progress: Callable[[int, int], None] | None = None) -> Run:
        """The whole scenario. Raises ``BrokenPromiseError``, and what reading a trace raises."""
        self.begin()
        while not self._over():
            self.clock.run_until(self.now_us + STEP_US)
            if progress:
                progress(min(max(0, self.since_start_us), self.scenario.duration_us), self.scenario.duration_us)
        for plan in self.scenario.boards:
            if self.boards[plan.id].up:
                self.boards[plan.id].sample(self.since_start_us)
        return self._result()

    def begin(self) -> None:
        """Set the boards up and the schedule; then time may pass."""
        scenario = self.scenario
        for source in sources(scenario):
            self.tell(source)
        self.boards.update({plan.id: self.board_kind(self, plan) for plan in scenario.boards})
        for plan in scenario.boards:
            self._at(plan.joins_ms if plan.joins_ms else -START_US // 1000, self.boards[plan.id].boot)
        for outage in scenario.outages:
            self._at(outage.from_ms, lambda outage=outage: self._begin_outage(outage))  # type: ignore[misc]
            self._at(outage.to_ms, lambda outage=outage: self._end_outage(outage))  # type: ignore[misc]
        for fault in scenario.faults:
            self._at(fault.from_ms, lambda fault=fault: self._fault(fault, begins=True))  # type: ignore[misc]
            self._at(fault.to_ms, lambda fault=fault: self._fault(fault, begins=False))  # type: ignore[misc]
            if fault.kind == "rolled_back":
                self._prepare_roll_back(fault)
        self._arrivals = arrivals(scenario, self.seed)
        self._next_arrival()
        self._at(0, self._sample)

    def _prepare_roll_back(self, fault: Fault) -> None:
        """It lives twice more between the backup and its return."""
        for board in map(self.boards.__getitem__, fault.boards):
            self._at(fault.from_ms // 3, lambda board=board: back_up(board))  # type: ignore[misc]
            self._at(fault.from_ms * 2 // 3, lambda board=board: restart(board))  # type: ignore[misc]

    def _at(self, since_start_ms: int, callback: Callable[[], object]) -> None:
        self.clock.call_at(START_US + since_start_ms * 1000, callback)

    def _over(self) -> bool:
        if not self._exhausted or (not self.scenario.limit and self.since_start_us < self.scenario.duration_us):
            return False
        return not self.clients.pending or self.now_us > self.clients.last_deadline_us + DRAIN_US

    def _result(self) -> Run:
        load_us = self._came_us if self.scenario.limit else self.scenario.duration_us
        return Run(
            self.scenario, self.seed, self.placer, tuple(self.clients.served), self.clients.pending, tuple(self._samples),
            tuple(board.use() for board in self.boards.values()), tuple(self._incidents), self._trace.hexdigest(),
            max(1, load_us), self.since_start_us,
        )  # fmt: skip

    def _sample(self) -> None:
        for board in self.boards.values():
            self._samples.append(board.sample(self.since_start_us))
        if self.scenario.attest.on:
            self._tell_trust()
        self.after(max(1_000_000, self.scenario.duration_us // SAMPLES), self._sample)

    def _tell_trust(self) -> None:
        """Who is contraindicated, and on how many of the others, whenever that is another number than before."""
        for name in self.boards:
            others = [board for board in self.boards.values() if board.up and board.name != name]
            against = [board for board in others if board.node.trust.tier(name) is TrustTier.CONTRAINDICATED]
            if len(against) != self._against.get(name, 0):
                self._against[name] = len(against)
                why = f": {against[0].node.trust.why(name)}" if against else ""
                self.tell(f"{name} is contraindicated on {len(against)} of {len(others)} other boards{why}")

    # clients

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._exhausted = True
        else:
            self.clock.call_at(START_US + arrival.at_us, lambda: self._come(arrival))

    def _come(self, arrival: Arrival) -> None:
        self._came_us = self.since_start_us
        self._next_arrival()
        self.clients.come(arrival)

    # what boards ask of the world

    def talked(self, session: str) -> None:
        self._sessions[session] = None
        self._sessions.move_to_end(session)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)

    def has_past(self, session: str) -> bool:
        return session in self._sessions

    def check_execution(self, board: SimBoard, job: Execute) -> None:
        """No request runs where it must not: its board's appraisal, its data, its model's quality and task."""
        request, model = job.request, self.scenario.model(job.model)
        origin, _, request_id = job.key.partition("/")
        trust = self.trust[board.name]
        for kept, text in (
            (job.model in board.plan.models, f"runs {job.model}, which it does not host"),
            (trust >= request.limits.trust and trust > TrustTier.CONTRAINDICATED, f"is {trust.name}, under what is asked for"),
            (request.data != "local" or origin == board.name, f"has data that may not leave {origin}"),
            (model.quality_permille >= request.limits.quality_permille, f"runs {job.model}, which is under the floor"),
            (model.task == request.task, f"runs {job.model} for {request.task}"),
        ):
            if not kept:
                raise BrokenPromiseError(f"request {request_id} on {board.name}: {board.name} {text}")

    # what happens to the fleet

    def _begin_outage(self, outage: Outage) -> None:
        self.tell("the broker stops" if outage.kind == "broker" else f"{', '.join(outage.boards)} cut off ({outage.way})")
        self.network.begin(outage)

    def _end_outage(self, outage: Outage) -> None:
        self.tell("the broker is back" if outage.kind == "broker" else f"{', '.join(outage.boards)} can reach the broker again")
        self.network.end(outage)

    def _fault(self, fault: Fault, *, begins: bool) -> None:
        names = ", ".join(fault.boards)
        self.tell(f"{names}: {fault.kind} {'begins' if begins else 'ends'}")
        for name in fault.boards:
            self._afflict(self.boards[name], fault, begins)

    def _afflict(self, board: SimBoard, fault: Fault, begins: bool) -> None:
        match fault.kind:
            case "kill" | "power_cut" if begins:
                board.kill(power_cut=fault.kind == "power_cut")
            case "kill" | "power_cut":
                board.boot()
            case "heat":
                board.engine.plant.ambient_mdegc = fault.ambient_mdegc if begins else board.plan.ambient_mdegc
            case "engine":
                board.fail_permille = fault.fail_permille if begins else 0
            case "liar":
                board.tell_lies(fault if begins else None)
            case "clock_1970":
                board.wall_offset_us = -self.now_us if begins else WALL_US
            case "swapped_model":
                board.swap_model(begins=begins)
            case "wrong_results":
                board.answers_wrongly = begins
            case "rolled_back" if begins:
                restore(board)
            case "cloned_key":
                self._clone(board, begins=begins)
            case _ if board.deceit and fault.kind in DECEITS:
                (board.deceit.kinds.add if begins else board.deceit.kinds.discard)(fault.kind)

    def _clone(self, board: SimBoard, *, begins: bool) -> None:
        if begins:
            self.clones[board.name] = ClonedBoard(self, board.plan)
            self.clones[board.name].boot()
        elif clone := self.clones.get(board.name):
            clone.kill()


def simulate(scenario: Scenario, seed: int = 0, placer: str = TABLE, progress: Callable[[int, int], None] | None = None) -> Run:
    """Run a scenario to its end; the same arguments give the same ``Run``, to the bit.

    ``progress`` is told virtual µs done and to do. Raises ``RefusedError`` for an unknown placer or a bad trace,
    ``UnavailableError`` for a trace that cannot be read, ``BrokenPromiseError`` when something happened that must not.
    """
    with shared_work(), SimFleet(scenario, seed, placer) as fleet:
        return fleet.run(progress)
