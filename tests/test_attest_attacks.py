"""What attestation must survive: cases 26 to 33 of SECURITY.md, each with the keys that the attacker would have.

Whoever holds a board's key can sign what it likes; the broker can bring it to anyone, at any time, as often as it likes.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest

from edge_agent.attest.appraisal import proof_of
from edge_agent.attest.evidence import NO_DIGEST, open_quote
from edge_agent.attest.history import TRACES
from edge_agent.attest.words import Action
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from tests.attested import digest
from tests.verifying import EPOCH_US, GOOD, MODEL, Board, Watch, keys_of, settings

AFFIRMING, WARNING, NONE, CONTRAINDICATED = (
    TrustTier.AFFIRMING, TrustTier.WARNING, TrustTier.NONE, TrustTier.CONTRAINDICATED,
)  # fmt: skip


def watched(board: Board) -> Watch:
    """A verifier that has seen one good quote of ``board``."""
    watch = Watch()
    assert not watch.hear(board.quote(watch.nonce))
    assert watch.tier() is AFFIRMING
    return watch


def no_fresh_evidence_in(watch: Watch, epochs: int) -> None:
    for _ in range(epochs):
        watch.epoch()


# 26: quote replayed in the epoch, the next, after reboot


def test_26_a_quote_replayed_in_its_epoch_refreshes_nothing() -> None:
    board = Board()
    watch = Watch()
    quote = board.quote(watch.nonce)
    watch.hear(quote)
    assert watch.hear(quote) == "it was heard before"
    assert watch.tier() is AFFIRMING


def test_26_a_quote_replayed_in_the_next_epoch_does_not_hold_up_the_decay() -> None:
    board = Board()
    watch = Watch()
    quote = board.quote(watch.nonce)
    watch.hear(quote)
    watch.epoch()
    assert watch.hear(quote) == "it was heard before"
    watch.epoch()
    assert watch.tier() is WARNING


def test_26_an_older_quote_of_this_epoch_does_not_take_the_place_of_a_newer_one() -> None:
    board = Board()
    watch = Watch()
    older = board.quote(watch.nonce)
    board.measured = replace(GOOD, code=digest("other code"))
    watch.hear(board.quote(watch.nonce))
    assert "older than quote 2" in watch.hear(older)
    assert watch.tier() is WARNING


def test_26_a_quote_replayed_after_the_boards_reboot_refreshes_nothing_and_harms_nobody() -> None:
    board = Board()
    watch = watched(board)
    old = board.quote(watch.nonce)
    board.boot()
    watch.hear(board.quote(watch.nonce))
    assert "older than quote 1 of boot 2" in watch.hear(old)
    assert watch.tier() is AFFIRMING


def test_26_a_quote_replayed_after_the_verifiers_reboot_refreshes_nothing() -> None:
    board = Board()
    watch = Watch()
    quote = board.quote(watch.nonce)
    watch.hear(quote)
    for lost in (False, True):
        watch.restart(lost=lost)
        assert watch.hear(quote) in ("it was heard before", "it has no nonce of this verifier's last two epochs")
        assert watch.tier() is NONE


# 27: wrong or reused nonce, relayed quote of another board


@pytest.mark.parametrize("nonces", [(), (digest("guessed")[:16],)])
def test_27_a_quote_without_a_nonce_of_the_verifier_refreshes_nothing(nonces: tuple[bytes, ...]) -> None:
    watch = Watch()
    assert watch.hear(Board().quote(*nonces)) == "it has no nonce of this verifier's last two epochs"
    assert watch.tier() is NONE


def test_27_a_quote_made_for_another_verifier_refreshes_nothing_here() -> None:
    watch, other = Watch(), Watch("c")
    quote = Board().quote(other.nonce)
    assert not other.hear(quote)
    assert watch.hear(quote)
    assert (watch.tier(), other.tier()) == (NONE, AFFIRMING)


def test_27_the_nonce_of_a_challenge_counts_once_and_for_its_board_alone() -> None:
    watch = Watch()
    nonce = watch.challenge("b")
    assert watch.hear(Board("c").quote(nonce))
    board = Board()
    assert not watch.hear(board.quote(nonce))
    no_fresh_evidence_in(watch, 1)
    assert watch.hear(board.quote(nonce)) == "it has no nonce of this verifier's last two epochs"
    assert watch.tier("c") is NONE


def test_27_a_quote_relayed_as_that_of_another_board_is_refused() -> None:
    """It carries its name within the signature; who signs another's name is refused, too."""
    watch = Watch()
    good = Board("c").quote(watch.nonce)
    assert not watch.hear(good)
    assert watch.tier("b") is NONE
    forged = open_quote(good, watch.key)
    with pytest.raises(ValueError, match="does not sign"):
        Board("c").quote(watch.nonce, board="b")
    with pytest.raises(RefusedError, match="signature"):
        open_quote(good, lambda kid: keys_of(("b",))["b"])
    assert forged.board == "c"


