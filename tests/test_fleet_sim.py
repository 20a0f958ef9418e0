"""What a whole fleet promises, on virtual time: random weather from many seeds, and each known attack by its name."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from edge_agent.core.config import QueueSection
from edge_agent.core.cose import Signer
from edge_agent.core.values import Status
from edge_agent.gossip.presence import Presence, Standing, sign_presence
from edge_agent.gossip.record import BoardRecord, sign_record
from edge_agent.node.announcer import QUIET_PERIOD_US
from edge_agent.sim.sharing import shared_work
from edge_agent.store.ledger import Bounds
from edge_agent.transport.link import Delivered, LinkEvent, Message
from edge_agent.transport.loopback import Delay, Faults, LoopbackLink, Partition, Way
from tests.fleet_weather import ride_out
from tests.virtual_board import offer, seed_of
from tests.virtual_fleet import BrokenPromiseError, VirtualFleet

SEEDS, SEEDS_AT_ONCE, SEEDS_A_TEST = 200, 20, 20
"""Those after the first ones are tried by ``make test-long``."""
FIRSTS = [pytest.param(first, marks=() if first < SEEDS_AT_ONCE else pytest.mark.long) for first in range(0, SEEDS, SEEDS_A_TEST)]
SECOND_US = 1_000_000
SMALL, LARGE = offer("small", 20_000, 700), offer("large", 60_000, 900)


def in_fleet(scene: Callable[[VirtualFleet], Awaitable[None]], seed: int = 1) -> None:
    async def play() -> None:
        with VirtualFleet(seed) as fleet:
            await scene(fleet)

    asyncio.run(play())


def three_boards(fleet: VirtualFleet, *, offers: tuple[str, ...] = ("a", "b", "c")) -> None:
    """Boards a, b, c that know each other; those in ``offers`` host both models."""
    for name in ("a", "b", "c"):
        fleet.add_board(name, *((SMALL, LARGE) if name in offers else ()))
    fleet.boot()
    fleet.agree(5 * SECOND_US)


@pytest.mark.parametrize("first", FIRSTS)
def test_every_client_that_stays_gets_exactly_one_answer_whatever_the_weather(first: int) -> None:
    outcomes: Counter[str] = Counter()
    started_s = time.perf_counter()
    with shared_work():
        for seed in range(first, first + SEEDS_A_TEST):
            outcomes += asyncio.run(ride_out(seed)).outcomes
    print(f"{SEEDS_A_TEST / (time.perf_counter() - started_s):.1f} seeds/s, {dict(outcomes)}")
    assert outcomes["ok"] > sum(outcomes.values()) // 2, "a fleet that sheds everything keeps every promise and is worth nothing"


@pytest.mark.parametrize("seed", [59, *(pytest.param(seed, marks=pytest.mark.long) for seed in (3, 17))])
def test_a_run_is_a_pure_function_of_its_seed(seed: int) -> None:
    first, second = (asyncio.run(ride_out(seed)) for _ in range(2))
    with shared_work():
        assert first == second == asyncio.run(ride_out(seed)), "also where boards of one process share what they work out alike"
    assert asyncio.run(ride_out(seed + 1)).trace_digest != first.trace_digest


def test_a_broken_promise_says_how_to_reproduce_it() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        with pytest.raises(BrokenPromiseError, match=r"seed 7 at 0\.000000 s: .*python -m tests\.virtual_fleet 7"):
            fleet.promise(False, "nothing")

    in_fleet(scene, seed=7)


def test_without_faults_every_request_is_served_and_load_is_shared() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        await fleet.add_client("camera")
        for _ in range(20):
            fleet.ask(fleet.request(), "a")
            fleet.ask_by_broker("camera", fleet.request(), "a")
        fleet.settle(20 * SECOND_US)
        results = [asked.answers[0] for asked in fleet.asked]
        assert {result.status for result in results} == {Status.OK}
        assert {result.board for result in results} == {"a", "b", "c"}

    in_fleet(scene)


def test_a_board_that_hosts_nothing_has_its_clients_served_by_others() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("b",))
        asked = fleet.ask(fleet.request(), "a")
        fleet.settle(5 * SECOND_US)
        assert asked.answers[0].status is Status.OK and asked.answers[0].board == "b"

    in_fleet(scene)


def test_a_killed_boards_requests_go_elsewhere_and_none_is_lost() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("b", "c"))
        asked = [fleet.ask(fleet.request(), "a") for _ in range(20)]
        fleet.run_for(30_000)
        fleet.boards["b"].kill()
        fleet.run_until(lambda: all(each.answers for each in asked), 10 * SECOND_US, "answers")
        assert {each.answers[0].status for each in asked} == {Status.OK}
        assert fleet.boards["a"].node.fleet.standing("b") is Standing.OFFLINE

    in_fleet(scene)


def test_an_ingress_board_that_is_killed_answers_its_broker_clients_after_it_rebooted() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        await fleet.add_client("camera")
        fleet.run_for(SECOND_US)
        asked = [fleet.ask_by_broker("camera", fleet.request(30 * SECOND_US), "a") for _ in range(20)]
        fleet.run_for(25_000)
        assert len(fleet.boards["a"].ledger.unanswered(100)) > 10
        fleet.boards["a"].kill()
        fleet.run_for(SECOND_US)
        fleet.boards["a"].boot()
        fleet.settle(20 * SECOND_US)
        assert {each.answers[0].status for each in asked} == {Status.OK}

    in_fleet(scene)


def test_more_unanswered_requests_than_one_batch_of_the_ledger_holds_are_all_taken_up_after_a_boot() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("a",))
        await fleet.add_client("camera")
        fleet.run_for(SECOND_US)
        big_bytes = 3 * 2**20
        asked = [fleet.ask_by_broker("camera", fleet.request(60 * SECOND_US, size_bytes=big_bytes), "a") for _ in range(6)]
        fleet.run_for(15_000)
        fleet.boards["a"].kill()
        fleet.boards["a"].boot()
        assert not fleet.boards["a"].node.idle
        assert len(fleet.boards["a"].node.router.ingress) == 6
        fleet.settle(20 * SECOND_US)
        assert {each.answers[0].status for each in asked} == {Status.OK}

    in_fleet(scene)


# 36: stale or empty retained message, will spoofed


def attacker(fleet: VirtualFleet) -> tuple[LoopbackLink, list[Message]]:
    """Someone who may write everything, and what he hears."""
    heard: list[Message] = []
    link = fleet.link_of("mallory")

    def hear(event: LinkEvent) -> None:
        if isinstance(event, Delivered):
            heard.append(event.message)
            link.acknowledge(event.token)

    link.open(hear)
    fleet.run_for(SECOND_US)
    link.subscribe("sly/1/home/#")
    fleet.run_for(SECOND_US)
    return link, heard


def test_36_an_empty_retained_record_or_presence_changes_nothing() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        before = fleet.boards["a"].node.fleet.digest()
        link, _ = attacker(fleet)
        for kind in ("online", "record"):
            link.publish(Message(f"sly/1/home/board/b/{kind}", b"", retain=True))
        fleet.run_for(SECOND_US // 2)
        assert fleet.boards["a"].node.fleet.digest() == before
        assert fleet.boards["a"].node.fleet.standing("b") is Standing.ONLINE

    in_fleet(scene)


def test_36_a_stale_retained_record_never_takes_the_place_of_a_newer_one() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        link, heard = attacker(fleet)
        stale = next(message for message in heard if message.topic.endswith("b/record"))
        fleet.ask(fleet.request(), "b")
        fleet.run_for(20 * SECOND_US)
        versions = {record.board: record.version for record in fleet.boards["a"].node.fleet.records()}
        link.publish(Message(stale.topic, stale.payload, retain=True))
        fleet.boards["a"].kill()
        fleet.boards["a"].boot()
        fleet.run_for(QUIET_PERIOD_US + 2 * SECOND_US)
        assert {r.board: r.version for r in fleet.boards["a"].node.fleet.records()}["b"] >= versions["b"]

    in_fleet(scene)


def test_36_a_spoofed_will_is_refused_and_one_of_an_older_boot_is_ignored() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        link, _ = attacker(fleet)
        fleet.boards["b"].kill()
        fleet.boards["b"].boot()
        fleet.run_for(3 * SECOND_US)
        mallory = Signer(b"b", b"\x42" * 32)
        forged = sign_presence(Presence("b", 2, Standing.OFFLINE), mallory)
        old_will = sign_presence(Presence("b", 1, Standing.OFFLINE), Signer(b"b", seed_of("b")))
        of_another = sign_presence(Presence("c", 2, Standing.OFFLINE), Signer(b"c", seed_of("c")))
        for payload in (forged, old_will, of_another):
            link.publish(Message("sly/1/home/board/b/online", payload, retain=True))
        fleet.run_for(SECOND_US)
        assert fleet.boards["a"].node.fleet.standing("b") is Standing.ONLINE
        assert fleet.boards["a"].node.fleet.standing("c") is Standing.ONLINE

    in_fleet(scene)


def test_36_a_replayed_will_of_this_boot_is_contradicted_by_the_board_within_seconds() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        link, _ = attacker(fleet)
        will = fleet.boards["b"].node.will()
        link.publish(will)
        fleet.run_for(2_500)
        assert fleet.boards["a"].node.fleet.standing("b") is Standing.OFFLINE, "the broker may say so early"
        fleet.run_for(2 * SECOND_US)
        assert fleet.boards["a"].node.fleet.standing("b") is Standing.ONLINE

    in_fleet(scene)


def test_36_a_flood_of_replayed_wills_makes_a_board_speak_once_a_second_and_no_more() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        link, heard = attacker(fleet)
        will = fleet.boards["b"].node.will()
        heard.clear()
        for _ in range(100):
            link.publish(will)
            fleet.run_for(SECOND_US // 20)
        births = [m for m in heard if m.topic.endswith("/b/online") and m.payload != will.payload]
        assert 3 <= len(births) <= 6

    in_fleet(scene)


def test_36_a_record_with_a_later_version_by_another_hand_is_refused() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        before = fleet.boards["a"].node.fleet.digest()
        link, _ = attacker(fleet)
        for signer in (Signer(b"b", b"\x42" * 32), Signer(b"c", seed_of("c"))):
            link.publish(Message("sly/1/home/board/b/record", sign_record(BoardRecord("b", 9, 9), signer), retain=True))
        fleet.run_for(SECOND_US // 2)
        assert fleet.boards["a"].node.fleet.digest() == before

    in_fleet(scene)


# 37: QoS 1 duplicates, lost ack, session-present lies


def test_37_every_message_twice_and_out_of_order_is_as_good_as_once() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("b", "c"))
        await fleet.add_client("camera")
        fleet.broker.wire.faults = Faults(Delay(1_000, 100_000), duplicate_permille=1000, reorder_permille=500)
        asked = [fleet.ask_by_broker("camera", fleet.request(20 * SECOND_US), "a") for _ in range(20)]
        asked += [fleet.ask(fleet.request(20 * SECOND_US), "a") for _ in range(20)]
        fleet.settle(60 * SECOND_US)
        assert {each.answers[0].status for each in asked} == {Status.OK}
        assert max(fleet.executions.values()) == 1

    in_fleet(scene)


def test_37_when_most_acknowledgements_are_lost_everything_is_still_answered_once() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("b", "c"))
        await fleet.add_client("camera")
        fleet.broker.wire.faults = Faults(Delay(1_000), loss_permille=600, retry_us=200_000)
        asked = [fleet.ask_by_broker("camera", fleet.request(60 * SECOND_US), "a") for _ in range(20)]
        fleet.settle(120 * SECOND_US)
        assert {each.answers[0].status for each in asked} == {Status.OK}
        assert max(fleet.executions.values()) == 1

    in_fleet(scene)


def test_37_a_request_that_a_client_sends_again_gets_its_old_answer_and_is_not_run_again() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        client = await fleet.add_client("camera")
        asked = fleet.ask_by_broker("camera", fleet.request(), "a")
        fleet.settle(5 * SECOND_US)
        runs = sum(fleet.executions.values())
        answer = asked.answers[0]
        again = client.ask(asked.request, "a")
        fleet.run_for(SECOND_US)
        assert again.result() == answer
        assert sum(fleet.executions.values()) == runs

    in_fleet(scene)


def test_37_a_broker_that_lost_its_sessions_and_says_it_has_them_leaves_no_board_deaf() -> None:
    class Liar(LoopbackLink):
        def accept(self, connection: int, session_present: bool) -> None:
            super().accept(connection, True)

    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("b",))
        for board in fleet.boards.values():
            board.link.__class__ = Liar
        fleet.broker.stop()
        fleet.run_for(SECOND_US)
        fleet.broker.start(keep_sessions=False, keep_retained=False)
        fleet.run_for(5 * SECOND_US)
        asked = fleet.ask(fleet.request(), "a")
        fleet.settle(5 * SECOND_US)
        assert asked.answers[0].board == "b"

    in_fleet(scene)


def test_37_an_answer_that_the_broker_lost_is_given_again_when_the_client_asks_again() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        await fleet.add_client("camera")
        fleet.broker.partition(Partition(frozenset({"camera"}), frozenset({Way.FROM_BROKER})))
        asked = fleet.ask_by_broker("camera", fleet.request(60 * SECOND_US), "a")
        fleet.run_for(SECOND_US)
        assert fleet.boards["a"].quiet and not asked.answers, "the broker has the answer and the client has not"
        fleet.broker.stop()
        fleet.broker.heal()
        fleet.broker.start(keep_sessions=False)
        fleet.settle(20 * SECOND_US)
        assert asked.answers[0].status is Status.OK

    in_fleet(scene)


# 43: partition into islands, asymmetric links, heal


def test_43_islands_serve_their_own_clients_and_agree_after_healing() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet)
        fleet.broker.partition(Partition(frozenset({"a", "b", "c"})))
        fleet.run_for(10 * SECOND_US)
        asked = [fleet.ask(fleet.request(), board) for board in ("a", "b", "c") for _ in range(5)]
        fleet.settle(10 * SECOND_US)
        assert all(each.answers[0].status is Status.OK for each in asked)
        assert all(each.answers[0].board == each.boards[0] for each in asked)
        fleet.broker.heal()
        fleet.agree(30 * SECOND_US)

    in_fleet(scene)


@pytest.mark.parametrize("way", list(Way))
def test_43_a_board_that_is_heard_and_deaf_or_hears_and_is_mute_loses_nothing(way: Way) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("b", "c"))
        await fleet.add_client("camera")
        asked = [fleet.ask(fleet.request(20 * SECOND_US), "a") for _ in range(10)]
        asked += [fleet.ask_by_broker("camera", fleet.request(20 * SECOND_US), "a", "c") for _ in range(10)]
        fleet.run_for(15_000)
        fleet.broker.partition(Partition(frozenset({"b"}), frozenset({way})))
        fleet.run_for(15 * SECOND_US)
        fleet.broker.heal()
        fleet.settle(60 * SECOND_US)
        assert {each.answers[0].status for each in asked} == {Status.OK}
        fleet.agree(30 * SECOND_US)

    in_fleet(scene)


def test_43_a_board_cut_off_with_anothers_request_runs_it_once_and_its_late_answer_is_dropped() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("b", "c"))
        asked = fleet.ask(fleet.request(20 * SECOND_US), "a")
        fleet.run_for(5_000)
        runner = next(board for _, _, board in fleet.executions)
        fleet.broker.partition(Partition(frozenset({runner})))
        fleet.run_for(15 * SECOND_US)
        assert asked.answers[0].board == ({"b", "c"} - {runner}).pop()
        fleet.broker.heal()
        fleet.settle(20 * SECOND_US)
        assert fleet.executions == Counter({("a", asked.request.request_id, board): 1 for board in ("b", "c")})

    in_fleet(scene)


# bounds


def test_a_flood_over_every_bound_is_shed_with_a_reason_and_nothing_is_left_behind() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        bounds = Bounds(unanswered_count=4, owed_count=2, owed_bytes=4096)
        for name in ("a", "b"):
            fleet.add_board(name, SMALL, queue=QueueSection(max_requests=3), bounds=bounds)
        fleet.boot()
        fleet.agree(5 * SECOND_US)
        await fleet.add_client("camera")
        asked = [fleet.ask_by_broker("camera", fleet.request(), "a", "b") for _ in range(100)]
        asked += [fleet.ask(fleet.request(), "a", "b") for _ in range(20)]
        fleet.settle(60 * SECOND_US)
        statuses = Counter(each.answers[0].status for each in asked)
        assert statuses[Status.OK] >= 3 and statuses[Status.SHED] + statuses[Status.FAILED] + statuses[Status.OK] == 120
        assert all(each.answers[0].reason for each in asked if each.answers[0].status is not Status.OK)
        recovered = fleet.ask(fleet.request(), "a")
        fleet.settle(5 * SECOND_US)
        assert recovered.answers[0].status is Status.OK

    in_fleet(scene)


def test_a_board_that_drains_finishes_what_it_has_and_says_goodbye() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        three_boards(fleet, offers=("b", "c"))
        asked = [fleet.ask(fleet.request(), "a") for _ in range(10)]
        fleet.run_for(10_000)
        fleet.boards["b"].stop()
        fleet.run_until(lambda: not fleet.boards["b"].up, 10 * SECOND_US, "b has drained")
        fleet.run_until(lambda: all(each.answers for each in asked), 10 * SECOND_US, "answers")
        fleet.run_for(SECOND_US)
        assert {each.answers[0].status for each in asked} == {Status.OK}
        assert fleet.boards["a"].node.fleet.standing("b") is Standing.STOPPED

    in_fleet(scene)
