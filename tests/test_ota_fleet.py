"""Fleets that take a release by a rollout, on virtual time: real courses over a broker that loses, repeats and forgets."""

from __future__ import annotations

from functools import partial

import pytest

from edge_agent.transport.link import Message
from ota.orders import sign_report
from ota.rollout import Action, Report, Standing, Step
from tests.ota_fleet import BACKENDS, ENDS, NUMBER, OtaFleet
from tests.ota_weather import good, ride_out

SEEDS = range(1, 7)
small = partial(ride_out, boards=8, canary=2, wave=3)
"""A fleet of eight, of which two are canaries."""


@pytest.mark.long
def test_fifty_boards_stop_a_bad_release_at_its_canaries_and_all_are_back_on_the_old_model() -> None:
    """Where links are cut, power fails, the broker restarts and the operator's machine may be gone."""
    outcome = ride_out(1, "bad", boards=50, canary=5, wave=15)
    assert outcome.verdict.state is Standing.STOPPED and outcome.verdict.wave == 0
    assert len(outcome.begun) == 5 and outcome.verdict.counts[Step.WAITING] == 45
    assert outcome.verdict.counts[Step.FAILED] >= 1 and "of the first 5 boards lost" in outcome.verdict.why


@pytest.mark.long
def test_fifty_boards_all_end_with_a_good_release() -> None:
    fleet = OtaFleet("fifty", 50, lambda board, when: "")
    fleet.boot()
    fleet.push(canary=5, wave=15)
    fleet.run_until(fleet.has_arrived, "everybody has it")
    assert set(fleet.verdicts()[0].counts.items()) == {(Step.CONFIRMED, 50)}  # type: ignore[union-attr]
    assert all(board.serving == NUMBER for board in fleet.boards.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_release_that_fails_on_any_class_of_board_goes_no_further_than_the_canaries(seed: int) -> None:
    outcome = small(seed, "bad")
    assert outcome.verdict.state is Standing.STOPPED and len(outcome.begun) <= 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_good_release_reaches_everyone_whatever_the_links_and_the_power_do(seed: int) -> None:
    outcome = small(seed, "good")
    assert outcome.verdict.state is Standing.DONE and outcome.verdict.counts == {Step.CONFIRMED: 8}


@pytest.mark.parametrize("seed", SEEDS)
def test_pauses_aborts_and_rollbacks_at_any_time_leave_all_boards_at_the_same_end(seed: int) -> None:
    assert small(seed, "moody").verdict.state in ENDS


@pytest.mark.parametrize("story", ["bad", "moody"])
def test_a_seed_reproduces_its_run(story: str) -> None:
    assert small(3, story) == small(3, story)
    assert small(3, story).trace_digest != small(4, story).trace_digest


def a_fleet(boards: int = 6, canary: int = 1, wave: int = 2, **changes: int) -> OtaFleet:
    fleet = OtaFleet("by hand", boards, good(None, boards))  # type: ignore[arg-type]
    fleet.boot()
    fleet.push(canary, wave, **changes)
    return fleet


def confirmed(fleet: OtaFleet) -> int:
    return sum(said.step is Step.CONFIRMED for said in fleet.progress().values())


def test_the_operators_machine_may_go_for_good_once_the_canaries_have_it() -> None:
    """The rollout lives in the fleet, and boards give what they hold to their neighbours."""
    fleet = a_fleet()
    fleet.run_until(lambda: confirmed(fleet) == 1, "the canary has it")
    fleet.operator.go()
    fleet.run_until(fleet.has_arrived, "everybody has it")
    assert confirmed(fleet) == 6 and not fleet.operator.there


def test_a_paused_rollout_stands_still_and_goes_on_where_it_was() -> None:
    fleet = a_fleet()
    fleet.run_until(lambda: confirmed(fleet) >= 1, "the canary has it")
    fleet.operator.change(Action.PAUSE)
    fleet.run_for(60_000_000)
    stood = confirmed(fleet)
    fleet.run_for(60_000_000)
    assert stood == confirmed(fleet) < 6 and fleet.at_rest()
    fleet.operator.change(Action.RUN)
    fleet.run_until(fleet.has_arrived, "everybody has it")
    assert confirmed(fleet) == 6


@pytest.mark.parametrize("action", [Action.ABORT, Action.ROLLBACK])
def test_a_rollout_that_was_done_is_taken_back_everywhere(action: Action) -> None:
    fleet = a_fleet()
    fleet.run_until(fleet.has_arrived, "everybody has it")
    fleet.operator.change(action)
    fleet.run_until(lambda: fleet.agree_on(Standing.ABORTED) and fleet.has_arrived(), "everybody is back")
    assert {board.serving for board in fleet.boards.values()} == {0}


def test_a_board_that_is_off_holds_up_no_wave_beyond_its_share_and_takes_it_when_it_is_back() -> None:
    fleet = a_fleet(wave=5, settled_permille=800)
    away = fleet.boards[fleet.plan.boards[-1]]  # type: ignore[union-attr]
    away.kill()
    fleet.run_until(lambda: fleet.agree_on_among(5, Standing.DONE), "the others are done")
    away.boot()
    fleet.run_until(fleet.has_arrived, "everybody has it")
    assert away.serving == NUMBER


def test_a_canary_of_every_class_of_board_comes_first() -> None:
    fleet = a_fleet(canary=3)
    assert fleet.plan is not None
    assert {fleet.backends[board] for board in fleet.plan.boards[:3]} == set(BACKENDS)


def test_a_stale_report_that_the_broker_keeps_is_replaced_by_its_board() -> None:
    """Case 36: who comes later would believe for ever that a board is on its way, and wait for it."""
    fleet = a_fleet()
    fleet.run_until(fleet.has_arrived, "everybody has it")
    told = fleet.boards["b01"].course.report()
    stale = Report("b01", told.boot_epoch, 1, progress=(told.progress[0].at(Step.FETCHING),))
    payload = sign_report(stale, fleet.boards["b01"].signer)
    fleet.operator.link.publish(Message(fleet.topics.report("b01"), payload, retain=True))
    fleet.run_for(10_000_000)
    fleet.boards["b02"].kill()
    fleet.run_for(10_000_000)
    fleet.boards["b02"].boot()
    fleet.run_until(fleet.has_arrived, "everybody judges alike", within_us=60_000_000)
