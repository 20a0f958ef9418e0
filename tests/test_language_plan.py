"""Laws of what is decided before a turn begins: whose KV it gets, and who makes room for it. Pure, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError
from edge_agent.core.model_shape import ModelShape, ring_bytes
from edge_agent.gateway.talker import CONTEXT_LENGTH
from edge_agent.language.admission import Admitted, Resident, Room, Waits, admit, giving_way, hot_bytes, window_tokens
from edge_agent.language.hot import HotSlots
from edge_agent.language.plan import Asked, Past, Source, common_prefix, for_anyone, for_named

SMOLLM2 = ModelShape(30, 9, 3, 64, 576, 1536, 49152, 100_000, 8192)
IDS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(IDS, IDS)
def test_the_common_prefix_is_the_longest(one: list[int], other: list[int]) -> None:
    length = common_prefix(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


@given(IDS, IDS, st.data(), st.booleans())
def test_a_plan_for_anyone_keeps_only_what_both_have_and_computes_at_least_one(
    whole: list[int], past: list[int], data: st.DataObject, busy: bool
) -> None:
    kv = data.draw(st.integers(0, len(past)))
    plan = for_anyone(Asked(tuple(whole)), Past("~1", past, kv, busy), "~2")
    assert plan.ids == tuple(whole)
    assert plan.keep_tokens <= min(kv, len(whole) - 1, common_prefix(whole, past))
    assert plan.base_tokens <= len(whole)
    goes_on = plan.session == "~1"
    assert goes_on == (not busy and whole[: len(past)] == past)
    assert goes_on == (plan.source in (Source.OWN, Source.REWOUND))


@pytest.mark.parametrize(
    ("whole", "past", "source", "keep"),
    [
        ((1, 2, 3, 4), Past("~1", (1, 2, 3), 2), Source.OWN, 2),
        ((1, 2, 3, 4), Past("~1", (1, 2, 3), 2, busy=True), Source.FORK, 2),
        ((1, 2, 9, 4), Past("~1", (1, 2, 3), 2), Source.FORK, 2),
        ((1, 2, 3), Past("~1", (1, 2, 3, 4), 3), Source.FORK, 2),
        ((1, 2, 3, 4), Past("tom", (1, 2, 3), 2), Source.FORK, 2),
        ((1, 2, 3, 4), Past("", (1, 2, 3), 3), Source.FORK, 3),
        ((1, 2, 3, 4), Past("~1", (1, 2, 3), 0, busy=True), Source.NEW, 0),
        ((1, 2, 3, 4), None, Source.NEW, 0),
    ],
)
def test_a_turn_without_a_name(whole: tuple[int, ...], past: Past | None, source: Source, keep: int) -> None:
    plan = for_anyone(Asked(whole), past, "~2")
    assert (plan.source, plan.keep_tokens) == (source, keep)
    assert plan.reason


END, NEXT = 100, 101


@pytest.mark.parametrize(
    ("asked", "past", "source", "ids"),
    [
        (Asked((1, 2)), None, Source.NEW, (1, 2)),
        (Asked((1, 2), (END, NEXT, 5)), (1, 2, 3, END), Source.OWN, (1, 2, 3, END, NEXT, 5)),
        (Asked((1, 2), (END, NEXT, 5)), (1, 2, 3), Source.OWN, (1, 2, 3, END, NEXT, 5)),
        (Asked((1, 2, 3, END, 5), (END, 1), 2), (1, 2, 3, END), Source.OWN, (1, 2, 3, END, 5)),
        (Asked((1, 2, 4, END, 5), (END, 1), 2), (1, 2, 3, END), Source.REWOUND, (1, 2, 4, END, 5)),
        (Asked((7, 2, 4, END, 5), (END, 5), 2), (1, 2, 3, END), Source.OWN, (1, 2, 3, END, 5)),
        (Asked((5, 8), (END, 5, 8), 0, (END, 5)), (1, 2, END, 5, 8, 9), Source.REWOUND, (1, 2, END, 5, 8)),
    ],
)
def test_a_turn_with_a_name(asked: Asked, past: Sequence[int] | None, source: Source, ids: tuple[int, ...]) -> None:
    plan = for_named("tom", asked, Past("tom", past, len(past)) if past is not None else None)
    assert (plan.session, plan.source, plan.ids) == ("tom", source, ids)
    assert plan.ids[: plan.base_tokens] == tuple(past or ())[: plan.base_tokens]
    assert plan.keep_tokens < len(plan.ids)


# room


def resident(slot: int, size_bytes: int = 100, live: bool = False, restore_us: int = 10, used_us: int = 0) -> Resident:
    return Resident(slot, f"s{slot}", size_bytes, live, restore_us, used_us)


RESIDENTS = st.lists(
    st.tuples(st.integers(0, 300), st.booleans(), st.integers(0, 50), st.integers(0, 9)), max_size=6
).map(lambda rows: [resident(slot, *row) for slot, row in enumerate(rows)])  # fmt: skip


@given(RESIDENTS, st.integers(0, 500), st.sampled_from(["", "s0", "s3", "new"]))
def test_who_is_admitted_fits_and_nobody_who_talks_gives_way(residents: list[Resident], need: int, session: str) -> None:
    room = Room(6, 500)
    outcome = admit(need, session, residents, room)
    idle = [each for each in residents if not each.live and each.session != session]
    left = [each for each in residents if each.session != session and each.live]
    if isinstance(outcome, Waits):
        assert sum(each.size_bytes for each in left) + need > room.size_bytes or len(left) >= room.slots
        return
    assert set(outcome.parked) <= set(idle)
    kept = [each for each in residents if each not in outcome.parked and each.session != session]
    assert sum(each.size_bytes for each in kept) + need <= room.size_bytes
    assert outcome.slot not in {each.slot for each in kept}
    assert outcome.resident == any(each.session == session for each in residents)
    for number in range(len(outcome.parked)):
        fewer = [each for each in residents if each not in outcome.parked[:number] and each.session != session]
        assert sum(each.size_bytes for each in fewer) + need > room.size_bytes or len(fewer) >= room.slots, "no more than needed"


def test_what_can_never_fit_is_refused_with_its_bytes() -> None:
    with pytest.raises(RefusedError, match=f"{CONTEXT_LENGTH}: got 501 bytes of KV; allowed: 500 bytes"):
        admit(501, "", [], Room(1, 500))


def test_the_best_bytes_freed_a_microsecond_give_way_first() -> None:
    dear, cheap, old, low = resident(0, 100, restore_us=100), resident(1, 200), resident(2, used_us=1), resident(3, used_us=1)
    recent = resident(4, used_us=2)
    assert giving_way([recent, dear, low, cheap, old]) == [cheap, old, low, recent, dear]
    outcome = admit(100, "", [resident(0, live=True), dear, cheap], Room(3, 500))
    assert isinstance(outcome, Admitted)
    assert outcome.parked == (cheap,)


@given(st.integers(0, 5000), st.integers(1, 40))
def test_hot_bytes_bound_what_a_ring_touches(tokens: int, window_blocks: int) -> None:
    size_bytes = hot_bytes(SMOLLM2, window_blocks, tokens)
    assert size_bytes >= min(tokens, window_tokens(window_blocks)) * SMOLLM2.row_bytes
    assert size_bytes <= hot_bytes(SMOLLM2, window_blocks, tokens + 1)
    assert size_bytes <= 2 * ring_bytes(SMOLLM2, window_blocks) + 4 * 4096 * SMOLLM2.strips


def test_after_a_death_nothing_lies_in_the_rings_and_who_talks_keeps_the_slot() -> None:
    hot = HotSlots(SMOLLM2, 8, Room(2, 2**30), lambda tokens: tokens)
    for slot, name in enumerate("ab"):
        admitted = hot.admit(100, name)
        assert isinstance(admitted, Admitted)
        hot.take(admitted, name, 100, 0)
        hot.holds(slot, 50)
    hot.rests(0, 1)
    hot.lost()
    assert [each.session for each in hot.residents()] == ["b"]
    assert (hot.tokens_of("a"), hot.tokens_of("b")) == (0, 0)
