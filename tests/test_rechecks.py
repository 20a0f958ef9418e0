"""Spot checks: what is drawn, how answers are compared, and how long a board that lies goes unseen."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from math import sqrt
from random import Random

import pytest

from edge_agent.attest.keeping import decode_kept
from edge_agent.attest.settings import AttestSettings
from edge_agent.attest.standing import MAX_STRIKES, STRIKE_WINDOW, Standing
from edge_agent.core.chat import ChatMessage, Turn
from edge_agent.core.config import QueueSection
from edge_agent.core.values import (
    BOARD_ID,
    CLIENT_ID,
    InferenceRequest,
    InferenceResult,
    Limits,
    ModelOffer,
    Status,
    Tensor,
    TrustTier,
    failure,
)
from edge_agent.node.comparison import MAX_COMPARED_BYTES, difference
from edge_agent.node.execution import Execution
from edge_agent.node.rechecks import BUDGET_US, MAX_OUTSTANDING, MAX_OUTSTANDING_BYTES, PREFIX, Rechecks, drawn
from edge_agent.node.streams import turn_request
from tests.attesting import EPOCH_US, RTT_US, AttestingFleet, echoed, run
from tests.virtual_board import TASK, echo, offer

SMALL = offer("small", 10_000)
CONTRAINDICATED, WARNING = TrustTier.CONTRAINDICATED, TrustTier.WARNING


def floats(*values: float, dtype: str = "float32") -> Tensor:
    return Tensor(dtype, (len(values),), struct.pack(f"<{len(values)}{'e' if dtype == 'float16' else 'f'}", *values))


def integers(*values: int) -> Tensor:
    return Tensor("int8", (len(values),), struct.pack(f"<{len(values)}b", *values))


def boxes(*scores: float) -> Mapping[str, Tensor]:
    """As a detector answers: floats after a threshold, and a label each."""
    return {
        "scores": floats(*scores),
        "boxes": Tensor("float32", (len(scores), 4), b"".join(struct.pack("<4f", 10, 20, 110, 220) for _ in scores)),
        "labels": Tensor("int32", (len(scores),), bytes(4 * len(scores))),
    }


# how answers are compared


@pytest.mark.parametrize("like", [True, False])
def test_equal_answers_are_equal_on_all_engines(like: bool) -> None:
    for answer in ({"x": integers(1, 2)}, boxes(0.9, 0.8), {}, {"x": floats(float("nan"))}):
        assert difference(answer, answer, like_engines=like) is None


def test_integers_of_like_engines_are_compared_bit_by_bit_and_of_unlike_ones_within_one_quantum() -> None:
    given, off_by_one, off_by_two = {"x": integers(1, 2)}, {"x": integers(1, 3)}, {"x": integers(1, 4)}
    found = difference(given, off_by_one, like_engines=True)
    assert found is not None and found.exact and found.what == "1 of 2 values of x are not those of a second run"
    assert difference(given, off_by_one, like_engines=False) is None
    found = difference(given, off_by_two, like_engines=False)
    assert found is not None and not found.exact


@pytest.mark.parametrize("like", [True, False])
def test_integers_of_another_shape_are_wrong_without_doubt_on_like_engines_alone(like: bool) -> None:
    found = difference({"x": integers(1)}, {"x": integers(1, 1)}, like_engines=like)
    assert found is not None and found.exact is like


def test_integers_beside_floats_may_be_one_off_on_like_engines_too() -> None:
    def counted(count: int) -> Mapping[str, Tensor]:
        return {**boxes(0.9), "count": integers(count)}

    assert difference(counted(1), counted(2), like_engines=True) is None
    found = difference(counted(1), counted(3), like_engines=True)
    assert found is not None and not found.exact


def test_floats_have_a_tolerance_and_beyond_it_speak_against_an_answer_without_proving_it_wrong() -> None:
    for other in (0.9, 0.9 + 1e-6, 0.91):
        assert difference({"x": floats(0.9)}, {"x": floats(other)}, like_engines=True) is None
    for other in (0.95, 0.85, float("nan"), float("inf"), -0.9):
        found = difference({"x": floats(0.9)}, {"x": floats(other)}, like_engines=True)
        assert found is not None and not found.exact, other
    halves = {"x": floats(0.5, dtype="float16")}, {"x": floats(0.75, dtype="float16")}
    assert difference(*halves, like_engines=True) is not None


def test_a_face_more_near_the_threshold_is_no_proof_and_neither_is_a_label_in_another_place() -> None:
    found = difference(boxes(0.9), boxes(0.9, 0.501), like_engines=True)
    assert found is not None and not found.exact
    relabelled = {**boxes(0.9), "labels": Tensor("int32", (1,), struct.pack("<i", 7))}
    found = difference(boxes(0.9), relabelled, like_engines=True)
    assert found is not None and not found.exact


@pytest.mark.parametrize("like", [True, False])
def test_other_outputs_than_the_model_has_are_wrong_without_doubt(like: bool) -> None:
    for given in ({"y": integers(1)}, {"x": floats(1.0)}, {}, {"x": integers(1), "y": integers(1)}):
        found = difference(given, {"x": integers(1)}, like_engines=like)
        assert found is not None and found.exact


def test_what_is_too_large_to_compare_is_not_compared() -> None:
    large = {"x": Tensor("uint8", (2 * MAX_COMPARED_BYTES,), bytes(2 * MAX_COMPARED_BYTES))}
    with pytest.raises(ValueError, match="not compared"):
        difference(large, large, like_engines=True)
    with pytest.raises(ValueError, match="not compared"):
        difference(large, {"x": integers(1)}, like_engines=True)


# what is drawn


def test_the_sample_is_a_function_of_a_secret_and_of_the_share_that_was_asked_for() -> None:
    ids = [sha256(bytes((number % 256, number // 256))).hexdigest()[:32] for number in range(20_000)]
    one = {each for each in ids if drawn(bytes(32), each, 16)}
    other = {each for each in ids if drawn(b"\1" * 32, each, 16)}
    assert abs(len(one) - 320) < 4 * sqrt(320) and abs(len(other) - 320) < 4 * sqrt(320)
    assert len(one & other) < 30, "who knows one board's sample knows nothing of another's"
    assert all(drawn(bytes(32), each, 1000) for each in ids) and not any(drawn(bytes(32), each, 0) for each in ids)
    assert one <= {each for each in ids if drawn(bytes(32), each, 50)}


def test_no_request_can_have_the_key_of_a_check() -> None:
    assert not any(pattern.match(PREFIX) for pattern in (BOARD_ID, CLIENT_ID))


# what is taken in for a check


def request(number: int, size_bytes: int = 16, *, recheck: bool = True) -> InferenceRequest:
    image = Tensor("uint8", (size_bytes,), bytes(size_bytes))
    return InferenceRequest(f"{number:032x}", TASK, {"image": image}, recheck=recheck)


def rechecks(permille: int = 1000, hosted: ModelOffer = SMALL, max_bytes: int = 2**26) -> tuple[Rechecks, Execution]:
    execution = Execution(QueueSection(max_bytes=max_bytes))
    execution.host(hosted)
    settings = AttestSettings(secret=bytes(32), bootseed=bytes(32), recheck_permille=permille)
    return Rechecks("a", settings, execution), execution


def answer(asked: InferenceRequest, board: str = "b") -> InferenceResult:
    return echo(asked, board, "small", 10_000)


def test_only_what_a_client_allows_another_board_answered_and_this_one_can_run_is_checked() -> None:
    checks, _ = rechecks()
    asked = request(1)
    checks.consider("a", asked, answer(asked, "a"))
    checks.consider("b", request(2, recheck=False), answer(request(2)))
    checks.consider("b", request(3), failure(request(3).request_id, Status.FAILED, "b", "no"))
    checks.consider("b", request(4), replace(answer(request(4)), model_digest=bytes(32)))
    turn = turn_request(f"{5:032x}", Turn((ChatMessage("user", "hello"),)), None, Limits())
    checks.consider("b", turn, answer(turn))
    assert not len(checks)
    checks.consider("b", asked, answer(asked))
    assert len(checks) == 1


def test_what_waits_for_a_check_is_bounded_in_number_and_bytes() -> None:
    checks, _ = rechecks()
    for number in range(3 * MAX_OUTSTANDING):
        checks.consider("b", request(number), answer(request(number)))
    assert len(checks) == MAX_OUTSTANDING
    checks, _ = rechecks()
    half = request(1, MAX_OUTSTANDING_BYTES // 2)
    checks.consider("b", half, answer(half))
    for number in (2, 3):
        asked = request(number, MAX_OUTSTANDING_BYTES // 2)
        checks.consider("b", asked, answer(asked))
    assert len(checks) == 1


def test_an_answer_that_is_too_large_to_compare_is_not_kept_and_one_that_waits_is_not_replaced() -> None:
    checks, _ = rechecks()
    asked = request(1)
    large = replace(answer(asked), outputs={"x": Tensor("uint8", (MAX_COMPARED_BYTES + 1,), bytes(MAX_COMPARED_BYTES + 1))})
    checks.consider("b", asked, large)
    assert not len(checks)
    checks.consider("b", asked, answer(asked))
    checks.consider("c", asked, answer(asked, "c"))
    assert len(checks) == 1 and checks.board_of(PREFIX + asked.request_id) == "b"


def test_a_check_runs_only_while_nothing_else_does_and_one_at_a_time() -> None:
    from edge_agent.node.lanes import Job

    checks, execution = rechecks()
    busy = Job("a/" + request(9).request_id, request(9), "small", 10**9, "a")
    execution.enqueue(busy)
    execution.start_next(0)
    for number in (1, 2):
        checks.consider("b", request(number), answer(request(number)))
    checks.begin(0)
    assert len(execution) == 0, "it does not even wait"
    execution.finish(busy.key, answer(request(9)), 10)
    checks.begin(10)
    checks.begin(10)
    begun = execution.start_next(10)
    assert begun is not None and begun.key == PREFIX + request(1).request_id
    assert len(execution) == 0
    execution.finish(begun.key, answer(request(1)), 20)
    checks.begin(20)
    assert len(execution) == 0, "what came of the first is not known yet"
    assert [each.difference for each in checks.finish(begun.key, answer(request(1)), like_engines=True)] == [None]
    checks.begin(20)
    assert len(execution) == 1 and len(checks) == 1


def test_a_cloud_checks_nobody() -> None:
    checks, _ = rechecks(hosted=replace(SMALL, cloud=True))
    checks.consider("b", request(1), answer(request(1)))
    assert not len(checks)


def test_a_check_that_cannot_run_any_more_is_forgotten() -> None:
    checks, execution = rechecks()
    checks.consider("b", request(1), answer(request(1)))
    execution.withdraw("small", "too hot")
    checks.begin(0)
    assert not len(checks) and execution.idle
    checks, execution = rechecks(max_bytes=2**20)
    asked = request(1, 2**20 + 1)
    checks.consider("b", asked, answer(asked))
    checks.begin(0)
    assert not len(checks) and execution.idle


def test_who_stops_lets_go_of_what_waits_and_judges_what_runs() -> None:
    checks, execution = rechecks()
    for number in (1, 2, 3):
        checks.consider("b", request(number), answer(request(number)))
    checks.begin(0)
    begun = execution.start_next(0)
    assert begun is not None and begun.request.limits.deadline_us == BUDGET_US
    checks.forget(PREFIX + request(3).request_id)
    assert len(checks) == 2
    execution.finish(begun.key, answer(request(1)), 10)
    checks.begin(10)
    assert len(execution) == 0, "the first still counts as begun"
    checks.stop()
    assert len(checks) == 1
    wrong = replace(answer(request(1)), outputs={"y": integers(1)})
    (found,) = checks.finish(begun.key, wrong, like_engines=True)
    assert found.board == "b" and found.difference is not None
    assert (checks.done, checks.differed, len(checks)) == (1, 1, 0)


def test_a_second_run_that_is_too_large_to_compare_says_nothing() -> None:
    checks, _ = rechecks()
    checks.consider("b", request(1), answer(request(1)))
    large = {"x": Tensor("uint8", (MAX_COMPARED_BYTES + 1,), bytes(MAX_COMPARED_BYTES + 1))}
    again = replace(answer(request(1)), outputs=large)
    assert list(checks.finish(PREFIX + request(1).request_id, again, like_engines=True)) == []
    assert (checks.done, len(checks)) == (0, 0)


def test_a_second_run_that_fails_or_used_other_bytes_says_nothing() -> None:
    checks, execution = rechecks()
    for number, again in (
        (1, failure(f"{1:032x}", Status.FAILED, "a", "died")),
        (2, replace(answer(request(2)), model_digest=bytes(32))),
    ):
        checks.consider("b", request(number), answer(request(number)))
        checks.begin(0)
        begun = execution.start_next(0)
        assert begun is not None
        execution.finish(begun.key, again, 10)
        assert list(checks.finish(begun.key, again, like_engines=True)) == []
    assert not len(checks) and execution.idle


# how long a liar goes unseen


def requests_until_caught(seed: int, checked_permille: int, lies_permille: int, *, exact: bool) -> int:
    """Of one board's answers, with the production sample and the production standing."""
    random, secret = Random(seed), sha256(f"secret {seed}".encode()).digest()
    standing = Standing(missed=3)
    for number in range(1, 10_000_000):
        lies = random.randrange(1000) < lies_permille
        if not drawn(secret, f"{number:032x}", checked_permille):
            continue
        if lies:
            standing.struck(exact, "wrong")
        else:
            standing.checked()
        if standing.verdict().tier is CONTRAINDICATED:
            return number
    raise AssertionError("never caught")