# 28: receipt gap, fork, reset, truncated chain


def test_28_a_receipt_left_out_of_the_chain_is_found_by_the_next_one() -> None:
    board = Board()
    watch = watched(board)
    watch.hear_receipt(board.receipt())
    hidden = board.copy()
    hidden.receipt(request=77)
    later = hidden.receipt(counter=2)
    assert "follows another receipt 1" in watch.hear_receipt(later)
    assert watch.tier() is CONTRAINDICATED


def test_28_two_receipts_with_one_number_are_a_fork() -> None:
    board = Board()
    watch = watched(board)
    watch.hear_receipt(board.copy().receipt(request=1))
    assert watch.hear_receipt(board.receipt(request=2)) == "two receipts with number 1"
    assert watch.tier() is CONTRAINDICATED


def test_28_a_fork_that_only_its_quotes_show_is_found() -> None:
    """The board counts other receipts towards this verifier than it gives to it."""
    board = Board()
    watch = watched(board)
    other = board.copy()
    other.receipt(request=9)
    watch.hear_receipt(board.receipt(request=1))
    assert "is another than the last" in watch.hear(other.quote(watch.nonce))
    assert watch.tier() is CONTRAINDICATED


def test_28_receipts_that_a_reset_begins_anew_are_found() -> None:
    board = Board()
    watch = watched(board)
    for _ in range(3):
        watch.hear_receipt(board.receipt())
    board.boot()
    board.receipts, board.head = 0, NO_DIGEST
    assert "receipts counted anew" in watch.hear_receipt(board.receipt(request=9)) or watch.tier() is CONTRAINDICATED
    assert watch.tier() is CONTRAINDICATED


def test_28_a_chain_that_is_cut_short_is_found_by_the_next_quote() -> None:
    board = Board()
    watch = watched(board)
    kept = board.copy()
    for _ in range(3):
        board.receipt()
    watch.hear(board.quote(watch.nonce))
    kept.counter, kept.previous = board.counter, board.previous
    assert watch.hear(kept.quote(watch.nonce)) == "receipts went back from 3 to 0"
    assert watch.tier() is CONTRAINDICATED


def test_28_a_receipt_that_a_later_quote_denies_is_held_against_its_board() -> None:
    board = Board()
    watch = watched(board)
    watch.hear_receipt(board.copy().receipt())
    assert "signed before quote 2 of boot 1, which counts only 0" in watch.hear(board.quote(watch.nonce))
    assert watch.tier() is CONTRAINDICATED


# 29: one key on two boards


def test_29_a_copy_that_runs_in_a_boot_of_its_own_is_found_by_its_seed() -> None:
    board = Board()
    watch = watched(board)
    copy = Board(seed=digest("the copy's"), counter=5)
    assert watch.hear(copy.quote(watch.nonce)) == "boot 1 with two seeds"
    assert watch.tier() is CONTRAINDICATED


def test_29_a_copy_that_stayed_behind_is_found_when_it_answers_a_nonce_of_now() -> None:
    board = Board()
    copy = board.copy()
    watch = watched(board)
    board.boot()
    watch.hear(board.quote(watch.nonce))
    for _ in range(2):
        watch.epoch()
        watch.hear(board.quote(watch.nonce))
    copy.counter = 7
    assert "in boot 1, which boot 2 followed: rolled back, or a copy" in watch.hear(copy.quote(watch.nonce))
    assert watch.tier() is CONTRAINDICATED


