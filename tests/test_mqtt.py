"""The MQTT link against a hostile broker, wrong certificates and a slow loop (SECURITY: 35 to 40)."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from edge_agent.transport.backoff import Backoff, BackoffLimits
from edge_agent.transport.connection import MAX_OUTGOING_MESSAGES
from edge_agent.transport.endpoint import Endpoint
from edge_agent.transport.inbox import MAX_WAITING_BYTES, MAX_WAITING_EVENTS, Inbox
from edge_agent.transport.link import (
    MAX_OWED_MESSAGES,
    MAX_PAYLOAD_BYTES,
    MAX_TOPIC_BYTES,
    Delivered,
    LinkEvent,
    LinkUp,
    Message,
    Published,
    Rejected,
)
from edge_agent.transport.mqtt import BrokerAddress, MqttLink, MqttOptions, TlsFiles, check
from edge_agent.transport.paho_client import MAX_CONTROL_PACKET_BYTES, MAX_PROPERTIES_BYTES
from tests.brokers import free_port, mosquitto
from tests.certificates import Authority
from tests.hostile_broker import (
    CONNACK,
    CONNACK_SESSION_PRESENT,
    HostileBroker,
    Script,
    packet,
    publish,
    read_packet,
    remaining_length,
)
from tests.worlds import QUICK, MqttWorld, Station

USER_PROPERTY = b"\x26\0\1a\0\1b"
PUBACK, SUBSCRIBE, PUBLISH = 0x40, 0x82, 0x30
LONGEST_LENGTH = 268_435_455


class DirectWorld(MqttWorld):
    """Links straight to a port, without a relay, to brokers that the test runs."""

    def stop_broker(self) -> None:
        raise NotImplementedError

    def start_broker(self) -> None:
        raise NotImplementedError

    def open(
        self, address: BrokerAddress, name: str = "victim", options: MqttOptions = QUICK, seed: int | None = None
    ) -> Station:
        station = Station(MqttLink(address, name, self.loop, options, seed), self.happened)
        self.stations.append(station)
        station.link.open(station.deliver)
        return station

    def victim(self, broker: HostileBroker, options: MqttOptions = QUICK, seed: int | None = None) -> Station:
        return self.open(BrokerAddress("127.0.0.1", broker.port), options=options, seed=seed)


@pytest.fixture
def world() -> Iterator[DirectWorld]:
    world = DirectWorld(0)
    yield world
    world.close()


def sends(*data: bytes) -> Script:
    """Accept, send, and stay until the client goes."""

    def script(sock: socket.socket) -> None:
        sock.sendall(b"".join(data))
        while read_packet(sock)[0]:
            pass

    return script


MEASURED = """
import asyncio, sys
from edge_agent.transport.mqtt import BrokerAddress, MqttLink
from edge_agent.transport.link import LinkDown, LinkUp

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

async def main():
    events = asyncio.Queue()
    link = MqttLink(BrokerAddress("127.0.0.1", int(sys.argv[1])), "victim", asyncio.get_running_loop())
    link.open(events.put_nowait)
    assert isinstance(await events.get(), LinkUp)
    before = kilobytes("VmRSS")
    down = await events.get()
    assert isinstance(down, LinkDown), down
    print(kilobytes("VmHWM") - before, down.reason, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("first_byte", [0x30, 0x32, 0x90, 0xE0], ids=["publish", "publish-qos1", "suback", "disconnect"])
def test_a_packet_that_announces_256_mb_raises_memory_by_less_than_8_mb_and_ends_the_connection(first_byte: int) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK)
        sock.sendall(bytes([first_byte]) + remaining_length(LONGEST_LENGTH))
        for _ in range(64):
            sock.sendall(b"\0" * 2**20)

    with HostileBroker(script) as broker:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(broker.port)], capture_output=True, text=True, timeout=60, check=True
        )
    risen_kb, reason = done.stdout.split(" ", 1)
    assert int(risen_kb) < 8 * 1024, done.stdout
    assert f"announced a packet of {LONGEST_LENGTH} bytes; allowed: " in reason