def until_strikes(strikes: int, window: int, lies: float) -> float:
    """The expected number of checks until ``strikes`` wrong ones lie within ``window``, for two strikes or one.

    One: 1/q. Two: a renewal argument over the gap to the last strike; with s = (1-q)^(window-1) the chance that none follows in
    the window, E = 1/q + (1 - s)/q / (1 - s) = 1/q (1 + 1/(1 - s)).
    """
    if strikes == 1:
        return 1 / lies
    missed = (1 - lies) ** (window - 1)
    return (1 + 1 / (1 - missed)) / lies


@pytest.mark.parametrize(("checked_permille", "lies_permille"), [(100, 1000), (100, 500), (250, 100), (16, 1000)])
def test_a_liar_is_caught_after_as_many_requests_as_the_document_says(checked_permille: int, lies_permille: int) -> None:
    p, q, seeds = checked_permille / 1000, lies_permille / 1000, 300
    for exact, strikes in ((True, 1), (False, MAX_STRIKES)):
        seen = [requests_until_caught(seed, checked_permille, lies_permille, exact=exact) for seed in range(seeds)]
        expected = until_strikes(strikes, STRIKE_WINDOW, q) / p
        mean = sum(seen) / seeds
        assert abs(mean - expected) < 4 * expected / sqrt(seeds), (exact, mean, expected)
        if exact:
            within = sum(each <= 3 * expected for each in seen) / seeds
            assert 0.90 < within < 0.99, "geometric: 95 % within three times the mean"


