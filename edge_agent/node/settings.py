"""Who a node is, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_agent.core.config import PolicySection, QueueSection
from edge_agent.core.cose import Signer


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """``members``: every board of the fleet and its Ed25519 public key, 32 bytes; ``boot_epoch`` counts this board's starts."""

    board: str
    boot_epoch: int
    signer: Signer
    hardware: str = ""
    emulated: bool = False
    fleet: str = "home"
    members: Mapping[str, bytes] = field(default_factory=dict)
    policy: PolicySection = PolicySection()
    queue: QueueSection = QueueSection()
