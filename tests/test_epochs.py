"""Freshness: whose nonce is good, how long and how often, and the signed words that carry nonces."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.attest.epoch import (
    AAD_CHALLENGE,
    AAD_EPOCH,
    Challenge,
    EpochMark,
    Epochs,
    HeardEpochs,
    open_challenge,
    open_epoch,
    sign_challenge,
    sign_epoch,
)
from edge_agent.attest.evidence import MAX_NONCES, Quote
from edge_agent.core.cbor import encode
from edge_agent.core.cose import decode_sign1, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_BOARDS
from tests.attested import a_quote, challenges, digest, find_key, key_of_any, marks, nonces, refused_when_broken, signer

PERIOD_US = 30_000_000
NONCE = digest("nonce")[:16]


def verifier(secret: str = "secret", boot_epoch: int = 1) -> Epochs:
    return Epochs("v", boot_epoch, digest(secret), PERIOD_US)


def turned(epochs: Epochs, now_us: int) -> EpochMark:
    mark = epochs.turn(now_us)
    assert mark is not None
    return mark


def with_nonce(*given: bytes, board: str = "b") -> Quote:
    return a_quote(nonces=given, board=board)


# ---- the verifier -------------------------------------------------------------------------------------------------------


def test_an_epoch_begins_at_once_and_then_when_the_last_is_over() -> None:
    epochs = verifier()
    assert epochs.mark is None and epochs.counter == 0
    first = turned(epochs, 5)
    assert epochs.turn(5 + PERIOD_US - 1) is None and epochs.mark == first
    second = turned(epochs, 5 + PERIOD_US)
    assert (first.number, second.number) == ((1, 1), (1, 2)) and first.nonce != second.nonce
    assert epochs.counter == 2 and epochs.mark == second


def test_the_nonces_of_this_epoch_and_the_one_before_are_fresh_and_no_other() -> None:
    epochs = verifier()
    said = [turned(epochs, n * PERIOD_US).nonce for n in range(8)]
    for age, nonce in enumerate(reversed(said)):
        assert epochs.fresh(with_nonce(nonce)) == (age < 2), age
    assert epochs.fresh(with_nonce(NONCE, said[-1])) and not epochs.fresh(with_nonce(NONCE)) and not epochs.fresh(with_nonce())


def test_a_nonce_that_was_not_said_yet_is_not_fresh() -> None:
    epochs = verifier()
    turned(epochs, 0)
    ahead = verifier()
    turned(ahead, 0)
    nonce_to_come = turned(ahead, PERIOD_US).nonce
    assert not epochs.fresh(with_nonce(nonce_to_come))


def test_before_the_first_epoch_nothing_is_fresh() -> None:
    zero = verifier()
    assert not zero.fresh(with_nonce(zero._nonce_of(0)))
    turned(zero, 0)
    assert not zero.fresh(with_nonce(zero._nonce_of(0)))


def test_after_a_restart_no_old_nonce_is_fresh() -> None:
    before, after = verifier("one boot"), verifier("the next", boot_epoch=2)
    old = [turned(before, n * PERIOD_US).nonce for n in range(2)] + [challenged(before, "b").nonce]
    turned(after, 0)
    turned(after, PERIOD_US)
    assert not any(after.fresh(with_nonce(nonce)) for nonce in old)


def test_after_a_gap_no_nonce_from_before_it_is_fresh() -> None:
    epochs = verifier()
    before = turned(epochs, 0)
    asked = challenged(epochs, "b")
    after = turned(epochs, 10 * PERIOD_US)
    assert after.counter == before.counter + 2
    assert not epochs.fresh(with_nonce(before.nonce)) and not epochs.fresh(with_nonce(asked.nonce))
    assert epochs.fresh(with_nonce(after.nonce))


def challenged(epochs: Epochs, board: str) -> Challenge:
    challenge = epochs.challenge(board)
    assert challenge is not None and challenge.board == board
    return challenge


def test_a_challenge_is_good_once_and_for_the_board_that_was_asked() -> None:
    epochs = verifier()
    turned(epochs, 0)
    asked = challenged(epochs, "b")
    assert not epochs.fresh(with_nonce(asked.nonce, board="c"))
    assert epochs.fresh(with_nonce(asked.nonce))
    assert not epochs.fresh(with_nonce(asked.nonce))


def test_an_open_challenge_is_repeated_and_an_answered_one_is_not() -> None:
    epochs = verifier()
    turned(epochs, 0)
    first = challenged(epochs, "b")
    assert challenged(epochs, "b") == first != challenged(epochs, "c")
    epochs.fresh(with_nonce(first.nonce))
    assert challenged(epochs, "b").nonce != first.nonce


def test_a_quote_with_an_epochs_nonce_leaves_the_challenge_open() -> None:
    epochs = verifier()
    mark, asked = turned(epochs, 0), challenged(epochs, "b")
    assert epochs.fresh(with_nonce(mark.nonce)) and epochs.fresh(with_nonce(asked.nonce))


def test_a_challenge_ends_with_the_epoch_after_its_own() -> None:
    for turns, good in ((1, True), (2, False)):
        epochs = verifier()
        turned(epochs, 0)
        asked = challenged(epochs, "b")
        for n in range(turns):
            turned(epochs, (n + 1) * PERIOD_US)
        assert epochs.fresh(with_nonce(asked.nonce)) == good


def test_challenges_that_nobody_answers_are_bounded() -> None:
    epochs = verifier()
    turned(epochs, 0)
    asked = [epochs.challenge(f"b{n}") for n in range(MAX_BOARDS + 5)]
    assert all(asked[:MAX_BOARDS]) and not any(asked[MAX_BOARDS:])
    turned(epochs, PERIOD_US)
    turned(epochs, 2 * PERIOD_US)
    assert epochs.challenge("late") is not None


@given(st.lists(st.integers(0, 3 * PERIOD_US), max_size=30))
def test_every_nonce_is_drawn_once_and_the_window_is_two_epochs_whatever_the_clock_does(steps: list[int]) -> None:
    epochs, now_us, said = verifier(), 0, dict[bytes, int]()
    for step_us in steps:
        now_us += step_us
        mark = epochs.turn(now_us)
        for nonce in [mark.nonce] if mark else [challenged(epochs, f"b{now_us}-{len(said)}").nonce]:
            assert nonce not in said
            said[nonce] = mark.counter if mark else 0
    for nonce, counter in said.items():
        if counter:
            assert epochs.fresh(with_nonce(nonce)) == (epochs.counter - counter in (0, 1))


# ---- the attester -------------------------------------------------------------------------------------------------------


def test_the_newest_mark_of_each_verifier_counts() -> None:
    heard = HeardEpochs()
    old, new, next_boot = (EpochMark("v", *number, digest(str(number))[:16]) for number in ((1, 9), (1, 10), (2, 1)))
    assert heard.hear(new) and not heard.hear(new) and not heard.hear(old)
    assert heard.nonces(["v"]) == (new.nonce,)
    assert heard.hear(next_boot) and not heard.hear(new)
    assert heard.nonces(["v"]) == (next_boot.nonce,)


def test_only_what_its_own_verifiers_said_goes_into_a_quote_in_one_order() -> None:
    heard = HeardEpochs()
    for board in ("z", "y", "stranger"):
        heard.hear(EpochMark(board, 1, 1, digest(board)[:16]))
    heard.hear_challenge(Challenge("z", "b", NONCE))
    heard.hear_challenge(Challenge("stranger", "b", digest("other")[:16]))
    assert heard.nonces(("z", "y", "silent")) == heard.nonces(("y", "z")) == (NONCE, digest("y")[:16], digest("z")[:16])


def test_a_challenge_goes_into_quotes_until_it_is_answered() -> None:
    heard, asked = HeardEpochs(), Challenge("v", "b", NONCE)
    assert heard.hear_challenge(asked) and not heard.hear_challenge(asked)
    assert heard.nonces(["v"]) == (NONCE,)
    heard.answered()
    assert heard.nonces(["v"]) == ()
    assert heard.hear_challenge(replace(asked, nonce=digest("next")[:16]))


def test_what_an_attester_holds_is_bounded_and_fits_a_quote() -> None:
    heard = HeardEpochs()
    names = [f"v{n}" for n in range(MAX_BOARDS + 5)]
    taken = [heard.hear(EpochMark(name, 1, 1, digest(name)[:16])) for name in names]
    asked = [heard.hear_challenge(Challenge(name, "b", digest("c" + name)[:16])) for name in names]
    assert sum(taken) == sum(asked) == MAX_BOARDS
    assert heard.hear(EpochMark("v0", 1, 2, NONCE))
    given = heard.nonces(names)
    assert len(given) == MAX_NONCES and set(given) <= {digest("c" + name)[:16] for name in names}
    a_quote(nonces=given)


# ---- on the wire --------------------------------------------------------------------------------------------------------


@given(marks)
def test_a_mark_comes_back_as_it_was_signed(mark: EpochMark) -> None:
    assert open_epoch(sign_epoch(mark, signer(mark.verifier)), key_of_any) == mark


@given(challenges)
def test_a_challenge_comes_back_as_it_was_signed(challenge: Challenge) -> None:
    assert open_challenge(sign_challenge(challenge, signer(challenge.verifier)), key_of_any) == challenge


def test_every_bit_flip_and_truncation_of_an_epoch_mark_is_refused() -> None:
    refused_when_broken(sign_epoch(EpochMark("b", 3, 4, NONCE), signer("b")), lambda message: open_epoch(message, find_key))


def test_every_bit_flip_and_truncation_of_a_challenge_is_refused() -> None:
    message = sign_challenge(Challenge("b", "c", NONCE), signer("b"))
    refused_when_broken(message, lambda message: open_challenge(message, find_key))


def test_a_mark_or_challenge_in_anothers_name_is_refused() -> None:
    with pytest.raises(RefusedError, match="own signature"):
        open_epoch(sign_epoch(EpochMark("b", 3, 4, NONCE), signer("c")), find_key)
    with pytest.raises(RefusedError, match="own signature"):
        open_challenge(sign_challenge(Challenge("b", "a", NONCE), signer("c")), find_key)


def test_a_mark_is_no_challenge_and_a_challenge_no_mark() -> None:
    mark, challenge = (
        sign_epoch(EpochMark("b", 3, 4, NONCE), signer("b")),
        sign_challenge(Challenge("b", "c", NONCE), signer("b")),
    )
    for message, aad in ((mark, AAD_CHALLENGE), (challenge, AAD_EPOCH)):
        with pytest.raises(RefusedError):
            open_challenge(mark, find_key)
        with pytest.raises(RefusedError):
            open_epoch(challenge, find_key)
        with pytest.raises(RefusedError):
            (open_challenge if aad == AAD_CHALLENGE else open_epoch)(
                sign1(decode_sign1(message).payload, signer("b"), aad), find_key
            )


@given(nonces)
def test_a_nonce_of_another_length_is_refused(nonce: bytes) -> None:
    for wrong in (nonce[:15], nonce + b"\0", b""):
        with pytest.raises(RefusedError, match="length"):
            open_epoch(sign1(encode({1: "b", 2: 1, 3: 1, 4: wrong}), signer("b"), AAD_EPOCH), find_key)
        with pytest.raises(RefusedError, match="length"):
            open_challenge(sign1(encode({1: "b", 2: "c", 3: wrong}), signer("b"), AAD_CHALLENGE), find_key)
