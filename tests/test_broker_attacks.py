"""What can be done to a fleet through its broker by who has a certificate and means harm: a real Mosquitto, a real agent.

SECURITY.md cases 35-37, 40 and 43 as far as updates go.  The thief has the certificate of an operator or of a board, and no
signing key: what it says passes the access list, and nothing of it is believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from edge_agent.steward.folder import OperatorFolder
from edge_agent.transport.loopback import Partition, Way
from edge_agent.transport.topics import Topics
from ota.chunks import encode_chunk
from ota.rollout import Standing, Step
from tests.brokers import Relay
from tests.enrolled_fleet import QUICK, EnrolledAgents, enrolled, good_file, sly
from tests.hostile_broker import packet, read_packet
from tests.operators import address_as, broker_of, new_fleet
from tests.ota_fleet import NUMBER, OPERATOR, OtaFleet

TOPICS = Topics("home")
BOARD = "barn"
PUBACK, PINGRESP, DISCONNECT = 0x40, 0xD0, 0xE0
NOT_AUTHORIZED = 0x87
PATIENCE_S = 60.0
GROWTH_BYTES = 24 * 2**20


class Scene:
    """A fleet whose one board lives behind a relay that can be cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.operator = new_fleet(path / "op")
        self.relay = Relay(self.operator.settings.port)
        enrolled(self.operator, path, BOARD, "jalapeno", QUICK)
        config = path / BOARD / "agent.toml"
        text = config.read_text()
        assert f"port = {self.operator.settings.port}\n" in text
        config.write_text(text.replace(f"port = {self.operator.settings.port}\n", f"port = {self.relay.port}\n"))
        self.agents = EnrolledAgents(path, [BOARD])

    @property
    def log(self) -> str:
        return self.agents.log_of(BOARD).read_text("utf-8", "replace")

    def new_charter(self) -> int:
        """An operator publishes: what somebody put in the way goes by that. The serial."""
        self.operator.put_charter(self.operator.charter)
        published = sly(self.operator, "fleet", "publish")
        assert published.returncode == 0, published.stderr
        return self.operator.charter.serial

    def said(self, words: str, since: int = 0) -> None:
        """Once the agent's log has ``words`` after its first ``since`` characters."""
        end_s = time.monotonic() + PATIENCE_S
        while words not in self.log[since:] and time.monotonic() < end_s:
            time.sleep(0.05)
        assert words in self.log[since:], self.log[-3000:]

    def memory_bytes(self) -> int:
        """Its own memory (proc(5), smaps_rollup); its share of libraries grows as other processes end."""
        lines = Path(f"/proc/{self.agents.pid_of(BOARD)}/smaps_rollup").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])

    @contextlib.contextmanager
    def thief(self, name: str) -> Iterator[Thief]:
        with connected(self.operator, name) as sock:
            yield Thief(sock)


@contextlib.contextmanager
def connected(operator: OperatorFolder, name: str) -> Iterator[ssl.SSLSocket]:
    """A raw MQTT 5 connection with the certificate of ``name``."""
    address = address_as(operator, name)
    assert address.tls is not None
    plain = socket.create_connection((address.host, address.port), PATIENCE_S)
    with address.tls.context().wrap_socket(plain, server_hostname=address.host) as sock:
        client_id = f"thief-{name}".encode()
        sock.sendall(packet(0x10, b"\0\4MQTT\5\2\0\x3c\0" + len(client_id).to_bytes(2) + client_id))
        assert read_packet(sock)[0] == 0x20, "it is connected"
        yield sock


