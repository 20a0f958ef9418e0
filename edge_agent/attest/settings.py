"""What a board attests and appraises by, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_agent.attest.evidence import SEED_BYTES, KeyKind
from edge_agent.core.values import TrustTier, bounded


@dataclass(frozen=True, slots=True)
class References:
    """Reference values: what a board should measure. SHA-256 each; an empty set recognizes nothing.

    ``models``: of the signed releases; ``golden``: of each model's right answer to its golden input, by (model digest, library
    name), where it is known; ``policy``: of the rules of this fleet.
    """

    code: frozenset[bytes] = frozenset()
    libraries: frozenset[bytes] = frozenset()
    models: frozenset[bytes] = frozenset()
    golden: Mapping[tuple[bytes, str], frozenset[bytes]] = field(default_factory=dict)
    policy: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class AttestSettings:
    """``secret``: random in each boot and told to nobody; nonces and samples are drawn from it.  ``bootseed``: random in each
    boot.

    ``epoch_us``: how long an epoch lasts; ``missed``: after so many without fresh evidence nothing is known of a board.
    ``verifiers``: who counts; empty: every member, each for its neighbours.  ``agree``: how many of them must.
    ``software_tier``: the most that a board gets whose key is not held by hardware.
    ``operators``: who may clear and revoke, with Ed25519 public keys; ``endorsers``: of boards with hardware keys, their public
    keys. ``key_kind``: of this board; other than ``SOFTWARE``, its quotes are endorsed before they are signed.
    """

    secret: bytes = field(repr=False)
    bootseed: bytes
    epoch_us: int = 30_000_000
    missed: int = 3
    verifiers: frozenset[str] = frozenset()
    agree: int = 1
    software_tier: TrustTier = TrustTier.WARNING
    recheck_permille: int = 16
    references: References = References()
    operators: Mapping[str, bytes] = field(default_factory=dict)
    endorsers: Mapping[str, bytes] = field(default_factory=dict)
    version: str = ""
    key_kind: KeyKind = KeyKind.SOFTWARE

    def __post_init__(self) -> None:
        bounded("attest secret, length", len(self.secret), SEED_BYTES, SEED_BYTES, "bytes")
        bounded("attest bootseed, length", len(self.bootseed), SEED_BYTES, SEED_BYTES, "bytes")
        bounded("attest epoch_us", self.epoch_us, 1, 3_600_000_000, "µs")
        bounded("attest missed", self.missed, 1, 1000)
        bounded("attest agree", self.agree, 1, 64)
        bounded("attest recheck_permille", self.recheck_permille, 0, 1000)