def test_an_honest_board_with_answers_near_the_threshold_is_rarely_struck_twice() -> None:
    """One near miss in a thousand checks: two within the window are due once in some 16,000 checks, a million requests."""
    assert until_strikes(MAX_STRIKES, STRIKE_WINDOW, 0.001) > 15_000


# between real boards


HOUSE = (("a", offer("small", 40_000)), ("b", offer("small", 4_000)), ("c", offer("small", 40_000)))


async def _until_caught(fleet: AttestingFleet) -> int:
    fleet.run_until(fleet.all_trusted, EPOCH_US + RTT_US, "trust")
    fleet.board("b").lies = echoed
    fleet.answered = lambda asked, result: asked.answers.append(result)  # type: ignore[method-assign]
    for number in range(1, 400):
        fleet.ask(fleet.request(), "a")
        fleet.run_for(200_000)
        if fleet.tier("b", "a") is CONTRAINDICATED:
            fleet.run_for(RTT_US)
            assert fleet.tier("b", "c") is TrustTier.NONE, "one board's finding casts doubt for all"
            assert "a wrong answer: request" in fleet.board("a").node.trust.why("b")
            asked = fleet.ask(fleet.request(), "a")
            fleet.run_for(RTT_US)
            assert asked.answers[0].board != "b"
            return number
    raise AssertionError("never caught")