class Thief:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def say(self, topic: str, payload: bytes, *, retain: bool = True) -> None:
        """QoS 0, unasked."""
        name = topic.encode()
        self._sock.sendall(packet(0x30 | retain, len(name).to_bytes(2) + name + b"\0" + payload))

    def settle(self) -> None:
        """The broker has read all that was said."""
        self._sock.sendall(packet(0xC0, b""))
        while (got := read_packet(self._sock)[0]) != PINGRESP:
            assert got, "the broker is gone"

    def asked(self, topic: bytes) -> int:
        """The broker's answer to a QoS 1 publication on ``topic``: its reason code, or -1 where it ends the connection."""
        self._sock.sendall(packet(0x32, len(topic).to_bytes(2) + topic + b"\0\7\0x"))
        try:
            first, body = read_packet(self._sock)
        except (ConnectionError, ssl.SSLError):
            return -1
        return (body[2] if len(body) > 2 else 0) if first == PUBACK else -1


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    made = Scene(tmp_path_factory.mktemp("attacked"))
    try:
        with broker_of(made.operator), made.agents:
            assert sly(made.operator, "fleet", "publish").returncode == 0
            made.agents.start()
            made.said(f"charter {made.operator.charter.serial} of home")
            yield made
    finally:
        made.relay.close()


def test_35_a_flood_of_topics_and_forged_words_leaves_an_agent_that_serves_in_its_memory_and_hears_its_operator(
    scene: Scene,
) -> None:
    assert scene.agents.ask(BOARD).status.value == "ok"
    scene.said(f"charter {scene.new_charter()} of home")  # what a first charter imports is no growth
    before_bytes = scene.memory_bytes()
    with scene.thief("operator.ann") as ann, scene.thief("kitchen") as kitchen:
        for number in range(1_500):
            ann.say(TOPICS.ota_meta(f"{number + 50}.root"), b"{" * 2_000)
            ann.say(TOPICS.rollout(f"model-{number}"), bytes(4_000))
            kitchen.say(TOPICS.report("kitchen"), number.to_bytes(4) * 1_000)
            kitchen.say(TOPICS.ota_want("kitchen"), number.to_bytes(4) * 1_000)
            kitchen.say(TOPICS.ota_chunk(sha256(number.to_bytes(4)).hexdigest()), encode_chunk(0, bytes(9_000)), retain=False)
        for number in range(12):
            ann.say(TOPICS.rollout(f"large-{number}"), bytes(3 * 2**20))
            kitchen.say(TOPICS.report("kitchen"), bytes(3 * 2**20))
        ann.settle()
        kitchen.settle()
    assert scene.agents.ask(BOARD).status.value == "ok"
    serial = scene.new_charter()
    scene.said(f"charter {serial} of home")
    end_s = time.monotonic() + 20  # what is still on its way to the board is heard first
    while (grown_bytes := scene.memory_bytes() - before_bytes) >= GROWTH_BYTES and time.monotonic() < end_s:
        assert scene.agents.ask(BOARD).status.value == "ok"
    assert grown_bytes < GROWTH_BYTES
    assert scene.agents.ask(BOARD).status.value == "ok"


def test_36_a_stale_timestamp_that_was_put_back_on_the_broker_is_refused_also_after_a_kill_and_without_the_files(
    scene: Scene,
) -> None:
    stale = dict(scene.operator.repository.documents())
    scene.said(f"charter {scene.new_charter()} of home")
    fresh = dict(scene.operator.repository.documents())
    since = len(scene.log)
    with scene.thief("operator.ann") as ann:
        for name in {*stale, *fresh}:
            ann.say(TOPICS.ota_meta(name), stale.get(name, b""))
        ann.settle()
    scene.said("publish the fleet's newest", since)
    since = len(scene.log)
    scene.agents.kill(BOARD)
    (metadata,) = (scene.path / BOARD).rglob("root_history")
    shutil.rmtree(metadata.parent)
    scene.agents.start([BOARD])
    scene.said("which this board has seen", since)
    assert scene.agents.ask(BOARD).status.value == "ok"
    assert sly(scene.operator, "fleet", "publish").returncode == 0
    scene.said("the fleet's metadata is good again", since)


