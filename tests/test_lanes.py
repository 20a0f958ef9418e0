"""What ran beside a job is reckoned out: the clocks of lanes are the inverse of how placement stretches and shares."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.values import InferenceRequest
from edge_agent.node.lanes import FINE, Job, Lane, Run, advance, lane_of
from edge_agent.placement.cost import shared, stretched

ROUNDING_US = 2


def running(lane: Lane, count: int) -> list[Run]:
    runs = []
    for _ in range(count):
        key = f"a/{len(lane.running):032x}"
        job = Job(key, InferenceRequest(key[2:], "detect_faces", {}), "m", 10**9, "a")
        runs.append(Run(job, 0, 0, lane.alone, lane.share))
        lane.running[key] = runs[-1]
    return runs


@given(st.integers(1_000, 10**7), st.integers(1, 16), st.integers(0, 3))
def test_a_job_is_done_when_its_stretched_time_is_over(alone_us: int, together: int, others: int) -> None:
    lane, beside = Lane(), [Lane() for _ in range(others)]
    first, *_ = running(lane, together)
    for other in beside:
        running(other, 1)
    advance([lane, *beside], stretched(alone_us, together - 1, others))
    assert abs(lane.done_us(first) - alone_us) <= ROUNDING_US


@given(st.integers(1_000, 10**7), st.integers(1, 16))
def test_what_a_job_had_of_the_board_is_its_share(alone_us: int, together: int) -> None:
    lane = Lane()
    first, *_ = running(lane, together)
    advance([lane], stretched(alone_us, together - 1))
    assert abs(lane.had_us(first) - shared(alone_us, together)) <= ROUNDING_US


def test_two_at_once_learn_the_same_as_one_after_the_other() -> None:
    alone, side_by_side = Lane(), Lane()
    (one,) = running(alone, 1)
    advance([alone], 1_000)
    both = running(side_by_side, 2)
    advance([side_by_side], 1_200)
    assert [side_by_side.done_us(run) for run in both] == [alone.done_us(one)] * 2 == [1_000, 1_000]


def test_an_idle_lane_does_not_move_and_takes_nothing_from_the_others() -> None:
    idle, busy = Lane(), Lane()
    (run,) = running(busy, 1)
    advance([idle, busy], 5_000)
    assert (idle.alone, idle.share) == (0, 0)
    assert (busy.done_us(run), busy.had_us(run)) == (5_000, 5_000) and busy.alone == 5_000 * FINE


def test_talk_has_a_lane_of_each_model_and_pictures_share_one() -> None:
    assert (lane_of("chat", "m"), lane_of("detect_faces", "m")) == ("m", "")
