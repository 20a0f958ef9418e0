"""One model on a board, from a rollout that begins to a release that is confirmed or left: what it takes, refuses, awaits."""

from __future__ import annotations

from typing import Any

import pytest

from ota import events
from ota.events import Bring, BringAgent, BringBack, Brought, Probe, Probed, Ran, Settle, Stand, Turn, TurnBack, Turned
from ota.lifecycle import ANSWER_LIMIT_US, BACK_AGAIN_US, Doing
from ota.manifest import AGENT, Release, encode_release, manifest_path
from ota.rollout import Action, Step
from ota.slots import Held, State
from tests.one_board import LIBRARY, MODEL, OTHER, SECOND_US, SOUND, OneBoard, a_plan, a_release, bytes_of, digest, file_of

BAD = digest(b"another answer")
GOOD: list[events.Event] = [Brought(MODEL, 7), Probed(MODEL, 7, SOUND, LIBRARY), Turned(MODEL, 7)]
STRAY = [Brought(MODEL, 6), Probed(MODEL, 6, BAD, LIBRARY), Turned(MODEL, 6, "late"), Ran(MODEL, 6, "NaN"), Brought(OTHER, 7)]


@pytest.fixture
def board() -> OneBoard:
    return OneBoard()


def brought(release: Release) -> OneBoard:
    board = OneBoard()
    board.take(release)
    assert board.last(Bring) is not None
    return board


def held(release: Release) -> Held:
    return Held(release.number, digest(encode_release(release)))


# the way of a good release


def test_a_release_is_fetched_brought_probed_tried_and_confirmed_in_this_order(board: OneBoard) -> None:
    release = a_release()
    plan = board.take(release)
    assert board.progress() == (Step.TRIAL, "") and board.state() is State.TRIAL
    board.confirm(release)
    kinds = [type(each) for each in board.effects if isinstance(each, Bring | Probe | Turn | Settle | TurnBack)]
    assert kinds == [Bring, Probe, Turn, Settle]
    assert board.slots().confirmed == held(release) and board.slots().floor == 7
    board.tick()
    said = board.told.of(MODEL, plan.serial)
    assert said is not None and said.step is Step.CONFIRMED
    assert board.told.slots[0].running == 7


def test_golden_inputs_stand_in_for_requests_that_do_not_come_one_at_a_time(board: OneBoard) -> None:
    release = a_release()
    board.take(release)
    board.try_(release)
    board.tick(9 * SECOND_US)
    assert not board.all(Stand), "real requests have their time"
    for _ in range(5):
        board.tick()
    assert len(board.all(Stand)) == 1, "its answer is awaited"
    for answers in (2, 3):
        board.feed(Probed(MODEL, 7, SOUND, LIBRARY))
        board.tick()
        assert len(board.all(Stand)) == answers
    board.feed(Probed(MODEL, 7, SOUND, LIBRARY))
    assert board.slots().confirmed.number == 7


def test_an_answer_that_comes_twice_counts_once(board: OneBoard) -> None:
    release = a_release()
    board.take(release)
    for event in GOOD:
        board.feed(event)
        board.feed(event)
    assert len(board.all(Probe)) == len(board.all(Turn)) == 1
    for _ in range(5):
        board.feed(Probed(MODEL, 7, SOUND, LIBRARY))
    assert board.state() is State.TRIAL, "a golden answer that nobody asked for stands for no request"


@pytest.mark.parametrize("event", STRAY)
@pytest.mark.parametrize("doing", [Doing.BRINGING, Doing.PROBING, Doing.TURNING, Doing.TRYING])
def test_an_answer_for_a_release_that_is_not_the_candidate_changes_nothing(doing: Doing, event: Any) -> None:
    board = brought(a_release())
    for step in GOOD[: [Doing.BRINGING, Doing.PROBING, Doing.TURNING, Doing.TRYING].index(doing)]:
        board.feed(step)
    life = board.course.lives[MODEL]
    assert life.doing is doing
    board.feed(event)
    assert life.doing is doing and board.state() is State.TRIAL and board.progress()[0] is Step.TRIAL


