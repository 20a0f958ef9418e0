"""The root of trust of an emulated board: a key that only the device has, and registers of what it was told to measure.

Owns the registers and what the root signs of them.  Rules: a register can only be extended, as a PCR is; all are zero when the
device is; what is signed names the challenge and every register; it is emulated, so its key is a file, and it proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import SEED_BYTES, Signer, to_be_signed, verify_signature
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DIGEST_BYTES, bounded

AAD = b"sly/1/device-root"
REGISTERS = 8
MAX_STATEMENT_BYTES = 512
_STATEMENT: dict[int, tuple[str, type]] = {1: ("challenge", bytes), 2: ("registers", list)}


@dataclass(frozen=True, slots=True)
class Statement:
    """What the root says: ``challenge`` is 32 bytes, ``registers`` are ``REGISTERS`` of 32 bytes each."""

    challenge: bytes
    registers: tuple[bytes, ...]

    def __post_init__(self) -> None:
        bounded("device root's challenge, length", len(self.challenge), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        if len(self.registers) != REGISTERS or any(len(each) != DIGEST_BYTES for each in self.registers):
            raise RefusedError("device root's registers", f"{len(self.registers)}", f"{REGISTERS} of {DIGEST_BYTES} bytes")


class DeviceRoot:
    """One device: ``seed`` is its 32 secret bytes. Raises ``ValueError`` for another length."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a device root takes a seed of {SEED_BYTES} bytes")
        self._signer = Signer(b"device-root", seed)
        self._registers = [bytes(DIGEST_BYTES)] * REGISTERS

    @property
    def public_key(self) -> bytes:
        return self._signer.public_key

    def extend(self, register: int, digest: bytes) -> None:
        """``SHA-256(register || digest)`` takes its place. Raises ``ValueError`` for another register or length."""
        if not 0 <= register < REGISTERS or len(digest) != DIGEST_BYTES:
            raise ValueError(f"registers 0 to {REGISTERS - 1} take digests of {DIGEST_BYTES} bytes")
        self._registers[register] = sha256(self._registers[register] + digest).digest()

    def sign(self, challenge: bytes) -> tuple[bytes, bytes]:
        """The statement for ``challenge`` (32 bytes), and its signature of 64 bytes."""
        said = Statement(challenge, tuple(self._registers))
        statement = encode({1: said.challenge, 2: list(said.registers)})
        return statement, self._signer.signature(to_be_signed(b"", AAD, statement))


def open_statement(statement: bytes, signature: bytes, public_key: bytes) -> Statement:
    """What a device root signed. Raises ``RefusedError`` unless ``public_key`` signed it and it is well-formed."""
    verify_signature(public_key, to_be_signed(b"", AAD, statement), signature)
    value = decode(statement, MAX_STATEMENT_BYTES, subject="device root's statement")
    entry: dict[str, Any] = fields(value, "device root's statement", _STATEMENT)
    registers = list_of(entry["registers"], "device root's registers", bytes, REGISTERS)
    return Statement(entry["challenge"], tuple(registers))