def test_a_control_packet_that_is_larger_than_any_honest_one_ends_the_connection(world: DirectWorld) -> None:
    with HostileBroker(sends(CONNACK, packet(0xE0, b"\0" * (MAX_CONTROL_PACKET_BYTES + 1)))) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.downs, "the connection is dropped")
    assert f"allowed: {MAX_CONTROL_PACKET_BYTES}" in victim.downs[0].reason


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (packet(0x30, b"\0\1a\xff\xff\x7f"), "properties in a body of"),
        (packet(0x30, b"\0\1a\xff\xff\xff\xff\xff\x01"), "end early"),
        (packet(0x30, b"\xff\xffa"), "end early"),
        (packet(0x30, b""), "end early"),
        (packet(0x32, b"\0\1a\0\0\0"), "packet id 0"),
        (packet(0x34, b"\0\1a\0\1\0"), "QoS 2"),
        (packet(0x36, b"\0\1a\0\1\0"), "QoS 3"),
        (publish(b"a", b"", properties=b"\x7f"), "PUBLISH properties"),
        (publish(b"a", b"", properties=b"\x08\xff\xffx"), "PUBLISH properties"),
        (publish(b"a", b"", properties=b"\x02\0"), "PUBLISH properties"),
        (publish(b"", b"", properties=b"\x23\0\1"), "topic alias"),
        (CONNACK, "accepted the connection twice"),
        (packet(0xC0, b""), "packet type 12"),
        (packet(0x62, b"\0\1"), "packet type 6"),
        (packet(0xF0, b""), "packet type 15"),
        (packet(0x90, b""), "broke the protocol"),
        (packet(0x40, b"\0"), "broke the protocol"),
        (packet(0x20, b""), "broke the protocol"),
        (b"\x30\xff\xff\xff\xff\xff", "protocol"),
        (packet(0xE0, b"\x8e"), "session taken over: another client uses the id 'victim'"),
        (packet(0xE0, b"\x8b"), "the broker ended the connection: server shutting down"),
    ],
)
def test_a_broken_packet_ends_the_connection_with_its_reason(world: DirectWorld, attack: bytes, reason: str) -> None:
    with HostileBroker(sends(CONNACK, attack)) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.downs, "the connection is dropped")
        world.wait(lambda: len(victim.ups) > 1, "the link tries again")
    assert reason in victim.downs[0].reason
    assert victim.messages == []


@pytest.mark.parametrize(
    "greeting", [b"", publish(b"a", b"early", 1), packet(0x90, b"\0\1\0\0")], ids=["nothing", "publish", "suback"]
)
def test_a_broker_that_does_not_begin_with_its_acceptance_never_brings_the_link_up(world: DirectWorld, greeting: bytes) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(greeting)

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: len(victim.downs) > 2, "attempts end")
    assert victim.ups == []
    assert victim.messages == []


@pytest.mark.parametrize(
    "odd",
    [
        publish(b"t" * (MAX_TOPIC_BYTES + 1), b"", 7),
        publish(b"a/\xff\xfe", b"", 7),
        publish(b"a\0b", b"", 7),
        publish(b"a/+/b", b"", 7),
        publish(b"a/../#", b"", 7),
        publish(b"", b"", 7),
        publish(b"a", b"", 7, USER_PROPERTY * (MAX_PROPERTIES_BYTES // 7 + 1)),
        publish(b"a", b"z" * 2**21, 7, USER_PROPERTY * 250_000),
        publish(b"a", b"", 7, b"\x09\x10\x00" + b"c" * 4096),
        publish(b"a", b"", 7, b"\x08\0\3r/#"),
    ],
    ids=["overlong", "not-utf8", "nul", "wildcard", "dots-wildcard", "empty", "many-properties", "4-mb-of-properties",
         "long-correlation", "wild-response-topic"],
)  # fmt: skip
def test_an_unusable_message_is_skipped_and_acknowledged_and_the_next_one_arrives(world: DirectWorld, odd: bytes) -> None:
    acknowledged = threading.Event()

    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK + odd + publish(b"good", b"next", 8))
        while (received := read_packet(sock))[0]:
            if received == (PUBACK, b"\0\7"):
                acknowledged.set()

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.messages, "the good message")
        assert victim.payloads == [b"next"]
        assert victim.downs == []
        assert acknowledged.wait(30)


def test_no_garbage_kills_the_link(world: DirectWorld) -> None:
    seeded = random.Random(35)

    def garbage() -> bytes:
        body = seeded.randbytes(seeded.randrange(40))
        kind = seeded.choice([0x20, 0x30, 0x32, 0x40, 0x90, 0xE0, seeded.randrange(256)])
        return seeded.randbytes(20) if seeded.random() < 0.2 else packet(kind, body)

    def script(sock: socket.socket) -> None:
        honest = broker.connections > 300
        sock.sendall(CONNACK + (publish(b"end", b"alive", 1) if honest else garbage()))
        if not honest:
            sock.shutdown(socket.SHUT_WR)
        while read_packet(sock)[0]:
            pass

    with HostileBroker(script) as broker:
        victim = world.victim(broker, MqttOptions(backoff=BackoffLimits(base_us=1, cap_us=1)))
        world.wait(lambda: b"alive" in victim.payloads, "an honest connection after 300 bad ones")
    assert not any("bug" in down.reason for down in victim.downs), victim.downs