def test_a_board_that_answers_wrong_with_valid_quotes_and_receipts_is_caught() -> None:
    counts = [run(_until_caught, *HOUSE, seed=seed, recheck_permille=200) for seed in range(12)]
    assert 1 <= sum(counts) / len(counts) <= 15, counts


def test_an_honest_board_is_checked_again_and_again_and_keeps_its_name() -> None:
    async def story(fleet: AttestingFleet) -> None:
        fleet.run_until(fleet.all_trusted, EPOCH_US + RTT_US, "trust")
        asked = []
        for _ in range(30):
            asked.append(fleet.ask(fleet.request(), "a"))
            fleet.run_for(200_000)
        checks = fleet.board("a").node.trust.rechecks
        assert checks is not None and checks.done >= 25 and not checks.differed and not len(checks)
        assert fleet.all_trusted()
        standing = fleet.board("a").attestation.verifier.standing("b")
        assert standing is not None and standing.checks == checks.done
        assert fleet.board("a").attestation.receipts < len(asked), "a second run is no answer and has no receipt"

    run(story, *HOUSE, recheck_permille=1000)


@pytest.mark.parametrize("like", [True, False])
def test_one_quantum_of_difference_condemns_a_board_with_the_same_libraries_alone(like: bool) -> None:
    def one_off(_: InferenceRequest, result: InferenceResult) -> InferenceResult:
        (name, given), *_ = result.outputs.items()
        return replace(result, outputs={name: replace(given, data=bytes(each ^ 1 for each in bytes(given.data)))})

    async def story(fleet: AttestingFleet) -> None:
        board = fleet.board("b")
        if not like:
            board.measure(replace(board.measurements, library=bytes(32)))
        fleet.run_until(fleet.all_trusted, EPOCH_US + RTT_US, "trust")
        board.lies = one_off
        fleet.answered = lambda asked, result: asked.answers.append(result)  # type: ignore[method-assign]
        for _ in range(6):
            fleet.ask(fleet.request(), "a")
            fleet.run_for(200_000)
        assert fleet.tier("b", "a") is (CONTRAINDICATED if like else WARNING)

    run(story, *HOUSE, recheck_permille=1000)