@pytest.mark.parametrize("answered", range(4))
def test_an_answer_that_never_comes_ends_the_trial_and_the_board_serves_what_it_served(answered: int) -> None:
    board = brought(a_release())
    for event in GOOD[:answered]:
        board.feed(event)
    if answered == 3:
        board.tick(10 * SECOND_US)
        assert board.all(Stand)
    board.tick(ANSWER_LIMIT_US - SECOND_US)
    assert board.state() is State.TRIAL
    board.tick(SECOND_US)
    assert board.state() is State.ROLLED_BACK and isinstance(board.last(TurnBack), TurnBack)
    assert board.progress()[0] is Step.FAILED and "no answer within 1800 s" in board.progress()[1]


# bad releases


def bad_at(step: str) -> list[events.Event]:
    flaws: dict[str, list[events.Event]] = {
        "brought": [Brought(MODEL, 7, "no memory")],
        "probed": [*GOOD[:1], Probed(MODEL, 7, BAD, LIBRARY)],
        "hangs": [*GOOD[:1], Probed(MODEL, 7, why="the engine hangs")],
        "turned": [*GOOD[:2], Turned(MODEL, 7, "the engine died")],
        "ran": [*GOOD, Ran(MODEL, 7), Ran(MODEL, 7, "output scores: element 3 is NaN")],
    }
    return flaws[step]


@pytest.mark.parametrize("step", ["brought", "probed", "hangs", "turned", "ran"])
def test_whatever_is_wrong_with_a_release_it_is_left_for_what_was_confirmed_and_said_why(step: str) -> None:
    board = brought(a_release())
    for event in bad_at(step):
        board.feed(event)
    said, why = board.progress()
    assert said is Step.FAILED and why and board.slots().running == Held() and board.slots().why == why
    assert board.last(TurnBack) == TurnBack(MODEL, why)
    board.tick(60 * SECOND_US)
    assert board.state() is State.ROLLED_BACK, "nobody tries it again by itself"


def refused(board: OneBoard, release: Release, **plan: Any) -> str:
    """Why, after all of its manifest came; nothing else was fetched."""
    board.link()
    board.order(a_plan(release, **plan))
    board.list_targets(release)
    board.fetch(encode_release(release))
    step, why = board.progress()
    assert step is Step.REFUSED, (step, why)
    assert board.state() is State.EMPTY and len(board.all(events.Open)) == 1
    board.tick()
    said = board.told.progress[0]
    assert said.step is Step.REFUSED and said.why == why, "it is in the report"
    return why


def test_9_a_release_for_another_class_of_board_is_refused(board: OneBoard) -> None:
    assert "it is for coral, jetson; this board is raspberry_pi" in refused(board, a_release(classes=("coral", "jetson")))


def test_a_release_that_needs_a_newer_agent_is_refused(board: OneBoard) -> None:
    assert "it needs agent 1.10.0 or later; this is 1.2.0" in refused(board, a_release(min_agent="1.10.0"))


def test_a_release_whose_card_cannot_be_read_here_is_refused_before_its_files_are_fetched(board: OneBoard) -> None:
    assert "card" in refused(board, a_release(card="this is = no card ["))


def test_10_a_release_whose_card_is_another_models_is_refused_before_its_files_are_fetched(board: OneBoard) -> None:
    assert f"got {OTHER}; allowed: {MODEL}" in refused(board, a_release(card=a_release(model=OTHER).card))


def test_10_a_valid_manifest_of_another_model_under_this_path_is_refused(board: OneBoard) -> None:
    other = a_release(model=OTHER)
    plan = a_plan(a_release(), manifest=digest(encode_release(other)))
    board.link()
    board.order(plan)
    board.verified({manifest_path(MODEL, 7): (len(encode_release(other)), plan.manifest)})
    board.fetch(encode_release(other))
    assert board.progress()[0] is Step.REFUSED and "the release of its own name" in board.progress()[1]


def test_an_old_release_below_the_floor_is_refused(board: OneBoard) -> None:
    new, old = a_release(8), a_release(7)
    board.take(new)
    board.confirm(new)
    board.effects.clear()
    board.order(a_plan(old, serial=2))
    board.list_targets(old)
    board.fetch(encode_release(old))
    assert board.progress()[0] is Step.REFUSED and "an older release; allowed: release 8 or later" in board.progress()[1]
    assert board.slots().confirmed.number == 8


