"""The KV of a session on its way from the board that holds it to the one that its next turn was placed on.

Owns both roles, with no I/O: what to ask, what to answer, what the store must do.  Rules:

* A fetch asks for the manifest (the store's affair), then for what is missing here, at most ``WINDOW_ITEMS`` at a time, then for
  the rows; what does not come is asked again; what was stored stays, so that a fetch which is begun again asks for the rest.
* Whatever goes wrong, and when time is up, the fetch ends and the turn runs: what is not here is computed again.
* The holder gives a session up only when the fetcher says that it has all of it.  Each side believes only what the other signed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_agent.core.kv import KvAnswer, KvAsk, KvItem, session_hash
from edge_agent.node.events import Effect, KvFind, KvFound, KvGave, KvGive, KvPut, KvStored, Log

WINDOW_ITEMS = 4
RETRY_US = 2_000_000
LIMIT_US = 30_000_000
"""A whole move; then the rest is computed again."""
SILENCE_US = 8_000_000
"""Without anything from the holder."""
MAX_SERVED = 16
"""Asks of other boards that the store is at work on."""

Said = tuple[str, KvAsk | KvAnswer]
"""What is to be said, and to which board."""


@dataclass(slots=True)
class _Fetch:
    """``key`` of the job that waits; ``wanted`` names not asked for yet; ``asked`` those under way, and when they were asked."""

    key: str
    session: str
    model: str
    fingerprint: bytes
    source: str
    ends_us: int
    heard_us: int
    wanted: deque[bytes] = field(default_factory=deque)
    asked: dict[bytes, int] = field(default_factory=dict)
    storing: set[bytes] = field(default_factory=set)
    complete: bool = False

    @property
    def hashed(self) -> bytes:
        return session_hash(self.session)


MANIFEST, ROWS = b"manifest", b"rows"
"""Stand for themselves where blocks are named by 32 bytes."""


class Moving:
    def __init__(self) -> None:
        self._fetches: dict[str, _Fetch] = {}
        self._serving: set[tuple[str, KvAsk]] = set()
        self.moved_in = self.given_up = self.moved_out = 0

    def __len__(self) -> int:
        return len(self._fetches)

    # fetching

    def begin(
        self, key: str, session: str, model: str, fingerprint: bytes, source: str, now_us: int, limit_us: int = LIMIT_US
    ) -> Iterator[Said]:
        """Fetch ``session`` from ``source`` before the job of ``key`` runs; it takes ``limit_us`` at most."""
        ends_us = now_us + min(limit_us, LIMIT_US)
        fetch = self._fetches[key] = _Fetch(key, session, model, fingerprint, source, ends_us, now_us)
        yield self._ask(fetch, MANIFEST, now_us)

    def fetching(self, key: str) -> bool:
        return key in self._fetches

    def forget(self, key: str) -> bool:
        """Nobody waits for this job any more; whether a fetch was under way for it."""
        return self._fetches.pop(key, None) is not None

    def answered(self, board: str, answer: KvAnswer, now_us: int) -> Iterator[Said | Effect]:
        """A holder has answered."""
        for fetch in [each for each in self._fetches.values() if each.source == board and each.hashed == answer.session]:
            item = _label(answer.item, answer.name)
            if item not in fetch.asked:
                continue
            fetch.heard_us = now_us
            del fetch.asked[item]
            if answer.refusal:
                yield Log(f"session {fetch.session} does not move from {board}: {answer.refusal}")
                fetch.ends_us = now_us
            elif item == MANIFEST:
                yield KvFind(fetch.key, fetch.model, fetch.session, answer.payload)
            else:
                fetch.storing.add(item)
                yield KvPut(fetch.key, fetch.model, fetch.session, answer.item, answer.name, answer.payload)

    def found(self, event: KvFound, now_us: int) -> Iterator[Said | Effect]:
        """The store has looked: what it lacks of the manifest, or why it will have nothing of it."""
        fetch = self._fetches.get(event.key)
        if fetch is None:
            return
        if event.refusal:
            yield Log(f"session {fetch.session} does not move from {fetch.source}: {event.refusal}")
            fetch.ends_us = now_us
            return
        fetch.wanted = deque((*event.missing, ROWS) if event.rows else event.missing)
        yield from self._go_on(fetch, now_us)

    def stored(self, event: KvStored, now_us: int) -> Iterator[Said | Effect]:
        """The store has an item, or refused it."""
        fetch = self._fetches.get(event.key)
        if fetch is None:
            return
        item = _label(event.item, event.name)
        fetch.storing.discard(item)
        if event.refusal:
            yield Log(f"session {fetch.session}: what {fetch.source} sent is not kept: {event.refusal}")
            fetch.ends_us = now_us
        else:
            yield from self._go_on(fetch, now_us)

    def _go_on(self, fetch: _Fetch, now_us: int) -> Iterator[Said | Effect]:
        """Ask for the next items that fit into the window; the rows come last, when all blocks are here."""
        under_way = len(fetch.asked) + len(fetch.storing)
        while fetch.wanted and under_way < (1 if fetch.wanted[0] == ROWS else WINDOW_ITEMS):
            yield self._ask(fetch, fetch.wanted.popleft(), now_us)
            under_way += 1
        if not fetch.wanted and not under_way:
            fetch.complete = True
            self.moved_in += 1
            yield fetch.source, KvAsk(fetch.hashed, fetch.fingerprint, KvItem.MOVED)
            yield Log(f"session {fetch.session} has moved here from {fetch.source}")

    def _ask(self, fetch: _Fetch, item: bytes, now_us: int) -> Said:
        fetch.asked[item] = now_us
        kind = {MANIFEST: KvItem.MANIFEST, ROWS: KvItem.ROWS}.get(item, KvItem.BLOCK)
        name = item if kind is KvItem.BLOCK else b""
        return fetch.source, KvAsk(fetch.hashed, fetch.fingerprint, kind, name)

    def retry(self, now_us: int) -> Iterator[Said]:
        """Ask again for what did not come."""
        for fetch in self._fetches.values():
            for item, asked_us in list(fetch.asked.items()):
                if now_us - asked_us >= RETRY_US:
                    yield self._ask(fetch, item, now_us)

    def take_ended(self, now_us: int) -> list[tuple[str, str]]:
        """The jobs whose fetch is over and may run, each with the board that its session came from; empty if not all came."""
        ended = []
        for key, fetch in list(self._fetches.items()):
            silent = fetch.asked and not fetch.storing and now_us - fetch.heard_us >= SILENCE_US
            if fetch.complete or now_us >= fetch.ends_us or silent:
                self.given_up += not fetch.complete
                del self._fetches[key]
                ended.append((key, fetch.source if fetch.complete else ""))
        return ended

    def lose(self, board: str, now_us: int) -> None:
        """``board`` is gone (or, when empty, all others): what came from there is all there will be."""
        for fetch in self._fetches.values():
            if board in ("", fetch.source):
                fetch.ends_us = now_us

    # giving

    def asked(self, board: str, ask: KvAsk) -> Iterator[KvGive]:
        """Another board wants something of a session; asked for twice, it is read once."""
        if (board, ask) not in self._serving and len(self._serving) < MAX_SERVED:
            self._serving.add((board, ask))
            yield KvGive(board, ask)

    def gave(self, event: KvGave) -> Iterator[Said]:
        """The store has read it, or says why not."""
        self._serving.discard((event.board, event.ask))
        ask = event.ask
        if ask.item is KvItem.MOVED:
            self.moved_out += not event.refusal
            return
        yield event.board, KvAnswer(ask.session, ask.item, ask.name, event.payload, event.refusal)


def _label(item: KvItem, name: bytes) -> bytes:
    return {KvItem.MANIFEST: MANIFEST, KvItem.ROWS: ROWS}.get(item, name)
