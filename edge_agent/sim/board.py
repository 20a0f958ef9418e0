"""One simulated board: the shell around the production ``Node``, an emulated accelerator, and the KV that it holds.

Owns how a job becomes phases on the accelerator, what a turn leaves behind, what a session's move takes, and the sensors.  Rules:
nothing is decided here; time, energy and heat are those of the accelerator; every job ends with one ``Executed``; an answer says
only what it took, because no text is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from board_support.plant import ThermalPlant
from board_support.profile import load_profile
from edge_agent.attest.settings import AttestSettings
from edge_agent.core.chat import CHAT
from edge_agent.core.clock import Timer
from edge_agent.core.cose import Signer
from edge_agent.core.kv import KvState, Place
from edge_agent.core.values import EnergyKind, InferenceRequest, InferenceResult, Status, failure
from edge_agent.node.events import (
    Effect,
    Event,
    Execute,
    Executed,
    Hosted,
    KvChanged,
    KvFind,
    KvFound,
    KvGave,
    KvGive,
    KvPut,
    KvStored,
    Measured,
    Sensed,
    Submitted,
)
from edge_agent.node.node import Node
from edge_agent.node.settings import NodeSettings
from edge_agent.placement.kv import KvAction
from edge_agent.sim.attested import attest_settings, measurements, outputs, skew_us
from edge_agent.sim.costs import Costs, digest_of
from edge_agent.sim.engine import Accelerator, Done, Phase, Task
from edge_agent.sim.hostile import Deceit
from edge_agent.sim.kv_steps import KvSteps
from edge_agent.sim.lying import LyingNode
from edge_agent.sim.plans import DECEITS
from edge_agent.sim.results import BoardUse, Sample
from edge_agent.sim.scenario import BoardPlan, Fault, ModelPlan
from edge_agent.sim.shelf import Shelf
from edge_agent.sim.shell import BoardShell
from edge_agent.sim.trace import told_effect, told_event
from edge_agent.sim.world import SimLink
from edge_agent.transport.topics import Topics

if TYPE_CHECKING:
    from edge_agent.sim.fleet import SimFleet

SENSE_US = 2_000_000
"""As often as a real board's sensors are read (``shell.heartbeat``)."""
BREAK_OFF_US = 1_000
PLACES = {Place.HOT: KvAction.RESIDENT, Place.RAM: KvAction.RAM, Place.DISK: KvAction.DISK}


def key_seed(board: str) -> bytes:
    return sha256(b"simulated key of " + board.encode()).digest()


@dataclass(frozen=True, slots=True)
class Ran:
    """How one request ran on one board; times of the simulation's clock."""

    began_us: int
    ended_us: int
    kv_action: str


@dataclass(slots=True)
class _Job:
    execute: Execute
    model: ModelPlan
    began_us: int
    kv_action: str = KvAction.NONE.value
    fails: bool = False


