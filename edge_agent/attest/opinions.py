"""What verifiers published, joined: the newest appraisal of each of each board, and what they say together.

Owns ``Opinions``.  Rules: of one verifier and board the larger ``(boot_epoch, sequence)`` counts, and of two that a lying
verifier signed with one version the same everywhere, so that the join is commutative, associative and idempotent; only the
verifiers that count for a board are remembered; proof is checked when it is heard, once, and is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from operator import attrgetter

from edge_agent.attest.appraisal import Appraisal, Vector, proof_of
from edge_agent.attest.quorum import Opinion, Published, agreed_tier, was_appraised
from edge_agent.core.values import TrustTier


class Opinions:
    def __init__(
        self,
        verifiers: Mapping[str, tuple[str, ...]],
        agree: int,
        ceiling: Mapping[str, TrustTier],
        find_key: Callable[[bytes], bytes | None],
    ) -> None:
        self._verifiers, self._agree, self._ceiling, self._find_key = verifiers, agree, ceiling, find_key
        self._appraisals: dict[tuple[str, str], Appraisal] = {}
        self._opinions: dict[tuple[str, str], Opinion] = {}
        self._ranks: dict[tuple[str, str], tuple[object, ...]] = {}
        self._revoked: set[str] = set()
        self._tiers: dict[str, TrustTier] = {}
        self._tiers_online: frozenset[str] = frozenset()

    def recast(self, verifiers: Mapping[str, tuple[str, ...]], ceiling: Mapping[str, TrustTier]) -> None:
        """Others verify from now on; what was said by who counts no more is forgotten."""
        self._verifiers, self._ceiling = verifiers, ceiling
        for key in [(verifier, board) for verifier, board in self._ranks if verifier not in verifiers.get(board, ())]:
            del self._ranks[key], self._appraisals[key], self._opinions[key]
        self._revoked &= verifiers.keys()
        self._tiers.clear()

    def join(self, appraisal: Appraisal) -> bool:
        """Take in an appraisal that its verifier signed; ``False`` if one at least as new is held, or it does not count."""
        key = (appraisal.verifier, appraisal.board)
        if appraisal.verifier not in self._verifiers.get(appraisal.board, ()):
            return False
        rank = _rank(appraisal)
        if key in self._ranks and rank <= self._ranks[key]:
            return False
        proven = len(appraisal.raw) > 1 and bool(proof_of(appraisal, self._find_key))
        self._ranks[key] = rank
        self._appraisals[key] = replace(appraisal, raw=())
        opinion = Opinion(appraisal.tier, proven)
        if opinion != self._opinions.get(key):
            self._opinions[key] = opinion
            self._tiers.clear()
        return True

    def revoke(self, board: str, revoked: bool) -> None:
        """An operator's last word on ``board`` is to revoke it, or not any more."""
        (self._revoked.add if revoked else self._revoked.discard)(board)
        self._tiers.clear()

    def of(self, board: str) -> tuple[Appraisal, ...]:
        """The newest appraisals of ``board``, without quotes, by verifier."""
        held = self._appraisals
        return tuple(held[verifier, board] for verifier in self._verifiers.get(board, ()) if (verifier, board) in held)

    def is_proven(self, board: str) -> bool:
        """Did a verifier publish two quotes of ``board`` that contradict each other?"""
        held = self._opinions
        return any((each, board) in held and held[each, board].proven for each in self._verifiers.get(board, ()))

    def ceiling(self, board: str) -> TrustTier:
        return self._ceiling.get(board, TrustTier.AFFIRMING)

    def agreed_tier(self, board: str, online: Collection[str]) -> TrustTier:
        """``quorum.agreed_tier``, worked out once until something changes."""
        there = frozenset(online)
        if there != self._tiers_online:
            self._tiers_online = there
            self._tiers.clear()
        if board not in self._tiers:
            self._tiers[board] = agreed_tier(board, self._published(there), self._agree)
        return self._tiers[board]

    def was_appraised(self, board: str, online: Collection[str]) -> bool:
        return was_appraised(board, self._published(frozenset(online)))

    def _published(self, online: frozenset[str]) -> Published:
        return Published(self._verifiers, self._opinions, online, self._ceiling, self._revoked)


_ALL_OF_IT = attrgetter(
    *(name for name in Appraisal.__dataclass_fields__ if name != "vector"),
    *(f"vector.{name}" for name in Vector.__dataclass_fields__),
)


def _rank(appraisal: Appraisal) -> tuple[object, ...]:
    """The larger counts: by version, then, of a verifier that lies, what is worse for the board."""
    return (*appraisal.version, -int(appraisal.tier), _ALL_OF_IT(appraisal))
