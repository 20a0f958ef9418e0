"""A verifier at work: who decays when, what is told how often, what outlives a restart; that no honest board is condemned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_agent.attest.appraisal import Appraisal, Vector
from edge_agent.attest.claims import Verdict
from edge_agent.attest.evidence import NO_DIGEST, open_quote, quote_digest
from edge_agent.attest.receipts import Chain
from edge_agent.attest.telling import SAY_AGAIN_EPOCHS, TELL_PERIOD_US, WITNESSES
from edge_agent.attest.verifier import Verifier
from edge_agent.attest.words import Action
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from edge_agent.store.ledger import Ledger
from tests.attested import digest, signer
from tests.proofs import request, result
from tests.verifying import EPOCH_US, GOOD, HOUSE, MODEL, Board, Watch, keys_of, settings

AFFIRMING, WARNING, NONE, CONTRAINDICATED = (
    TrustTier.AFFIRMING, TrustTier.WARNING, TrustTier.NONE, TrustTier.CONTRAINDICATED,
)  # fmt: skip
POISONED = replace(GOOD, models=(replace(MODEL, mapped=digest("poisoned")),))


def tiers_told(watch: Watch, board: str = "b") -> list[TrustTier]:
    return [each.tier for each in watch.verifier.appraisals_due(watch.now_us) if each.board == board]


# freshness, challenges, decay


def test_a_board_that_shows_itself_each_epoch_stays_what_it_is() -> None:
    watch, board = Watch(), Board()
    for _ in range(20):
        assert not watch.hear(board.quote(watch.nonce))
        watch.epoch()
        assert watch.tier() is AFFIRMING


def test_a_silent_board_is_challenged_before_it_decays_and_an_answer_holds_it_up() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    watch.epoch()
    for _ in range(5):
        watch.now_us += EPOCH_US // 2
        assert "b" in watch.verifier.to_challenge(watch.now_us)
        watch.hear(board.quote(watch.challenge("b")))
        watch.now_us += EPOCH_US // 2
        watch.turn()
        assert watch.tier() is AFFIRMING
    assert "b" in watch.epoch()
    assert watch.tier() is WARNING


def test_nobody_decays_unasked() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    for _ in range(9):
        watch.now_us += EPOCH_US
        watch.turn()
    assert watch.tier() is AFFIRMING


def test_a_board_that_began_a_new_boot_is_asked_at_once_and_its_old_evidence_holds_no_longer_than_the_epoch() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    watch.turn_after(EPOCH_US)
    assert "b" in watch.verifier.to_challenge(watch.now_us + EPOCH_US // 2)
    watch.hear(board.quote(watch.nonce))
    assert "b" not in watch.verifier.to_challenge(watch.now_us + EPOCH_US // 2)
    board.boot()
    watch.verifier.hear_boot("b", board.bootcount)
    assert "b" in watch.verifier.to_challenge(watch.now_us), "whatever it showed in this epoch was of another boot"
    assert "b" not in watch.verifier.to_challenge(watch.now_us)
    assert watch.tier() is AFFIRMING
    watch.turn_after(EPOCH_US)
    assert watch.tier() is NONE
    assert watch.verifier.verdict("b").reasons == ("no evidence yet of boot 2, in which it is",)
    assert "b" in watch.verifier.to_challenge(watch.now_us), "and it is asked on"
    watch.hear(board.quote(watch.nonce))
    watch.epoch()
    assert watch.tier() is AFFIRMING


def test_a_board_that_shows_its_new_boot_in_time_loses_nothing_and_neither_does_one_nobody_could_hear() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    board.boot()
    watch.verifier.hear_boot("b", board.bootcount)
    watch.verifier.to_challenge(watch.now_us)
    watch.turn_after(EPOCH_US, link_was_up=False)
    assert watch.tier() is AFFIRMING, "the link was away"
    watch.verifier.to_challenge(watch.now_us)
    watch.hear(board.quote(watch.nonce))
    watch.verifier.hear_boot("b", board.bootcount)
    watch.turn_after(EPOCH_US)
    assert watch.tier() is AFFIRMING


def test_what_a_boot_that_is_over_still_had_under_way_does_not_stand_for_the_new_one_and_condemns_nobody() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    late = board.quote(watch.nonce)
    board.boot()
    watch.verifier.hear_boot("b", board.bootcount)
    watch.verifier.to_challenge(watch.now_us)
    watch.hear(late)
    watch.turn_after(EPOCH_US)
    assert watch.tier() is NONE
    watch.hear(board.quote(watch.nonce))
    assert watch.tier() is AFFIRMING


def test_a_quote_of_a_new_boot_that_is_not_fresh_ends_what_was_known_of_the_old_one_too() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    board.boot()
    assert "no nonce" in watch.hear(board.quote())
    assert "b" in watch.verifier.to_challenge(watch.now_us)
    watch.turn_after(EPOCH_US)
    assert watch.tier() is NONE


def test_a_board_that_was_cleared_and_set_up_anew_is_not_held_to_the_boots_it_had() -> None:
    watch, board = Watch(), Board(bootcount=7)
    watch.hear(board.quote(watch.nonce))
    watch.verifier.hear_boot("b", 8)
    watch.word("b", Action.CLEAR)
    anew = Board()
    for _ in range(3):
        watch.hear(anew.quote(watch.nonce))
        watch.verifier.hear_boot("b", 8)
        watch.epoch()
        assert watch.tier() is AFFIRMING


def test_who_is_not_known_is_asked_at_once_and_who_is_quiet_after_half_an_epoch_each_once() -> None:
    watch, board = Watch(), Board()
    assert watch.verifier.to_challenge(0) == ("b", "c", "d")
    assert watch.verifier.to_challenge(1) == ()
    watch.hear(board.quote(watch.nonce))
    watch.epoch()
    assert watch.verifier.to_challenge(watch.now_us) == ("c", "d")
    assert watch.verifier.to_challenge(watch.now_us + EPOCH_US // 2 - 1) == ()
    assert watch.verifier.to_challenge(watch.now_us + EPOCH_US // 2) == ("b",)
    watch.word("c", Action.REVOKE)
    watch.epoch()
    assert "c" not in watch.verifier.to_challenge(watch.now_us + EPOCH_US)


def test_after_a_reconnect_epochs_count_anew_from_a_whole_one() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    watch.epoch()
    watch.epoch(link_was_up=False)
    assert watch.tier() is AFFIRMING
    watch.epoch()
    assert watch.tier() is WARNING
    watch.epoch()
    watch.epoch()
    assert watch.tier() is NONE
    watch.hear(board.quote(watch.nonce))
    assert watch.tier() is AFFIRMING


# what is told


def test_a_change_is_told_at_once_and_then_at_most_once_a_second_but_a_contraindication_always_at_once() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    assert tiers_told(watch) == [AFFIRMING]
    assert tiers_told(watch) == []
    board.measured = replace(GOOD, code=digest("other"))
    watch.hear(board.quote(watch.nonce))
    assert tiers_told(watch) == []
    watch.now_us += TELL_PERIOD_US
    assert tiers_told(watch) == [WARNING]
    board.measured = POISONED
    watch.hear(board.quote(watch.nonce))
    assert tiers_told(watch) == [CONTRAINDICATED]


def test_a_contraindicated_board_cannot_make_its_verifier_talk() -> None:
    watch, board = Watch(), Board(measured=POISONED)
    told = 0
    for number in range(200):
        board.measured = replace(POISONED, models=(replace(MODEL, mapped=digest(f"{number}")),))
        watch.hear(board.quote(watch.nonce))
        watch.now_us += TELL_PERIOD_US // 20
        told += len(tiers_told(watch))
    assert told <= 10


def test_of_every_quote_two_verifiers_say_at_once_which_one_they_hold_and_few_others_do() -> None:
    members = tuple("abcdefgh")
    watches = [Watch(name, members) for name in members if name != "b"]
    board = Board()
    told = []
    for _ in range(2 * SAY_AGAIN_EPOCHS + 2):
        quote = board.quote(*(watch.nonce for watch in watches))
        count = 0
        for watch in watches:
            watch.hear(quote)
            count += len(tiers_told(watch))
            watch.epoch()
        told.append(count)
    assert told[0] == len(watches)
    assert set(told[1:]) <= {WITNESSES, WITNESSES + 1}


def test_without_new_quotes_about_one_verifier_says_again_in_every_epoch_what_it_holds() -> None:
    watch = Watch("a", tuple("abcdefgh"))
    watch.word("b", Action.REVOKE)
    told = [len(tiers_told(watch)) for _ in range(4 * 7) if watch.epoch() is not None]
    assert (sum(told[1:]), max(told)) == (4, 1)


def test_an_appraisal_names_the_quote_that_it_is_about() -> None:
    watch, board = Watch(boot_epoch=7), Board(bootcount=4, counter=2)
    message = board.quote(watch.nonce)
    watch.hear(message)
    watch.hear(board.quote())
    (told,) = watch.verifier.appraisals_due(watch.now_us, issued_s=5)
    assert told == Appraisal("a", 7, 1, "b", AFFIRMING, Vector(2, 2, 2, 2), (), quote_digest(message), 4, 3, 1, 5)


def test_of_a_board_that_never_came_nothing_is_said_until_two_epochs_are_over() -> None:
    """What its verifier said in the boot before may still hold."""
    watch = Watch()
    assert watch.verifier.appraisals_due(watch.now_us) == []
    watch.epoch()
    assert watch.verifier.appraisals_due(watch.now_us) == []
    watch.epoch()
    assert [(each.board, each.tier) for each in watch.verifier.appraisals_due(watch.now_us)] == [(each, NONE) for each in "bcd"]
    watch.epoch()
    assert len(watch.verifier.appraisals_due(watch.now_us)) <= 3


def test_after_a_reconnect_everything_is_said_again() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    assert tiers_told(watch) == [AFFIRMING]
    watch.verifier.say_again()
    assert tiers_told(watch) == [AFFIRMING]
    assert tiers_told(watch) == []


# tiers


def test_the_live_tier_is_what_was_agreed_and_no_more_than_one_knows_oneself() -> None:
    watch, other, board = Watch("a"), Watch("c"), Board()
    quote = board.quote(watch.nonce, other.nonce)
    other.hear(quote)
    other.tell(watch)
    assert watch.verifier.agreed_tier("b", HOUSE) is AFFIRMING
    assert watch.verifier.tier("b", HOUSE) is NONE
    watch.hear(quote)
    watch.tell()
    assert watch.verifier.tier("b", HOUSE) is AFFIRMING
    watch.verifier.struck("b", exact=True, what="other bits")
    assert (watch.verifier.agreed_tier("b", HOUSE), watch.verifier.tier("b", HOUSE)) == (AFFIRMING, CONTRAINDICATED)
    watch.tell()
    assert watch.verifier.agreed_tier("b", HOUSE) is NONE, "one alone condemns nobody for the others, and casts doubt"
    other.verifier.struck("b", exact=True, what="other bits")
    other.tell(watch)
    assert watch.verifier.agreed_tier("b", HOUSE) is CONTRAINDICATED


def test_own_appraisals_count_as_published_and_not_before() -> None:
    watch, board = Watch(), Board()
    watch.hear(board.quote(watch.nonce))
    assert watch.verifier.agreed_tier("b", HOUSE) is NONE
    watch.tell()
    assert watch.verifier.agreed_tier("b", HOUSE) is AFFIRMING
    assert watch.verifier.agreed_tier("b", "bcd") is NONE


def test_alone_a_board_takes_its_own_word_and_in_company_no_more_than_that_of_others() -> None:
    watch, other = Watch("b"), Watch("c")
    assert watch.verifier.tier("b", "b") is NONE
    board = Board()
    message = board.quote(other.nonce)
    watch.verifier.show_self(open_quote(message, watch.key))
    assert watch.verifier.tier("b", "b") is AFFIRMING
    assert watch.verifier.tier("b", "abcd") is AFFIRMING
    board.measured = replace(GOOD, code=digest("other"))
    other.hear(board.quote(other.nonce))
    other.tell(watch)
    assert watch.verifier.tier("b", "abcd") is WARNING
    assert watch.verifier.tier("b", "b") is AFFIRMING
    watch.word("b", Action.REVOKE)
    assert watch.verifier.tier("b", "b") is CONTRAINDICATED


def test_the_ceiling_holds_for_others_and_for_oneself() -> None:
    limits = {"b": WARNING, "a": NONE}
    watch = Watch()
    watch.verifier = Verifier("a", 1, keys_of(HOUSE), settings(), ceiling=limits)
    watch.hear(Board().quote(watch.nonce))
    watch.tell()
    watch.verifier.show_self(open_quote(Board("a").quote(), watch.key))
    assert (watch.tier(), watch.verifier.agreed_tier("b", HOUSE), watch.verifier.tier("b", HOUSE)) == (
        AFFIRMING,
        WARNING,
        WARNING,
    )
    assert watch.verifier.tier("a", HOUSE) is NONE


def test_boards_that_others_verify_are_left_to_them() -> None:
    members = tuple(f"n{number:02}" for number in range(20))
    watch, board = Watch("n10", members), Board("n15")
    assert len(watch.verifier.boards) == 7
    assert watch.hear(board.quote(watch.nonce)) == "n15 is verified by others"
    assert watch.verifier.verdict("n15") == Verdict(NONE, Vector(), ("it is verified by others",))
    assert watch.verifier.standing("n15") is None
    neighbour = Watch("n16", members)
    neighbour.hear(board.quote(neighbour.nonce))
    neighbour.tell(watch)
    assert watch.verifier.tier("n15", members) is (AFFIRMING if "n16" in watch.verifier.verifiers["n15"] else NONE)


# restarts


def test_a_verifier_that_restarted_believes_nothing_until_it_is_shown_and_forgets_no_wrong() -> None:
    watch, good, bad = Watch(), Board(), Board("c", measured=POISONED)
    watch.hear(good.quote(watch.nonce), bad.quote(watch.nonce))
    watch.restart()
    assert (watch.tier("b"), watch.tier("c")) == (NONE, CONTRAINDICATED)
    watch.hear(good.quote(watch.nonce))
    assert watch.tier("b") is AFFIRMING
    assert [each.board for each in watch.tell()] == ["b", "c"]


def test_a_word_on_any_member_outlives_a_restart_also_on_those_that_others_verify_and_oneself() -> None:
    members = tuple(f"n{number:02}" for number in range(20))
    watch = Watch("n10", members)
    for board in ("n15", "n09", "n10"):
        assert watch.word(board, Action.REVOKE, serial=3)
    watch.keep()
    watch.restart()
    for board in ("n15", "n09", "n10"):
        assert not watch.word(board, Action.CLEAR, serial=3)
        assert watch.verifier.tier(board, members) is CONTRAINDICATED
        assert watch.verifier.agreed_tier(board, members) is CONTRAINDICATED
        assert watch.word(board, Action.CLEAR, serial=4)
        assert watch.verifier.agreed_tier(board, members) is NONE


def test_what_is_kept_is_written_when_it_must_be_and_not_with_every_quote() -> None:
    watch, board = Watch(), Board()
    written = 0
    for _ in range(40):
        watch.hear(board.quote(watch.nonce))
        watch.now_us += EPOCH_US
        watch.turn()
        written += "b" in watch.verifier.to_keep(watch.now_us)
    assert 18 <= written <= 21
    assert watch.verifier.to_keep(watch.now_us, everything=True).keys() <= {"b"}
    assert watch.verifier.to_keep(watch.now_us, everything=True) == {}


def test_what_the_ledger_holds_is_refused_if_it_is_not_ours() -> None:
    with pytest.raises(RefusedError):
        Watch().verifier.recall("b", b"\xff")


# honest boards

STEPS = (
    "quote", "quote", "quote unheard", "receipt", "receipt", "boot", "skip", "deliver", "deliver", "deliver", "epoch",
    "epoch down", "restart", "restart lost", "drain", "tell", "clear", "late nonce", "challenge", "golden",
)  # fmt: skip


class HonestHistory:
    """A board that never lies, a broker that brings what it said late, twice, in any order or never, and two verifiers."""

    def __init__(self) -> None:
        self.watches = (Watch("a"), Watch("c"))
        self.board = Board()
        self.said: list[Callable[[Watch], object]] = []
        self.serial = 0
        self.nonces: list[bytes] = []

    def step(self, name: str, number: int) -> None:
        watch, board = self.watches[number % 2], self.board
        match name:
            case "quote" | "quote unheard":
                self.say_quote(board.quote(*(each.nonce for each in self.watches), issued_s=number), heard=name == "quote")
            case "late nonce":
                self.say_quote(board.quote(*self.nonces[-3:]), heard=False)
            case "challenge":
                self.say_quote(board.quote(watch.challenge("b")), heard=bool(number % 3))
            case "receipt":
                message = board.receipt()
                self.say(lambda each: each.hear_receipt(message), heard=bool(number % 3))
            case "boot":
                board.boot()
            case "skip":
                board.counter += 1
            case "golden":
                board.measured = GOOD if number % 2 else replace(GOOD, models=(replace(MODEL, golden=b""),))
            case "deliver" if self.said:
                self.said[number % len(self.said)](watch)
            case "epoch" | "epoch down":
                self.nonces.append(watch.nonce)
                watch.epoch(link_was_up=name == "epoch")
            case "restart" | "restart lost":
                watch.restart(lost=name == "restart lost")
            case "drain":
                watch.keep(everything=True)
            case "tell":
                watch.tell(*self.watches)
                watch.now_us += number
            case "clear":
                self.serial += 1
                for each in self.watches:
                    each.word("b", Action.CLEAR, self.serial)

    def say_quote(self, message: bytes, *, heard: bool) -> None:
        self.say(lambda each: each.hear(message), heard=heard)

    def say(self, deliver: Callable[[Watch], object], *, heard: bool) -> None:
        self.said.append(deliver)
        if heard:
            for watch in self.watches:
                deliver(watch)

    def suspects(self) -> list[str]:
        return [watch.reasons() for watch in self.watches if watch.tier() is CONTRAINDICATED]


histories = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 999)), max_size=60)


@hypothesis_settings(max_examples=150, deadline=None)
@given(histories)
@example([("quote unheard", 0), ("boot", 0), ("quote", 0), ("deliver", 0), ("deliver", 1)])
@example([("quote unheard", 0), ("boot", 0), ("quote", 0), ("epoch", 0), ("deliver", 0), ("epoch", 0), ("deliver", 0)])
@example([("receipt", 0), ("quote", 0), ("receipt", 0), ("boot", 0), ("receipt", 1), ("quote", 0), ("deliver", 0)])
def test_no_honest_board_is_ever_contraindicated(history: list[tuple[str, int]]) -> None:
    world = HonestHistory()
    for name, number in history:
        world.step(name, number)
        assert world.suspects() == [], (name, number)
    watch = world.watches[0]
    assert not watch.hear(world.board.quote(watch.nonce))
    assert watch.tier() is AFFIRMING


LIES = ("bytes", "seed", "previous", "receipts", "head", "receipt", "receipt denied")


def lie(world: HonestHistory, kind: str) -> tuple[Callable[[Watch], object], Callable[[Watch], object]]:
    """Two things that the board signs now, of which at most one can be honest."""
    board = world.board
    board.receipt()
    board.receipt()
    twin = board.copy()
    nonce = world.watches[0].nonce
    if kind == "receipt":
        messages = board.receipt(request=1), twin.receipt(request=2)
        return (lambda watch: watch.hear_receipt(messages[0])), (lambda watch: watch.hear_receipt(messages[1]))
    one = board.quote(nonce)
    if kind == "receipt denied":
        twin.counter = board.counter - 1
        denied = twin.receipt(request=1)
        return (lambda watch: watch.hear(board.quote(nonce))), (lambda watch: watch.hear_receipt(denied))
    if kind == "bytes":
        other = twin.quote(nonce, uptime_s=1)
    else:
        lies = {
            "seed": {"bootseed": digest("other")}, "previous": {"previous": digest("other")},
            "receipts": {"receipts": board.receipts - 1}, "head": {"receipts_head": NO_DIGEST},
        }  # fmt: skip
        other = board.quote(nonce, **lies[kind])
    return (lambda watch: watch.hear(one)), (lambda watch: watch.hear(other))


@hypothesis_settings(max_examples=150, deadline=None)
@given(histories, st.sampled_from(LIES), st.booleans(), histories.map(lambda steps: steps[:8]))
def test_who_contradicts_itself_before_a_verifier_is_contraindicated_whatever_went_before_and_in_whatever_order(
    history: list[tuple[str, int]], kind: str, swapped: bool, between: list[tuple[str, int]]
) -> None:
    world = HonestHistory()
    for name, number in history:
        world.step(name, number)
    watch = world.watches[0]
    watch.hear(world.board.quote(watch.nonce))
    one, other = lie(world, kind)
    for deliver in (other, one) if swapped else (one, other):
        deliver(watch)
    assert watch.tier() is CONTRAINDICATED
    for name, number in between:
        if name != "clear" and name != "restart lost":
            world.step(name, number)
    assert watch.tier() is CONTRAINDICATED


def test_the_receipts_of_a_real_chain_and_its_quotes_agree_over_reboots(tmp_path: Path) -> None:
    watch, board = Watch(), Board()
    for _ in range(3):
        with Ledger(tmp_path / "ledger.db") as ledger:
            chain = Chain(ledger, "b", board.bootcount, signer("b"))
            for number in range(4):
                asked = request(board.receipts)
                message = chain.append(asked, result(asked, "b"), board.counter, 0)
                assert watch.hear_receipt(message) == ""
                board.receipts, board.head = chain.count, chain.head
                if number % 2:
                    assert not watch.hear(board.quote(watch.nonce))
        board.boot()
        watch.epoch()
    assert (board.receipts, watch.tier()) == (12, AFFIRMING)
