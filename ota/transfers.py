"""The artefacts that this board fetches: a few at a time, piece by piece, into staging and from there into the cache.

Owns ``Transfers``.  Rules: sans-I/O; what is needed is said anew each time, what is begun goes on before anything else of its
kind, and what is needed no more is let go; a piece is checked before it leaves here to be written; one that cannot be written is
wanted again when there is room; an answer of the disk that never comes is asked for again; messages are acknowledged when what
they brought was dealt with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
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
"""Files of releases. What is a single piece (a charter, a manifest) never waits."""
MAX_NEVER = 1024
"""Artefacts of which is remembered why they cannot be had: the newest."""
RETRY_US = 10_000_000
ANSWER_LIMIT_US = 1_800_000_000
"""Hashing 4 GiB on a slow card takes minutes; half an hour is no answer."""
SAY_PERIOD_US = 250_000
"""Wants are said no more often."""


class Phase(StrEnum):
    OPENING = "opening"
    FETCHING = "fetching"
    FINISHING = "finishing"
    RESTING = "resting"
    """Something went wrong that may pass; it is tried again after a while."""


class _Transfer:
    """Raises ``RefusedError`` for a need that is no artefact."""

    def __init__(self, need: Need) -> None:
        self.need = need
        self.artefact = artefact_of(need.file) if need.file is not None else Artefact(need.digest, need.size_bytes)
        self.phase = Phase.RESTING
        self.fetching: Fetching | None = None
        self.writing = 0
        """Pieces that were handed to the shell and are not yet written."""
        self.waits_us: int | None = None
        """Since when nothing can go on without an answer."""
        self.retry_us = 0
        self.odd = 0
        """Messages on its topic that are no pieces of it."""
        self.permille = 0
        self.why = ""

    @property
    def waits(self) -> bool:
        if self.phase is Phase.FETCHING and self.fetching is not None:
            return self.fetching.done and self.writing > 0
        return self.phase in (Phase.OPENING, Phase.FINISHING)

    def waits_too_long(self, now_us: int) -> bool:
        if not self.waits:
            self.waits_us = None
            return False
        self.waits_us = now_us if self.waits_us is None else self.waits_us
        return now_us - self.waits_us >= ANSWER_LIMIT_US

    def rest(self, why: str, now_us: int) -> None:
        self.phase, self.why, self.retry_us, self.waits_us = Phase.RESTING, why, now_us + RETRY_US, None
        self.fetching = None


class Transfers:
    """``held``: the artefacts that are whole in the cache and stay there; ``never``: those that cannot be had, and why."""

    def __init__(self, board: str, boot_epoch: int, signer: Signer, topics: Topics, held: Iterable[bytes] = ()) -> None:
        self._board, self._boot_epoch, self._signer, self._topics = board, boot_epoch, signer, topics
        self.held = set(held)
        self.never: dict[bytes, str] = {}
        self.link_up = False
        self._transfers: dict[bytes, _Transfer] = {}
        self._number = 0
        self._listening: set[bytes] = set()
        self._said: Message | None = None
        self._said_us = -SAY_PERIOD_US
        self._owes_word, self._owes_said = True, False
        """A word of what is lacking; what was said last."""

    def holds(self, digest: bytes) -> bool:
        return digest in self.held

    def permille(self, digest: bytes) -> int:
        """How much of an artefact is here."""
        if digest in self.held:
            return 1000
        transfer = self._transfers.get(digest)
        if transfer is None:
            return 0
        if transfer.fetching is not None:
            transfer.permille = transfer.fetching.permille
        return transfer.permille

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
        """Work on what is needed, what is begun first and then in this order. A single piece that somebody needs was not read."""
        wanted: dict[bytes, Need] = {}
        for need in needs:
            if need.digest not in self.never and (need.file is None or need.digest not in self.held):
                wanted.setdefault(need.digest, need)
        for digest in [digest for digest in self._transfers if digest not in wanted]:
            yield from self._let_go(digest)
        for need in wanted.values():
            yield from self._begin(need)
        for transfer in list(self._transfers.values()):
            yield from self._go_on_with(transfer, now_us)
        yield from self._say(now_us)

    def keep_only(self, digests: Collection[bytes]) -> None:
        """Nothing else is sure to stay in the cache."""
        self.held.intersection_update(digests)

    def refuse(self, digest: bytes, why: str) -> None:
        """An artefact is of no use here, whatever comes."""
        self.never.pop(digest, None)
        self.never[digest] = why
        if len(self.never) > MAX_NEVER:
            del self.never[next(iter(self.never))]

    def hear_own(self, newness: tuple[int, int] | None) -> None:
        """Which wants of this board the broker has, ``None`` for none that are good: if they are not the last, these are owed."""
        if newness is None or newness < (self._boot_epoch, self._number):
            self._owes_said = True

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
            is_new, transfer.odd = False, transfer.odd + 1
            if transfer.odd.bit_count() == 1:
                yield Note(f"no piece of what is fetched, {transfer.odd} such by now: {error}")
        if not is_new:
            yield Done(token)
            return
        transfer.writing += 1
        yield Store(digest, index, data, token)

    def opened(self, event: Opened, now_us: int) -> None:
        transfer = self._transfers.get(event.digest)
        if transfer is None or transfer.phase is not Phase.OPENING:
            return
        if event.refused:
            self.refuse(event.digest, event.why)
            del self._transfers[event.digest]
        elif event.why:
            transfer.rest(event.why, now_us)
        else:
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
            transfer.rest(event.why, now_us)
            yield from self._leave(event.digest)

    def finished(self, event: Finished, now_us: int) -> None:
        transfer = self._transfers.get(event.digest)
        if not event.why:
            self.held.add(event.digest)
            self._transfers.pop(event.digest, None)
            self._owes_word = True
        elif event.refused:
            self.refuse(event.digest, event.why)
            self._transfers.pop(event.digest, None)
        elif transfer is not None:
            transfer.rest(event.why, now_us)

    def _begin(self, need: Need) -> Iterator[Effect]:
        files = sum(each.need.file is not None for each in self._transfers.values())
        if need.digest in self._transfers or (need.file is not None and files >= MAX_AT_ONCE):
            return
        try:
            self._transfers[need.digest] = _Transfer(need)
        except RefusedError as error:
            self.refuse(need.digest, str(error))
            yield Note(f"signed, and of no use here: {error}")

    def _go_on_with(self, transfer: _Transfer, now_us: int) -> Iterator[Effect]:
        digest = transfer.artefact.digest
        if transfer.waits_too_long(now_us):
            transfer.rest(f"artefact {digest.hex()[:16]}: the disk gave no answer while {transfer.phase.value}", now_us)
            yield from self._leave(digest)
        if transfer.phase is Phase.RESTING and now_us >= transfer.retry_us:
            transfer.phase = Phase.OPENING
            yield Open(transfer.artefact, (digest, *transfer.need.seeds), transfer.need.model)
        elif transfer.phase is Phase.FETCHING and transfer.fetching is not None:
            if transfer.fetching.done and not transfer.writing:
                transfer.phase = Phase.FINISHING
                yield from self._leave(digest)
                yield Finish(digest)
            elif self.link_up and digest not in self._listening:
                self._listening.add(digest)
                yield Listen(self._topics.ota_chunk(digest.hex()))

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
        if any(each.want_due(now_us) for each in lacking) or (self._owes_word and not lacking):
            self._owes_word, self._number = bool(lacking), self._number + 1
            wants = [each.ask(now_us) for each in lacking]
            payload = sign_wants(self._board, self._boot_epoch, self._number, wants, self._signer)
            self._said = Message(self._topics.ota_want(self._board), payload, retain=True)
        elif not self._owes_said or self._said is None:
            return
        self._owes_said, self._said_us = False, now_us
        yield Say(self._said)
