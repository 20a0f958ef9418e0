"""The rules of parked KV, against their definitions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.chat import Tier
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import SINK_TOKENS, block_start, full_blocks, sealed_blocks
from edge_agent.store.kv_tiers import MAX_SPEED, NOTHING, Parked, Restorable, Speeds, first_to_go, restorable, restore_pays


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


def test_restore_beats_recompute_exactly_where_bandwidth_exceeds_bytes_a_token_times_prefill() -> None:
    """6,480 bytes a token at 842 tokens/s (KV.md): the break-even is 5,456,160 bytes/s."""
    assert restore_pays(1024, 1024 * 6480, 5_456_161, 842_000)
    assert not restore_pays(1024, 1024 * 6480, 5_456_160, 842_000)
    assert not restore_pays(0, 0, MAX_SPEED, 1)


@given(st.integers(1, 10**6), st.integers(1, 10**10), st.integers(1, 10**9), st.integers(1, 10**7))
def test_the_tier_rule_agrees_with_the_expected_times(tokens: int, size_bytes: int, bps: int, mtps: int) -> None:
    speeds = Speeds(prefill_mtps=mtps, disk_bps=bps)
    restore_us, prefill_us = speeds.restore_us(Tier.DISK, size_bytes), speeds.prefill_us(tokens)
    if restore_us < prefill_us:
        assert restore_pays(tokens, size_bytes, bps, mtps)
    if restore_us > prefill_us:
        assert not restore_pays(tokens, size_bytes, bps, mtps)


def test_what_restoring_costs_by_tier() -> None:
    speeds = Speeds(1000, 1000, 100, 10)
    assert [speeds.restore_us(tier, 10) for tier in (Tier.HOT, Tier.RAM, Tier.DISK, Tier.PEER)] == [0, 10_000, 100_000, 1_000_000]
    assert speeds.prefill_us(3) == 3_000_000
    assert speeds.restore_us(Tier.NONE, 0) == 0
    with pytest.raises(ValueError, match="nothing is restored from tier none"):
        speeds.restore_us(Tier.NONE, 1)


def test_speeds_come_to_what_is_measured_again_and_again() -> None:
    speeds = Speeds()
    for _ in range(100):
        speeds = (
            speeds.after_prefill(842, 1_000_000).after_restore(Tier.DISK, 144_000, 1000).after_restore(Tier.RAM, 10**9, 10**6)
        )
        speeds = speeds.after_restore(Tier.PEER, 7, 1_000_000).after_restore(Tier.HOT, 1, 1)
    assert abs(speeds.prefill_mtps - 842_000) <= 4
    assert abs(speeds.disk_bps - 144_000_000) <= 4
    assert abs(speeds.ram_bps - 10**9) <= 4
    assert 1 <= speeds.peer_bps <= 11


def test_one_odd_measurement_moves_a_speed_by_a_quarter_at_most_and_never_out_of_bounds() -> None:
    assert Speeds().after_prefill(0, 5) == Speeds().after_prefill(5, 0) == Speeds()
    assert Speeds(prefill_mtps=1000).after_prefill(1, 10**15).prefill_mtps == 750
    assert Speeds(disk_bps=MAX_SPEED).after_restore(Tier.DISK, 10**30, 1).disk_bps == MAX_SPEED
    assert Speeds(disk_bps=1).after_restore(Tier.DISK, 1, 10**12).disk_bps == 1
    with pytest.raises(RefusedError, match="speed disk_bps"):
        Speeds(disk_bps=0)


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
