"""One way to drive a link on every backend: real brokers with an asyncio loop, the loopback with virtual time.

A test says what it waits for; on a real broker the loop runs until an event makes it true, on the loopback the virtual clock
does.  ``forgets`` and ``silent`` say what a backend cannot do, so that a test expects exactly that instead of skipping.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from edge_agent.core.clock import VirtualClock
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.embedded import EmbeddedBroker
from edge_agent.transport.link import Delivered, Link, LinkDown, LinkEvent, LinkUp, Message, Published, Will
from edge_agent.transport.loopback import LoopbackBroker, LoopbackLink, Partition
from edge_agent.transport.mqtt import BrokerAddress, MqttLink, MqttOptions
from tests.brokers import Mosquitto, Relay

WAIT_LIMIT_S = 60.0
FENCE_TICKET = 10_000
QUICK = MqttOptions(backoff=BackoffLimits(base_us=10_000, cap_us=100_000))


def _is_fence(event: Delivered) -> bool:
    return event.message.topic.startswith("fence/")


class Station:
    """A link with everything that it said."""

    def __init__(self, link: Link, happened: Callable[[], None]) -> None:
        self.link, self._happened = link, happened
        self.events: list[LinkEvent] = []
        self.threads: set[int] = set()

    def deliver(self, event: LinkEvent) -> None:
        self.events.append(event)
        if isinstance(event, Delivered) and _is_fence(event):
            self.link.acknowledge(event.token)
        self.threads.add(threading.get_ident())
        self._happened()

    @property
    def ups(self) -> list[LinkUp]:
        return [event for event in self.events if isinstance(event, LinkUp)]

    @property
    def downs(self) -> list[LinkDown]:
        return [event for event in self.events if isinstance(event, LinkDown)]

    @property
    def delivered(self) -> list[Delivered]:
        return [event for event in self.events if isinstance(event, Delivered) and not _is_fence(event)]

    @property
    def messages(self) -> list[Message]:
        return [event.message for event in self.delivered]

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]

    @property
    def tickets(self) -> list[int]:
        return [event.ticket for event in self.events if isinstance(event, Published) and event.ticket != FENCE_TICKET]


class World(ABC):
    forgets = ""
    """Why this broker does not know sessions and retained messages any more after it was stopped and started."""
    ignores_receive_maximum = ""
    """Why more messages come unacknowledged than the client asked for."""
    raises_qos = ""
    """Why a QoS 0 publication comes with the QoS of the subscription, which MQTT 5 (section 3.8.4) forbids."""

    def __init__(self) -> None:
        self.stations: list[Station] = []

    def station(self, name: str, will: Will | None = None) -> Station:
        """A link that was opened and is up."""
        station = self.closed_station(name)
        station.link.open(station.deliver, will)
        self.wait(lambda: station.link.up, f"{name} is up")
        return station

    def closed_station(self, name: str) -> Station:
        station = Station(self._link(name), self.happened)
        self.stations.append(station)
        return station

    def subscribed(self, name: str, topic_filter: str, qos: int = 1) -> Station:
        """A station whose subscription the broker has: a message of its own has come back."""
        station = self.station(name)
        station.link.subscribe(topic_filter, qos)
        self.fence(station)
        return station

    def fence(self, station: Station) -> None:
        """Everything that the broker did for the station until now has arrived: a later message of its own came back."""
        topic = f"fence/{id(station)}/{len(station.events)}"
        station.link.subscribe(topic, 1)
        station.link.publish(Message(topic, b""), ticket=FENCE_TICKET)
        self.wait(lambda: any(isinstance(e, Delivered) and e.message.topic == topic for e in station.events), "a fence")

    def close(self) -> None:
        for station in self.stations:
            station.link.close()

    @abstractmethod
    def happened(self) -> None:
        """Called at every event."""

    @abstractmethod
    def _link(self, name: str) -> Link: ...

    @abstractmethod
    def wait(self, predicate: Callable[[], object], what: str) -> None:
        """Let the world run until the predicate holds; fail when it takes too long."""

    @abstractmethod
    def cut(self, name: str) -> None:
        """The connection breaks and cannot be made again until ``mend``."""

    @abstractmethod
    def mend(self, name: str) -> None: ...

    @abstractmethod
    def stop_broker(self) -> None: ...

    @abstractmethod
    def start_broker(self) -> None: ...


class LoopbackWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.broker = LoopbackBroker(self.clock, seed=1)
        self._cut: set[str] = set()

    def _link(self, name: str) -> Link:
        return LoopbackLink(self.broker, name)

    def happened(self) -> None:
        """The predicate is looked at after every timer anyway."""

    def wait(self, predicate: Callable[[], object], what: str) -> None:
        end_us = self.clock.monotonic_us() + 3_600_000_000
        while not predicate():
            assert self.clock.run_next() and self.clock.monotonic_us() < end_us, f"never: {what}"

    def cut(self, name: str) -> None:
        self._cut.add(name)
        self.broker.partition(Partition(frozenset(self._cut)))

    def mend(self, name: str) -> None:
        self._cut.discard(name)
        self.broker.partition(Partition(frozenset(self._cut)))

    def stop_broker(self) -> None:
        self.broker.stop()

    def start_broker(self) -> None:
        self.broker.start()


class MqttWorld(World):
    """Links to a real broker on ``port``, each through a relay of its own."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self._event = asyncio.Event()
        self._port = port
        self._relays: dict[str, Relay] = {}

    def _link(self, name: str) -> Link:
        relay = self._relays.get(name) or self._relays.setdefault(name, Relay(self._port))
        return MqttLink(BrokerAddress("127.0.0.1", relay.port), name, self.loop, QUICK, seed=name)

    def happened(self) -> None:
        self._event.set()

    def wait(self, predicate: Callable[[], object], what: str) -> None:
        async def until() -> None:
            while not predicate():
                self._event.clear()
                await self._event.wait()

        try:
            self.loop.run_until_complete(asyncio.wait_for(until(), WAIT_LIMIT_S))
        except TimeoutError:
            raise AssertionError(f"not within {WAIT_LIMIT_S} s: {what}") from None

    def cut(self, name: str) -> None:
        self._relays[name].cut()

    def mend(self, name: str) -> None:
        self._relays[name].mend()

    def close(self) -> None:
        super().close()
        for relay in self._relays.values():
            relay.close()
        self.loop.close()


class MosquittoWorld(MqttWorld):
    def __init__(self, broker: Mosquitto) -> None:
        super().__init__(broker.port)
        self._broker = broker

    def stop_broker(self) -> None:
        self._broker.stop()

    def start_broker(self) -> None:
        self._broker.start()


class EmbeddedWorld(MqttWorld):
    forgets = "rumqttd keeps everything in memory"
    ignores_receive_maximum = "rumqttd has up to 100 messages under way, always"
    raises_qos = "rumqttd forwards with the subscription's QoS"

    def __init__(self, broker: EmbeddedBroker) -> None:
        super().__init__(broker.port)
        self._broker = broker

    def stop_broker(self) -> None:
        self._broker.kill()

    def start_broker(self) -> None:
        self._broker.start()