def test_an_unsigned_release_waits_for_ever_and_says_why(board: OneBoard) -> None:
    board.link()
    board.order(a_plan(a_release()))
    board.list_targets(a_release(8))
    for _ in range(5):
        board.tick(60 * SECOND_US)
    assert board.progress() == (Step.WAITING, "release 7 is not in the signed metadata that came here")
    assert not board.all(events.Open)


def test_11_a_manifest_that_changed_between_plan_and_metadata_is_refused(board: OneBoard) -> None:
    board.link()
    board.order(a_plan(a_release(), manifest=bytes(32)))
    board.list_targets(a_release())
    assert board.progress()[0] is Step.REFUSED and "the plan names manifest 0000000000000000…" in board.progress()[1]


def test_11_a_release_that_changed_while_it_was_fetched_is_given_up(board: OneBoard) -> None:
    release = a_release()
    board.link()
    board.order(a_plan(release))
    board.list_targets(release)
    board.fetch(encode_release(release))
    assert board.state() is State.STAGING
    changed = a_release(min_agent="1.0.0")
    board.list_targets(changed)
    assert board.progress()[0] is Step.REFUSED and board.state() is State.EMPTY
    assert board.last(events.Abandon) == events.Abandon(release.files[0].digest)


def test_18_a_release_whose_files_can_never_fit_is_refused_and_given_up(board: OneBoard) -> None:
    release = a_release()
    board.link()
    board.order(a_plan(release))
    board.list_targets(release)
    board.fetch(encode_release(release))
    board.feed(events.Opened(release.files[0].digest, why="66536 bytes; at most 1000 bytes", refused=True))
    assert board.progress() == (Step.REFUSED, "model.tflite cannot be had: 66536 bytes; at most 1000 bytes")
    assert board.state() is State.EMPTY and not board.course.transfers.pending


# plans


def test_a_newer_plan_waits_until_the_trial_of_the_older_one_has_ended() -> None:
    board = brought(a_release(7))
    board.try_(a_release(7))
    board.order(a_plan(a_release(8), serial=2))
    board.list_targets(a_release(7), a_release(8))
    assert board.state() is State.TRIAL and board.slots().candidate == held(a_release(7))
    for _ in range(3):
        board.feed(Ran(MODEL, 7))
    assert board.slots().confirmed.number == 7
    board.fetch(encode_release(a_release(8)))
    assert board.slots().candidate == held(a_release(8)) and board.progress()[0] is Step.FETCHING


def test_17_a_newer_plan_takes_the_place_of_what_is_still_fetched(board: OneBoard) -> None:
    board.link()
    board.order(a_plan(a_release(7)))
    board.list_targets(a_release(7), a_release(8))
    board.fetch(encode_release(a_release(7)))
    board.order(a_plan(a_release(8), serial=2))
    assert board.state() is State.EMPTY
    board.list_targets(a_release(7), a_release(8))
    board.fetch(encode_release(a_release(8)))
    assert board.slots().candidate == held(a_release(8))
    assert events.Abandon(a_release(7).files[0].digest) in board.effects


def test_two_plans_under_one_serial_never_mix_their_releases(board: OneBoard) -> None:
    """An operator that errs: a later revision names another release."""
    board.link()
    board.order(a_plan(a_release(7)))
    board.list_targets(a_release(7), a_release(8))
    board.fetch(encode_release(a_release(7)))
    board.order(a_plan(a_release(8)), revision=2)
    board.list_targets(a_release(7), a_release(8))
    board.fetch(encode_release(a_release(8)))
    assert board.slots().candidate == held(a_release(8))
    board.fetch(bytes_of(8))
    bring = board.last(Bring)
    assert bring is not None and bring.installed.number == 8


def test_a_board_that_the_newer_plan_does_not_name_leaves_what_it_was_fetching(board: OneBoard) -> None:
    board.link()
    board.order(a_plan(a_release(7)))
    board.list_targets(a_release(7))
    board.fetch(encode_release(a_release(7)))
    board.order(a_plan(a_release(8), serial=2, boards=("b2", "b3"), canary=1, wave=1))
    assert board.state() is State.EMPTY and not board.course.transfers.pending


