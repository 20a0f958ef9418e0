"""Which file is hashed next, and where in it: the schedule of the background re-hash, as a pure state machine.

Rules:

* every file that is held is hashed over and over, one after another in the order in which they came (``SLOW``); a file whose
  ``Mark`` changed, or that is new and unhashed, is hashed at once besides (``QUICK``), each at its own rate, so that neither
  keeps the other waiting;
* in no span of time more is handed out than the two rates allow, and a piece each: time that was slept through is not made up
  for;
* a pass that was begun is finished whatever happens to the file; a change during a quick pass brings another one, behind those of
  the other files: who changes a file without end stops neither its hash nor that of another;
* a round takes ``MIN_ROUND_US`` at least, so that a board with small models rests.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

PIECE_BYTES = 2**20
QUICK_FACTOR = 16
"""How much faster a file is hashed that changed than those that did not."""
MIN_ROUND_US = 10_000_000


class Pace(StrEnum):
    SLOW = "slow"
    QUICK = "quick"


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells that a file may have changed: every write in place moves its ctime, which no user can set (stat(2))."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Mark:
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def same_file(self, other: Mark) -> bool:
        return (self.device, self.inode) == (other.device, other.inode)


@dataclass(frozen=True, slots=True)
class Piece:
    """Hash these bytes of ``file`` next: a pass begins at offset 0 and ends with ``last``; the paces' passes are apart."""

    file: str
    offset: int
    size_bytes: int
    last: bool
    pace: Pace


class _Lane:
    """The files of one pace, the first of which is being hashed."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self.files: deque[str] = deque()
        self.offset = 0
        self.due_us = 0

    def piece(self, sizes: dict[str, int], pace: Pace, now_us: int) -> Piece | None:
        if not self.files or now_us < self.due_us:
            return None
        file, offset = self.files[0], self.offset
        size_bytes = max(0, min(PIECE_BYTES, sizes[file] - offset))
        self.due_us = now_us - -size_bytes * 10**6 // self.bytes_per_s
        self.offset += size_bytes
        return Piece(file, offset, size_bytes, self.offset >= sizes[file], pace)

    def drop(self, file: str) -> None:
        if self.files and self.files[0] == file:
            self.offset = 0
        if file in self.files:
            self.files.remove(file)


class Rounds:
    """``bytes_per_s``: how fast files are hashed that did not change."""

    def __init__(self, bytes_per_s: int) -> None:
        self._marks: dict[str, Mark] = {}
        self._slow, self._quick = _Lane(bytes_per_s), _Lane(QUICK_FACTOR * bytes_per_s)
        self._again: set[str] = set()
        """Changed while their quick pass runs."""
        self._begun_us = 0
        self._first = ""

    @property
    def round_us(self) -> int:
        """How long it takes until every byte was hashed again."""
        return max(MIN_ROUND_US, self.total_bytes * 10**6 // self._slow.bytes_per_s) if self._marks else 0

    @property
    def total_bytes(self) -> int:
        return sum(mark.size_bytes for mark in self._marks.values())

    def hold(self, file: str, mark: Mark, *, hashed: bool) -> None:
        """Take a file in; one whose bytes nobody has ``hashed`` yet goes first. Raises ``ValueError`` for one that is held."""
        if file in self._marks:
            raise ValueError(f"{file} is held already")
        self._marks[file] = mark
        self._slow.files.append(file)
        if not hashed:
            self._hurry(file)

    def drop(self, file: str) -> None:
        """Hash it no more; nothing if it is not held."""
        if self._marks.pop(file, None) is not None:
            self._slow.drop(file)
            self._quick.drop(file)
            self._again.discard(file)

    def seen(self, file: str, mark: Mark) -> bool:
        """The file's mark is this now; whether that is another one than before."""
        if self._marks[file] == mark:
            return False
        self._marks[file] = mark
        self._hurry(file)
        return True

    def next(self, now_us: int) -> Piece | None:
        """What is to be hashed now; ``None`` if nothing is due. The caller hashes it before it asks again."""
        sizes = {file: mark.size_bytes for file, mark in self._marks.items()}
        piece = self._quick.piece(sizes, Pace.QUICK, now_us) or self._slow.piece(sizes, Pace.SLOW, now_us)
        if piece is not None and piece.pace is Pace.QUICK:
            self._after_quick(piece)
        elif piece is not None:
            self._after_slow(piece, now_us)
        return piece

    def due_us(self) -> int | None:
        """When ``next`` has something; ``None`` while nothing is held."""
        return min((lane.due_us for lane in (self._quick, self._slow) if lane.files), default=None)

    def _hurry(self, file: str) -> None:
        lane = self._quick
        if file not in lane.files:
            lane.files.append(file)
        elif lane.files[0] == file and lane.offset:
            self._again.add(file)

    def _after_quick(self, piece: Piece) -> None:
        if piece.last:
            self._quick.files.popleft()
            self._quick.offset = 0
            if piece.file in self._again:
                self._again.discard(piece.file)
                self._quick.files.append(piece.file)

    def _after_slow(self, piece: Piece, now_us: int) -> None:
        lane = self._slow
        if not piece.offset and self._first not in lane.files:
            self._first = piece.file
        if not piece.offset and piece.file == self._first:
            self._begun_us = now_us
        if piece.last:
            lane.files.rotate(-1)
            lane.offset = 0
            if lane.files[0] == self._first:
                lane.due_us = max(lane.due_us, self._begun_us + MIN_ROUND_US)
