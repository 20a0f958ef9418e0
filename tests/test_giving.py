"""A piece is sent once for all who want it, what is lost is repeated, and nobody who lies or lags is served at others' cost."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

import pytest

from ota import giving as giving_rules
from ota.chunks import Artefact, Want, Wants, pieces_of, set_of, want_of
from ota.fetching import HEARTBEAT_US, MAX_STALL_US, STALL_US, WANT_PIECES, Fetching
from ota.giving import PATIENCE_US, WINDOW_PIECES, Giving
from ota.manifest import CHUNK_BYTES
from ota.offer import ANEW_PIECES, ANEW_US

SECOND_US = 1_000_000
BROKER_QUEUE = 1000
"""Of one client, in messages: Mosquitto's max_queued_messages; the newest gives way."""


def artefact(count: int, name: str = "model") -> Artefact:
    """Of ``count`` pieces, each of which is its own index in a repeated form."""
    chunks = b"".join(sha256(piece(index, name)).digest() for index in range(count))
    return Artefact(sha256(name.encode()).digest(), count * CHUNK_BYTES, chunks)


def piece(index: int, name: str = "model") -> bytes:
    return (b"%s %08d " % (name.encode(), index)).ljust(32, b".") * (CHUNK_BYTES // 32)


@dataclass
class Board:
    """One that fetches: takes ``per_tick`` messages from its queue at the broker in a tick of 10 ms; ``hears`` says which."""

    name: str
    fetching: Fetching
    per_tick: int = 4
    hears: Callable[[int], bool] = lambda _: True
    queue: deque[int] = field(default_factory=deque)
    boot: int = 1
    number: int = 0
    came: Counter[int] = field(default_factory=Counter)
    dropped: int = 0
    present: bool = True
    from_us: int = 0

    def deliver(self, index: int) -> None:
        if not self.present or self.fetching.done:
            return
        if len(self.queue) >= BROKER_QUEUE:
            self.dropped += 1
        else:
            self.queue.append(index)

    def turn(self) -> None:
        for _ in range(min(self.per_tick, len(self.queue))):
            index = self.queue.popleft()
            if self.hears(index):
                self.came[index] += 1
                self.fetching.heard(index, PIECES[index])

    def wants(self, now_us: int) -> Wants | None:
        if (
            now_us < self.from_us
            or not self.present
            or not (self.fetching.want_due(now_us) or (self.fetching.done and self.number))
        ):
            return None
        self.number += 1
        told = () if self.fetching.done else (self.fetching.ask(now_us),)
        if self.fetching.done:
            self.present = False
        return Wants(self.name, self.boot, self.number, told)


MODEL = artefact(1200)
PIECES = [piece(index) for index in range(MODEL.count)]
TICK_US = 10_000


class Fleet:
    """Givers and boards around a broker, in ticks of 10 ms; a giver sends ``per_tick`` pieces at the most."""

    def __init__(
        self, givers: list[Giving], boards: list[Board], per_tick: int = 40, mixed: bool = False, model: Artefact = MODEL
    ) -> None:
        self.givers, self.boards, self.per_tick, self.now_us = givers, boards, per_tick, 0
        self.sent: Counter[int] = Counter()
        self.mixed = Random(0) if mixed else None
        self.off: set[str] = set()
        for each in givers:
            each.hold(model)

    def tick(self, liars: Callable[[int], list[Wants]] = lambda _: []) -> None:
        self.now_us += TICK_US
        wants = [told for board in self.boards if (told := board.wants(self.now_us))] + liars(self.now_us)
        for giver in self.givers:
            for told in wants:
                giver.heard_wants(told, self.now_us)
            self._give(giver)
        for board in self.boards:
            board.turn()

    def _give(self, giver: Giving) -> None:
        indices = []
        for _ in range(0 if giver.me in self.off else self.per_tick):
            chosen = giver.next(self.now_us)
            if chosen is None:
                break
            giver.sent(*chosen, self.now_us)
            indices.append(chosen[1])
        if self.mixed:
            self.mixed.shuffle(indices)
        self.sent.update(indices)
        for board in self.boards:
            for index in indices:
                board.deliver(index)

    def until_done(self, limit_s: int, names: set[str] | None = None, liars: Callable[[int], list[Wants]] = lambda _: []) -> None:
        waited_for = [each for each in self.boards if names is None or each.name in names]
        while not all(each.fetching.done for each in waited_for):
            self.tick(liars)
            assert self.now_us < limit_s * SECOND_US, [(each.name, each.fetching.permille) for each in self.boards]


def operator(rate: int = 0) -> Giving:
    return Giving("desk", rate, first=True)


def boards(count: int, held: int = 0, per_tick: int = 4) -> list[Board]:
    return [Board(f"b{number}", Fetching(MODEL, held), per_tick) for number in range(count)]


def test_a_piece_is_sent_once_for_all_who_want_it() -> None:
    fleet = Fleet([operator()], boards(20))
    fleet.until_done(60)
    assert sum(fleet.sent.values()) == MODEL.count
    assert all(each.dropped == 0 for each in fleet.boards)


def test_pieces_that_overtake_each_other_are_not_taken_for_lost() -> None:
    fleet = Fleet([operator()], boards(3), mixed=True)
    fleet.until_done(60)
    assert sum(fleet.sent.values()) == MODEL.count


def test_what_a_board_holds_already_is_not_sent_for_it() -> None:
    held = MODEL.whole & ~0b1011
    fleet = Fleet([operator()], boards(3, held))
    fleet.until_done(10)
    assert fleet.sent == {0: 1, 1: 1, 3: 1}


def test_a_board_that_lacks_little_is_done_before_the_many_pieces_of_others() -> None:
    little = Board("little", Fetching(MODEL, MODEL.whole & ~(0b111 << 1000)))
    fleet = Fleet([operator()], [*boards(1), little])
    fleet.until_done(2, {"little"})
    assert sum(fleet.boards[0].came.values()) < 100


@pytest.mark.parametrize("lost_permille", [10, 300])
def test_what_is_lost_on_the_way_is_repeated_and_only_that(lost_permille: int) -> None:
    random = Random(lost_permille)
    fleet = Fleet([operator()], [Board("b", Fetching(MODEL), hears=lambda _: random.randrange(1000) >= lost_permille)])
    fleet.until_done(300)
    received = sum(fleet.boards[0].came.values())
    assert received <= MODEL.count * 1.05
    assert sum(fleet.sent.values()) <= MODEL.count * 1.1 / (1 - lost_permille / 1000)


def test_a_stall_at_99_percent_is_overcome() -> None:
    heard: Counter[int] = Counter()

    def hears(index: int) -> bool:
        heard[index] += 1
        return index < MODEL.count - 12 or heard[index] > 2

    fleet = Fleet([operator()], [Board("b", Fetching(MODEL), hears=hears)])
    fleet.until_done(60)
    assert sum(fleet.sent.values()) == MODEL.count + 2 * 12


def test_a_broker_that_drops_what_its_queue_does_not_hold_costs_repeats_not_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving_rules, "WINDOW_PIECES", 10**9)
    slow = Board("slow", Fetching(MODEL), per_tick=1)
    fleet = Fleet([operator()], [slow], per_tick=400)
    fleet.until_done(120)
    assert slow.dropped > 100
    assert max(slow.came.values()) == 1


