"""Claims and tiers of AR4SI, and what several findings make together.

Owns ``Finding``, ``Verdict``, the values of claims that are used here, and their arithmetic.  Rules: a claim is as bad as the
worst that was found for it, a verdict as its worst claim; the order in which anything was found does not matter; reasons are few
and short, the worst first.

Claims and their values: draft-ietf-rats-ar4si, sections "Enumeration Encoding" and "Specific Claims" (revision 09, 2025-08).
Those above 0 are its own; those below -32 are "non-standard reasons" as it allows, and are listed in ``docs/attestation.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_agent.attest.appraisal import MAX_REASON_CHARS, MAX_REASONS, Vector
from edge_agent.core.values import TrustTier

MALFUNCTION = -1
"""Any claim: the verifier has nothing to judge by."""
RECOGNIZED = 2
"""The affirming value of every claim that is used here."""
CONFIGURATION_UNSEEN = 36
"""Elements of the configuration relevant to security are unavailable to the verifier."""
EXECUTABLES_UNRECOGNIZED = 33
EXECUTABLES_CONTRAINDICATED = 96
FILES_UNRECOGNIZED = 32
INSTANCE_UNTRUSTWORTHY = 96
"""Recognized, but its private key indicates a device that is not trustworthy."""
DELEGATE_IDLE = -33
"""Configuration: a delegate is loaded and takes on no work."""
NOT_ENDORSED = -33
"""Hardware: it should vouch for the board, and what came does not."""
NOT_FRESH = -33
"""Instance identity: it has shown nothing in the last epochs."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``claim``: a field of ``Vector``; ``value``: as in AR4SI; ``reason``: what came and what was expected, if that is bad."""

    claim: str
    value: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    tier: TrustTier
    vector: Vector = Vector()
    reasons: tuple[str, ...] = ()

    def capped(self, most: TrustTier, reason: str) -> Verdict:
        """No better than ``most``, for this reason."""
        if self.tier <= most:
            return self
        return Verdict(most, self.vector, _bounded((*self.reasons, reason)))

    def joined(self, other: Verdict) -> Verdict:
        """Both at once: of each claim the worse, this one's reasons first."""
        vectors = (self.vector, other.vector)
        claims = {name: min((getattr(each, name) for each in vectors), key=_badness) for name in Vector.__dataclass_fields__}
        return Verdict(min(self.tier, other.tier), Vector(**claims), _bounded((*self.reasons, *other.reasons)))


def judged(found: Iterable[Finding]) -> Verdict:
    """The vector, the tier and the reasons of what was found, whatever its order: a claim is as bad as the worst found for it."""
    ranked = sorted(found, key=lambda finding: (_badness(finding.value), finding.claim, finding.reason))
    claims: dict[str, int] = {}
    for finding in ranked:
        claims.setdefault(finding.claim, finding.value)
    return Verdict(worst_tier(ranked), Vector(**claims), _bounded(finding.reason for finding in ranked if finding.reason))


def tier_of(value: int) -> TrustTier:
    """The tier of one claim (AR4SI, "Enumeration Encoding"): -1, 0 and 1 say nothing."""
    if -1 <= value <= 1:
        return TrustTier.NONE
    if -32 <= value <= 31:
        return TrustTier.AFFIRMING
    return TrustTier.WARNING if -96 <= value <= 95 else TrustTier.CONTRAINDICATED


def vector_tier(vector: Vector) -> TrustTier:
    """That of its worst claim; a claim of 0 was not made, and without any there is no tier."""
    values = [getattr(vector, name) for name in Vector.__dataclass_fields__]
    return min((tier_of(value) for value in values if value), default=TrustTier.NONE)


def worst_tier(found: Iterable[Finding]) -> TrustTier:
    return min((tier_of(finding.value) for finding in found if finding.value), default=TrustTier.NONE)


def _badness(value: int) -> tuple[int, bool, int]:
    """The worst first; of one tier a standard value before others; nothing at all last (AR4SI, "Assigning a claim value")."""
    return (int(tier_of(value)) if value else len(TrustTier), value < 0, -abs(value))


def _bounded(reasons: Iterable[str]) -> tuple[str, ...]:
    """Each once, none too long, and no more of them than an appraisal may hold."""
    short = (each if len(each) <= MAX_REASON_CHARS else each[: MAX_REASON_CHARS - 1] + "…" for each in reasons)
    return tuple(dict.fromkeys(short))[:MAX_REASONS]