def test_29_a_board_put_back_to_an_older_ledger_is_found_also_by_a_verifier_that_restarted() -> None:
    board = Board(bootcount=9)
    watch = watched(board)
    watch.restart()
    assert "rolled back, or a copy" in watch.hear(Board(bootcount=4).quote(watch.nonce))
    watch.restart()
    assert watch.tier() is CONTRAINDICATED


def test_29_a_copy_with_seed_and_counters_is_found_by_the_first_number_that_both_use() -> None:
    board = Board()
    watch = watched(board)
    copy = board.copy()
    watch.hear(board.quote(watch.nonce))
    assert watch.hear(copy.quote(watch.nonce, uptime_s=1)) == "two quotes with number 2 of boot 1"
    assert watch.tier() is CONTRAINDICATED


# 30: model or delegate swapped after measurement, CPU fallback unreported


def test_30_a_model_whose_bytes_changed_under_it_contraindicates() -> None:
    board = Board()
    watch = watched(board)
    board.measured = replace(GOOD, models=(replace(MODEL, mapped=digest("poisoned")),))
    assert not watch.hear(board.quote(watch.nonce))
    assert watch.tier() is CONTRAINDICATED
    assert watch.reasons() == (
        f"model blazeface: the bytes in memory are {digest('poisoned').hex()[:12]}, offered is {digest('blazeface').hex()[:12]}"
    )


def test_30_a_model_that_answers_its_golden_input_otherwise_contraindicates() -> None:
    board = Board(measured=replace(GOOD, models=(replace(MODEL, golden=digest("wrong")),)))
    watch = Watch()
    watch.hear(board.quote(watch.nonce))
    assert watch.tier() is CONTRAINDICATED


def test_30_a_golden_answer_that_changes_within_a_boot_contraindicates_without_any_reference() -> None:
    watch = Watch(attest=settings(references=replace(settings().references, golden={})))
    board = Board()
    watch.hear(board.quote(watch.nonce))
    board.measured = replace(GOOD, models=(replace(MODEL, golden=digest("another")),))
    watch.hear(board.quote(watch.nonce))
    assert "changed within boot 1" in watch.reasons()
    assert watch.tier() is CONTRAINDICATED


def test_30_another_golden_answer_after_a_reboot_is_no_change_within_one() -> None:
    watch = Watch(attest=settings(references=replace(settings().references, golden={})))
    board = Board()
    watch.hear(board.quote(watch.nonce))
    board.boot()
    board.measured = replace(GOOD, models=(replace(MODEL, golden=digest("another")),))
    watch.hear(board.quote(watch.nonce))
    assert watch.tier() is AFFIRMING


def test_30_a_delegate_that_was_swapped_is_not_recognized() -> None:
    board = Board(measured=replace(GOOD, delegate=digest("delegate"), delegate_name="edgetpu"))
    watch = watched(board)
    board.measured = replace(GOOD, delegate=digest("swapped"), delegate_name="edgetpu")
    watch.hear(board.quote(watch.nonce))
    assert watch.tier() is WARNING
    assert "delegate library edgetpu" in watch.reasons()


@pytest.mark.parametrize(
    ("delegate", "permille", "why"), [(digest("delegate"), 0, "runs on the CPU"), (b"", 900, "delegate that was not measured")]
)
def test_30_work_that_falls_back_to_the_cpu_or_to_an_unknown_delegate_warns(delegate: bytes, permille: int, why: str) -> None:
    models = (replace(MODEL, delegated_permille=permille),)
    board = Board(measured=replace(GOOD, delegate=delegate, models=models))
    watch = Watch()
    watch.hear(board.quote(watch.nonce))
    assert watch.tier() is WARNING
    assert why in watch.reasons()


# 31: verifier offline for days, then a burst


