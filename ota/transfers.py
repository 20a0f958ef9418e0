"""The artefacts that this board fetches: a few at a time, piece by piece, into staging and from there into the cache.

Owns ``Transfers``.  Rules: sans-I/O; what is needed is said anew each time, and what is needed no more is let go; a piece is
checked before it leaves here to be written; one that cannot be written is wanted again when there is room; messages are
acknowledged when what they brought was dealt with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum

from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.transport.link import Message
from edge_agent.transport.topics import Topics
from ota.chunks import Artefact, artefact_of, decode_chunk, sign_wants
from ota.events import Abandon, Done, Effect, Finish, Finished, Leave, Listen, Note, Open, Opened, Say, Store, Stored
from ota.fetching import Fetching
from ota.lifecycle import Need

MAX_AT_ONCE = 2
RETRY_US = 10_000_000
SAY_PERIOD_US = 250_000
"""Wants are said no more often."""


class Phase(StrEnum):
    OPENING = "opening"
    FETCHING = "fetching"
    FINISHING = "finishing"
    RESTING = "resting"
    """Something went wrong that may pass; it is tried again after a while."""


class _Transfer:
    def __init__(self, need: Need) -> None:
        self.need = need
        self.artefact = artefact_of(need.file) if need.file is not None else Artefact(need.digest, need.size_bytes)
        self.phase = Phase.RESTING
        self.fetching: Fetching | None = None
        self.writing = 0
        """Pieces that were handed to the shell and are not yet written."""
        self.retry_us = 0
        self.why = ""


class Transfers:
    """``held``: the artefacts that are whole in the cache; ``never``: those that cannot be had, and why."""

    def __init__(self, board: str, boot_epoch: int, signer: Signer, topics: Topics, held: Iterable[bytes] = ()) -> None:
        self._board, self._boot_epoch, self._signer, self._topics = board, boot_epoch, signer, topics
        self.held = set(held)
        self.never: dict[bytes, str] = {}
        self.link_up = False
        self._transfers: dict[bytes, _Transfer] = {}
        self._number = 0
        self._listening: set[bytes] = set()
        self._said_us = -SAY_PERIOD_US
        self._owes_word = True

    def holds(self, digest: bytes) -> bool:
        return digest in self.held

    def permille(self, digest: bytes) -> int:
        """How much of an artefact is here."""
        if digest in self.held:
            return 1000
        transfer = self._transfers.get(digest)
        return transfer.fetching.permille if transfer is not None and transfer.fetching is not None else 0

    def why_never(self, digest: bytes) -> str:
        return self.never.get(digest, "")

    @property
    def why(self) -> str:
        """What keeps the first transfer that is kept from going on; empty if nothing does."""
        return next((each.why for each in self._transfers.values() if each.why), "")

    @property
    def pending(self) -> bool:
        return bool(self._transfers)

    def turned(self, up: bool) -> None:
        """The link came up or went down."""
        self.link_up, self._owes_word = up, True
        self._listening.clear()
        for each in self._transfers.values():
            if each.fetching is not None and up:
                each.fetching.again()

    def go_on(self, needs: Iterable[Need], now_us: int) -> Iterator[Effect]:
        """Work on what is needed, the first first."""
        wanted: dict[bytes, Need] = {}
        for need in needs:
            if len(wanted) < MAX_AT_ONCE and need.digest not in self.held and need.digest not in self.never:
                wanted.setdefault(need.digest, need)
        for digest in [digest for digest in self._transfers if digest not in wanted]:
            yield from self._let_go(digest)
        for digest, need in wanted.items():
            if digest not in self._transfers:
                self._transfers[digest] = _Transfer(need)
            yield from self._go_on_with(self._transfers[digest], now_us)
        yield from self._say(now_us)

    def heard(self, digest: bytes, payload: bytes, token: int) -> Iterator[Effect]:
        """A piece of an artefact came."""
        transfer = self._transfers.get(digest)
        if transfer is None or transfer.fetching is None or transfer.phase is not Phase.FETCHING:
            yield Done(token)
            return
        try:
            index, data = decode_chunk(payload)
            is_new = transfer.fetching.heard(index, data)
        except RefusedError as error:
            yield Note(f"a piece that is none: {error}")
            is_new = False
        if not is_new:
            yield Done(token)
            return
        transfer.writing += 1
        yield Store(digest, index, data, token)

    def opened(self, event: Opened, now_us: int) -> None:
        transfer = self._transfers.get(event.digest)
        if transfer is None or transfer.phase is not Phase.OPENING:
            return
        if event.why:
            self._rest(transfer, event.why, now_us)
            return
        transfer.fetching, transfer.writing, transfer.why = Fetching(transfer.artefact, event.held), 0, ""
        transfer.phase = Phase.FETCHING

    def stored(self, event: Stored, now_us: int) -> Iterator[Effect]:
        if event.token:
            yield Done(event.token)
        transfer = self._transfers.get(event.digest)
        if transfer is None or transfer.fetching is None:
            return
        transfer.writing = max(0, transfer.writing - 1)
        if event.why and transfer.phase is Phase.FETCHING:
            self._rest(transfer, event.why, now_us)
            yield from self._leave(event.digest)

    def finished(self, event: Finished, now_us: int) -> None:
        transfer = self._transfers.get(event.digest)
        if not event.why:
            self.held.add(event.digest)
            self._transfers.pop(event.digest, None)
            self._owes_word = True
        elif event.refused:
            self.never[event.digest] = event.why
            self._transfers.pop(event.digest, None)
        elif transfer is not None:
            self._rest(transfer, event.why, now_us)

    def lost(self, digest: bytes) -> None:
        """An artefact is in the cache no more."""
        self.held.discard(digest)

    def _go_on_with(self, transfer: _Transfer, now_us: int) -> Iterator[Effect]:
        digest = transfer.artefact.digest
        if transfer.phase is Phase.RESTING and now_us >= transfer.retry_us:
            transfer.phase = Phase.OPENING
            yield Open(transfer.artefact, transfer.need.seeds, transfer.need.model)
        elif transfer.phase is Phase.FETCHING and transfer.fetching is not None:
            if transfer.fetching.done and not transfer.writing:
                transfer.phase = Phase.FINISHING
                yield from self._leave(digest)
                yield Finish(digest)
            elif self.link_up and digest not in self._listening:
                self._listening.add(digest)
                yield Listen(self._topics.ota_chunk(digest.hex()))

    def _rest(self, transfer: _Transfer, why: str, now_us: int) -> None:
        transfer.phase, transfer.why, transfer.retry_us = Phase.RESTING, why, now_us + RETRY_US
        transfer.fetching = None

    def _let_go(self, digest: bytes) -> Iterator[Effect]:
        del self._transfers[digest]
        yield from self._leave(digest)
        yield Abandon(digest)

    def _leave(self, digest: bytes) -> Iterator[Effect]:
        if digest in self._listening:
            self._listening.discard(digest)
            if self.link_up:
                yield Leave(self._topics.ota_chunk(digest.hex()))

    def _say(self, now_us: int) -> Iterator[Effect]:
        """What this board lacks, to the fleet: when it is due by any artefact, or there is nothing any more."""
        if not self.link_up or now_us - self._said_us < SAY_PERIOD_US:
            return
        under_way = (each.fetching for each in self._transfers.values() if each.phase is Phase.FETCHING)
        lacking = [each for each in under_way if each is not None and not each.done]
        if not any(each.want_due(now_us) for each in lacking) and not (self._owes_word and not lacking):
            return
        self._owes_word, self._said_us = bool(lacking), now_us
        self._number += 1
        wants = [each.ask(now_us) for each in lacking]
        payload = sign_wants(self._board, self._boot_epoch, self._number, wants, self._signer)
        yield Say(Message(self._topics.ota_want(self._board), payload, retain=True))
