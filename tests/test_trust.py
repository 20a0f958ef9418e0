"""Continuous attestation between real nodes, on virtual time: who is trusted when, and what follows for requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_agent.attest.evidence import KeyKind, quote_digest
from edge_agent.attest.receipts import unverified_receipt
from edge_agent.attest.words import Action
from edge_agent.core.cose import Signer
from edge_agent.core.errors import UnavailableError
from edge_agent.core.kv import KvAsk, KvItem, session_hash
from edge_agent.core.values import InferenceRequest, Status, TrustTier, failure
from edge_agent.node.events import Effect, Endorsed, Event, Execute, Publish, Tick
from edge_agent.node.trust_report import trust_report
from edge_agent.transport.link import Delivered, Message
from edge_agent.transport.topics import Kind
from tests.attesting import EPOCH_US, RTT_US, AttestingFleet, digest, measured, run
from tests.virtual_board import echo, offer

WARNING, NONE, CONTRAINDICATED = TrustTier.WARNING, TrustTier.NONE, TrustTier.CONTRAINDICATED
SLOW, FAST = offer("small", 40_000), offer("small", 4_000)
HOUSE = (("a", SLOW), ("b", FAST), ("c", SLOW))
"""Board b is so much faster that everything goes there."""
MISSED = 3


def asking_for(request: InferenceRequest, trust: TrustTier) -> InferenceRequest:
    return replace(request, limits=replace(request.limits, trust=trust))


async def trusted(fleet: AttestingFleet, tier: TrustTier = WARNING) -> None:
    fleet.run_until(lambda: fleet.all_trusted(tier), EPOCH_US + RTT_US, "every board is trusted as far as its key allows")


def swapped(fleet: AttestingFleet, board: str) -> None:
    """The bytes of a model are others than it is offered by."""
    fleet.board(board).measure(measured(*fleet.board(board).offers, mapped="small"))


def answered(fleet: AttestingFleet, within_us: int = 10_000_000) -> None:
    """Boards that are down are waited for by nobody."""
    fleet.run_until(lambda: all(asked.settled for asked in fleet.asked), within_us, "every client has its answer")


def where_it_ran(fleet: AttestingFleet, ingress: str, count: int = 10, deadline_us: int = 5_000_000) -> set[str]:
    asked = [fleet.ask(fleet.request(deadline_us), ingress) for _ in range(count)]
    fleet.settle(10_000_000)
    return {each.answers[0].board for each in asked if each.answers[0].status is Status.OK}


def agreed(fleet: AttestingFleet, at: str) -> dict[str, TrustTier]:
    """What goes into the table of a board."""
    return {board: fleet.board(at).node.trust.agreed_tier(board) for board in fleet.boards}


# how boards come to be trusted


def test_boards_are_trusted_as_far_as_a_software_key_allows_within_an_epoch_of_their_first_word() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        assert fleet.now_us <= EPOCH_US + 2 * RTT_US
        assert fleet.board("a").node.trust.why("b") == "its key is a file"
        fleet.run_for(10 * EPOCH_US)
        assert fleet.all_trusted(), "and stay so"
        fleet.agree(5_000_000)

    run(story, *HOUSE)


def test_a_clock_that_stood_before_1970_when_a_request_began_keeps_no_answer_from_its_receipt() -> None:
    async def story(fleet: AttestingFleet) -> None:
        asked, trust = fleet.request(), fleet.board("a").node.trust
        trust.told_wall_us(1, fleet.now_us + 10)
        answer = trust.proven(asked, echo(asked, "a", "small", 10), fleet.now_us)
        assert answer.receipt and unverified_receipt(answer.receipt).started_us == 0

    run(story, ("a", SLOW))


def test_what_failed_has_no_receipt_and_keeps_its_reason() -> None:
    async def story(fleet: AttestingFleet) -> None:
        asked = fleet.request()
        failed = failure(asked.request_id, Status.FAILED, "a", "the engine died", "small")
        assert fleet.board("a").node.trust.proven(asked, failed, 0) == failed
        assert fleet.board("a").attestation.receipts == 0

    run(story, ("a", SLOW))


def test_two_boards_alone_trust_each_other_and_one_alone_itself() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        for _ in range(3):
            fleet.run_for(2 * EPOCH_US)
            assert fleet.all_trusted()
            assert all(board.node.trust.agreed_tier(board.name) is WARNING for board in fleet.boards.values())

    run(story, ("a", SLOW), ("b", FAST))
    run(story, ("a", SLOW))


def test_a_board_that_has_not_measured_itself_is_not_trusted_even_by_itself() -> None:
    async def story(fleet: AttestingFleet) -> None:
        board = fleet.board("a")
        board.hears = lambda event: None if type(event).__name__ == "Measured" else event
        board.kill()
        board.boot()
        fleet.run_for((MISSED + 2) * EPOCH_US)
        assert fleet.tier("a", "a") is NONE and fleet.tier("a", "b") is NONE
        assert fleet.tier("b", "a") is WARNING

    run(story, *HOUSE)


def test_what_is_not_recognized_warns_and_the_operators_ceiling_holds() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet, TrustTier.AFFIRMING)
        board = fleet.board("b")
        board.measure(replace(board.measurements, code=digest("another agent")))
        fleet.run_for(RTT_US)
        assert fleet.all_say(WARNING, of="b")
        assert "agent code" in fleet.board("a").node.trust.why("b")

    run(story, *HOUSE, software_tier=TrustTier.AFFIRMING)

    async def capped(fleet: AttestingFleet) -> None:
        fleet.ceiling["b"] = NONE
        for board in fleet.boards.values():
            board.kill()
            board.boot()
        fleet.run_for(EPOCH_US + RTT_US)
        assert fleet.all_say(NONE, of="b") and fleet.all_say(WARNING, of="a")

    run(capped, *HOUSE)


def test_without_a_word_of_it_a_request_that_asks_for_trust_is_shed_with_the_reason_and_served_after() -> None:
    async def story(fleet: AttestingFleet) -> None:
        board = fleet.board("a")
        board.hears = lambda event: None if type(event).__name__ == "Measured" else event
        fleet.board("b").kill()
        fleet.board("c").kill()
        board.kill()
        board.boot()
        asked = fleet.ask(asking_for(fleet.request(), WARNING), "a")
        answered(fleet)
        assert asked.answers[0].status is Status.SHED
        assert "its appraisal is none, the request asks for warning: no evidence has come yet" in asked.answers[0].reason
        board.hears = lambda event: event
        board.measure(board.measurements)
        fleet.boot()
        await trusted(fleet)
        asked = fleet.ask(asking_for(fleet.request(), WARNING), "a")
        fleet.settle(5_000_000)
        assert (asked.answers[0].status, asked.answers[0].board) == (Status.OK, "b")

    run(story, *HOUSE)


# what contraindicates, and what follows


def test_a_swapped_model_is_contraindicated_within_an_epoch_and_gets_nothing_more() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        assert where_it_ran(fleet, "a") == {"b"}
        at_us = fleet.now_us
        swapped(fleet, "b")
        fleet.run_until(lambda: fleet.all_say(CONTRAINDICATED, of="b"), EPOCH_US + RTT_US, "b is contraindicated everywhere")
        assert fleet.now_us - at_us <= EPOCH_US + RTT_US
        assert "b" not in where_it_ran(fleet, "a") | where_it_ran(fleet, "c")
        asked = fleet.ask(fleet.request(), "a")
        fleet.settle(5_000_000)
        decision = fleet.board("a").node.decisions[asked.request.request_id]
        reason = next(each.reason for each in decision.excluded if each.board == "b")
        assert reason.startswith("its appraisal is contraindicated: model small: the bytes in memory are")
        assert where_it_ran(fleet, "b").isdisjoint({"b"}), "its own clients are served elsewhere too"
        fleet.agree(5_000_000)
        assert not any(option.board == "b" for entry in fleet.board("a").node.agreement.table.entries for option in entry.options)

    run(story, *HOUSE)


def test_what_a_board_has_when_it_is_contraindicated_is_taken_back_and_its_late_answer_is_dropped() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        asked = [fleet.ask(fleet.request(60_000_000), "a") for _ in range(4)]
        fleet.run_for(1_100_000)
        assert fleet.board("a").node.router.ingress.placed_on("b")
        swapped(fleet, "b")
        fleet.run_until(lambda: fleet.tier("b", "a") is CONTRAINDICATED, RTT_US, "a knows")
        assert not fleet.board("a").node.router.ingress.placed_on("b")
        fleet.settle(60_000_000)
        fleet.run_for(20_000_000)
        answers = [each.answers[0] for each in asked]
        assert all(each.status is Status.OK and each.board != "b" for each in answers)
        assert fleet.board("a").said_something_like("dropped")

    run(story, ("a", offer("small", 5_000_000)), ("b", offer("small", 3_000_000)), ("c", offer("small", 5_000_000)))


def test_what_contraindicates_acts_in_the_very_event_that_brings_it_however_lately_all_boards_were_looked_at() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        for _ in range(4):
            fleet.ask(fleet.request(60_000_000), "a")
        fleet.run_for(1_100_000)
        board = fleet.board("a")
        assert board.node.router.ingress.placed_on("b")
        for name, changes in (("c", {}), ("b", {"measurements": measured(*fleet.board("b").offers, mapped="small")})):
            quote, message = fleet.last_quote(name)
            forged = fleet.forge(name, counter=quote.counter + 1, previous=quote_digest(message), **changes)
            board.feed(Delivered(Message(fleet.topics.quote(name), forged), 0))
        assert not board.node.router.ingress.placed_on("b")

    run(story, ("a", offer("small", 5_000_000)), ("b", offer("small", 3_000_000)), ("c", offer("small", 5_000_000)))


def test_what_a_board_holds_against_another_is_in_its_ledger_when_it_is_published() -> None:
    """Also when others had said so before."""

    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        board = fleet.board("a")
        for other in "cd":
            fleet.board(other).attestation.struck("b", True, "one")
        fleet.run_until(lambda: fleet.tier("b", "a") is CONTRAINDICATED, RTT_US, "a is told")
        board.feed(Tick())
        assert board.attestation.verifier.verdict("b").tier is WARNING
        board.attestation.struck("b", True, "two")
        kept: list[bytes | None] = []
        before_effect = board.before_effect

        def watched(effect: Effect) -> None:
            if isinstance(effect, Publish) and effect.message.topic == fleet.topics.appraisal("a", "b"):
                kept.append(board.ledger.document("attest/b"))
            before_effect(effect)

        board.before_effect = watched  # type: ignore[method-assign]
        board.feed(Tick())
        assert kept and all(document and b"a wrong answer: two" in document for document in kept)

    run(story, *HOUSE, ("d", SLOW))


def test_a_board_that_shows_different_quotes_to_different_peers_is_contraindicated_by_all_with_proof() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        victim = fleet.board("c")

        def otherwise(event: Event) -> Event:
            """Board b and the broker are in league: c is shown another quote each time."""
            if not isinstance(event, Delivered) or event.message.topic != fleet.topics.quote("b"):
                return event
            quote = fleet.opened(event.message.payload)
            other = fleet.forge(
                "b", **{name: getattr(quote, name) for name in ("counter", "nonces", "previous")}, version="0.0.1"
            )
            return replace(event, message=replace(event.message, payload=other))

        victim.hears = otherwise
        fleet.run_until(
            lambda: fleet.all_say(CONTRAINDICATED, of="b"), 4 * EPOCH_US, "they find that they were shown different quotes"
        )
        said = fleet.board("a").attestation.verifier
        assert said.standing("b") is not None and len(said.standing("b").proof) == 2  # type: ignore[union-attr]

    run(story, *HOUSE)


def test_one_key_on_two_boards_is_contraindicated() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        quote = fleet.last_quote("b")[0]
        fleet.publish_quote("b", fleet.forge("b", bootseed=digest("another boot"), counter=quote.counter + 1))
        fleet.run_for(RTT_US)
        assert fleet.all_say(CONTRAINDICATED, of="b")
        assert "two seeds" in fleet.board("a").node.trust.why("b")

    run(story, *HOUSE)


def test_a_replayed_quote_refreshes_nothing_and_a_strangers_is_refused() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        _, message = fleet.last_quote("b")
        fleet.board("b").kill()
        for _ in range((MISSED + 2) * 5):
            fleet.publish_quote("b", message)
            fleet.run_for(EPOCH_US // 5)
        assert fleet.tier("b", "a") is NONE
        assert fleet.board("a").said_something_like("it was heard before")
        fleet.publish_quote("a", message)
        fleet.publish_quote("b", b"")
        fleet.publish_quote("b", bytes([message[0]]) + message[1:-1] + bytes([message[-1] ^ 1]))
        fleet.run_for(RTT_US)
        assert fleet.tier("a", "c") is WARNING
        assert fleet.board("c").said_something_like("refused a message")

    run(story, *HOUSE)


def test_evidence_that_was_never_heard_and_was_not_made_for_now_refreshes_nothing() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        quote, message = fleet.last_quote("b")
        held_back = [fleet.forge("b", nonces=(bytes(16),), counter=quote.counter + 1, previous=quote_digest(message))]
        for number in range(2, 4 * MISSED):
            changes = {"counter": quote.counter + number, "previous": quote_digest(held_back[-1])}
            held_back.append(fleet.forge("b", nonces=(bytes(16),), **changes))
        fleet.board("b").kill()
        for each in held_back:
            fleet.run_for(EPOCH_US // 2)
            fleet.publish_quote("b", each)
        assert fleet.tier("b", "a") is NONE
        assert fleet.board("a").said_something_like("no nonce of this verifier's last two epochs")

    run(story, *HOUSE)


def test_a_challenge_of_a_verifier_is_answered_at_once_and_nobody_elses() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.run_for(2_000_000)
        board, before = fleet.board("b"), fleet.last_quote("b")[0].counter
        challenge = fleet.board("c").attestation.epochs.challenge("b")
        assert challenge is not None
        message = fleet.board("c").node._voice.challenge(challenge)
        fleet.board("a").feed(Delivered(replace(message, topic=fleet.topics.challenge("a")), 0))
        assert fleet.board("a").said_something_like("'b' inside, 'a' outside")
        board.feed(Delivered(message, 0))
        board.feed(Tick())
        quote = fleet.last_quote("b")[0]
        assert quote.counter == before + 1 and challenge.nonce in quote.nonces

    run(story, *HOUSE, epoch_us=600_000_000)


def test_only_boards_with_the_same_libraries_are_held_to_the_same_bits() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        assert fleet.board("a").attestation.is_like("b")
        board = fleet.board("b")
        board.measure(replace(board.measurements, library=digest("another library")))
        fleet.run_for(RTT_US)
        assert not fleet.board("a").attestation.is_like("b") and fleet.board("a").attestation.is_like("c")

    run(story, *HOUSE)


def test_a_lapsed_board_is_trusted_again_when_it_is_back_and_never_contraindicated_by_silence() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.board("b").kill()
        seen = set()
        for _ in range(MISSED + 2):
            fleet.run_for(EPOCH_US)
            seen.add(fleet.tier("b", "a"))
        assert seen == {WARNING, NONE}
        fleet.board("b").boot()
        await trusted(fleet)

    run(story, *HOUSE)


@pytest.mark.parametrize("said_by", [Kind.RECORD, Kind.ONLINE])
def test_a_board_that_rebooted_is_trusted_by_evidence_of_the_boot_before_for_no_more_than_an_epoch(said_by: Kind) -> None:
    """It is there, and its record, or its birth alone, says so; what it runs now it has not shown."""

    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        unheard = {Kind.RECORD, Kind.ONLINE, Kind.DIGEST} - {said_by}

        def garbled(event: Event) -> Event:
            if not isinstance(event, Delivered) or fleet.topics.parse(event.message.topic).kind not in unheard:
                return event
            return replace(event, message=replace(event.message, payload=b""))

        fleet.board("a").hears = fleet.board("c").hears = garbled
        board = fleet.board("b")
        board.hears = lambda event: None if type(event).__name__ == "Measured" else event
        board.kill()
        board.boot()
        fleet.run_for(EPOCH_US + RTT_US)
        assert fleet.all_say(NONE, of="b") and fleet.all_say(WARNING, of="a")
        assert "no evidence yet of boot 2" in fleet.board("a").node.trust.why("b")
        board.hears = lambda event: event
        board.measure(board.measurements)
        fleet.run_until(lambda: fleet.all_say(WARNING, of="b"), RTT_US, "it has shown what it runs")

    run(story, *HOUSE, missed=50)


def test_a_partition_costs_no_board_its_good_name() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        worst = WARNING
        fleet.broker.stop()
        for _ in range(10):
            fleet.run_for(EPOCH_US)
            worst = min(worst, *(fleet.tier(of, at) for of in fleet.boards for at in fleet.boards))
        assert worst is NONE or worst is WARNING
        assert fleet.tier("a", "a") is WARNING, "a board that is alone goes by its own word"
        asked = fleet.ask(asking_for(fleet.request(), WARNING), "a")
        fleet.settle(5_000_000)
        assert (asked.answers[0].status, asked.answers[0].board) == (Status.OK, "a")
        fleet.broker.start()
        fleet.run_until(fleet.all_trusted, 2 * EPOCH_US + RTT_US, "all is well again")
        fleet.agree(10_000_000)

    run(story, *HOUSE)


def test_a_contraindication_outlives_the_verifiers_and_the_boards_restart_until_an_operator_clears_it() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        swapped(fleet, "b")
        fleet.run_for(RTT_US)
        fleet.board("b").measurements = measured(*fleet.board("b").offers)
        for board in fleet.boards.values():
            board.kill()
            board.boot()
        fleet.run_for(3 * EPOCH_US)
        assert fleet.all_say(CONTRAINDICATED, of="b"), "good evidence clears nothing"
        fleet.operator_says("b", Action.CLEAR, "reinstalled")
        await trusted(fleet)
        assert where_it_ran(fleet, "a") == {"b"}
        for board in fleet.boards.values():
            board.kill()
            board.boot()
        fleet.run_for(3 * EPOCH_US)
        assert fleet.all_trusted(), "and what was cleared is not held against it again"

    run(story, *HOUSE)


def test_an_operator_revokes_a_board_while_it_serves_and_who_was_away_hears_it_later() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.board("c").kill()
        asked = [fleet.ask(fleet.request(60_000_000), "a") for _ in range(3)]
        fleet.run_for(100_000)
        fleet.operator_says("b", Action.REVOKE, "stolen")
        answered(fleet, 60_000_000)
        assert {each.answers[0].board for each in asked} == {"a"}
        assert fleet.tier("b", "a") is CONTRAINDICATED and "revoked" in fleet.board("a").node.trust.why("b")
        fleet.run_until(lambda: "revoked" in fleet.board("b").node.trust.why("b"), RTT_US, "b says itself why it gets nothing")
        fleet.board("c").boot()
        fleet.run_for(RTT_US)
        assert fleet.tier("b", "c") is CONTRAINDICATED

    run(story, ("a", offer("small", 2_000_000)), ("b", offer("small", 1_000_000)), ("c", offer("small", 2_000_000)))


def test_a_word_of_nobodys_operator_is_refused() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.attest = replace(fleet.attest, operators={"operator": Signer(b"operator", digest("another")).public_key})
        fleet.board("a").kill()
        fleet.board("a").boot()
        await trusted(fleet)
        fleet.operator_says("b", Action.REVOKE)
        fleet.run_for(RTT_US)
        assert fleet.tier("b", "c") is CONTRAINDICATED, "c knows the operator"
        assert fleet.board("a").attestation.verifier.verdict("b").tier is WARNING, "a does not"

    run(story, *HOUSE)


@pytest.mark.parametrize("kill", ["a", "c"])
def test_all_boards_hold_one_table_after_tiers_changed(kill: str) -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.agree(10_000_000)
        before = fleet.board("a").node.agreement.table.facts_digest
        swapped(fleet, "b")
        fleet.run_for(RTT_US)
        fleet.agree(10_000_000)
        assert fleet.board("a").node.agreement.table.facts_digest != before
        fleet.board(kill).kill()
        fleet.run_for(2 * EPOCH_US)
        fleet.board(kill).boot()
        fleet.run_for(EPOCH_US)
        fleet.agree(10_000_000)
        assert fleet.all_say(CONTRAINDICATED, of="b")

    run(story, *HOUSE)


def test_what_a_board_published_in_an_earlier_boot_counts_for_itself_as_it_does_for_the_others() -> None:
    """All that is heard again after the restart is what was retained: the others' tables still go by it."""

    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.run_for(EPOCH_US)
        board = fleet.board("a")
        board.kill()
        quotes = {fleet.topics.quote(each) for each in fleet.boards}
        board.hears = lambda event: None if isinstance(event, Delivered) and event.message.topic in quotes else event
        board.boot()
        fleet.run_for(RTT_US)
        assert fleet.tier("b", "a") is NONE, "it has seen nothing itself yet"
        assert agreed(fleet, "a") == agreed(fleet, "b") == agreed(fleet, "c") == dict.fromkeys("abc", WARNING)
        fleet.agree(5_000_000)

    run(story, *HOUSE, agree=2, epoch_us=60_000_000)


