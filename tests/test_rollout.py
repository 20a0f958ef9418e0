"""A rollout's laws: every board judges alike, a stop is final, nobody begins before its turn."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_BOARDS
from ota.heard import MAX_LOSSES, Heard
from ota.rollout import (
    MAX_ROLLOUTS,
    Action,
    Motion,
    Plan,
    Progress,
    Report,
    Rollout,
    Standing,
    Step,
    judge,
    move,
    order_boards,
    ordered,
    share,
    tally,
    waves,
)
from tests.rollouts import (
    MANIFEST,
    MODEL,
    SERIAL,
    a_plan,
    a_report,
    a_rollout,
    any_reports,
    honest_lives,
    names,
    plans,
    reports,
)

CANARIES = names(5)
CONFIRMED_CANARIES = dict.fromkeys(CANARIES, Step.CONFIRMED)
RESTS = (Step.CONFIRMED, Step.RETURNED, Step.FAILED, Step.REFUSED)


def moves(rollout: Rollout, heard: dict[str, Report]) -> dict[str, Motion]:
    return {board: move(rollout, heard, board).motion for board in rollout.plan.boards}


# ---- the same words, the same judgement -----------------------------------------------------------------------------------


@given(st.data())
def test_boards_that_heard_the_same_judge_the_same_whatever_the_order_and_however_often(data: st.DataObject) -> None:
    plan = data.draw(plans())
    words: list[Report | Rollout] = list(data.draw(st.lists(any_reports(plan.boards), max_size=12)))
    actions = data.draw(st.lists(st.tuples(st.sampled_from(Action), st.integers(1, 3)), min_size=1, max_size=3))
    words += [Rollout(plan, "ann", revision, action) for action, revision in actions]
    words += [Rollout(replace(plan, serial=SERIAL - 1), "ann", 9)]
    one, other = Heard(), Heard()
    for word in words:
        hear(one, word)
    for word in [*data.draw(st.permutations(words)), *data.draw(st.lists(st.sampled_from(words)))]:
        hear(other, word)
    assert one.rollouts == other.rollouts and dict(one.reports) == dict(other.reports)
    assert one.verdict(MODEL) == other.verdict(MODEL)
    assert [one.move(MODEL, board) for board in plan.boards] == [other.move(MODEL, board) for board in plan.boards]


def hear(heard: Heard, word: Report | Rollout) -> bool:
    return heard.hear_report(word) if isinstance(word, Report) else heard.hear_rollout(word)


@given(st.data())
def test_hearing_something_again_changes_nothing(data: st.DataObject) -> None:
    heard = Heard()
    words = data.draw(st.lists(any_reports(names(3)), max_size=8))
    for word in words:
        hear(heard, word)
    changes = heard.changes
    assert not any(hear(heard, word) for word in words) and heard.changes == changes


@given(st.permutations(names(6)))
def test_reports_of_another_plan_or_model_say_nothing_of_this_one(order: list[str]) -> None:
    rollout = a_rollout(6, canary=1, wave=5)
    others = {
        board: Report(board, 1, 1, progress=(Progress(MODEL, SERIAL - 1, Step.FAILED), Progress("other", SERIAL, Step.FAILED)))
        for board in order
    }
    assert judge(rollout, others) == judge(rollout, {})


# ---- a stop is final ------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_stop_is_never_undone_by_newer_reports(data: st.DataObject) -> None:
    """Neither for who heard every report nor for who hears the newest of each board alone."""
    plan = data.draw(plans())
    rollout = Rollout(plan, "ann")
    earlier: dict[str, Report] = {}
    later: dict[str, Report] = {}
    for board in plan.boards:
        life = data.draw(honest_lives(board))
        at = data.draw(st.integers(0, len(life)))
        earlier |= {board: life[at - 1]} if at else {}
        later |= {board: life[-1]} if life else {}
    if judge(rollout, earlier).state is Standing.STOPPED:
        assert judge(rollout, later).state is Standing.STOPPED
        assert not {Motion.GO, Motion.WAIT} & set(moves(rollout, later).values())


@given(st.data())
def test_a_stop_is_never_undone_by_boards_that_take_their_word_back_nor_by_the_next_word_of_an_operator(
    data: st.DataObject,
) -> None:
    plan = data.draw(plans())
    heard = Heard()
    heard.hear_rollout(Rollout(plan, "ann"))
    stopped = False
    for report in data.draw(st.lists(any_reports(plan.boards), max_size=12)):
        heard.hear_report(report)
        verdict = heard.verdict(MODEL)
        assert verdict is not None
        assert verdict.over or not stopped
        stopped = verdict.over
    heard.hear_rollout(Rollout(plan, "ann", 2, data.draw(st.sampled_from((Action.PAUSE, Action.RUN)))))
    verdict = heard.verdict(MODEL)
    assert verdict is not None and (verdict.state is Standing.STOPPED) == stopped


def test_a_new_plan_begins_without_the_losses_of_the_old() -> None:
    heard = Heard()
    heard.hear_rollout(a_rollout(canary=1))
    heard.hear_report(a_report("b00", Step.FAILED))
    before, heard_again = heard.verdict(MODEL), heard.hear_rollout(Rollout(replace(a_plan(canary=1), serial=SERIAL + 1), "ann"))
    after = heard.verdict(MODEL)
    assert before is not None and before.state is Standing.STOPPED
    assert heard_again and after is not None and after.state is Standing.RUNNING and not after.lost


@pytest.mark.parametrize("lost", [Step.FAILED, Step.RETURNED])
@pytest.mark.parametrize("after", [Step.WAITING, Step.CONFIRMED, None])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_board_that_takes_its_loss_back_is_still_counted(lost: Step, after: Step | None, backwards: bool) -> None:
    heard = Heard()
    heard.hear_rollout(a_rollout())
    said = a_report("b00", lost), a_report("b00", after, number=2) if after else Report("b00", 1, 2)
    for report in reversed(said) if backwards else said:
        heard.hear_report(report)
    verdict = heard.verdict(MODEL)
    assert verdict is not None and verdict.state is Standing.STOPPED and verdict.lost == ("b00",)
    (told,) = heard.reports["b00"].progress
    assert told.failed == (lost is Step.FAILED)


def test_a_failure_stays_told_when_the_board_goes_back_with_the_others() -> None:
    failed = Progress(MODEL, SERIAL, Step.FAILED, why="golden digest differs")
    assert failed.failed and failed.at(Step.RETURNED).failed and failed.at(Step.RETURNED).at(Step.WAITING).lost
    assert not Progress(MODEL, SERIAL, Step.RETURNED).failed


# ---- the threshold --------------------------------------------------------------------------------------------------------


@given(st.data())
def test_the_threshold_is_exact_of_every_beginning_of_the_plan(data: st.DataObject) -> None:
    plan = data.draw(plans())
    lost = set(data.draw(st.lists(st.sampled_from(plan.boards), unique=True)))
    steps = {board: data.draw(st.sampled_from((Step.FAILED, Step.RETURNED))) for board in lost}
    reached, too_many = 0, False
    for wave in waves(plan):
        reached += len(wave)
        share_lost = Fraction(len(lost & set(plan.boards[:reached])), reached)
        too_many |= share_lost > Fraction(plan.max_error_permille, 1000)
    assert (judge(Rollout(plan, "ann"), reports(steps)).state is Standing.STOPPED) == too_many


@pytest.mark.parametrize(
    ("lost", "stops"),
    [
        ({"b00"}, True),
        ({"b04"}, True),
        ({"b05"}, True),
        ({"b19"}, True),
        ({"b34"}, True),
        ({"b35"}, False),
        ({"b48", "b49"}, True),
    ],
)
def test_two_percent_of_fifty_boards_is_one_board_and_none_of_fewer(lost: set[str], stops: bool) -> None:
    verdict = judge(a_rollout(), reports(dict.fromkeys(lost, Step.FAILED)))
    assert (verdict.state is Standing.STOPPED) == stops and verdict.lost == tuple(sorted(lost))


def test_a_stop_says_how_many_were_lost_and_why_the_first_was() -> None:
    heard = {**reports(CONFIRMED_CANARIES), "b02": a_report("b02", Step.FAILED, why="NaN in its outputs")}
    verdict = judge(a_rollout(), heard)
    assert verdict.why == "1 of the first 5 boards lost, allowed are 20 ‰; b02: NaN in its outputs"


# ---- nobody before its turn -----------------------------------------------------------------------------------------------


@given(st.data())
def test_nobody_begins_before_every_earlier_wave_has_settled(data: st.DataObject) -> None:
    plan = data.draw(plans())
    steps = {board: data.draw(st.sampled_from((None, *Step))) for board in plan.boards}
    heard = reports({board: step for board, step in steps.items() if step is not None})
    rollout = Rollout(plan, "ann")
    for at, wave in enumerate(waves(plan)):
        begins = any(steps[board] in (None, Step.WAITING) and move(rollout, heard, board).motion is Motion.GO for board in wave)
        for earlier, before in enumerate(waves(plan)[:at] if begins else ()):
            rested = sum(steps[board] in RESTS for board in before)
            assert Fraction(rested, len(before)) >= Fraction(plan.settled_permille if earlier else 1000, 1000)
            assert earlier or any(steps[board] is Step.CONFIRMED for board in before)


@given(st.data())
def test_a_board_that_heard_less_is_never_ahead_of_one_that_heard_more(data: st.DataObject) -> None:
    plan = data.draw(plans())
    rollout = Rollout(plan, "ann")
    lives = {board: data.draw(honest_lives(board)) for board in plan.boards}
    cuts = {board: data.draw(st.integers(0, len(life))) for board, life in lives.items()}
    less = {board: life[cuts[board] - 1] for board, life in lives.items() if cuts[board]}
    more = {board: life[-1] for board, life in lives.items() if life}
    before, after = judge(rollout, less), judge(rollout, more)
    assert before.wave <= after.wave or before.lost != after.lost


@pytest.mark.parametrize("last", [None, Step.WAITING, Step.FETCHING, Step.TRIAL])
def test_every_canary_must_settle_before_anyone_else_begins(last: Step | None) -> None:
    everyone_else = dict.fromkeys(names(50)[5:40], Step.CONFIRMED)
    heard = reports({**CONFIRMED_CANARIES, **everyone_else, **({"b04": last} if last else {})})
    if last is None:
        del heard["b04"]
    assert judge(a_rollout(), heard).wave == 0
    assert move(a_rollout(), heard, "b45").motion is Motion.WAIT
    heard["b04"] = a_report("b04", Step.CONFIRMED)
    assert move(a_rollout(), heard, "b45").motion is Motion.GO


def test_canaries_that_all_refuse_it_have_tried_nothing() -> None:
    heard = reports(dict.fromkeys(CANARIES, Step.REFUSED))
    assert move(a_rollout(), heard, "b05").motion is Motion.WAIT
    assert judge(a_rollout(), heard).why == "no canary has confirmed it"
    heard["b03"] = a_report("b03", Step.CONFIRMED)
    assert move(a_rollout(), heard, "b05").motion is Motion.GO


@pytest.mark.parametrize(("settled", "motion"), [(13, Motion.WAIT), (14, Motion.GO)])
def test_boards_that_are_away_do_not_hold_up_a_wave_beyond_its_share(settled: int, motion: Motion) -> None:
    """Nine tenths of fifteen are thirteen and a half."""
    heard = reports({**CONFIRMED_CANARIES, **dict.fromkeys(names(50)[5 : 5 + settled], Step.CONFIRMED)})
    assert move(a_rollout(), heard, "b20").motion is motion
    assert move(a_rollout(), heard, "b19").motion is Motion.GO, "who was away takes it when it is back"


def test_who_waits_is_not_given_another_reason_for_every_board_that_comes_forward() -> None:
    """The reason is part of its report: else a fleet of n boards says n reports for each of one board."""
    whys = set()
    for settled in range(5):
        heard = reports(dict.fromkeys(CANARIES[:settled], Step.CONFIRMED))
        whys.add(move(a_rollout(), heard, "b45").why)
    assert whys == {"its wave is 3; the canaries have not settled"}


def test_the_waves_are_all_boards_once_in_the_plans_order() -> None:
    assert list(map(len, waves(a_plan()))) == [5, 15, 15, 15]
    assert sum(waves(a_plan()), ()) == names(50)
    assert waves(a_plan(7, canary=7, wave=1)) == (names(7),)


@given(plans())
def test_boards_that_only_follow_their_moves_all_end_with_the_release(plan: Plan) -> None:
    rollout, heard = Rollout(plan, "ann"), dict[str, Report]()
    for _ in range(3 * len(plan.boards) + 1):
        for board in [board for board, motion in moves(rollout, heard).items() if motion is Motion.GO]:
            said = heard[board].progress[0].step if board in heard else None
            heard[board] = a_report(board, {None: Step.FETCHING, Step.FETCHING: Step.TRIAL}.get(said, Step.CONFIRMED))
    assert judge(rollout, heard).state is Standing.DONE
    assert {each.progress[0].step for each in heard.values()} == {Step.CONFIRMED} and len(heard) == len(plan.boards)


# ---- what an operator orders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [Action.ABORT, Action.ROLLBACK])
@given(st.data())
def test_an_abort_and_a_rollback_send_everyone_back_who_has_it_or_began(action: Action, data: st.DataObject) -> None:
    plan = data.draw(plans())
    steps = {board: data.draw(st.sampled_from((None, *Step))) for board in plan.boards}
    rollout = Rollout(plan, "ann", 2, action)
    heard = reports({board: step for board, step in steps.items() if step is not None})
    assert judge(rollout, heard).state is Standing.ABORTED
    for board, motion in moves(rollout, heard).items():
        going = steps[board] in (Step.FETCHING, Step.TRIAL, Step.CONFIRMED)
        assert motion is (Motion.BACK if going else Motion.STAY)


@given(st.data())
def test_a_pause_lets_who_began_end_and_nobody_begin(data: st.DataObject) -> None:
    plan = replace(data.draw(plans()), max_error_permille=1000)
    steps = {board: data.draw(st.sampled_from((None, *Step))) for board in plan.boards}
    heard = reports({board: step for board, step in steps.items() if step is not None})
    for board, motion in moves(Rollout(plan, "ann", 2, Action.PAUSE), heard).items():
        expected = Motion.WAIT if steps[board] in (None, Step.WAITING) else Motion.STAY
        assert motion is (Motion.GO if steps[board] in (Step.FETCHING, Step.TRIAL) else expected)
    resumed = moves(Rollout(plan, "ann", 3), heard)
    assert resumed == moves(Rollout(plan, "ann", 1), heard)


def test_too_many_losses_stop_a_paused_rollout_too() -> None:
    rollout = a_rollout(action=Action.PAUSE, revision=2)
    assert judge(rollout, reports({"b00": Step.FAILED, "b01": Step.TRIAL})).state is Standing.STOPPED


ALLOWED = {
    Action.RUN: {Action.PAUSE, Action.ABORT, Action.ROLLBACK},
    Action.PAUSE: {Action.RUN, Action.ABORT, Action.ROLLBACK},
}


@pytest.mark.parametrize("was", Action)
@pytest.mark.parametrize("wanted", Action)
def test_after_an_abort_there_is_no_next_word_on_a_plan(was: Action, wanted: Action) -> None:
    rollout = a_rollout(action=was, revision=4)
    if wanted in ALLOWED.get(was, ()):
        assert ordered(rollout, "bob", wanted, "noise") == Rollout(rollout.plan, "bob", 5, wanted, "noise")
    else:
        with pytest.raises(RefusedError, match=was.value):
            ordered(rollout, "bob", wanted)


def test_of_two_plans_the_later_counts_and_of_one_plan_the_later_word() -> None:
    heard = Heard()
    later = Rollout(replace(a_plan(), serial=SERIAL + 1), "ann")
    assert heard.hear_rollout(a_rollout(action=Action.PAUSE, revision=3), b"signed")
    assert heard.signed(MODEL) == b"signed" and not heard.hear_rollout(a_rollout(revision=2))
    assert heard.hear_rollout(later) and not heard.hear_rollout(a_rollout(revision=4))
    assert heard.rollout(MODEL) == later and heard.signed(MODEL) == b""


# ---- boards that are out, and boards that are none ------------------------------------------------------------------------


def test_a_revoked_canary_is_not_waited_for_and_takes_nothing() -> None:
    heard = reports(dict.fromkeys(CANARIES[1:], Step.CONFIRMED))
    assert move(a_rollout(), heard, "b05").motion is Motion.WAIT
    assert move(a_rollout(), heard, "b05", out={"b00"}).motion is Motion.GO
    assert move(a_rollout(), heard, "b00", out={"b00"}).motion is Motion.STAY
    assert move(a_rollout(action=Action.ABORT), reports({"b00": Step.TRIAL}), "b00", out={"b00"}).motion is Motion.STAY


@given(st.data())
def test_revoking_a_board_undoes_no_stop(data: st.DataObject) -> None:
    plan = data.draw(plans())
    out = data.draw(st.sets(st.sampled_from(plan.boards)))
    heard = reports({board: data.draw(st.sampled_from(Step)) for board in plan.boards})
    whole, without = judge(Rollout(plan, "ann"), heard), judge(Rollout(plan, "ann"), heard, out)
    assert (whole.state is Standing.STOPPED) == (without.state is Standing.STOPPED)
    assert without.wave >= whole.wave


def test_a_board_outside_the_plan_stays_where_it_is() -> None:
    heard = reports({"z": Step.TRIAL})
    assert move(a_rollout(), heard, "z").motion is Motion.STAY
    assert judge(a_rollout(), reports({"z": Step.FAILED})).state is Standing.RUNNING


# ---- what is told ---------------------------------------------------------------------------------------------------------


UNDER_WAY = (Step.FETCHING, Step.TRIAL, Step.CONFIRMED)


@given(st.data())
def test_the_counts_and_the_tallies_are_of_all_boards_of_the_plan(data: st.DataObject) -> None:
    plan = data.draw(plans())
    heard = reports({board: data.draw(st.sampled_from(Step)) for board in plan.boards})
    verdict, figures = judge(Rollout(plan, "ann"), heard), tally(Rollout(plan, "ann"), heard)
    assert sum(verdict.counts.values()) == sum(each.boards for each in figures) == len(plan.boards)
    assert sum(each.confirmed for each in figures) == verdict.counts.get(Step.CONFIRMED, 0)
    assert sum(each.lost for each in figures) == len(verdict.lost)
    assert sum(each.failed for each in figures) == verdict.counts.get(Step.FAILED, 0)
    assert sum(each.under_way for each in figures) == sum(verdict.counts.get(step, 0) for step in UNDER_WAY)
    assert all(0 <= each.permille <= 1000 and each.lost + each.confirmed <= each.settled for each in figures)


def test_a_wave_shows_what_part_of_the_bytes_has_arrived_where_the_release_was_not_lost() -> None:
    heard = {
        "b00": a_report("b00", Step.FETCHING, permille=500), "b01": a_report("b01", Step.TRIAL),
        "b02": a_report("b02", Step.CONFIRMED), "b03": a_report("b03", Step.FAILED),
    }  # fmt: skip
    first = tally(a_rollout(max_error_permille=1000), heard, out={"b04"})[0]
    assert (first.permille, first.confirmed, first.settled, first.lost) == (625, 1, 3, 1)
    assert (first.failed, first.under_way) == (1, 3)


# ---- the order of the boards ----------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(names(12)), st.sampled_from(("jetson", "coral", "pi")), min_size=1), st.integers(1, 9))
def test_every_class_of_board_has_a_canary_first_of_all(backends: dict[str, str], serial: int) -> None:
    order = order_boards(backends, backends, serial)
    classes = set(backends.values())
    assert sorted(order) == sorted(backends)
    assert {backends[board] for board in order[: len(classes)]} == classes
    assert order == order_boards(reversed(list(backends)), backends, serial)
    sizes = [list(backends.values()).count(backends[board]) for board in order[: len(classes)]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_same_boards_are_not_the_canaries_of_every_plan() -> None:
    orders = {order_boards(names(20), {}, serial)[:2] for serial in range(10)}
    assert len(orders) == 10


@pytest.mark.parametrize(("boards", "permille", "count"), [(50, 100, 5), (50, 20, 1), (3, 10, 1), (7, 500, 4), (4, 1000, 4)])
def test_a_share_is_rounded_up_and_at_least_one(boards: int, permille: int, count: int) -> None:
    assert share(boards, permille) == count


# ---- bounds ---------------------------------------------------------------------------------------------------------------


def test_a_flood_of_boards_or_models_finds_the_tables_full() -> None:
    heard = Heard()
    for i in range(MAX_BOARDS):
        heard.hear_report(a_report(f"board-{i}", Step.TRIAL))
    for i in range(MAX_ROLLOUTS):
        heard.hear_rollout(Rollout(Plan(SERIAL, f"model-{i}", 1, MANIFEST, ("a",), 1, 1), "ann"))
    with pytest.raises(RefusedError, match="1024 boards"):
        heard.hear_report(a_report("one-more", Step.TRIAL))
    with pytest.raises(RefusedError, match="64 models"):
        heard.hear_rollout(a_rollout())
    assert heard.hear_report(a_report("board-7", Step.CONFIRMED, number=2))


def test_a_board_that_invents_losses_without_end_costs_no_more_than_its_newest() -> None:
    heard = Heard()
    for i in range(3 * MAX_LOSSES):
        heard.hear_report(Report("liar", 1, i, progress=(Progress(MODEL, SERIAL + i, Step.FAILED),)))
    told = [each.serial for each in heard.reports["liar"].progress]
    assert told == list(range(SERIAL + 3 * MAX_LOSSES - MAX_ROLLOUTS, SERIAL + 3 * MAX_LOSSES))
    assert len(heard.losses("liar")) == MAX_LOSSES


@pytest.mark.parametrize(
    "change",
    [
        {"canary": 0}, {"canary": 51}, {"wave": 0}, {"wave": 51}, {"max_error_permille": 1001}, {"max_error_permille": -1},
        {"settled_permille": 0}, {"settled_permille": 1001}, {"rate_bytes_per_s": -1}, {"serial": 0}, {"number": 0},
        {"manifest": b"short"}, {"boards": ("a", "a")}, {"boards": ()}, {"boards": ("A",)}, {"model": ""}, {"canary": True},
    ],
)  # fmt: skip
def test_a_plan_out_of_bounds_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(RefusedError):
        replace(a_plan(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"progress": (Progress(MODEL, 1, Step.TRIAL), Progress(MODEL, 1, Step.FAILED))}, {"note": "x" * 241}, {"agent": "x" * 65},
        {"boot_epoch": -1}, {"number": 2**53 + 1}, {"board": "B"},
        {"progress": tuple(Progress(f"m{i}", 1, Step.TRIAL) for i in range(MAX_ROLLOUTS + 1))},
    ],
)  # fmt: skip
def test_a_report_out_of_bounds_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(RefusedError):
        replace(a_report("a", Step.TRIAL), **change)  # type: ignore[arg-type]
