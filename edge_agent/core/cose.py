"""COSE_Sign1 (RFC 9052) with Ed25519: how a board says something that others may believe.

Owns signing, verifying and the headers that mean something here.  Rules:

* What is written has the algorithm and the key id in the protected header, an empty unprotected one, and tag 18: nothing
  in a message is left unsigned, and a message has one form.
* What is read may say algorithm -8 (EdDSA) or -19 (Ed25519, RFC 9864); either one means Ed25519, whatever else -8 allows.
* ``external_aad`` separates the uses of one key: a signature made for a record does not verify as a receipt.
* No part of a payload leaves ``verify1`` before its signature was found good.
* A public key is 32 bytes of a point in the prime-order subgroup: small-order and mixed-order keys, with which one
  signature can fit many messages or be judged differently by two verifiers, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

from nacl import bindings
from nacl.exceptions import BadSignatureError

from edge_agent.core.cbor import Tag, decode, encode
from edge_agent.core.errors import RefusedError, shown

COSE_SIGN1_TAG = 18
EDDSA = -8
ED25519 = -19
ALGORITHMS = (EDDSA, ED25519)

ALG, CRIT, KID = 1, 2, 4
"""Header labels (RFC 9052 section 3.1)."""
UNDERSTOOD = frozenset({ALG, KID})
"""What ``crit`` may list, because it is acted upon here."""

SEED_BYTES = 32
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_KID_BYTES = 64
MAX_PROTECTED_BYTES = 1_024
MAX_SIGNED_BYTES = 64 * 2**10
"""What is signed is metadata and digests; tensors are not signed but their digests are."""
MAX_ENVELOPE_ITEMS = 64
"""CBOR items of the envelope and of its protected header; the payload is one of them, unread."""


class Signer:
    """An Ed25519 key and the id it is known by. ``kid`` is 1 to 64 bytes, ``seed`` the 32 secret bytes (RFC 8032).

    Raises ``ValueError`` for other lengths. The secret is in no attribute that is shown, and a signer is not pickled.
    """

    __slots__ = ("_secret_key", "kid", "public_key")

    def __init__(self, kid: bytes, seed: bytes) -> None:
        if not 0 < len(kid) <= MAX_KID_BYTES or len(seed) != SEED_BYTES:
            raise ValueError(f"a signer takes a kid of 1 to {MAX_KID_BYTES} bytes and a seed of {SEED_BYTES}")
        self.kid = kid
        self.public_key, self._secret_key = bindings.crypto_sign_seed_keypair(seed)

    def signature(self, signed_bytes: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``signed_bytes``; the same bytes give the same signature."""
        return bindings.crypto_sign(signed_bytes, self._secret_key)[:SIGNATURE_BYTES]

    def __repr__(self) -> str:
        return f"Signer(kid={self.kid!r}, public_key={self.public_key.hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signer holds a secret and is not pickled")


@dataclass(frozen=True, slots=True)
class Sign1:
    """The parts of a COSE_Sign1 message as they came. Nothing here was verified."""

    protected: bytes
    unprotected: Mapping[object, object]
    payload: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Signed:
    """What was signed, by which key; the signature was good."""

    payload: bytes = field(repr=False)
    kid: bytes
    algorithm: int


def sign1(payload: bytes, signer: Signer, external_aad: bytes = b"") -> bytes:
    """A tagged COSE_Sign1 message over ``payload``, deterministic: the same three arguments give the same bytes."""
    protected = encode({ALG: ED25519, KID: signer.kid})
    signature = signer.signature(to_be_signed(protected, external_aad, payload))
    return encode_sign1(Sign1(protected, {}, payload, signature))


def verify1(
    message: bytes | memoryview,
    find_key: Callable[[bytes], bytes | None],
    external_aad: bytes = b"",
    max_bytes: int = MAX_SIGNED_BYTES,
    *,
    unprotected: Collection[int] = (),
) -> Signed:
    """The payload of ``message``, if the key that ``find_key`` has for its kid signed it with this ``external_aad``.

    ``find_key`` maps a kid to 32 bytes of an Ed25519 public key, or to None when it knows no such key. ``unprotected``
    names the header labels that may stand outside the signature: none, unless a foreign signer is to be heard; the algorithm
    and ``crit`` never may.
    Raises ``RefusedError`` saying which rule of RFC 9052 or of this file was broken; nothing of the payload is given then.
    """
    parts = decode_sign1(message, max_bytes)
    algorithm, kid = _algorithm_and_kid(parts, unprotected)
    public_key = find_key(kid)
    if public_key is None:
        raise RefusedError("signed message: kid", shown(kid), "the key id of an enrolled board")
    verify_signature(public_key, to_be_signed(parts.protected, external_aad, parts.payload), parts.signature)
    return Signed(parts.payload, kid, algorithm)