def test_no_kv_goes_to_or_comes_from_a_board_that_is_contraindicated() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.board("b").keep("talk")
        fleet.run_for(RTT_US)
        board = fleet.board("a")
        job = Execute("a/" + "0" * 32, fleet.turn(5, session="talk"), "parrot", 60_000_000)
        assert [each for each, _ in board.node._kv_elsewhere(job)] == ["b"]
        ask = KvAsk(session_hash("talk"), b"f" * 32, KvItem.MANIFEST)
        message = fleet.board("b").node._voice.kv(ask, "a")
        board.feed(Delivered(message, 0))
        assert not board.said_something_like("refused")
        fleet.operator_says("b", Action.REVOKE, "stolen")
        fleet.run_until(lambda: fleet.tier("b", "a") is CONTRAINDICATED, RTT_US, "a knows")
        assert not board.node._kv_elsewhere(job)
        board.feed(Delivered(message, 0))
        assert board.said_something_like("a board that is trusted with a session")

    talker = offer("parrot", 60_000, task="chat")
    run(story, ("a", talker), ("b", talker))


@pytest.mark.parametrize(
    ("agree", "accusers", "meanwhile"),
    [(1, "ad", [WARNING, NONE]), (2, "ad", [WARNING] * 2), (3, "ade", [WARNING, WARNING, NONE])],
)
def test_as_many_verifiers_as_are_asked_for_must_accuse_and_two_at_least(
    agree: int, accusers: str, meanwhile: list[TrustTier]
) -> None:
    """Each has a spot check of its own that the others know nothing of."""

    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        for accuser, tier in zip(accusers, meanwhile, strict=True):
            assert fleet.tier("b", "c") is tier
            board = fleet.board(accuser)
            board.attestation.struck("b", True, "a wrong answer")
            board.feed(Tick())
            fleet.run_for(RTT_US)
            assert fleet.tier("b", accuser) is CONTRAINDICATED, "who knows it does not wait for the others"
        assert fleet.tier("b", "c") is CONTRAINDICATED
        fleet.agree(10_000_000)

    run(story, *HOUSE, ("d", SLOW), ("e", SLOW), agree=agree)