def test_rollouts_of_two_models_at_once_go_their_own_ways(board: OneBoard) -> None:
    one, other = a_release(7), a_release(4, OTHER)
    board.link()
    board.order(a_plan(one))
    board.order(a_plan(other, serial=2))
    board.list_targets(one, other)
    for each in (one, other):
        board.fetch(encode_release(each))
    for each in (one, other):
        board.fetch(bytes_of(each.number, each.model))
    board.feed(Brought(OTHER, 4, "no memory"))
    board.confirm(one)
    assert board.slots().confirmed.number == 7 and board.slots(OTHER).state is State.ROLLED_BACK
    assert board.progress()[0] is Step.CONFIRMED and board.progress(OTHER) == (Step.FAILED, "no memory")


def test_a_rollout_that_is_called_off_in_a_trial_ends_it_as_returned() -> None:
    board = brought(a_release())
    board.try_(a_release())
    board.order(a_plan(a_release()), Action.ABORT, revision=2)
    assert board.progress() == (Step.RETURNED, "abort by ann") and board.state() is State.ROLLED_BACK


# the way back


def confirmed_twice() -> OneBoard:
    board = OneBoard()
    for release, serial in ((a_release(7), 1), (a_release(8), 2)):
        board.take(release, a_plan(release, serial=serial))
        board.confirm(release)
    board.effects.clear()
    return board


def test_a_rollback_brings_the_release_before_and_turns_to_it() -> None:
    board = confirmed_twice()
    board.order(a_plan(a_release(8), serial=2), Action.ROLLBACK, revision=2)
    bring = board.last(Bring)
    assert bring is not None and bring.installed.number == 7
    board.feed(Brought(MODEL, 7))
    assert board.last(Turn) == Turn(MODEL, 7) and board.slots().confirmed.number == 8, "not before it serves"
    board.feed(Turned(MODEL, 7))
    assert board.slots().confirmed == held(a_release(7)) and board.progress()[0] is Step.RETURNED
    assert board.slots().floor == 8, "a rollback does not lower the floor"


@pytest.mark.parametrize("failing", [Brought(MODEL, 7, "no memory"), Turned(MODEL, 7, "the engine died")])
def test_a_way_back_that_fails_is_tried_again_after_a_while_and_not_at_every_event(failing: events.Event) -> None:
    board = confirmed_twice()
    board.order(a_plan(a_release(8), serial=2), Action.ROLLBACK, revision=2)
    if isinstance(failing, Turned):
        board.feed(Brought(MODEL, 7))
    board.feed(failing)
    for _ in range(20):
        board.tick()
    assert len(board.all(Bring)) == 1 and "the way back failed" in board.progress()[1]
    board.tick(BACK_AGAIN_US)
    assert len(board.all(Bring)) == 2


def test_a_way_back_that_is_never_answered_is_tried_again() -> None:
    board = confirmed_twice()
    board.order(a_plan(a_release(8), serial=2), Action.ROLLBACK, revision=2)
    board.tick(ANSWER_LIMIT_US)
    board.tick(BACK_AGAIN_US)
    assert len(board.all(Bring)) == 2 and board.slots().confirmed.number == 8


def test_a_newer_plan_waits_until_the_way_back_has_ended() -> None:
    board = confirmed_twice()
    board.order(a_plan(a_release(8), serial=2), Action.ROLLBACK, revision=2)
    board.order(a_plan(a_release(9), serial=3))
    board.list_targets(a_release(9))
    assert not board.all(events.Open)
    board.feed(Brought(MODEL, 7))
    board.feed(Turned(MODEL, 7))
    assert board.slots().confirmed.number == 7
    board.tick()
    board.fetch(encode_release(a_release(9)))
    assert board.slots().candidate == held(a_release(9))


def test_a_release_to_go_back_to_that_is_not_here_any_more_is_said_and_the_board_goes_on_serving() -> None:
    board = confirmed_twice()
    board.course.transfers.held.discard(a_release(7).files[0].digest)
    board.order(a_plan(a_release(8), serial=2), Action.ROLLBACK, revision=2)
    assert board.progress() == (Step.REFUSED, "release 7, to go back to, is not here any more")
    assert board.slots().confirmed.number == 8 and not board.all(Bring)


