"""What a board shows of itself: evidence as an Entity Attestation Token (RFC 9711) in a signed CWT (RFC 8392).

Owns ``Quote``, what was measured in it, its claims and its signature.  Rules: only the board itself can sign its quote; claims
have the keys of RFC 9711, what is ours stands in ``measurements`` under content format 60 (CBOR) and in ``submods``; a quote has
one encoding; every list in it is bounded; it says nothing of whether it should be believed (``attest.appraise``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, MODEL_NAME, bounded, checked

PROFILE = "tag:slyos-edge,2026:quote/1"
"""``eat_profile``: ``docs/attestation.md``."""
AAD = b"sly/1/quote"
MAX_QUOTE_BYTES = 24 * 2**10
NONCE_BYTES = 16
SEED_BYTES = 32
MAX_NONCES = 64
MAX_MODELS = 64
MAX_COUNT = 2**53
MAX_LIBRARY_CHARS = 128
NO_DIGEST = bytes(DIGEST_BYTES)


class KeyKind(StrEnum):
    """What holds the key that signs a board's quotes, or vouches for them."""

    SOFTWARE = "software"
    """A file: whoever has root on the board has the key."""
    TPM = "tpm"
    EMULATED = "emulated"
    """The device root of an emulated board: shows how, proves nothing."""


@dataclass(frozen=True, slots=True)
class ModelMeasurement:
    """One loaded model. ``offered``: the digest by which it is offered and its answers are signed; ``mapped``: SHA-256 of the
    bytes as they are mapped by its engine, at the last re-hash.

    ``golden``: SHA-256 of what it last gave for its golden input, empty if it was not run; ``delegated_permille``: how much of
    the work its delegate took on, ``None`` without a delegate; ``version``, ``slot``: of its release, 0 and empty until it has
    one.
    """

    name: str
    offered: bytes
    mapped: bytes
    golden: bytes = b""
    delegated_permille: int | None = None
    version: int = 0
    slot: str = ""

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "measured model", self.name)
        for subject, digest in (("offered", self.offered), ("mapped", self.mapped)):
            bounded(f"digest of {self.name} as {subject}, length", len(digest), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        if self.golden:
            bounded(f"golden digest of {self.name}, length", len(self.golden), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        if self.delegated_permille is not None:
            bounded(f"delegated share of {self.name}", self.delegated_permille, 0, 1000, "permille")
        bounded(f"version of {self.name}", self.version, 0, MAX_COUNT)


@dataclass(frozen=True, slots=True)
class Measurements:
    """What runs on a board, as it measured it: SHA-256 each.

    ``code``: of the agent's Python files; ``library``: of the interpreter's shared objects, ``library_name`` with its version;
    ``delegate`` likewise, empty without one; ``policy``: of the rules that it places and appraises by.
    """

    code: bytes
    library: bytes
    library_name: str
    policy: bytes
    delegate: bytes = b""
    delegate_name: str = ""
    models: tuple[ModelMeasurement, ...] = ()

    def __post_init__(self) -> None:
        for name in ("code", "library", "policy"):
            bounded(f"digest of the {name}, length", len(getattr(self, name)), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        bounded("digest of the delegate, length", len(self.delegate), 0, DIGEST_BYTES, "bytes")
        bounded("measured models", len(self.models), 0, MAX_MODELS)


@dataclass(frozen=True, slots=True)
class Quote:
    """Evidence of one board at one moment.

    ``nonces``: of the epochs that it heard of, the newest of each verifier, and of a challenge; ``bootcount``: the boot epoch;
    ``bootseed``: random in each boot; ``counter``: of its quotes within this boot, from 1; ``previous``: SHA-256 of the quote
    before, ``NO_DIGEST`` for the first.  ``issued_s``: seconds since 1970 as the board takes it; decides nothing.
    ``receipts``, ``receipts_head``: how many receipts it has signed, ever, and the SHA-256 of the last; ``receipts_dropped``:
    how many of them it does not keep any more.  ``endorsement``: what hardware says of this quote (``attest.keys``), empty for
    none.
    """

    board: str
    nonces: tuple[bytes, ...]
    bootcount: int
    bootseed: bytes
    counter: int
    previous: bytes
    issued_s: int
    uptime_s: int
    hardware: str
    emulated: bool
    version: str
    measurements: Measurements
    receipts: int = 0
    receipts_head: bytes = NO_DIGEST
    receipts_dropped: int = 0
    key_kind: KeyKind = KeyKind.SOFTWARE
    endorsement: bytes = b""

    def __post_init__(self) -> None:
        checked(BOARD_ID, "quote board", self.board)
        bounded("quote nonces", len(self.nonces), 0, MAX_NONCES)
        bounded("quote bootseed, length", len(self.bootseed), SEED_BYTES, SEED_BYTES, "bytes")
        for name in ("bootcount", "counter", "issued_s", "uptime_s", "receipts", "receipts_dropped"):
            bounded(f"quote {name}", getattr(self, name), 0, MAX_COUNT)
