"""This board as attester (RFC 9334): what it shows of itself, and when.

Owns what was measured last, the chain of this boot's quotes, and the nonces that go into the next one.  Rules:

* A quote is due once in each epoch of this board's own, and, at most once in ``QUOTE_PERIOD_US``, when what is measured
  changed, when it is challenged, when a verifier begins anew (all its nonces are new then), and on a new connection.
* A quote names the one before; its number counts from the moment at which its content is fixed, so that receipts, which name
  that number, and quotes have one order.
* Where hardware vouches for this board it is asked to before the quote is signed; if it does not, the quote says so by
  claiming no more than a key in a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edge_agent.attest.epoch import Challenge, EpochMark, HeardEpochs
from edge_agent.attest.evidence import NO_DIGEST, KeyKind, Measurements, Quote, endorsed_digest, quote_digest, sign_quote
from edge_agent.attest.receipts import Chain
from edge_agent.attest.settings import AttestSettings
from edge_agent.node.events import Effect, Endorse, Endorsed, Log
from edge_agent.node.settings import NodeSettings

QUOTE_PERIOD_US = 1_000_000
ENDORSE_PATIENCE_US = 10_000_000


class Attester:
    """``verifiers``: who appraises this board. ``latest``: the last quote and as it was signed; ``None`` before the first."""

    def __init__(self, settings: NodeSettings, attest: AttestSettings, chain: Chain, verifiers: frozenset[str]) -> None:
        self._settings, self._attest, self._chain, self.verifiers = settings, attest, chain, verifiers
        self._heard = HeardEpochs()
        self._lives: dict[str, int] = {}
        """By verifier: the boot that its newest nonce is of."""
        self.measurements: Measurements | None = None
        self.latest: tuple[Quote, bytes] | None = None
        self.number = 0
        """Of the last quote whose content is fixed."""
        self._previous = NO_DIGEST
        self._unendorsed: tuple[Quote, int] | None = None
        """What waits for the hardware, and since when."""
        self._wanted = False
        self._quoted_us: int | None = None

    def measured(self, measurements: Measurements) -> None:
        self._wanted |= measurements != self.measurements
        self.measurements = measurements

    def repeat(self) -> None:
        """Whoever verifies may not have the last quote."""
        self._wanted = True

    def hear_epoch(self, mark: EpochMark) -> None:
        """A verifier began an epoch."""
        if mark.verifier in self.verifiers and self._heard.hear(mark) and self._lives.get(mark.verifier) != mark.boot_epoch:
            self._lives[mark.verifier] = mark.boot_epoch
            self._wanted = True

    def hear_challenge(self, challenge: Challenge) -> None:
        """A verifier wants a quote now. What comes from others is nothing to this board."""
        if challenge.board == self._settings.board and challenge.verifier in self.verifiers:
            self._wanted |= self._heard.hear_challenge(challenge)

    def endorsed(self, event: Endorsed) -> Iterator[Quote | Log]:
        """The hardware has answered: the quote that waited for it, to be signed."""
        if self._unendorsed is None or endorsed_digest(self._unendorsed[0]) != event.challenge:
            return
        quote, _ = self._unendorsed
        self._unendorsed = None
        if event.endorsement:
            yield replace(quote, endorsement=event.endorsement)
        else:
            yield Log(f"the hardware does not vouch for this board: {event.refusal or 'no reason given'}")
            yield replace(quote, key_kind=KeyKind.SOFTWARE)

    def due(self, now_us: int) -> bool:
        """Is a quote to be made now?"""
        if self.measurements is None:
            return False
        if self._unendorsed is not None and now_us - self._unendorsed[1] < ENDORSE_PATIENCE_US:
            return False
        if self._quoted_us is None:
            return True
        since_us = now_us - self._quoted_us
        return since_us >= self._attest.epoch_us or (self._wanted and since_us >= QUOTE_PERIOD_US)

    def next(self, now_us: int, issued_s: int) -> Iterator[Quote | Effect]:
        """The quote that is due: to be signed, or first to be endorsed."""
        self.number += 1
        quote = self.draft(now_us, issued_s)
        self._quoted_us, self._wanted, self._unendorsed = now_us, False, None
        self._heard.answered()
        if quote.key_kind is KeyKind.SOFTWARE:
            yield quote
        else:
            self._unendorsed = quote, now_us
            yield Endorse(endorsed_digest(quote))

    def draft(self, now_us: int, issued_s: int) -> Quote:
        """What this board has to show now. Raises ``RuntimeError`` before it has measured itself."""
        if self.measurements is None:
            raise RuntimeError("nothing was measured yet")
        settings, attest = self._settings, self._attest
        return Quote(
            board=settings.board,
            nonces=self._heard.nonces(self.verifiers),
            bootcount=settings.boot_epoch,
            bootseed=attest.bootseed,
            counter=max(1, self.number),
            previous=self._previous,
            issued_s=issued_s,
            uptime_s=max(0, now_us) // 1_000_000,
            hardware=settings.hardware,
            emulated=settings.emulated,
            version=attest.version,
            measurements=self.measurements,
            receipts=self._chain.count,
            receipts_head=self._chain.head,
            receipts_dropped=self._chain.dropped,
            key_kind=attest.key_kind,
        )

    def signed(self, quote: Quote) -> bytes:
        """The quote as it goes out, now the last one."""
        message = sign_quote(quote, self._settings.signer)
        self._previous = quote_digest(message)
        self.latest = quote, message
        return message
