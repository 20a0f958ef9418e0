"""Which piece to send next, once for all who want it.

Owns ``Giving``.  Rules: pure, on a clock that is passed in.

* A piece is sent once for everybody who asked before.  It is repeated only for a board of which later words show that it has
  lost it: it has what was sent after it, or it says that nothing comes any more.
* Nobody is believed: a board may have so much repeated as it has come forward, twice its artefact besides, some more each hour
  and a little when it has started anew, and first sends go before repeats.  Who is slow or silent is not waited for; but if
  nobody says that anything arrives, nothing more is sent.
* Givers do not talk to each other.  Who is ``first`` (the operator's machine) gives at once; a board that holds an artefact has a
  rank among all that do, and begins when a board that asked has got next to nothing for as many times ``patience_us``.
* Tables are bounded: ``MAX_OFFERS`` artefacts, ``MAX_BOARDS`` boards, ``MAX_REMEMBERED_BITS`` of wants for what is not held.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from edge_agent.core.values import MAX_BOARDS
from ota.chunks import Artefact, Want, Wants
from ota.offer import Offer

MAX_OFFERS = 256
MAX_REMEMBERED_BITS = 8 * 2**20
WINDOW_PIECES = 512
"""Sent and not known to have arrived, of all artefacts: well below the 1,000 messages that Mosquitto queues for a client."""
PATIENCE_US = 10_000_000
NEXT_TO_NOTHING_PIECES = 4
"""A board that got fewer within a patience has no giver."""
MAX_RANK = 16


class Giving:
    """``me``: this board, or the operator's name; ``rate_bytes_per_s``: 0 for no limit; ``first``: of the operator's machine.

    ``holders``: for every artefact the boards that hold it, as far as is known here; to be replaced at will.
    """

    def __init__(self, me: str, rate_bytes_per_s: int = 0, first: bool = False, patience_us: int = PATIENCE_US) -> None:
        self.me, self.rate_bytes_per_s, self.first, self.patience_us = me, rate_bytes_per_s, first, patience_us
        self.holders: Mapping[bytes, frozenset[str]] = {}
        self.given_bytes = self.given_pieces = 0
        self._offers: dict[bytes, Offer] = {}
        self._newness: dict[str, tuple[int, int]] = {}
        self._remembered: dict[str, tuple[Want, ...]] = {}
        self._free_us = 0
        self._now_us = 0

    def hold(self, artefact: Artefact) -> None:
        """This artefact is here and may be given. Raises ``ValueError`` past ``MAX_OFFERS``."""
        if artefact.digest in self._offers:
            return
        if len(self._offers) >= MAX_OFFERS:
            raise ValueError(f"at most {MAX_OFFERS} artefacts are given at once")
        start = 0 if self.first else self._lot(artefact.digest, self.me) % artefact.count
        offer = self._offers[artefact.digest] = Offer(artefact, start)
        for board, wants in list(self._remembered.items()):
            for want in wants:
                if want.fits(artefact):
                    self._take(offer, board, want, self._now_us)
            self._remember(board, tuple(each for each in wants if each.digest != artefact.digest))

    def drop(self, digest: bytes) -> None:
        """It is not here any more."""
        self._offers.pop(digest, None)

    def held(self) -> list[Artefact]:
        return [each.artefact for each in self._offers.values()]

    def heard_wants(self, wants: Wants, now_us: int) -> None:
        """What a board lacks, as far as these are its newest wants."""
        self._now_us = max(self._now_us, now_us)
        known = self._newness.get(wants.board)
        if wants.board == self.me or (known is None and len(self._newness) >= MAX_BOARDS):
            return
        if known is not None and wants.newness <= known:
            return
        self._newness[wants.board] = wants.newness
        listed = {each.digest: each for each in wants.wants}
        for digest, offer in self._offers.items():
            want = listed.pop(digest, None)
            if want is not None and want.fits(offer.artefact):
                self._take(offer, wants.board, want, now_us)
                if known is not None and wants.boot_epoch > known[0]:
                    offer.started_anew(wants.board, now_us)
            else:
                offer.leave(wants.board)
        self._remember(wants.board, tuple(listed.values()))

    def gone(self, board: str) -> None:
        """A board is not there any more: nothing is sent for it until it asks anew."""
        self._remembered.pop(board, None)
        for offer in self._offers.values():
            offer.leave(board)

    def next(self, now_us: int) -> tuple[bytes, int] | None:
        """Digest and index of the piece to send now; the same again until ``sent`` was called. ``None``: see ``next_us``."""
        self._now_us = max(self._now_us, now_us)
        if now_us < self._free_us:
            return None
        busy = [each for each in self._offers.values() if each.wanters]
        for offer in sorted(busy, key=lambda each: each.last_us):
            self._begin(offer, now_us)
            if now_us < offer.open_us or offer.blocked(now_us, max(1, WINDOW_PIECES // len(busy))):
                continue
            index = offer.pick(now_us)
            if index is not None:
                return offer.artefact.digest, index
        return None

    def sent(self, digest: bytes, index: int, now_us: int) -> None:
        """The link took this piece."""
        offer = self._offers.get(digest)
        if offer is None:
            return
        size_bytes = offer.artefact.piece_bytes(index)
        offer.note(index, now_us)
        self.given_bytes += size_bytes
        self.given_pieces += 1
        if self.rate_bytes_per_s:
            self._free_us = max(now_us, self._free_us) + size_bytes * 1_000_000 // self.rate_bytes_per_s

    def next_us(self, now_us: int) -> int | None:
        """After ``next`` gave nothing: when to ask it again; ``None`` while only a want can change that."""
        if now_us < self._free_us:
            return self._free_us
        times = [time_us for offer in self._offers.values() if offer.wanters for time_us in self._turns_us(offer, now_us)]
        return min(times, default=None)

    def _turns_us(self, offer: Offer, now_us: int) -> list[int]:
        times = [offer.open_us] if offer.open_us > now_us else []
        wait_us = self._rank(offer) * self.patience_us
        times += [t for each in offer.wanters.values() if not each.begun and (t := each.progress_us + wait_us) > now_us]
        opens_us = offer.opens_us(now_us)
        return [*times, opens_us] if opens_us is not None else times

    def _take(self, offer: Offer, board: str, want: Want, now_us: int) -> None:
        wanter = offer.wanters.get(board)
        if wanter is None:
            offer.join(board, want, now_us)
            return
        arrived = wanter.lacking & ~want.lacking
        foreign = not self.first and offer.is_foreign(arrived)
        offer.advance(wanter, want, now_us, alone=self.first)
        wanter.progressed += arrived.bit_count()
        if wanter.progressed >= NEXT_TO_NOTHING_PIECES or (foreign and wanter.begun):
            wanter.progressed, wanter.progress_us = 0, now_us
        if foreign and wanter.begun:
            wanter.begun, offer.refreshed_us = False, None

    def _begin(self, offer: Offer, now_us: int) -> None:
        """Whoever got next to nothing for as long as this giver's rank asks is given to from now on."""
        waiting = [each for each in offer.wanters.values() if not each.begun]
        wait_us = self._rank(offer) * self.patience_us if waiting else 0
        for wanter in waiting:
            if now_us - wanter.progress_us >= wait_us:
                wanter.begun, wanter.news_us = True, now_us
                offer.refreshed_us = None

    def _rank(self, offer: Offer) -> int:
        if self.first:
            return 0
        digest = offer.artefact.digest
        mine = self._lot(digest, self.me)
        before = sum(self._lot(digest, each) < mine for each in self.holders.get(digest, frozenset()) if each != self.me)
        return min(1 + before, MAX_RANK)

    def _lot(self, digest: bytes, board: str) -> int:
        return int.from_bytes(sha256(digest + board.encode()).digest()[:8])

    def _remember(self, board: str, wants: tuple[Want, ...]) -> None:
        """For what may be held later; the oldest give way."""
        self._remembered.pop(board, None)
        if wants:
            self._remembered[board] = wants
        bits = sum(want.count for each in self._remembered.values() for want in each)
        while bits > MAX_REMEMBERED_BITS:
            bits -= sum(want.count for want in self._remembered.pop(next(iter(self._remembered))))