def test_only_named_verifiers_count_and_without_them_nothing_is_known() -> None:
    async def story(fleet: AttestingFleet) -> None:
        fleet.run_for(EPOCH_US + RTT_US)
        assert fleet.all_say(WARNING, of="a") and fleet.all_say(WARNING, of="b")
        assert fleet.tier("c", "a") is NONE, "nobody verifies the only verifier"
        fleet.board("c").kill()
        fleet.run_until(lambda: fleet.tier("b", "a") is NONE, RTT_US + 10 * EPOCH_US, "nobody who counts is there")
        assert fleet.tier("a", "a") is WARNING

    run(story, *HOUSE, verifiers=frozenset({"c"}))


# floods


def test_a_member_that_floods_a_board_with_good_quotes_has_it_neither_look_at_all_boards_nor_write_each_time() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.run_for(EPOCH_US)
        board, (quote, _) = fleet.board("a"), fleet.last_quote("b")
        looks = writes = 0
        attestation, put = board.attestation, board.ledger.put_document

        def counted(of: str) -> TrustTier:
            nonlocal looks
            looks += of == "c"
            return attestation.verifier.agreed_tier(of, attestation.online)

        def written(name: str, data: bytes) -> None:
            nonlocal writes
            writes += 1
            put(name, data)

        attestation.agreed_tier, board.ledger.put_document = counted, written  # type: ignore[method-assign]
        for boot in range(1, 201):
            changes = {"bootcount": quote.bootcount + boot, "bootseed": digest(f"{boot}"), "counter": 1}
            message = fleet.forge("b", **changes)
            board.feed(Delivered(Message(fleet.topics.quote("b"), message), 0))
            board.feed(Tick())
        assert attestation.verifier.standing("b").history.place == (quote.bootcount + 200, 1)  # type: ignore[union-attr]
        assert looks <= 2 and writes <= 2

    run(story, *HOUSE)


