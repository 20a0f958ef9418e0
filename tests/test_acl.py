"""Who may say and hear what at the fleet's broker: the access list that ``sly fleet init`` writes, on a real Mosquitto."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edge_agent.steward.enrolling import Enrolment, enroll, revoke
from edge_agent.steward.folder import OperatorFolder
from edge_agent.steward.mosquitto import access_list
from edge_agent.transport.link import Message, Will
from edge_agent.transport.topics import TOOL, Kind, Topics
from tests.operators import LIMIT_S, Client, address_as, address_of, broker_of, clients, new_fleet

TOPICS = Topics("home")
DIGEST = "ab" * 32
NOT_ALLOWED = "not authorized"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorFolder]:
    folder = new_fleet(tmp_path_factory.mktemp("acl") / "fleet")
    with broker_of(folder):
        yield folder


def every_topic(me: str, other: str) -> list[str]:
    """Of every kind, each topic that names these two in each of its parts."""
    parts = {"board", "peer", "verifier", "client"}
    found = []
    for kind in Kind:
        texts = [kind.value.format_map(_Keep(role="timestamp", digest=DIGEST, model="smollm2"))]
        for part in parts:
            texts = [text.replace(f"{{{part}}}", who) for text in texts for who in (me, other)]
        found += [f"sly/1/home/{text}" for text in sorted(set(texts))]
    return found


class _Keep(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return f"{{{key}}}"


BOARDS_OWN = {
    TOPICS.online("kitchen"), TOPICS.record("kitchen"), TOPICS.quote("kitchen"), TOPICS.epoch("kitchen"),
    TOPICS.digest("kitchen"), TOPICS.ota_want("kitchen"), TOPICS.report("kitchen"), TOPICS.ota_chunk(DIGEST),
    TOPICS.self_test("kitchen"),
    *(TOPICS.reply("kitchen", who) for who in ("kitchen", "barn")),
    *(TOPICS.appraisal("kitchen", who) for who in ("kitchen", "barn")),
    *(TOPICS.kv(who, "kitchen") for who in ("kitchen", "barn")),
    *(build(who) for who in ("kitchen", "barn") for build in (TOPICS.challenge, TOPICS.request, TOPICS.cancel)),
}  # fmt: skip


def test_a_board_says_what_is_its_own_and_what_the_protocol_has_it_ask_of_others_and_nothing_else(fleet: OperatorFolder) -> None:
    async def scene() -> None:
        async with clients(fleet, "kitchen") as [kitchen]:
            allowed = {topic for topic in every_topic("kitchen", "barn") if not await kitchen.says(Message(topic, b"x"))}
            assert allowed == BOARDS_OWN
            for topic in ("sly/1/other/board/kitchen/record", "elsewhere", "sly/1/home/board/kitchen/record/more"):
                assert await kitchen.says(Message(topic, b"x")) == NOT_ALLOWED

    asyncio.run(scene())


def test_an_operator_says_what_the_fleet_trusts_and_nothing_in_a_boards_name(fleet: OperatorFolder) -> None:
    async def scene() -> None:
        async with clients(fleet, "operator.ann", "operator.eve") as [ann, eve]:
            trusted = {TOPICS.ota_meta("timestamp"), TOPICS.rollout("smollm2"), TOPICS.word("kitchen"), TOPICS.ota_chunk(DIGEST)}
            asked = {TOPICS.request("kitchen"), TOPICS.challenge("kitchen"), TOPICS.cancel("kitchen")}
            every = every_topic("kitchen", "kitchen")
            assert {topic for topic in every if not await ann.says(Message(topic, b"x"))} == trusted | asked
            assert not await ann.says(Message(TOPICS.reply("ann", "any"), b"x"))
            for topic in trusted - {TOPICS.ota_chunk(DIGEST)}:
                assert await eve.says(Message(topic, b"x")) == NOT_ALLOWED, "an operator that no charter names"

    asyncio.run(scene())


def test_a_board_hears_what_is_for_it_or_for_all_and_nothing_that_is_for_another(fleet: OperatorFolder) -> None:
    async def scene() -> None:
        async with clients(fleet, "kitchen", "barn", "operator.ann") as [kitchen, barn, ann]:
            said = []
            for speaker in (barn, ann):
                said += [topic for topic in every_topic("barn", "kitchen") if not await speaker.says(Message(topic, b"x"))]
            last = TOPICS.request("kitchen")
            assert not await barn.says(Message(last, b"last"))
            await kitchen.until(lambda: kitchen.topics.count(last) == said.count(last) + 1)
            for_barn = {TOPICS.request("barn"), TOPICS.challenge("barn"), TOPICS.cancel("barn"), TOPICS.kv("barn", "barn"),
                        TOPICS.reply("barn", "barn"), TOPICS.self_test("barn")}  # fmt: skip
            assert set(said) - set(kitchen.topics) == for_barn
            assert set(said) <= set(ann.topics), "an operator hears all of it"

    asyncio.run(scene())


def test_who_asks_for_a_board_hears_its_own_answers_and_a_lie_about_the_client_id_opens_nobody_elses(
    fleet: OperatorFolder,
) -> None:
    async def scene() -> None:
        tool = await Client(address_as(fleet, "kitchen"), "ask-1").up()
        liar = await Client(address_as(fleet, "garage"), "kitchen").up()
        for each in (tool, liar):
            each.link.subscribe("#")
        async with clients(fleet, "barn") as [barn]:
            answers = [TOPICS.reply("barn", "kitchen"), TOPICS.reply("barn", f"kitchen{TOOL}ask-1")]
            for topic in [*answers, TOPICS.reply("barn", "garage"), TOPICS.reply("barn", f"garage{TOOL}kitchen")]:
                assert not await barn.says(Message(topic, b"x"))
            await liar.until(lambda: len(liar.topics) == 2)
            await tool.until(lambda: len(tool.topics) == 2)
            assert tool.topics == answers and not set(liar.topics) & set(answers)
        tool.link.close()
        liar.link.close()

    asyncio.run(scene())


def test_a_spoofed_will_in_another_boards_name_is_not_said_for_the_board_that_left_it(fleet: OperatorFolder) -> None:
    async def vanish(name: str, topic: str) -> None:
        address = address_as(fleet, "kitchen")
        gone = await Client(address, name, Will(Message(topic, b"gone"))).up()
        successor = await Client(address, name).up()
        gone.link.close()
        successor.link.close()

    async def scene() -> None:
        async with clients(fleet, "operator.ann") as [ann]:
            await vanish("thief", TOPICS.online("barn"))
            await vanish("honest", TOPICS.online("kitchen"))
            await ann.until(lambda: bool(ann.topics))
            assert ann.topics == [TOPICS.online("kitchen")]

    asyncio.run(scene())


def test_a_forged_identity_is_whom_its_certificate_names_whatever_it_calls_itself(fleet: OperatorFolder) -> None:
    async def scene() -> None:
        forger = await Client(address_as(fleet, "kitchen"), "sly-home-barn").up()
        assert await forger.says(Message(TOPICS.record("barn"), b"x")) == NOT_ALLOWED
        assert not await forger.says(Message(TOPICS.record("kitchen"), b"x"))
        forger.link.close()

    asyncio.run(scene())


def test_a_board_that_is_revoked_says_and_hears_nothing_from_then_on_and_does_not_come_back(tmp_path: Path) -> None:
    folder = new_fleet(tmp_path / "fleet")
    enroll(folder, Enrolment("barn", "jalapeno"))
    with broker_of(folder):

        async def scene() -> None:
            async with clients(folder, "barn", "kitchen") as [barn, kitchen]:
                assert not await barn.says(Message(TOPICS.record("barn"), b"x"))
                revoke(folder, "barn", "stolen")
                assert folder.reload_broker()
                async with asyncio.timeout(LIMIT_S):
                    while not await barn.says(Message(TOPICS.record("barn"), b"late")):
                        pass  # until the broker has read its list
                assert await barn.says(Message(TOPICS.request("kitchen"), b"x")) == NOT_ALLOWED
                heard = len(barn.topics)
                assert not await kitchen.says(Message(TOPICS.record("kitchen"), b"secret"))
                await kitchen.until(lambda: TOPICS.record("kitchen") in kitchen.topics)
                assert len(barn.topics) == heard
                again = Client(address_of(folder, "barn"), "barn-again")
                await again.until(lambda: bool(again.downs))
                assert "certificate revoked" in again.downs[0].reason
                again.link.close()

        asyncio.run(scene())


def test_a_packet_that_announces_256_mb_ends_the_connection_of_who_sends_it(fleet: OperatorFolder) -> None:
    address = address_as(fleet, "kitchen")
    assert address.tls is not None
    connect = b"\x10\x12\0\4MQTT\5\2\0\x3c\0\0\5flood"
    plain = socket.create_connection((address.host, address.port), 30)
    with address.tls.context().wrap_socket(plain, server_hostname=address.host) as sock:
        sock.sendall(connect)
        assert sock.recv(4)[0] == 0x20, "it is connected"
        sock.sendall(b"\x32\xff\xff\xff\x7f")
        with suppress(ConnectionResetError, ssl.SSLEOFError):
            while sock.recv(4096):
                pass


def test_the_access_list_knows_every_topic_of_the_protocol() -> None:
    text = access_list("home", ["ann"], ["barn"])
    said = "\n".join(line for line in text.splitlines() if " write " in line)
    for kind in Kind:
        head = kind.value.split("{")[0]
        last = kind.value.rsplit("}", 1)[1]
        assert any(f"home/{head}" in line and line.endswith(last) for line in said.splitlines()), kind
    assert text.index("topic deny #") < text.index("pattern")
