"""The local queue: bounded, in order, as many at a time as a lane has room for, nothing begun too late, no sum that drifts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from edge_agent.core.chat import CHAT, Finish, TurnEnd
from edge_agent.core.config import QueueSection
from edge_agent.core.kv import KvHome, KvState, Place, session_hash
from edge_agent.core.values import InferenceRequest, Status, Tensor, failure
from edge_agent.node.deadlines import SPARE_ENTRIES, Deadlines
from edge_agent.node.execution import Execution
from edge_agent.node.lanes import Job
from edge_agent.node.streams import end_tensor
from edge_agent.placement.cost import shared
from tests.virtual_board import TASK, echo, offer

QUEUE = QueueSection(max_requests=5, max_bytes=2**20)


def job(number: int, *, model: str = "m", deadline_us: int = 10**6, size_bytes: int = 8, ingress: str = "a") -> Job:
    request = InferenceRequest(f"{number:032x}", TASK, {"x": Tensor("uint8", (size_bytes,), bytes(size_bytes))})
    return Job(f"{ingress}/{request.request_id}", request, model, deadline_us, ingress)


def hosting(*models: str, busy_us: int = 1_000, **settings: object) -> Execution:
    execution = Execution(replace(QUEUE, **settings))  # type: ignore[arg-type]
    for model in models:
        execution.host(offer(model, busy_us))
    return execution


def test_jobs_that_are_equally_urgent_run_one_at_a_time_in_the_order_in_which_they_came() -> None:
    execution = hosting("m")
    jobs = [job(i) for i in (3, 1, 2)]
    for each in jobs:
        execution.enqueue(each)
    for each in jobs:
        begun = execution.start_next(0)
        assert begun is not None and begun.key == each.key
        assert execution.start_next(0) is None
        run = execution.finish(each.key, echo(each.request, "a", "m", 1), 10)
        assert run is not None and run.job is each and run.began_us == 0
    assert execution.idle


def test_a_job_gets_what_is_left_of_its_deadline_and_is_never_begun_after_it() -> None:
    execution = hosting("m")
    execution.enqueue(job(1, deadline_us=100))
    execution.enqueue(job(2, deadline_us=100))
    begun = execution.start_next(40)
    assert begun is not None and begun.budget_us == 60
    execution.finish(begun.key, echo(job(1).request, "a", "m", 1), 100)
    assert execution.start_next(100) is None
    assert [each.key for each in execution.take_expired(100)] == [job(2).key]
    assert execution.idle


@pytest.mark.parametrize(
    ("waiting", "size_bytes", "reason"), [(5, 8, "the queue is full: 5 requests wait"), (1, 2**20, "8 of 1048576 bytes wait")]
)
def test_a_full_queue_says_how_full_and_takes_nothing(waiting: int, size_bytes: int, reason: str) -> None:
    execution = hosting("m")
    for i in range(waiting):
        execution.enqueue(job(i))
    assert reason in execution.full(size_bytes)
    with pytest.raises(RuntimeError, match="may not be queued"):
        execution.enqueue(job(99, size_bytes=size_bytes))
    assert len(execution) == waiting


def test_the_same_job_twice_is_the_callers_bug() -> None:
    execution = hosting("m")
    execution.enqueue(job(1))
    with pytest.raises(RuntimeError, match="it is there already"):
        execution.enqueue(job(1))


def test_an_answer_to_what_does_not_run_is_nobodys() -> None:
    execution = hosting("m")
    execution.enqueue(job(1))
    assert execution.finish(job(1).key, echo(job(1).request, "a", "m", 1), 0) is None


def test_the_queue_counts_what_waits_and_what_is_left_of_what_runs() -> None:
    execution = hosting("m", busy_us=1_000)
    for i in range(3):
        execution.enqueue(job(i))
    execution.start_next(0)
    assert execution.queue_us(0) == 3_000
    assert execution.queue_us(400) == 2_600
    assert execution.queue_us(5_000) == 2_000


def test_only_a_good_inference_teaches_and_what_it_teaches_is_how_long_the_board_was_taken() -> None:
    execution = hosting("m", busy_us=1_000)
    for i, good in enumerate((False, True)):
        execution.enqueue(job(i))
        execution.start_next(0)
        result = echo(job(i).request, "a", "m", 1) if good else failure(job(i).request.request_id, Status.FAILED, "a", "no")
        execution.finish(job(i).key, result, 9_000)
        assert execution.offers["m"].busy_us == (1_500 if good else 1_000)


def test_the_busy_share_is_of_the_time_since_it_was_last_asked_for_whatever_runs_beside_what() -> None:
    execution = talking(2)
    assert execution.take_busy_permille(1_000) == 0
    for each in (talk_job(1), talk_job(2), job(3)):
        execution.enqueue(each)
    begun(execution, 2_000)
    assert execution.take_busy_permille(3_000) == 500
    execution.finish(talk_job(1).key, echo(talk_job(1).request, "a", "parrot", 1), 3_500)
    execution.finish(talk_job(2).key, echo(talk_job(2).request, "a", "parrot", 1), 4_000)
    execution.finish(job(3).key, echo(job(3).request, "a", "m", 1), 4_000)
    assert execution.take_busy_permille(7_000) == 250 and execution.take_busy_permille(7_000) == 0


def test_a_model_that_was_withdrawn_is_not_offered_and_comes_back_when_it_is_hosted_again() -> None:
    execution = hosting("m")
    execution.withdraw("m", "quarantined")
    assert not execution.offers and execution.withdrawn == {"m": "quarantined"}
    execution.enqueue(job(1))
    assert execution.queue_us(0) == 0
    execution.host(offer("m", 1_000))
    assert execution.queue_us(0) == 1_000 and not execution.withdrawn


class QueueMachine(RuleBasedStateMachine):
    """The queue against a plain list, whatever is done to it."""

    waiting = Bundle("waiting")
    order = "edf"

    def __init__(self) -> None:
        super().__init__()
        self.execution = hosting("m", "n", order=self.order)
        self.model: list[Job] = []
        self.running: Job | None = None
        self.now_us = 0
        self.number = 0

    @rule(target=waiting, model=st.sampled_from("mnx"), left_us=st.integers(1, 5_000), size_bytes=st.sampled_from((1, 400_000)))
    def enqueue(self, model: str, left_us: int, size_bytes: int) -> Job:
        self.number += 1
        new = job(self.number, model=model, deadline_us=self.now_us + left_us, size_bytes=size_bytes)
        if not self.execution.full(size_bytes):
            self.execution.enqueue(new)
            self.model.append(new)
        return new

    @rule(each=consumes(waiting))
    def forget(self, each: Job) -> None:
        assert (self.execution.forget(each.key) is not None) == (each in self.model)
        self.model = [other for other in self.model if other.key != each.key]

    @rule(interval_us=st.integers(0, 3_000))
    def time_passes(self, interval_us: int) -> None:
        self.now_us += interval_us
        expired = {each.key for each in self.execution.take_expired(self.now_us)}
        assert expired == {each.key for each in self.model if each.deadline_us <= self.now_us}
        self.model = [each for each in self.model if each.key not in expired]

    @rule()
    def start(self) -> None:
        begun = self.execution.start_next(self.now_us)
        for given_up, reason in self.execution.take_given_up():
            assert "it cannot be done in time" in reason
            self.model.remove(given_up)
        assert (begun is None) == (self.running is not None or not self.model)
        if begun is not None:
            self.running = min(self.model, key=lambda each: each.deadline_us) if self.order == "edf" else self.model[0]
            self.model.remove(self.running)
            assert begun.key == self.running.key and begun.budget_us > 0

    @rule()
    def finish(self) -> None:
        if self.running is not None:
            run = self.execution.finish(self.running.key, echo(self.running.request, "a", "m", 1), self.now_us)
            assert run is not None and run.job == self.running
            self.running = None

    @invariant()
    def sums_are_what_a_scan_would_find(self) -> None:
        offers = self.execution.offers
        work_us = sum(self.execution.costs.cost(each.model, each.shape).busy_us for each in self.model if each.model in offers)
        self_us = self.execution.queue_us(self.now_us)
        assert work_us <= self_us <= work_us + (0 if self.running is None else 10_000)
        assert len(self.execution) == len(self.execution._deadlines) == len(self.model) <= QUEUE.max_requests
        waits_us = self.execution.waits_us(self.now_us)
        assert list(waits_us) == sorted(waits_us) and max(waits_us, default=0) <= self_us
        assert self.execution.waiting_bytes == sum(each.size_bytes for each in self.model) <= QUEUE.max_bytes


class OldestFirstMachine(QueueMachine):
    order = "fifo"


TestQueueMachine = QueueMachine.TestCase
TestOldestFirstMachine = OldestFirstMachine.TestCase


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 50) | st.none())), st.lists(st.integers(0, 60)))
def test_deadlines_come_due_once_each_in_order_whatever_was_set_before(
    changes: list[tuple[str, int | None]], times: list[int]
) -> None:
    deadlines, model = Deadlines(), dict[str, int]()
    for key, time_us in changes:
        if time_us is None:
            deadlines.discard(key)
            model.pop(key, None)
        else:
            deadlines.set(key, time_us)
            model[key] = time_us
    for now_us in sorted(times):
        due = deadlines.take_due(now_us)
        assert due == [key for time_us, key in sorted((t, k) for k, t in model.items()) if time_us <= now_us]
        for key in due:
            del model[key]
    assert len(deadlines) == len(model)


def test_deadlines_that_are_moved_for_ever_take_no_more_room() -> None:
    deadlines = Deadlines()
    for time_us in range(10_000):
        deadlines.set("a", time_us)
    assert len(deadlines._heap) <= 2 + SPARE_ENTRIES
    assert deadlines.take_due(10_000) == ["a"]


def test_a_job_is_what_its_request_weighs() -> None:
    assert job(1, size_bytes=77).size_bytes == 77 == replace(job(2, size_bytes=77)).size_bytes


def test_a_picture_of_one_size_teaches_most_about_pictures_of_that_size() -> None:
    execution = hosting("m", busy_us=1_000)
    for i in range(20):
        execution.enqueue(job(i, size_bytes=4_000))
        execution.start_next(i * 10_000)
        execution.finish(job(i).key, echo(job(i).request, "a", "m", 1), i * 10_000 + 3_000)
    told = execution.offers["m"]
    assert [(each.shape, each.measured) for each in told.shapes] == [(12, 20)] and told.measured == 20
    assert 2_970 <= told.cost_of(12).busy_us <= 3_000 and 2_900 <= told.busy_us <= 3_000
    execution.enqueue(job(50, size_bytes=4_000))
    execution.start_next(0)
    execution.enqueue(job(51, size_bytes=4_000))
    assert 2 * 2_970 <= execution.queue_us(0) <= 2 * 3_000


def test_of_a_turn_the_time_after_its_first_token_is_learned_since_the_placement_adds_what_comes_before() -> None:
    end = TurnEnd("x", Finish.LENGTH, 300, 0, 20, first_token_us=700_000, prefill_us=600_000, decode_us=200_000)
    execution = talking(1)
    for i in range(20):
        execution.enqueue(talk_job(i))
        execution.start_next(0)
        done = replace(echo(talk_job(i).request, "a", "parrot", 1), outputs=end_tensor(end))
        execution.finish(talk_job(i).key, done, 1_000_000)
    shape = talk_job(1).shape
    assert 198_000 <= execution.offers["parrot"].cost_of(shape).busy_us <= 200_000


# lanes


def talk_job(number: int, *, model: str = "parrot", ingress: str = "a") -> Job:
    return replace(job(number, model=model, ingress=ingress), request=replace(job(number).request, task=CHAT))


def talking(parallel: int) -> Execution:
    execution = hosting("m")
    execution.host(replace(offer("parrot", 1_000, task=CHAT), parallel=parallel))
    return execution


def begun(execution: Execution, now_us: int = 0) -> list[str]:
    keys = []
    while start := execution.start_next(now_us):
        keys.append(start.key)
    return keys


def test_a_language_model_runs_as_many_turns_as_it_says_beside_one_picture() -> None:
    execution = talking(3)
    turns, pictures = [talk_job(i) for i in range(5)], [job(i) for i in range(10, 13)]
    started = []
    for each in (*pictures, *turns):
        execution.enqueue(each)
        started += begun(execution)
    assert started == [each.key for each in (pictures[0], *turns[:3])]
    execution.finish(turns[1].key, echo(turns[1].request, "a", "parrot", 1), 10)
    assert begun(execution) == [turns[3].key] and execution.running == 4
    execution.finish(pictures[0].key, echo(pictures[0].request, "a", "m", 1), 10)
    assert begun(execution) == [pictures[1].key]


def test_a_turn_waits_for_nothing_while_there_is_a_place_and_then_for_its_share_of_the_work() -> None:
    execution = talking(4)
    waits = []
    for i in range(6):
        waits.append(execution.queue_us(0, "parrot"))
        execution.enqueue(talk_job(i))
        begun(execution)
    step_us = 1_000 * (5 + 3) // (5 * 4)
    assert waits == [0, 0, 0, 0, step_us, 2 * step_us] and execution.queue_us(0) == 0
    done_us = 400 * 5 // (5 + 3)
    assert execution.queue_us(400, "parrot") == shared(1_000 - done_us + 2 * 1_000, 4)


def test_a_turn_waits_for_what_the_others_have_to_read_too() -> None:
    execution = talking(1)
    home = KvHome(session_hash("s"), 900, Place.HOT)
    execution.kv["parrot"] = KvState("parrot", b"f" * 32, 1, 1, 2**30, 4096, prefill_tok_s=1_000, homes=(home,))
    long, known = talk_job(1), talk_job(2)
    inputs = {"x": Tensor("uint8", (4_000,), bytes(4_000))}
    long = replace(long, request=replace(long.request, inputs=inputs))
    known = replace(known, request=replace(known.request, inputs=inputs, session="s"))
    execution.enqueue(long)
    assert execution.queue_us(0, "parrot") == 1_000 + 1_000_000, "1000 tokens at 1000 a second"
    execution.start_next(0)
    execution.enqueue(known)
    assert execution.queue_us(400_000, "parrot") == 1_000 + 600_000 + 1_000 + 100_000, "900 of them lie in hot memory"


def test_an_urgent_job_waits_for_what_is_more_urgent_only() -> None:
    execution = hosting("m", busy_us=10_000)
    for number, deadline_us in enumerate((10**6, 10**5, 3 * 10**6, 10**8)):
        execution.enqueue(job(number, deadline_us=deadline_us))
    assert execution.waits_us(0) == (10_000, 10_000, 20_000, 20_000, *[30_000] * 5) and execution.queue_us(0) == 40_000
    oldest_first = hosting("m", busy_us=10_000, order="fifo")
    for number, deadline_us in enumerate((10**6, 10**5)):
        oldest_first.enqueue(job(number, deadline_us=deadline_us))
    assert oldest_first.waits_us(0) == () and oldest_first.queue_us(0, due_us=1) == oldest_first.queue_us(0) == 20_000


# what is given up


def sure(execution: Execution, busy_us: int, size_bytes: int = 8) -> None:
    """Pictures of this size have been measured well."""
    for _ in range(40):
        execution.costs.learn("m", size_bytes.bit_length(), busy_us, 1)


def given_up(execution: Execution) -> dict[str, str]:
    return {each.key: reason for each, reason in execution.take_given_up()}


def test_what_cannot_be_done_in_time_is_given_up_at_once_and_says_by_what_figures() -> None:
    execution = hosting("m", busy_us=100_000)
    sure(execution, 100_000)
    least_us = execution.costs.cost("m", 4).busy_us - execution.costs.spread_us("m", 4)
    assert 99_900 < least_us <= 100_000
    for each in (job(1, deadline_us=500_000), job(2, deadline_us=180_000)):
        execution.enqueue(each)
        execution.start_next(0)
    execution.enqueue(job(3, deadline_us=290_000))
    assert execution.start_next(10_000) is None
    assert given_up(execution) == {
        job(2).key: (
            f"it cannot be done in time: after {least_us} µs of other work it takes {least_us} µs at least and "
            "180000 µs are left of its deadline; a longer deadline, a quicker model or a board with less to do may serve it"
        )
    }
    assert not given_up(execution) and len(execution) == 1
    execution.finish(job(1).key, echo(job(1).request, "a", "m", 1), 200_000)
    assert execution.start_next(200_000) is None and "90000 µs are left" in given_up(execution)[job(3).key]
    assert execution.idle


def test_work_that_waits_before_a_job_counts_and_work_beside_it_does_not() -> None:
    execution = hosting("m", busy_us=100_000)
    sure(execution, 100_000)
    for number, deadline_us in ((1, 10**6), (2, 220_000), (3, 290_000)):
        execution.enqueue(job(number, deadline_us=deadline_us))
        execution.start_next(0)
    assert list(given_up(execution)) == [job(3).key], "1 runs, 2 is before it"
    turns = talking(2)
    turns.costs.host(replace(turns.offers["parrot"], parallel=2))
    for _ in range(40):
        turns.costs.learn("parrot", talk_job(1).shape, 100_000, 1)
    for number in (1, 2, 3):
        turns.enqueue(replace(talk_job(number), deadline_us=10**6 if number < 3 else 250_000))
        begun(turns)
    assert turns.running == 2 and not given_up(turns), "its place comes free in 100 ms"


def test_nothing_is_given_up_on_a_guess_nor_where_it_is_switched_off() -> None:
    guessing = hosting("m", busy_us=100_000)
    switched_off = hosting("m", busy_us=100_000, shed_late=False)
    sure(switched_off, 100_000)
    for execution in (guessing, switched_off):
        execution.enqueue(job(1, deadline_us=50_000))
        assert execution.start_next(0) is not None and not execution.take_given_up()


def test_one_hopeless_job_in_sixteen_runs_so_that_an_estimate_that_became_wrong_is_corrected() -> None:
    execution = hosting("m", busy_us=100_000)
    sure(execution, 100_000)
    ran = 0
    for number in range(200):
        execution.enqueue(job(number, deadline_us=number * 10**6 + 50_000))
        if start := execution.start_next(number * 10**6):
            ran += 1
            execution.finish(start.key, echo(job(number).request, "a", "m", 1), number * 10**6 + 5_000)
        assert len(execution.take_given_up()) == (start is None)
    assert not execution._tried, "nothing is kept of what ran"
    assert ran > 200 - 3 * 16, "three wild measurements in a row, and it is believed that the board is quick again"


def test_a_board_that_fills_the_queue_gives_way_to_another_but_keeps_more_than_that_one_has() -> None:
    execution = hosting("m", busy_us=1_000)
    greedy = [job(number, ingress="b", deadline_us=10**6 + number) for number in range(5)]
    for each in greedy:
        execution.enqueue(each)
    assert "5 requests wait" in execution.full(8) and "5 requests wait" in execution.full(8, "b")
    for number, loser in ((10, greedy[4]), (11, greedy[3])):
        assert not execution.full(8, "c")
        execution.enqueue(job(number, ingress="c"))
        reason = given_up(execution)[loser.key]
        assert reason.startswith("it gave way in a full queue of 5 requests and 40 bytes, in which b has ")
    assert execution.full(8, "c"), "3 of b, 2 of c: that is fair"
    assert not execution.full(8, "d") and len(execution) == 5


def test_a_request_that_is_asked_for_again_while_its_first_run_is_not_over_waits_for_its_end() -> None:
    execution = talking(4)
    for _ in range(2):
        execution.enqueue(talk_job(1))
        begun(execution)
    assert execution.running == 1 and len(execution) == 1
    execution.finish(talk_job(1).key, echo(talk_job(1).request, "a", "parrot", 1), 10)
    assert begun(execution) == [talk_job(1).key]


def test_the_bounds_of_the_queue_hold_over_all_lanes() -> None:
    execution = talking(1)
    for i in range(3):
        execution.enqueue(talk_job(i))
        execution.enqueue(job(10 + i))
        begun(execution)
    execution.enqueue(talk_job(7))
    assert len(execution) == QUEUE.max_requests and "5 requests wait" in execution.full(8)
