"""How one attester stands: the lifecycle's table, decay, strikes, what sticks, what is kept over a restart."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.attest.appraisal import MAX_REASONS, Vector
from edge_agent.attest.claims import NOT_FRESH, Verdict
from edge_agent.attest.evidence import NO_DIGEST, open_quote
from edge_agent.attest.history import History, QuoteTrace, ReceiptTrace, contradiction, receipt_clash, receipts_clash
from edge_agent.attest.keeping import KEEP_BOOT_PERIOD_US, KEEP_PERIOD_US, MAX_KEPT_BYTES, Keeper, Kept, decode_kept, encode_kept
from edge_agent.attest.standing import MAX_STRIKES, MOVES, STRIKE_WINDOW, UNHEARD, Floor, Move, Standing, State
from edge_agent.attest.words import Action, OperatorWord
from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from tests.attested import digest, find_key
from tests.verifying import Board

AFFIRMING, WARNING, NONE, CONTRAINDICATED = (
    TrustTier.AFFIRMING, TrustTier.WARNING, TrustTier.NONE, TrustTier.CONTRAINDICATED,
)  # fmt: skip
FINE = Verdict(AFFIRMING, Vector(2, 2, 2, 2))
BAD = Verdict(CONTRAINDICATED, Vector(executables=96), ("bad",))


def shown(standing: Standing, board: Board, verdict: Verdict = FINE) -> str:
    message = board.quote()
    quote = open_quote(message, find_key)
    why = standing.hear_quote(message, quote, fresh=True)
    standing.shown(quote, message, verdict)
    return why


def epochs(standing: Standing, count: int, *, counts: bool = True, asked: bool = True) -> None:
    for _ in range(count):
        standing.asked_in_epoch = asked
        standing.epoch_over(counts)


def in_state(state: State) -> Standing:
    standing = Standing(missed=3)
    board = Board()
    if state is not State.UNKNOWN:
        shown(standing, board, BAD if state is State.CONTRAINDICATED else FINE)
    if state in (State.STALE, State.LAPSED):
        standing.epoch_over(True)
        epochs(standing, 1 if state is State.STALE else 3)
    assert standing.state is state
    return standing


@pytest.mark.parametrize(("state", "move"), list(product(State, Move)))
def test_every_move_is_in_the_table_or_raises_and_changes_nothing(state: State, move: Move) -> None:
    standing = in_state(state)
    if (state, move) in MOVES:
        standing.move(move)
        assert standing.state is MOVES[state, move]
    else:
        with pytest.raises(RuntimeError, match=f"{state} cannot be {move}"):
            standing.move(move)
        assert standing.state is state


def test_only_a_cleared_board_leaves_the_contraindicated() -> None:
    assert {move for (state, move), to in MOVES.items() if state is State.CONTRAINDICATED and to is not state} == {Move.CLEARED}
    assert {move for (_, move), to in MOVES.items() if to is State.CONTRAINDICATED} == {Move.FOUND, Move.SHOWN}
    assert MOVES[State.LAPSED, Move.SHOWN] is State.FRESH


# decay


@pytest.mark.parametrize("missed", [1, 2, 3, 10])
def test_trust_decays_to_warning_after_one_epoch_and_to_nothing_after_so_many(missed: int) -> None:
    standing = Standing(missed)
    board = Board()
    shown(standing, board)
    standing.epoch_over(True)
    tiers = []
    for _ in range(missed + 2):
        epochs(standing, 1)
        tiers.append(standing.verdict().tier)
    assert tiers == [WARNING] * (missed - 1) + [NONE] * 3
    assert not shown(standing, board)
    assert standing.verdict() == FINE


def test_a_stale_verdict_says_for_how_long_and_keeps_its_reasons() -> None:
    standing = Standing(3)
    shown(standing, Board(), Verdict(WARNING, Vector(2, executables=33), ("agent code",)))
    standing.epoch_over(True)
    epochs(standing, 1)
    assert standing.verdict() == Verdict(WARNING, Vector(NOT_FRESH, executables=33), ("agent code",))
    standing = in_state(State.STALE)
    assert standing.verdict().reasons == ("no fresh evidence for 1 epoch",)
    epochs(standing, 1)
    assert standing.verdict().reasons == ("no fresh evidence for 2 epochs",)
    epochs(standing, 1)
    assert standing.verdict() == Verdict(NONE, Vector(), ("no fresh evidence for 3 epochs",))


def test_an_epoch_that_was_not_all_heard_or_in_which_nobody_asked_does_not_count() -> None:
    standing = in_state(State.FRESH)
    standing.epoch_over(True)
    epochs(standing, 9, counts=False)
    epochs(standing, 9, asked=False)
    assert standing.state is State.FRESH
    epochs(standing, 1)
    assert standing.state is State.STALE


# strikes


def test_one_wrong_answer_of_an_exact_kind_is_enough() -> None:
    standing = in_state(State.FRESH)
    standing.struck(exact=True, what="other bits")
    assert standing.verdict() == Verdict(CONTRAINDICATED, Vector(executables=96), ("a wrong answer: other bits",))


@pytest.mark.parametrize(("good_between", "caught"), [(0, True), (STRIKE_WINDOW - 2, True), (STRIKE_WINDOW - 1, False)])
def test_outside_the_tolerance_two_within_the_window_are(good_between: int, caught: bool) -> None:
    standing = in_state(State.FRESH)
    standing.struck(exact=False, what="far off")
    assert standing.verdict() == FINE
    for _ in range(good_between):
        standing.checked()
    standing.struck(exact=False, what="far off")
    assert (standing.state is State.CONTRAINDICATED) is caught
    assert len(standing.strikes) <= MAX_STRIKES


# what sticks


def test_later_finds_add_to_what_is_held_against_a_board_within_bounds() -> None:
    standing = in_state(State.CONTRAINDICATED)
    for number in range(20):
        standing.revoked("ops", f"again {number}")
    held = standing.verdict()
    assert held.vector == Vector(instance_identity=96, executables=96)
    assert (held.reasons[0], len(held.reasons)) == ("bad", MAX_REASONS)


def test_proof_of_two_quotes_takes_the_place_of_one_and_stays() -> None:
    standing = Standing(3)
    board = Board()
    shown(standing, board, BAD)
    assert len(standing.proof) == 1
    twin = board.copy()
    for message in (board.quote(), twin.quote(uptime_s=1)):
        standing.hear_quote(message, open_quote(message, find_key), fresh=False)
    proof = standing.proof
    assert len(proof) == 2
    shown(standing, board, BAD)
    assert standing.proof == proof


def test_clearing_forgets_everything_but_how_far_the_board_had_come() -> None:
    standing = in_state(State.CONTRAINDICATED)
    standing.struck(exact=False, what="far off")
    standing.clear()
    assert standing.verdict() == UNHEARD
    assert (standing.proof, standing.strikes, standing.history.mark) == ((), (), None)
    assert standing.floor == Floor((1, 1), digest("b1"))


# what contradicts what

forks = st.sampled_from(["", "seed", "previous", "receipts", "head", "bytes"])


def two_quotes(gap: int, boots: int, receipts: int, fork: str) -> tuple[bytes, bytes]:
    """One quote, and one ``gap`` quotes, ``boots`` boots and ``receipts`` receipts later; where ``fork`` says so, a lie."""
    board = Board()
    for _ in range(3):
        board.receipt()
    first = board.copy()
    one = board.quote()
    if fork == "bytes":
        return one, first.quote(uptime_s=1)
    for _ in range(boots):
        board.boot()
    for _ in range(gap):
        board.quote()
    for _ in range(receipts):
        board.receipt()
    lies = {
        "seed": {"bootseed": digest("other")}, "previous": {"previous": digest("other")}, "receipts": {"receipts": 2},
        "head": {"receipts_head": digest("other")},
    }  # fmt: skip
    return one, board.quote(**lies.get(fork, {}))


@given(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2), forks, st.booleans())
def test_traces_contradict_each_other_exactly_when_whole_quotes_do(
    gap: int, boots: int, receipts: int, fork: str, swapped: bool
) -> None:
    one, other = two_quotes(gap, boots, receipts, fork)[:: -1 if swapped else 1]
    quotes = open_quote(one, find_key), open_quote(other, find_key)
    whole = contradiction(quotes[0], one, quotes[1], other)
    assert bool(whole) == (
        fork in ("bytes", "receipts")
        or (fork == "seed" and not boots)
        or (fork == "previous" and not boots and not gap)
        or (fork == "head" and not receipts)
    )


def test_receipts_are_put_in_order_with_quotes_by_the_quote_that_they_name() -> None:
    quote = QuoteTrace(1, 5, digest("seed"), digest("q"), digest("p"), 10, digest("r10"))
    r10, r11 = ReceiptTrace(10, digest("r10"), digest("r9"), (1, 4)), ReceiptTrace(11, digest("r11"), digest("r10"), (1, 5))
    assert (receipt_clash(quote, r10), receipt_clash(quote, r11), receipts_clash(r10, r11)) == ("", "", "")
    assert "signed after" in receipt_clash(quote, ReceiptTrace(10, digest("r10"), digest("r9"), (1, 5)))
    assert "counts only 10" in receipt_clash(quote, ReceiptTrace(11, digest("r11"), digest("r10"), (1, 4)))
    assert "another than the last" in receipt_clash(quote, ReceiptTrace(10, digest("x"), digest("r9"), (1, 4)))
    assert "does not follow" in receipt_clash(quote, ReceiptTrace(11, digest("r11"), digest("x"), (1, 5)))
    assert "counted anew" in receipts_clash(ReceiptTrace(3, digest("r3"), digest("r2"), (2, 0)), r10)
    assert receipts_clash(r10, r10) == ""


def test_a_contradiction_with_a_quote_that_is_not_held_whole_is_found_and_shows_what_there_is() -> None:
    board, history = Board(), History()
    twin = board.copy()
    for _ in range(5):
        message = board.quote()
        history.add_quote(QuoteTrace.of(open_quote(message, find_key), message), message)
    forged = twin.quote(uptime_s=1)
    clash = history.clash_of_quote(QuoteTrace.of(open_quote(forged, find_key), forged), forged)
    assert clash is not None
    assert clash.raw == (forged,)


# what is kept

seeds = st.binary(min_size=32, max_size=32)
places = st.tuples(st.integers(0, 2**53), st.integers(0, 2**53))
traces = st.builds(
    QuoteTrace, st.integers(0, 2**53), st.integers(1, 2**53), seeds, seeds, seeds, st.integers(0, 2**53), seeds
)  # fmt: skip
found = st.builds(
    Verdict, st.just(CONTRAINDICATED), st.builds(Vector, st.integers(-128, 127), executables=st.just(96)),
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=3).map(tuple),
)  # fmt: skip
kept_words = st.builds(OperatorWord, st.just("ops"), st.just("b"), st.integers(1, 2**53), st.sampled_from(Action), st.just("why"))


@st.composite
def standings(draw: st.DrawFn) -> Standing:
    standing = Standing(3)
    standing.recall(
        mark=draw(st.none() | traces),
        floor=draw(st.none() | st.builds(Floor, places, seeds)),
        found=(verdict := draw(st.none() | found)),
        proof=tuple(draw(st.lists(st.binary(min_size=1, max_size=20), max_size=2))) if verdict else (),
        checks=draw(st.integers(0, 2**53)),
        strikes=tuple(draw(st.lists(st.integers(1, 2**53), max_size=MAX_STRIKES))),
    )
    return standing


@given(standings(), st.none() | kept_words)
def test_what_is_kept_is_read_back_the_same(standing: Standing, word: OperatorWord | None) -> None:
    data = encode_kept(Kept(standing, word))
    kept = decode_kept(data, "b", 3)
    assert kept.standing is not None
    assert encode_kept(kept) == data
    assert (kept.word, kept.standing.found, kept.standing.proof) == (word, standing.found, standing.proof)
    assert (kept.standing.history.mark, kept.standing.floor) == (standing.history.mark, standing.floor)
    assert kept.standing.state is (State.CONTRAINDICATED if standing.found else State.UNKNOWN)


def a_kept_map() -> dict[int, object]:
    standing = Standing(3)
    board = Board()
    twin = board.copy()
    for message in (board.quote(), twin.quote(uptime_s=1)):
        standing.hear_quote(message, open_quote(message, find_key), fresh=True)
    standing.floor = Floor((1, 0), NO_DIGEST)
    standing.checked()
    standing.struck(exact=False, what="x")
    value = decode(encode_kept(Kept(standing, OperatorWord("ops", "b", 1, Action.CLEAR))))
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (1, []), (1, [1, 2, b"short", NO_DIGEST, NO_DIGEST, 0, NO_DIGEST]), (1, [True, 2, *[NO_DIGEST] * 3, 0, NO_DIGEST]),
        (1, [1, -2, *[NO_DIGEST] * 3, 0, NO_DIGEST]), (2, [1, 1]), (2, [1, 1, b""]), (3, [2] * 8), (3, [96]), (3, None),
        (3, [999] * 8),
        (4, None), (4, ["x" * 257]), (4, ["x"] * 9), (4, [""]), (5, [b"x"] * 3), (5, [b""]), (5, []),
        (6, ["ops", 0, "clear", ""]),
        (6, ["ops", 1, "bless", ""]), (6, ["ops", 1, "clear"]), (7, 0), (7, -1), (7, 2**54), (8, [1] * 3), (8, [-1]), (9, 1),
    ],
)  # fmt: skip
def test_what_was_not_kept_by_us_is_refused(key: int, value: object) -> None:
    entry = a_kept_map()
    decode_kept(encode(entry), "b", 3)
    broken = {**entry, key: value} if value is not None else {name: each for name, each in entry.items() if name != key}
    with pytest.raises(RefusedError):
        decode_kept(encode(broken), "b", 3)
    with pytest.raises(RefusedError):
        decode_kept(bytes(MAX_KEPT_BYTES + 1), "b", 3)


def test_proof_outlives_a_restart() -> None:
    kept = decode_kept(encode(a_kept_map()), "b", 3)
    assert kept.standing is not None
    assert kept.standing.verdict().reasons == ("two quotes with number 1 of boot 1",)
    one, other = kept.standing.proof
    assert contradiction(open_quote(one, find_key), one, open_quote(other, find_key), other)


def test_what_is_held_against_a_board_is_written_at_once_and_how_far_it_came_once_a_minute() -> None:
    keeper, standing, board = Keeper(), Standing(3), Board()
    kept = Kept(standing)

    def due(now_us: int, everything: bool = False) -> bool:
        return keeper.due("b", kept, now_us, everything)

    assert due(0)
    shown(standing, board)
    assert not due(KEEP_BOOT_PERIOD_US - 1) and due(KEEP_BOOT_PERIOD_US), "it booted"
    shown(standing, board)
    assert not due(KEEP_BOOT_PERIOD_US + KEEP_PERIOD_US - 1)
    assert due(KEEP_BOOT_PERIOD_US + KEEP_PERIOD_US)
    assert not due(9 * KEEP_PERIOD_US), "nothing is new"
    shown(standing, board)
    assert due(9 * KEEP_PERIOD_US + 2), "a minute went by"
    shown(standing, board)
    assert due(9 * KEEP_PERIOD_US + 3, everything=True)
    shown(standing, board, BAD)
    assert due(9 * KEEP_PERIOD_US + 4)
    standing.clear()
    assert due(9 * KEEP_PERIOD_US + 5)