def to_be_signed(protected: bytes, external_aad: bytes, payload: bytes) -> bytes:
    """The Sig_structure of RFC 9052 section 4.4: what the key signs. An empty protected map counts as no bytes."""
    return encode(["Signature1", b"" if protected == b"\xa0" else protected, external_aad, payload])


def encode_sign1(parts: Sign1) -> bytes:
    """The tagged message of these parts; ``parts.protected`` is the encoded header map as it was signed."""
    return encode(Tag(COSE_SIGN1_TAG, [parts.protected, parts.unprotected, parts.payload, parts.signature]))


def decode_sign1(message: bytes | memoryview, max_bytes: int = MAX_SIGNED_BYTES) -> Sign1:
    """The parts of a tagged message, *unverified*: for inspection; ``verify1`` is for belief.

    Raises ``RefusedError`` for bytes that are no COSE_Sign1 with an attached payload and a signature of 64 bytes.
    """
    subject = "signed message"
    value = decode(message, max_bytes, max_items=MAX_ENVELOPE_ITEMS, tags=(COSE_SIGN1_TAG,), subject=subject)
    if not isinstance(value, Tag):
        raise RefusedError(subject, "a value without a tag", "tag 18, COSE_Sign1")
    array = value.value
    if type(array) is not list or tuple(map(type, array)) != (bytes, dict, bytes, bytes):
        raise RefusedError(
            subject, "other content", "an array of protected (bytes), unprotected (map), payload, signature (bytes)"
        )
    parts = Sign1(*array)
    if len(parts.signature) != SIGNATURE_BYTES:
        raise RefusedError(f"{subject}: signature", f"{len(parts.signature)} bytes", f"{SIGNATURE_BYTES} bytes")
    return parts


def verify_signature(public_key: bytes, signed_bytes: bytes, signature: bytes) -> None:
    """Return if ``signature`` is ``public_key``'s Ed25519 signature of ``signed_bytes``; raise ``RefusedError`` if not.

    libsodium refuses a scalar S >= L, a non-canonical key, and an R or a key of small order (RFC 8032 section 5.1.7).
    """
    check_public_key(public_key)
    try:
        bindings.crypto_sign_open(signature + signed_bytes, public_key)
    except BadSignatureError as error:
        raise RefusedError(
            "signed message: signature", "one that does not fit", "this key, purpose, header and payload"
        ) from error


def check_public_key(public_key: bytes) -> None:
    """Return if signatures can be verified by these bytes; raise ``RefusedError`` if not."""
    if not _is_ed25519_key(public_key):
        raise RefusedError("public key", shown(public_key), f"{PUBLIC_KEY_BYTES} bytes, an Ed25519 point of prime order")


@lru_cache(maxsize=1_024)
def _is_ed25519_key(public_key: bytes) -> bool:
    return len(public_key) == PUBLIC_KEY_BYTES and bindings.crypto_core_ed25519_is_valid_point(public_key)


def _algorithm_and_kid(parts: Sign1, unprotected: Collection[int]) -> tuple[int, bytes]:
    """From the header, after everything was refused that RFC 9052 section 3 or this protocol forbids in it."""
    subject = "protected header"
    protected = decode(parts.protected or b"\xa0", MAX_PROTECTED_BYTES, max_items=MAX_ENVELOPE_ITEMS, subject=subject)
    if not isinstance(protected, dict):
        raise RefusedError(subject, shown(protected), "a map")
    _must_be_apart(protected, parts.unprotected, unprotected)
    _must_understand(protected)
    algorithm = protected.get(ALG)
    if type(algorithm) is not int or algorithm not in ALGORITHMS:
        raise RefusedError(f"{subject}: algorithm", shown(algorithm), "-19 (Ed25519) or -8 (EdDSA)")
    kid = protected.get(KID, parts.unprotected.get(KID))
    if type(kid) is not bytes or not 0 < len(kid) <= MAX_KID_BYTES:
        raise RefusedError(f"{subject}: kid", shown(kid), f"1 to {MAX_KID_BYTES} bytes")
    return algorithm, kid


def _must_be_apart(protected: Mapping[object, object], present: Mapping[object, object], allowed: Collection[int]) -> None:
    for label in present:
        if label in protected:
            raise RefusedError("signed message: header", f"label {shown(label)} in both headers", "one place for each label")
        if label in (ALG, CRIT) or label not in allowed:
            raise RefusedError("unprotected header", f"label {shown(label)}", "nothing that the signature does not cover")


def _must_understand(protected: Mapping[object, object]) -> None:
    """RFC 9052 section 3.1: a label that ``crit`` lists must be present and acted upon, or the message is refused."""
    if CRIT not in protected:
        return
    critical = protected[CRIT]
    if type(critical) is not list or not critical:
        raise RefusedError("protected header: crit", shown(critical), "a list of one label or more")
    for label in critical:
        if type(label) is not int or label not in UNDERSTOOD or label not in protected:
            raise RefusedError("protected header: crit", f"label {shown(label)}", "1 (alg) and 4 (kid), where present")