def test_31_days_of_messages_in_one_burst_cost_bounded_memory_and_give_the_right_verdicts() -> None:
    """Eleven boards, a day and a half of epochs, everything at once and out of order; two of them have lied in it."""
    names = tuple(f"n{number:02}" for number in range(12))
    named = settings(verifiers=frozenset({"n00"}))
    watch = Watch("n00", names, named)
    honest, forked, denied = names[1:10], names[10], names[11]
    boards = {name: Board(name) for name in names[1:]}
    burst: list[Callable[[], str]] = []

    def later(message: bytes, hear: Callable[[bytes], str]) -> None:
        burst.append(lambda: hear(message))

    for epoch in range(120):
        for name, board in boards.items():
            if epoch % 40 == 39:
                board.boot()
            later(board.quote(digest(f"old {epoch}")[:16]), watch.hear)
            if name in (names[1], denied):
                later(board.receipt(), watch.hear_receipt)
    boards[denied].receipts -= 1
    no_fresh_evidence_in(watch, 1)
    watch.epoch(link_was_up=False)
    tracemalloc.start()
    for at in range(7):
        for hear in burst[at::7]:
            hear()
    for board in boards.values():
        quote = board.quote(watch.nonce)
        watch.hear(quote)
        if board.name == forked:
            twin = board.copy()
            twin.counter -= 1
            watch.hear(twin.quote(watch.nonce, uptime_s=9))
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {name: watch.tier(name) for name in honest} == dict.fromkeys(honest, AFFIRMING)
    assert (watch.tier(forked), watch.tier(denied)) == (CONTRAINDICATED, CONTRAINDICATED)
    assert held_bytes < len(boards) * 48 * 1024


def test_31_a_burst_of_strangers_and_of_appraisals_by_those_who_do_not_count_is_not_remembered() -> None:
    watch = Watch()
    before = watch.verifier.boards
    stranger = Watch("zz", ("zz", "b"))
    stranger.hear(Board().quote(stranger.nonce))
    for appraisal in stranger.verifier.appraisals_due(0):
        assert not watch.verifier.hear_appraisal(appraisal)
    for number in range(200):
        assert not watch.word(f"x{number}", Action.REVOKE)
    assert watch.verifier.boards == before
    assert watch.verifier.opinions.of("b") == ()
    assert watch.verifier.to_keep(watch.now_us + 10 * EPOCH_US, everything=True).keys() <= set(before)


def test_31_offline_days_themselves_cost_nobody_its_standing() -> None:
    board = Board()
    watch = watched(board)
    for _ in range(5000):
        watch.epoch(link_was_up=False)
    assert watch.tier() is AFFIRMING
    watch.epoch()
    assert watch.tier() is WARNING


# 32: key revoked mid-stream; sticky FAIL


def test_32_a_board_revoked_while_it_works_stays_out_whatever_it_shows() -> None:
    board = Board()
    watch = watched(board)
    assert watch.word("b", Action.REVOKE, serial=5)
    assert watch.tier() is CONTRAINDICATED
    assert watch.reasons() == "revoked by operator ops: as it is"
    for _ in range(5):
        watch.epoch()
        watch.hear(board.quote(watch.nonce))
    watch.restart()
    watch.hear(board.quote(watch.nonce))
    assert watch.tier() is CONTRAINDICATED


def test_32_only_a_newer_word_clears_and_an_older_one_never_counts_again() -> None:
    board = Board()
    watch = watched(board)
    watch.word("b", Action.REVOKE, serial=5)
    assert not watch.word("b", Action.CLEAR, serial=5)
    assert not watch.word("b", Action.CLEAR, serial=4)
    assert watch.tier() is CONTRAINDICATED
    assert watch.word("b", Action.CLEAR, serial=6)
    assert watch.tier() is NONE
    watch.hear(board.quote(watch.nonce))
    watch.keep()
    watch.restart()
    assert not watch.word("b", Action.REVOKE, serial=5)
    watch.hear(board.quote(watch.nonce))
    assert watch.tier() is AFFIRMING


