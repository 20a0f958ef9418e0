"""Guesses come from what was said before, stop where they fail, come back, and cost bounded memory."""

from __future__ import annotations

from itertools import cycle, islice

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.language.speculation import (
    CERTAIN,
    FIRST_PAUSE,
    HISTORY_TOKENS,
    MATCHES,
    MAX_GUESSES,
    PROBE_GUESSES,
    Drafter,
    Proposal,
)


def drafter(ids: list[int]) -> Drafter:
    made = Drafter()
    made.extend(ids)
    return made


def test_the_longest_match_proposes_what_followed_it_the_last_time() -> None:
    proposal = drafter([1, 2, 3, 4, 5, 60, 9, 4, 5, 70, 80, 1, 2, 3, 4, 5]).propose(2)
    assert (proposal.ids, proposal.match) == ((60, 9), 5)
    assert drafter([1, 2, 50, 1, 2, 60, 61, 1, 2]).propose(2).ids == (60, 61)


def test_nothing_that_came_before_gives_no_guess() -> None:
    assert drafter([]).propose(7) == Proposal() == drafter(list(range(100))).propose(7) == drafter([1, 2]).propose(7)


def test_a_repetition_is_read_on_past_the_end_of_what_was_said() -> None:
    assert drafter([7, 8, 7, 8, 7, 8]).propose(5).ids == (7, 8, 7, 8, 7)


@given(st.lists(st.integers(0, 3), max_size=80), st.integers(1, 10))
def test_every_guess_is_what_a_search_through_the_whole_history_finds(ids: list[int], limit: int) -> None:
    def naive() -> tuple[int, ...]:
        for length in MATCHES:
            tail = ids[-length:]
            for start in range(len(ids) - length - 1, -1, -1):
                if len(tail) == length and ids[start : start + length] == tail:
                    return tuple(islice(cycle(ids[start + length :]), min(limit, MAX_GUESSES)))
        return ()

    assert drafter(ids).propose(limit).ids == naive()


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=9))
def test_it_is_the_same_whether_ids_come_one_by_one_or_together(pieces: list[list[int]]) -> None:
    apart = Drafter()
    for piece in pieces:
        apart.extend(piece)
    assert apart.propose(7) == drafter([each for piece in pieces for each in piece]).propose(7)


def test_memory_is_bounded_and_what_was_forgotten_is_not_proposed() -> None:
    made = drafter([1, 2, 3, 4])
    made.extend(range(10, 10 + 3 * HISTORY_TOKENS))
    assert len(made._ids) == HISTORY_TOKENS
    assert len(made._after) <= len(made._entries) <= len(MATCHES) * HISTORY_TOKENS
    made.extend([1, 2, 3])
    assert made.propose(7) == Proposal()
    made.extend([10 + 3 * HISTORY_TOKENS - 100 + each for each in range(5)])
    assert made.propose(1).ids == (10 + 3 * HISTORY_TOKENS - 95,)


def test_what_was_said_again_is_remembered_when_its_first_time_is_forgotten() -> None:
    made = drafter([1, 2, 3, 8, *range(10, 4000), 1, 2, 3, 9, *range(10_000, 10_000 + HISTORY_TOKENS - 3000), 1, 2, 3])
    assert made.propose(1).ids == (9,)


def test_guesses_that_fail_lose_their_chance_and_those_that_hold_win_it() -> None:
    made = drafter([1, 2, 3, 1, 2, 3])
    first = made.propose(7).chance
    for _ in range(30):
        made.learn(made.propose(7), 3, 0)
    low = made.propose(7).chance
    for _ in range(30):
        made.learn(made.propose(7), 3, 3)
    assert low < first / 20 < first < made.propose(7).chance < CERTAIN


def test_after_a_pause_they_are_tried_again_and_pauses_grow_while_they_fail() -> None:
    made = drafter([1, 2, 3, 1, 2, 3])
    pauses = []
    for _ in range(4):
        waited = 0
        while (proposal := made.propose(7)).chance != CERTAIN:
            made.learn(proposal, 0, 0)
            waited += 1
        assert len(proposal.ids) == PROBE_GUESSES
        made.learn(proposal, PROBE_GUESSES, 0)
        pauses.append(waited)
    assert pauses == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE]