def test_a_flood_of_topics_is_bounded_and_the_newest_messages_win(world: DirectWorld) -> None:
    flood, processed, begin = 20_000, threading.Event(), threading.Event()

    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK)
        begin.wait(30)
        for number in range(flood):
            sock.sendall(publish(b"flood/%d" % number, b""))
        sock.sendall(publish(b"t" * 600, b"", 7))
        while (received := read_packet(sock))[0]:
            if received == (PUBACK, b"\0\7"):
                processed.set()

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.ups, "it is up")
        begin.set()
        assert processed.wait(60), "the flood was read while the loop stood still"
        world.wait(lambda: len(victim.messages) >= MAX_WAITING_EVENTS, "what waited")
        newest = [f"flood/{number}" for number in range(flood - MAX_WAITING_EVENTS, flood)]
        assert [message.topic for message in victim.messages] == newest
        assert isinstance(victim.link, MqttLink)
        assert victim.link.dropped == flood - MAX_WAITING_EVENTS


def test_a_broker_that_ignores_what_we_owe_it_is_read_no_further_until_something_is_acknowledged(world: DirectWorld) -> None:
    many = b"".join(publish(b"q1", b"", packet_id) for packet_id in range(1, MAX_OWED_MESSAGES + 11))
    published = threading.Event()

    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK + many)
        while (got := read_packet(sock))[0]:
            if got[0] & 0xF0 == 0x30 and b"the last" in got[1]:
                published.set()

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: len(victim.messages) >= MAX_OWED_MESSAGES, "as many as may be owed")
        for _ in range(3):
            victim.link.publish(Message("still/heard", bytes(MAX_PAYLOAD_BYTES), qos=0))
        victim.link.publish(Message("still/heard", b"the last", qos=0))
        assert world.loop.run_until_complete(asyncio.to_thread(published.wait, 60)), "what is said meanwhile goes out"
        assert len(victim.messages) == MAX_OWED_MESSAGES
        for delivered in victim.delivered[:10]:
            victim.link.acknowledge(delivered.token)
        world.wait(lambda: len(victim.messages) == MAX_OWED_MESSAGES + 10, "the rest")
        assert not victim.downs


def test_a_duplicate_gets_the_same_token_and_acknowledging_it_twice_sends_one_acknowledgement(world: DirectWorld) -> None:
    received: list[tuple[int, bytes]] = []

    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK + publish(b"a", b"one", 5) + publish(b"a", b"one", 5) + publish(b"a", b"two", 6))
        while (got := read_packet(sock))[0]:
            received.append(got)
            if got == (PUBACK, b"\0\6"):
                sock.sendall(publish(b"a", b"end"))

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: len(victim.messages) == 3, "three deliveries")
        first, again, two = (delivered.token for delivered in victim.delivered)
        assert first == again != two
        for token in (two, first, again, first, 99):
            victim.link.acknowledge(token)
        world.wait(lambda: b"end" in victim.payloads, "both acknowledged")
    assert received[:2] == [(PUBACK, b"\0\5"), (PUBACK, b"\0\6")], "in the order of delivery"


def test_a_lost_acknowledgement_leaves_the_ticket_open_and_a_doubled_one_answers_it_once(world: DirectWorld) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK)
        kind, body = read_packet(sock)
        if broker.connections > 1:
            number = body[3:5]
            sock.sendall(packet(PUBACK, number) * 2 + packet(PUBACK, b"\x12\x34") + publish(b"end", b"end"))
            read_packet(sock)

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.ups, "it is up")
        victim.link.publish(Message("a", b""), ticket=3)
        world.wait(lambda: len(victim.ups) == 2, "the connection ended without an answer")
        assert victim.tickets == []
        victim.link.publish(Message("a", b""), ticket=3)
        world.wait(lambda: victim.messages, "the end")
    assert victim.tickets == [3]


