"""From token bytes to text that may be shown: whole characters only, and never the beginning of a stop text that then comes.

Rules: pure.  Bytes that are no UTF-8 become U+FFFD, an unfinished character only at the end.  The answer is cut before the stop
text that is complete first (of those that end together, before the one that begins first); what could still become a stop text is
held back.  What is shown does not depend on how the bytes were cut into tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """One answer. ``begun``: what was shown of it before; a stop text may begin in it, but it stays shown."""

    def __init__(self, stops: Sequence[str] = (), begun: str = "") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stops)
        reach = max((len(stop) for stop in stops), default=1) - 1
        self._shown = begun[-reach:] if reach else ""
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """The text that may be shown after ``data`` came; nothing any more once ``stopped``."""
        return self._take(self._decoder.decode(data))

    def end(self) -> str:
        """The answer ended without a stop text: what was held back."""
        shown = self._take(self._decoder.decode(b"", True))
        held, self._held = ("" if self.stopped else self._held), ""
        return shown + held

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        cut = self._cut() if self._stops else None
        if cut is not None:
            self.stopped = True
            shown, self._held = self._held[:cut], ""
            return shown
        ready = len(self._held) - self._pending()
        shown, self._held = self._held[:ready], self._held[ready:]
        if self._stops:
            reach = max(len(stop) for stop in self._stops) - 1
            self._shown = (self._shown + shown)[-reach:] if reach else ""
        return shown

    def _cut(self) -> int | None:
        """Where the text that is held ends because of a stop text; 0 if that began in what was shown."""
        whole = self._shown + self._held
        found = [(at + len(stop), at) for stop in self._stops if (at := whole.find(stop, self._earliest(stop))) >= 0]
        return max(0, min(found)[1] - len(self._shown)) if found else None

    def _earliest(self, stop: str) -> int:
        """A stop text that lies in what was shown altogether is past."""
        return max(0, len(self._shown) - len(stop) + 1)

    def _pending(self) -> int:
        """How many characters at the end are held back, for they may belong to a stop text."""
        whole, longest = self._shown + self._held, 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(whole)), longest, -1):
                if whole.endswith(stop[:size]):
                    longest = size
                    break
        return min(longest, len(self._held))
