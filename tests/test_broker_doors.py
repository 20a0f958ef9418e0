"""Every door of a fleet's broker, the Mosquitto that ``sly fleet init`` configures run as it is, tried by who wants in, or more.

After each attempt the same real agent is asked over the same broker, and answers: the fleet goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import socket
import ssl
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import cli
from edge_agent.broker_client import ask_over_broker, asker_of
from edge_agent.client import request_for_picture
from edge_agent.configured import read_config
from edge_agent.core.config import AgentConfig
from edge_agent.steward import authority as authority_module
from edge_agent.steward.authority import Authority
from edge_agent.steward.enrolling import Enrolment, enroll, revoke
from edge_agent.steward.folder import OperatorFolder
from edge_agent.transport.endpoint import BrokerAddress
from edge_agent.transport.tls import TlsFiles
from edge_agent.transport.topics import TOOL, Kind, Topics
from tests.enrolled_fleet import LIMITS, QUICK, TASK, EnrolledAgents, enrolled
from tests.fetched import picture_path
from tests.hostile_broker import packet, remaining_length
from tests.operators import HOST, FleetBroker, address_as, address_of, broker_of, new_fleet
from tests.raw_mqtt import (
    HUNG_UP,
    NOT_AUTHORIZED,
    PUBACK,
    PUBLISH,
    QOS_1,
    QOS_2,
    RETAIN,
    WEEK_S,
    Hello,
    RawClient,
    connected,
    dialled,
    text,
)  # fmt: skip

TOPICS = Topics("home")
BOARD = "barn"
DIGEST = "ab" * 32
HUGE = b"\xff\xff\xff\x7f"
"""A remaining length of 268,435,455 bytes, the longest that there is (MQTT 5, section 1.5.5)."""
GROWTH_BYTES = 8 * 2**20
HALF_OPEN = 200
MARK = b"said at the door"
ANY = Hello()


class Doors:
    """A fleet of one real board, ``barn``; ``kitchen`` and ``garage`` are enrolled, and who tries the doors holds their keys."""

    def __init__(self, path: Path, broker: FleetBroker, operator: OperatorFolder) -> None:
        self.path, self.broker, self.operator = path, broker, operator
        for board in ("kitchen", "garage"):
            enroll(operator, Enrolment(board, "jalapeno"))
        enrolled(operator, path, BOARD, "jalapeno", QUICK)
        self.picture = picture_path("grace_hopper").read_bytes()

    @property
    def config(self) -> AgentConfig:
        return read_config(self.path / BOARD / "agent.toml")

    @property
    def kitchen(self) -> BrokerAddress:
        return address_of(self.operator, "kitchen")

    @property
    def barn(self) -> BrokerAddress:
        return address_as(self.operator, BOARD)

    @property
    def ann(self) -> BrokerAddress:
        return address_as(self.operator, "operator.ann")

    def answers(self) -> str:
        """What the board says to a request that comes and goes over the broker."""
        request = request_for_picture(TASK, self.picture, limits=LIMITS)
        result = asyncio.run(ask_over_broker(asker_of(self.config), request, [BOARD]))
        return f"{result.status.value} from {result.board}"

    def memory_bytes(self) -> int:
        """Resident set of the broker's process (proc(5), status)."""
        lines = Path(f"/proc/{self.broker.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    path = tmp_path_factory.mktemp("doors")
    operator = new_fleet(path / "op")
    broker = FleetBroker(operator)
    made = Doors(path, broker, operator)
    with broker_of(operator, broker), EnrolledAgents(path, [BOARD]) as agents:
        agents.start()
        yield made


@pytest.fixture(autouse=True)
def fleet_goes_on(doors: Doors) -> Iterator[None]:
    yield
    assert doors.answers() == f"ok from {BOARD}"
    assert doors.broker.lives, "it is the process that was started, or started again on purpose"


# Who comes in.


def closed_to(
    address: BrokerAddress, context: ssl.SSLContext | None = None, hello: Hello = ANY, resumed: ssl.SSLSession | None = None
) -> bool:
    """Whether no MQTT connection comes about. (In TLS 1.3 the client's handshake ends before its certificate is judged.)"""
    try:
        with dialled(address, context, resumed) as client:
            return client.connect(hello)[0] == HUNG_UP
    except (ssl.SSLError, ConnectionError):
        return True


def of(doors: Doors, folder: Path, issued: authority_module.Issued) -> BrokerAddress:
    folder.mkdir()
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(issued.certificate)
    key.write_bytes(issued.key)
    return BrokerAddress(HOST, doors.operator.settings.port, TlsFiles(doors.operator.folder / "ca" / "ca.pem", certificate, key))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", ["of another ca", "expired", "not valid yet", "of a broker", "revoked"])
def test_39_a_client_with_a_certificate_that_does_not_hold_now_is_refused_in_every_tls(
    doors: Doors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, version: ssl.TLSVersion
) -> None:
    authority = doors.operator.authority
    if kind == "of another ca":
        authority = Authority.create(tmp_path / "stranger", "home")
    elif kind == "expired":
        monkeypatch.setattr(authority_module, "CLIENT_DAYS", -1)
    elif kind == "not valid yet":
        tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
        monkeypatch.setattr(authority_module, "_BEGIN", tomorrow.replace(microsecond=0))
    issued = authority.issue_broker(["kitchen"]) if kind == "of a broker" else authority.issue_client("kitchen")
    monkeypatch.undo()
    if kind == "revoked":
        authority.revoke("kitchen", besides=[doors.kitchen.tls.certificate.read_bytes()])  # type: ignore[union-attr]
        doors.operator.write_broker()
        assert doors.operator.reload_broker()
    address = of(doors, tmp_path / "client", issued)
    assert address.tls is not None
    context = address.tls.context()
    context.minimum_version = context.maximum_version = version
    doors.broker.settled()
    assert closed_to(address, context)
    assert not closed_to(doors.kitchen)


@pytest.mark.parametrize("hello", [Hello(), Hello(username=b"operator.ann"), Hello(username=BOARD.encode(), password=b"barn")])
def test_an_anonymous_client_is_refused_whatever_name_and_password_it_gives(doors: Doors, hello: Hello) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(doors.operator.folder / "ca" / "ca.pem")
    assert closed_to(doors.kitchen, context, hello)


def test_a_user_name_makes_nobody_another_than_whom_its_certificate_names(doors: Doors) -> None:
    for name in (b"operator.ann", b"barn", b"+", b"#"):
        with connected(doors.kitchen, Hello(username=name, password=b"x")) as kitchen:
            assert kitchen.publish(TOPICS.record("barn").encode()) == NOT_AUTHORIZED
            assert kitchen.publish(TOPICS.ota_meta("root").encode()) == NOT_AUTHORIZED
            assert kitchen.publish(TOPICS.digest("kitchen").encode()) != NOT_AUTHORIZED


def test_plain_text_and_tls_before_1_2_are_refused(doors: Doors) -> None:
    with socket.create_connection((HOST, doors.operator.settings.port), 60) as plain, contextlib.suppress(ConnectionError):
        plain.sendall(Hello().packet())
        assert plain.recv(4) in (b"", b"\x15\x03\x01\x00"), "nothing, or a TLS alert (RFC 8446, section 6)"
    assert doors.kitchen.tls is not None
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        context = doors.kitchen.tls.context()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        assert closed_to(doors.kitchen, context), version.name


def test_half_open_connections_keep_no_board_out(doors: Doors) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(HALF_OPEN):
            held.enter_context(socket.create_connection((HOST, doors.operator.settings.port), 60))
        assert not closed_to(doors.kitchen)
        assert doors.answers() == f"ok from {BOARD}"


# What is said and heard by who is in.


@contextlib.contextmanager
def session(address: BrokerAddress, *filters: bytes, client_id: bytes = b"raw") -> Iterator[RawClient]:
    with connected(address, Hello(client_id)) as client:
        for each in filters:
            client.subscribe(each)
        yield client


SHARED = [b"$share/g/#", b"$share/g/sly/1/home/#", b"$share/g/sly/1/home/board/+/reply/+"]
SHARED += [b"$share/g/sly/1/home/board/barn/" + kind for kind in (b"request", b"cancel", b"challenge", b"kv/+")]


@pytest.mark.parametrize("filters", [[b"#"], [b"+/+/+/#", b"sly/+/home/board/barn/#"], *([each] for each in SHARED)])
def test_40_no_wildcard_and_no_shared_subscription_opens_what_is_for_another(doors: Doors, filters: list[bytes]) -> None:
    for_barn = [TOPICS.request("barn"), TOPICS.cancel("barn"), TOPICS.challenge("barn"), TOPICS.kv("barn", "garage")]
    for_barn += [TOPICS.reply("garage", "barn"), TOPICS.reply("garage", f"barn{TOOL}ask-1")]
    with (
        session(address_of(doors.operator, "garage"), client_id=b"garage") as garage,
        session(doors.kitchen, *filters) as kitchen,
    ):
        for topic in [*for_barn, TOPICS.request("kitchen")]:
            assert garage.publish(topic.encode(), MARK) != NOT_AUTHORIZED
        kitchen.settle()
        assert {topic for topic, payload in kitchen.heard if payload == MARK} <= {TOPICS.request("kitchen")}


def test_40_the_brokers_own_topics_are_neither_read_nor_written(doors: Doors) -> None:
    for who in (doors.kitchen, doors.ann):
        with session(who, b"$SYS/#", b"$CONTROL/#", b"$share/g/$SYS/#", client_id=b"curious") as client:
            for topic in (b"$SYS/broker/version", b"$CONTROL/dynamic-security/v1", b"$share/g/sly/1/home/board/kitchen/record"):
                assert client.publish(topic) == NOT_AUTHORIZED
            assert client.settle() and not client.heard


@pytest.mark.parametrize(
    "topic",
    [
        b"/sly/1/home/board/kitchen/record", b"sly/1/home/board/kitchen/record/", b"sly/1/home//board/kitchen/record",
        b"sly/1/home/board/kitchen/../barn/record", b"sly/1/../1/home/board/barn/record", b"sly/1/home/board/Kitchen/record",
        b"sly/1/home/board/%u/record", b"sly/1/other/board/kitchen/record", b"SLY/1/home/board/kitchen/record",
    ],
)  # fmt: skip
def test_40_a_topic_that_only_looks_like_ones_own_is_refused(doors: Doors, topic: bytes) -> None:
    with connected(doors.kitchen) as kitchen:
        assert kitchen.publish(topic) == NOT_AUTHORIZED


def test_40_an_alias_is_judged_by_the_topic_that_it_stands_for(doors: Doors) -> None:
    """A Topic Alias (MQTT 5, section 3.3.2.3.4) that was made with a topic which is another's."""
    with session(doors.ann, b"sly/1/#") as ann, connected(doors.kitchen, Hello(b"kitchen-raw")) as kitchen:
        for topic, alias in ((TOPICS.record("barn").encode(), 1), (b"", 1), (TOPICS.digest("kitchen").encode(), 2), (b"", 2)):
            kitchen.send(packet(PUBLISH | QOS_1, text(topic) + b"\0\7\3\x23" + alias.to_bytes(2) + MARK))
            assert (kitchen.answer(PUBACK, 2) == NOT_AUTHORIZED) == (alias == 1)
        ann.settle()
        assert [topic for topic, payload in ann.heard if payload == MARK] == [TOPICS.digest("kitchen")] * 2


def test_40_a_client_id_of_wildcards_or_paths_opens_nothing(doors: Doors) -> None:
    for name in (b"#", b"+", b"../+", b"a/b", b"%u", b"barn", b"x" * 60_000):
        with session(doors.kitchen, b"sly/1/home/board/+/reply/+", client_id=name) as kitchen:
            with connected(address_of(doors.operator, "garage"), Hello(b"garage")) as garage:
                for client in ("barn", f"barn{TOOL}a", f"garage{TOOL}b"):
                    assert garage.publish(TOPICS.reply("garage", client).encode(), MARK) != NOT_AUTHORIZED
            assert kitchen.settle() and not kitchen.heard


def test_40_a_client_id_with_nul_or_no_utf_8_is_refused(doors: Doors) -> None:
    for name in (b"a\0b", b"\xff\xfe", b"\xed\xa0\x80"):
        assert closed_to(doors.kitchen, hello=Hello(name))


def test_a_message_of_qos_2_ends_the_connection_of_who_sends_it(doors: Doors) -> None:
    """Until the lists are read again: at SIGHUP Mosquitto 2.0.11 forgets ``max_qos`` and ``max_connections`` (docs/fleet.md)."""
    doors.broker.restart()
    with connected(doors.kitchen) as kitchen:
        assert kitchen.publish(TOPICS.digest("kitchen").encode(), flags=QOS_2) == HUNG_UP


def test_after_the_lists_were_read_again_the_doors_are_as_shut_as_before(doors: Doors) -> None:
    assert doors.operator.reload_broker()
    doors.broker.settled()
    for flags in (0, QOS_1, QOS_2, QOS_1 | RETAIN):
        with session(doors.ann, b"sly/1/#", client_id=b"ann-listens") as ann, connected(doors.kitchen) as kitchen:
            assert kitchen.publish(TOPICS.record("barn").encode(), MARK, flags) in (0 if not flags else NOT_AUTHORIZED, HUNG_UP)
            kitchen.settle()
            ann.settle()
            assert MARK not in [payload for _, payload in ann.heard]
    test_35_a_256_mb_packet_of_any_kind_is_not_waited_for(doors, 0x32)
    test_an_anonymous_client_is_refused_whatever_name_and_password_it_gives(doors, Hello())


# Wills.


def others_topics() -> list[str]:
    """Of every kind that has a writer of its own, one that is another's."""
    parts = {"board": BOARD, "verifier": BOARD, "peer": BOARD, "client": BOARD, "role": "root", "digest": DIGEST, "model": "any"}
    mine = {Kind.REQUEST, Kind.CANCEL, Kind.CHALLENGE, Kind.OTA_CHUNK}
    return [f"sly/1/home/{kind.value.format(**parts)}" for kind in Kind if kind not in mine]


def test_36_a_will_spoofed_on_any_topic_of_another_is_never_said_nor_kept(doors: Doors) -> None:
    topics = [*others_topics(), "$SYS/broker/version", "$share/g/x", "elsewhere"]
    own = TOPICS.digest("kitchen")
    with session(doors.ann, b"sly/1/#", b"elsewhere", client_id=b"ann-listens") as ann:
        for topic in [*topics, own]:
            with connected(doors.kitchen, Hello(b"mortal", will=(topic.encode(), MARK, True))) as kitchen:
                kitchen.goodbye(with_will=True)
                kitchen.end()
        ann.settle()
        assert [topic for topic, payload in ann.heard if payload == MARK] == [own]
    with session(doors.ann, b"#", client_id=b"ann-again") as ann:
        ann.settle()
        assert [topic for topic, payload in ann.heard if payload == MARK] == [own]
    with connected(doors.kitchen) as kitchen:
        kitchen.publish(own.encode(), b"", QOS_1 | RETAIN)


@pytest.mark.parametrize("topic", [b"sly/1/home/board/+/record", b"#", b"a\0b", b"\xff\xfe", b""])
def test_40_a_will_on_a_topic_with_a_wildcard_nul_or_no_utf_8_is_no_connection(doors: Doors, topic: bytes) -> None:
    assert closed_to(doors.kitchen, hello=Hello(b"mortal", will=(topic, MARK, True)))


# Packets and sessions.


@pytest.mark.parametrize("first", [0x10, 0x32, 0x82, 0xA2, 0xF0])
def test_35_a_256_mb_packet_of_any_kind_is_not_waited_for(doors: Doors, first: int) -> None:
    before_bytes = doors.memory_bytes()
    with dialled(doors.kitchen) as kitchen:
        if first != 0x10:
            assert kitchen.connect(Hello())[0] == 0
        kitchen.send(bytes([first]) + HUGE + b"\0\4MQTT\5")
        assert kitchen.ended()
    assert doors.memory_bytes() - before_bytes < GROWTH_BYTES


def test_35_hundreds_of_connections_that_announce_200_mb_each_take_no_memory(doors: Doors) -> None:
    before_bytes = doors.memory_bytes()
    with contextlib.ExitStack() as held:
        for _ in range(30):
            kitchen = held.enter_context(dialled(doors.kitchen))
            kitchen.send(b"\x10\xff\xff\xff\x5f" + b"\0\4MQTT")
        assert doors.answers() == f"ok from {BOARD}"
        assert doors.memory_bytes() - before_bytes < GROWTH_BYTES


def test_35_a_connect_with_30000_properties_keeps_nobody_waiting(doors: Doors) -> None:
    """CVE-2021-41039: each pair was once compared with all others."""
    properties = (b"\x26" + text(b"a") + text(b"b")) * 30_000
    body = b"\0\4MQTT\5\2\0\x3c" + remaining_length(len(properties)) + properties + text(b"wordy")
    with dialled(doors.kitchen) as kitchen:
        kitchen.send(packet(0x10, body))
        assert doors.answers() == f"ok from {BOARD}"


def keeps(name: bytes) -> Hello:
    return Hello(name, clean=False, expiry_s=WEEK_S)


def test_38_who_takes_over_a_client_id_reads_nothing_of_what_waits_there(doors: Doors) -> None:
    with session_kept(doors, b"taken"), connected(address_of(doors.operator, "garage"), Hello(b"garage")) as garage:
        garage.publish(TOPICS.request("kitchen").encode(), MARK)
        with dialled(address_of(doors.operator, "garage")) as thief:
            assert thief.connect(keeps(b"taken"))[0] == 0
            assert thief.settle() and not thief.heard
            garage.publish(TOPICS.request("kitchen").encode(), MARK)
            assert thief.settle() and not thief.heard


@contextlib.contextmanager
def session_kept(doors: Doors, name: bytes) -> Iterator[None]:
    """A session of the kitchen that waits for its requests while it is away."""
    with dialled(doors.kitchen) as kitchen:
        assert kitchen.connect(keeps(name))[0] == 0
        assert kitchen.subscribe(TOPICS.request("kitchen").encode()) == 1
        kitchen.goodbye()
    yield
    with dialled(doors.kitchen) as kitchen:
        kitchen.connect(Hello(name))


def test_a_restart_keeps_retained_messages_and_sessions_and_goes_on_filling_them(doors: Doors) -> None:
    with session_kept(doors, b"patient"):
        with connected(doors.kitchen) as kitchen:
            kitchen.publish(TOPICS.digest("kitchen").encode(), MARK, QOS_1 | RETAIN)
        with connected(address_of(doors.operator, "garage"), Hello(b"garage")) as garage:
            garage.publish(TOPICS.request("kitchen").encode(), b"before")
        doors.broker.restart()
        with connected(address_of(doors.operator, "garage"), Hello(b"garage")) as garage:
            garage.publish(TOPICS.request("kitchen").encode(), b"after")
            garage.subscribe(TOPICS.digest("kitchen").encode())
            assert garage.settle() and garage.heard == [(TOPICS.digest("kitchen"), MARK)]
        with dialled(doors.kitchen) as kitchen:
            assert kitchen.connect(keeps(b"patient")) == (0, True)
            assert kitchen.settle()
            assert [payload for _, payload in kitchen.heard] == [b"before", b"after"]
            kitchen.publish(TOPICS.digest("kitchen").encode(), b"", QOS_1 | RETAIN)


def test_32_a_key_revoked_mid_stream_resumes_no_tls_session_gets_nothing_new_and_leaves_no_will(doors: Doors) -> None:
    address = address_of(doors.operator, "garage")
    assert address.tls is not None
    contexts = [address.tls.context(), address.tls.context()]
    contexts[0].maximum_version = ssl.TLSVersion.TLSv1_2
    tickets = []
    for context in contexts:
        with dialled(address, context) as garage:
            assert garage.connect(Hello(b"ticket"))[0] == 0 and garage.settle()
            tickets.append(garage.session)
    assert all(ticket is not None and ticket.has_ticket for ticket in tickets)
    request = TOPICS.request("garage").encode()
    will = (TOPICS.digest("garage").encode(), MARK, True)
    with (
        session(doors.ann, b"sly/1/#", client_id=b"ann-watches") as ann,
        connected(doors.kitchen, Hello(b"kitchen-raw")) as kitchen,
        connected(address, Hello(b"stays", will=will, receive_maximum=1)) as stays,
    ):
        stays.acknowledges = False
        stays.subscribe(request)
        for waiting in (b"1", b"2", b"3"):
            kitchen.publish(request, waiting)
        revoke(doors.operator, "garage", "stolen")
        assert doors.operator.reload_broker()
        doors.broker.settled()
        kitchen.publish(request, b"secret")
        stays.acknowledges = True
        stays.send(packet(PUBACK, b"\0\1"))
        assert stays.settle() and stays.settle()
        assert [payload for _, payload in stays.heard] == [b"1", b"2", b"3"], "what waited for it before, and no more"
        stays.goodbye(with_will=True)
        stays.end()
        ann.settle()
        assert MARK not in [payload for _, payload in ann.heard]
    for context, ticket in zip(contexts, tickets, strict=True):
        assert closed_to(address, context, resumed=ticket)


def test_an_operator_asks_a_board_with_nothing_but_its_folder(doors: Doors, capsys: pytest.CaptureFixture[str]) -> None:
    picture = doors.path / "picture.jpg"
    picture.write_bytes(doors.picture)
    folder = str(doors.operator.folder)
    assert cli.main(["ask", TASK, str(picture), "--fleet", folder, "--board", BOARD, "--deadline-ms", "60000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["board"] == BOARD