def test_a_refused_publication_and_a_refused_subscription_are_said(world: DirectWorld) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK)
        while (got := read_packet(sock))[0]:
            number = got[1][3:5] if got[0] & 0xF0 == PUBLISH else got[1][:2]
            sock.sendall(packet(PUBACK, number + b"\x87\0") if got[0] != SUBSCRIBE else packet(0x90, number + b"\0\x87"))

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.ups, "it is up")
        victim.link.publish(Message("a", b""), ticket=4)
        victim.link.subscribe("a/#")
        world.wait(lambda: len(victim.events) == 3, "both answers")
    assert victim.events[1:] == [Rejected("not authorized", ticket=4), Rejected("not authorized", topic_filter="a/#")]


def test_a_lie_about_a_session_is_told_as_the_brokers_word_and_a_subscription_then_still_goes_out(world: DirectWorld) -> None:
    subscribed = threading.Event()

    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK_SESSION_PRESENT)
        kind, body = read_packet(sock)
        if kind == SUBSCRIBE and b"record/#" in body:
            subscribed.set()
            sock.sendall(packet(0x90, body[:2] + b"\0\1") + publish(b"record/1", b"state"))
        read_packet(sock)

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.ups, "it is up")
        assert victim.ups == [LinkUp(session_present=True)]
        victim.link.subscribe("record/#")
        world.wait(lambda: victim.messages, "state")
    assert subscribed.is_set()


def test_a_client_id_that_is_taken_over_again_and_again_backs_off_ever_longer(world: DirectWorld) -> None:
    limits = BackoffLimits(base_us=500, cap_us=60_000_000, sound_us=10_000_000)
    with HostileBroker(sends(CONNACK, packet(0xE0, b"\x8e"))) as broker:
        victim = world.victim(broker, MqttOptions(backoff=limits), seed=38)
        world.wait(lambda: len(victim.downs) == 8, "eight takeovers")
        assert broker.connections == 8
    reference = Backoff(limits, seed=38)
    assert [down.retry_in_us for down in victim.downs] == [reference.after(0) for _ in range(8)]
    assert reference.ceiling_us == 500 * 2**8


def test_backoff_is_even_over_the_ceiling_grows_to_the_cap_and_falls_back_after_a_sound_connection() -> None:
    limits = BackoffLimits(base_us=1000, cap_us=8000, sound_us=5_000_000)
    backoff = Backoff(limits, seed=1)
    ceilings = []
    for _ in range(6):
        ceilings.append(backoff.ceiling_us)
        assert 0 <= backoff.after(lasted_us=4_999_999) <= ceilings[-1]
    assert ceilings == [1000, 2000, 4000, 8000, 8000, 8000]
    draws = [backoff.after(0) for _ in range(2000)]
    assert max(draws) <= 8000
    assert min(draws) < 800
    assert 3600 < sum(draws) / len(draws) < 4400
    assert backoff.after(lasted_us=5_000_000) <= 1000


def test_a_silent_broker_is_noticed_within_the_keepalive_time(world: DirectWorld) -> None:
    with HostileBroker(sends(CONNACK)) as broker:
        victim = world.victim(broker, MqttOptions(keepalive_s=1))
        world.wait(lambda: victim.downs, "the silence is noticed")
    assert "no answer within the keepalive time" in victim.downs[0].reason


def test_a_refused_connection_says_why(world: DirectWorld) -> None:
    with HostileBroker(sends(b"\x20\x03\x00\x87\x00")) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.downs, "it is refused")
    assert victim.downs[0].reason.endswith("the broker refused us: not authorized")


def test_publishing_to_a_broker_that_never_answers_ends_at_a_bound(world: DirectWorld) -> None:
    with HostileBroker(sends(CONNACK)) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.ups, "it is up")
        for ticket in range(MAX_OUTGOING_MESSAGES):
            victim.link.publish(Message("a", b"x"), ticket)
        with pytest.raises(UnavailableError, match=f"{MAX_OUTGOING_MESSAGES} messages .* wait for the broker"):
            victim.link.publish(Message("a", b"x"), MAX_OUTGOING_MESSAGES)


def test_a_message_larger_than_the_broker_takes_is_refused_before_it_costs_the_connection(world: DirectWorld) -> None:
    with HostileBroker(sends(packet(0x20, b"\0\0\5\x27" + (1000).to_bytes(4)))) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.ups, "it is up")
        with pytest.raises(RefusedError, match="at most 1000 bytes a packet, says the broker"):
            victim.link.publish(Message("a", b"x" * 1000))
        victim.link.publish(Message("a", b"x" * 900))