def test_the_window_keeps_the_queue_of_a_slow_board_from_overflowing() -> None:
    slow = Board("slow", Fetching(MODEL), per_tick=1)
    fleet = Fleet([operator()], [slow], per_tick=400)
    fleet.until_done(120)
    assert (slow.dropped, sum(fleet.sent.values())) == (0, MODEL.count)
    assert WINDOW_PIECES + WANT_PIECES < BROKER_QUEUE


def test_a_slow_board_does_not_hold_up_the_others() -> None:
    quick = boards(2, per_tick=20)
    slow = Board("slow", Fetching(MODEL), hears=lambda _: True, per_tick=1)
    alone = Fleet([operator()], boards(2, per_tick=20))
    alone.until_done(30)
    fleet = Fleet([operator()], [*quick, slow])
    fleet.until_done(30, {"b0", "b1"})
    assert fleet.now_us <= alone.now_us + SECOND_US
    fleet.until_done(300)


def lying(kind: str) -> Callable[[int], list[Wants]]:
    """A member of the fleet that wants more than it can need: ``always`` says that all it lacks is lost, ``flicker`` takes back
    what it had said to have, ``anew`` stops asking and asks again, ``reboots`` says that it forgot everything."""
    number = 0

    def say(now_us: int) -> list[Wants]:
        nonlocal number
        if now_us % 50_000:
            return []
        number += 1
        boot, wants = 1, (want_of(MODEL, MODEL.whole, stalled=True),)
        if kind == "flicker" and number % 2:
            wants = (want_of(MODEL, MODEL.whole & ~(MODEL.whole >> 1)),)
        elif kind == "anew" and number % 40 == 0:
            wants = ()
        elif kind == "reboots":
            boot = number
        return [Wants("liar", boot, number, wants)]

    return say


