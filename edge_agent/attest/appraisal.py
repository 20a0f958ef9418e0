"""What a verifier says of a board: a signed attestation result with a trustworthiness vector (AR4SI, draft-ietf-rats-ar4si).

Owns ``Vector``, ``Appraisal``, its bytes and its signature.  Rules: only the verifier itself can sign it; the larger
``(boot_epoch, sequence)`` counts; ``raw`` holds quotes, as their board signed them: two that contradict each other are proof for
everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_agent.attest.evidence import MAX_COUNT, MAX_QUOTE_BYTES, open_quote
from edge_agent.attest.history import contradiction
from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import RefusedError, shown
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
        if len(self.raw) > MAX_RAW or any(not 0 < len(each) <= MAX_QUOTE_BYTES for each in self.raw):
            raise RefusedError("appraisal raw", f"{len(self.raw)} quotes", f"at most {MAX_RAW} of {MAX_QUOTE_BYTES} bytes")

    @property
    def version(self) -> tuple[int, int]:
        return (self.boot_epoch, self.sequence)


_APPRAISAL = {
    1: ("verifier", str), 2: ("boot_epoch", int), 3: ("sequence", int), 4: ("board", str), 5: ("tier", int), 6: ("vector", dict),
    9: ("bootcount", int), 10: ("counter", int), 11: ("epoch", int), 12: ("issued_s", int),
}  # fmt: skip
_APPRAISAL_OPTIONAL = {7: ("reasons", list), 8: ("evidence", bytes), 13: ("raw", list)}
_CLAIMS = dict(enumerate(Vector.__dataclass_fields__))
"""Names by their numbers in AR4SI."""


def sign_appraisal(appraisal: Appraisal, signer: Signer) -> bytes:
    """The signed appraisal, at most ``MAX_APPRAISAL_BYTES``."""
    return sign1(encode(_map_of(appraisal)), signer, AAD)


def open_appraisal(message: bytes, find_key: Callable[[bytes], bytes | None]) -> Appraisal:
    """The appraisal in a signed message; what it holds as ``raw`` was not read (``proof_of``).

    Raises ``RefusedError`` unless it is well-formed and signed by its own verifier.
    """
    signed = verify1(message, find_key, AAD, MAX_APPRAISAL_BYTES)
    payload = decode(signed.payload, MAX_APPRAISAL_BYTES, subject="appraisal")
    appraisal = _appraisal_in(fields(payload, "appraisal", _APPRAISAL, _APPRAISAL_OPTIONAL))
    if signed.kid != appraisal.verifier.encode():
        raise RefusedError("appraisal", f"verifier {appraisal.verifier!r} signed by {shown(signed.kid)}", "its own signature")
    if _map_of(appraisal) != payload:
        raise RefusedError("appraisal", "another way to say it", "no empty list, no empty evidence, no claim of 0")
    return appraisal


def proof_of(appraisal: Appraisal, find_key: Callable[[bytes], bytes | None]) -> str:
    """What the two quotes that it holds prove against its board, whoever shows them; empty if they prove nothing."""
    if len(appraisal.raw) != MAX_RAW:
        return ""
    try:
        one, other = (open_quote(message, find_key) for message in appraisal.raw)
    except RefusedError:
        return ""
    if one.board != appraisal.board:
        return ""
    return contradiction(one, appraisal.raw[0], other, appraisal.raw[1])


def _map_of(appraisal: Appraisal) -> dict[int, object]:
    vector = {number: getattr(appraisal.vector, name) for number, name in _CLAIMS.items()}
    known: dict[int, object] = {key: getattr(appraisal, name) for key, (name, _) in _APPRAISAL.items()}
    known |= {5: int(appraisal.tier), 6: {number: claim for number, claim in vector.items() if claim}}
    lists = {7: list(appraisal.reasons), 8: appraisal.evidence, 13: list(appraisal.raw)}
    return known | {key: value for key, value in lists.items() if value}


def _appraisal_in(entry: dict[str, Any]) -> Appraisal:
    if entry["tier"] not in list(TrustTier):
        raise RefusedError("appraisal tier", entry["tier"], ", ".join(str(int(tier)) for tier in TrustTier))
    reasons = list_of(entry.pop("reasons", []), "appraisal reasons", str, MAX_REASONS)
    raw = list_of(entry.pop("raw", []), "appraisal raw", bytes, MAX_RAW)
    claims = fields(entry.pop("vector"), "vector", {}, {number: (name, int) for number, name in _CLAIMS.items()})
    tier = TrustTier(entry.pop("tier"))
    return Appraisal(tier=tier, vector=Vector(**claims), reasons=tuple(reasons), raw=tuple(raw), **entry)