def test_the_inbox_stops_the_network_thread_when_only_acknowledged_messages_wait_and_close_frees_it() -> None:
    loop = asyncio.new_event_loop()
    taken: list[LinkEvent] = []
    inbox = Inbox(loop, taken.append)
    half = Delivered(Message("a", b"x" * 4 * 2**20, qos=1), 1)
    put = [0]

    def network() -> None:
        for _ in range(8):
            inbox.put(half)
            put[0] += 1

    thread = threading.Thread(target=network)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    assert put[0] == MAX_WAITING_BYTES // (4 * 2**20)

    async def until_all() -> None:
        while len(taken) < 8:
            await asyncio.sleep(0)

    loop.run_until_complete(asyncio.wait_for(until_all(), 30))
    thread.join(30)
    assert put[0] == 8
    thread = threading.Thread(target=network)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    inbox.close()
    thread.join(30)
    assert not thread.is_alive()
    loop.run_until_complete(asyncio.sleep(0))
    assert len(taken) == 8, "nothing after close"
    loop.close()
    inbox = Inbox(loop, taken.append)
    inbox.put(Published(1))


def test_closing_a_link_whose_network_thread_waits_for_the_loop_ends_the_thread(world: DirectWorld) -> None:
    large = b"".join(publish(b"a", b"x" * 4 * 2**20, packet_id) for packet_id in range(1, 9))
    begin = threading.Event()

    def script(sock: socket.socket) -> None:
        sock.sendall(CONNACK)
        begin.wait(30)
        sock.sendall(large)

    with HostileBroker(script) as broker:
        victim = world.victim(broker)
        world.wait(lambda: victim.ups, "it is up")
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "mqtt-victim")
        assert isinstance(victim.link, MqttLink)
        begin.set()
        for _ in range(600):
            thread.join(0.05)
            if victim.link.waiting_bytes == MAX_WAITING_BYTES:
                break
        assert victim.link.waiting_bytes == MAX_WAITING_BYTES
        victim.link.close()
        thread.join(30)
        assert not thread.is_alive()
    assert victim.messages == []


def test_an_error_in_the_receiver_does_not_stop_the_events_after_it() -> None:
    loop = asyncio.new_event_loop()
    errors: list[object] = []
    loop.set_exception_handler(lambda loop, context: errors.append(context["exception"]))
    taken: list[int] = []

    def receive(event: LinkEvent) -> None:
        assert isinstance(event, Published)
        taken.append(event.ticket)
        if event.ticket == 1:
            raise ValueError("a bug of the receiver's")

    inbox = Inbox(loop, receive)
    for ticket in range(4):
        inbox.put(Published(ticket))

    async def until_all() -> None:
        while len(taken) < 4:
            await asyncio.sleep(0)

    loop.run_until_complete(asyncio.wait_for(until_all(), 30))
    loop.close()
    assert taken == [0, 1, 2, 3]
    assert [str(error) for error in errors] == ["a bug of the receiver's"]


# Who the broker is.


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "stranger")


def tls_settings(pair: tuple[Path, Path], more: str = "") -> str:
    return f"certfile {pair[0]}\nkeyfile {pair[1]}\n{more}"


def fault(address: BrokerAddress) -> str:
    with pytest.raises((UnavailableError, RefusedError)) as failed:
        asyncio.run(check(address, "checker"))
    assert "\n" not in str(failed.value)
    return str(failed.value)


