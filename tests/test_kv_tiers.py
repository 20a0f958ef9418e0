"""The rules of parked KV, against their definitions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.chat import Tier
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import SINK_TOKENS, block_start, full_blocks, sealed_blocks
from edge_agent.store.kv_tiers import (
    LEAST_PREFILLED,
    LEAST_RESTORED,
    MARGIN,
    MAX_TOK_S,
    NOTHING,
    Parked,
    Restorable,
    Speeds,
    first_to_go,
    restorable,
    restore_pays,
)


def by_definition(limit: int, window: int, sealed: set[int], rows: dict[int, int]) -> set[tuple[int, int]]:
    """All (tokens, sealed blocks) that the rule allows, straight from its words."""
    ways = set()
    for tokens in range(SINK_TOKENS, limit + 1):
        for count in range(full_blocks(tokens) + 1):
            positions = range(block_start(count), tokens)
            if (
                len(positions) <= 127
                and all(block in sealed for block in range(max(0, count - window), count))
                and all((at - SINK_TOKENS) % 64 < rows.get(full_blocks(at), 0) for at in positions)
            ):
                ways.add((tokens, count))
    return ways


@given(
    limit=st.integers(0, 520),
    window=st.integers(1, 4),
    sealed=st.sets(st.integers(0, 8)),
    rows=st.dictionaries(st.integers(0, 8), st.integers(0, 64) | st.just(64)),
)
def test_the_longest_restorable_prefix_is_the_longest_that_the_rule_allows(
    limit: int, window: int, sealed: set[int], rows: dict[int, int]
) -> None:
    here = restorable(limit, window, True, sealed, rows)
    ways = by_definition(limit, window, sealed, rows)
    assert here.tokens == max((tokens for tokens, _ in ways), default=0)
    if here.tokens:
        assert tuple(here) in ways
        assert here.canonical == any(way == (here.tokens, sealed_blocks(here.tokens)) for way in ways)


def test_without_a_prelude_nothing_is_restored() -> None:
    assert restorable(500, 4, False, {0, 1, 2}, {3: 64}) == NOTHING
    assert restorable(3, 4, True, set(), {}) == NOTHING


def test_a_block_whose_predecessor_in_the_window_is_missing_does_not_count() -> None:
    assert restorable(10_000, 2, True, {0, 1, 3}, {}) == (block_start(2), 2)
    assert restorable(10_000, 2, True, {2, 3}, {4: 5}) == (block_start(4) + 5, 4)
    assert restorable(10_000, 3, True, {2, 3}, {4: 5}) == (SINK_TOKENS, 0)


def test_the_state_of_a_session_that_never_stopped_comes_first() -> None:
    assert restorable(10_000, 4, True, {0, 1}, {1: 64, 2: 3}) == (block_start(2) + 3, 1)
    assert restorable(10_000, 4, True, {0, 1}, {2: 3}) == (block_start(2) + 3, 2)
    assert Restorable(block_start(2) + 3, 1).canonical
    assert not Restorable(block_start(2) + 3, 2).canonical


def test_a_million_tokens_take_no_longer_to_judge_than_the_window() -> None:
    sealed = set(range(15_000 - 16, 15_000))
    assert restorable(10**6, 16, True, sealed, {15_000: 9}) == (block_start(15_000) + 9, 15_000)


def test_restore_beats_recompute_until_computing_is_twice_as_fast() -> None:
    """144 MB/s at 6,480 bytes a token against 842 tokens/s (KV.md, figures): 22,222 tokens/s."""
    assert restore_pays(144_000_000 // 6_480, 842)
    assert restore_pays(422, 842) and not restore_pays(421, 842)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_tier_rule_agrees_with_the_expected_times(tokens: int, restore: int, prefill: int) -> None:
    speeds = Speeds(prefill, disk_tok_s=restore)
    restored_us, computed_us = speeds.restore_us(Tier.DISK, tokens), speeds.prefill_us(tokens)
    if restored_us < MARGIN * computed_us:
        assert speeds.restoring_pays(Tier.DISK)
    if restored_us > MARGIN * (computed_us + 1):
        assert not speeds.restoring_pays(Tier.DISK)


def test_restoring_pays_until_both_were_measured() -> None:
    assert Speeds().restoring_pays(Tier.DISK)
    assert Speeds(prefill_tok_s=1000).restoring_pays(Tier.DISK)
    assert Speeds(disk_tok_s=1).restoring_pays(Tier.DISK)
    slow = Speeds(prefill_tok_s=1000, disk_tok_s=1)
    assert not slow.restoring_pays(Tier.DISK) and slow.restoring_pays(Tier.RAM)


def test_what_restoring_costs_by_tier() -> None:
    speeds = Speeds(1, 100, 10)
    assert [speeds.restore_us(tier, 10) for tier in (Tier.HOT, Tier.RAM, Tier.DISK)] == [0, 100_000, 1_000_000]
    assert speeds.prefill_us(3) == 3_000_000
    assert Speeds().restore_us(Tier.RAM, 6000) == Speeds().prefill_us(200) == 1_000_000


def test_speeds_come_to_what_is_measured_again_and_again() -> None:
    speeds = Speeds()
    for _ in range(100):
        speeds = speeds.after_prefill(842, 1_000_000).after_restore(Tier.DISK, 1024, 46_000).after_restore(Tier.RAM, 1024, 23_000)
        speeds = speeds.after_restore(Tier.PEER, 10**6, 1).after_restore(Tier.HOT, 10**6, 1)
    assert speeds == Speeds(842, 44_521, 22_260)


def test_one_odd_measurement_moves_a_speed_by_a_quarter_at_most_and_never_out_of_bounds() -> None:
    assert Speeds(1000).after_prefill(LEAST_PREFILLED, 10**15).prefill_tok_s == 750
    assert Speeds(disk_tok_s=MAX_TOK_S).after_restore(Tier.DISK, 10**30, 1).disk_tok_s == MAX_TOK_S
    assert Speeds(disk_tok_s=1).after_restore(Tier.DISK, LEAST_RESTORED, 10**12).disk_tok_s == 1
    with pytest.raises(RefusedError, match="speed disk_tok_s"):
        Speeds(disk_tok_s=-1)


def test_too_few_tokens_teach_nothing() -> None:
    assert Speeds().after_prefill(LEAST_PREFILLED - 1, 1).after_restore(Tier.RAM, LEAST_RESTORED - 1, 1) == Speeds()


def test_unnamed_sessions_go_first_then_who_frees_most_for_the_least_expected_cost() -> None:
    order = [
        Parked("idle", False, 1000, 10, idle=9),
        Parked("cheap", False, 1000, 10, idle=0),
        Parked("small", False, 500, 10, idle=0),
        Parked("dear", False, 1000, 40, idle=0),
        Parked("named", True, 10**9, 1, idle=99),
    ]
    left = set(order)
    gone = []
    while left:
        victim = first_to_go(left)
        assert victim is not None
        gone.append(victim)
        left.remove(victim)
    assert gone == order


def test_ties_are_decided_by_name_and_what_frees_nothing_stays() -> None:
    assert first_to_go([Parked("b", False, 5, 5, 0), Parked("a", False, 5, 5, 0)]) == Parked("a", False, 5, 5, 0)
    assert first_to_go([Parked("a", False, 0, 5, 0)]) is None


@given(st.lists(st.builds(Parked, st.text(), st.booleans(), st.integers(1, 10**9), st.integers(0, 10**9), st.integers(0, 100))))
def test_the_choice_does_not_depend_on_the_order(sessions: list[Parked]) -> None:
    assert first_to_go(sessions) == first_to_go(sessions[::-1])
    chosen = first_to_go(sessions)
    assert chosen is None or all(not (chosen.named and not other.named) for other in sessions)


def test_waiting_longer_never_keeps_a_session_longer() -> None:
    rivals = [Parked("rival", False, 1000, 100, 5)]
    chosen = [first_to_go([*rivals, Parked("x", False, 1000, 400, idle)]) == rivals[0] for idle in range(60)]
    assert all(earlier or not later for earlier, later in pairwise(chosen))
    assert chosen[0]
    assert not chosen[-1]
