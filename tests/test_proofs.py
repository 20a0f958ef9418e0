"""Receipts between real nodes: every answer has one, it fits, it is in the ledger with its answer, and none is taken without."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from edge_agent.attest.evidence import ModelMeasurement
from edge_agent.attest.receipts import Receipt, open_receipt, receipt_digest, sign_receipt, unverified_receipt, why_not
from edge_agent.core.cose import Signer
from edge_agent.core.digests import output_digest, request_digest, tensors_digest
from edge_agent.core.values import DataClass, InferenceRequest, InferenceResult, ModelOffer, Status, Tensor, TrustTier
from edge_agent.node.events import Hosted, Tick
from edge_agent.node.streams import end_of
from tests.attesting import EPOCH_US, RTT_US, AttestingFleet, run
from tests.virtual_board import echo, offer, seed_of
from tests.virtual_fleet import VirtualFleet

SLOW, FAST = offer("small", 40_000), offer("small", 4_000)
HOUSE = (("a", SLOW), ("b", FAST), ("c", SLOW))
TALKERS = (("a", offer("parrot", 60_000, task="chat")), ("b", offer("parrot", 40_000, task="chat")))


async def trusted(fleet: AttestingFleet) -> None:
    fleet.run_until(fleet.all_trusted, EPOCH_US + RTT_US, "trust")


def answer_to(fleet: AttestingFleet, request: InferenceRequest, board: str) -> InferenceResult:
    asked = fleet.ask(request, board)
    fleet.settle(60_000_000)
    assert asked.answers[0].status is Status.OK, asked.answers[0].reason
    return asked.answers[0]


def receipt_of(fleet: AttestingFleet, result: InferenceResult) -> Receipt:
    return open_receipt(result.receipt, fleet.key_of)


@pytest.mark.parametrize("ingress", ["a", "b"])
def test_an_answer_comes_with_the_receipt_of_the_board_that_ran_it(ingress: str) -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        request = replace(fleet.request(), parents=(bytes(32), b"\1" * 32))
        result = answer_to(fleet, request, ingress)
        receipt = receipt_of(fleet, result)
        assert receipt.board == result.board == "b"
        assert why_not(receipt, request, result) == ""
        assert (receipt.request, receipt.inputs) == (request_digest(request), tensors_digest(request.inputs))
        assert receipt.outputs == output_digest(request.task, result.outputs)
        assert (receipt.counter, receipt.bootcount, receipt.parents) == (1, 1, request.parents)
        assert receipt.quote == fleet.board("b").attestation.attester.number
        later = receipt_of(fleet, answer_to(fleet, fleet.request(), ingress))
        assert (later.counter, later.previous) == (2, receipt_digest(result.receipt))

    run(story, *HOUSE)


def test_a_turn_of_talk_comes_with_a_receipt_here_and_over_the_broker() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        request = fleet.turn(12)
        result = answer_to(fleet, request, "a")
        receipt = receipt_of(fleet, result)
        assert receipt.board == result.board and why_not(receipt, request, result) == ""
        assert end_of(result).completion_tokens == 12
        await fleet.add_client("camera")
        fleet.run_for(RTT_US)
        asked = fleet.ask_by_broker("camera", fleet.request(), "a")
        fleet.run_until(lambda: asked.settled, RTT_US, "the client behind the broker has its answer")
        assert why_not(receipt_of(fleet, asked.answers[0]), asked.request, asked.answers[0]) == ""

    run(story, *TALKERS[:1], ("b", FAST))


def test_a_receipt_says_when_it_began_by_the_boards_own_clock() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        assert receipt_of(fleet, answer_to(fleet, fleet.request(), "a")).started_us == 0, "nobody has told it the time of day"
        day_us = 1_800_000_000_000_000
        fleet.board("b").hears = lambda event: Tick(day_us + fleet.now_us) if isinstance(event, Tick) else event
        fleet.run_for(2_000_000)
        before_us = fleet.now_us
        receipt = receipt_of(fleet, answer_to(fleet, fleet.request(), "a"))
        assert day_us + before_us <= receipt.started_us <= day_us + before_us + 1_000_000
        fleet.run_for(2 * EPOCH_US)
        assert fleet.last_quote("b")[0].issued_s >= day_us // 1_000_000

    run(story, *HOUSE)


def test_a_chain_goes_on_over_a_restart_and_quotes_count_it() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        first = answer_to(fleet, fleet.request(), "a")
        fleet.board("b").kill()
        fleet.board("b").boot()
        await trusted(fleet)
        fleet.run_for(2_000_000)
        receipt = receipt_of(fleet, answer_to(fleet, fleet.request(), "a"))
        assert (receipt.counter, receipt.previous, receipt.bootcount) == (2, receipt_digest(first.receipt), 2)
        fleet.run_for(2 * EPOCH_US)
        quote = fleet.last_quote("b")[0]
        assert (quote.receipts, quote.bootcount) == (2, 2)
        assert fleet.all_trusted()

    run(story, *HOUSE)


def test_a_dispatch_that_comes_twice_has_the_same_answer_with_the_same_receipt() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        request = fleet.request(60_000_000)
        first = answer_to(fleet, request, "a")
        fleet.board("a").kill()
        fleet.board("a").boot()
        await trusted(fleet)
        again = answer_to(fleet, request, "a")
        assert again.receipt == first.receipt and again.board == "b"
        assert fleet.board("b").attestation.receipts == 1

    run(story, *HOUSE)


def test_what_failed_or_was_refused_has_no_receipt() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        asked = fleet.ask(fleet.request(byte=255), "a")
        fleet.settle(RTT_US)
        assert asked.answers[0].status is Status.REFUSED and not asked.answers[0].receipt
        assert not any(fleet.board(each).attestation.receipts for each in fleet.boards)

    run(story, *HOUSE)


def test_what_a_cloud_answered_has_no_receipt_as_nothing_of_the_fleet_ran() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        node = fleet.board("a").node
        request = fleet.turn(3)
        job = _dispatched_locally(fleet, request, replace(TALKERS[0][1], cloud=True))
        assert not job.receipt and not node.trust.attestation.receipts  # type: ignore[union-attr]

    run(story, *TALKERS[:1], ("b", FAST))


def _dispatched_locally(fleet: AttestingFleet, request: InferenceRequest, cloud: ModelOffer) -> InferenceResult:
    """Run a turn on a model that this board has in a cloud."""

    fleet.board("a").feed(Hosted(cloud))
    result = answer_to(fleet, replace(request, data=DataClass.PUBLIC), "a")
    assert result.model == "parrot"
    return result


def unsigned(result: InferenceResult) -> InferenceResult:
    return replace(result, receipt=b"")


def of_other_outputs(result: InferenceResult) -> InferenceResult:
    """The receipt is good, the answer beside it is another."""
    return replace(result, outputs={"echo": Tensor("uint8", (16,), bytes(16))})


def of_other_time(result: InferenceResult) -> InferenceResult:
    return replace(result, busy_us=result.busy_us + 1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(unsigned, "no receipt"), (of_other_outputs, "another outputs"), (of_other_time, "another busy time")],
)
def test_no_answer_of_another_board_is_taken_without_a_receipt_that_fits(
    spoil: Callable[[InferenceResult], InferenceResult], reason: str
) -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        board = fleet.board("b")
        node = board.node
        proven = node.trust.proven
        node.trust.proven = lambda request, result, began_us: spoil(proven(request, result, began_us))  # type: ignore[method-assign]
        result = answer_to(fleet, fleet.request(), "a")
        assert result.board != "b" and result.receipt
        assert fleet.board("a").said_something_like(reason), fleet.board("a").said
        assert fleet.tier("b", "a") is TrustTier.WARNING, "it is no proof of anything"

    run(story, *HOUSE)


def test_a_receipt_of_another_board_proves_nothing() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        own = answer_to(fleet, fleet.request(), "b")
        node = fleet.board("b").node
        node.trust.proven = lambda request, result, began_us: replace(result, receipt=other)  # type: ignore[method-assign]
        chain = fleet.board("c").attestation._proofs.chain
        with fleet.board("c").ledger.transaction():
            asked = fleet.request()
            other = chain.append(asked, echo(asked, "c", "small", 1), 1, 0)
        result = answer_to(fleet, fleet.request(), "a")
        assert own.board == "b" and result.board != "b"
        assert fleet.board("a").said_something_like("its receipt is one of c")

    run(story, *HOUSE)


def test_a_chain_that_is_counted_anew_contraindicates() -> None:
    """The board forgets a receipt that it gave, and gives its number to another one."""

    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        answer_to(fleet, fleet.request(), "a")
        node = fleet.board("b").node

        def forked(request: InferenceRequest, result: InferenceResult, began_us: int) -> InferenceResult:

            first = unverified_receipt(fleet.board("b").attestation._proofs.chain.recent(1)[0])
            again = replace(
                first, request_id=request.request_id, request=request_digest(request), inputs=tensors_digest(request.inputs),
                outputs=output_digest(request.task, result.outputs), busy_us=result.busy_us, energy_uj=result.energy_uj,
                energy_kind=result.energy_kind,
            )  # fmt: skip
            return replace(result, receipt=sign_receipt(again, Signer(b"b", seed_of("b"))))

        node.trust.proven = forked  # type: ignore[method-assign]
        result = answer_to(fleet, fleet.request(), "a")
        assert result.board != "b"
        fleet.run_for(RTT_US)
        assert fleet.tier("b", "a") is TrustTier.CONTRAINDICATED
        assert fleet.tier("b", "c") is TrustTier.NONE, "one that says so alone casts doubt"
        assert "two receipts with number 1" in fleet.board("a").node.trust.why("b")

    run(story, *HOUSE)


def test_an_answer_begun_by_a_board_that_is_contraindicated_is_not_gone_on_with() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        asked = fleet.ask(fleet.turn(200), "a")
        fleet.run_until(lambda: asked.parts, RTT_US, "the client has seen a beginning")
        pending = fleet.board("a").node.router.ingress.get(asked.request.request_id)
        assert pending is not None and pending.placed_on == "b"
        fleet.board("b").measure(replace(fleet.board("b").measurements, models=_swapped(fleet)))
        fleet.run_until(lambda: asked.settled, RTT_US, "it is told so")
        assert asked.answers[0].status is Status.SHED
        assert "b has made the beginning of the answer: its appraisal is contraindicated" in asked.answers[0].reason

    run(story, ("a", SLOW), ("b", offer("parrot", 40_000, task="chat")))


def _swapped(fleet: AttestingFleet) -> tuple[ModelMeasurement, ...]:
    return tuple(replace(each, mapped=bytes(32)) for each in fleet.board("b").measurements.models)


def test_where_boards_do_not_attest_answers_are_taken_as_they_come() -> None:

    async def story() -> None:
        with VirtualFleet(1) as fleet:
            fleet.add_board("a", SLOW)
            fleet.add_board("b", FAST)
            fleet.boot()
            fleet.run_for(RTT_US)
            asked = fleet.ask(fleet.request(), "a")
            fleet.settle(RTT_US)
            assert (asked.answers[0].status, asked.answers[0].board, asked.answers[0].receipt) == (Status.OK, "b", b"")

    asyncio.run(story())
