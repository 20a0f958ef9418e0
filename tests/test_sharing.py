"""What a board gives to its neighbours: pieces that it holds, to boards that ask, and never more than the broker stands."""

from __future__ import annotations

from dataclasses import replace

from ota.chunks import Artefact, Wants, artefact_of, want_of
from ota.events import Give
from ota.giving import MAX_OFFERS, PATIENCE_US
from ota.heard import Heard
from ota.manifest import encode_release
from ota.rollout import Progress, Report, Rollout, Step
from ota.sharing import MAX_UNDER_WAY, UNDER_WAY_US, Sharing, artefacts_of
from tests.one_board import SECOND_US, a_plan, a_release, bytes_of, digest, file_of

RATE = 100 * 2**20
LARGE = artefact_of(file_of(bytes_of(1, size_bytes=64 * 65_536)))
RANK_US = 2 * PATIENCE_US
"""After so long the first of all boards that hold something gives it."""


def wants(board: str, number: int, artefact: Artefact, lacking: int) -> Wants:
    return Wants(board, 1, number, (want_of(artefact, lacking),))


def giver(artefact: Artefact = LARGE) -> Sharing:
    sharing = Sharing("b1", RATE)
    sharing.hold([artefact])
    sharing.heard(wants("b2", 1, artefact, artefact.whole), 0)
    return sharing


def given(sharing: Sharing, now_us: int) -> list[Give]:
    return [*sharing.go_on(now_us)]


def test_so_many_pieces_are_under_way_and_no_more_until_the_broker_has_taken_one() -> None:
    sharing = giver()
    assert not given(sharing, SECOND_US), "who gives first has its time"
    first = given(sharing, RANK_US)
    assert len(first) == MAX_UNDER_WAY and len({each.index for each in first}) == MAX_UNDER_WAY
    assert not given(sharing, RANK_US + SECOND_US)
    sharing.sent(first[0].ticket)
    sharing.sent(first[0].ticket)
    sharing.sent(10**9)
    assert len(given(sharing, RANK_US + SECOND_US)) == 1, "an answer that comes twice counts once"


def test_a_piece_of_which_nothing_is_heard_again_does_not_stop_the_giving() -> None:
    sharing = giver()
    assert len(given(sharing, RANK_US)) == MAX_UNDER_WAY
    sharing.heard(Wants("b2", 1, 2, (want_of(LARGE, LARGE.whole, stalled=True),)), RANK_US + UNDER_WAY_US)
    assert not given(sharing, RANK_US + UNDER_WAY_US - SECOND_US)
    assert len(given(sharing, RANK_US + UNDER_WAY_US)) == MAX_UNDER_WAY


def test_a_new_connection_has_nothing_under_way() -> None:
    sharing = giver()
    given(sharing, RANK_US)
    sharing.restart()
    assert given(sharing, RANK_US + SECOND_US)


def test_more_than_may_be_offered_is_no_error() -> None:
    sharing = Sharing("b1", RATE)
    sharing.hold(Artefact(number.to_bytes(32), 100) for number in range(MAX_OFFERS + 10))
    sharing.hold([LARGE])
    sharing.heard(wants("b2", 1, LARGE, LARGE.whole), 0)
    assert given(sharing, RANK_US)


def test_what_is_not_held_any_more_is_not_given() -> None:
    sharing = giver()
    sharing.hold([])
    assert not given(sharing, RANK_US) and not sharing.pending(RANK_US)


def test_a_board_that_was_removed_gets_nothing_more_and_asks_anew_when_it_is_back() -> None:
    sharing = giver()
    sharing.keep_only(["b1", "b3"])
    assert not given(sharing, RANK_US)
    sharing.heard(wants("b2", 2, LARGE, LARGE.whole), RANK_US)
    assert given(sharing, 2 * RANK_US)


def test_the_slowest_rate_that_an_operator_allows_and_who_holds_what_are_taken_from_what_was_said_last() -> None:
    release = a_release()
    plan = replace(a_plan(release), rate_bytes_per_s=65_536)
    words = Heard()
    words.hear_rollout(Rollout(plan, "ann"))
    words.hear_report(Report("b3", 1, 1, progress=(Progress(plan.model, plan.serial, Step.CONFIRMED),)))
    sharing = giver(artefact_of(release.files[0]))
    sharing.look_at(words, [release])
    assert sharing._giving.rate_bytes_per_s == 65_536
    assert sharing._giving.holders[release.files[0].digest] == sharing._giving.holders[plan.manifest] == {"b3"}
    assert len(given(sharing, 2 * RANK_US)) == 1, "one piece a second"
    again = Heard()
    again.changes = words.changes
    sharing.look_at(again, [release])
    assert sharing._giving.rate_bytes_per_s == RATE, "other words of the same count are other words"


def test_all_of_a_release_is_an_artefact() -> None:
    release = a_release()
    manifest = encode_release(release)
    found = [*artefacts_of(release, digest(manifest), len(manifest))]
    assert [each.digest for each in found] == [digest(manifest), release.files[0].digest]
