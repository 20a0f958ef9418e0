"""Whose word counts, and what they say together: the tier that goes into the placement table.

Owns ``verifiers_of`` and ``agreed_tier``, pure functions of sets.  Rules: they depend on what was published alone, never on what
this board found out itself, nor on the order in which anything came, so that all boards that heard the same say the same; who
stands outside (barred, or proven to lie) is not asked; without enough verifiers nothing is known; the operator's ceiling holds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edge_agent.attest.settings import AttestSettings
from edge_agent.core.values import TrustTier

ACCUSERS = 2
NEIGHBOURS = 7
"""How many members verify each, where none are named: in a house everybody verifies everybody."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What counts of an appraisal. ``proven``: it holds two quotes of the board that contradict each other."""

    tier: TrustTier
    proven: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """What all boards can know.

    ``verifiers``: whose word counts, of every board (``verifiers_of_all``); ``opinions``: of the newest appraisal, by (verifier,
    board); ``online``: who is there; ``ceiling``: the most that a board is trusted, as the operator says, where one was set;
    ``revoked``: the boards of whom an operator's last word is to revoke them.
    """

    verifiers: Mapping[str, tuple[str, ...]]
    opinions: Mapping[tuple[str, str], Opinion]
    online: Collection[str]
    ceiling: Mapping[str, TrustTier] = field(default_factory=dict)
    revoked: Collection[str] = frozenset()


def verifiers_of(board: str, members: Iterable[str], settings: AttestSettings) -> tuple[str, ...]:
    """Whose appraisals of ``board`` count, ascending.

    The verifiers that are named and are members, or, if none are named, the next ``NEIGHBOURS`` behind it in the ring of all ids;
    never the board itself.
    """
    return _verifiers_in_ring(board, sorted({*members, board}), settings)


def verifiers_of_all(members: Iterable[str], settings: AttestSettings) -> dict[str, tuple[str, ...]]:
    """The same of every member."""
    ring = sorted(set(members))
    return {board: _verifiers_in_ring(board, ring, settings) for board in ring}


def never_trusted(members: Iterable[str], settings: AttestSettings) -> tuple[str, ...]:
    """The boards that fewer verify than must agree, ascending; none in a fleet of one, which goes by its own word."""
    verifiers = verifiers_of_all(members, settings)
    return tuple(board for board, each in verifiers.items() if len(each) < settings.agree) if len(verifiers) > 1 else ()


def agreed_tier(board: str, published: Published, agree: int) -> TrustTier:
    """How far ``board`` is trusted by what was published.

    Contraindicated if it is barred or proven to lie, or if enough verifiers that are not say so; else the best tier that
    ``agree`` verifiers reach who are not contraindicated themselves, and none while so many accuse it; within the ceiling in
    any case.
    """
    if is_contraindicated(board, published, agree):
        return TrustTier.CONTRAINDICATED
    tiers = [
        opinion.tier for verifier, opinion in _opinions_of(board, published) if not is_contraindicated(verifier, published, agree)
    ]
    reached = sorted(tiers, reverse=True)[agree - 1 :]
    doubted = tiers.count(TrustTier.CONTRAINDICATED) >= agree
    best = max(reached[0], TrustTier.NONE) if reached and not doubted else TrustTier.NONE
    return min(best, published.ceiling.get(board, TrustTier.AFFIRMING))


def is_contraindicated(board: str, published: Published, agree: int) -> bool:
    """Is it barred, proven to lie, or accused by enough verifiers that are not?

    Without proof ``ACCUSERS`` at least must say so, where a board has as many verifiers: else one that lies could stop all.
    """
    if is_proven(board, published):
        return True
    accusers = [
        verifier
        for verifier, opinion in _opinions_of(board, published)
        if opinion.tier is TrustTier.CONTRAINDICATED and not is_proven(verifier, published)
    ]
    return len(accusers) >= max(agree, min(ACCUSERS, len(published.verifiers.get(board, ()))))


def is_proven(board: str, published: Published) -> bool:
    """Is it barred, or did a verifier that is not publish proof that it lies?"""
    if _is_barred(board, published):
        return True
    opinions = _opinions_of(board, published)
    return any(opinion.proven and not _is_barred(verifier, published) for verifier, opinion in opinions)


def was_appraised(board: str, published: Published) -> bool:
    """Has a verifier that is there said anything of ``board``?"""
    return bool(_opinions_of(board, published))


def _verifiers_in_ring(board: str, ring: Sequence[str], settings: AttestSettings) -> tuple[str, ...]:
    if settings.verifiers:
        return tuple(each for each in ring if each in settings.verifiers and each != board)
    behind = bisect_right(ring, board)
    count = min(NEIGHBOURS, len(ring) - 1)
    return tuple(sorted(ring[(behind + step) % len(ring)] for step in range(count)))


def _is_barred(board: str, published: Published) -> bool:
    return board in published.revoked or published.ceiling.get(board) is TrustTier.CONTRAINDICATED


def _opinions_of(board: str, published: Published) -> list[tuple[str, Opinion]]:
    return [
        (verifier, published.opinions[verifier, board])
        for verifier in published.verifiers.get(board, ())
        if verifier in published.online and (verifier, board) in published.opinions
    ]
