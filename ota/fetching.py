"""What one board lacks of one artefact, and when it says so.

Owns ``Fetching``.  Rules: pure; a piece counts once, whoever sent it and how often, and only if it is right; a board says what it
lacks when it begins, as pieces come in (so that givers neither run ahead nor repeat), and when nothing comes, each time later.
"""

from __future__ import annotations

from collections.abc import Iterable

from ota.chunks import Artefact, Want, set_of, want_of

WANT_PIECES = 64
"""That came in since it asked last, and it asks again: 4 MiB."""
LEAST_GAP_US = 100_000
"""Between two wants while pieces come in."""
HEARTBEAT_US = 2_000_000
"""While fewer come in."""
STALL_US = 3_000_000
"""Without a piece: what is not here by now is not on its way."""
MAX_STALL_US = 60_000_000


class Fetching:
    """``held``: the pieces that are here already, as a set of bits or their indices."""

    def __init__(self, artefact: Artefact, held: int | Iterable[int] = 0) -> None:
        self.artefact = artefact
        self._held = (held if isinstance(held, int) else set_of(held, artefact.count)) & artefact.whole
        self._asked_us: int | None = None
        self._progress_us = 0
        self._came = self._came_before = self._came_when_asked = 0
        self._stalls = 0

    @property
    def lacking(self) -> int:
        """The set of pieces that are not here."""
        return self.artefact.whole & ~self._held

    @property
    def done(self) -> bool:
        return not self.lacking

    @property
    def permille(self) -> int:
        """Of its pieces so many are here, rounded down."""
        return self._held.bit_count() * 1000 // self.artefact.count

    def heard(self, index: int, data: bytes | memoryview) -> bool:
        """Whether this is a piece that was lacking; it counts as held then, unless ``lost`` says otherwise.

        Raises ``RefusedError`` for what is no piece of this artefact, or not the one that it says.
        """
        if 0 <= index < self.artefact.count and self._held >> index & 1:
            return False
        self.artefact.check(index, data)
        self._held |= 1 << index
        self._came += 1
        return True

    def lost(self, index: int) -> None:
        """A piece could not be kept, or rotted: it is lacking again."""
        self._held &= ~(1 << index)

    def again(self) -> None:
        """Ask anew: the link has come up, or there is room on the disk again."""
        self._asked_us, self._stalls = None, 0

    def want_due(self, now_us: int) -> bool:
        """Is it time to publish a want? ``ask`` gives it."""
        due_us = self.due_us(now_us)
        return due_us is not None and due_us <= now_us

    def due_us(self, now_us: int) -> int | None:
        """When a want is due if nothing more comes in; ``None`` when nothing is lacking."""
        self._look(now_us)
        if self.done:
            return None
        if self._asked_us is None:
            return now_us
        stalled_us = max(self._asked_us, self._progress_us) + min(STALL_US << self._stalls, MAX_STALL_US)
        if self._came - self._came_when_asked >= WANT_PIECES:
            return min(stalled_us, self._asked_us + LEAST_GAP_US)
        return min(stalled_us, self._asked_us + HEARTBEAT_US) if self._came > self._came_when_asked else stalled_us

    def ask(self, now_us: int) -> Want:
        """What to tell now. Raises ``RefusedError`` when nothing is lacking."""
        self._look(now_us)
        stalled = self._asked_us is not None and now_us - max(self._progress_us, self._asked_us) >= STALL_US
        want = want_of(self.artefact, self.lacking, stalled)
        self._stalls = min(self._stalls + stalled, 8)
        self._asked_us, self._came_when_asked = now_us, self._came
        return want

    def _look(self, now_us: int) -> None:
        if self._came > self._came_before:
            self._came_before, self._progress_us, self._stalls = self._came, now_us, 0
