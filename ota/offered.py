"""The fleet's metadata as it is offered here, and when it is looked at: verified by python-tuf, in a process of its own.

Owns ``Offered``.  Rules: nothing of what is offered is believed; all of it is bounded; it is verified when it has changed and
come to rest, when something new is looked for in it, and now and then, because it expires; what was refused is not tried again
until it changes, but for a clock that may have been set right; what held before counts for ``MAX_AGE_US`` at the most while what
came since is refused, for that is what a freeze looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edge_agent.core.errors import RefusedError
from ota.checked import MAX_DOCUMENTS, MAX_OFFERED_BYTES
from ota.events import List, Listed, NotListed

TIMESTAMP = "timestamp"
SETTLE_US = 300_000
"""Documents of one state come in no order: after the last of them so long nothing more must come."""
MAX_SETTLE_US = 5_000_000
"""Who sends one document after another does not put the look off for longer."""
AGAIN_US = 3_600_000_000
AFTER_REFUSAL_US = 600_000_000
AFTER_FAILURE_US = 30_000_000
MAX_AGE_US = 24 * 3_600_000_000
ANSWER_LIMIT_US = 300_000_000
"""A look that nobody answered by then is begun anew: the process that verifies is ended long before."""

Targets = Mapping[str, tuple[int, bytes]]


class Offered:
    """``targets``: what the last metadata that held lists, of what was asked; ``why``: what was wrong with what came since."""

    def __init__(self) -> None:
        self.documents: dict[str, bytes] = {}
        self.targets: Targets = {}
        self.why = ""
        self._size_bytes = 0
        self._changed_us: int | None = None
        """Since when there is something that was not looked at."""
        self._last_us = 0
        self._due_us: int | None = None
        self._asked: frozenset[str] = frozenset()
        self._looking_us: int | None = None
        """Since when an answer is awaited."""
        self._held_us = 0

    def hear(self, name: str, payload: bytes, now_us: int) -> None:
        """A document; an empty one is taken away. Raises ``RefusedError`` when there are too many, or too much."""
        held = self.documents.get(name, b"")
        if payload == held:
            return
        size_bytes = self._size_bytes - len(held) + len(payload)
        if size_bytes > MAX_OFFERED_BYTES or (not held and len(self.documents) >= MAX_DOCUMENTS):
            got = f"{len(self.documents) + 1} documents, {size_bytes} bytes"
            raise RefusedError(f"metadata {name}", got, f"at most {MAX_DOCUMENTS} and {MAX_OFFERED_BYTES} bytes")
        self._size_bytes = size_bytes
        if payload:
            self.documents[name] = payload
        else:
            del self.documents[name]
        if payload:
            self._changed_us = now_us if self._changed_us is None else self._changed_us
            self._last_us = now_us

    def look(self, wanted: Iterable[str], floors: Mapping[str, int], now_us: int) -> List | None:
        """The look that is due, for the targets that are ``wanted``; ``None`` if none is."""
        paths = frozenset(wanted)
        if TIMESTAMP not in self.documents or self._awaits(now_us) or not self._is_due(paths, now_us):
            return None
        self._looking_us, self._changed_us, self._due_us, self._asked = now_us, None, None, paths
        return List(dict(self.documents), tuple(sorted(paths)), floors)

    def listed(self, event: Listed, now_us: int) -> None:
        """An answer; one that nobody waits for any more is none."""
        if self._looking_us is not None:
            self._looking_us, self.why, self.targets, self._held_us = None, "", event.targets, now_us
            self._due_us = now_us + AGAIN_US

    def not_listed(self, event: NotListed, now_us: int) -> None:
        """As ``listed``."""
        if self._looking_us is None:
            return
        self._looking_us, self.why = None, event.why
        self._due_us = now_us + (AFTER_REFUSAL_US if event.refused else AFTER_FAILURE_US)
        if event.refused and now_us - self._held_us >= MAX_AGE_US:
            self.targets = {}

    @property
    def pending(self) -> bool:
        """A look is due within a second or so."""
        return self._changed_us is not None

    def _awaits(self, now_us: int) -> bool:
        if self._looking_us is not None and now_us - self._looking_us >= ANSWER_LIMIT_US:
            self._looking_us, self._due_us = None, now_us
            self.why = f"nobody said within {ANSWER_LIMIT_US // 1_000_000} s what the metadata is worth; it is looked at again"
        return self._looking_us is not None

    def _is_due(self, paths: frozenset[str], now_us: int) -> bool:
        if self._changed_us is not None:
            return now_us - self._last_us >= SETTLE_US or now_us - self._changed_us >= MAX_SETTLE_US
        return bool(paths - self._asked) or (self._due_us is not None and now_us >= self._due_us)
