"""What hardware says of a quote: an endorsement by a TPM 2.0, or by the root of an emulated board.

Owns ``Endorsement``, its bytes and its check.  Rules: it is over this very quote (``evidence.endorsed_digest``), by the key that
was enrolled for the board and of the kind that was enrolled; the register that it shows is what its log gives, and every model
that the quote measures is in the log; one encoding, every list bounded; what cannot be checked here does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from board_support.device_root import MAX_STATEMENT_BYTES, open_statement
from edge_agent.attest.evidence import MAX_ENDORSEMENT_BYTES, KeyKind, Quote, endorsed_digest
from edge_agent.attest.tpm import POINT_BYTES, SIGNATURE_BYTES, open_attest, pcr_digest, replay
from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import PUBLIC_KEY_BYTES
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import DIGEST_BYTES, bounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

MAX_LOG = 96
"""Digests that one register was extended by since it was zero."""
MAX_WHY_CHARS = 240
CANNOT_CHECK = "cannot check"
"""How a reason begins that says nothing of the board: what checks its key is not installed here."""
MODEL_REGISTER = 0
"""The register of an emulated root that model digests go into."""

_ENDORSEMENT = {1: ("kind", str), 2: ("statement", bytes), 3: ("signature", bytes), 4: ("register", int), 5: ("log", list)}
_KIND_OF_KEY = {POINT_BYTES: KeyKind.TPM, PUBLIC_KEY_BYTES: KeyKind.EMULATED}


@dataclass(frozen=True, slots=True)
class Endorsement:
    """``statement``: what was signed, a TPMS_ATTEST or a device root's statement; ``signature``: 64 bytes over it.

    ``register``: the PCR, or the register of the root; ``log``: the digests that it was extended by since it was zero.
    """

    kind: KeyKind
    statement: bytes
    signature: bytes
    register: int
    log: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.kind is KeyKind.SOFTWARE:
            raise RefusedError("endorsement kind", self.kind.value, f"{KeyKind.TPM.value} or {KeyKind.EMULATED.value}")
        bounded("endorsement statement, length", len(self.statement), 1, MAX_STATEMENT_BYTES, "bytes")
        bounded("endorsement signature, length", len(self.signature), SIGNATURE_BYTES, SIGNATURE_BYTES, "bytes")
        bounded("endorsement register", self.register, 0, 23)
        if len(self.log) > MAX_LOG or any(len(each) != DIGEST_BYTES for each in self.log):
            raise RefusedError("endorsement log", f"{len(self.log)} entries", f"at most {MAX_LOG} of {DIGEST_BYTES} bytes")


def encode_endorsement(endorsement: Endorsement) -> bytes:
    known = {key: getattr(endorsement, name) for key, (name, _) in _ENDORSEMENT.items()}
    return encode({**known, 1: endorsement.kind.value, 5: list(endorsement.log)})


def decode_endorsement(data: bytes) -> Endorsement:
    """The endorsement in these bytes. Raises ``RefusedError`` naming the field; nothing of it is verified."""
    entry = fields(decode(data, MAX_ENDORSEMENT_BYTES, subject="endorsement"), "endorsement", _ENDORSEMENT)
    if entry["kind"] not in list(KeyKind):
        raise RefusedError("endorsement kind", entry["kind"], f"{KeyKind.TPM.value} or {KeyKind.EMULATED.value}")
    log = list_of(entry.pop("log"), "endorsement log", bytes, MAX_LOG)
    return Endorsement(KeyKind(entry.pop("kind")), log=tuple(log), **entry)


def kind_of_key(endorser_key: bytes) -> KeyKind:
    """Of an enrolled key, by its length. Raises ``RefusedError`` for another one."""
    if len(endorser_key) not in _KIND_OF_KEY or (len(endorser_key) == POINT_BYTES and endorser_key[0] != 4):
        allowed = f"{POINT_BYTES} bytes of a TPM (an uncompressed P-256 point) or {PUBLIC_KEY_BYTES} of an emulated root"
        raise RefusedError("endorser's public key", f"{len(endorser_key)} bytes", allowed, "see what sly identity prints there")
    return _KIND_OF_KEY[len(endorser_key)]


def check_endorsement(quote: Quote, endorser_key: bytes) -> str:
    """Why hardware does not vouch for ``quote``, by the key enrolled for its board; empty if it does.

    A reason is no proof of guilt: a TPM may be away, and what begins with ``CANNOT_CHECK`` is said of this verifier.
    """
    try:
        _check(quote, endorser_key)
    except UnavailableError as error:
        return f"{CANNOT_CHECK} the endorsement: {error}"[:MAX_WHY_CHARS]
    except RefusedError as error:
        return str(error)[:MAX_WHY_CHARS]
    return ""


def why_not_checked(endorser_key: bytes) -> str:
    """What is missing in this environment to check endorsements by this key; empty if nothing is."""
    try:
        if kind_of_key(endorser_key) is KeyKind.TPM:
            _point(endorser_key)
    except (RefusedError, UnavailableError) as error:
        return str(error)[:MAX_WHY_CHARS]
    return ""


def _check(quote: Quote, endorser_key: bytes) -> None:
    kind = kind_of_key(endorser_key)
    if not quote.endorsement:
        raise RefusedError("endorsement", "none", f"one by this board's {kind.value} key")
    endorsement = decode_endorsement(quote.endorsement)
    if not kind is endorsement.kind is quote.key_kind:
        said = f"{endorsement.kind.value} in a quote by a {quote.key_kind.value} key"
        raise RefusedError("endorsement kind", said, f"{kind.value}, as enrolled")
    if kind is KeyKind.EMULATED and not quote.emulated:
        raise RefusedError("endorsement kind", "an emulated root on a board that says it is real", "an emulated board")
    challenge, register, shown, expected = _SIGNED[kind](endorsement, endorser_key)
    if challenge != endorsed_digest(quote):
        raise RefusedError("endorsement challenge", "that of another quote", "this quote's")
    if register != endorsement.register:
        raise RefusedError("endorsement register", endorsement.register, f"{register}, which was signed")
    if shown != expected:
        raise RefusedError("endorsement log", "other digests than the register was extended by", "all of them, in order")
    absent = [model.name for model in quote.measurements.models if model.mapped not in endorsement.log]
    if absent:
        raise RefusedError("endorsement log", f"nothing of {', '.join(absent)}"[:100], "every measured model")


def _by_tpm(endorsement: Endorsement, endorser_key: bytes) -> tuple[bytes, int, bytes, bytes]:
    """The challenge and the register that were signed, what it showed, and what it would show by the log."""
    _verify_ecdsa(endorser_key, endorsement.statement, endorsement.signature)
    said = open_attest(endorsement.statement)
    return said.extra_data, said.pcr, said.pcr_digest, pcr_digest(endorsement.log)


def _by_root(endorsement: Endorsement, endorser_key: bytes) -> tuple[bytes, int, bytes, bytes]:
    said = open_statement(endorsement.statement, endorsement.signature, endorser_key)
    return said.challenge, MODEL_REGISTER, said.registers[MODEL_REGISTER], replay(endorsement.log)


_SIGNED = {KeyKind.TPM: _by_tpm, KeyKind.EMULATED: _by_root}


def _verify_ecdsa(point: bytes, signed_bytes: bytes, signature: bytes) -> None:
    """Raises ``RefusedError`` unless ``signature`` (r, s) is that of ``point`` over SHA-256 of ``signed_bytes`` (FIPS 186-5)."""
    key = _point(point)
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
    from cryptography.hazmat.primitives.hashes import SHA256

    r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
    try:
        key.verify(encode_dss_signature(r, s), signed_bytes, ECDSA(SHA256()))
    except InvalidSignature as error:
        raise RefusedError("endorsement signature", "one that does not fit", "the enrolled TPM key's") from error


def _point(point: bytes) -> EllipticCurvePublicKey:
    """The key of a point. Raises ``UnavailableError`` without the library for it, ``RefusedError`` for no point of P-256."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise UnavailableError("keys of TPMs", f"{error}", "run: pip install 'slyos-edge[tpm]'") from error
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    except ValueError as error:
        raise RefusedError("endorser's public key", "no point of P-256", "what sly identity prints") from error