def test_36_words_of_the_fleet_that_were_emptied_on_the_broker_are_as_they_were(scene: Scene) -> None:
    since = len(scene.log)
    with scene.thief("operator.ann") as ann:
        for name in scene.operator.repository.documents():
            ann.say(TOPICS.ota_meta(name), b"")
        ann.settle()
    serial = scene.new_charter()
    scene.said(f"charter {serial} of home", since)
    assert scene.agents.ask(BOARD).status.value == "ok"


def test_37_a_link_that_breaks_again_and_again_under_a_push_costs_no_piece_and_no_answer(scene: Scene) -> None:
    """Every break loses acknowledgements of QoS 1, so that pieces come twice; the session may be there or not."""
    good = good_file(scene.path / "good", bytes(3_000_000))

    async def story() -> int:
        push = asyncio.create_task(
            asyncio.to_thread(sly, scene.operator, "ota", "push", str(good), "--untested", "--max-rate", "1000000")
        )
        for _ in range(6):
            await asyncio.sleep(0.3)  # wherever it is then
            scene.relay.cut()
            scene.relay.mend()
            answer = await asyncio.to_thread(scene.agents.ask, BOARD)
            assert answer.status.value == "ok"
        done = await push
        assert done.returncode == 0, done.stdout + done.stderr
        return done.returncode

    asyncio.run(story())
    assert scene.agents.served_by(BOARD) == sha256(good.read_bytes()).digest()


@pytest.mark.parametrize(
    "topic",
    [
        b"sly/1/home/ota/meta/../root",
        b"sly/1/home/board/barn/../kitchen/record",
        b"sly/1/home/fleet/report/barn",
        b"sly/1/home/ota/want/../../../etc/passwd",
        b"sly/1/home/" + b"x" * 65_000,
        b"sly/1/home/ota/rollout/blazeface-short",
        b"$SYS/broker/version",
    ],
)
def test_40_a_topic_that_is_not_a_boards_to_say_goes_no_further_than_the_broker(scene: Scene, topic: bytes) -> None:
    with scene.thief("kitchen") as kitchen:
        assert kitchen.asked(topic) in (NOT_AUTHORIZED, -1)


@pytest.mark.parametrize(
    "topic",
    [b"sly/1/home/fleet/report/kit\0chen", b"sly/1/home/ota/meta/\xff\xfe", b"sly/1/home/ota/+/kitchen", b"sly/1/home/#", b""],
)
def test_40_a_topic_with_nul_a_wildcard_or_no_utf_8_ends_the_connection_of_who_says_it(scene: Scene, topic: bytes) -> None:
    with scene.thief("kitchen") as kitchen:
        assert kitchen.asked(topic) == -1
    assert scene.agents.ask(BOARD).status.value == "ok"


@pytest.mark.parametrize("way", [frozenset(Way), frozenset({Way.TO_BROKER}), frozenset({Way.FROM_BROKER})])
def test_43_islands_and_links_that_carry_one_way_take_a_release_alike_once_they_heal(way: frozenset[Way]) -> None:
    fleet = OtaFleet("islands", 8, lambda board, when: "")
    fleet.boot()
    fleet.push(canary=2, wave=3)
    fleet.run_for(3_000_000)
    assert fleet.plan is not None
    cut_off = frozenset(fleet.plan.boards[1::2])
    fleet.broker.partition(Partition(cut_off, way))
    fleet.run_for(30_000_000)
    assert all(board.serving in (0, NUMBER) for board in fleet.boards.values()), "everybody serves meanwhile"
    assert not fleet.agree_on_among(8, Standing.DONE), "a canary is cut off: nobody goes on without it"
    fleet.broker.heal()
    fleet.run_until(fleet.has_arrived, "all agree")
    verdict = fleet.verdicts()[0]
    assert verdict is not None and verdict.state is Standing.DONE and verdict.counts == {Step.CONFIRMED: 8}
    assert OPERATOR not in cut_off
