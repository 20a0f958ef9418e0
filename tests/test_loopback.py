"""The loopback network: a seed reproduces a run, faults do what they say, and the embedded broker's own life."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.core.clock import VirtualClock
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.transport import embedded
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.link import MAX_OWED_MESSAGES, Delivered, LinkDown, LinkEvent, LinkUp, Message, Will
from edge_agent.transport.loopback import (
    Delay,
    Faults,
    LoopbackBroker,
    LoopbackLink,
    LoopbackOptions,
    Partition,
    Way,
)
from edge_agent.transport.owed import Owed
from tests.brokers import embedded_broker, free_port
from tests.worlds import Station

SECOND = 1_000_000
ROUGH = Faults(Delay(500, 20_000, 20, 300_000), loss_permille=200, duplicate_permille=100, reorder_permille=200, retry_us=200_000)


class Network:
    def __init__(self, seed: int = 1, faults: Faults | None = None) -> None:
        self.clock = VirtualClock()
        self.broker = LoopbackBroker(self.clock, seed, faults)

    def station(self, name: str, will: Will | None = None, options: LoopbackOptions | None = None) -> Station:
        station = Station(LoopbackLink(self.broker, name, options or LoopbackOptions()), lambda: None)
        station.link.open(station.deliver, will)
        self.until(lambda: station.link.up)
        return station

    def subscribed(self, name: str, topic_filter: str = "#") -> Station:
        station = self.station(name)
        station.link.subscribe(topic_filter)
        self.clock.advance(SECOND)
        return station

    def until(self, predicate: Callable[[], object]) -> None:
        end_us = self.clock.monotonic_us() + 3600 * SECOND
        while not predicate():
            assert self.clock.run_next() and self.clock.monotonic_us() < end_us


def rough_run(seed: int) -> list[tuple[int, str, LinkEvent]]:
    """Three stations chatter through a rough network with a partition and a broker restart; all that was said, and when."""
    network = Network(seed, ROUGH)
    said: list[tuple[int, str, LinkEvent]] = []
    links = {name: LoopbackLink(network.broker, name) for name in "abc"}

    def open_link(name: str) -> None:
        link, sent = links[name], [0]

        def deliver(event: LinkEvent) -> None:
            said.append((network.clock.monotonic_us(), name, event))
            if isinstance(event, LinkUp):
                link.subscribe("talk/#")
            elif isinstance(event, Delivered):
                link.acknowledge(event.token)

        def talk() -> None:
            sent[0] += 1
            if link.up:
                link.publish(Message(f"talk/{name}", b"%d" % sent[0], qos=sent[0] % 2), sent[0])
            network.clock.call_at(network.clock.monotonic_us() + 500_000, talk)

        link.open(deliver, Will(Message(f"talk/{name}", b"gone")))
        talk()

    for name in links:
        open_link(name)
    network.clock.call_at(20 * SECOND, lambda: network.broker.partition(Partition(frozenset("ab"), frozenset({Way.FROM_BROKER}))))
    network.clock.call_at(60 * SECOND, network.broker.heal)
    network.clock.call_at(80 * SECOND, network.broker.stop)
    network.clock.call_at(90 * SECOND, lambda: network.broker.start(keep_sessions=seed % 2 == 0))
    network.clock.run_until(150 * SECOND)
    return said


def test_a_seed_reproduces_a_rough_run_to_the_microsecond_and_another_seed_does_not() -> None:
    assert rough_run(7) == rough_run(7)
    assert rough_run(7) != rough_run(8)


@pytest.mark.parametrize("seed", range(10))
def test_after_faults_end_every_link_is_up_and_qos_1_flows_again(seed: int) -> None:
    said = rough_run(seed)
    for name in "abc":
        states = [event for _, who, event in said if who == name and isinstance(event, LinkUp | LinkDown)]
        assert isinstance(states[-1], LinkUp)
        late = [event for time_us, who, event in said if who == name and time_us > 140 * SECOND]
        assert sum(isinstance(event, Delivered) for event in late) > 20


def test_qos_1_arrives_at_least_once_through_a_lossy_network_and_qos_0_does_not_always() -> None:
    network = Network(3, ROUGH)
    receiver, sender = network.subscribed("r"), network.station("s")
    for number in range(200):
        for qos in (0, 1):
            sender.link.publish(Message(f"q{qos}", b"%d" % number, qos=qos), number)
        network.clock.advance(100_000)
        for delivered in receiver.delivered[-8:]:
            receiver.link.acknowledge(delivered.token)
    network.until(lambda: len({m.payload for m in receiver.messages if m.qos}) == 200 and len(sender.tickets) == 200)
    counts = {qos: Counter(m.payload for m in receiver.messages if m.qos == qos) for qos in (0, 1)}
    assert len(counts[1]) == 200
    assert max(counts[1].values()) > 1, "duplicates happen"
    assert 80 < len(counts[0]) < 180, "and losses"
    assert sorted(sender.tickets) == list(range(200)), "each ticket once"
    order = [int(m.payload) for m in receiver.messages if m.qos]
    assert order != sorted(order), "and reordering"


def test_without_faults_everything_arrives_once_in_order_after_exactly_two_delays() -> None:
    network = Network(1, Faults(Delay(least_us=3_000)))
    receiver, sender = network.subscribed("r"), network.station("s")
    began_us = network.clock.monotonic_us()
    for number in range(20):
        sender.link.publish(Message("a", b"%d" % number), number)
    network.until(lambda: len(receiver.messages) == 20)
    assert network.clock.monotonic_us() - began_us == 6_000
    assert receiver.payloads == [b"%d" % number for number in range(20)]
    network.clock.advance(60 * SECOND)
    assert len(receiver.messages) == 20


def test_duplication_doubles_a_message_on_each_of_its_two_ways() -> None:
    network = Network(1)
    receiver, sender = network.subscribed("r"), network.station("s")
    network.broker.wire.faults = Faults(duplicate_permille=1000)
    sender.link.publish(Message("a", b"", qos=0))
    network.clock.advance(SECOND)
    assert len(receiver.messages) == 4


def test_a_board_that_returns_within_the_will_delay_takes_its_will_back() -> None:
    network = Network()
    watcher = network.subscribed("watcher", "will/#")
    board = network.station("board", Will(Message("will/board", b"offline"), delay_s=10))
    assert isinstance(board.link, LoopbackLink)
    board.link.crash()
    network.clock.advance(5 * SECOND)
    assert network.station("board").ups == [LinkUp(session_present=True)]
    network.clock.advance(60 * SECOND)
    assert watcher.messages == []


def test_what_was_under_way_on_an_ended_connection_is_not_delivered_on_the_next() -> None:
    network = Network()
    board = network.subscribed("board", "a")
    network.broker.wire.faults = Faults(Delay(least_us=100_000))
    board.link.publish(Message("a", b"under way", qos=0))
    network.clock.advance(150_000)
    board.link.close()
    network.broker.wire.faults = Faults(Delay(least_us=0))
    board.link.open(board.deliver)
    network.clock.advance(60 * SECOND)
    assert len(board.ups) == 2
    assert board.messages == []


def test_jitter_alone_does_not_reorder_as_tcp_does_not() -> None:
    network = Network(5, Faults(Delay(1_000, 50_000)))
    receiver, sender = network.subscribed("r"), network.station("s")
    for number in range(30):
        sender.link.publish(Message("a", b"%d" % number), number)
    network.until(lambda: len(receiver.messages) == len(sender.tickets) == 30)
    assert receiver.payloads == [b"%d" % number for number in range(30)]
    assert sender.tickets == list(range(30))


@pytest.mark.parametrize("ways", [frozenset(Way), frozenset({Way.TO_BROKER}), frozenset({Way.FROM_BROKER})])
def test_a_partition_is_noticed_by_both_sides_and_heals(ways: frozenset[Way]) -> None:
    network = Network()
    watcher = network.subscribed("watcher", "will/#")
    board = network.station("board", Will(Message("will/board", b"offline")))
    network.broker.partition(Partition(frozenset({"board"}), ways))
    network.clock.advance(25 * SECOND)
    assert "keepalive" in board.downs[0].reason
    assert watcher.payloads[:1] == [b"offline"]
    assert not board.link.up
    assert watcher.link.up
    network.broker.heal()
    network.until(lambda: board.link.up)
    network.clock.advance(60 * SECOND)
    assert board.link.up


def test_a_partition_that_heals_within_the_keepalive_time_breaks_nothing_and_loses_no_qos_1() -> None:
    network = Network()
    receiver, sender = network.subscribed("r"), network.station("s")
    network.broker.partition(Partition(frozenset("rs")))
    sender.link.publish(Message("a", b"through"), 1)
    network.clock.advance(10 * SECOND)
    assert receiver.messages == []
    network.broker.heal()
    network.until(lambda: receiver.messages and sender.tickets)
    network.clock.advance(60 * SECOND)
    assert receiver.payloads == [b"through"]
    assert receiver.downs == sender.downs == []


def test_a_second_partition_starts_the_keepalive_count_anew() -> None:
    network = Network()
    board = network.station("board")
    cut = Partition(frozenset({"board"}))
    network.broker.partition(cut)
    network.clock.advance(10 * SECOND)
    network.broker.heal()
    network.broker.partition(cut)
    network.clock.advance(10 * SECOND)
    assert board.downs == []
    network.clock.advance(6 * SECOND)
    assert len(board.downs) == 1


@pytest.mark.parametrize(("power_cut", "latest_us"), [(False, SECOND), (True, 24 * SECOND)])
def test_a_crash_sends_the_will_at_once_and_a_power_cut_after_the_silence(power_cut: bool, latest_us: int) -> None:
    network = Network()
    watcher = network.subscribed("watcher", "will/#")
    board = network.station("board", Will(Message("will/board", b"offline")))
    assert isinstance(board.link, LoopbackLink)
    before, said = network.clock.monotonic_us(), len(board.events)
    board.link.crash(power_cut)
    network.until(lambda: watcher.messages)
    assert network.clock.monotonic_us() - before <= latest_us
    assert (network.clock.monotonic_us() - before > 20 * SECOND) is power_cut
    network.clock.advance(60 * SECOND)
    assert len(board.events) == said, "the dead say nothing"


@pytest.mark.parametrize("keep", [True, False])
def test_a_broker_restart_keeps_or_loses_sessions_and_retained_messages_as_told(keep: bool) -> None:
    network = Network()
    station = network.subscribed("s", "mine/#")
    station.link.publish(Message("state", b"1", retain=True), 1)
    network.clock.advance(SECOND)
    network.broker.stop()
    network.until(lambda: station.downs)
    network.broker.start(keep_sessions=keep, keep_retained=keep)
    network.until(lambda: station.link.up)
    assert station.ups[-1].session_present is keep
    assert network.subscribed("late", "state").payloads == ([b"1"] if keep else [])


def test_a_session_expires_after_its_time_and_not_before() -> None:
    options = LoopbackOptions(session_expiry_us=30 * SECOND)
    for away_us, present in ((29 * SECOND, True), (31 * SECOND, False)):
        network = Network()
        board = network.station("board", options=options)
        board.link.close()
        network.clock.advance(away_us)
        assert network.station("board", options=options).ups[-1].session_present is present


def test_a_will_with_delay_comes_when_the_session_ends_if_that_is_earlier() -> None:
    network = Network()
    watcher = network.subscribed("watcher", "will/#")
    options = LoopbackOptions(session_expiry_us=5 * SECOND)
    board = network.station("board", Will(Message("will/board", b"offline"), delay_s=60), options)
    assert isinstance(board.link, LoopbackLink)
    board.link.crash()
    network.clock.advance(4 * SECOND)
    assert watcher.messages == []
    network.clock.advance(2 * SECOND)
    assert watcher.payloads == [b"offline"]


def test_an_expiring_message_says_what_is_left_of_it_and_vanishes_at_its_end() -> None:
    network = Network()
    sender = network.station("s")
    sender.link.publish(Message("state", b"short", retain=True, expiry_s=10), 1)
    network.clock.advance(4 * SECOND)
    assert network.subscribed("early", "state").messages == [Message("state", b"short", retain=True, expiry_s=6)]
    network.clock.advance(6 * SECOND)
    assert network.subscribed("late", "state").messages == []


def test_two_links_with_one_client_id_take_each_other_over_ever_more_slowly() -> None:
    network = Network()
    options = LoopbackOptions(backoff=BackoffLimits(base_us=100_000, cap_us=30 * SECOND))
    twins = [network.station("twin", options=options) for _ in range(2)]
    network.clock.advance(600 * SECOND)
    takeovers = [down for twin in twins for down in twin.downs if "session taken over" in down.reason]
    assert 4 < len(takeovers) < 120, "600 s of a tight loop would be hundreds of thousands"


def test_faults_out_of_range_are_refused() -> None:
    for name, wrong in (("loss_permille", 1000), ("duplicate_permille", -1), ("reorder_permille", 1001), ("retry_us", 0)):
        with pytest.raises(RefusedError, match=name):
            replace(Faults(), **{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(RefusedError):
        Delay(least_us=-1)


def test_timers_run_in_the_order_of_their_time_then_of_their_setting_and_a_cancelled_one_does_not() -> None:
    clock, ran = VirtualClock(), []
    for name, time_us in [("c", 30), ("a", 10), ("b1", 20), ("b2", 20), ("x", 15), ("late", 40)]:
        timer = clock.call_at(time_us, lambda name=name: ran.append((name, clock.monotonic_us())))  # type: ignore[misc]
        if name == "x":
            timer.cancel()
            timer.cancel()
    clock.run_until(30)
    assert ran == [("a", 10), ("b1", 20), ("b2", 20), ("c", 30)]
    assert clock.next_timer_us() == 40
    clock.advance(5)
    clock.call_at(0, lambda: ran.append(("past", clock.monotonic_us())))
    assert clock.run_next()
    assert ran[-1] == ("past", 35)
    assert clock.run_next()
    assert ran[-1] == ("late", 40)
    assert not clock.run_next()
    with pytest.raises(ValueError, match="does not go back"):
        clock.run_until(39)
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)


def test_acknowledgements_are_released_in_the_order_of_delivery_and_stale_tokens_change_nothing() -> None:
    owed, other = Owed(1), Owed(2)
    one, two, three = (owed.deliver(packet_id) for packet_id in (11, 12, 13))
    assert owed.deliver(12) == two
    assert owed.acknowledge(three) == []
    assert owed.acknowledge(two) == []
    assert owed.acknowledge(one) == [11, 12, 13]
    assert owed.acknowledge(one) == []
    assert owed.acknowledge(other.deliver(11)) == []
    again = owed.deliver(11)
    assert again not in (one, two, three)
    assert owed.acknowledge(one) == []
    assert len(owed) == 1


def test_a_route_that_was_used_is_forgotten_when_its_subscription_is_taken_back() -> None:
    network = Network()
    receiver, sender = network.subscribed("r", "a"), network.station("s")
    sender.link.publish(Message("a", b"wanted"))
    network.until(lambda: receiver.messages)
    receiver.link.unsubscribe("a")
    network.clock.advance(SECOND)
    sender.link.publish(Message("a", b"not any more"))
    network.clock.advance(SECOND)
    assert receiver.payloads == [b"wanted"]


def test_a_delivery_without_faults_takes_a_handful_of_timers() -> None:
    network = Network()
    receiver, sender = network.subscribed("r"), network.station("s")
    timers = 0
    for number in range(1000):
        sender.link.publish(Message("a", b""), number)
        while network.clock.run_next() and len(receiver.messages) <= number:
            timers += 1
        receiver.link.acknowledge(receiver.delivered[-1].token)
    assert len(receiver.messages) == 1000
    assert timers < 5_000
    assert not receiver.downs
    assert MAX_OWED_MESSAGES < 1000


# The embedded broker as a process.


def test_a_taken_port_is_one_clear_line() -> None:
    with embedded_broker() as first, pytest.raises(UnavailableError) as failed:
        embedded.EmbeddedBroker(first.port).start()
    assert f"port {first.port} cannot be used (address already in use)" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_without_the_extra_the_embedded_broker_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iotcore", None)
    with pytest.raises(UnavailableError, match=r"pip install 'slyos-edge\[demo\]'"):
        embedded.EmbeddedBroker(free_port()).start()


def test_the_embedded_broker_ends_with_the_process_that_started_it() -> None:
    embedded_broker()
    starter = (
        "import os, sys; from edge_agent.transport.embedded import EmbeddedBroker\n"
        "broker = EmbeddedBroker(int(sys.argv[1])); broker.start(); print(broker.pid, flush=True); os._exit(0)"
    )
    port = free_port()
    done = subprocess.run([sys.executable, "-c", starter, str(port)], capture_output=True, text=True, timeout=60, check=True)
    orphan, end = Path("/proc", done.stdout.strip()), time.monotonic() + 30
    while _is_broker(orphan):
        assert time.monotonic() < end, "the orphan lives on"


def _is_broker(process: Path) -> bool:
    try:
        return b"edge_agent.transport.embedded" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_the_embedded_broker_stops_kills_and_starts_again_on_its_port() -> None:
    broker = embedded_broker()
    broker.stop()
    broker.start()
    first = broker.pid
    broker.start()
    assert broker.pid == first
    broker.kill()
    assert broker.pid is None
    broker.kill()
    broker.start()
    assert broker.pid not in (None, first)
    broker.stop()
    assert broker.pid is None
