"""Who a node is, and what its fleet has agreed on.

Rules: only ``adopt`` changes a node's settings, and only by what the fleet's signed charter says: who belongs to the fleet, by
what rules it places, what its boards are appraised by.  Rooms of the node read them here when they need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_agent.attest.settings import AttestSettings
from edge_agent.core.config import QueueSection
from edge_agent.core.cose import Signer
from edge_agent.core.values import TrustTier
from edge_agent.placement.options import Rules


@dataclass(slots=True)
class NodeSettings:
    """``members``: every board of the fleet and its Ed25519 public key, 32 bytes; ``boot_epoch`` counts this board's starts;
    ``trust``: the most that a board is trusted, as the operator says; where boards attest (``attest``), their appraisal counts
    within that, and without, it is all that is known, ``NONE`` where nothing is said."""

    board: str
    boot_epoch: int
    signer: Signer
    hardware: str = ""
    emulated: bool = False
    fleet: str = "home"
    members: Mapping[str, bytes] = field(default_factory=dict)
    rules: Rules = Rules()
    trust: Mapping[str, TrustTier] = field(default_factory=dict)
    queue: QueueSection = QueueSection()
    attest: AttestSettings | None = None

    def adopt(self, other: NodeSettings) -> None:
        """What a charter may change, as ``other`` has it."""
        self.members, self.rules, self.trust = other.members, other.rules, other.trust
        if self.attest is not None and other.attest is not None:
            self.attest = other.attest
