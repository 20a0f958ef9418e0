"""What a verifier holds of one attester: how it stands, how that decays, and what is held against it.

The lifecycle; a move that is not in the table raises and changes nothing:

    state \\ move       SHOWN            MISSED    LAPSED    FOUND             CLEARED
    unknown            fresh            -         -         contraindicated   unknown
    fresh              fresh            stale     lapsed    contraindicated   unknown
    stale              fresh            stale     lapsed    contraindicated   unknown
    lapsed             fresh            -         -         contraindicated   unknown
    contraindicated    contraindicated  -         -         contraindicated   unknown

SHOWN: fresh evidence; MISSED: an epoch without any; LAPSED: the last of so many, or the first without any of the boot that the
board is in; FOUND: something that no honest board does; CLEARED: an operator's word.  Rules: a timeout never contraindicates and
can always be made good; a contraindication is kept, with its reasons and the quotes that show it, until an operator clears it;
what an operator cleared is not held against the board again, although it may be heard again (``Floor``); only what the board
signed, what was run again here, and operators count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from edge_agent.attest.appraisal import MAX_RAW, Vector
from edge_agent.attest.claims import EXECUTABLES_CONTRAINDICATED, INSTANCE_UNTRUSTWORTHY, NOT_FRESH, Finding, Verdict, judged
from edge_agent.attest.evidence import NO_DIGEST, Quote, quote_digest
from edge_agent.attest.history import Clash, History, Place, QuoteTrace, ReceiptTrace
from edge_agent.attest.receipts import Receipt
from edge_agent.core.values import TrustTier

MAX_STRIKES = 2
"""Answers outside the tolerance, within ``STRIKE_WINDOW`` checks, that contraindicate; of exact ones the first does."""
STRIKE_WINDOW = 64
NONCE_EPOCHS = 2
"""A nonce is accepted in its own epoch and in the next: after so many ends of epochs none is left from before."""
UNHEARD = Verdict(TrustTier.NONE, Vector(), ("no evidence has come yet",))


class State(StrEnum):
    UNKNOWN = "unknown"
    FRESH = "fresh"
    STALE = "stale"
    LAPSED = "lapsed"
    CONTRAINDICATED = "contraindicated"


class Move(StrEnum):
    SHOWN = "shown"
    MISSED = "missed"
    LAPSED = "lapsed"
    FOUND = "found"
    CLEARED = "cleared"


_SEEN = (State.FRESH, State.STALE)
MOVES: Mapping[tuple[State, Move], State] = {
    **{(state, Move.SHOWN): State.FRESH for state in State},
    (State.CONTRAINDICATED, Move.SHOWN): State.CONTRAINDICATED,
    **{(state, Move.MISSED): State.STALE for state in _SEEN},
    **{(state, Move.LAPSED): State.LAPSED for state in _SEEN},
    **{(state, Move.FOUND): State.CONTRAINDICATED for state in State},
    **{(state, Move.CLEARED): State.UNKNOWN for state in State},
}


@dataclass(frozen=True, slots=True)
class Floor:
    """How far a board had come, in which boot, when an operator cleared it.

    Moved up by the first fresh quote after that.  What it said until then is forgotten; what is heard later counts if it is
    fresh, or of a boot that has shown something fresh since: so a board that was set up anew, and counts from 1 again, is not
    held to what it was before.
    """

    place: Place = (0, 0)
    bootseed: bytes = NO_DIGEST


class Standing:
    """``missed``: the setting, after how many epochs nothing is known any more."""

    def __init__(self, missed: int) -> None:
        self._most_missed = missed
        self.state = State.UNKNOWN
        self.history = History()
        self.floor: Floor | None = None
        self.found: Verdict | None = None
        self.proof: tuple[bytes, ...] = ()
        self.shown_trace: QuoteTrace | None = None
        """Of the last fresh quote: what the verdict is about."""
        self.checks = 0
        self.strikes: tuple[int, ...] = ()
        self._shown = UNHEARD
        self._missed = 0
        self._epochs_of_boot = NONCE_EPOCHS
        self._golden: dict[object, bytes] = {}
        self._boot = 0
        """The latest that the board said it is in, in whatever it signed."""
        self.overtaken = False
        """The boot that the last fresh evidence is of is over."""
        self.shown_in_epoch = False
        self.asked_in_epoch = False

    def verdict(self) -> Verdict:
        """How it stands now."""
        if self.found is not None:
            return self.found
        if self.state in (State.UNKNOWN, State.FRESH):
            return self._shown
        without = f"no fresh evidence for {self._missed} epoch{'s' * (self._missed > 1)}"
        if self.overtaken:
            without = f"no evidence yet of boot {self._boot}, in which it is"
        if self.state is State.LAPSED:
            return Verdict(TrustTier.NONE, Vector(), (without,))
        stale = replace(self._shown.vector, instance_identity=NOT_FRESH)
        return Verdict(self._shown.tier, stale, self._shown.reasons).capped(TrustTier.WARNING, without)

    def hear_quote(self, message: bytes, quote: Quote, fresh: bool) -> str:
        """Take in a signed quote; what it is worth is said with ``shown``.

        Returns why it refreshes nothing, empty if it does.
        """
        trace = QuoteTrace.of(quote, message)
        if self.history.holds(trace.digest):
            return "it was heard before"
        if self._is_forgotten(trace, fresh):
            return f"it is from before an operator cleared the board, {_named(trace)}"
        if clash := self.history.clash_of_quote(trace, message):
            return self._found_lying(clash)
        if fresh and trace.bootcount < self.history.place[0] and self._epochs_of_boot >= NONCE_EPOCHS:
            followed = f"boot {trace.bootcount}, which boot {self.history.place[0]} followed"
            return self._found_lying(Clash(f"a nonce of now in {followed}: rolled back, or a copy", (message,)))
        return self._take(trace, message, fresh)

    def hear_boot(self, bootcount: int) -> None:
        """The board says elsewhere that it is in this boot: evidence of one before holds no longer than this epoch."""
        if bootcount <= self._boot:
            return
        self._boot = bootcount
        if self.state in _SEEN and not self.overtaken and self.shown_trace and bootcount > self.shown_trace.bootcount:
            self.overtaken, self.asked_in_epoch = True, False

    def shown(self, quote: Quote, message: bytes, verdict: Verdict) -> None:
        """This quote is fresh, and ``verdict`` is what it is worth."""
        if verdict.tier is TrustTier.CONTRAINDICATED:
            self.find(verdict, (message,))
        elif changed := self._changed_answer(quote):
            self.find(judged([Finding("executables", EXECUTABLES_CONTRAINDICATED, changed)]), (message,))
        self.move(Move.SHOWN)
        self._shown, self._missed, self.shown_in_epoch = verdict, 0, True
        self.overtaken &= quote.bootcount < self._boot
        self.shown_trace = QuoteTrace.of(quote, message)

    def appraised_again(self, message: bytes, verdict: Verdict) -> None:
        """The last fresh quote is worth this, by references that have changed; it is no fresher by that."""
        if self.shown_trace is None or self.shown_trace.digest != quote_digest(message):
            return
        if verdict.tier is TrustTier.CONTRAINDICATED:
            self.find(verdict, (message,))
        self._shown = verdict

    def hear_receipt(self, message: bytes, receipt: Receipt) -> str:
        """Hold a signed receipt against all else that the board signed. Returns what contradicts, empty if nothing does."""
        trace = ReceiptTrace.of(receipt, message)
        if self._is_forgotten_receipt(trace):
            return ""
        if clash := self.history.clash_of_receipt(trace):
            return self._found_lying(clash)
        self.history.add_receipt(trace)
        return ""

    def checked(self) -> None:
        """One of its answers was run again, and was right."""
        self.checks += 1

    def struck(self, exact: bool, what: str) -> None:
        """One of its answers was run again, and was wrong; ``exact``: bit for bit, where every engine gives the same bits."""
        self.checks += 1
        self.strikes = tuple(each for each in (*self.strikes, self.checks) if each > self.checks - STRIKE_WINDOW)
        if exact or len(self.strikes) >= MAX_STRIKES:
            self.find(judged([Finding("executables", EXECUTABLES_CONTRAINDICATED, f"a wrong answer: {what}")]))

    def revoked(self, by: str, reason: str) -> None:
        self.find(revocation(by, reason))

    def clear(self) -> None:
        """An operator says that what was held against it until now is to be forgotten."""
        self.move(Move.CLEARED)
        if self.history.mark is not None:
            self.floor = Floor(self.history.mark.place, self.history.mark.bootseed)
        self.floor = self.floor or Floor()
        self.history, self.found, self.proof, self.strikes = History(), None, (), ()
        self._shown, self._missed, self.shown_trace, self._golden = UNHEARD, 0, None, {}
        self.shown_in_epoch = self.asked_in_epoch = self.overtaken = False

    def epoch_over(self, counts: bool) -> None:
        """An epoch of this verifier has ended; ``counts``: its link was up all the time."""
        self._epochs_of_boot += 1
        if counts and self.state in _SEEN and self.asked_in_epoch and (self.overtaken or not self.shown_in_epoch):
            self._missed += 1
            self.move(Move.LAPSED if self.overtaken or self._missed >= self._most_missed else Move.MISSED)
        self.shown_in_epoch = self.asked_in_epoch = False

    def find(self, verdict: Verdict, proof: tuple[bytes, ...] = ()) -> None:
        """Something that no honest board does. Later finds add to the reasons; two quotes as proof outweigh one."""
        self.move(Move.FOUND)
        self.found = self.found.joined(verdict) if self.found else verdict
        if len(proof) > len(self.proof):
            self.proof = proof[:MAX_RAW]

    def recall(
        self,
        mark: QuoteTrace | None,
        floor: Floor | None,
        found: Verdict | None,
        proof: tuple[bytes, ...],
        checks: int,
        strikes: tuple[int, ...],
    ) -> None:
        """Go on from what was kept over a restart: that it was good was not."""
        self.history.mark, self.floor, self.checks, self.strikes = mark, floor, checks, strikes
        if found is not None:
            self.find(found, proof)

    def _take(self, trace: QuoteTrace, message: bytes, fresh: bool) -> str:
        newer = trace.place > self.history.place
        self.hear_boot(trace.bootcount)
        if trace.bootcount > self.history.place[0]:
            self._epochs_of_boot = 0
            self._golden = {}
        if fresh and self.history.mark is None and self.floor is not None:
            self.floor = Floor(trace.place, trace.bootseed)
        self.history.add_quote(trace, message)
        if not newer:
            return f"it is older than quote {self.history.place[1]} of boot {self.history.place[0]}"
        return "" if fresh else "it has no nonce of this verifier's last two epochs"

    def _found_lying(self, clash: Clash) -> str:
        self.find(judged([Finding("instance_identity", INSTANCE_UNTRUSTWORTHY, clash.reason)]), clash.raw)
        return clash.reason

    def _is_forgotten(self, trace: QuoteTrace, fresh: bool) -> bool:
        """Is it from before an operator cleared the board, or may it be?"""
        if self.floor is None:
            return False
        mark = self.history.mark
        of_this_boot = mark is not None and trace.bootcount == mark.bootcount
        was_before = trace.bootseed == self.floor.bootseed and trace.place <= self.floor.place
        return was_before or not (fresh or of_this_boot)

    def _is_forgotten_receipt(self, trace: ReceiptTrace) -> bool:
        if self.floor is None:
            return False
        mark = self.history.mark
        if mark is None or trace.place[0] != mark.bootcount:
            return True
        return mark.bootseed == self.floor.bootseed and trace.place < self.floor.place

    def _changed_answer(self, quote: Quote) -> str:
        """Which model gives another answer to its golden input than before in this boot, on the same libraries; empty if none."""
        measured = quote.measurements
        for model in measured.models:
            key = (model.name, model.offered, model.delegated_permille, measured.library, measured.delegate)
            if model.golden and self._golden.setdefault(key, model.golden) != model.golden:
                return f"model {model.name}: its answer to the golden input changed within boot {quote.bootcount}"
        return ""

    def move(self, move: Move) -> None:
        to = MOVES.get((self.state, move))
        if to is None:
            raise RuntimeError(f"a board that is {self.state} cannot be {move}")
        self.state = to


def revocation(by: str, reason: str) -> Verdict:
    """What an operator's revocation makes of a board."""
    why = f"revoked by operator {by}" + (f": {reason}" if reason else "")
    return judged([Finding("instance_identity", INSTANCE_UNTRUSTWORTHY, why)])


def _named(trace: QuoteTrace) -> str:
    return f"quote {trace.counter} of boot {trace.bootcount}"
