"""The shell around ``Node`` on virtual time: what ``edge_agent/shell`` and ``Agent`` are in production, with timers for asyncio.

Owns a board's lives (boot, recovery, kill, power cut, clean stop), the transaction around its decisions, the effects after it
(what cannot be published comes back as ``Rejected``) and its ticks.  Rules: one such shell serves the simulator and the tests
alike; a killed board keeps its ledger and nothing else; whatever a board does happens in a timer of its world.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, assert_never

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import AnswerPart, InferenceResult
from edge_agent.node.events import (
    Acknowledge,
    Cancel,
    Drain,
    Effect,
    Endorse,
    Endorsed,
    Event,
    Execute,
    KvFind,
    KvGive,
    KvPut,
    Log,
    Publish,
    Reply,
    ReplyPart,
    Subscribe,
    Tick,
)
from edge_agent.node.node import Node
from edge_agent.store.ledger import Bounds, Ledger
from edge_agent.transport.link import Link, Message, Rejected, Will
from edge_agent.transport.loopback import LoopbackLink

TICK_US = 100_000
IDLE_TICK_US = 1_000_000


class World(Protocol):
    """What a board stands in: the time, and the folder that stands for all disks."""

    @property
    def now_us(self) -> int: ...
    @property
    def folder(self) -> Path: ...
    def after(self, interval_us: int, callback: Callable[[], object]) -> None:
        """Run ``callback`` once when so much time has passed."""

    def note(self, text: str, payload: bytes | memoryview = b"") -> None:
        """Something happened: a line of the trace."""


class Watch:
    """What happens to a board on the way, for whoever wants to look, note or check."""

    def reply_part(self, handle: int, part: AnswerPart) -> None:
        """Text for a local client."""

    def before_event(self, event: Event) -> None:
        """``event`` is about to be decided on."""

    def before_effect(self, effect: Effect) -> None:
        """``effect`` is about to be carried out."""

    def before_publish(self, message: Message) -> None:
        """``message`` is about to be sent."""

    def after_events(self) -> None:
        """Everything that had come was decided on and carried out."""


class BoardShell(Watch, ABC):
    """One board's shell. What its engine, its stores and its clients are is for who derives from it."""

    ledger: Ledger
    node: Node
    link: Link

    def __init__(self, world: World, name: str, bounds: Bounds | None = None) -> None:
        self.world, self.name, self.bounds = world, name, bounds
        self.up = False
        self._life = 0
        self._events: deque[Event] = deque()
        self._pumping = False

    # what a board is made of

    @abstractmethod
    def make_node(self, boot_epoch: int) -> Node:
        """The heart of this life."""

    @abstractmethod
    def make_link(self) -> LoopbackLink:
        """Its way to the broker, not opened yet."""

    @abstractmethod
    def furnish(self) -> Iterable[Event]:
        """A life begins, after whatever the last one left: what is hosted and known before anything is taken up."""

    @abstractmethod
    def execute(self, job: Execute) -> None:
        """Run a job; it ends with one ``Executed``."""

    @abstractmethod
    def cancel(self, key: str) -> None:
        """Break a running job off; it ends with one ``Executed`` all the same."""

    @abstractmethod
    def move(self, effect: KvFind | KvPut | KvGive) -> None:
        """A step of a session on its way here or from here; it ends with its answer."""

    @abstractmethod
    def reply(self, handle: int, result: InferenceResult) -> None:
        """The one answer for a local client."""

    @abstractmethod
    def lose_clients(self) -> None:
        """The agent's process ended: its local clients notice."""

    @property
    def client_id(self) -> str:
        """By which the broker knows it: its name, unless it is another that goes by it."""
        return self.name

    @property
    def disk(self) -> Path:
        """The folder of its ledger."""
        return self.world.folder / self.client_id

    def told_wall_us(self) -> int:
        """The time of day as this board's shell tells its node; 0 where no node asks for it."""
        return 0

    def monotonic_us(self) -> int:
        """This board's own clock, which need not begin where another's does."""
        return self.world.now_us

    # a board's lives

    def boot(self) -> None:
        """Begin a life, unless one is lived."""
        if self.up:
            return
        self._life += 1
        self.up = True
        self._events.clear()
        self._pumping = False
        self.ledger = Ledger(self.disk / "ledger.db", self.bounds)
        with self.ledger.transaction():
            boot_epoch = self.ledger.increment("boot_epoch")
        self.node = self.make_node(boot_epoch)
        self.world.note(f"{self.name} boots for the {boot_epoch}th time")
        for event in self.furnish():
            self.feed(event)
        self._carry_out(self._decide(lambda: self.node.recover(self.monotonic_us())))
        self.link = self.make_link()
        self.link.open(self.feed, Will(self.node.will()))
        self._tick(self._life)

    def kill(self, power_cut: bool = False) -> None:
        """The plug is pulled: what is not in the ledger is gone, and local clients notice."""
        if not self.up:
            return
        self.world.note(f"{self.name} is killed")
        assert isinstance(self.link, LoopbackLink)
        self.link.crash(power_cut)
        self._end()

    def stop(self) -> None:
        """SIGTERM: take nothing new, finish, say goodbye."""
        if self.up:
            self.world.note(f"{self.name} drains")
            self.feed(Drain())
            self._leave_when_idle(self._life)

    def close(self) -> None:
        """The world ends."""
        if self.up:
            self.up = False
            self.ledger.close()

    def feed(self, event: Event) -> None:
        """Something happened to this board. What it leads to at once is carried out before this returns."""
        self._events.append(event)
        if self._pumping:
            return
        self._pumping = True
        while self._events and self.up:
            self._carry_out(self._decide(self._handle_waiting))
        self._pumping = False
        if self.up:
            self.after_events()

    def later(self, interval_us: int, callback: Callable[[], object]) -> None:
        """Run ``callback`` once when so much time has passed, if this life lasts so long."""
        life = self._life
        self.world.after(interval_us, lambda: callback() if life == self._life else None)

    def _handle_waiting(self) -> list[Effect]:
        effects: list[Effect] = []
        while self._events:
            event = self._events.popleft()
            self.before_event(event)
            effects += self.node.handle(event, self.monotonic_us())
        return effects

    def _decide(self, step: Callable[[], list[Effect]]) -> list[Effect]:
        with self.ledger.transaction():
            return step()

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.before_effect(effect)
            match effect:
                case Execute():
                    self.execute(effect)
                case Cancel(key):
                    self.cancel(key)
                case ReplyPart(handle, part):
                    self.reply_part(handle, part)
                case Reply(handle, result):
                    self.reply(handle, result)
                case Endorse(challenge):
                    self.feed(Endorsed(challenge, refusal="simulated boards have no hardware keys"))
                case Publish() | Subscribe() | Acknowledge():
                    self._use_link(effect)
                case KvFind() | KvPut() | KvGive():
                    self.move(effect)
                case Log():
                    pass
                case _:
                    assert_never(effect)

    def _use_link(self, effect: Publish | Subscribe | Acknowledge) -> None:
        try:
            match effect:
                case Publish(message, ticket):
                    self.before_publish(message)
                    self.link.publish(message, ticket)
                case Subscribe(topic_filter):
                    self.link.subscribe(topic_filter)
                case Acknowledge(token):
                    self.link.acknowledge(token)
        except (UnavailableError, RefusedError) as error:
            if isinstance(effect, Publish):
                self.feed(Rejected(str(error), effect.ticket))

    def _tick(self, life: int) -> None:
        if self.up and life == self._life:
            self.feed(Tick(self.told_wall_us()))
            self.later(IDLE_TICK_US if self.node.at_rest else TICK_US, lambda: self._tick(life))

    def _leave_when_idle(self, life: int) -> None:
        if not self.up or life != self._life:
            return
        if not self.node.idle:
            self.later(TICK_US // 10, lambda: self._leave_when_idle(life))
            return
        if self.link.up:
            with suppress(UnavailableError):
                self.link.publish(self.node.farewell())
        self.link.close()
        self._end()

    def _end(self) -> None:
        self.up = False
        self._life += 1
        self.ledger.close()
        self.lose_clients()
