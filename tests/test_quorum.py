"""Whose word counts, and what they say together: functions of sets, the same on every board."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.attest.appraisal import Appraisal, Vector
from edge_agent.attest.opinions import Opinions
from edge_agent.attest.quorum import (
    NEIGHBOURS,
    Opinion,
    Published,
    agreed_tier,
    is_contraindicated,
    verifiers_of,
    verifiers_of_all,
)
from edge_agent.core.values import TrustTier
from tests.attested import digest, find_key
from tests.drawn import board_ids
from tests.verifying import Board, settings

AFFIRMING, WARNING, NONE, CONTRAINDICATED = (
    TrustTier.AFFIRMING, TrustTier.WARNING, TrustTier.NONE, TrustTier.CONTRAINDICATED,
)  # fmt: skip
HOUSE = verifiers_of_all("abcdef", settings())


def said(board: str = "b", **tiers: TrustTier | Opinion) -> dict[tuple[str, str], Opinion]:
    return {(who, board): tier if isinstance(tier, Opinion) else Opinion(tier) for who, tier in tiers.items()}


def agreed(
    opinions: dict[tuple[str, str], Opinion],
    agree: int = 1,
    online: str = "abcdef",
    ceiling: dict[str, TrustTier] | None = None,
    revoked: str = "",
) -> TrustTier:
    return agreed_tier("b", Published(HOUSE, opinions, online, ceiling or {}, revoked), agree)


# who verifies whom


def test_in_a_house_everybody_verifies_everybody_but_itself() -> None:
    for board, verifiers in verifiers_of_all("abcdefgh", settings()).items():
        assert set(verifiers) == set("abcdefgh") - {board}


def test_the_named_verifiers_that_are_members_verify_all_but_themselves() -> None:
    named = settings(verifiers=frozenset({"a", "b", "stranger"}))
    assert verifiers_of("c", "abcd", named) == ("a", "b")
    assert verifiers_of("b", "abcd", named) == ("a",)


def test_beyond_a_house_the_next_seven_in_the_ring_do() -> None:
    members = [f"n{number:03}" for number in range(100)]
    assert verifiers_of("n010", members, settings()) == tuple(f"n{number:03}" for number in range(11, 18))
    assert verifiers_of("n098", members, settings()) == ("n000", "n001", "n002", "n003", "n004", "n005", "n099")


@given(st.sets(board_ids, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_each_verifies_as_many_as_verify_it_whatever_the_order_of_members(members: set[str], chance: random.Random) -> None:
    shuffled = list(members)
    chance.shuffle(shuffled)
    verifiers = verifiers_of_all(shuffled, settings())
    assert verifiers == {board: verifiers_of(board, members, settings()) for board in members}
    count = min(NEIGHBOURS, len(members) - 1)
    for board in members:
        assert len(set(verifiers[board]) - {board}) == count
        assert sum(board in others for others in verifiers.values()) == count


# what they say together


def test_nothing_is_known_of_a_board_that_nobody_appraised() -> None:
    assert agreed({}) is NONE
    assert agreed_tier("stranger", Published(HOUSE, {("a", "stranger"): Opinion(AFFIRMING)}, "abcdef"), 1) is NONE


def test_the_best_tier_that_enough_verifiers_reach_counts() -> None:
    opinions = said(a=AFFIRMING, c=WARNING, d=NONE)
    assert [agreed(opinions, agree) for agree in (1, 2, 3, 4)] == [AFFIRMING, WARNING, NONE, NONE]


def test_enough_of_them_contraindicate_and_fewer_do_not() -> None:
    opinions = said(a=CONTRAINDICATED, c=CONTRAINDICATED, d=AFFIRMING, e=AFFIRMING)
    assert agreed(opinions, 1) is agreed(opinions, 2) is CONTRAINDICATED
    assert agreed(opinions, 3) is NONE


def test_one_that_lies_condemns_nobody_alone_where_there_is_another_to_ask() -> None:
    lone = said(a=CONTRAINDICATED, c=WARNING)
    assert agreed(lone) is NONE, "but what asks for trust does not go there"
    assert agreed(lone | said("a", d=CONTRAINDICATED, e=CONTRAINDICATED)) is WARNING, "unless the accuser is out itself"
    pair = Published({"a": ("b",), "b": ("a",)}, said(a=CONTRAINDICATED), "ab")
    assert agreed_tier("b", pair, 1) is CONTRAINDICATED, "of two boards there is nobody else"


def test_proof_needs_no_majority() -> None:
    assert agreed(said(a=Opinion(CONTRAINDICATED, proven=True), c=AFFIRMING, d=AFFIRMING), 2) is CONTRAINDICATED


def test_who_is_not_there_or_does_not_verify_the_board_is_not_asked() -> None:
    assert agreed(said(a=CONTRAINDICATED, c=WARNING), online="bc") is WARNING
    assert agreed(said(zz=AFFIRMING), online="zz") is NONE
    assert agreed(said(b=AFFIRMING)) is NONE


def test_a_contraindicated_verifiers_praise_does_not_count() -> None:
    opinions = said(a=AFFIRMING, c=WARNING) | said("a", c=CONTRAINDICATED, d=CONTRAINDICATED)
    assert agreed(opinions) is WARNING


def test_a_verifier_that_is_barred_or_proven_to_lie_neither_accuses_nor_proves() -> None:
    accusing = said(a=Opinion(CONTRAINDICATED, proven=True), c=WARNING)
    assert agreed(accusing, revoked="a") is WARNING
    assert agreed(accusing, ceiling={"a": CONTRAINDICATED}) is WARNING
    proven_liar = said(a=CONTRAINDICATED, c=WARNING) | said("a", d=Opinion(CONTRAINDICATED, proven=True))
    assert agreed(proven_liar) is WARNING


def test_two_that_are_accused_by_each_other_and_a_third_are_out_and_a_fourth_still_counts() -> None:
    opinions = said("a", c=CONTRAINDICATED, e=CONTRAINDICATED) | said("c", a=CONTRAINDICATED, e=CONTRAINDICATED)
    opinions |= said("b", a=AFFIRMING, c=AFFIRMING, d=WARNING)
    published = Published(HOUSE, opinions, "abcdef")
    assert is_contraindicated("a", published, 1)
    assert is_contraindicated("c", published, 1)
    assert agreed(opinions) is WARNING


def test_the_ceiling_and_an_operators_word_hold_whatever_was_said() -> None:
    praised = said(a=AFFIRMING, c=AFFIRMING)
    assert agreed(praised, ceiling={"b": WARNING}) is WARNING
    assert agreed(praised, ceiling={"b": CONTRAINDICATED}) is CONTRAINDICATED
    assert agreed(praised, revoked="b") is CONTRAINDICATED


opinion_tables = st.dictionaries(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")),
    st.builds(Opinion, st.sampled_from(TrustTier), st.sampled_from([False, False, False, True])),
    max_size=30,
)


@given(opinion_tables, st.sets(st.sampled_from("abcdef")), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_order_of_anything_never_matters(
    opinions: dict[tuple[str, str], Opinion], online: set[str], agree: int, chance: random.Random
) -> None:
    shuffled = list(opinions.items())
    chance.shuffle(shuffled)
    for board in "abcdef":
        one = agreed_tier(board, Published(HOUSE, opinions, frozenset(online)), agree)
        assert one is agreed_tier(board, Published(HOUSE, dict(shuffled), sorted(online, reverse=True)), agree)


@given(opinion_tables, st.integers(1, 4), st.sampled_from("abcdef"))
def test_fewer_than_enough_hostile_verifiers_without_proof_neither_praise_nor_damn(
    opinions: dict[tuple[str, str], Opinion], agree: int, board: str
) -> None:
    honest = {key: replace(opinion, proven=False) for key, opinion in opinions.items() if key[0] not in "ef"}
    hostile = {key: replace(opinion, proven=False) for key, opinion in opinions.items() if key[0] in "ef"[: agree - 1]}
    tier = agreed_tier(board, Published(HOUSE, honest | hostile, "abcdef"), agree)
    of_honest = [opinion.tier for (verifier, of), opinion in honest.items() if of == board != verifier]
    assert tier is not CONTRAINDICATED or CONTRAINDICATED in of_honest
    assert tier <= max([NONE, *of_honest])


# what was published, joined


def an_appraisal(**changes: object) -> Appraisal:
    return replace(Appraisal("a", 1, 1, "b", WARNING, Vector(2)), **changes)  # type: ignore[arg-type]


def opinions_of_house() -> Opinions:
    return Opinions(HOUSE, 1, {}, find_key)


def test_the_newest_appraisal_counts_and_a_reboot_counts_as_newer() -> None:
    held = opinions_of_house()
    assert held.join(an_appraisal(sequence=9))
    assert not held.join(an_appraisal(sequence=8, tier=AFFIRMING))
    assert not held.join(an_appraisal(sequence=9))
    assert held.agreed_tier("b", "a") is WARNING
    assert held.join(an_appraisal(boot_epoch=2, sequence=1, tier=AFFIRMING))
    assert held.agreed_tier("b", "a") is AFFIRMING


def test_an_appraisal_by_who_does_not_count_is_not_remembered() -> None:
    held = opinions_of_house()
    for stranger in (an_appraisal(verifier="zz"), an_appraisal(verifier="b"), an_appraisal(board="zz")):
        assert not held.join(stranger)
        assert held.of(stranger.board) == ()


def test_quotes_are_looked_at_once_and_not_kept() -> None:
    held = opinions_of_house()
    board = Board()
    twin = board.copy()
    raw = (board.quote(), twin.quote(uptime_s=1))
    held.join(an_appraisal(tier=CONTRAINDICATED, raw=raw))
    assert held.of("b") == (an_appraisal(tier=CONTRAINDICATED),)
    assert held.is_proven("b")
    held.join(an_appraisal(sequence=2, tier=WARNING, raw=raw[:1]))
    assert not held.is_proven("b")


drawn_appraisals = st.builds(
    an_appraisal,
    verifier=st.sampled_from("acd"),
    sequence=st.integers(1, 3),
    tier=st.sampled_from(TrustTier),
    evidence=st.sampled_from([b"", digest("x")]),
    reasons=st.sampled_from([(), ("x",)]),
)


@given(st.lists(drawn_appraisals, max_size=12), st.randoms(use_true_random=False))
def test_the_join_is_commutative_and_idempotent_even_over_a_verifier_that_says_two_things_at_once(
    appraisals: list[Appraisal], chance: random.Random
) -> None:
    shuffled = appraisals * 2
    chance.shuffle(shuffled)
    one, other = opinions_of_house(), opinions_of_house()
    for each in appraisals:
        one.join(each)
    for each in shuffled:
        other.join(each)
    assert one.of("b") == other.of("b")
    assert one.agreed_tier("b", "acd") is other.agreed_tier("b", "acd")
