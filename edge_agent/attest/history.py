"""What one board said of itself, in order, and whether that can be: traces of its quotes and receipts.

Owns ``QuoteTrace``, ``ReceiptTrace``, the rules by which two of them contradict each other, and ``History``, which holds the last
of them.  Rules: only what the board itself signed is compared, so that no broker, delay, loss or repetition can bring an honest
board into contradiction; the order is that of ``(bootcount, counter)``, never that of arrival; a receipt stands behind the quote
that it names; everything held is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from edge_agent.attest.evidence import Quote, quote_digest
from edge_agent.attest.receipts import Receipt, receipt_digest

TRACES = 16
"""Quotes, and receipts, of one board that are remembered by what can be held against them."""
WHOLE = 2
"""Quotes of one board that are held as it signed them."""

Place = tuple[int, int]
"""``(bootcount, counter)`` of a quote."""
NOWHERE: Place = (-1, -1)

_Key = TypeVar("_Key", int, Place)


@dataclass(frozen=True, slots=True)
class QuoteTrace:
    """What later words of a board can contradict in one of its quotes."""

    bootcount: int
    counter: int
    bootseed: bytes
    digest: bytes
    previous: bytes
    receipts: int
    receipts_head: bytes

    @property
    def place(self) -> Place:
        return (self.bootcount, self.counter)

    @classmethod
    def of(cls, quote: Quote, message: bytes) -> QuoteTrace:
        return cls(
            quote.bootcount,
            quote.counter,
            quote.bootseed,
            quote_digest(message),
            quote.previous,
            quote.receipts,
            quote.receipts_head,
        )


@dataclass(frozen=True, slots=True)
class ReceiptTrace:
    """``place``: of the quote that it was signed after."""

    counter: int
    digest: bytes
    previous: bytes
    place: Place

    @classmethod
    def of(cls, receipt: Receipt, message: bytes) -> ReceiptTrace:
        return cls(receipt.counter, receipt_digest(message), receipt.previous, (receipt.bootcount, receipt.quote))


def contradiction(one: Quote, one_message: bytes, other: Quote, other_message: bytes) -> str:
    """Why two whole quotes, in any order, cannot both be honest words of one board; empty if they can."""
    return quotes_clash(QuoteTrace.of(one, one_message), QuoteTrace.of(other, other_message)) if one.board == other.board else ""


def quotes_clash(one: QuoteTrace, other: QuoteTrace) -> str:
    """Why one board cannot honestly have signed both; empty if it can."""
    if one.digest == other.digest:
        return ""
    if one.place == other.place:
        return f"two quotes with number {one.counter} of boot {one.bootcount}"
    if one.bootcount == other.bootcount and one.bootseed != other.bootseed:
        return f"boot {one.bootcount} with two seeds"
    first, later = (one, other) if one.place < other.place else (other, one)
    if later.place == (first.bootcount, first.counter + 1) and later.previous != first.digest:
        return f"quote {later.counter} of boot {later.bootcount} follows another quote {first.counter} than was shown"
    if later.receipts < first.receipts:
        return f"receipts went back from {first.receipts} to {later.receipts}"
    if later.receipts == first.receipts and later.receipts_head != first.receipts_head:
        return f"two heads of the chain of {first.receipts} receipts"
    return ""


def receipts_clash(one: ReceiptTrace, other: ReceiptTrace) -> str:
    """Why one board cannot honestly have signed both receipts; empty if it can."""
    if one.digest == other.digest:
        return ""
    if one.counter == other.counter:
        return f"two receipts with number {one.counter}"
    first, later = (one, other) if one.counter < other.counter else (other, one)
    if later.counter == first.counter + 1 and later.previous != first.digest:
        return f"receipt {later.counter} follows another receipt {first.counter} than was given"
    if later.place < first.place:
        return f"receipts counted anew: {first.counter} in boot {first.place[0]} is older than {later.counter}"
    return ""


def receipt_clash(quote: QuoteTrace, receipt: ReceiptTrace) -> str:
    """Why a receipt and a quote of one board cannot both be honest; empty if they can."""
    number = f"quote {quote.counter} of boot {quote.bootcount}"
    if quote.place <= receipt.place and quote.receipts >= receipt.counter:
        return f"receipt {receipt.counter} was signed after {number}, which counts {quote.receipts} already"
    if quote.place > receipt.place and quote.receipts < receipt.counter:
        return f"receipt {receipt.counter} was signed before {number}, which counts only {quote.receipts}"
    if quote.receipts == receipt.counter and quote.receipts_head != receipt.digest:
        return f"receipt {receipt.counter} is another than the last that {number} counts"
    if quote.receipts == receipt.counter - 1 and quote.receipts_head != receipt.previous:
        return f"receipt {receipt.counter} does not follow the last that {number} counts"
    return ""


@dataclass(frozen=True, slots=True)
class Clash:
    """``raw``: the quotes that show it to anybody, as far as they are held."""

    reason: str
    raw: tuple[bytes, ...] = ()


class History:
    """The last quotes and receipts of one board. ``mark`` is the highest quote; it may have been kept over a restart."""

    def __init__(self) -> None:
        self.mark: QuoteTrace | None = None
        self._quotes: dict[Place, QuoteTrace] = {}
        self._whole: dict[Place, bytes] = {}
        self._receipts: dict[int, ReceiptTrace] = {}

    @property
    def place(self) -> Place:
        return self.mark.place if self.mark else NOWHERE

    @property
    def remembered(self) -> tuple[int, int]:
        """How many quotes and receipts can still be contradicted."""
        return len(self._quotes), len(self._receipts)

    def holds(self, digest: bytes) -> bool:
        """Was this very quote heard, as far as is remembered?"""
        return any(trace.digest == digest for trace in self._traces())

    def digest_at(self, place: Place) -> bytes:
        """SHA-256 of the quote with this number, by itself or by the one behind it; empty if nothing is known of it."""
        if place in self._quotes:
            return self._quotes[place].digest
        behind = self._quotes.get((place[0], place[1] + 1))
        return behind.previous if behind else b""

    def witness(self, place: Place) -> bytes:
        """The signed quote that says which one has this number, if it is held whole: that one, or the one behind it."""
        return self._whole.get(place) or self._whole.get((place[0], place[1] + 1), b"")

    def clash_of_quote(self, trace: QuoteTrace, message: bytes) -> Clash | None:
        """What the board said before that cannot stand beside this quote; whole quotes first, for they are proof."""
        for other in sorted(self._traces(), key=lambda each: each.place not in self._whole):
            if reason := quotes_clash(other, trace):
                return Clash(reason, self._raw(other, message))
        for receipt in self._receipts.values():
            if reason := receipt_clash(trace, receipt):
                return Clash(reason, (message,))
        return None

    def clash_of_receipt(self, trace: ReceiptTrace) -> Clash | None:
        for receipt in self._receipts.values():
            if reason := receipts_clash(receipt, trace):
                return Clash(reason)
        for quote in self._traces():
            if reason := receipt_clash(quote, trace):
                return Clash(reason, self._raw(quote))
        return None

    def add_quote(self, trace: QuoteTrace, message: bytes) -> None:
        self._quotes[trace.place] = trace
        self._whole[trace.place] = message
        _keep_highest(self._quotes, TRACES)
        _keep_highest(self._whole, WHOLE)
        if trace.place > self.place:
            self.mark = trace

    def add_receipt(self, trace: ReceiptTrace) -> None:
        self._receipts[trace.counter] = trace
        _keep_highest(self._receipts, TRACES)

    def _traces(self) -> list[QuoteTrace]:
        held = list(self._quotes.values())
        return held if self.mark is None or self.mark.place in self._quotes else [*held, self.mark]

    def _raw(self, other: QuoteTrace, *message: bytes) -> tuple[bytes, ...]:
        held = self._whole.get(other.place)
        return (held, *message) if held and quote_digest(held) == other.digest else message


def _keep_highest(table: dict[_Key, Any], most: int) -> None:
    while len(table) > most:
        del table[min(table)]
