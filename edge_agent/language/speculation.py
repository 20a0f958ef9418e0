"""Guessing what a session will say next from what it said before: prompt lookup.

Rules: pure, integers only.  The longest of the last few ids that occurred before proposes what followed it the last time; the
index costs O(1) a token and is bounded.  A guess changes no output: the model's own choice is compared with it.  How often
guesses after a match of each length came true is remembered; a caller that finds them not worth their cost does not use them,
and from time to time they are offered again as if they were certain, at intervals that double while they fail.

Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding; speculative decoding, arXiv:2211.17192.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

FIRST_CHANCES = {8: 850, 5: 600, 3: 300, 2: 150}
"""How many ids must match, the longest first, and how likely a guess after them is held to be before any was tried: in a long
text two ids often come again, and what followed them seldom."""
MATCHES = tuple(FIRST_CHANCES)
MAX_GUESSES = 7
PROBE_GUESSES = 2
HISTORY_TOKENS = 8192
CERTAIN = 1000
LEARNING = 8
"""One guess moves its chance by an eighth of the difference."""
FIRST_PAUSE, LAST_PAUSE = 16, 512
"""Proposals that are not used before one is offered again for a trial."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """``chance``: that an id comes true if those before it did, in thousandths. ``match``: the length that found it; 0: none."""

    ids: tuple[int, ...] = ()
    chance: int = 0
    match: int = 0


class Drafter:
    """The ids of one session, the last ``HISTORY_TOKENS`` of them, and how its guesses fare."""

    def __init__(self) -> None:
        self._ids: deque[int] = deque(maxlen=HISTORY_TOKENS)
        self._count = 0
        self._after: dict[tuple[int, ...], int] = {}
        self._entries: deque[tuple[tuple[int, ...], int]] = deque()
        self._chance = dict(FIRST_CHANCES)
        self._unused = 0
        self._pause = FIRST_PAUSE

    def extend(self, ids: Iterable[int]) -> None:
        for each in ids:
            self._index()
            self._ids.append(each)
            self._count += 1

    def _index(self) -> None:
        """What ends the ids now is followed by the id that comes next."""
        for key in self._tails():
            self._after[key] = self._count
            self._entries.append((key, self._count))
        while self._entries and self._entries[0][1] <= self._count - HISTORY_TOKENS + 1:
            key, position = self._entries.popleft()
            if self._after.get(key) == position:
                del self._after[key]

    def _tails(self) -> list[tuple[int, ...]]:
        ids = self._ids
        last = [ids[-each] for each in range(min(MATCHES[0], len(ids)), 0, -1)]
        return [tuple(last[-length:]) for length in MATCHES if length <= len(last)]

    def propose(self, limit: int) -> Proposal:
        """At most ``limit`` guesses for what follows now; an empty proposal if nothing matches."""
        for key in self._tails():
            position = self._after.get(key)
            if position is not None:
                return self._offer(position, len(key), min(limit, MAX_GUESSES))
        return Proposal()

    def _offer(self, position: int, match: int, limit: int) -> Proposal:
        if self._unused >= self._pause:
            return Proposal(self._following(position, min(limit, PROBE_GUESSES)), CERTAIN, match)
        return Proposal(self._following(position, limit), self._chance[match], match)

    def _following(self, position: int, count: int) -> tuple[int, ...]:
        """What came at ``position`` and after; past the end the guesses themselves are read on, so that a repetition goes on."""
        start = position - self._count
        found: list[int] = []
        for offset in range(start, start + count):
            found.append(self._ids[offset] if offset < 0 else found[offset])
        return tuple(found)

    def learn(self, proposal: Proposal, drafted: int, accepted: int) -> None:
        """``drafted`` of the ``proposal``'s ids were tried and ``accepted`` of them came true."""
        if not drafted:
            self._unused += bool(proposal.ids)
            return
        if proposal.chance == CERTAIN:
            self._pause = FIRST_PAUSE if accepted else min(2 * self._pause, LAST_PAUSE)
        self._unused = 0
        for came_true in [CERTAIN] * accepted + [0] * (accepted < drafted):
            self._chance[proposal.match] += (came_true - self._chance[proposal.match]) // LEARNING