def test_a_check_that_never_began_is_let_go_of_and_a_drain_lets_go_of_all() -> None:
    async def story(fleet: AttestingFleet) -> None:
        trust = fleet.board("a").node.trust
        assert trust.rechecks is not None
        asked = [request(number) for number in (1, 2)]
        for each in asked:
            trust.taken("b", each, answer(each))
        assert len(trust.rechecks) == 2
        assert not list(trust.checked(PREFIX + asked[0].request_id, None)) and len(trust.rechecks) == 1
        trust.drain(fleet.now_us)
        assert not len(trust.rechecks)

    run(story, ("a", SMALL), ("b", SMALL), recheck_permille=1000)


def test_a_board_that_drains_keeps_how_far_the_others_had_come() -> None:
    async def story(fleet: AttestingFleet) -> None:
        fleet.run_until(fleet.all_trusted, EPOCH_US + RTT_US, "trust")
        fleet.run_for(3 * EPOCH_US)
        board = fleet.board("a")
        board.node.trust.drain(fleet.now_us)
        document = board.ledger.document("attest/b")
        assert document is not None
        standing = decode_kept(document, "b", 3).standing
        assert standing is not None and standing.history.place == fleet.last_quote("b")[0].number

    run(story, *HOUSE)


def test_a_board_that_drains_begins_no_check() -> None:
    async def story(fleet: AttestingFleet) -> None:
        fleet.run_until(fleet.all_trusted, EPOCH_US + RTT_US, "trust")
        board = fleet.board("a")
        fleet.ask(fleet.request(), "a")
        fleet.run_until(lambda: all(each.settled for each in fleet.asked), RTT_US, "answer")
        board.stop()
        fleet.run_until(lambda: not board.up, RTT_US, "it stops")

    run(story, *HOUSE, recheck_permille=1000)
