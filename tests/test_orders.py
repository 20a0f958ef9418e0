"""Rollouts and reports as messages: what is signed comes back, and anything else is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.cbor import decode, encode
from edge_agent.core.cose import decode_sign1, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_BOARDS
from ota.orders import (
    MAX_REPORT_BYTES,
    MAX_ROLLOUT_BYTES,
    REPORT_AAD,
    ROLLOUT_AAD,
    open_report,
    open_rollout,
    sign_report,
    sign_rollout,
)
from ota.rollout import MAX_AGENT_CHARS, MAX_ROLLOUTS, Action, Plan, Progress, Report, Rollout, SlotReport, Step
from ota.slots import MAX_WHY_CHARS, State
from tests.attested import find_key, key_of_any, refused_when_broken, signer
from tests.drawn import board_ids, model_names
from tests.rollouts import MANIFEST, MODEL, SERIAL, plans

A, B = signer("a"), signer("b")
ROLLOUT = Rollout(Plan(SERIAL, MODEL, 7, MANIFEST, ("b", "c"), 1, 1), "a", 2, Action.ABORT, "noise in the kitchen")
REPORT = Report(
    "b", 3, 9, "0.1.0",
    (Progress(MODEL, SERIAL, Step.RETURNED, 1000, "NaN in its outputs", failed=True), Progress("other", 5, Step.FETCHING, 12)),
    (SlotReport(MODEL, 6, 7, State.ROLLED_BACK.value, "NaN in its outputs"), SlotReport("other", 0)), "no room on the disk",
)  # fmt: skip
WIDE = "\U0001f40d"

whys = st.text(st.characters(codec="utf-8"), max_size=MAX_WHY_CHARS)
numbers = st.integers(0, 2**31 - 1)
counts = st.integers(0, 2**53)
rollouts = st.builds(Rollout, plans(), board_ids, st.integers(1, 2**31), st.sampled_from(Action), whys)
progress = st.builds(
    Progress, model_names, st.integers(1, 2**53), st.sampled_from(Step), st.integers(0, 1000), whys, st.booleans()
)
slots = st.builds(SlotReport, model_names, numbers, numbers, st.sampled_from([each.value for each in State]), whys)
reports = st.builds(
    Report, board_ids, counts, counts, st.text(st.characters(codec="utf-8"), max_size=MAX_AGENT_CHARS),
    st.lists(progress, max_size=3, unique_by=lambda each: (each.model, each.serial)).map(tuple),
    st.lists(slots, max_size=3, unique_by=lambda each: each.model).map(tuple), whys,
)  # fmt: skip


def payload_of(message: bytes, max_bytes: int = MAX_REPORT_BYTES) -> dict[int, Any]:
    payload = decode(decode_sign1(message, max_bytes).payload)
    assert isinstance(payload, dict)
    return payload


# ---- rollouts -----------------------------------------------------------------------------------------------------------


@given(rollouts)
def test_a_rollout_comes_back_as_it_was_signed(rollout: Rollout) -> None:
    assert open_rollout(sign_rollout(rollout, signer(rollout.operator)), key_of_any) == rollout


def test_every_bit_flip_and_truncation_of_a_rollout_is_refused() -> None:
    refused_when_broken(sign_rollout(ROLLOUT, A), lambda message: open_rollout(message, find_key))


def test_a_rollout_in_another_operators_name_is_refused() -> None:
    with pytest.raises(RefusedError, match="own signature"):
        open_rollout(sign_rollout(ROLLOUT, B), find_key)


def test_a_rollout_of_who_is_no_operator_is_refused() -> None:
    with pytest.raises(RefusedError, match="kid"):
        open_rollout(sign_rollout(replace(ROLLOUT, operator="z"), signer("z")), find_key)


def plan_with(**changes: object) -> dict[int, object]:
    keys = {"serial": 1, "model": 2, "number": 3, "manifest": 4, "boards": 5, "canary": 6, "wave": 7, "error": 8, "settled": 9}
    return {1: payload_of(sign_rollout(ROLLOUT, A))[1] | {keys[name]: value for name, value in changes.items()}}


@pytest.mark.parametrize(
    "change",
    [
        plan_with(serial=0), plan_with(serial=2**53 + 1), plan_with(serial=True), plan_with(model="../x"), plan_with(number=0),
        plan_with(manifest=b"x" * 31), plan_with(boards=[]), plan_with(boards=["b", "b"]), plan_with(boards=[1]),
        plan_with(boards=["b"] * (MAX_BOARDS + 1)), plan_with(boards="bc"), plan_with(canary=0), plan_with(canary=3),
        plan_with(wave=3), plan_with(error=1001), plan_with(settled=0), {1: []}, {1: {}}, {2: "A"}, {2: b"a"}, {3: 0}, {3: "2"},
        {4: "stop"}, {4: 1}, {5: ""}, {5: "x" * (MAX_WHY_CHARS + 1)}, {5: 1}, {6: 1}, {"7": 1},
    ],
)  # fmt: skip
def test_a_rollout_out_of_bounds_or_said_in_another_way_is_refused(change: dict[Any, object]) -> None:
    message = sign1(encode({**payload_of(sign_rollout(ROLLOUT, A)), **change}), A, ROLLOUT_AAD)
    with pytest.raises(RefusedError):
        open_rollout(message, find_key)


def test_the_largest_rollout_fits_and_a_larger_message_is_refused_unread() -> None:
    boards = tuple(f"b{i:031d}" for i in range(MAX_BOARDS))
    plan = Plan(2**53, "m" * 64, 2**31 - 1, MANIFEST, boards, MAX_BOARDS, MAX_BOARDS, 1000, 1000, 2**40)
    message = sign_rollout(Rollout(plan, "a", 2**31, Action.ROLLBACK, WIDE * MAX_WHY_CHARS), A)
    assert open_rollout(message, find_key).plan == plan and len(message) <= MAX_ROLLOUT_BYTES
    with pytest.raises(RefusedError, match=f"at most {MAX_ROLLOUT_BYTES} bytes"):
        open_rollout(sign1(bytes(MAX_ROLLOUT_BYTES), A, ROLLOUT_AAD), find_key)


# ---- reports ------------------------------------------------------------------------------------------------------------


@given(reports)
def test_a_report_comes_back_as_it_was_signed(report: Report) -> None:
    assert open_report(sign_report(report, signer(report.board)), key_of_any) == report


def test_every_bit_flip_and_truncation_of_a_report_is_refused() -> None:
    refused_when_broken(sign_report(REPORT, B), lambda message: open_report(message, find_key))


def test_a_report_in_another_boards_name_is_refused() -> None:
    with pytest.raises(RefusedError, match="own signature"):
        open_report(sign_report(REPORT, signer("c")), find_key)


def test_a_report_of_a_board_that_is_not_enrolled_is_refused() -> None:
    with pytest.raises(RefusedError, match="kid"):
        open_report(sign_report(replace(REPORT, board="z"), signer("z")), find_key)


def test_a_message_for_one_purpose_is_not_believed_for_the_other() -> None:
    with pytest.raises(RefusedError, match="signature"):
        open_report(sign1(encode(payload_of(sign_report(REPORT, B))), B, ROLLOUT_AAD), find_key)
    with pytest.raises(RefusedError, match="signature"):
        open_rollout(sign1(encode(payload_of(sign_rollout(ROLLOUT, A))), A, REPORT_AAD), find_key)


def progress_with(change: dict[Any, object]) -> dict[int, object]:
    return {5: [{1: MODEL, 2: SERIAL, 3: "trial", **change}]}


def slots_with(change: dict[Any, object]) -> dict[int, object]:
    return {6: [{1: MODEL, 2: 6, **change}]}


@pytest.mark.parametrize("change", [progress_with({}), slots_with({}), progress_with({3: "failed", 6: True}), {4: "0.2.0"}])
def test_a_report_with_another_value_in_its_bounds_is_taken(change: dict[int, object]) -> None:
    payload = {**payload_of(sign_report(REPORT, B)), **change}
    assert open_report(sign1(encode(payload), B, REPORT_AAD), find_key) != REPORT


SAID_TWICE = {1: MODEL, 2: SERIAL, 3: "trial"}


@pytest.mark.parametrize(
    "change",
    [
        {2: -1}, {2: True}, {3: 2**53 + 1}, {4: ""}, {4: "x" * (MAX_AGENT_CHARS + 1)}, {5: []}, {5: {}}, {5: [[]]}, {6: []},
        {7: ""}, {7: "x" * (MAX_WHY_CHARS + 1)}, {8: 1}, {5: [SAID_TWICE, SAID_TWICE]}, {6: [{1: MODEL, 2: 1}, {1: MODEL, 2: 2}]},
        {5: [{1: f"m{i}", 2: 1, 3: "trial"} for i in range(MAX_ROLLOUTS + 1)]}, {6: [{1: f"m{i}", 2: 1} for i in range(65)]},
        progress_with({1: "../x"}), progress_with({2: 0}), progress_with({3: "lost"}), progress_with({3: 1}),
        progress_with({4: 0}), progress_with({4: 1001}), progress_with({5: ""}), progress_with({5: "x" * (MAX_WHY_CHARS + 1)}),
        progress_with({6: False}), progress_with({6: 1}), progress_with({7: 1}), progress_with({3: "failed"}),
        slots_with({1: "A"}), slots_with({2: -1}), slots_with({2: 2**31}), slots_with({3: 0}), slots_with({3: 2**31}),
        slots_with({4: "empty"}), slots_with({4: "full"}), slots_with({5: ""}), slots_with({6: 0}),
    ],
)  # fmt: skip
def test_a_report_out_of_bounds_or_said_in_another_way_is_refused(change: dict[Any, object]) -> None:
    message = sign1(encode({**payload_of(sign_report(REPORT, B)), **change}), B, REPORT_AAD)
    with pytest.raises(RefusedError):
        open_report(message, find_key)


def test_the_largest_report_fits_and_a_larger_message_is_refused_unread() -> None:
    why, every = WIDE * MAX_WHY_CHARS, range(MAX_ROLLOUTS)
    said = tuple(Progress(f"m{i:063d}", 2**53, Step.RETURNED, 1000, why, failed=True) for i in every)
    held = tuple(SlotReport(f"m{i:063d}", 2**31 - 1, 2**31 - 1, State.ROLLED_BACK.value, why) for i in every)
    report = Report("b", 2**53, 2**53, WIDE * MAX_AGENT_CHARS, said, held, why)
    message = sign_report(report, B)
    assert open_report(message, find_key) == report and len(message) <= MAX_REPORT_BYTES
    with pytest.raises(RefusedError, match=f"at most {MAX_REPORT_BYTES} bytes"):
        open_report(sign1(bytes(MAX_REPORT_BYTES), B, REPORT_AAD), find_key)
