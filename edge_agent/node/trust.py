"""Whom this board trusts, now: the node's part in continuous attestation.

Owns the evidence that this board shows, its appraisals of others, what others and operators say, and the receipts of what ran
here (all of it by the pure rooms of ``attest``).  Rules: without ``NodeSettings.attest`` the operator's word is all that is
known; with it, that word is a ceiling; ``agreed_tier`` is a function of what was published, so that all boards put the same into
the table, and ``tier`` adds what this board knows itself; what must outlive a power cut is in the ledger.
"""

from __future__ import annotations

from edge_agent.core.values import TrustTier
from edge_agent.node.settings import NodeSettings


class Trust:
    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings

    def tier(self, board: str) -> TrustTier:
        """How far ``board`` is trusted with a request at this moment."""
        return self._settings.trust.get(board, TrustTier.NONE)

    def agreed_tier(self, board: str) -> TrustTier:
        """The same by what was published alone, for the table."""
        return self._settings.trust.get(board, TrustTier.NONE)

    def why(self, board: str) -> str:
        """What is held against ``board``, for a person; empty if nothing is."""
        return ""
