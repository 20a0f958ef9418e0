"""The agent: one board's daemon, brought up, asked, and taken down.

Owns the order in which the rooms of the shell come and go, and answers turns of talk for the doors (``gateway.talker``).  Rules:
one asyncio loop; a stop drains within its time limit; no broker, no internet and a failed model never keep it from starting, and
a disk that fails never ends its serving (``shell.standby``).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from board_support.board import Board
from board_support.registry import open_board
from edge_agent.attest.evidence import KeyKind
from edge_agent.attest.keys import why_not_checked
from edge_agent.attest.measure import Software, measured_software
from edge_agent.cloud.endpoint import Endpoint, endpoint_of, offer_of
from edge_agent.configured import (
    board_settings,
    broker_address,
    check_broker,
    client_id,
    engine_settings,
    mqtt_options,
    node_settings,
    placed_by,
    private_folder,
    signer_of,
)
from edge_agent.core.chat import CHAT, Turn, TurnEnd, TurnPart
from edge_agent.core.clock import Clock, SystemClock
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.printable import on_one_line
from edge_agent.core.values import DataClass, InferenceRequest, InferenceResult, Limits, ModelOffer
from edge_agent.gateway.access import Access
from edge_agent.gateway.http import HttpGateway
from edge_agent.gateway.local import LocalServer
from edge_agent.gateway.local_talk import TALK, talk_stream
from edge_agent.gateway.talker import DRAINING, UNKNOWN_MODEL, Figure
from edge_agent.hosting import Host, language_models, model_files
from edge_agent.node.events import Drain, Effect, Event, Hosted, Measured, Reply, Withdrawn
from edge_agent.node.node import Node
from edge_agent.node.settings import NodeSettings
from edge_agent.runtime.supervisor import EngineSupervisor
from edge_agent.service import notify
from edge_agent.shell import counted
from edge_agent.shell.answers import Answers
from edge_agent.shell.door import SOCKET_NAME, Door
from edge_agent.shell.effects import Effects
from edge_agent.shell.endorsers import open_endorser
from edge_agent.shell.endorsing import Endorsing
from edge_agent.shell.heartbeat import Heartbeat
from edge_agent.shell.jobs import Jobs
from edge_agent.shell.measuring import Measuring
from edge_agent.shell.self_test import SelfTesting
from edge_agent.shell.standby import Standby
from edge_agent.shell.tasks import Tasks
from edge_agent.shell.under_way import UnderWay
from edge_agent.shell.updating import Updating
from edge_agent.shell.verbs import Verbs
from edge_agent.shell.work_loop import WorkLoop
from edge_agent.store.blobs import BlobStore
from edge_agent.store.ledger import Ledger
from edge_agent.talk import Talks
from edge_agent.transport.link import LinkEvent, Will
from ota.launcher import SLOTS_VARIABLE

if TYPE_CHECKING:
    from edge_agent.speaking import Speaker
    from ota.updater import Updater

DRAIN_S = 20.0


class Agent:
    """``async with Agent(config) as agent`` brings a board up, ready to serve; leaving drains and takes it down.

    ``board`` stands in for the configured one.  Raises ``ConfigError``, ``RefusedError`` or ``UnavailableError`` on entry for
    what makes serving impossible.
    """

    node: Node
    board: Board
    host: Host
    work: WorkLoop
    verbs: Verbs
    heartbeat: Heartbeat
    self_test: SelfTesting
    _settings_on: Callable[[Ledger], NodeSettings]
    _library: str

    def __init__(
        self,
        config: AgentConfig,
        log: Callable[[str], None] | None = None,
        clock: Clock | None = None,
        board: Board | None = None,
    ) -> None:
        self.config = config
        self._given_board = board
        self.clock = clock or SystemClock()
        self.say = log or (lambda text: print(on_one_line(text), file=sys.stderr, flush=True))
        self._answers = Answers(self._feed)
        self._talks = Talks(self._feed, self._answers.new_handle)
        self._tasks = Tasks(self._fault)
        self._closers: list[Callable[[], Any]] = []
        self.measuring: Measuring | None = None
        self.updater: Updater | None = None
        self._under_way = UnderWay(config.board.id, self.clock)
        self.standby = Standby(config.state.folder, self, self._under_way, self.say)
        self.stop_requested = asyncio.Event()
        self.faulty = False
        self.start_anew = self.begins_anew = False
        """Another release of the agent is to start; this one is, in this process."""
        self.socket = config.state.folder / SOCKET_NAME
        self.gateway_port = 0
        """Where the gateway listens; 0 without one."""

    async def __aenter__(self) -> Agent:
        try:
            await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.begins_anew:
            notify("STOPPING=1")
        if kind is None and not self.work.broken:
            await self.drain()
        await self._close()

    async def submit(self, request: InferenceRequest) -> InferenceResult:
        """Serve one request of a client in this process; the answer is a result, whatever happens."""
        return await self._answers.submit(request)

    async def serve(self) -> None:
        """Serve until ``stop_requested`` is set."""
        notify("READY=1")
        await self.stop_requested.wait()

    # the Talker of the doors (gateway.talker)

    def models(self) -> list[str]:
        """The language models that can be asked for here: this board's own, those of boards that are there, the cloud."""
        here = [offer for offer in self.node.execution.offers.values() if offer.task == CHAT]
        own, clouds = [[offer.model for offer in here if offer.cloud is cloud] for cloud in (False, True)]
        return own + sorted({offer.model for offer in self.node.offers_elsewhere() if offer.task == CHAT} - set(own)) + clouds

    async def talk(
        self,
        turn: Turn,
        model: str | None = None,
        *,
        data: DataClass = DataClass.PRIVATE,
        limits: Limits | None = None,
    ) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        """Serve one turn, here or on another board: its parts as they come, then its end.

        ``data``: how far the turn may travel; ``limits``: what it may cost, and how trusted the board must be that serves it.

        Raises ``RefusedError`` for a turn that is at fault, ``UnavailableError`` when no board can serve it now.
        """
        if self.node.draining:
            raise UnavailableError(DRAINING, f"{self.node.board} is being stopped", "ask another board")
        if (model or "") not in ["", *self.models()]:
            raise RefusedError(UNKNOWN_MODEL, model, ", ".join(self.models()) or "none is hosted", "see [models] serve")
        async with aclosing(self._talks.talk(turn, model, data=data, limits=limits)) as parts:
            async for part in parts:
                yield self.standby.excused_end(part) if isinstance(part, TurnEnd) and self.config.attest.on else part

    async def ready(self) -> str:
        """Why no turn could be served now; empty when one could."""
        if self.work.broken or self.node.draining:
            return "it is stopping"
        hosted = [speaker for model, speaker in self.host.speakers.items() if model in self.node.execution.offers]
        refusals = [why for speaker in hosted if (why := await speaker.ready())]
        if refusals or not self.models():
            return "; ".join(refusals) or "no language model is hosted here or on a board that is there"
        return ""

    def figures(self) -> Iterable[Figure]:
        """What is counted here, for ``/metrics``."""
        yield from counted.figures(self.node)
        for speaker in self.host.speakers.values():
            yield from speaker.figures()

    def host_speaker(self, offer: ModelOffer, speaker: Speaker) -> None:
        """Serve a language model that runs already; it is closed with the agent."""
        self.host.speak(offer, speaker)
        self._feed(Hosted(offer))

    # bringing up

    async def _start(self) -> None:
        config = self.config
        files = [*model_files(config), *language_models(config)]
        if config.gateway.on:
            Access(config.gateway)
        endpoint = endpoint_of(config.cloud) if config.cloud.on else None
        folder = private_folder(config)
        software = self._begin_to_measure()
        ledger = self.standby.open()
        self._closers.append(self.standby.close)
        blobs = BlobStore(folder / "models", config.state.cache_bytes)
        signer = signer_of(config)
        self.board = self._given_board or open_board(config.board.backend, board_settings(config))
        endorser = open_endorser(config.attest, self.board.device_root(), self.say)
        self._endorsing = Endorsing(endorser, self._tasks, self._feed)
        await check_broker(config, self.say)
        measured = self._with_delegate(await software) if software else None
        key_kind = endorser.kind if endorser else KeyKind.SOFTWARE
        self._settings_on = partial(node_settings, config, signer, self.board, software=measured, key_kind=key_kind)
        self.node, ledger = self._first_node(ledger, partial(node_settings, config, signer, self.board))
        self.host = self._hosting(blobs)
        self._furnish(ledger)
        if not self.standby.why:
            self._open_updates(ledger, blobs, measured)
        self._prepare_endorsing()
        await self._open_door()
        await self._load_models(files)
        if measured:
            self._measure(measured)
        await self.heartbeat.read_sensors()
        self._jobs.tell_kv()
        self.work.recover()
        self._open_link()
        if endpoint is not None:
            self._open_cloud(endpoint)
        await self._open_gateway()
        if self.measuring is not None:
            self._tasks.spawn(self.measuring.measure_for_ever(), "measure")
            self._tasks.spawn(self.measuring.goldens.run_for_ever(), "golden inputs")
        if self.updater is not None:
            self._tasks.spawn(self.updater.run_for_ever(), "updates")
        self._tasks.spawn(self.standby.watch_for_ever(), "disk")
        self._tasks.spawn(self.heartbeat.tick_for_ever(), "tick")
        self._tasks.spawn(self.heartbeat.sense_for_ever(self._jobs.tell_kv), "sense")
        self.self_test.start()

    def _first_node(self, ledger: Ledger, bare: Callable[[Ledger], NodeSettings]) -> tuple[Node, Ledger]:
        """On a ledger in memory if this one does not even count the boot; such a node attests to nothing (``bare``)."""
        if not self.standby.why:
            try:
                return self.node_on(ledger), ledger
            except UnavailableError as error:
                ledger = self.standby.open_in_memory(error)
        return Node(bare(ledger), ledger), ledger

    async def _open_door(self) -> None:
        door = Door(
            self.config.state.folder, lambda path: LocalServer(path, self.verbs.handle, {TALK: talk_stream(self)}), self.say
        )
        self._closers.append(door.close)
        self.socket = await door.open(bool(self.standby.why))

    def _prepare_endorsing(self) -> None:
        """Find this board's own attestation key; say whose endorsements nobody can check here."""
        self._endorsing.prepare()
        attest = self.node.settings.attest
        for board, key in sorted(attest.endorsers.items()) if attest else ():
            if why := why_not_checked(key):
                self.say(f"endorsements of {board} cannot be checked here: {why}")

    def _begin_to_measure(self) -> asyncio.Future[Software] | None:
        """Hash code and library while the start goes on."""
        if not self.config.attest.on:
            return None
        return asyncio.get_running_loop().run_in_executor(None, measured_software, self.config.engine.runtime)

    def _with_delegate(self, software: Software) -> Software:
        delegate = self.board.delegate()
        return software.with_delegate(delegate.library) if delegate else software

    def _measure(self, software: Software) -> None:
        policy = placed_by(self.config, self.node.settings.rules)
        rate = self.config.attest.rehash_bytes_per_s
        self.measuring = Measuring(self.host, software, policy, rate, self.clock, self._feed, self.say)
        self._closers.append(self.measuring.close)
        self.measuring.begin()

    def _hosting(self, blobs: BlobStore) -> Host:
        engine = engine_settings(self.config)
        supervisor = EngineSupervisor(engine, self.board.delegate(), self.say)
        self._closers.append(supervisor.close)
        host = Host(self.config, self.board, blobs, supervisor, self.clock, engine, self.say)
        self._closers.append(host.close)
        return host

    def _furnish(self, ledger: Ledger) -> None:
        """The rooms of the shell, around the node and the host."""
        self._jobs = Jobs(self.host, self._tasks, self._feed, self.config.board.id)
        self._effects = Effects(self._jobs, self._answers, self._talks, self._endorsing, self._feed, self.say)
        self.work = WorkLoop(self.node, ledger, self.clock, self._carry_out, self._fault, self.standby.lost)
        self._closers.append(self.work.close)
        self.verbs = Verbs(lambda: self.node, self.work, self.clock, self.host, self._answers, self._jobs, self.standby.told)
        self.heartbeat = Heartbeat(self.board, self.clock, self._feed, lambda: self.node.at_rest)
        self.self_test = SelfTesting(self, lambda: self._effects.link, self.standby.ails, self.say)
        self._closers.append(self.self_test.close)

    def _open_updates(self, ledger: Ledger, blobs: BlobStore, measured: Software | None) -> None:
        """What the fleet pushes: taken up where the last start left it."""
        if not self.config.ota.root:
            return
        self._library = measured.library.name if measured else ""
        updating = self._updating()
        self.updater = updating.open(self.board, ledger, blobs, self.host, self.clock)
        self._closers.append(self.updater.close)
        self.updater.start([*model_files(self.config), *language_models(self.config)])
        if self.updater.charter is not None:
            updating.adopt(self.updater.charter)

    def _updating(self) -> Updating:
        return Updating(
            self.config, replace(self.node.settings), self._feed, self.say, self._start_anew, self._ruled, self._library
        )  # fmt: skip

    def _ruled(self) -> None:
        """A charter was adopted: what this board shows of its rules follows."""
        if self.measuring is not None:
            self.measuring.rule(placed_by(self.config, self.node.settings.rules))

    def _start_anew(self, why: str) -> None:
        """Another release of the agent is to take over: by whoever started this one, if there is such."""
        self.say(f"starting anew: {why}")
        self.start_anew = True
        self.begins_anew = not (os.environ.get(SLOTS_VARIABLE) or os.environ.get("NOTIFY_SOCKET"))
        self.stop_requested.set()

    async def _load_models(self, names: list[str]) -> None:
        if self.updater is not None:
            await self.updater.load_models(names)
            return
        for name in names:
            try:
                self._feed(Hosted(await self.host.load(name)))
            except SlyError as error:
                self._feed(Withdrawn(name, str(error)))

    def _open_link(self) -> None:
        broker = self.config.broker
        if self.standby.why:
            return
        if not broker.host:
            self.say("no [broker] host: this board stands alone")
            return
        from edge_agent.transport.mqtt import MqttLink

        loop = asyncio.get_running_loop()
        link = MqttLink(broker_address(self.config), client_id(self.config), loop, mqtt_options(self.config))
        self._effects.link = link
        if self.updater is not None:
            self.updater.open_link(link)
        link.open(self._hear, Will(self.node.will(), broker.will_delay_s))
        self._closers.append(link.close)

    def _open_cloud(self, endpoint: Endpoint) -> None:
        from edge_agent.cloud.speaker import CloudSpeaker

        offer = offer_of(self.config.cloud)
        speaker = CloudSpeaker(endpoint, offer)
        self.host.speak(offer, speaker)
        self._tasks.spawn(speaker.watch(self._feed), "cloud")
        self.say(f"public turns may go to {endpoint.model} at {endpoint.authority}, as {offer.model}")

    async def _open_gateway(self) -> None:
        settings = self.config.gateway
        if settings.on:
            gateway = HttpGateway(settings, self, self.say)
            await gateway.start()
            self._closers.append(gateway.close)
            self.gateway_port = gateway.port
            self.say(f"the gateway listens on {settings.host}:{gateway.port}")

    # taking down

    async def drain(self) -> None:
        """Take nothing new in, finish what was begun within ``DRAIN_S``, and say goodbye to the fleet."""
        self._feed(Drain())
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self.work.until(lambda: self.node.idle)
        if not self.node.idle:
            self.say(f"stopping with requests unanswered after {DRAIN_S:g} s; accepted ones are taken up at the next start")
        link = self._effects.link
        if link is not None and link.up:
            with suppress(UnavailableError):
                link.publish(self.node.farewell())

    async def _close(self) -> None:
        await self._tasks.close()
        while self._closers:
            outcome = self._closers.pop()()
            if asyncio.iscoroutine(outcome):
                await outcome

    # a disk that fails (shell.standby.Inhabitants)

    def node_on(self, ledger: Ledger) -> Node:
        return Node(self._settings_on(ledger), ledger)

    def decide_by(self, node: Node, ledger: Ledger, first: Sequence[Event]) -> None:
        before, self.node = self.node, node
        try:
            self.work.take_over(node, ledger, first)
        except UnavailableError:
            self.node = before
            raise

    def leave_fleet(self, why: str) -> None:
        if self.updater is not None:
            self.updater.pause(why)
        link, self._effects.link = self._effects.link, None
        if link is None:
            return
        if link.up:
            with suppress(UnavailableError):
                link.publish(self.node.farewell())
        self._tasks.spawn(asyncio.to_thread(link.close), "goodbye")

    def return_to_fleet(self, ledger: Ledger) -> None:
        if self.updater is not None:
            updating = self._updating()
            self.updater.resume(ledger, self.node.settings.boot_epoch, updating)
            if self.updater.charter is not None:
                updating.adopt(self.updater.charter)
        self.work.recover()
        if self.measuring is not None:
            self._feed(Measured(self.measuring.measurements()))
        self._open_link()

    def begin_anew(self, why: str) -> None:
        self.say(f"starting anew: {why}")
        self.begins_anew = True
        self.stop_requested.set()

    # between the rooms

    def _hear(self, event: LinkEvent) -> None:
        if self._effects.link is None:
            return
        if not self.self_test.hear(event) and (self.updater is None or not self.updater.hear(event)):
            self._feed(event)

    def _feed(self, event: Event) -> None:
        if isinstance(event, Measured):
            self._endorsing.loaded(event.measurements)
        self._under_way.hear(event)
        self.work.feed(event)

    def _carry_out(self, effect: Effect) -> None:
        if not self._under_way.lets(effect):
            return
        if isinstance(effect, Reply) and self.config.attest.on:
            effect = replace(effect, result=self.standby.excused(effect.result))
        self._effects.carry_out(effect)

    def _fault(self, text: str) -> None:
        self.say(text)
        self.faulty = True
        self.stop_requested.set()


async def serve(config: AgentConfig) -> int:
    """Run an agent until SIGTERM or SIGINT; 0 after a clean drain, 1 if it stopped because of a fault of its own.

    What begins anew, and nobody else starts, begins anew here.
    """
    stop_asked, running = asyncio.Event(), list[Agent]()

    def stop() -> None:
        stop_asked.set()
        for agent in running:
            agent.stop_requested.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    while True:
        async with Agent(config) as agent:
            running[:] = [agent]
            agent.say(f"{config.board.id} is ready on {agent.socket}")
            if not stop_asked.is_set():
                await agent.serve()
            agent.begins_anew &= not stop_asked.is_set() and not agent.faulty
        if not agent.begins_anew:
            return 1 if agent.faulty else 0
