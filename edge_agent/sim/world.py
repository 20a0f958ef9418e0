"""The loopback network of a simulated fleet: a broker whose wires differ by board, and links that take time for their bytes.

Rules: as for the tests' broker, everything is drawn from one seed and happens in timers; a board that is cut off may be so in one
way only; what a board sends waits for what it sent before (its way up has ``bytes_per_ms``), ways down are free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from edge_agent.core.clock import TimedClock
from edge_agent.sim.scenario import LinkPlan, Outage
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.faults import Delay, Faults, Partition, Way, Wire
from edge_agent.transport.link import Message, Published
from edge_agent.transport.loopback import LoopbackLink
from edge_agent.transport.loopback_broker import LoopbackBroker, LoopbackOptions

LINK = LoopbackOptions(
    keepalive_us=3_000_000,
    connect_timeout_us=2_000_000,
    session_expiry_us=60_000_000,
    backoff=BackoffLimits(base_us=100_000, cap_us=2_000_000, sound_us=1_000_000),
)
WAYS: Mapping[str, frozenset[Way]] = {
    "both": frozenset(Way),
    "to_broker": frozenset({Way.TO_BROKER}),
    "from_broker": frozenset({Way.FROM_BROKER}),
}


class CutWire(Wire):
    """A wire of which several boards may be cut off at once, each in its own ways."""

    def __init__(self, clock: TimedClock, seed: int | str, faults: Faults) -> None:
        super().__init__(clock, seed, faults)
        self.cut: dict[str, frozenset[Way]] = {}

    def cuts(self, link: str, way: Way | None = None) -> bool:
        ways = self.cut.get(link, frozenset())
        return way in ways if way else bool(ways)


class Network:
    """The broker, and which boards reach it."""

    def __init__(self, clock: TimedClock, seed: int | str, plan: LinkPlan) -> None:
        faults = Faults(Delay(plan.delay_us, plan.jitter_us), loss_permille=plan.loss_permille)
        self.broker = LoopbackBroker(clock, seed, faults)
        self._wire = self.broker.wire = CutWire(clock, seed, faults)
        self._outages: list[Outage] = []
        self._others: dict[bytes, tuple[bytes, frozenset[str]]] = {}

    def show_another(self, payload: bytes, other: bytes, misled: frozenset[str]) -> None:
        """A broker in league with a board: in place of ``payload`` those who are ``misled`` get ``other``."""
        self._others[payload] = other, misled

    def shown(self, client: str, message: Message) -> Message:
        """What a client gets of a message."""
        if not self._others or (lie := self._others.get(bytes(message.payload))) is None:
            return message
        return replace(message, payload=lie[0]) if client in lie[1] else message

    def begin(self, outage: Outage) -> None:
        if outage.kind == "broker":
            self.broker.stop()
        else:
            self._outages.append(outage)
            self._cut()

    def end(self, outage: Outage) -> None:
        if outage.kind == "broker":
            self.broker.start(keep_sessions=not outage.forgets, keep_retained=not outage.forgets)
        else:
            self._outages.remove(outage)
            self._cut()

    def _cut(self) -> None:
        cut: dict[str, frozenset[Way]] = {}
        for outage in self._outages:
            for board in outage.boards:
                cut[board] = cut.get(board, frozenset()) | WAYS[outage.way]
        self._wire.cut = cut
        self.broker.partition(Partition(frozenset(cut)))


class SimLink(LoopbackLink):
    """A link whose way up has a speed. ``tongue``: what becomes of messages on their way out; what it keeps back counts as
    sent."""

    def __init__(
        self,
        network: Network,
        client_id: str,
        plan: LinkPlan,
        after: Callable[[int, Callable[[], object]], object],
        tongue: Callable[[Message], Message | None] | None = None,
    ) -> None:
        super().__init__(network.broker, client_id, LINK)
        self._bytes_per_ms, self._after, self._clock = plan.bytes_per_ms, after, network.broker.clock
        self._free_us = 0
        self._network, self._tongue = network, tongue

    def take(self, connection: int, packet_id: int, message: Message) -> bool:
        return super().take(connection, packet_id, self._network.shown(self.client_id, message))

    def _publish(self, message: Message, ticket: int) -> None:
        said = self._tongue(message) if self._tongue else message
        if said is not None:
            self._send(said, ticket)
        elif ticket:
            connection = self._connection
            self._after(0, lambda: self._emit(Published(ticket)) if connection == self._connection else None)

    def _send(self, message: Message, ticket: int) -> None:
        now_us, connection = self._clock.monotonic_us(), self._connection
        self._free_us = max(now_us, self._free_us) + len(message.payload) * 1000 // self._bytes_per_ms
        if self._free_us <= now_us:
            super()._publish(message, ticket)
            return
        send = super()._publish
        self._after(self._free_us - now_us, lambda: send(message, ticket) if connection == self._connection else None)
