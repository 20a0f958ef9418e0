"""The structures of a TPM 2.0 that evidence is made of: its public key, its statement of PCRs, its signature.

Owns their bytes (TPM 2.0 Library, part 2, sections 10.12, 11.3 and 12.2) and how a PCR grows.  Rules: big-endian, every length
checked, no byte left over; only what this agent makes is taken: a restricted ECDSA key on P-256 that cannot leave its TPM,
SHA-256 and one PCR; nothing here is I/O or says whether a signature is good.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import DIGEST_BYTES

MAX_ATTEST_BYTES = 256
MAX_PUBLIC_BYTES = 256
MAX_SIGNATURE_BYTES = 128
POINT_BYTES = 65
"""An uncompressed point of P-256: 0x04, x, y (SEC 1, section 2.3.3): how a TPM's key is enrolled."""
SIGNATURE_BYTES = 64
"""r and s of ECDSA on P-256, 32 bytes each."""

GENERATED, ATTEST_QUOTE = 0xFF544347, 0x8018
_ECC, _SHA256, _ECDSA, _NULL, _P256 = 0x0023, 0x000B, 0x0018, 0x0010, 0x0003
_FIXED_TPM, _FIXED_PARENT, _SENSITIVE_DATA_ORIGIN, _RESTRICTED, _DECRYPT, _SIGN = (1 << bit for bit in (1, 4, 5, 16, 17, 18))
_MUST = _FIXED_TPM | _FIXED_PARENT | _SENSITIVE_DATA_ORIGIN | _RESTRICTED | _SIGN
_PCRS_BYTES = 3
"""``sizeofSelect`` of a PC-like TPM: 24 PCRs."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class PcrQuote:
    """A TPMS_ATTEST of type quote. ``resets``, ``restarts``: of the TPM, ever, and since the last reset (suspensions)."""

    extra_data: bytes
    clock_ms: int
    resets: int
    restarts: int
    pcr: int
    pcr_digest: bytes


class _Reader:
    def __init__(self, subject: str, data: bytes, max_bytes: int) -> None:
        if len(data) > max_bytes:
            raise RefusedError(f"{subject} length", f"{len(data)} bytes", f"at most {max_bytes} bytes")
        self._subject, self._data, self._at = subject, data, 0

    def take(self, size_bytes: int) -> bytes:
        found = self._data[self._at : self._at + size_bytes]
        if len(found) != size_bytes:
            raise RefusedError(f"{self._subject} at byte {self._at}", "the end of the data", f"{size_bytes} more bytes")
        self._at += size_bytes
        return found

    def number(self, size_bytes: int) -> int:
        return int.from_bytes(self.take(size_bytes), "big")

    def sized(self, max_bytes: int) -> bytes:
        """A TPM2B: a length of two bytes and so many bytes."""
        size_bytes = self.number(2)
        if size_bytes > max_bytes:
            raise RefusedError(f"{self._subject} at byte {self._at}", f"{size_bytes} bytes", f"at most {max_bytes} bytes")
        return self.take(size_bytes)

    def expect(self, what: str, got: _Value, allowed: _Value) -> None:
        if got != allowed:
            raise RefusedError(f"{self._subject}: {what}", shown(got), shown(allowed))

    def end(self) -> None:
        self.expect("bytes left over", len(self._data) - self._at, 0)


def open_attest(data: bytes) -> PcrQuote:
    """The fields of a TPMS_ATTEST over one SHA-256 PCR. Raises ``RefusedError`` for anything else; verifies no signature."""
    reader = _Reader("TPM statement", data, MAX_ATTEST_BYTES)
    reader.expect("magic", reader.number(4), GENERATED)
    reader.expect("type", reader.number(2), ATTEST_QUOTE)
    reader.sized(2 + 64)
    extra_data = reader.sized(64)
    clock_ms, resets, restarts = reader.number(8), reader.number(4), reader.number(4)
    reader.take(1 + 8)
    reader.expect("PCR selections", reader.number(4), 1)
    reader.expect("PCR bank", reader.number(2), _SHA256)
    reader.expect("PCR selection, length", reader.number(1), _PCRS_BYTES)
    selected = int.from_bytes(reader.take(_PCRS_BYTES), "little")
    reader.expect("PCRs selected", selected.bit_count(), 1)
    pcr_digest = reader.sized(DIGEST_BYTES)
    reader.end()
    return PcrQuote(extra_data, clock_ms, resets, restarts, selected.bit_length() - 1, pcr_digest)


def open_public(data: bytes) -> bytes:
    """The point of a TPM2B_PUBLIC: ``POINT_BYTES``. Raises ``RefusedError`` unless it is an attestation key of this agent's kind.

    Restricted: it signs nothing that was made outside the TPM in the form of a TPM's statement (part 1, section 25).
    """
    outer = _Reader("TPM public key", data, MAX_PUBLIC_BYTES)
    reader = _Reader("TPM public key", outer.sized(MAX_PUBLIC_BYTES), MAX_PUBLIC_BYTES)
    outer.end()
    reader.expect("type", reader.number(2), _ECC)
    reader.expect("name algorithm", reader.number(2), _SHA256)
    attributes = reader.number(4)
    reader.expect("attributes", attributes & (_MUST | _DECRYPT), _MUST)
    reader.sized(64)
    for what, allowed in (("symmetric", _NULL), ("scheme", _ECDSA), ("hash", _SHA256), ("curve", _P256), ("KDF", _NULL)):
        reader.expect(what, reader.number(2), allowed)
    x, y = reader.sized(32), reader.sized(32)
    reader.end()
    return b"\x04" + x.rjust(32, b"\0") + y.rjust(32, b"\0")


def open_signature(data: bytes) -> bytes:
    """r and s of a TPMT_SIGNATURE, 32 bytes each. Raises ``RefusedError`` unless it is ECDSA with SHA-256."""
    reader = _Reader("TPM signature", data, MAX_SIGNATURE_BYTES)
    reader.expect("algorithm", reader.number(2), _ECDSA)
    reader.expect("hash", reader.number(2), _SHA256)
    r, s = reader.sized(32), reader.sized(32)
    reader.end()
    return r.rjust(32, b"\0") + s.rjust(32, b"\0")


def replay(log: Iterable[bytes]) -> bytes:
    """What a register holds that was zero and was extended by each digest of ``log`` in turn."""
    value = bytes(DIGEST_BYTES)
    for digest in log:
        value = sha256(value + digest).digest()
    return value


def pcr_digest(log: Iterable[bytes]) -> bytes:
    """What a quote of one PCR says of it: the SHA-256 of all selected PCRs, here of one (part 3, section 18.4)."""
    return sha256(replay(log)).digest()
