"""What a verifier says of a board: a signed attestation result with a trustworthiness vector (AR4SI, draft-ietf-rats-ar4si).

Owns ``Vector``, ``Appraisal``, its bytes and its signature.  Rules: only the verifier itself can sign it; the larger
``(boot_epoch, sequence)`` counts; ``raw`` holds quotes, as their board signed them: two that contradict each other are proof for
everybody.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.attest.evidence import MAX_COUNT, MAX_QUOTE_BYTES
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, TrustTier, bounded, checked

AAD = b"sly/1/appraisal"
MAX_REASONS = 8
MAX_REASON_CHARS = 256
MAX_RAW = 2
MAX_APPRAISAL_BYTES = MAX_RAW * MAX_QUOTE_BYTES + 16 * 2**10


@dataclass(frozen=True, slots=True)
class Vector:
    """The eight claims of AR4SI, each a signed byte: 0 none, 2..31 affirming, 32..95 warning, 96..127 contraindicated.

    The order of the fields is that of their numbers in AR4SI, from 0.
    """

    instance_identity: int = 0
    configuration: int = 0
    executables: int = 0
    file_system: int = 0
    hardware: int = 0
    runtime_opaque: int = 0
    storage_opaque: int = 0
    sourced_data: int = 0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            bounded(f"claim {name}", getattr(self, name), -128, 127)


@dataclass(frozen=True, slots=True)
class Appraisal:
    """``evidence``: SHA-256 of the quote that it is about, empty if there was none; ``bootcount``, ``counter``: of that quote.

    ``epoch``: of the verifier, when it judged.  ``issued_s``: seconds since 1970 as the verifier takes it; decides nothing.
    """

    verifier: str
    boot_epoch: int
    sequence: int
    board: str
    tier: TrustTier
    vector: Vector
    reasons: tuple[str, ...] = ()
    evidence: bytes = b""
    bootcount: int = 0
    counter: int = 0
    epoch: int = 0
    issued_s: int = 0
    raw: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        checked(BOARD_ID, "appraisal's verifier", self.verifier)
        checked(BOARD_ID, "appraised board", self.board)
        for name in ("boot_epoch", "sequence", "bootcount", "counter", "epoch", "issued_s"):
            bounded(f"appraisal {name}", getattr(self, name), 0, MAX_COUNT)
        if len(self.evidence) not in (0, DIGEST_BYTES):
            raise RefusedError("appraisal evidence", f"{len(self.evidence)} bytes", f"none or {DIGEST_BYTES} bytes")
        if len(self.reasons) > MAX_REASONS or any(not 0 < len(each) <= MAX_REASON_CHARS for each in self.reasons):
            raise RefusedError(
                "appraisal reasons", f"{len(self.reasons)}", f"at most {MAX_REASONS} of {MAX_REASON_CHARS} characters"
            )
        if len(self.raw) > MAX_RAW or any(len(each) > MAX_QUOTE_BYTES for each in self.raw):
            raise RefusedError("appraisal raw", f"{len(self.raw)} quotes", f"at most {MAX_RAW} of {MAX_QUOTE_BYTES} bytes")

    @property
    def version(self) -> tuple[int, int]:
        return (self.boot_epoch, self.sequence)
