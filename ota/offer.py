"""One artefact that a board or the operator's machine holds: who wants it, what was sent of it, and which piece is next.

Owns ``Offer`` and ``Wanter``; ``giving`` says who gives and how fast.  Rules: sends are numbered; a set of pieces is an ``int``;
what is kept of the sends is bounded by ``MAX_SENDS_KEPT``, and what is older counts as arrived or lost; who comes back is known.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ota.chunks import Artefact, Want, pieces_of, set_of
from ota.fetching import STALL_US

GATHER_US = 250_000
"""From the first want of an artefact until it is sent: the others of a wave ask meanwhile."""
LAG_US = 3_000_000
"""A board that told of no arrival for so long is not waited for."""
SILENT_WINDOW_PIECES = 64
"""May be on their way while nobody tells of arrivals."""
REORDER_PIECES = 64
"""A piece is lost when one arrived that was sent so much later: who sends reads and publishes several side by side."""
FOREIGN_US = 10_000_000
"""For so long after somebody else gave to a board, the order of its arrivals says nothing of what it lost."""
REFRESH_US = 50_000
REPEATS_EACH = 4
"""While there is other work, every so manieth piece may be a repeat."""
MAX_SENDS_KEPT = 2048
MAX_MARKS = 64
MARK_US = 100_000
HOUR_US = 3_600_000_000
ANEW_PIECES = 2 * SILENT_WINDOW_PIECES
"""May be repeated besides for a board that started anew: what was on its way to it is lost, and what it had not made durable."""
ANEW_US = 60_000_000
"""No sooner after the last time: anybody can say so."""


@dataclass(slots=True)
class Wanter:
    """A board that lacks pieces. Sends are numbered; those up to ``base`` are not on their way to it: they arrived, were lost, or
    went out before it asked; ``seen`` is the newest that arrived. ``served``: the pieces that went out up to ``base`` while it
    asked, now or before it left."""

    lacking: int
    base: int
    news_us: int
    progress_us: int
    allowance: int
    most: int
    least: int
    seen: int = 0
    served: int = 0
    anew_us: int | None = None
    foreign_us: int | None = None
    progressed: int = 0
    begun: bool = False

    def allow(self) -> None:
        """What it may have repeated grows with what it has come forward."""
        count = self.lacking.bit_count()
        self.allowance = min(self.most, self.allowance + max(0, self.least - count))
        self.least = min(self.least, count)


@dataclass(slots=True)
class Offer:
    """An artefact that is held here, with who wants it and what was sent of it. ``sent[n - forgotten - 1]``: send ``n``."""

    artefact: Artefact
    cursor: int
    wanters: dict[str, Wanter] = field(default_factory=dict)
    left: dict[str, Wanter] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    forgotten: int = 0
    marks: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=MAX_MARKS))
    last_us: int = 0
    open_us: int = 0
    refilled_us: int = 0
    first: int = 0
    """Pieces to send that someone was not sent yet."""
    soon: int = 0
    """Those of them that the board lacks which lacks the fewest."""
    repeats: int = 0
    refreshed_us: int | None = None
    turns: int = 0

    @property
    def sends(self) -> int:
        return self.forgotten + len(self.sent)

    def join(self, board: str, want: Want, now_us: int) -> None:
        """A board asks for the first time, or anew: what went out while it asked before is then a repeat."""
        if not self.wanters:
            self.open_us = now_us + GATHER_US
        wanter = self.left.pop(board, None)
        if wanter is None:
            most = 2 * self.artefact.count
            wanter = Wanter(want.lacking, self.sends, now_us, now_us, most, most, want.lacking.bit_count())
        else:
            wanter.lacking, wanter.base = want.lacking, self.sends
            wanter.news_us = wanter.progress_us = now_us
            wanter.begun = False
        self.wanters[board] = wanter
        self.refreshed_us = None

    def leave(self, board: str) -> None:
        """It lacks nothing any more, or is not there."""
        if board in self.wanters:
            wanter = self.left[board] = self.wanters.pop(board)
            known = wanter.base >= self.forgotten
            wanter.served |= set_of(self._since(wanter.base, self.sends), self.artefact.count) if known else self.artefact.whole
            self.refreshed_us = None
        if not self.wanters:
            self.forgotten, self.sent = self.sends, []

    def started_anew(self, board: str, now_us: int) -> None:
        """A board that asks says so under a newer boot."""
        wanter = self.wanters[board]
        if wanter.anew_us is None or now_us - wanter.anew_us >= ANEW_US:
            wanter.anew_us = now_us
            wanter.allowance = min(wanter.most, wanter.allowance + ANEW_PIECES)

    def advance(self, wanter: Wanter, want: Want, now_us: int, alone: bool) -> None:
        """What a later want says of what was sent. ``alone``: as far as is known here nobody else gives, so the order of what
        arrived is that of the sends."""
        arrived = wanter.lacking & ~want.lacking
        wanter.seen = max(wanter.seen, self._newest(arrived, wanter.base))
        if arrived & ~self._mine():
            wanter.foreign_us = now_us
        alone = alone and (wanter.foreign_us is None or now_us - wanter.foreign_us >= FOREIGN_US)
        base = max(
            wanter.base,
            wanter.seen - REORDER_PIECES if alone else 0,
            self._sends_before(now_us - STALL_US) if want.stalled else 0,
        )
        if base > wanter.base:
            wanter.served |= set_of(self._since(wanter.base, base), self.artefact.count)
            wanter.base = base
        if arrived or want.stalled:
            wanter.news_us = now_us
        wanter.lacking = want.lacking
        wanter.allow()

    def note(self, index: int, now_us: int) -> None:
        """A piece was sent."""
        bit = 1 << index
        if self.repeats & bit:
            for wanter in self.wanters.values():
                wanter.allowance -= bool(wanter.lacking & wanter.served & bit) and wanter.allowance > 0
        if not self.marks or now_us - self.marks[-1][0] >= MARK_US:
            self.marks.append((now_us, self.sends))
        self.sent.append(index)
        if len(self.sent) > 2 * MAX_SENDS_KEPT:
            del self.sent[:MAX_SENDS_KEPT]
            self.forgotten += MAX_SENDS_KEPT
        self.first, self.soon, self.repeats = self.first & ~bit, self.soon & ~bit, self.repeats & ~bit
        self.cursor, self.last_us, self.turns = index + 1, now_us, self.turns + 1

    def pick(self, now_us: int) -> int | None:
        """The piece to send next, whether or not the window lets it."""
        if self.refreshed_us is None or now_us - self.refreshed_us >= REFRESH_US or not self.first | self.repeats:
            self.refresh(now_us)
        pool = self.soon or self.first
        if self.repeats and (not pool or self.turns % REPEATS_EACH == REPEATS_EACH - 1):
            pool = self.repeats
        if not pool:
            return None
        beyond = pool >> self.cursor
        if beyond:
            return self.cursor + (beyond & -beyond).bit_length() - 1
        return (pool & -pool).bit_length() - 1

    def refresh(self, now_us: int) -> None:
        """What is to be sent, from what everybody lacks and what is on its way to them."""
        self.first = self.soon = self.repeats = 0
        self._refill(now_us)
        flying, at, fewest = 0, self.sends, self.artefact.count + 1
        for wanter in sorted((each for each in self.wanters.values() if each.begun), key=lambda each: -each.base):
            for index in reversed(self._since(wanter.base, at)):
                flying |= 1 << index
            at = min(at, wanter.base)
            pending = wanter.lacking & ~flying
            repeats = pending & wanter.served
            self.repeats |= _at_most(repeats, wanter.allowance)
            pending &= ~repeats
            self.first |= pending
            if pending and pending.bit_count() < fewest:
                self.soon, fewest = pending, pending.bit_count()
        self.repeats &= ~self.first
        self.refreshed_us = now_us

    def blocked(self, now_us: int, window: int) -> bool:
        """Is so much on its way to those who are waited for that nothing more should be sent?"""
        begun = [each for each in self.wanters.values() if each.begun]
        known = sorted(max(each.base, each.seen) for each in begun if now_us - each.news_us < LAG_US)
        if known:
            return self.sends - known[len(known) // 2] >= window
        return self.sends - max((max(each.base, each.seen) for each in begun), default=0) >= min(window, SILENT_WINDOW_PIECES)

    def opens_us(self, now_us: int) -> int | None:
        """When ``blocked`` may answer otherwise with no word from anybody."""
        return min((t for each in self.wanters.values() if each.begun and (t := each.news_us + LAG_US) > now_us), default=None)

    def is_foreign(self, arrived: int) -> bool:
        """Did much of what arrived at a board come from somebody else?"""
        return (arrived & ~self._mine()).bit_count() * 4 > arrived.bit_count()

    def _mine(self) -> int:
        return set_of(self.sent, self.artefact.count)

    def _refill(self, now_us: int) -> None:
        more = (now_us - self.refilled_us) * self.artefact.count // HOUR_US
        if more > 0:
            self.refilled_us = now_us
            for wanter in (*self.wanters.values(), *self.left.values()):
                wanter.allowance = min(wanter.most, wanter.allowance + more)

    def _since(self, base: int, end: int) -> list[int]:
        """The pieces of the sends after ``base``, up to ``end``."""
        return self.sent[max(0, base - self.forgotten) : max(0, end - self.forgotten)]

    def _newest(self, pieces: int, base: int) -> int:
        """The number of the newest send of one of these pieces after ``base``; 0 if there is none."""
        if pieces:
            since = self._since(base, self.sends)
            for back, index in enumerate(reversed(since)):
                if pieces >> index & 1:
                    return self.sends - back
        return 0

    def _sends_before(self, time_us: int) -> int:
        """How many sends there were at the least by then."""
        if self.last_us <= time_us:
            return self.sends
        return next((sends for mark_us, sends in reversed(self.marks) if mark_us <= time_us), 0)


def _at_most(pieces: int, count: int) -> int:
    """``count`` of these pieces, the first ones."""
    if pieces.bit_count() <= count:
        return pieces
    kept = pieces_of(pieces)[: max(0, count)]
    return set_of(kept, pieces.bit_length())