def test_32_a_failure_sticks_through_good_quotes_silence_reboots_and_restarts() -> None:
    board = Board()
    watch = watched(board)
    good = board.measured
    board.measured = replace(GOOD, models=(replace(MODEL, mapped=digest("poisoned")),))
    watch.hear(board.quote(watch.nonce))
    board.measured = good
    for _ in range(4):
        watch.epoch()
        board.boot()
        watch.hear(board.quote(watch.nonce))
        watch.restart()
    no_fresh_evidence_in(watch, 5)
    assert watch.tier() is CONTRAINDICATED


def test_32_what_an_operator_cleared_is_not_held_against_the_board_when_it_is_heard_again() -> None:
    board = Board()
    watch = Watch()
    one, other = board.copy().quote(watch.nonce, uptime_s=1), board.quote(watch.nonce)
    watch.hear(one, other)
    assert watch.tier() is CONTRAINDICATED
    watch.word("b", Action.CLEAR)
    assert "before an operator cleared" in watch.hear(one)
    assert "before an operator cleared" in watch.hear(other)
    assert watch.tier() is NONE
    assert not watch.hear(board.quote(watch.nonce))
    watch.hear(one, other)
    assert watch.tier() is AFFIRMING


def test_32_a_board_that_was_set_up_anew_is_taken_after_an_operator_cleared_it_and_not_before() -> None:
    board = Board(bootcount=50, counter=8)
    watch = watched(board)
    old = board.quote(watch.nonce)
    no_fresh_evidence_in(watch, 2)
    anew = Board(seed=digest("anew"))
    assert "rolled back" in watch.hear(anew.copy().quote(watch.nonce))
    watch.word("b", Action.CLEAR)
    assert not watch.hear(anew.quote(watch.nonce))
    assert "before an operator cleared" in watch.hear(old)
    assert watch.tier() is AFFIRMING
    assert watch.hear(anew.copy().quote(uptime_s=1)) == "it has no nonce of this verifier's last two epochs"
    assert watch.hear(anew.quote(uptime_s=2)) == "two quotes with number 2 of boot 1"
    assert watch.tier() is CONTRAINDICATED


def test_32_a_fork_of_receipts_that_was_cleared_is_not_found_again_and_a_new_one_is() -> None:
    board = Board()
    watch = watched(board)
    fork = board.copy().receipt(request=1), board.receipt(request=2)
    for message in fork:
        watch.hear_receipt(message)
    assert watch.tier() is CONTRAINDICATED
    watch.word("b", Action.CLEAR)
    for message in fork:
        assert watch.hear_receipt(message) == ""
    watch.hear(board.quote(watch.nonce))
    for message in fork:
        assert watch.hear_receipt(message) == ""
    assert watch.tier() is AFFIRMING
    watch.hear_receipt(board.copy().receipt(request=3))
    assert watch.hear_receipt(board.receipt(request=4)) == "two receipts with number 2"


def test_32_proof_that_another_verifier_still_shows_does_not_count_once_the_cleared_board_has_shown_itself() -> None:
    watch, slow = Watch("a"), Watch("c")
    board = Board()
    watch.hear(board.quote(watch.nonce, slow.nonce))
    slow.hear(board.copy().quote(slow.nonce, uptime_s=1), board.quote(slow.nonce))
    assert slow.tier() is CONTRAINDICATED
    (told,) = [each for each in slow.verifier.appraisals_due(0) if each.board == "b"]
    watch.word("b", Action.CLEAR)
    assert not watch.hear(board.quote(watch.nonce))
    watch.verifier.hear_appraisal(told)
    assert watch.tier() is AFFIRMING


# 33: different quotes to different peers


def different_quotes() -> tuple[Watch, Watch, Watch, bytes, bytes]:
    """Board b shows one quote to a and another, with the same number, to c; d has heard neither."""
    watch, other, third = Watch("a"), Watch("c"), Watch("d")
    board = Board()
    twin = board.copy()
    one = board.quote(watch.nonce)
    two = twin.quote(other.nonce, uptime_s=1)
    watch.hear(one)
    other.hear(two)
    return watch, other, third, one, two