@pytest.mark.parametrize("kind", ["always", "flicker", "anew", "reboots"])
def test_a_lying_wanter_gets_a_bounded_share_and_starves_nobody(kind: str) -> None:
    honest = boards(3, per_tick=20)
    fleet = Fleet([operator()], honest, per_tick=10)
    liars = lying(kind)
    fleet.until_done(15, {"b0", "b1", "b2"}, liars)
    while fleet.now_us < 120 * SECOND_US:
        fleet.tick(liars)
    hours, boots = fleet.now_us / 3.6e9, ANEW_PIECES * (fleet.now_us / ANEW_US + 1) if kind == "reboots" else 0
    assert sum(fleet.sent.values()) <= MODEL.count * (1 + 2 + 1 + hours) + boots + WINDOW_PIECES


def held_by(board: Board) -> int:
    artefact = board.fetching.artefact
    return artefact.whole & ~board.fetching.lacking


def test_a_small_model_arrives_though_the_power_fails_two_dozen_times() -> None:
    """Each time what is on its way is lost, and some pieces that were there."""
    small = artefact(125)
    board = Board("b0", Fetching(small))
    fleet = Fleet([operator(rate=20 * CHUNK_BYTES)], [board], model=small)
    for cut in range(1, 25):
        while held_by(board).bit_count() < small.count * cut // 25:
            fleet.tick()
            assert fleet.now_us < 3600 * SECOND_US, (cut, board.fetching.permille)
        board.present = False
        for _ in range(1500):
            fleet.tick()
        fleet.givers[0].gone(board.name)
        fleet.now_us += 60 * SECOND_US
        held = held_by(board)
        lost = set_of(pieces_of(held)[-8:], small.count)
        board.queue.clear()
        board.fetching, board.boot, board.present = Fetching(small, held & ~lost), board.boot + 1, True
    fleet.until_done(3600)


def test_first_sends_go_before_repeats() -> None:
    honest = boards(1, per_tick=20)
    fleet = Fleet([operator()], honest, per_tick=1)
    fleet.until_done(60, {"b0"}, lying("always"))
    assert sum(fleet.sent.values()) <= MODEL.count * 4 / 3 + WANT_PIECES


def test_boards_that_ask_within_a_quarter_of_a_second_are_served_together() -> None:
    late = boards(12)
    for number, each in enumerate(late):
        each.from_us = number * 20_000
    fleet = Fleet([operator()], late)
    fleet.until_done(60)
    assert sum(fleet.sent.values()) == MODEL.count


