"""An operator's folder as ``sly fleet init`` makes it, the real Mosquitto that runs by it, and clients with its certificates."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from edge_agent.steward.folder import FleetSettings, OperatorFolder
from edge_agent.transport.endpoint import BrokerAddress, MqttOptions
from edge_agent.transport.link import Delivered, LinkDown, LinkEvent, LinkUp, Message, Published, Rejected, Will
from edge_agent.transport.mqtt import MqttLink
from edge_agent.transport.tls import TlsFiles
from tests.brokers import START_LIMIT_S, free_port, wait_until_accepting
from tests.needs import needs_mosquitto

LIMIT_S = 60.0
HOST = "127.0.0.1"


def new_fleet(path: Path, name: str = "home", operator: str = "ann") -> OperatorFolder:
    return OperatorFolder.create(path, FleetSettings(name, operator, HOST, free_port(), (HOST,)), root_keys=1, threshold=1)


class FleetBroker:
    """The Mosquitto of a folder, started as ``sly fleet broker`` says."""

    def __init__(self, folder: OperatorFolder) -> None:
        self._path, self._folder = needs_mosquitto(), folder
        self.log = folder.broker_folder / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def restart(self) -> None:
        """SIGTERM, and again as before."""
        self.stop()
        self.start()

    def settled(self) -> None:
        """It has done what the signals before told it: a connection that was refused, or made, after them says so."""
        with contextlib.suppress(OSError), socket.create_connection((HOST, self._folder.settings.port), START_LIMIT_S) as plain:
            plain.sendall(b"no TLS")
            plain.recv(1)

    def start(self) -> None:
        with self.log.open("ab") as log:
            configuration = str(self._folder.broker_folder / "mosquitto.conf")
            self._process = subprocess.Popen([self._path, "-c", configuration], stdout=log, stderr=log)
        wait_until_accepting(self._folder.settings.port, self._process)

    def freeze(self) -> None:
        """It reads and answers nothing any more, and its connections stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(START_LIMIT_S)
            self._process = None


@contextlib.contextmanager
def broker_of(folder: OperatorFolder, broker: FleetBroker | None = None) -> Iterator[FleetBroker]:
    broker = broker or FleetBroker(folder)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def address_of(folder: OperatorFolder, board: str) -> BrokerAddress:
    """The broker, for a board with what its enrolment wrote."""
    target = folder.board_folder(board)
    return BrokerAddress(HOST, folder.settings.port, TlsFiles(target / "ca.pem", target / "client.pem", target / "client.key"))


def address_as(folder: OperatorFolder, name: str) -> BrokerAddress:
    """The broker, for a client that its CA calls ``name``: a board's id, or ``operator.`` and an operator's name."""
    target = folder.folder.parent / "clients"
    target.mkdir(exist_ok=True)
    issued = folder.authority.issue_client(name)
    certificate, key = target / f"{name}.pem", target / f"{name}.key"
    certificate.write_bytes(issued.certificate)
    key.write_bytes(issued.key)
    return BrokerAddress(HOST, folder.settings.port, TlsFiles(folder.folder / "ca" / "ca.pem", certificate, key))


class Client:
    """A link whose events are kept; every wait is for an event."""

    def __init__(self, address: BrokerAddress, client_id: str, will: Will | None = None) -> None:
        self.events: list[LinkEvent] = []
        self._news = asyncio.Event()
        self._ticket = 0
        self.link = MqttLink(address, client_id, asyncio.get_running_loop(), MqttOptions(session_expiry_s=0))
        self.link.open(self._hear, will)

    def _hear(self, event: LinkEvent) -> None:
        self.events.append(event)
        if isinstance(event, Delivered):
            self.link.acknowledge(event.token)
        self._news.set()

    async def until(self, predicate: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not predicate():
                self._news.clear()
                await self._news.wait()

    async def up(self) -> Client:
        await self.until(lambda: any(isinstance(each, LinkUp) for each in self.events))
        return self

    @property
    def topics(self) -> list[str]:
        return [each.message.topic for each in self.events if isinstance(each, Delivered)]

    @property
    def downs(self) -> list[LinkDown]:
        return [each for each in self.events if isinstance(each, LinkDown)]

    async def says(self, message: Message) -> str:
        """The broker's reason against it; empty if it took the message."""
        self._ticket += 1
        ticket = self._ticket
        self.link.publish(message, ticket)

        def answers() -> list[Published | Rejected]:
            return [each for each in self.events if isinstance(each, Published | Rejected) and each.ticket == ticket]

        await self.until(lambda: bool(answers()))
        answer = answers()[0]
        return answer.reason if isinstance(answer, Rejected) else ""


@contextlib.asynccontextmanager
async def clients(folder: OperatorFolder, *names: str) -> AsyncIterator[list[Client]]:
    """Connected clients that their certificates call so, subscribed to everything there is."""
    opened = [await Client(address_as(folder, name), f"{name.replace('.', '-')}-{at}").up() for at, name in enumerate(names)]
    for each in opened:
        each.link.subscribe("#")
        await each.says(Message("in/order", b"the answer to this comes after that to the subscription"))
    try:
        yield opened
    finally:
        for each in opened:
            each.link.close()
