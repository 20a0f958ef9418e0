"""What a board fetches: a few artefacts at a time, each begun once, none waited for in vain, all told to the fleet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

from edge_agent.transport.topics import Topics
from ota import events
from ota.chunks import MAX_WHOLE_BYTES, Wants, encode_chunk, open_wants
from ota.events import Abandon, Done, Finish, Finished, Leave, Listen, Note, Open, Opened, Say, Store, Stored
from ota.lifecycle import Need
from ota.transfers import ANSWER_LIMIT_US, MAX_AT_ONCE, MAX_NEVER, RETRY_US, SAY_PERIOD_US, Transfers
from tests.one_board import FLEET, KEYS, SECOND_US, bytes_of, digest, file_of, signer

E = TypeVar("E", bound=events.Effect)
TOPICS = Topics(FLEET)


def need(number: int, pieces: int = 2, seeds: tuple[bytes, ...] = ()) -> Need:
    file = file_of(bytes_of(number, size_bytes=pieces * 65_536))
    return Need(file.digest, file.size_bytes, file, seeds, "m")


def small(number: int) -> Need:
    data = bytes_of(number, size_bytes=500)
    return Need(digest(data), len(data))


class Fetcher:
    """``Transfers`` with a clock; effects of the last call, and all of them."""

    def __init__(self, *needs: Need, held: Iterable[bytes] = ()) -> None:
        self.transfers = Transfers("b1", 1, signer("b1"), TOPICS, held)
        self.needs, self.now_us, self.effects = list(needs), SECOND_US, list[events.Effect]()
        self.transfers.turned(True)
        self.go_on()

    def go_on(self, after_us: int = 0) -> list[events.Effect]:
        self.now_us += after_us
        new = [*self.transfers.go_on(self.needs, self.now_us)]
        self.effects += new
        return new

    def opened(self, need: Need, held: int = 0, **why: Any) -> list[events.Effect]:
        self.transfers.opened(Opened(need.digest, held, **why), self.now_us)
        return self.go_on()

    def piece(self, number: int, index: int, token: int = 1, pieces: int = 2) -> list[events.Effect]:
        data = bytes_of(number, size_bytes=pieces * 65_536)
        payload = encode_chunk(index, data[index * 65_536 : (index + 1) * 65_536])
        new = [*self.transfers.heard(digest(data), payload, token)]
        self.effects += new
        return new

    def stored(self, need: Need, index: int, why: str = "") -> list[events.Effect]:
        new = [*self.transfers.stored(Stored(need.digest, index, 0, why), self.now_us)]
        self.effects += new
        return [*new, *self.go_on()]

    def finished(self, need: Need, **why: Any) -> list[events.Effect]:
        self.transfers.finished(Finished(need.digest, **why), self.now_us)
        return self.go_on(SAY_PERIOD_US)

    def all(self, kind: type[E]) -> list[E]:
        return [each for each in self.effects if isinstance(each, kind)]

    @property
    def wants(self) -> list[Wants]:
        return [open_wants(each.message.payload, lambda kid: KEYS[kid.decode()]) for each in self.all(Say)]

    def open_all(self) -> list[bytes]:
        return [each.artefact.digest for each in self.all(Open)]


def test_an_artefact_is_opened_listened_to_written_and_finished_once() -> None:
    one = need(1)
    fetcher = Fetcher(one)
    fetcher.opened(one)
    assert fetcher.all(Listen) == [Listen(TOPICS.ota_chunk(one.digest.hex()))]
    for index in (1, 0):
        assert [type(each) for each in fetcher.piece(1, index)] == [Store]
        fetcher.stored(one, index)
    assert fetcher.all(Finish) == [Finish(one.digest)] and fetcher.all(Leave)
    fetcher.finished(one)
    assert fetcher.transfers.holds(one.digest) and not fetcher.transfers.pending
    fetcher.go_on(SECOND_US)
    assert len(fetcher.all(Open)) == 1, "it is held, and asked for no more"


def test_13_a_duplicate_a_wrong_and_a_late_piece_are_acknowledged_and_not_written() -> None:
    one = need(1)
    fetcher = Fetcher(one)
    assert fetcher.piece(1, 0, token=4) == [Done(4)], "not open yet"
    fetcher.opened(one)
    fetcher.piece(1, 0)
    assert fetcher.piece(1, 0, token=5) == [Done(5)]
    wrong = [*fetcher.transfers.heard(one.digest, encode_chunk(1, b"x" * 65_536), 6)]
    assert [type(each) for each in wrong] == [Note, Done]
    fetcher.needs = []
    fetcher.go_on()
    assert fetcher.piece(1, 1, token=7) == [Done(7)]
    assert len(fetcher.all(Store)) == 1


def test_a_flood_of_pieces_that_are_none_does_not_fill_the_log() -> None:
    one = need(1)
    fetcher = Fetcher(one)
    fetcher.opened(one)
    notes = [each for _ in range(1000) for each in fetcher.transfers.heard(one.digest, b"\x00", 1) if isinstance(each, Note)]
    assert len(notes) == 10 and "512 such by now" in notes[-1].text


def test_files_are_fetched_a_few_at_a_time_and_single_pieces_never_wait() -> None:
    fetcher = Fetcher(need(1), need(2), need(3), small(4), small(5))
    assert fetcher.open_all() == [each.digest for each in (need(1), need(2), small(4), small(5))]
    assert MAX_AT_ONCE == 2


def test_what_is_begun_goes_on_when_something_else_becomes_the_first_need() -> None:
    """A charter, or another model, in the middle of a large file costs nothing of what was fetched."""
    fetcher = Fetcher(need(1), need(2))
    fetcher.opened(need(1))
    fetcher.needs = [small(9), need(8), need(2), need(1)]
    fetcher.go_on()
    assert not fetcher.all(Abandon) and fetcher.open_all()[-1] == small(9).digest
    fetcher.needs = [need(8), need(2)]
    fetcher.go_on()
    assert fetcher.all(Abandon) == [Abandon(need(1).digest), Abandon(small(9).digest)]
    assert fetcher.open_all()[-1] == need(8).digest


def test_a_single_piece_that_is_in_the_cache_and_was_never_read_is_read_from_there() -> None:
    """Power failed after it was adopted, and before what it says was durable."""
    fetcher = Fetcher(small(1), held=[small(1).digest])
    assert fetcher.open_all() == [small(1).digest] and fetcher.all(Open)[0].seeds == (small(1).digest,)
    fetcher.opened(small(1), held=1)
    assert fetcher.all(Finish) == [Finish(small(1).digest)]


def test_a_file_that_may_have_been_evicted_is_not_held_and_is_taken_from_the_cache_if_it_is_there_yet() -> None:
    fetcher = Fetcher(held=[need(1).digest, need(2).digest])
    fetcher.transfers.keep_only({need(2).digest})
    fetcher.needs = [need(1, seeds=(b"s" * 32,)), need(2)]
    fetcher.go_on()
    assert fetcher.open_all() == [need(1).digest] and fetcher.all(Open)[0].seeds == (need(1).digest, b"s" * 32)


@pytest.mark.parametrize("doing", ["opening", "storing", "finishing"])
def test_an_answer_of_the_disk_that_never_comes_is_asked_for_again(doing: str) -> None:
    one = need(1)
    fetcher = Fetcher(one)
    if doing != "opening":
        fetcher.opened(one)
        for index in (0, 1):
            fetcher.piece(1, index)
            if doing == "finishing":
                fetcher.stored(one, index)
    fetcher.go_on()
    fetcher.go_on(ANSWER_LIMIT_US - 1)
    assert len(fetcher.open_all()) == 1 and not fetcher.transfers.why
    fetcher.go_on(1)
    assert "the disk gave no answer" in fetcher.transfers.why, "it is in the report"
    fetcher.go_on(RETRY_US)
    assert len(fetcher.open_all()) == 2
    fetcher.opened(one, held=3)
    assert fetcher.all(Finish)[-1] == Finish(one.digest) and not fetcher.transfers.why


@pytest.mark.parametrize("doing", ["open", "store", "finish"])
def test_18_a_disk_that_is_full_is_said_and_tried_again_when_there_may_be_room(doing: str) -> None:
    one = need(1)
    fetcher = Fetcher(one)
    if doing == "open":
        fetcher.opened(one, why="no space left")
    else:
        fetcher.opened(one)
        for index in (0, 1):
            fetcher.piece(1, index)
            fetcher.stored(one, index, why="no space left" if doing == "store" and index else "")
        if doing == "finish":
            fetcher.finished(one, why="no space left")
    assert fetcher.transfers.why == "no space left"
    fetcher.go_on(RETRY_US // 2)
    assert len(fetcher.open_all()) == 1
    fetcher.go_on(RETRY_US // 2)
    assert len(fetcher.open_all()) == 2
    assert not fetcher.all(Leave) or fetcher.all(Leave)[-1] == Leave(TOPICS.ota_chunk(one.digest.hex()))


def test_while_nothing_can_be_written_nobody_is_asked_to_send() -> None:
    one = need(1)
    fetcher = Fetcher(one)
    fetcher.opened(one)
    fetcher.go_on(SAY_PERIOD_US)
    assert fetcher.wants[-1].wants[0].lacking == 3
    fetcher.piece(1, 0)
    fetcher.stored(one, 0, why="no space left")
    fetcher.go_on(SAY_PERIOD_US)
    assert fetcher.wants[-1].wants == ()


@pytest.mark.parametrize("refused", ["opened", "finished"])
def test_what_can_never_be_had_is_not_asked_for_again(refused: str) -> None:
    one = need(1)
    fetcher = Fetcher(one)
    if refused == "opened":
        fetcher.opened(one, why="larger than the cache", refused=True)
    else:
        fetcher.opened(one, held=3)
        fetcher.finished(one, why="larger than the cache", refused=True)
    fetcher.go_on(10 * RETRY_US)
    assert fetcher.open_all() == [one.digest] and not fetcher.transfers.pending
    assert fetcher.transfers.why_never(one.digest) == "larger than the cache"


def test_a_target_that_is_larger_than_any_message_is_refused_and_raises_nothing() -> None:
    huge = Need(digest(b"huge"), MAX_WHOLE_BYTES + 1)
    fetcher = Fetcher(huge)
    assert not fetcher.open_all() and "got 3145729;" in fetcher.transfers.why_never(huge.digest)
    assert len([each for each in fetcher.all(Note) if "of no use here" in each.text]) == 1


def test_what_is_remembered_of_refused_artefacts_is_bounded_and_the_newest_stay() -> None:
    transfers = Fetcher().transfers
    for number in range(MAX_NEVER + 50):
        transfers.refuse(number.to_bytes(32), "why")
    assert len(transfers.never) == MAX_NEVER and transfers.why_never((MAX_NEVER + 49).to_bytes(32)) == "why"


def test_answers_for_what_is_not_fetched_any_more_change_nothing() -> None:
    one = need(1)
    fetcher = Fetcher(one)
    fetcher.needs = []
    assert Abandon(one.digest) in fetcher.go_on()
    assert not fetcher.opened(one) or not fetcher.all(Listen)
    assert [*fetcher.transfers.stored(Stored(one.digest, 0, 9), fetcher.now_us)] == [Done(9)]
    fetcher.finished(one, why="its staging is gone")
    assert not fetcher.transfers.pending and not fetcher.transfers.why


def test_nothing_is_lacking_any_more_is_said_once_and_wants_are_said_no_more_often_than_they_may() -> None:
    one = need(1)
    fetcher = Fetcher(one)
    fetcher.opened(one)
    for _ in range(10):
        fetcher.go_on(SAY_PERIOD_US // 10)
    assert len(fetcher.wants) == 2 and fetcher.wants[0].wants == ()
    fetcher.piece(1, 0)
    fetcher.piece(1, 1)
    for index in (0, 1):
        fetcher.stored(one, index)
    fetcher.finished(one)
    for _ in range(10):
        fetcher.go_on(SECOND_US)
    assert len(fetcher.wants) == 3 and fetcher.wants[-1].wants == ()
    assert [each.number for each in fetcher.wants] == [1, 2, 3]


def test_36_stale_or_emptied_wants_of_this_board_are_put_right_with_the_very_same_bytes() -> None:
    """The same number: a repetition that crosses the word that it repeats ends there."""
    one = need(1)
    fetcher = Fetcher(one)
    fetcher.opened(one)
    fetcher.go_on(SAY_PERIOD_US)
    said = fetcher.all(Say)[-1]
    for stale in ((1, 1), (0, 99), None):
        before = len(fetcher.all(Say))
        fetcher.transfers.hear_own(stale)
        fetcher.go_on(SAY_PERIOD_US)
        assert fetcher.all(Say)[before:] == [said]
    fetcher.transfers.hear_own((1, 2))
    assert not fetcher.go_on(SAY_PERIOD_US), "that is the last word"


def test_a_new_connection_listens_and_asks_anew() -> None:
    one = need(1)
    fetcher = Fetcher(one)
    fetcher.opened(one)
    fetcher.go_on(SAY_PERIOD_US)
    fetcher.transfers.turned(False)
    assert not fetcher.go_on(SECOND_US)
    fetcher.transfers.turned(True)
    again = fetcher.go_on(SECOND_US)
    assert [type(each) for each in again] == [Listen, Say]


def test_how_much_is_here_is_told_while_a_transfer_rests() -> None:
    one = need(1)
    fetcher = Fetcher(one)
    fetcher.opened(one, held=1)
    assert fetcher.transfers.permille(one.digest) == 500
    fetcher.piece(1, 1)
    fetcher.stored(one, 1, why="no space left")
    assert fetcher.transfers.permille(one.digest) == 500
    assert fetcher.transfers.permille(b"x" * 32) == 0
