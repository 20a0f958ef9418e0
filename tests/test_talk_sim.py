"""Talk across boards on virtual time: parts over a bad network, a board lost in the middle of an answer, nobody listening."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_agent.core.chat import CHAT
from edge_agent.core.values import Status
from edge_agent.node.events import Sensed
from edge_agent.node.streams import PERIOD_US, end_of, turn_of
from edge_agent.transport.loopback import Delay, Faults, Partition, Way
from tests.scripted_speaker import answer_to
from tests.test_fleet_sim import SECOND_US, in_fleet
from tests.virtual_board import WORD_US, Asked, VirtualBoard, kv_of, offer
from tests.virtual_fleet import VirtualFleet

TALK = replace(offer("parrot", 500_000, task=CHAT), parallel=3)


def gather(fleet: VirtualFleet, *speakers: str) -> None:
    """Boards a, b, c that know each other; ``speakers`` host the model that talks."""
    for name in ("a", "b", "c"):
        fleet.add_board(name, *((TALK,) if name in speakers else ()))
    fleet.boot()
    fleet.agree(5 * SECOND_US)


def speaker_of(fleet: VirtualFleet) -> VirtualBoard:
    """The one that talks now."""
    (board,) = (board for board in fleet.boards.values() if board.up and board._running)
    return board


def asked_at(fleet: VirtualFleet, client: str, tokens: int) -> Asked:
    turn = fleet.turn(tokens)
    return fleet.ask_by_broker(client, turn, "a") if client else fleet.ask(turn, "a")


@pytest.mark.parametrize("client", ["", "phone"])
@pytest.mark.parametrize("speaker", ["a", "b"])
def test_text_comes_while_it_is_made_wherever_client_and_model_are(client: str, speaker: str) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gather(fleet, speaker)
        await fleet.add_client("phone")
        asked = asked_at(fleet, client, 100)
        fleet.run_for(SECOND_US)
        assert len(asked.seen.text) > 100 and not asked.answers
        fleet.settle(5 * SECOND_US)
        assert end_of(asked.answers[0]).text == answer_to_of(asked)
        if client or speaker == "b":
            assert asked.parts <= 100 * WORD_US * 3 // 2 // PERIOD_US + 2, "gathered, so that the broker is not flooded"

    in_fleet(scene)


def answer_to_of(asked: Asked) -> str:
    return answer_to(turn_of(asked.request))[0]


@pytest.mark.parametrize("client", ["", "phone"])
def test_a_board_lost_in_mid_answer_is_followed_by_one_that_goes_on_where_the_client_is(client: str) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gather(fleet, "b", "c")
        await fleet.add_client("phone")
        asked = asked_at(fleet, client, 100)
        fleet.run_for(SECOND_US)
        lost, seen = speaker_of(fleet), asked.seen.text
        assert seen
        lost.kill()
        fleet.run_until(lambda: asked.settled, 10 * SECOND_US, "an answer")
        assert asked.answers[0].board == ({"b", "c"} - {lost.name}).pop()
        assert asked.seen.text.startswith(seen) and end_of(asked.answers[0]).completion_tokens == 100

    in_fleet(scene)


def test_every_board_but_one_is_lost_one_after_the_other_and_the_answer_is_still_one() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gather(fleet, "a", "b", "c")
        asked = fleet.ask(fleet.turn(200), "a")
        for name in ("b", "c"):
            fleet.run_for(SECOND_US)
            fleet.boards[name].kill()
        fleet.run_until(lambda: asked.settled, 20 * SECOND_US, "an answer")
        assert asked.answers[0].status is Status.OK

    in_fleet(scene)


def test_an_ingress_board_that_is_killed_in_mid_answer_answers_its_broker_client_seamlessly_after_its_boot() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gather(fleet, "a", "b")
        await fleet.add_client("phone")
        asked = fleet.ask_by_broker("phone", fleet.turn(100), "a")
        fleet.run_for(SECOND_US)
        assert asked.seen.text
        fleet.boards["a"].kill()
        fleet.run_for(SECOND_US)
        fleet.boards["a"].boot()
        fleet.settle(20 * SECOND_US)
        assert asked.seen.text == answer_to_of(asked)

    in_fleet(scene)


@pytest.mark.parametrize("seed", range(5))
def test_a_network_that_loses_doubles_and_reorders_costs_smoothness_only(seed: int) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gather(fleet, "b")
        await fleet.add_client("phone")
        delay = Delay(1_000, 30_000, 50, 300_000)
        fleet.broker.wire.faults = Faults(delay, loss_permille=200, duplicate_permille=200, reorder_permille=300)
        asked = [asked_at(fleet, client, 80) for client in ("", "phone", "phone")]
        fleet.settle(60 * SECOND_US)
        assert [end_of(each.answers[0]).text for each in asked] == [answer_to_of(each) for each in asked]
        assert sum(each.parts for each in asked) > 10

    in_fleet(scene, seed)


def test_a_board_out_of_sight_is_given_up_and_told_so_when_it_is_back() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gather(fleet, "b", "c")
        asked = fleet.ask(fleet.turn(400), "a")
        fleet.run_for(SECOND_US)
        first = speaker_of(fleet)
        fleet.broker.partition(Partition(frozenset({first.name}), frozenset({Way.TO_BROKER})))
        fleet.run_for(5 * SECOND_US)
        second = next(board for board in fleet.boards.values() if board._running and board is not first)
        assert first._running
        fleet.broker.heal()
        fleet.run_for(2 * SECOND_US)
        assert not first._running and second._running, "it heard that nobody waits for its answer"
        fleet.settle(20 * SECOND_US)
        assert asked.answers[0].board == second.name and asked.answers[0].status is Status.OK

    in_fleet(scene)


def test_a_board_that_streams_is_not_given_up_however_long_its_answer_takes() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gather(fleet, "b", "c")
        asked = fleet.ask(fleet.turn(1500), "a")
        fleet.settle(60 * SECOND_US)
        assert sum(fleet.executions.values()) == 1 and asked.answers[0].status is Status.OK

    in_fleet(scene)


@pytest.mark.parametrize("speaker", ["a", "b"])
def test_a_client_that_leaves_frees_the_place_on_the_board_that_talks(speaker: str) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        gather(fleet, speaker)
        fleet.ask(fleet.turn(1000), "a")
        fleet.run_for(SECOND_US)
        assert fleet.boards[speaker]._running
        handle = fleet.boards["a"].some_handle()
        assert handle is not None
        fleet.boards["a"].abandon(handle)
        fleet.run_for(100_000)
        assert not fleet.boards[speaker]._running
        fleet.settle(5 * SECOND_US)

    in_fleet(scene)


def test_turns_and_pictures_do_not_wait_for_each_other() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        for name in ("a", "b"):
            fleet.add_board(name, *((TALK, offer("small", 20_000)) if name == "a" else ()))
        fleet.boot()
        fleet.agree(5 * SECOND_US)
        talks = [fleet.ask(fleet.turn(100), "a") for _ in range(3)]
        looks = [fleet.ask(fleet.request(), "a") for _ in range(5)]
        fleet.run_until(lambda: all(each.answers for each in looks), SECOND_US, "pictures are looked at beside talk")
        assert all(each.seen.text and not each.answers for each in talks)
        fleet.settle(10 * SECOND_US)

    in_fleet(scene)


def hot(fleet: VirtualFleet, board: str) -> None:
    """Nothing new is placed on it, and everybody knows."""
    fleet.boards[board].feed(Sensed(84_900, 85_000))
    fleet.run_for(2 * SECOND_US)


def first_turn(fleet: VirtualFleet) -> None:
    """Session s has its KV on a, and everybody knows."""
    gather(fleet, "a", "b")
    fleet.ask(fleet.turn(5, session="s"), "a")
    fleet.settle(5 * SECOND_US)
    assert fleet.boards["a"].kept == {"s": kv_of("s")}
    fleet.run_for(2 * SECOND_US)


def test_a_session_follows_its_next_turn_and_its_home_gives_it_up() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        first_turn(fleet)
        near = fleet.ask(fleet.turn(5, session="s"), "b")
        fleet.settle(5 * SECOND_US)
        assert near.answers[0].board == "a", "the turn goes to its KV while that is cheaper"
        hot(fleet, "a")
        moved = fleet.ask(fleet.turn(5, session="s"), "a")
        fleet.settle(5 * SECOND_US)
        fleet.run_for(SECOND_US)
        assert moved.answers[0].board == "b" and fleet.boards["b"].node.moves.counts[0] == 1
        assert (fleet.boards["a"].kept, fleet.boards["b"].kept) == ({}, {"s": kv_of("s")})

    in_fleet(scene)


def test_a_turn_that_is_abandoned_while_its_session_moves_frees_its_place_and_never_runs() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        first_turn(fleet)
        hot(fleet, "a")
        for ingress in ("a", "b"):
            asked = fleet.ask(fleet.turn(5, session="s"), ingress)
            while not len(fleet.boards["b"].node.moves):
                fleet.run_for(1_000)
            handle = fleet.boards[ingress].some_handle()
            assert handle is not None
            fleet.boards[ingress].abandon(handle)
            fleet.run_for(100_000)
            assert not fleet.boards["b"].node.execution.running and not asked.parts
        fleet.settle(5 * SECOND_US)

    in_fleet(scene)


def test_a_home_that_dies_while_its_session_moves_does_not_keep_the_turn_waiting() -> None:
    async def scene(fleet: VirtualFleet) -> None:
        first_turn(fleet)
        hot(fleet, "a")
        asked = fleet.ask(fleet.turn(5, session="s"), "b")
        fleet.run_for(3_000)
        assert len(fleet.boards["b"].node.moves)
        fleet.boards["a"].kill()
        fleet.run_until(lambda: asked.settled, 10 * SECOND_US, "an answer")
        assert asked.answers[0].board == "b" and fleet.boards["b"].node.moves.counts[:2] == (0, 1)

    in_fleet(scene)


@pytest.mark.parametrize("seed", range(5))
def test_a_session_moves_whole_over_a_bad_network(seed: int) -> None:
    async def scene(fleet: VirtualFleet) -> None:
        first_turn(fleet)
        hot(fleet, "a")
        delay = Delay(1_000, 30_000, 50, 300_000)
        fleet.broker.wire.faults = Faults(delay, loss_permille=100, duplicate_permille=200, reorder_permille=300)
        asked = fleet.ask(fleet.turn(5, session="s"), "b")
        fleet.run_until(lambda: asked.settled, 60 * SECOND_US, "an answer")
        assert asked.answers[0].status is Status.OK
        moved_in, given_up, _ = fleet.boards["b"].node.moves.counts
        assert moved_in + given_up == 1

    in_fleet(scene, seed)