def test_the_factorys_release_is_brought_back_where_it_was_before(board: OneBoard) -> None:
    board.take(a_release())
    board.confirm(a_release())
    board.order(a_plan(a_release()), Action.ROLLBACK, revision=2)
    assert board.last(BringBack) == BringBack(MODEL)
    board.feed(Brought(MODEL, 0))
    board.feed(Turned(MODEL, 0))
    assert board.slots().confirmed == Held()


# over a start


def test_a_trial_goes_on_after_a_start_from_the_golden_input_on() -> None:
    board = brought(a_release())
    board.try_(a_release())
    board.boot()
    board.tick()
    assert isinstance(board.last(Bring), Bring) and board.slots().boots == 1
    board.confirm(a_release())
    assert board.slots().confirmed.number == 7


def test_23_starts_within_a_trial_are_counted_and_the_third_finds_it_rolled_back() -> None:
    board = brought(a_release())
    for _ in range(3):
        board.boot()
    board.tick()
    assert board.state() is State.ROLLED_BACK and not board.all(Bring)
    assert "start 3 of 3" in board.slots().why


def test_21_a_trial_whose_files_are_gone_after_a_start_is_ended(board: OneBoard) -> None:
    board.take(a_release())
    del board.cache[a_release().files[0].digest]
    board.boot()
    board.tick()
    assert board.progress()[0] is Step.FAILED and board.state() is State.ROLLED_BACK


# the agent itself


def an_agent() -> tuple[OneBoard, Release]:
    board, release = OneBoard(), a_release(3, AGENT, files=(file_of(bytes_of(3, AGENT), "slyos_edge.whl"),))
    board.boot(hosted=(MODEL, AGENT))
    board.take(release)
    assert board.last(BringAgent) == BringAgent(release)
    return board, release


def starts(board: OneBoard, running: int, why: str = "") -> None:
    board.boot(hosted=(MODEL, AGENT))
    board.link()
    with board.books.transaction():
        board.effects += board.course.agent_started(running, board.now_us, why)


def test_a_new_agent_is_confirmed_after_it_was_well_and_linked_for_long_enough() -> None:
    board, _ = an_agent()
    board.feed(Brought(AGENT, 3))
    board.feed(Turned(AGENT, 3))
    starts(board, 3)
    board.tick(30 * SECOND_US)
    board.link(False)
    board.tick(40 * SECOND_US)
    assert board.state(AGENT) is State.TRIAL, "without a link its time does not count"
    board.link()
    board.tick(59 * SECOND_US)
    assert board.state(AGENT) is State.TRIAL
    board.tick(SECOND_US)
    assert board.slots(AGENT).confirmed.number == 3 and board.last(Settle) == Settle(AGENT)


def test_an_agent_that_has_not_started_anew_does_not_confirm_the_next_one() -> None:
    """However long the old process takes to end."""
    board, _ = an_agent()
    board.feed(Brought(AGENT, 3))
    board.feed(Turned(AGENT, 3))
    for _ in range(10):
        board.tick(60 * SECOND_US)
    assert board.state(AGENT) is State.TRIAL


def test_an_agent_that_did_not_come_up_is_left_and_said_why() -> None:
    board, _ = an_agent()
    board.feed(Brought(AGENT, 3))
    board.feed(Turned(AGENT, 3))
    starts(board, 0, "it was not ready within 120 s")
    assert board.progress(AGENT) == (Step.FAILED, "it was not ready within 120 s")
    assert board.state(AGENT) is State.ROLLED_BACK


def test_19_a_power_cut_while_an_agent_is_built_has_it_built_again_and_is_no_failure_of_it() -> None:
    board, release = an_agent()
    starts(board, 0)
    assert board.last(BringAgent) == BringAgent(release) and board.state(AGENT) is State.TRIAL
    starts(board, 0)
    starts(board, 0)
    assert board.state(AGENT) is State.ROLLED_BACK, "but not without end"


def test_nothing_is_built_before_it_is_known_which_agent_runs() -> None:
    """It might be the one on trial that would be built over."""
    board, _ = an_agent()
    board.boot(hosted=(MODEL, AGENT))
    board.link()
    board.tick()
    assert not board.all(BringAgent) and board.state(AGENT) is State.TRIAL