def test_a_board_that_is_gone_for_good_is_sent_a_window_at_the_most() -> None:
    fleet = Fleet([operator()], [])
    fleet.tick(lambda _: [Wants("dead", 1, 1, (want_of(MODEL, MODEL.whole),))])
    for _ in range(3000):
        fleet.tick()
    assert sum(fleet.sent.values()) <= WINDOW_PIECES
    assert fleet.givers[0].next_us(fleet.now_us) is None


def test_nothing_is_sent_for_a_board_that_left() -> None:
    fleet = Fleet([operator()], boards(1))
    for _ in range(100):
        fleet.tick()
    before = sum(fleet.sent.values())
    assert 0 < before < MODEL.count
    fleet.boards[0].present = False
    fleet.givers[0].gone("b0")
    for _ in range(1000):
        fleet.tick()
    assert sum(fleet.sent.values()) == before


def test_neighbours_give_when_the_operator_is_away_one_at_a_time_in_the_order_of_their_rank() -> None:
    givers = [Giving(name) for name in ("n1", "n2", "n3")]
    for each in givers:
        each.holders = {MODEL.digest: frozenset({"n1", "n2", "n3"})}
    fleet = Fleet(givers, boards(4))
    fleet.until_done(60)
    assert fleet.now_us >= PATIENCE_US
    assert sorted(each.given_pieces for each in givers) == [0, 0, MODEL.count]


def test_the_next_in_rank_steps_in_for_a_holder_that_gives_nothing() -> None:
    givers = [Giving(name) for name in ("n1", "n2", "n3")]
    for each in givers:
        each.holders = {MODEL.digest: frozenset({"n1", "n2", "n3"})}
    rehearsal = Fleet(givers, boards(1))
    rehearsal.until_done(60)
    best = max(givers, key=lambda each: each.given_pieces).me
    again = [Giving(name) for name in ("n1", "n2", "n3")]
    for each in again:
        each.holders = {MODEL.digest: frozenset({"n1", "n2", "n3"})}
    fleet = Fleet(again, boards(1))
    fleet.off = {best}
    fleet.until_done(120)
    assert sum(fleet.sent.values()) == MODEL.count