class SimBoard(BoardShell):
    def __init__(self, fleet: SimFleet, plan: BoardPlan) -> None:
        super().__init__(fleet, plan.id)
        self.fleet, self.plan = fleet, plan
        profile = load_profile(plan.profile)
        self.costs = Costs(profile)
        plant = ThermalPlant(replace(profile, ambient_mdegc=plan.ambient_mdegc), fleet.now_us)
        self.engine = Accelerator(self.costs, plant, fleet.now_us, powered=False)
        self.models = {name: fleet.scenario.model(name) for name in plan.models}
        self.shelves = {name: Shelf(model, plan, self.costs) for name, model in self.models.items() if model.talks}
        self.moving = KvSteps(self.shelves, fleet.scenario.links.bytes_per_ms)
        self.fail_permille = 0
        self.lie: Fault | None = None
        self.attests = fleet.scenario.attest.on
        self.wall_offset_us = fleet.clock.wall_offset_us + (skew_us(fleet.seed, self.name) if self.attests else 0)
        self.swapped_model = ""
        """The model of which other bytes are mapped than are offered."""
        self.answers_wrongly = False
        self.deceit = self._deceit()
        self.answers = 0
        self._clock_offset_us = 0
        self._jobs: dict[str, _Job] = {}
        self._waiting: dict[int, str] = {}
        """The request id behind each handle of a local client."""
        self._handles = 0
        self._timer: Timer | None = None
        self._told: dict[str, KvState] = {}
        self._sensed_us = self._sensed_nj = 0

    # clocks

    def monotonic_us(self) -> int:
        """Counts from the board's own boot, as a real one's does, and a bit."""
        return self.fleet.now_us + self._clock_offset_us

    def wall_us(self) -> int:
        """What this board takes for the time of day; nothing decides by it."""
        return self.fleet.now_us + self.wall_offset_us

    def told_wall_us(self) -> int:
        return self.wall_us() if self.attests else 0

    # a life

    def boot(self) -> None:
        if self.up:
            return
        self._bring()
        self.engine.powered = True
        offset = sha256(f"{self.fleet.seed} {self.client_id} {self._life}".encode()).digest()[:4]
        self._clock_offset_us = int.from_bytes(offset) - self.fleet.now_us
        super().boot()
        self._sense()
        self.fleet.clients.house_homeless()

    def make_node(self, boot_epoch: int) -> Node:
        fleet, scenario = self.fleet, self.fleet.scenario
        settings = NodeSettings(
            board=self.name,
            boot_epoch=boot_epoch,
            signer=Signer(self.name.encode(), key_seed(self.name)),
            hardware=f"emulated {self.plan.profile}",
            emulated=True,
            members=fleet.keys,
            rules=fleet.rules,
            trust=fleet.trust,
            queue=scenario.queue,
            attest=self._attest_settings(),
        )
        if self.name not in fleet.liars:
            return Node(settings, self.ledger, fleet.choose)
        node = LyingNode(settings, self.ledger, fleet.choose)
        node.lie = self.lie
        return node

    def tell_lies(self, lie: Fault | None) -> None:
        self.lie = lie
        if self.up and isinstance(self.node, LyingNode):
            self.node.lie = lie

    def make_link(self) -> SimLink:
        return SimLink(self.fleet.network, self.client_id, self.fleet.scenario.links, self.later, self.deceit)

    def furnish(self) -> Iterator[Event]:
        self._told.clear()
        if self.attests:
            yield self._measured()
        yield from (Hosted(self.costs.offer(model)) for model in self.models.values())
        yield from self._kv_news()

    def lose_clients(self) -> None:
        self._bring()
        self.engine.clear()
        self.engine.powered = False
        self._jobs.clear()
        for shelf in self.shelves.values():
            shelf.running.clear()
        waiting, self._waiting = list(self._waiting.values()), {}
        for request_id in waiting:
            self.fleet.clients.ask_elsewhere(request_id)

    # attestation

    def _attest_settings(self) -> AttestSettings | None:
        scenario = self.fleet.scenario
        if not self.attests:
            return None
        return attest_settings(scenario.attest, self.fleet.seed, self.client_id, self._life, scenario.models)

    def _measured(self) -> Measured:
        return Measured(measurements(self.models, self.swapped_model))

    def swap_model(self, *, begins: bool) -> None:
        """Somebody writes into the mapped bytes of its first model."""
        self.swapped_model = next(iter(self.models), "") if begins else ""
        if self.up:
            self.feed(self._measured())

    def _deceit(self) -> Deceit | None:
        fleet = self.fleet
        if not any(fault.kind in DECEITS and self.name in fault.boards for fault in fleet.scenario.faults):
            return None
        others = tuple(name for name in fleet.keys if name != self.name)
        return Deceit(Signer(self.name.encode(), key_seed(self.name)), Topics("home"), fleet.network, others)

    # clients

    def ask(self, request: InferenceRequest) -> None:
        self._handles += 1
        self._waiting[self._handles] = request.request_id
        self.feed(Submitted(request, self._handles))

    def reply(self, handle: int, result: InferenceResult) -> None:
        self.fleet.clients.answered(self._waiting.pop(handle), result)

    # the trace

    def before_event(self, event: Event) -> None:
        self.fleet.note(*told_event(self.name, event))

    def before_effect(self, effect: Effect) -> None:
        self.fleet.note(*told_effect(self.name, effect))

    # jobs

    def execute(self, job: Execute) -> None:
        self.fleet.check_execution(self, job)
        request, model = job.request, self.models[job.model]
        begun = self._jobs[job.key] = _Job(job, model, self.fleet.now_us, fails=self._fails(job.key))
        if request.task != CHAT:
            self._run(job.key, [Phase(model)], job.budget_us)
            return
        prompt_tokens, answer_tokens = self.fleet.clients.lengths(request.request_id)
        cached_tokens, restore_us, begun.kv_action = self._past(job, prompt_tokens)
        self.shelves[model.name].running[job.key] = prompt_tokens + answer_tokens
        window = model.window_tokens
        context_tokens = min(window, prompt_tokens + answer_tokens // 2)
        phases = [
            Phase(model, tokens=prompt_tokens - cached_tokens, context_tokens=min(window, cached_tokens)),
            Phase(model, decode=True, tokens=answer_tokens, context_tokens=context_tokens),
        ]
        if restore_us:
            self.later(restore_us, lambda: self._run(job.key, phases, max(1, job.budget_us - restore_us)))
        else:
            self._run(job.key, phases, job.budget_us)

    def _past(self, job: Execute, prompt_tokens: int) -> tuple[int, int, str]:
        """How much of the prompt's KV is here, what bringing it into hot memory takes, and where it lay."""
        shelf, session = self.shelves[job.model], job.request.session
        held = min(shelf.tokens(session), prompt_tokens - 1) if session else 0
        if held <= 0:
            return 0, 0, (KvAction.RECOMPUTE if self.fleet.has_past(session) else KvAction.NONE).value
        place = Place.RAM if job.moved_from else shelf.place(session)
        speed = {Place.RAM: self.costs.ram_tok_s, Place.DISK: self.costs.disk_tok_s}.get(place)
        restore_us = min(held, shelf.model.window_tokens) * 1_000_000 // speed(shelf.model) if speed else 0
        return held, restore_us, (KvAction.PEER if job.moved_from else PLACES[place]).value

    def _fails(self, key: str) -> bool:
        drawn = int.from_bytes(sha256(f"{self.fleet.seed} {self.name} {self._life} {key}".encode()).digest()[:4])
        return drawn % 1000 < self.fail_permille

    def _run(self, key: str, phases: list[Phase], budget_us: int) -> None:
        if key not in self._jobs:
            return
        self._bring()
        if self._jobs[key].fails:
            budget_us = max(1, min(budget_us, self._jobs[key].model.launches))
        self.engine.begin(key, phases, budget_us)
        self._schedule()

    def cancel(self, key: str) -> None:
        job = self._jobs.pop(key, None)
        if job is None:
            return
        self._bring()
        self.engine.abort(key)
        self._schedule()
        self._leave(job)
        result = failure(job.execute.request.request_id, Status.FAILED, self.name, "broken off")
        self.later(BREAK_OFF_US, lambda: self.feed(Executed(key, result)))

    def _bring(self) -> None:
        """The accelerator to now; what is over is told."""
        engine, now_us = self.engine, self.fleet.now_us
        done: list[Done] = []
        while engine.now_us < now_us:
            next_us = engine.next_us()
            done += engine.advance(now_us if next_us is None else min(now_us, next_us))
        for each in done:
            self._ended(each.task, each.late)

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        next_us = self.engine.next_us()
        self._timer = None if next_us is None else self.fleet.clock.call_at(next_us, self._look)

    def _look(self) -> None:
        self._bring()
        self._schedule()

    def _ended(self, task: Task, late: bool) -> None:
        job = self._jobs.pop(task.key, None)
        if job is None:
            return
        self._leave(job)
        request, busy_us = job.execute.request, task.busy_ns // 1000
        if late:
            reason = "the engine died" if job.fails else f"not done within {job.execute.budget_us} µs"
            self.feed(Executed(task.key, failure(request.request_id, Status.FAILED, self.name, reason, job.model.name)))
            return
        energy_uj = (task.dynamic_nj + self.costs.profile.idle_mw * busy_us) // 1000
        made = outputs(job.model.name, request, wrong=self.answers_wrongly) if self.attests else {}
        result = InferenceResult(
            request.request_id, Status.OK, self.name, job.model.name, digest_of(job.model.name), made, busy_us, energy_uj,
            EnergyKind.EMULATED,
        )  # fmt: skip
        self.answers += 1
        self.fleet.clients.ran(self.name, request.request_id, Ran(job.began_us, self.fleet.now_us, job.kv_action))
        if request.session:
            self.shelves[job.model.name].hold(request.session, sum(self.fleet.clients.lengths(request.request_id)))
            self.fleet.talked(request.session)
        self.feed(Executed(task.key, result))
        if request.task == CHAT:
            self._tell_kv()

    def _leave(self, job: _Job) -> None:
        if job.model.talks:
            self.shelves[job.model.name].running.pop(job.execute.key, None)

    # sessions on their way

    def move(self, effect: KvFind | KvPut | KvGive) -> None:
        for after_us, answer in self.moving.step(effect):
            self.later(after_us, lambda answer=answer: self._stored(answer))  # type: ignore[misc]

    def _stored(self, answer: Callable[[], KvFound | KvStored | KvGave]) -> None:
        self.feed(answer())
        self._tell_kv()

    def _kv_news(self) -> Iterator[Event]:
        for name, shelf in self.shelves.items():
            state = shelf.state()
            if state != self._told.get(name):
                self._told[name] = state
                yield KvChanged(state)

    def _tell_kv(self) -> None:
        if self.up:
            for event in self._kv_news():
                self.feed(event)

    # sensors

    def _sense(self) -> None:
        self._look()
        engine, now_us = self.engine, self.fleet.now_us
        trips = self.costs.profile.trips
        power_mw = self.costs.profile.idle_mw
        if now_us > self._sensed_us:
            power_mw += (engine.totals.dynamic_nj - self._sensed_nj) // (now_us - self._sensed_us)
        self._sensed_us, self._sensed_nj = now_us, engine.totals.dynamic_nj
        self.feed(Sensed(engine.plant.temperature_mdegc, trips[0].at_mdegc if trips else None, power_mw))
        self._tell_kv()
        self.later(SENSE_US, self._sense)

    def sample(self, at_us: int) -> Sample:
        """What it is like now; called it ``at_us``."""
        self._look()
        engine = self.engine
        power_mw = engine.power_mw if engine.tasks else (self.costs.profile.idle_mw if self.up else 0)
        return Sample(at_us, self.name, engine.plant.temperature_mdegc, power_mw, self.work_us(), len(engine.tasks))

    def work_us(self) -> int:
        """The work that is still to be done here, running and waiting, as truly as it can be known."""
        if not self.up:
            return 0
        node, now_us = self.node.execution, self.monotonic_us()
        waiting_us = sum(max(0, node.queue_us(now_us, lane)) for lane in ("", *self.shelves))
        return max(self.engine.remaining_us(), waiting_us)

    def use(self) -> BoardUse:
        self._bring()
        totals, profile = self.engine.totals, self.costs.profile
        idle_nj = profile.idle_mw * totals.up_us
        return BoardUse(
            self.name, profile.name, self.answers, totals.up_us, totals.busy_us, (idle_nj + totals.dynamic_nj) // 1000,
            totals.dynamic_nj // 1000, totals.hottest_mdegc, totals.throttled_us,
        )  # fmt: skip


class ClonedBoard(SimBoard):
    """Another board with the key of the first, on a new disk, by another name to the broker."""

    @property
    def client_id(self) -> str:
        return f"{self.name}-clone"
