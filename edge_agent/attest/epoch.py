"""Freshness without a common clock: each verifier's epochs, whose nonces boards put into their quotes (RFC 9334, section 10.3).

Owns the signed epoch mark, the challenge on demand, and who holds which nonce.  Rules: a nonce is random and is known before
nobody; a verifier accepts the nonces of its current epoch and of the one before, and each challenge once; whose epoch it is says
its signature.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.attest.evidence import MAX_COUNT, NONCE_BYTES
from edge_agent.core.values import BOARD_ID, bounded, checked

AAD_EPOCH = b"sly/1/epoch"
AAD_CHALLENGE = b"sly/1/challenge"
MAX_MARK_BYTES = 512


@dataclass(frozen=True, slots=True)
class EpochMark:
    """A verifier's present epoch: ``(boot_epoch, counter)`` is its version, the larger one counts."""

    verifier: str
    boot_epoch: int
    counter: int
    nonce: bytes

    def __post_init__(self) -> None:
        checked(BOARD_ID, "epoch's verifier", self.verifier)
        bounded("epoch boot_epoch", self.boot_epoch, 0, MAX_COUNT)
        bounded("epoch counter", self.counter, 0, MAX_COUNT)
        bounded("epoch nonce, length", len(self.nonce), NONCE_BYTES, NONCE_BYTES, "bytes")


@dataclass(frozen=True, slots=True)
class Challenge:
    """``verifier`` wants a quote of ``board`` with this nonce now."""

    verifier: str
    board: str
    nonce: bytes

    def __post_init__(self) -> None:
        checked(BOARD_ID, "challenge's verifier", self.verifier)
        checked(BOARD_ID, "challenged board", self.board)
        bounded("challenge nonce, length", len(self.nonce), NONCE_BYTES, NONCE_BYTES, "bytes")