def test_a_drip_does_not_keep_the_neighbours_quiet() -> None:
    """A giver that sends a piece every four seconds is as good as none."""
    miser, helper = operator(CHUNK_BYTES // 4), Giving("n1")
    helper.holders = {MODEL.digest: frozenset({"n1"})}
    fleet = Fleet([miser, helper], boards(1))
    fleet.until_done(90)
    assert helper.given_pieces > MODEL.count * 0.9


@pytest.mark.parametrize(("taken", "given", "begun"), [(1, 2, 100), (1, 40, 300), (2, 40, 600)])
def test_a_neighbour_and_the_operator_who_comes_back_cost_little_more_than_one(taken: int, given: int, begun: int) -> None:
    desk, helper = operator(), Giving("n1")
    helper.holders = {MODEL.digest: frozenset({"n1"})}
    fleet = Fleet([desk, helper], boards(2, per_tick=taken), per_tick=given)
    fleet.off = {"desk"}
    while helper.given_pieces < begun:
        fleet.tick()
    fleet.off = set()
    fleet.until_done(200)
    assert sum(fleet.sent.values()) <= MODEL.count + 2 * WINDOW_PIECES


def test_a_neighbour_stops_when_the_operator_gives_again() -> None:
    desk, helper = operator(), Giving("n1")
    helper.holders = {MODEL.digest: frozenset({"n1"})}
    fleet = Fleet([desk, helper], boards(2, per_tick=1), per_tick=2)
    fleet.off = {"desk"}
    while helper.given_pieces < 100:
        fleet.tick()
    fleet.off = set()
    fleet.until_done(200)
    assert desk.given_pieces > 2 * helper.given_pieces


def test_the_rate_is_kept() -> None:
    giver = operator(10 * CHUNK_BYTES)
    fleet = Fleet([giver], boards(1))
    while fleet.now_us < 20 * SECOND_US:
        fleet.tick()
        due_us = giver.next_us(fleet.now_us)
        assert due_us is None or due_us > fleet.now_us
    assert 190 <= giver.given_pieces <= 201


def test_two_artefacts_are_given_side_by_side() -> None:
    other = artefact(300, "other")
    giver = operator()
    giver.hold(MODEL)
    giver.hold(other)
    giver.heard_wants(Wants("b", 1, 1, (want_of(MODEL, MODEL.whole), want_of(other, other.whole))), 0)
    given: list[bytes] = []
    for now_us in range(SECOND_US, SECOND_US + 40):
        chosen = giver.next(now_us)
        assert chosen is not None
        giver.sent(*chosen, now_us)
        given.append(chosen[0])
    assert Counter(given) == {MODEL.digest: 20, other.digest: 20}


def test_a_want_that_came_before_the_artefact_is_remembered() -> None:
    giver = operator()
    giver.heard_wants(Wants("b", 1, 1, (want_of(MODEL, 0b100),)), SECOND_US)
    assert giver.next(2 * SECOND_US) is None
    giver.hold(MODEL)
    assert giver.next(3 * SECOND_US) == (MODEL.digest, 2)


def test_a_want_that_does_not_fit_the_artefact_is_not_served() -> None:
    giver = operator()
    giver.hold(MODEL)
    giver.heard_wants(Wants("b", 1, 1, (Want(MODEL.digest, MODEL.size_bytes, 2 * CHUNK_BYTES, 0b1),)), 0)
    giver.heard_wants(Wants("c", 1, 1, (Want(MODEL.digest, MODEL.size_bytes - 1, CHUNK_BYTES, 0b1),)), 0)
    assert giver.next(SECOND_US) is None


def test_an_older_want_that_comes_later_is_not_heard() -> None:
    giver = operator()
    giver.hold(MODEL)
    giver.heard_wants(Wants("b", 2, 7, (want_of(MODEL, 0b10),)), 0)
    giver.heard_wants(Wants("b", 2, 6, (want_of(MODEL, 0b1),)), 0)
    giver.heard_wants(Wants("b", 1, 99, ()), 0)
    assert giver.next(SECOND_US) == (MODEL.digest, 1)


def test_what_is_remembered_of_wants_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving_rules, "MAX_REMEMBERED_BITS", 3 * MODEL.count)
    giver = operator()
    for number in range(5):
        giver.heard_wants(Wants(f"b{number}", 1, 1, (want_of(MODEL, 1 << number),)), 0)
    giver.hold(MODEL)
    assert giver.next(SECOND_US) is not None
    given = set()
    while chosen := giver.next(SECOND_US):
        giver.sent(*chosen, SECOND_US)
        given.add(chosen[1])
    assert given == {2, 3, 4}


def test_a_board_asks_at_once_then_as_pieces_come_then_ever_more_rarely() -> None:
    fetching = Fetching(MODEL)
    assert fetching.want_due(0)
    assert not fetching.ask(0).stalled
    for index in range(WANT_PIECES):
        assert not fetching.want_due(SECOND_US)
        assert fetching.heard(index, PIECES[index])
    assert fetching.want_due(SECOND_US)
    assert pieces_of(fetching.ask(SECOND_US).lacking)[0] == WANT_PIECES
    now_us, gaps = SECOND_US, []
    for _ in range(8):
        due_us = fetching.due_us(now_us)
        assert due_us is not None
        assert not fetching.want_due(due_us - 1)
        gaps.append(due_us - now_us)
        now_us = due_us
        assert fetching.ask(now_us).stalled
    assert gaps[:4] == [STALL_US, 2 * STALL_US, 4 * STALL_US, 8 * STALL_US]
    assert gaps[-1] == MAX_STALL_US
    fetching.heard(WANT_PIECES, PIECES[WANT_PIECES])
    due_us = fetching.due_us(now_us)
    assert due_us is not None
    assert due_us <= now_us + HEARTBEAT_US