def test_33_different_quotes_to_different_peers_are_found_by_digests_and_proven_by_both() -> None:
    watch, other, third, one, two = different_quotes()
    watch.tell(other, third)
    assert other.tier() is AFFIRMING, "a verifier's word on a digest contraindicates nobody"
    other.now_us += EPOCH_US // 30
    (shown,) = [each for each in other.tell(watch, third) if each.board == "b"]
    assert shown.raw == (two,)
    assert watch.tier() is CONTRAINDICATED
    (proof,) = [each for each in watch.tell(other, third) if each.board == "b"]
    assert set(proof.raw) == {one, two}
    assert proof_of(proof, third.key) == "two quotes with number 1 of boot 1"
    assert (other.tier(), third.tier()) == (CONTRAINDICATED, CONTRAINDICATED)


def test_33_proof_counts_everywhere_by_one_verifier_even_where_two_must_agree() -> None:
    third = Watch("d", attest=settings(agree=2))
    watch, other, _, _, _ = different_quotes()
    watch.tell(other)
    other.now_us += EPOCH_US // 30
    other.tell(watch)
    watch.tell(third)
    assert third.verifier.agreed_tier("b", {"a", "c", "d"}) is CONTRAINDICATED
    assert third.verifier.agreed_tier("b", {"c", "d"}) is not CONTRAINDICATED


def test_33_two_chains_that_never_share_a_number_are_found_where_they_touch() -> None:
    watch, other = Watch("a"), Watch("c")
    board = Board()
    first = board.quote(watch.nonce, other.nonce)
    watch.hear(first)
    other.hear(first)
    twin = board.copy()
    watch.hear(board.quote(watch.nonce))
    twin.quote(uptime_s=1)
    other.hear(twin.quote(other.nonce, uptime_s=1))
    watch.tell(other)
    other.now_us += EPOCH_US // 30
    other.tell(watch)
    assert watch.tier() is CONTRAINDICATED
    assert "follows another quote 2 than was shown" in watch.reasons()
    (proof,) = [each for each in watch.tell() if each.board == "b"]
    assert proof_of(proof, watch.key)


def test_33_a_verifier_that_lies_about_a_digest_contraindicates_nobody() -> None:
    watch, liar = Watch("a"), Watch("c")
    board = Board()
    watch.hear(board.quote(watch.nonce, liar.nonce))
    liar.hear(board.copy().quote(liar.nonce, uptime_s=3))
    lie = [replace(each, evidence=digest("made up"), bootcount=1, counter=1) for each in liar.verifier.appraisals_due(0)]
    for appraisal in lie:
        watch.verifier.hear_appraisal(appraisal)
    assert watch.tier() is AFFIRMING
    (answer,) = [each for each in watch.tell() if each.board == "b"]
    assert len(answer.raw) == 1, "it shows which quote it was shown"
    watch.epoch()
    (later,) = [each for each in watch.tell() if each.board == "b"]
    assert later.raw == (), "and not for ever"


def test_33_the_same_words_do_not_make_a_quote_that_is_no_quote_of_the_board_count() -> None:
    """Raw quotes are believed by their own signature alone, and only of the board that the appraisal is about."""
    watch, liar = Watch("a"), Watch("c")
    watch.hear(Board().quote(watch.nonce))
    one, two = Board("d").quote(uptime_s=1), Board("d").quote(uptime_s=2)
    liar.hear(Board().quote(liar.nonce))
    (said,) = [each for each in liar.verifier.appraisals_due(0) if each.board == "b"]
    for number, raw in enumerate([(one, two), (one[:-1] + b"\0", two), (b"junk", one)]):
        watch.verifier.hear_appraisal(replace(said, sequence=100 + number, raw=raw))
    assert watch.verifier.agreed_tier("b", {"c"}) is AFFIRMING
    assert (watch.tier("b"), watch.tier("d")) == (AFFIRMING, NONE)


def test_33_only_so_much_is_remembered_of_each_board() -> None:
    board = Board()
    watch = watched(board)
    for _ in range(100):
        watch.hear(board.quote(watch.nonce))
        watch.hear_receipt(board.receipt())
    standing = watch.verifier.standing("b")
    assert standing is not None
    assert standing.history.remembered == (TRACES, TRACES)
