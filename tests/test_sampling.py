"""Which token comes next: the filters keep what they say, a draw repeats, and nothing is ever drawn that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_agent.core.chat import Sampling
from edge_agent.language.sampling import LIKELY, NotFiniteError, drawn, greedy, uniform

LOGITS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32))


def test_greedy_takes_the_largest_logit_and_the_lower_id_among_equals() -> None:
    assert greedy(np.array([1, 3, 3, 2], np.float32)) == 1
    assert drawn(np.array([1, 3, 3, 2], np.float32), Sampling(), 5, 9) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_a_failure_and_never_a_token(bad: float) -> None:
    logits = np.zeros(10, np.float32)
    logits[7] = bad
    for sampling in (Sampling(), Sampling(1000), Sampling(500, 3, 900)):
        with pytest.raises(NotFiniteError):
            drawn(logits, sampling, 1, 1)


def test_logits_of_minus_infinity_are_never_drawn_and_nothing_else_is_a_failure() -> None:
    with pytest.raises(NotFiniteError):
        greedy(np.full(4, -np.inf, np.float32))
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    assert {drawn(logits, Sampling(2000), 3, position) for position in range(50)} == {1, 3}


@given(LOGITS, st.integers(1, 2000), st.integers(0, 50), st.integers(1, 1000), st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_a_drawn_token_is_one_that_the_filters_keep(
    logits: np.ndarray, milli: int, top_k: int, top_p: int, seed: int, position: int
) -> None:
    sampling = Sampling(milli, top_k, top_p)
    token = drawn(logits, sampling, seed, position)
    assert token == drawn(logits.copy(), sampling, seed, position), "the same draw"
    order = np.argsort(-logits, kind="stable")
    if top_k:
        assert token in order[:top_k]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / (milli / 1000))
    if top_k:
        weights[top_k:] = 0
    before = weights[: list(order).index(token)].sum()
    assert before <= top_p / 1000 * weights.sum() * (1 + 1e-9), "the nucleus was full before this token"


def test_the_nucleus_is_found_when_it_is_larger_than_what_is_looked_at_first() -> None:
    flat = np.zeros(4 * LIKELY, np.float32)
    seen = {drawn(flat, Sampling(1000, 0, 900), 11, position) for position in range(400)}
    assert max(seen) > LIKELY and max(seen) <= 0.9 * 4 * LIKELY


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    counts = np.bincount([drawn(logits, Sampling(1000), 42, position) for position in range(6000)], minlength=3)
    assert np.abs(counts / 6000 - [0.5, 0.3, 0.2]).max() < 0.03


def test_a_lower_temperature_is_bolder() -> None:
    logits = np.array([1.0, 0.0], np.float32)
    hits = [sum(drawn(logits, Sampling(milli), 1, position) == 0 for position in range(500)) for milli in (2000, 500, 1)]
    assert hits[0] < hits[1] < hits[2] == 500


def test_numbers_of_one_seed_are_evenly_spread_and_unlike_those_of_the_next() -> None:
    numbers = np.array([[uniform(seed, position) for position in range(4000)] for seed in (0, 1)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(np.histogram(numbers[0], 10, (0, 1))[0] - 400).max() < 100
    assert abs(np.corrcoef(numbers)[0, 1]) < 0.05
    assert abs(np.corrcoef(numbers[0, 1:], numbers[0, :-1])[0, 1]) < 0.05
