"""What the fleet trusts, as one signed document: who belongs to it, who may operate it, what it should measure, how it places.

Owns ``Charter`` and its bytes.  Rules: no I/O; one encoding; a key that is not known is refused; a board that is not in it is
none of the fleet's, and one that is revoked in it stays out whatever it shows.  It travels as the TUF target ``CHARTER_PATH``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_agent.core.config import PolicySection
from edge_agent.core.values import BOARD_ID, checked

CHARTER_PATH = "fleet/charter.cbor"
MAX_CHARTER_BYTES = 2 * 2**20
MAX_GROUPS = 16


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A board: its Ed25519 public key (32 bytes), the class (backend) of its hardware, its groups, the key that endorses its
    quotes (empty for none), and why it was revoked (empty while it is not)."""

    key: bytes
    backend: str = ""
    groups: tuple[str, ...] = ()
    endorser: bytes = b""
    revoked: str = ""


@dataclass(frozen=True, slots=True)
class References:
    """SHA-256 of what boards may measure besides what they find in themselves, and of the right answers to golden inputs, by
    (model digest, library name)."""

    code: frozenset[bytes] = frozenset()
    libraries: frozenset[bytes] = frozenset()
    models: frozenset[bytes] = frozenset()
    golden: Mapping[tuple[bytes, str], frozenset[bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Charter:
    """``serial`` grows with every charter; ``policy``: the weights of placement, ``None`` leaves each board's own."""

    fleet: str
    serial: int
    boards: Mapping[str, Enrolled]
    operators: Mapping[str, bytes]
    policy: PolicySection | None = None
    references: References = References()

    def __post_init__(self) -> None:
        checked(BOARD_ID, "charter of fleet", self.fleet)

    @property
    def members(self) -> dict[str, bytes]:
        """The public keys of the boards that are not revoked."""
        return {board: each.key for board, each in self.boards.items() if not each.revoked}

    def group(self, name: str) -> tuple[str, ...]:
        """The boards of a group, sorted; ``all`` is every board. Revoked ones are in none."""
        return tuple(sorted(b for b, each in self.boards.items() if not each.revoked and (name == "all" or name in each.groups)))