# links that come and go


def test_an_epoch_in_which_the_link_was_away_for_a_moment_counts_for_nobody() -> None:
    """What was asked for may have come just then."""

    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        board = fleet.board("a")
        epochs = board.attestation.epochs
        ours = {fleet.topics.quote(each) for each in "bc"}
        board.hears = lambda event: None if isinstance(event, Delivered) and event.message.topic in ours else event
        for _ in range(3):
            epoch = epochs.counter
            fleet.run_until(lambda before=epoch: epochs.counter > before, 2 * EPOCH_US, "an epoch is over")  # type: ignore[misc]
            assert board.attestation.verifier.verdict("b").tier is WARNING
            fleet.run_for(EPOCH_US * 3 // 4)
            assert board.attestation.verifier.standing("b").asked_in_epoch  # type: ignore[union-attr]
            board.link.lose(board.link._connection, "cut")
            fleet.run_for(100_000)

    run(story, *HOUSE, missed=1)


def test_after_a_broker_that_forgot_everything_all_is_said_again() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.run_for(EPOCH_US)
        fleet.broker.stop()
        fleet.run_for(100_000)
        fleet.broker.start(keep_sessions=False, keep_retained=False)
        quotes = {fleet.topics.quote(each) for each in fleet.boards}
        for board in fleet.boards:
            fleet.board(board).hears = lambda event: (
                None if isinstance(event, Delivered) and event.message.topic in quotes else event
            )
        said = {fleet.topics.appraisal(by, of) for by in "abc" for of in "abc" if by != of}
        said |= quotes | {fleet.topics.epoch(each) for each in fleet.boards}
        fleet.run_until(lambda: said <= set(fleet.broker._retained), EPOCH_US, "all of it is there for who comes now")

    run(story, *HOUSE, epoch_us=120_000_000)


def test_a_verifier_that_restarts_is_shown_quotes_at_once_without_asking() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        fleet.run_for(2_000_000)
        for name in "ab":
            challenge = fleet.topics.challenge(name)
            fleet.board(name).hears = lambda event, topic=challenge: (  # type: ignore[misc]
                None if isinstance(event, Delivered) and event.message.topic == topic else event
            )
        fleet.board("c").kill()
        fleet.board("c").boot()
        fleet.run_until(lambda: fleet.tier("a", "c") is WARNING and fleet.tier("b", "c") is WARNING, RTT_US, "it knows them")

    run(story, *HOUSE, epoch_us=120_000_000)


# hardware


def test_a_quote_is_endorsed_before_it_is_signed_and_says_so_if_it_is_not() -> None:
    async def story(fleet: AttestingFleet) -> None:
        fleet.run_for(EPOCH_US + RTT_US)
        quote, _ = fleet.last_quote("a")
        assert quote.key_kind is KeyKind.SOFTWARE and not quote.endorsement
        assert fleet.board("a").said_something_like("does not vouch")
        board = fleet.board("a")
        board.hears = lambda event: replace(event, endorsement=b"signed", refusal="") if isinstance(event, Endorsed) else event
        fleet.run_for(EPOCH_US + RTT_US)
        quote, _ = fleet.last_quote("a")
        assert quote.key_kind is KeyKind.TPM and quote.endorsement == b"signed"
        assert fleet.tier("a", "b") is WARNING, "what does not hold is no better than a key in a file"

    run(story, *HOUSE, key_kind=KeyKind.TPM)


def test_hardware_that_never_answers_holds_up_no_later_quote() -> None:
    async def story(fleet: AttestingFleet) -> None:
        board = fleet.board("a")
        board.hears = lambda event: None if isinstance(event, Endorsed) else event
        board.kill()
        board.boot()
        fleet.run_for(EPOCH_US)
        assert board.attestation.attester.latest is None
        board.hears = lambda event: event
        fleet.run_until(lambda: fleet.tier("a", "b") is WARNING, 20_000_000, "a later quote comes through")

    run(story, *HOUSE, key_kind=KeyKind.TPM)


# a link that takes nothing


def test_a_link_that_refuses_everything_is_tried_again_once_a_second_and_no_more_often() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        board, refused = fleet.board("a"), 0
        board.link.publish = lambda message, ticket=0: refuse()  # type: ignore[method-assign]

        def refuse() -> None:
            nonlocal refused
            refused += 1
            assert refused < 1_000, "a refusal leads to the next one at once"
            raise UnavailableError("link", "no room", "wait")

        fleet.run_for(10_000_000)
        assert 0 < refused < 200

    run(story, *HOUSE)


# for people


def test_the_report_tells_every_board_with_its_vector_reasons_and_ages() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        swapped(fleet, "b")
        fleet.run_for(RTT_US)
        report = trust_report(fleet.board("a").node, fleet.now_us)
        told = {each["board"]: each for each in report["boards"]}  # type: ignore[attr-defined]
        assert set(told) == {"a", "b", "c"} and report["attests"] is True
        assert (told["b"]["tier"], told["b"]["agreed"], told["b"]["own"]) == ("contraindicated",) * 3
        assert told["b"]["vector"]["executables"] == 96 and "bytes in memory" in told["b"]["why"]
        assert told["c"]["tier"] == "warning" and told["c"]["vector"]["executables"] == 2
        assert 0 <= told["c"]["evidence_age_s"] <= EPOCH_US // 1_000_000 + 1 and told["c"]["key"] == "software"
        assert {each["verifier"]: each["tier"] for each in told["b"]["said"]} == {"a": "contraindicated", "c": "contraindicated"}

    run(story, *HOUSE)


def test_what_nobody_verifies_is_dropped_and_topics_that_do_not_fit_are_refused() -> None:
    async def story(fleet: AttestingFleet) -> None:
        await trusted(fleet)
        _, message = fleet.last_quote("b")
        board = fleet.board("a")
        wrong = Message(fleet.topics.quote("c"), message)
        board.feed(Delivered(wrong, 0))
        assert board.said_something_like("'b' inside, 'c' outside")
        assert board.node.trust.listens_to(Kind.QUOTE)

    run(story, *HOUSE)