def test_a_link_over_tls_with_a_client_certificate_carries_messages(
    world: DirectWorld, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    more = f"cafile {authority.certificate}\nrequire_certificate true"
    settings = tls_settings(authority.issue("127.0.0.1"), more)
    with mosquitto(tmp_path, tls=settings) as broker:
        files = TlsFiles(authority.certificate, *authority.issue("board-1"))
        address = BrokerAddress("127.0.0.1", broker.port, files)
        asyncio.run(check(address, "checker"))
        station = world.open(address, "board-1")
        world.wait(lambda: station.ups, "it is up")
        station.link.subscribe("tls/#")
        station.link.publish(Message("tls/1", b"z" * 300_000), ticket=1)
        world.wait(lambda: station.messages and station.tickets, "the message")
        assert len(station.payloads[0]) == 300_000
        for files in (TlsFiles(authority.certificate), TlsFiles(authority.certificate, *stranger.issue("board-1"))):
            text = fault(BrokerAddress("127.0.0.1", broker.port, files))
            assert "refused our certificate" in text or "check our certificate" in text, text


def test_a_wrong_ca_an_expired_certificate_and_another_name_have_one_clear_reason_each(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    expired = authority.issue("127.0.0.1", "20200101000000Z", "20200201000000Z")
    future = authority.issue("127.0.0.1", "20900101000000Z", "20900201000000Z")
    cases = [
        (stranger.issue("127.0.0.1"), "the broker's certificate is not signed by our CA; check the CA file"),
        (expired, "the broker's certificate has expired; renew it on the broker"),
        (future, "the broker's certificate is not valid yet; check this board's clock"),
        (authority.issue("elsewhere.example"), "the broker's certificate is for another address than the one that was dialled"),
    ]
    for number, (pair, reason) in enumerate(cases):
        with mosquitto(tmp_path / str(number), tls=tls_settings(pair)) as broker:
            address = BrokerAddress("127.0.0.1", broker.port, TlsFiles(authority.certificate))
            assert fault(address) == f"broker 127.0.0.1:{broker.port}: {reason}"


def test_tls_on_one_side_only_has_a_clear_reason(authority: Authority, tmp_path: Path) -> None:
    with mosquitto(tmp_path / "tls", tls=tls_settings(authority.issue("127.0.0.1"))) as broker:
        text = fault(BrokerAddress("127.0.0.1", broker.port))
        assert text.endswith("check our certificate or password, and that TLS is on or off on both sides")
    with mosquitto(tmp_path / "plain") as broker:
        files = TlsFiles(authority.certificate)
        text = fault(BrokerAddress("127.0.0.1", broker.port, files))
        assert text.endswith("check our certificate or password, and that TLS is on or off on both sides")


def test_an_unreachable_broker_and_an_unknown_name_have_a_clear_reason() -> None:
    port = free_port()
    text = fault(BrokerAddress("127.0.0.1", port))
    assert text == f"broker 127.0.0.1:{port}: nothing listens there; check host and port, and that the broker runs"
    assert "name cannot be resolved" in fault(BrokerAddress("no-such-host.invalid", 1883))


def test_a_wrong_certificate_keeps_the_link_down_with_the_same_reason_at_every_attempt(
    world: DirectWorld, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    with mosquitto(tmp_path, tls=tls_settings(stranger.issue("127.0.0.1"))) as broker:
        station = world.open(BrokerAddress("127.0.0.1", broker.port, TlsFiles(authority.certificate)))
        world.wait(lambda: len(station.downs) == 3, "three attempts")
    assert {down.reason.split(": ", 1)[1] for down in station.downs} == {
        "the broker's certificate is not signed by our CA; check the CA file"
    }
    assert station.ups == []


def test_tls_files_that_cannot_be_used_are_a_configuration_error_that_names_the_file(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("board")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    other_key = stranger.issue("board")[1]
    for files, named in [
        (TlsFiles(tmp_path / "missing.pem"), "missing.pem (No such file or directory)"),
        (TlsFiles(tmp_path), "Is a directory"),
        (TlsFiles(garbage), "garbage.pem"),
        (TlsFiles(authority.certificate, tmp_path / "missing.pem", key), "missing.pem"),
        (TlsFiles(authority.certificate, certificate, garbage), "garbage.pem"),
        (TlsFiles(authority.certificate, certificate, other_key), "a PEM pair that belongs together"),
    ]:
        with pytest.raises(ConfigError) as refused:
            asyncio.run(check(BrokerAddress("127.0.0.1", 1, files), "checker"))
        assert named in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="without its key"):
        TlsFiles(authority.certificate, certificate)


def test_an_address_that_cannot_be_is_refused_and_a_password_is_not_shown() -> None:
    for host, port in [("", 1883), ("a b", 1883), ("a\n", 1883), ("x" * 254, 1883), ("ok", 0), ("ok", 65536)]:
        with pytest.raises(RefusedError):
            BrokerAddress(host, port)
    for host in ("a..b", ".", "-a.lan", "a-.lan", "10.0.0.256", "10.0.0", "a/b", "a:1883", "x" * 64 + ".lan", "http://a"):
        with pytest.raises(ConfigError, match="an IP address, or a host's name"):
            BrokerAddress(host)
    for host in ("10.0.0.1", "::1", "fe80::1%eth0", "broker", "my_broker.lan", "a.b.example.", "4u.lan", "bücher.example"):
        assert BrokerAddress(host).host == host
    with pytest.raises(ConfigError, match="password"):
        BrokerAddress("host", password="secret")
    assert "secret" not in repr(BrokerAddress("host", username="u", password="secret"))
    with pytest.raises(RefusedError, match="client id"):
        Endpoint(BrokerAddress("host"), "a/b", MqttOptions())
