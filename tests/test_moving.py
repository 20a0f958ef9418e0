"""A session on its way between two boards: whatever the network does, all of it arrives, or the turn runs without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import KvAnswer, KvAsk, KvItem, session_hash
from edge_agent.node.events import KvFind, KvFound, KvGave, KvGive, KvPut, KvStored, Log
from edge_agent.node.moving import LIMIT_US, MAX_SERVED, RETRY_US, SILENCE_US, WINDOW_ITEMS, Moving

FINGERPRINT = b"f" * 32
TICK_US = 100_000
KEY = "a/" + "ab" * 16


def block(number: int) -> bytes:
    return number.to_bytes(32)


@dataclass
class Shelf:
    """A store of one session: blocks by name, and rows."""

    blocks: dict[bytes, bytes] = field(default_factory=dict)
    rows: bytes = b""
    damaged: bool = False

    @classmethod
    def full(cls, count: int) -> Shelf:
        return cls({block(number): b"block %d" % number for number in range(count)}, b"rows")

    def manifest(self) -> bytes:
        return b"".join(self.blocks)


class Pair:
    """Two boards, ``home`` and ``away``, and a network between them that a seed makes bad."""

    def __init__(self, blocks: int, seed: int = 0, loss: float = 0.0, doubled: float = 0.0) -> None:
        self.random, self.loss, self.doubled = Random(seed), loss, doubled
        self.moving = {"home": Moving(), "away": Moving()}
        self.shelf = {"home": Shelf.full(blocks), "away": Shelf()}
        self.wire: list[tuple[str, str, KvAsk | KvAnswer]] = []
        self.asked: list[KvAsk] = []
        self.logs: list[str] = []
        self.now_us = self.most_under_way = 0
        self.there_when_rows_were_asked = -1
        self.cut = False

    def begin(self, limit_us: int = LIMIT_US) -> None:
        self.ended: list[tuple[str, str]] = []
        self.out("away", self.moving["away"].begin(KEY, "s", "parrot", FINGERPRINT, "home", self.now_us, limit_us))

    def out(self, board: str, said: object) -> None:
        for each in said:  # type: ignore[attr-defined]
            if isinstance(each, tuple):
                copies = (self.random.random() >= self.loss) + (self.random.random() < self.doubled)
                self.wire += [(board, *each)] * (0 if self.cut else copies)
                if isinstance(each[1], KvAsk):
                    self.asked.append(each[1])
                    if each[1].item is KvItem.ROWS:
                        self.there_when_rows_were_asked = len(self.shelf["away"].blocks)
            else:
                self.do(board, each)
        under_way = [len(f.asked) + len(f.storing) for f in self.moving["away"]._fetches.values()]
        self.most_under_way = max([self.most_under_way, *under_way])

    def do(self, board: str, effect: object) -> None:
        """What the store does."""
        moving, shelf = self.moving[board], self.shelf[board]
        match effect:
            case KvFind(key, _, _, manifest):
                names = [manifest[at : at + 32] for at in range(0, len(manifest), 32)]
                missing = tuple(name for name in names if name not in shelf.blocks)
                self.out(board, moving.found(KvFound(key, missing, not shelf.rows), self.now_us))
            case KvPut(key, _, _, item, name, payload):
                if item is KvItem.ROWS:
                    shelf.rows = payload
                else:
                    shelf.blocks[name] = payload
                refusal = "other bytes than the manifest names" if shelf.damaged else ""
                self.out(board, moving.stored(KvStored(key, item, name, refusal), self.now_us))
            case KvGive(to, ask):
                self.out(board, moving.gave(self.give(shelf, to, ask)))
            case Log(text):
                self.logs.append(text)

    def give(self, shelf: Shelf, to: str, ask: KvAsk) -> KvGave:
        if not shelf.blocks:
            return KvGave(to, ask, refusal="session: it is not here")
        if ask.item is KvItem.MOVED:
            shelf.blocks, shelf.rows = {}, b""
            return KvGave(to, ask)
        payload = {KvItem.MANIFEST: shelf.manifest(), KvItem.ROWS: shelf.rows}.get(ask.item)
        return KvGave(to, ask, payload if payload is not None else shelf.blocks[ask.name])

    def pass_on(self) -> None:
        """Everything on the wire arrives, in any order."""
        arriving, self.wire = self.wire, []
        self.random.shuffle(arriving)
        for sender, board, said in arriving:
            if isinstance(said, KvAsk):
                self.out(board, self.moving[board].asked(sender, said))
            else:
                self.out(board, self.moving[board].answered(sender, said, self.now_us))

    def run(self, seconds: float = LIMIT_US / 1e6 + 1) -> None:
        end_us = self.now_us + int(seconds * 1e6)
        while self.now_us < end_us and not self.ended:
            self.pass_on()
            self.out("away", self.moving["away"].retry(self.now_us))
            self.ended += self.moving["away"].take_ended(self.now_us)
            self.now_us += TICK_US
        self.pass_on()


@pytest.mark.parametrize("blocks", [1, 2, WINDOW_ITEMS, 33])
def test_a_session_moves_whole_and_its_home_gives_it_up_then(blocks: int) -> None:
    pair = Pair(blocks)
    pair.begin()
    pair.run()
    assert pair.ended == [(KEY, "home")]
    assert pair.shelf["away"] == Shelf.full(blocks) and pair.shelf["home"] == Shelf()
    assert len(pair.asked) == 1 + blocks + 1 + 1, "manifest, each block once, rows, moved"
    assert pair.most_under_way <= WINDOW_ITEMS and pair.there_when_rows_were_asked == blocks
    assert (pair.moving["away"].moved_in, pair.moving["home"].moved_out) == (1, 1)


@given(st.integers(0, 10**6), st.integers(1, 30))
def test_a_network_that_loses_doubles_and_reorders_loses_no_block_and_asks_for_none_that_came(seed: int, blocks: int) -> None:
    pair = Pair(blocks, seed, loss=0.2, doubled=0.2)
    pair.begin()
    pair.run()
    away, home = pair.shelf["away"], pair.shelf["home"]
    if pair.ended == [(KEY, "home")]:
        assert away == Shelf.full(blocks)
    else:
        assert home == Shelf.full(blocks), "who does not have all of it takes nothing away"
    assert pair.most_under_way <= WINDOW_ITEMS


def test_a_link_that_comes_back_finds_the_move_going_on_with_what_is_missing() -> None:
    pair = Pair(20)
    pair.begin()
    pair.run(0.5)
    there = len(pair.shelf["away"].blocks)
    assert 0 < there < 20
    pair.cut = True
    pair.run(SILENCE_US / 1e6 - 2)
    pair.cut = False
    pair.run()
    assert pair.ended == [(KEY, "home")] and pair.shelf["away"] == Shelf.full(20)
    names = [ask.name for ask in pair.asked if ask.item is KvItem.BLOCK]
    assert len(set(names)) == 20 and len(names) <= 20 + WINDOW_ITEMS * (SILENCE_US // RETRY_US)


def test_a_move_that_is_begun_again_asks_only_for_the_rest() -> None:
    pair = Pair(20)
    pair.begin()
    pair.run(0.5)
    there = set(pair.shelf["away"].blocks)
    assert pair.moving["away"].forget(KEY) and 0 < len(there) < 20
    pair.asked.clear()
    pair.begin()
    pair.run()
    assert pair.shelf["away"] == Shelf.full(20)
    assert {ask.name for ask in pair.asked if ask.item is KvItem.BLOCK} == set(Shelf.full(20).blocks) - there


@pytest.mark.parametrize("trouble", ["silent", "gone", "empty", "damaged", "slow"])
def test_a_move_that_fails_lets_the_turn_run_in_bounded_time_and_takes_nothing_away(trouble: str) -> None:
    pair = Pair(200 if trouble == "slow" else 20)
    if trouble == "empty":
        pair.shelf["home"] = Shelf()
    pair.shelf["away"].damaged = trouble == "damaged"
    home = Shelf(dict(pair.shelf["home"].blocks), pair.shelf["home"].rows)
    pair.begin(limit_us=3_000_000 if trouble == "slow" else LIMIT_US)
    pair.cut = trouble == "silent"
    pair.run(0.4)
    if trouble == "gone":
        pair.moving["away"].lose("home", pair.now_us)
    pair.run()
    assert pair.ended == [(KEY, "")] and pair.shelf["home"] == home
    assert pair.now_us <= SILENCE_US + 2_000_000 and pair.moving["away"].given_up == 1


def test_answers_that_were_not_asked_for_are_not_kept() -> None:
    moving = Moving()
    list(moving.begin(KEY, "s", "parrot", FINGERPRINT, "home", 0))
    unasked = KvAnswer(session_hash("s"), KvItem.BLOCK, block(1), b"x")
    assert not list(moving.answered("home", unasked, 0))
    manifest = KvAnswer(session_hash("s"), KvItem.MANIFEST, payload=b"x")
    assert not list(moving.answered("mallory", manifest, 0)), "another board was asked"
    assert not list(moving.answered("home", KvAnswer(session_hash("t"), KvItem.MANIFEST, payload=b"x"), 0))
    assert list(moving.answered("home", manifest, 0)) and not list(moving.answered("home", manifest, 0))


def test_a_board_that_asks_and_asks_costs_a_bounded_number_of_reads() -> None:
    moving = Moving()
    asks = [KvAsk(session_hash("s"), FINGERPRINT, KvItem.BLOCK, block(number)) for number in range(100)]
    given_out = [each for ask in asks * 3 for each in moving.asked("b", ask)]
    assert len(given_out) == MAX_SERVED
    assert len(list(moving.gave(KvGave("b", asks[0], b"x")))) == 1 and list(moving.asked("b", asks[50]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: KvAsk(b"short", FINGERPRINT, KvItem.MANIFEST),
        lambda: KvAsk(session_hash("s"), b"short", KvItem.MANIFEST),
        lambda: KvAsk(session_hash("s"), FINGERPRINT, KvItem.BLOCK),
        lambda: KvAsk(session_hash("s"), FINGERPRINT, KvItem.ROWS, block(1)),
        lambda: KvAnswer(session_hash("s"), KvItem.MANIFEST, refusal="x" * 513),
    ],
)
def test_what_cannot_be_asked_or_answered_is_refused(build: object) -> None:
    with pytest.raises(RefusedError, match="KV a"):
        build()  # type: ignore[operator]
