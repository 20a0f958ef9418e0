"""What the quotes and appraisals of a proof say of a board at the time of one of its receipts.

Rules: a quote or an appraisal counts only with its own signer's signature; who may judge, and how many must agree, is the
reader's to say; of each verifier the last word counts that it gave of that boot by a quote up to the receipt's, or else the first
by a later one; a contraindication counts if it is of that boot, or was never taken back; two quotes that contradict each other
contraindicate without anybody's word.  That nobody says anything is no fault: the reader sets the floor.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from edge_agent.attest.appraisal import Appraisal, open_appraisal, proof_of
from edge_agent.attest.evidence import Quote, open_quote, quote_digest
from edge_agent.attest.history import contradiction
from edge_agent.attest.receipts import Receipt
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier, bounded

CONTRAINDICATED = TrustTier.CONTRAINDICATED


@dataclass(frozen=True, slots=True)
class Anchors:
    """What the reader of a proof takes for granted.

    ``members``: the fleet's public keys; ``releases``: digests of the models that may run, ``None`` if they are not known;
    ``verifiers``: whose appraisals count, empty: every member's; ``agree``: how many of them must; ``ceilings``: the most that a
    board is trusted, as the operator says.
    """

    members: Mapping[str, bytes]
    releases: frozenset[bytes] | None = None
    verifiers: frozenset[str] = frozenset()
    agree: int = 1
    ceilings: Mapping[str, TrustTier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounded("anchors agree", self.agree, 1, 64)

    def find_key(self, kid: bytes) -> bytes | None:
        return self.members.get(kid.decode("utf-8", "replace"))

    def judges(self, verifier: str, board: str) -> bool:
        """Does the word of ``verifier`` on ``board`` count?"""
        return verifier != board and verifier in (self.verifiers or self.members)


@dataclass(frozen=True, slots=True)
class Status:
    """How far a board was to be trusted, by whom and why; ``words``: of each verifier that said something."""

    tier: TrustTier
    words: Mapping[str, TrustTier] = field(default_factory=dict)
    why: str = ""


class Testimony:
    """``faults``: of each signed message that counts for nothing, why."""

    def __init__(self, quotes: Iterable[bytes], appraisals: Iterable[bytes], anchors: Anchors) -> None:
        self._anchors = anchors
        self.faults: dict[bytes, str] = {}
        self.opened: dict[bytes, Quote | Appraisal] = {}
        self._quotes: dict[str, list[tuple[Quote, bytes]]] = defaultdict(list)
        self._words: dict[str, dict[str, list[Appraisal]]] = defaultdict(lambda: defaultdict(list))
        self.proven: dict[str, str] = {}
        """Boards that signed what contradicts itself, and what."""
        for message in quotes:
            self._hear_quote(message)
        for message in appraisals:
            self._hear_appraisal(message)
        self._compare_quotes()
        self._discredited = self._contraindicated_by_all()

    def status(self, board: str, bootcount: int, quote: int) -> Status:
        """Of ``board`` after its quote ``quote`` of boot ``bootcount``, and until the next."""
        if board in self.proven:
            return Status(CONTRAINDICATED, {}, self.proven[board])
        words = {by: _word_at(said, bootcount, quote) for by, said in self._words[board].items()}
        known = {by: word for by, word in words.items() if word is not None and by not in self._discredited}
        tiers = {by: word.tier for by, word in sorted(known.items())}
        agreed = agreed_on(tiers.values(), self._anchors.agree)
        ceiling = self._anchors.ceilings.get(board, TrustTier.AFFIRMING)
        if ceiling < agreed:
            return Status(ceiling, tiers, "the operator trusts it no more than that")
        reasons = [reason for word in known.values() if word.tier == agreed for reason in word.reasons]
        return Status(agreed, tiers, reasons[0] if reasons else "")

    def against(self, receipt: Receipt, digest: bytes) -> str:
        """How a board's quotes contradict its receipt; empty if they do not.

        What was signed before the quote ``receipt.quote`` counts up to the receipts before it, what was signed after includes it.
        """
        for quote, _ in self._quotes[receipt.board]:
            where = f"quote {quote.counter} of boot {quote.bootcount}"
            before = quote.number <= (receipt.bootcount, receipt.quote)
            if before and quote.receipts >= receipt.counter:
                return f"it was counted again: {where}, from before it, tells of {quote.receipts} receipts"
            if not before and quote.receipts < receipt.counter:
                return f"the chain was cut: {where}, from after it, tells of {quote.receipts} receipts"
            if quote.receipts == receipt.counter and quote.receipts_head != digest:
                return f"fork: {where} tells of another receipt {receipt.counter}"
            if quote.receipts == receipt.counter - 1 and quote.receipts_head != receipt.previous:
                return f"fork: {where} tells of another receipt {receipt.counter - 1} than it follows"
            if quote.bootcount == receipt.bootcount and (other := _mapped_otherwise(quote, receipt.model_digest)):
                return f"{where} tells that other bytes of {other} were mapped than are offered"
        return ""

    def receipts_of(self, board: str) -> int:
        """How many receipts a board tells of in its quotes here."""
        return max((quote.receipts for quote, _ in self._quotes[board]), default=0)

    def _hear_quote(self, message: bytes) -> None:
        try:
            quote = open_quote(message, self._anchors.find_key)
        except RefusedError as error:
            self.faults[message] = str(error)
            return
        self.opened[message] = quote
        self._quotes[quote.board].append((quote, message))

    def _hear_appraisal(self, message: bytes) -> None:
        try:
            word = open_appraisal(message, self._anchors.find_key)
        except RefusedError as error:
            self.faults[message] = str(error)
            return
        self.opened[message] = word
        said = self._words[word.board][word.verifier]
        if any(other.version == word.version for other in said):
            self.faults[message] = f"{word.verifier} said two things of {word.board} under one number"
        shown = next((raw for quote, raw in self._quotes[word.board] if quote.number == (word.bootcount, word.counter)), None)
        if shown is not None and word.evidence not in (b"", quote_digest(shown)):
            self.faults[message] = f"it is about another quote {word.counter} of {word.board} than is in this file"
        if found := proof_of(word, self._anchors.find_key):
            self.proven[word.board] = found
        if self._anchors.judges(word.verifier, word.board):
            said.append(word)
            said.sort(key=lambda each: each.version)

    def _compare_quotes(self) -> None:
        for board, quotes in self._quotes.items():
            quotes.sort(key=lambda each: each[0].number)
            for (one, one_message), (other, other_message) in pairwise(quotes):
                if found := contradiction(one, one_message, other, other_message):
                    self.proven[board] = self.faults[other_message] = found

    def _contraindicated_by_all(self) -> frozenset[str]:
        """The boards of whom enough verifiers' last word is a contraindication: theirs counts no more."""
        last = {board: [said[-1].tier for said in by.values() if said] for board, by in self._words.items()}
        return frozenset(self.proven) | {
            board for board, tiers in last.items() if tiers.count(CONTRAINDICATED) >= self._anchors.agree
        }


def agreed_on(tiers: Iterable[TrustTier], agree: int) -> TrustTier:
    """What ``agree`` verifiers say: contraindicated if so many do, else the best tier that so many reach."""
    counted = Counter(tiers)
    if counted[CONTRAINDICATED] >= agree:
        return CONTRAINDICATED
    if counted[TrustTier.AFFIRMING] >= agree:
        return TrustTier.AFFIRMING
    return TrustTier.WARNING if counted[TrustTier.AFFIRMING] + counted[TrustTier.WARNING] >= agree else TrustTier.NONE


def _word_at(said: list[Appraisal], bootcount: int, quote: int) -> Appraisal | None:
    """What one verifier, whose words come in order, says of a boot at one of its quotes."""
    of_boot = [word for word in said if word.bootcount == bootcount]
    before = [word for word in of_boot if word.counter <= quote]
    after = [word for word in of_boot if word.counter > quote]
    against = [word for word in (*after, *said[-1:]) if word.tier is CONTRAINDICATED]
    return next(iter([*against, *reversed(before), *after]), None)


def _mapped_otherwise(quote: Quote, model_digest: bytes) -> str:
    wrong = (each for each in quote.measurements.models if each.offered == model_digest != each.mapped)
    return next((each.name for each in wrong), "")
