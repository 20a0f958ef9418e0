"""What an audit finds: each link of a proof, what of it was checked, and which one is broken first."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from edge_agent.attest.receipts import Receipt
from edge_agent.attest.testimony import Status
from edge_agent.core.values import TrustTier


class Kind(StrEnum):
    QUOTE = "quote"
    APPRAISAL = "appraisal"
    RECEIPT = "receipt"
    ASKED = "asked"
    """What the writer of the file asked for."""
    SPAN = "span"
    """What the file claims to show of a chain without a gap."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: ``fault`` says what is wrong, ``note`` what is not, and worth knowing."""

    what: str
    fault: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """``name``: for a person; ``digest``: SHA-256 of the signed bytes, empty for what is not signed.

    ``receipt``: what it says, even if it is not to be believed; ``None`` if it says nothing, or is no receipt.
    """

    kind: Kind
    name: str
    checks: tuple[Check, ...]
    digest: bytes = b""
    receipt: Receipt | None = None
    status: Status = field(default_factory=lambda: Status(TrustTier.NONE))

    @property
    def fault(self) -> str:
        """What is wrong with it first; empty if nothing is."""
        return next((f"{check.what}: {check.fault}" for check in self.checks if check.fault), "")


@dataclass(frozen=True, slots=True)
class Audit:
    """Every link in the order in which it was judged."""

    links: tuple[Link, ...]

    @property
    def broken(self) -> Link | None:
        """The first broken link."""
        return next((link for link in self.links if link.fault), None)

    @property
    def receipts(self) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.kind is Kind.RECEIPT)
