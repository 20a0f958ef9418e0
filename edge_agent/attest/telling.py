"""What a verifier tells of one board, and when: the appraisals that it publishes.

Owns ``Telling``.  Rules: a contraindication is told at once, any other change at most once a second; when a quote comes, two of
its board's verifiers, by turns, say at once which one they hold, and in each epoch about one says so again, so that who was shown
another one notices; a quote that somebody was shown differently is shown.
"""

from __future__ import annotations

from edge_agent.attest.appraisal import Appraisal
from edge_agent.attest.claims import Verdict
from edge_agent.attest.standing import UNHEARD, Standing
from edge_agent.core.values import TrustTier

TELL_PERIOD_US = 1_000_000
SAY_AGAIN_EPOCHS = 8
"""A verifier says again what it holds of a board in every eighth epoch, or more often where fewer verify it."""
WITNESSES = 2
"""So many verifiers of a board, by turns, say at once which quote they hold when one comes."""
SILENT_EPOCHS = 2
"""Of a board of which nothing came since this one started nothing is said before: what was said last may still hold."""


class Telling:
    """``verifiers``: all of ``board``, of whom ``verifier`` is one."""

    def __init__(self, verifier: str, board: str, verifiers: tuple[str, ...]) -> None:
        self._verifier, self._board = verifier, board
        self.verifiers = verifiers
        self._place, self._count = verifiers.index(verifier), len(verifiers)
        self._told: Verdict | None = None
        self._raw: tuple[bytes, ...] = ()
        self._at_us: int | None = None
        self._due_epoch = 0
        self._witness = b""

    def shown(self, counter: int, epoch: int) -> None:
        """A fresh quote with this number came: is it this board's turn to say which one it holds?"""
        if (self._place - counter) % self._count < WITNESSES:
            self._due_epoch = epoch

    def doubted(self, witness: bytes) -> None:
        """Another verifier holds another quote than this one, which was shown here; empty if it is not held whole any more."""
        self._witness = witness

    def epoch_over(self) -> None:
        self._witness = b""

    def say_again(self) -> None:
        """What was told may be lost."""
        self._told, self._at_us = None, None

    def is_due(self, standing: Standing, epoch: int, now_us: int) -> bool:
        verdict = standing.verdict()
        if self._told is None and verdict == UNHEARD:
            return epoch > SILENT_EPOCHS
        is_new = (verdict, self._to_show(standing)) != (self._told, self._raw)
        if is_new and verdict.tier is TrustTier.CONTRAINDICATED and not self._told_contraindicated():
            return True
        may_speak = self._at_us is None or now_us - self._at_us >= TELL_PERIOD_US
        return may_speak and (is_new or epoch >= self._due_epoch)

    def tell(self, standing: Standing, version: tuple[int, int], epoch: int, now_us: int, issued_s: int) -> Appraisal:
        """The appraisal with this ``(boot_epoch, sequence)``, to be published now."""
        verdict, about = standing.verdict(), standing.shown_trace or standing.history.mark
        self._told, self._raw, self._at_us = verdict, self._to_show(standing), now_us
        period = min(SAY_AGAIN_EPOCHS, self._count)
        self._due_epoch = epoch + 1 + (self._place - epoch - 1) % period
        return Appraisal(
            verifier=self._verifier,
            boot_epoch=version[0],
            sequence=version[1],
            board=self._board,
            tier=verdict.tier,
            vector=verdict.vector,
            reasons=verdict.reasons,
            evidence=about.digest if about else b"",
            bootcount=about.bootcount if about else 0,
            counter=about.counter if about else 0,
            epoch=epoch,
            issued_s=issued_s,
            raw=self._raw,
        )

    def _told_contraindicated(self) -> bool:
        return self._told is not None and self._told.tier is TrustTier.CONTRAINDICATED

    def _to_show(self, standing: Standing) -> tuple[bytes, ...]:
        """The quotes that show what is held against the board, or the one that somebody was shown differently."""
        return standing.proof or ((self._witness,) if self._witness else ())
