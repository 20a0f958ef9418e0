"""The agent: one board's daemon. A thin shell that carries events to the node and its effects to the world.

Rules: one asyncio loop; the ledger's transaction closes before any effect is carried out; the watchdog is fed by the very
loop that does the work; a stop drains within its time limit; no broker, no internet and a failed model never keep it from
starting.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, assert_never

from board_support.board import Board, BoardSettings
from board_support.registry import open_board
from edge_agent.configured import broker_address, check_broker, client_id, mqtt_options, private_folder, signer_of
from edge_agent.core import wire
from edge_agent.core.chat import CHAT, Turn, TurnEnd, TurnPart
from edge_agent.core.clock import Clock, SystemClock
from edge_agent.core.config import AgentConfig
from edge_agent.core.cose import Signer
from edge_agent.core.errors import ConfigError, RefusedError, SlyError, UnavailableError
from edge_agent.core.kv import KvState
from edge_agent.core.values import REQUEST_ID, InferenceRequest, InferenceResult, ModelOffer, Status, checked, failure
from edge_agent.gateway.http import HttpGateway
from edge_agent.gateway.local import LocalServer
from edge_agent.gateway.local_talk import TALK, talk_stream
from edge_agent.gateway.talker import DRAINING, UNKNOWN_MODEL, Figure
from edge_agent.hosting import Host, language_models, model_files
from edge_agent.node.events import (
    Abandoned,
    Acknowledge,
    Cancel,
    Drain,
    Effect,
    Event,
    Execute,
    Executed,
    Hosted,
    KvChanged,
    KvFind,
    KvGive,
    KvPut,
    Log,
    Partial,
    Publish,
    Reply,
    ReplyPart,
    Sensed,
    Submitted,
    Subscribe,
    Tick,
    Withdrawn,
)
from edge_agent.node.node import Node
from edge_agent.node.report import decision_report, fleet_report
from edge_agent.node.settings import NodeSettings
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervisor import EngineState, EngineSupervisor
from edge_agent.service import notify, watchdog_period_s
from edge_agent.store.blobs import BlobStore
from edge_agent.store.ledger import Ledger
from edge_agent.talk import Talks
from edge_agent.transport.link import Link, Rejected, Will

if TYPE_CHECKING:
    from edge_agent.speaking import Speaker

SOCKET_NAME = "agent.sock"
TICK_S = 0.1
SENSE_S = 2.0
DRAIN_S = 20.0


class Agent:
    """``async with Agent(config) as agent`` brings a board up, ready to serve; leaving drains and takes it down.

    ``board`` stands in for the configured one.  Raises ``ConfigError``, ``RefusedError`` or ``UnavailableError`` on entry for
    what makes serving impossible.
    """

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
        self.say = log or (lambda text: print(text, file=sys.stderr, flush=True))
        self._events: deque[Event] = deque()
        self._pumping = False
        self._heard = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[InferenceResult]] = {}
        self._handles = 0
        self._talks = Talks(self._feed, self._new_handle)
        self._jobs: dict[str, asyncio.Task[Any]] = {}
        """Of language, by key: what can be broken off."""
        self._broken_off: set[str] = set()
        self._kv: dict[str, KvState] = {}
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closers: list[Callable[[], Any]] = []
        self._link: Link | None = None
        self.stop_requested = asyncio.Event()
        self.faulty = False
        self.gateway_port = 0
        """Where the gateway listens; 0 without one."""
        self._broken = False
        """A decision was lost half-way: the node and the ledger may differ, and only a new start makes them agree."""

    async def __aenter__(self) -> Agent:
        try:
            await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        notify("STOPPING=1")
        if kind is None and not self._broken:
            await self._drain()
        await self._close()

    async def submit(self, request: InferenceRequest) -> InferenceResult:
        """Serve one request of a client in this process; the answer is a result, whatever happens."""
        handle = self._new_handle()
        answer: asyncio.Future[InferenceResult] = asyncio.get_running_loop().create_future()
        self._waiting[handle] = answer
        try:
            self._feed(Submitted(request, handle))
            return await answer
        except asyncio.CancelledError:
            self._feed(Abandoned(handle))
            raise
        finally:
            self._waiting.pop(handle, None)

    # the Talker of the doors (gateway.talker)

    def models(self) -> list[str]:
        """The language models that can be asked for here: this board's own first, then those of boards that are there."""
        own = [offer.model for offer in self.node.execution.offers.values() if offer.task == CHAT]
        return own + sorted({offer.model for offer in self.node.offers_elsewhere() if offer.task == CHAT} - set(own))

    async def talk(self, turn: Turn, model: str | None = None) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        """Serve one turn, here or on another board: its parts as they come, then its end.

        Raises ``RefusedError`` for a turn that is at fault, ``UnavailableError`` when no board can serve it now.
        """
        if self.node.draining:
            raise UnavailableError(DRAINING, f"{self.node.board} is being stopped", "ask another board")
        if (model or "") not in ["", *self.models()]:
            raise RefusedError(UNKNOWN_MODEL, model, ", ".join(self.models()) or "none is hosted", "see [models] serve")
        async with aclosing(self._talks.talk(turn, model)) as parts:
            async for part in parts:
                yield part

    async def ready(self) -> str:
        """Why no turn could be served now; empty when one could."""
        if self._broken or self.node.draining:
            return "it is stopping"
        refusals = [why for speaker in self._host.speakers.values() if (why := await speaker.ready())]
        if refusals or not self.models():
            return "; ".join(refusals) or "no language model is hosted here or on a board that is there"
        return ""

    def host_speaker(self, offer: ModelOffer, speaker: Speaker) -> None:
        """Serve a language model that runs already; it is closed with the agent."""
        self._host.speak(offer, speaker)
        self._feed(Hosted(offer))

    def figures(self) -> Iterable[Figure]:
        """What is counted here, for ``/metrics``."""
        execution = self.node.execution
        yield Figure("jobs_running", "jobs that run here", execution.running)
        yield Figure("jobs_waiting", "jobs that wait here", len(execution))
        yield Figure("requests_pending", "requests that came in here and are not answered", len(self.node.router.ingress))
        moved_in, given_up, moved_out = self.node.moves.counts
        yield Figure("sessions_moved_in_total", "sessions that moved here", moved_in, "counter")
        yield Figure("sessions_moved_out_total", "sessions that moved to another board", moved_out, "counter")
        yield Figure("session_moves_given_up_total", "moves here that did not come to their end", given_up, "counter")
        yield Figure("boards_online", "boards that are there, this one included", self.node.online_boards)
        for speaker in self._host.speakers.values():
            yield from speaker.figures()

    async def serve(self) -> None:
        """Serve until ``stop_requested`` is set."""
        notify("READY=1")
        await self.stop_requested.wait()

    # bringing up and taking down

    async def _start(self) -> None:
        config = self.config
        files = [*model_files(config), *language_models(config)]
        folder = private_folder(config)
        self._ledger = Ledger(folder / "ledger.db")
        self._closers.append(self._close_ledger)
        blobs = BlobStore(folder / "models", config.state.cache_bytes)
        signer = signer_of(config)
        settings = BoardSettings(profile=config.board.profile, paced=config.board.paced)
        self.board = self._given_board or open_board(config.board.backend, settings)
        await check_broker(config, self.say)
        self.node = Node(self._node_settings(signer, self.board), self._ledger)
        engine = EngineSettings(
            runtime=config.engine.runtime,
            threads=config.engine.threads,
            memory_bytes=config.engine.memory_bytes,
            max_deaths=config.engine.max_deaths,
        )
        self._supervisor = EngineSupervisor(engine, self.board.delegate(), self.say)
        self._closers.append(self._supervisor.close)
        self._host = Host(config, self.board, blobs, self._supervisor, self.clock, engine, self.say)
        self._closers.append(self._host.close)
        server = LocalServer(folder / SOCKET_NAME, self._handle_call, {TALK: talk_stream(self)})
        await server.start()
        self._closers.append(server.close)
        await self._load_models(files)
        await self._read_sensors()
        self._carry_out(self._decide(lambda: self.node.recover(self.clock.monotonic_us())))
        self._open_link()
        if config.gateway.on:
            gateway = HttpGateway(config.gateway, self, self.say)
            await gateway.start()
            self._closers.append(gateway.close)
            self.gateway_port = gateway.port
            self.say(f"the gateway listens on {config.gateway.host}:{gateway.port}")
        self._spawn(self._tick_for_ever(), "tick")
        self._spawn(self._sense_for_ever(), "sense")

    def _node_settings(self, signer: Signer, board: Board) -> NodeSettings:
        config = self.config
        members = {name: bytes.fromhex(key) for name, key in config.fleet.members.items()}
        if members.setdefault(config.board.id, signer.public_key) != signer.public_key:
            raise ConfigError(
                f"[fleet.members] {config.board.id}",
                "another public key than this board's own",
                signer.public_key.hex(),
                "give the fleet this key, or the board its identity.key back",
            )
        with self._ledger.transaction():
            boot_epoch = self._ledger.increment("boot_epoch")
        info = board.probe()
        return NodeSettings(
            board=config.board.id,
            boot_epoch=boot_epoch,
            signer=signer,
            hardware=getattr(info, "hardware_model", ""),
            emulated=board.emulated,
            fleet=config.fleet.name,
            members=members,
            policy=config.policy,
            queue=config.queue,
        )

    async def _load_models(self, names: list[str]) -> None:
        for name in names:
            try:
                self._feed(Hosted(await self._host.load(name)))
            except SlyError as error:
                self._feed(Withdrawn(name, str(error)))

    def _open_link(self) -> None:
        broker = self.config.broker
        if not broker.host:
            self.say("no [broker] host: this board stands alone")
            return
        from edge_agent.transport.mqtt import MqttLink

        loop = asyncio.get_running_loop()
        self._link = MqttLink(broker_address(self.config), client_id(self.config), loop, mqtt_options(self.config))
        self._link.open(self._feed, Will(self.node.will(), broker.will_delay_s))
        self._closers.append(self._link.close)

    async def _drain(self) -> None:
        self._feed(Drain())
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._until(lambda: self.node.idle)
        if not self.node.idle:
            self.say(f"stopping with requests unanswered after {DRAIN_S:g} s; accepted ones are taken up at the next start")
        if self._link is not None and self._link.up:
            with suppress(UnavailableError):
                self._link.publish(self.node.farewell())

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._closers:
            outcome = self._closers.pop()()
            if asyncio.iscoroutine(outcome):
                await outcome

    def _close_ledger(self) -> None:
        self._closed = True
        self._ledger.close()

    # the work loop

    def _feed(self, event: Event) -> None:
        """Take in an event; decide at once unless a decision is under way."""
        self._events.append(event)
        if self._pumping or self._broken or self._closed:
            return
        self._pumping = self._broken = True
        try:
            while self._events:
                self._carry_out(self._decide(self._handle_waiting))
            self._broken = False
        finally:
            self._pumping = False
            self._heard.set()
            if self._broken:
                self.say("a decision could not be made durable: stopping, so that the next start takes up what the ledger holds")
                self.faulty = True
                self.stop_requested.set()

    def _handle_waiting(self) -> list[Effect]:
        effects: list[Effect] = []
        now_us = self.clock.monotonic_us()
        while self._events:
            effects += self.node.handle(self._events.popleft(), now_us)
        return effects

    def _decide(self, step: Callable[[], list[Effect]]) -> list[Effect]:
        with self._ledger.transaction():
            return step()

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Execute():
                    self._begin(effect)
                case Cancel(key):
                    if key in self._jobs:
                        self._broken_off.add(key)
                        self._jobs[key].cancel()
                case KvFind() | KvPut() | KvGive():
                    self._spawn(self._move(effect), "a session moves")
                case ReplyPart(handle, part):
                    self._talks.part(handle, part)
                case Reply(handle, result):
                    answer = self._waiting.get(handle)
                    if answer is not None and not answer.done():
                        answer.set_result(result)
                    self._talks.answer(handle, result)
                case Publish() | Subscribe() | Acknowledge():
                    self._use_link(effect)
                case Log(text):
                    self.say(text)
                case _:
                    assert_never(effect)

    def _use_link(self, effect: Publish | Subscribe | Acknowledge) -> None:
        if self._link is None:
            return
        try:
            match effect:
                case Publish(message, ticket):
                    self._link.publish(message, ticket)
                case Subscribe(topic_filter):
                    self._link.subscribe(topic_filter)
                case Acknowledge(token):
                    self._link.acknowledge(token)
        except (UnavailableError, RefusedError) as error:
            if isinstance(effect, Publish):
                self._feed(Rejected(str(error), effect.ticket))
            else:
                self.say(f"not sent: {error}")

    async def _execute(self, effect: Execute) -> None:
        result = await self._host.execute(effect, lambda part: self._feed(Partial(effect.key, part)))
        if effect.request.task != CHAT and self._supervisor.state(effect.model) is EngineState.QUARANTINED:
            self._feed(Withdrawn(effect.model, result.reason))
        self._feed(Executed(effect.key, result))
        if effect.request.task == CHAT:
            self._tell_kv()

    async def _move(self, effect: KvFind | KvPut | KvGive) -> None:
        match effect:
            case KvFind():
                self._feed(await self._host.find(effect))
            case KvPut():
                self._feed(await self._host.put(effect))
            case KvGive():
                self._feed(await self._host.give(effect))
        self._tell_kv()

    def _begin(self, job: Execute) -> None:
        def forget(task: asyncio.Task[Any]) -> None:
            self._jobs.pop(job.key, None)
            if job.key in self._broken_off:
                self._broken_off.discard(job.key)
                if task.cancelled():
                    reason = "nobody waits for it any more"
                    result = failure(job.request.request_id, Status.FAILED, self.config.board.id, reason, job.model)
                    self._feed(Executed(job.key, result))

        task = self._spawn(self._execute(job), f"job {job.key}")
        if job.request.task == CHAT:
            self._jobs[job.key] = task
            task.add_done_callback(forget)

    async def _tick_for_ever(self) -> None:
        watchdog_s = watchdog_period_s()
        fed_us = 0
        while True:
            self._feed(Tick())
            now_us = self.clock.monotonic_us()
            if watchdog_s is not None and now_us - fed_us >= watchdog_s * 1e6:
                notify("WATCHDOG=1")
                fed_us = now_us
            await asyncio.sleep(TICK_S if not self.node.idle else max(TICK_S, min(1.0, watchdog_s or 1.0)))

    async def _sense_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SENSE_S)
            await self._read_sensors()

    async def _read_sensors(self) -> None:
        now_us = self.clock.monotonic_us()
        if self.board.emulated:
            sensors = self.board.read_sensors(now_us)
        else:
            sensors = await asyncio.to_thread(self.board.read_sensors, now_us)
        self._feed(Sensed(sensors.temperature_mdegc, sensors.trip_mdegc))
        self._tell_kv()

    def _tell_kv(self) -> None:
        """The language models' word on their KV, when it has changed."""
        for model, speaker in self._host.speakers.items():
            state = speaker.kv_state()
            if state is not None and state != self._kv.get(model):
                self._kv[model] = state
                self._feed(KvChanged(state))

    def _new_handle(self) -> int:
        self._handles += 1
        return self._handles

    def _spawn(self, work: Any, name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.say(f"{task.get_name()} failed: {error!r}; stopping so that the service manager starts this agent anew")
            self.faulty = True
            self.stop_requested.set()

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Return when ``holds()``, which is looked at after every decision."""
        while not holds():
            self._heard.clear()
            await self._heard.wait()

    # clients on the socket

    async def _handle_call(self, verb: str, body: object) -> object:
        match verb, body:
            case "infer", bytes():
                result = await self.submit(wire.decode_request(body, wire.LOCAL))
                return wire.encode_result(result, wire.LOCAL)
            case "explain", str():
                decision = self.node.router.decisions.get(checked(REQUEST_ID, "request id", body))
                if decision is None:
                    raise RefusedError(f"request {body}", "an id that is not remembered here", "one of the last requests")
                return decision_report(decision)
            case "status", int() | None:
                await self._until(lambda: self.node.online_boards >= (body or 1))
                return fleet_report(self.node, self.clock.monotonic_us())
            case "sessions", None:
                return [list(kept) for speaker in self._host.speakers.values() for kept in speaker.sessions()]
            case "drop", str():
                if not any([await speaker.drop(body) for speaker in self._host.speakers.values()]):
                    raise RefusedError("session", body, "one that is kept here", "see: sly sessions list")
                self._tell_kv()
                return None
        raise RefusedError("call", verb, "infer, explain, status, talk, sessions or drop")


async def serve(config: AgentConfig) -> int:
    """Run an agent until SIGTERM or SIGINT; 0 after a clean drain, 1 if it stopped because of a fault of its own."""
    async with Agent(config) as agent:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, agent.stop_requested.set)
        agent.say(f"{config.board.id} is ready on {config.state.folder / SOCKET_NAME}")
        await agent.serve()
        return 1 if agent.faulty else 0
