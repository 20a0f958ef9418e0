"""When a board looks at the metadata that the broker keeps, and how long what it lists counts."""

from __future__ import annotations

import pytest

from edge_agent.core.errors import RefusedError
from ota.checked import MAX_DOCUMENTS, MAX_OFFERED_BYTES
from ota.events import List, Listed, NotListed
from ota.offered import (
    AFTER_FAILURE_US,
    AFTER_REFUSAL_US,
    AGAIN_US,
    ANSWER_LIMIT_US,
    MAX_AGE_US,
    MAX_SETTLE_US,
    SETTLE_US,
    Offered,
)

TARGETS = {"fleet/charter.cbor": (100, bytes(32))}
CHARTER = ("fleet/charter.cbor",)


class Looking:
    """``Offered`` with a clock."""

    def __init__(self) -> None:
        self.offered, self.now_us = Offered(), 0

    def hear(self, name: str = "timestamp", payload: bytes = b"1") -> None:
        self.offered.hear(name, payload, self.now_us)

    def look(self, after_us: int = 0, *more: str) -> List | None:
        self.now_us += after_us
        return self.offered.look({*CHARTER, *more}, {"tuf/root": 3}, self.now_us)

    def listed(self) -> None:
        self.offered.listed(Listed(TARGETS, {}), self.now_us)

    def not_listed(self, refused: bool = True, why: str = "expired") -> None:
        self.offered.not_listed(NotListed(why, refused), self.now_us)


@pytest.fixture
def settled() -> Looking:
    """It has looked once, and all was good."""
    looking = Looking()
    looking.hear()
    assert looking.look(SETTLE_US) is not None
    looking.listed()
    return looking


def test_a_look_waits_until_nothing_more_comes_and_has_all_of_it_and_the_floors() -> None:
    looking = Looking()
    looking.hear("2.root", b"root")
    assert looking.look(SETTLE_US) is None, "without a timestamp there is nothing to look at"
    looking.hear()
    assert looking.look(SETTLE_US - 1) is None and looking.offered.pending
    look = looking.look(1)
    assert look == List({"2.root": b"root", "timestamp": b"1"}, CHARTER, {"tuf/root": 3})
    assert looking.look(SETTLE_US) is None, "one at a time"


def test_16_who_sends_one_document_after_another_puts_the_look_off_no_longer_than_allowed() -> None:
    looking = Looking()
    looks = []
    for number in range(2 * MAX_SETTLE_US // (SETTLE_US // 2)):
        looking.hear("timestamp", str(number).encode())
        looks.append(looking.look(SETTLE_US // 2))
        if looks[-1] is not None:
            break
    assert looks[-1] is not None and MAX_SETTLE_US <= looking.now_us <= MAX_SETTLE_US + SETTLE_US


def test_a_new_name_that_is_wanted_is_looked_for_at_once_and_once(settled: Looking) -> None:
    assert settled.look(SETTLE_US) is None
    look = settled.look(0, "releases/m/1/release.cbor")
    assert look is not None and look.wanted == (*CHARTER, "releases/m/1/release.cbor")
    settled.listed()
    assert settled.look(SETTLE_US, "releases/m/1/release.cbor") is None


def test_3_metadata_is_looked_at_again_because_it_expires(settled: Looking) -> None:
    assert settled.look(AGAIN_US - 1) is None and settled.look(1) is not None


@pytest.mark.parametrize(("refused", "after_us"), [(True, AFTER_REFUSAL_US), (False, AFTER_FAILURE_US)])
def test_24_what_was_refused_is_looked_at_again_for_a_clock_may_have_been_set_right(refused: bool, after_us: int) -> None:
    looking = Looking()
    looking.hear()
    looking.look(SETTLE_US)
    looking.not_listed(refused)
    assert looking.offered.why == "expired"
    assert looking.look(after_us - 1) is None and looking.look(1) is not None
    looking.listed()
    assert looking.offered.why == "" and looking.offered.targets == TARGETS


def test_36_stale_metadata_that_is_refused_leaves_what_held_and_the_good_one_counts_at_once(settled: Looking) -> None:
    settled.hear(payload=b"an older one")
    assert settled.look(SETTLE_US) is not None
    settled.not_listed(why="version 4; at least 5")
    assert settled.offered.targets == TARGETS and settled.offered.why
    settled.hear(payload=b"1")
    assert settled.look(SETTLE_US) is not None
    settled.listed()
    assert not settled.offered.why


def test_36_an_emptied_document_is_taken_away_and_nothing_that_held_with_it(settled: Looking) -> None:
    settled.hear("9.targets", b"")
    settled.hear(payload=b"")
    assert settled.offered.documents == {} and settled.offered.targets == TARGETS
    assert settled.look(2 * AGAIN_US) is None
    settled.hear(payload=b"1")
    assert settled.look(SETTLE_US) is not None


def test_3_what_held_counts_a_day_at_the_most_while_what_came_since_is_refused(settled: Looking) -> None:
    """A broker that is frozen by an attacker serves no old release for ever."""
    end_us = settled.now_us + MAX_AGE_US
    while settled.now_us < end_us - AGAIN_US:
        assert settled.look(AGAIN_US) is not None
        settled.not_listed()
        assert settled.offered.targets == TARGETS
    assert settled.look(AGAIN_US) is not None
    settled.not_listed(refused=False)
    assert settled.offered.targets == TARGETS, "a check that could not be made says nothing"
    assert settled.look(AGAIN_US) is not None
    settled.not_listed()
    assert settled.offered.targets == {}


def test_an_answer_that_never_comes_is_asked_for_again_and_said(settled: Looking) -> None:
    settled.hear(payload=b"2")
    assert settled.look(SETTLE_US) is not None
    assert settled.look(ANSWER_LIMIT_US - 1) is None and not settled.offered.why
    assert settled.look(1) is not None and "nobody said within 300 s" in settled.offered.why
    settled.listed()
    assert not settled.offered.why


def test_an_answer_that_comes_twice_or_unasked_changes_nothing(settled: Looking) -> None:
    settled.not_listed()
    assert settled.offered.targets == TARGETS and not settled.offered.why
    settled.offered.listed(Listed({}, {}), settled.now_us)
    assert settled.offered.targets == TARGETS


def test_what_came_while_an_answer_was_awaited_is_looked_at_next(settled: Looking) -> None:
    settled.hear(payload=b"2")
    settled.look(SETTLE_US)
    settled.hear(payload=b"3")
    settled.listed()
    look = settled.look(SETTLE_US)
    assert look is not None and look.offered["timestamp"] == b"3"


def test_35_documents_are_bounded_in_number_and_in_bytes(settled: Looking) -> None:
    with pytest.raises(RefusedError, match=f"at most {MAX_DOCUMENTS}"):
        settled.hear("big", bytes(MAX_OFFERED_BYTES))
    for number in range(MAX_DOCUMENTS - 1):
        settled.hear(f"{number}.root", b"x")
    with pytest.raises(RefusedError, match=f"at most {MAX_DOCUMENTS}"):
        settled.hear("one.more", b"x")
    settled.hear("0.root", b"")
    settled.hear("one.more", b"x")
    assert len(settled.offered.documents) == MAX_DOCUMENTS
