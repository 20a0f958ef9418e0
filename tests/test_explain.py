"""``sly explain``: the options with their costs taken apart, what was excluded, and in plain words why the first one won."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.commands.decision_table import decision_table
from edge_agent.commands.terminal import WIDTH
from edge_agent.core.cbor import decode, encode
from edge_agent.core.values import DataClass, InferenceRequest, Limits, Tensor, TrustTier
from edge_agent.core.wanted import Wanted
from edge_agent.node.report import decision_report
from edge_agent.node.words import NO_OTHER_BOARD, NOTHING_LEFT, PARTS, SAME_COST, class_words, duration, size, why
from edge_agent.placement.cost import CostParts
from edge_agent.placement.kv import KvAction, KvPlan
from edge_agent.placement.options import Decision, Exclusion, Option
from tests.virtual_board import offer

REQUEST = InferenceRequest("ab" * 16, "detect_faces", {"image": Tensor("uint8", (60_000,), bytes(60_000))})
NOTHING = CostParts(0, 0, 0, 0, 0, 0)
parts = st.sampled_from((0, 0, 0, 1, 999, 10_000, 10**7, 10**12))
costs = st.builds(CostParts, *([parts] * len(PARTS)))
names = st.sampled_from(("a", "b", "kitchen-of-the-old-house-in-the-v"[:32], "c" * 32))
models = st.sampled_from(("m", "blazeface-short", "x" * 64))
kv_plans = st.sampled_from((KvPlan(KvAction.NONE, 0, 0), KvPlan(KvAction.PEER, 5, 5, 123_456, "c" * 32)))
found = st.builds(lambda board, model, cost, kv: Option(board, offer(model, 1000), cost, kv), names, models, costs, kv_plans)
excluded = st.builds(Exclusion, names, st.just("") | models, st.sampled_from(("it is offline", "word " * 80)))


def option(board: str, named: str = "m", /, **parts_us: int) -> Option:
    return Option(board, offer(named, 1000), replace(NOTHING, **parts_us))


def decided(*options: Option, out: Sequence[Exclusion] = ()) -> Decision:
    return Decision(REQUEST.request_id, tuple(sorted(options, key=lambda each: each.rank)), tuple(out))


def text_of(*options: Option) -> Any:
    return why(decided(*options))["text"]


def main_of(*options: Option) -> Any:
    return why(decided(*options))["main"]


# why it won


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("busy", "faster"), ("wait", "shorter queue"), ("transfer", "nearer"), ("kv", "its KV is had sooner"),
        ("energy", "less energy"), ("lateness", "less late"), ("quality", "better model"), ("congestion", "less booked"),
        ("price", "lower price"),
    ],
)  # fmt: skip
def test_what_differs_is_named_whichever_part_of_the_cost_it_is(part: str, words: str) -> None:
    won, lost = option("coral", busy_us=900), option("jetson", **{"busy_us": 900} | {f"{part}_us": 4000})
    by = "3.1 ms" if part == "busy" else "4.0 ms"
    assert text_of(won, lost) == f"chosen: coral/m, {by} cheaper than jetson/m: {words}"
    assert main_of(won, lost) == words


def test_what_speaks_against_the_winner_is_told_and_small_differences_are_not() -> None:
    won, lost = option("coral", busy_us=5000, wait_us=10), option("jetson", energy_us=9000, wait_us=100)
    assert text_of(won, lost) == "chosen: coral/m, 4.1 ms cheaper than jetson/m: less energy (9.0 ms), though slower (5.0 ms)"
    assert main_of(won, lost) == "less energy"


def test_many_small_advantages_against_one_great_disadvantage_name_the_greatest_of_them() -> None:
    small = {f"{part}_us": 1000 for part in ("wait", "transfer", "energy", "lateness", "quality", "price")}
    text = text_of(option("coral", busy_us=5500), option("jetson", **small))
    assert text.startswith("chosen: coral/m, 500 µs cheaper than jetson/m: ") and "though slower (5.5 ms)" in text


def test_a_runner_up_on_the_same_board_is_not_all_that_is_told() -> None:
    won, other = option("coral", "m", busy_us=1), option("coral", "n", busy_us=2001)
    far = option("jetson", "m", busy_us=1, energy_us=5000)
    assert text_of(won, other, far) == (
        "chosen: coral/m, 2.0 ms cheaper than coral/n: faster; 5.0 ms cheaper than jetson/m: less energy"
    )
    assert main_of(won, other, far) == "less energy", "the board is what the main reason is about"


def test_the_last_board_left_says_so() -> None:
    offline = [
        Exclusion("coral", "n", "too poor"),
        Exclusion("jetson", "", "it is offline"),
        Exclusion("pi", "", "it is offline"),
    ]
    report = why(decided(option("coral"), out=offline))
    assert (report["main"], report["text"]) == (NO_OTHER_BOARD, f"chosen: coral/m, {NO_OTHER_BOARD}: it is offline")
    unlike = [*offline, Exclusion("barn", "", "it is stopped")]
    assert why(decided(option("coral"), out=unlike))["text"] == f"chosen: coral/m, {NO_OTHER_BOARD}"


def test_a_tie_says_how_it_was_broken() -> None:
    assert text_of(option("b"), option("a")) == "chosen: a/m, which costs as much as b/m: the first by name is taken"
    assert main_of(option("b"), option("a")) == SAME_COST


def test_where_nothing_can_be_chosen_that_is_the_reason() -> None:
    assert why(decided(out=[Exclusion("a", "", "it is offline")]))["text"] == "nothing can be chosen: every option is excluded"
    assert why(decided())["text"] == "nothing can be chosen: no board is known"
    assert why(decided())["main"] == NOTHING_LEFT


@given(st.lists(found, max_size=6, unique_by=lambda each: (each.board, each.offer.model)))
def test_whatever_the_costs_are_the_winner_has_a_reason_and_the_differences_add_up(options: list[Option]) -> None:
    report = why(decided(*options))
    assert report["main"] and report["text"]
    for rival in report["against"]:  # type: ignore[attr-defined]
        assert sum(rival["saved_us"].values()) == rival["by_us"] >= 0
        assert rival["words"] or not rival["saved_us"]


# the table


@given(st.lists(found, max_size=6), st.lists(excluded, max_size=3), st.booleans())
def test_the_table_fits_a_terminal_whatever_the_names_and_costs_are(
    options: list[Option], out: list[Exclusion], known: bool
) -> None:
    shares = {(each.board, each.offer.model): 125 for each in options} if known else None
    report = decision_report(replace(decided(*options, out=out), wanted=Wanted.of(REQUEST)), shares)
    assert decode(encode(report)) == report == json.loads(json.dumps(report)), "plain values, for the socket and for JSON"
    lines = decision_table(report).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.startswith("->") for line in lines) == bool(options)
    assert sum(line.startswith("x  ") for line in lines) == len(out)


def test_only_costs_that_there_are_have_a_column() -> None:
    two = decided(option("coral", busy_us=1500, energy_us=20), option("jetson", busy_us=3000, transfer_us=2000))
    head, won, lost, _ = decision_table(decision_report(two)).splitlines()
    assert head.split() == ["board/model", "cost", "ms", "=", "busy", "+", "transfer", "+", "energy"]
    assert won.split() == ["->", "coral/m", "1.52", "1.50", "0.00", "0.02"]
    assert lost.split() == ["jetson/m", "5.00", "3.00", "2.00", "0.00"]


def test_json_keeps_every_part_of_every_cost() -> None:
    report: Any = decision_report(decided(option("coral", price_us=7, congestion_us=5)))
    told = report["options"][0]
    assert [told[f"{part}_us"] for part in PARTS] == [0, 0, 0, 0, 0, 0, 0, 5, 7]
    assert told["total_us"] == 12 and told["share_permille"] is None


def test_the_share_of_the_agreed_table_and_the_way_of_the_kv_are_shown() -> None:
    there = Option("b", offer("m", 1000), replace(NOTHING, kv_us=1000), KvPlan(KvAction.PEER, 1000, 0, 512, "a"))
    table = decision_table(decision_report(decided(there, option("c", busy_us=2000)), {("b", "m"): 700}))
    assert table.splitlines()[1].split() == ["->", "b/m", "70", "%", "1.00", "0.00", "1.00", "peer", "512", "a"]
    assert table.splitlines()[2].split() == ["c/m", "-", "2.00", "2.00", "0.00", "-"]


# classes in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "detect_faces, 64 KiB, within 8.39 s"),
        ({"model": "blazeface-full"}, "detect_faces, by blazeface-full, 64 KiB, within 8.39 s"),
        ({"data": DataClass.PUBLIC}, "detect_faces, 64 KiB, within 8.39 s, public data"),
        ({"limits": Limits(3_000_000, 5000, 795, TrustTier.WARNING)},
         "detect_faces, 64 KiB, within 2.1 s, quality >= 800 ‰, <= 4.1 mJ, trust warning"),
        ({"task": "chat", "inputs": {"turn": Tensor("uint8", (3000,), bytes(3000))}, "answer_tokens": 200},
         "talk, answer <= 255 tokens, 4 KiB, within 8.39 s"),
    ],
)  # fmt: skip
def test_a_request_class_is_told_in_words(changes: dict[str, Any], words: str) -> None:
    assert class_words(Wanted.of(replace(REQUEST, **changes)).classed()) == words


def test_times_and_sizes_carry_their_unit() -> None:
    assert [duration(each) for each in (40, 3100, 12_000_000)] == ["40 µs", "3.1 ms", "12.0 s"]
    assert [size(each) for each in (0, 1000, 65536, 2**20, 3 * 2**30)] == ["0 B", "1000 B", "64 KiB", "1 MiB", "3 GiB"]
