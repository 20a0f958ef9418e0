"""Boards that heard the same hold the same table, notice when they do not, and mend it; alone each goes on from the last one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from edge_agent.core.cbor import encode
from edge_agent.core.config import PolicySection
from edge_agent.core.cose import Signer, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_BOARDS, Status
from edge_agent.gossip.agreement import (
    AAD,
    MAX_DIGEST_BYTES,
    MAX_PASSED_ON,
    MAX_PASSED_ON_BYTES,
    BoardDigest,
    Version,
    open_digest,
    sign_digest,
)
from edge_agent.gossip.presence import AAD as PRESENCE_AAD
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.record import MAX_RECORD_BYTES
from edge_agent.node.agreement import DIFFERING_PERIOD_US, DOCUMENT, KEEP_PERIOD_US, MAKE_PERIOD_US
from edge_agent.node.announcer import CHANGED_PERIOD_US, QUIET_PERIOD_US
from edge_agent.node.events import Drain, Hosted, Sensed
from edge_agent.node.peers import OTHER_FACTS, OTHER_RULES, OTHER_TABLE, PATIENCE_US, SILENT_US
from edge_agent.placement.table import EMPTY
from edge_agent.transport.link import Delivered, LinkEvent, Message, Rejected
from edge_agent.transport.loopback import LoopbackLink
from tests.deaf_link import make_deaf
from tests.drawn import digests
from tests.virtual_board import RULES, VirtualBoard, offer, seed_of
from tests.virtual_fleet import VirtualFleet

SECOND_US = 1_000_000
SMALL, LARGE, TINY = offer("small", 20_000, 700), offer("large", 60_000, 900), offer("tiny", 5_000, 600)
SIGNER = Signer(b"b", seed_of("b"))
DIGEST = BoardDigest("b", 3, 5, b"f" * 32, b"t" * 32, b"r" * 32, 2)
RESYNC_US = PATIENCE_US + DIFFERING_PERIOD_US + CHANGED_PERIOD_US + 2 * MAKE_PERIOD_US
"""Until what was lost is said again and reckoned with: noticed, said, repeated, made anew."""


def in_fleet(scene: Callable[[VirtualFleet], Awaitable[None]], seed: int = 1) -> None:
    async def play() -> None:
        with VirtualFleet(seed) as fleet:
            await scene(fleet)

    asyncio.run(play())


def gathered(fleet: VirtualFleet, names: str = "abc") -> None:
    """Boards with these names, alike, that know each other; requests have come in at each."""
    for name in names:
        fleet.add_board(name, SMALL, LARGE)
    fleet.boot()
    fleet.agree(8 * SECOND_US)
    for name in names:
        for _ in range(3):
            fleet.ask(fleet.request(), name)
    fleet.settle(5 * SECOND_US)
    fleet.run_for(2 * SECOND_US)
    fleet.agree(30 * SECOND_US)


def agreed(fleet: VirtualFleet, *names: str) -> bool:
    return len({fleet.boards[name].node.agreement.digest for name in names or fleet.boards}) == 1


def report(board: VirtualBoard) -> dict[str, Any]:
    return board.node.agreement.report(board.fleet.now_us)


def word_on(board: VirtualBoard, other: str) -> dict[str, Any]:
    return next(each for each in report(board)["boards"] if each["board"] == other)


def listener(fleet: VirtualFleet) -> tuple[LoopbackLink, list[tuple[int, Message]]]:
    """Someone who may write everything, and what he hears, with the times."""
    heard: list[tuple[int, Message]] = []
    link = fleet.link_of("mallory")

    def hear(event: LinkEvent) -> None:
        if isinstance(event, Delivered):
            heard.append((fleet.now_us, event.message))
            link.acknowledge(event.token)

    link.open(hear)
    fleet.run_for(SECOND_US)
    link.subscribe("sly/1/home/#")
    fleet.run_for(SECOND_US)
    return link, heard


def logged(fleet: VirtualFleet) -> list[str]:
    lines: list[str] = []
    note = fleet.note

    def overhear(text: str, payload: bytes | memoryview = b"") -> None:
        lines.append(text)
        note(text, payload)

    fleet.note = overhear  # type: ignore[method-assign]
    return lines


# agreement after delivery


@pytest.mark.parametrize("names", ["ab", "abc", "abcde"])
def test_boards_that_heard_the_same_hold_the_same_table_with_the_demand_of_each(names: str) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, names)
        for board in fleet.boards.values():
            table = report(board)
            assert {entry["ingress"] for entry in table["entries"]} == set(names)
            assert {booking["board"] for booking in table["bookings"]} <= set(names) and table["bookings"]
            fleet.run_until(lambda: all(each["agrees"] for each in report(board)["boards"]), 10 * SECOND_US, "they say so")  # noqa: B023
            assert table["from"] == "made here" and table["moves"] <= table["move_bound"]

    in_fleet(scene)


def test_a_table_is_made_anew_when_facts_changed_and_at_no_other_time() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet)
        fleet.run_for(60 * SECOND_US)
        table = fleet.boards["a"].node.agreement.table
        fleet.run_for(60 * SECOND_US)
        assert fleet.boards["a"].node.agreement.table is table, "records were repeated, and said the same"
        fleet.boards["b"].feed(Hosted(TINY))
        fleet.run_for(3 * SECOND_US)
        assert agreed(fleet) and fleet.boards["a"].node.agreement.table is not table

    in_fleet(scene)


def test_facts_that_change_all_the_time_cost_one_table_and_one_digest_a_second() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        _, heard = listener(fleet)
        heard.clear()
        for number in range(100):
            fleet.boards["b"].feed(Hosted(replace(TINY, busy_us=1000 + 1000 * number)))
            fleet.run_for(SECOND_US // 10)
        for name in "ab":
            said = [at_us for at_us, message in heard if message.topic.endswith(f"digest/{name}")]
            assert 5 <= len(said) <= 11
        fleet.run_for(3 * SECOND_US)
        assert agreed(fleet)

    in_fleet(scene)


def test_a_board_that_is_gone_is_in_no_table() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet)
        fleet.boards["c"].kill()
        fleet.run_until(lambda: agreed(fleet, "a", "b"), 10 * SECOND_US, "the two agree")
        fleet.run_for(3 * SECOND_US)
        assert "c" not in {entry["ingress"] for entry in report(fleet.boards["a"])["entries"]}
        assert word_on(fleet.boards["a"], "c")["standing"] == "offline" and word_on(fleet.boards["a"], "c")["agrees"] is None

    in_fleet(scene)


# what was lost is said again


@pytest.mark.parametrize("names", ["bc", "abc"])
def test_a_lost_record_is_repeated_by_its_board_when_somebody_says_which_one_it_holds(names: str) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, names)
        fleet.run_for(60 * SECOND_US)
        deaf = make_deaf(fleet.boards["c"], "b/record")
        fleet.boards["b"].feed(Hosted(TINY))
        fleet.run_for(SECOND_US + SECOND_US // 2)
        deaf.lost = "\0"
        assert agreed(fleet, names[0], "b") and not agreed(fleet)
        assert word_on(fleet.boards["c"], names[0])["why"] == OTHER_FACTS
        assert RESYNC_US < QUIET_PERIOD_US, "or waiting would do as well"
        fleet.run_until(lambda: agreed(fleet), RESYNC_US, "all agree")

    in_fleet(scene)


def test_a_will_that_a_board_did_not_hear_is_passed_on_by_who_did() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet)
        make_deaf(fleet.boards["c"], "b/online")
        fleet.boards["b"].kill()
        fleet.run_for(SECOND_US)
        assert fleet.boards["a"].node.fleet.standing("b") is Standing.OFFLINE
        assert fleet.boards["c"].node.fleet.standing("b") is Standing.ONLINE
        fleet.run_until(lambda: agreed(fleet, "a", "c"), 2 * RESYNC_US, "the two agree")
        assert fleet.boards["c"].node.fleet.standing("b") is Standing.OFFLINE

    in_fleet(scene)


def test_the_record_of_a_board_that_cannot_repeat_it_is_passed_on() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet)
        fleet.broker.stop()
        fleet.boards["b"].kill()
        fleet.boards["c"].kill()
        fleet.broker.start(keep_sessions=False, keep_retained=False)
        fleet.boards["c"].boot()
        fleet.run_for(4 * SECOND_US)
        assert fleet.boards["c"].node.fleet.version("b") == (-1, -1), "nobody told that b is there, or that it is gone"
        fleet.run_until(lambda: agreed(fleet, "a", "c"), 3 * RESYNC_US, "the two agree")
        assert fleet.boards["c"].node.fleet.version("b") == fleet.boards["a"].node.fleet.version("b") != (-1, -1)

    in_fleet(scene)


def test_a_record_that_is_on_its_way_to_everybody_is_not_passed_on() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet)
        fleet.run_for(10 * SECOND_US)
        link, heard = listener(fleet)
        heard.clear()
        fleet.boards["c"].feed(Hosted(TINY))
        fleet.run_for(SECOND_US // 10)
        held = tuple(Version(name, 1, 1) for name in "abc")
        link.publish(Message("sly/1/home/digest/b", sign_digest(replace(DIGEST, boot_epoch=9, versions=held), SIGNER)))
        fleet.run_for(SECOND_US)
        said = [open_digest(message.payload, fleet.key_of) for _, message in heard if message.topic.endswith("digest/a")]
        assert said and not any(each.passed_on for each in said), "c itself repeats it"
        assert any(message.topic.endswith("c/record") for _, message in heard)

    in_fleet(scene)


def test_who_differs_and_is_heard_of_no_more_is_not_talked_to_for_ever() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        fleet.run_for(60 * SECOND_US)
        link, heard = listener(fleet)
        heard.clear()
        lie = replace(DIGEST, boot_epoch=9, rules=fleet.boards["a"].node.agreement.table.rules_digest)
        link.publish(Message("sly/1/home/digest/b", sign_digest(lie, SIGNER)))
        fleet.run_for(2 * SILENT_US)
        assert word_on(fleet.boards["a"], "b")["why"] == OTHER_FACTS
        assert SILENT_US < word_on(fleet.boards["a"], "b")["since_us"] <= 2 * SILENT_US
        times_us = [at_us - fleet.now_us + 2 * SILENT_US for at_us, message in heard if message.topic.endswith("digest/a")]
        assert sum(at_us <= SILENT_US for at_us in times_us) >= SILENT_US // DIFFERING_PERIOD_US - 1
        assert sum(at_us > SILENT_US for at_us in times_us) <= SILENT_US // QUIET_PERIOD_US + 1

    in_fleet(scene)


def test_a_digest_that_the_link_would_not_take_is_said_again() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        fleet.run_for(60 * SECOND_US)
        _, heard = listener(fleet)
        heard.clear()
        fleet.boards["a"].feed(Rejected("too much waits"))
        fleet.run_for(2 * SECOND_US)
        assert any(message.topic.endswith("digest/a") for _, message in heard)

    in_fleet(scene)


def test_a_board_is_not_at_rest_while_a_table_is_due() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        fleet.run_for(60 * SECOND_US)
        nodes = [board.node for board in fleet.boards.values()]
        assert all(node.at_rest for node in nodes)
        fleet.boards["a"].feed(Hosted(TINY))
        fleet.run_for(SECOND_US // 2)
        fleet.boards["b"].feed(Hosted(TINY))
        fleet.run_until(lambda: not nodes[1].at_rest, 2 * SECOND_US, "b has a table to make")
        fleet.run_until(lambda: all(node.at_rest for node in nodes), 4 * SECOND_US, "it was made and said")
        assert agreed(fleet)

    in_fleet(scene)


def test_what_a_board_has_elsewhere_is_its_own_and_is_told_to_nobody() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        cloud = replace(offer("big", 500_000, 950, "chat"), cloud=True, price_us=5)
        fleet.boards["a"].feed(Hosted(cloud))
        fleet.boards["a"].feed(Hosted(TINY))
        fleet.run_for(3 * SECOND_US)
        (record,) = fleet.boards["b"].node.fleet.records()
        assert [each.model for each in record.offers] == ["large", "small", "tiny"]
        assert "big" in fleet.boards["a"].node.execution.offers

    in_fleet(scene)


def test_a_member_that_says_it_lacks_everything_makes_a_board_speak_once_a_second_and_no_more() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        link, heard = listener(fleet)
        heard.clear()
        for number in range(100):
            lie = replace(DIGEST, boot_epoch=9, sequence=number, versions=(Version("b", 9, 9),))
            link.publish(Message("sly/1/home/digest/b", sign_digest(lie, SIGNER)))
            fleet.run_for(SECOND_US // 20)
        for topic, least in (("a/record", 3), ("a/online", 3), ("digest/a", 0)):
            assert least <= sum(message.topic.endswith(topic) for _, message in heard) <= 7, topic

    in_fleet(scene)


# who cannot agree is named


def test_a_board_with_other_rules_is_named_once_and_by_both() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        lines = logged(fleet)
        for name in "ab":
            fleet.add_board(name, SMALL)
        fleet.boards["b"].rules = replace(RULES, policy=PolicySection(lateness_factor=11))
        fleet.boot()
        fleet.run_for(20 * SECOND_US)
        assert word_on(fleet.boards["a"], "b")["why"] == word_on(fleet.boards["b"], "a")["why"] == OTHER_RULES
        assert word_on(fleet.boards["a"], "b")["agrees"] is False
        assert len([line for line in lines if line.startswith("a > Log") and "other rules" in line]) == 1

    in_fleet(scene)


def test_a_board_that_makes_another_table_of_the_same_facts_is_named() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        lines = logged(fleet)
        link, _ = listener(fleet)
        agreement = fleet.boards["a"].node.agreement
        own = agreement.table
        lie = replace(DIGEST, boot_epoch=9, facts=own.facts_digest, rules=own.rules_digest)
        link.publish(Message("sly/1/home/digest/b", sign_digest(lie, SIGNER)))
        fleet.run_for(SECOND_US // 10)
        assert word_on(fleet.boards["a"], "b")["why"] == OTHER_TABLE
        assert word_on(fleet.boards["a"], "b")["since_us"] is None
        assert any("a > Log" in line and OTHER_TABLE in line for line in lines)
        link.publish(Message("sly/1/home/digest/b", sign_digest(replace(lie, sequence=6, table=own.digest), SIGNER)))
        fleet.run_for(SECOND_US // 10)
        assert word_on(fleet.boards["a"], "b")["agrees"] and any("same table again" in line for line in lines)

    in_fleet(scene)


# alone


def test_a_cold_boot_without_a_broker_has_the_last_table_at_once_and_serves() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet)
        for _ in range(KEEP_PERIOD_US // (4 * SECOND_US) + 1):
            fleet.ask(fleet.request(), "a")
            fleet.run_for(4 * SECOND_US)
        kept = fleet.boards["a"].ledger.document(DOCUMENT)
        fleet.broker.stop()
        for board in fleet.boards.values():
            board.kill(power_cut=True)
        fleet.boards["a"].boot()
        agreement = fleet.boards["a"].node.agreement
        assert agreement.table.encode() == kept and {each.ingress for each in agreement.table.entries} <= set("abc")
        assert {option.board for each in agreement.table.entries for option in each.options} == set("abc")
        assert report(fleet.boards["a"])["from"] == "kept in the ledger"
        asked = fleet.ask(fleet.request(), "a")
        fleet.run_for(SECOND_US)
        assert asked.answers[0].status is Status.OK
        fleet.run_for(60 * SECOND_US)
        assert agreement.table.encode() == kept, "nothing expires by a local clock"

    in_fleet(scene)


@pytest.mark.parametrize("damaged", [b"", b"\xa0", b"nonsense", encode({1: b"f" * 32})])
def test_a_table_in_the_ledger_that_cannot_be_read_is_left_out_and_said(damaged: bytes) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        lines = logged(fleet)
        board = fleet.add_board("a", SMALL)
        board.boot()
        board.ledger.put_document(DOCUMENT, damaged)
        board.kill()
        board.boot()
        assert board.node.agreement.table == EMPTY or board.node.agreement.table.entries == ()
        assert any("Log" in line and "left out" in line for line in lines)

    in_fleet(scene)


def test_a_board_without_a_broker_and_without_others_makes_a_table_of_itself() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        fleet.broker.stop()
        fleet.add_board("a", SMALL, LARGE)
        fleet.boot()
        fleet.ask(fleet.request(), "a")
        fleet.run_for(3 * SECOND_US)
        (entry,) = report(fleet.boards["a"])["entries"]
        assert entry["ingress"] == "a" and {option["board"] for option in entry["options"]} == {"a"}

    in_fleet(scene)


def test_a_board_that_lost_the_broker_keeps_its_table_whatever_it_feels_and_agrees_anew_afterwards() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet)
        fleet.broker.stop()
        fleet.run_for(2 * SECOND_US)
        board = fleet.boards["a"]
        table = board.node.agreement.table
        board.feed(Sensed(84_500, 85_000))
        for _ in range(10):
            fleet.ask(fleet.request(), "a")
        fleet.run_for(30 * SECOND_US)
        assert board.node.agreement.table is table
        fleet.broker.start()
        fleet.run_for(8 * SECOND_US)
        fleet.agree(30 * SECOND_US)
        assert agreed(fleet) and board.node.agreement.table is not table

    in_fleet(scene)


def test_the_table_is_written_at_most_once_a_minute_and_when_the_board_is_told_to_stop() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        board = fleet.boards["a"]
        written: list[str] = []
        put = board.ledger.put_document

        def write(name: str, data: bytes) -> None:
            written.append(name)
            put(name, data)

        board.ledger.put_document = write  # type: ignore[method-assign]
        for number in range(60):
            fleet.boards["b"].feed(Hosted(replace(TINY, busy_us=1000 + 1000 * number)))
            fleet.run_for(2 * SECOND_US)
        assert 1 <= len(written) <= 2
        fleet.boards["b"].feed(Hosted(replace(TINY, quality_permille=999)))
        fleet.run_for(3 * SECOND_US)
        last = board.node.agreement.table.encode()
        assert board.ledger.document(DOCUMENT) != last
        board.feed(Drain())
        assert board.ledger.document(DOCUMENT) == last

    in_fleet(scene)


# messages from outside


def key_of(kid: bytes) -> bytes | None:
    return {b"b": SIGNER.public_key}.get(kid)


@given(digests)
def test_a_digest_comes_back_as_it_was(digest: BoardDigest) -> None:
    signer = Signer(digest.board.encode(), b"\7" * 32)
    assert open_digest(sign_digest(digest, signer), lambda kid: signer.public_key) == digest


def test_the_longest_digest_there_is_fits() -> None:
    names = tuple(f"{number:032}" for number in range(MAX_BOARDS))
    longest = replace(
        DIGEST,
        versions=tuple(Version(name, 2**53, 2**53) for name in names),
        passed_on=(bytes(MAX_PASSED_ON_BYTES - MAX_PASSED_ON + 1), *[b"x"] * (MAX_PASSED_ON - 1)),
    )
    message = sign_digest(longest, SIGNER)
    assert len(message) <= MAX_DIGEST_BYTES and open_digest(message, key_of) == longest
    assert MAX_PASSED_ON_BYTES >= MAX_RECORD_BYTES, "any record can be passed on"


def test_34_every_bit_flip_truncation_and_extension_of_a_digest_is_refused() -> None:
    message = sign_digest(replace(DIGEST, versions=(Version("a", 1, 2),)), SIGNER)
    open_digest(message, key_of)
    flipped = [message[:i] + bytes((message[i] ^ 1 << bit,)) + message[i + 1 :] for i in range(len(message)) for bit in range(8)]
    for wrong in flipped + [message[:size] for size in range(len(message))] + [message + b"\0"]:
        with pytest.raises(RefusedError):
            open_digest(wrong, key_of)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({1: "../b"}, "board"),
        ({1: "c"}, "a board's own signature"),
        ({2: -1}, "boot_epoch"),
        ({3: 2**54}, "sequence"),
        ({4: bytes(31)}, "facts"),
        ({5: bytes(33)}, "table"),
        ({6: b""}, "rules"),
        ({7: MAX_BOARDS + 1}, "boards"),
        ({8: []}, "versions"),
        ({8: [["a", 1]]}, "version"),
        ({8: [["a", 1, -1]]}, "sequence"),
        ({8: [["a", True, 1]]}, "boot_epoch"),
        ({8: [["a", 1, 1], ["a", 1, 2]]}, "each board once"),
        ({8: [["c", 1, 1], ["a", 1, 2]]}, "ascending"),
        ({8: [[f"b{i:04}", 1, 1] for i in range(MAX_BOARDS + 1)]}, "versions"),
        ({9: []}, "passed_on"),
        ({9: [b""] * (MAX_PASSED_ON + 1)}, "passed_on"),
        ({9: [bytes(MAX_PASSED_ON_BYTES + 1)]}, "passed_on"),
        ({9: [7]}, "passed_on"),
        ({99: 0}, "unknown key"),
    ],
)
def test_a_digest_that_is_signed_and_wrong_is_refused_naming_the_field(changes: dict[int, object], named: str) -> None:
    with pytest.raises(RefusedError, match=named):
        open_digest(sign1(encode({**DIGEST.to_map(), **changes}), SIGNER, AAD), key_of)


def test_hostile_digests_change_nothing() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet, "ab")
        link, heard = listener(fleet)
        stale = next(message for _, message in heard if message.topic.endswith("digest/b"))
        fleet.boards["b"].feed(Hosted(TINY))
        fleet.run_for(4 * SECOND_US)
        fleet.run_until(lambda: word_on(fleet.boards["a"], "b")["agrees"], 40 * SECOND_US, "they agree")
        before = word_on(fleet.boards["a"], "b")
        forged = replace(DIGEST, boot_epoch=9)
        for payload in (
            b"",
            sign_digest(forged, Signer(b"b", b"\x42" * 32)),
            sign_digest(replace(forged, board="a"), Signer(b"a", seed_of("a"))),
            sign1(encode(forged.to_map()), SIGNER, PRESENCE_AAD),
            stale.payload,
        ):
            link.publish(Message("sly/1/home/digest/b", payload, retain=True))
        link.publish(Message("sly/1/home/digest/c", sign_digest(forged, SIGNER), retain=True))
        fleet.run_for(SECOND_US // 10)
        after = word_on(fleet.boards["a"], "b")
        assert (after["digest"], after["agrees"]) == (before["digest"], True)

    in_fleet(scene)


def test_what_is_passed_on_counts_only_with_its_own_boards_signature() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gathered(fleet)
        link, _ = listener(fleet)
        mallory = Signer(b"c", b"\x42" * 32)
        word = sign1(encode({1: "c", 2: 1, 3: "offline"}), mallory, PRESENCE_AAD)
        told = replace(DIGEST, boot_epoch=9, passed_on=(word, b"\xd2nonsense"))
        link.publish(Message("sly/1/home/digest/b", sign_digest(told, SIGNER)))
        fleet.run_for(SECOND_US // 10)
        assert fleet.boards["a"].node.fleet.standing("c") is Standing.ONLINE
        real = replace(told, sequence=6, passed_on=(fleet.boards["c"].node.will().payload,))
        link.publish(Message("sly/1/home/digest/b", sign_digest(real, SIGNER)))
        fleet.run_for(2_500)
        assert fleet.boards["a"].node.fleet.standing("c") is Standing.OFFLINE
        fleet.run_for(3 * SECOND_US)
        assert fleet.boards["a"].node.fleet.standing("c") is Standing.ONLINE, "c heard of it and spoke"

    in_fleet(scene)
