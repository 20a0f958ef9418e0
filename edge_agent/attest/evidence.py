"""What a board shows of itself: evidence as an Entity Attestation Token (RFC 9711) in a signed CWT (RFC 8392).

Owns ``Quote``, what was measured in it, its claims and its signature.  Rules:

* Only the board itself can sign its quote: the key id is the board, and ``ueid`` is that of the key.
* Claims have the keys of RFC 9711; what is ours stands in ``measurements`` under content format 60 (CBOR), and what hardware says
  in ``submods``.  ``docs/attestation.md`` is the profile.
* A quote is one string of bytes: there is no second way to write it, wrap it or sign it.  A broker that could make one quote into
  two would make its board contradict itself.
* ``external_aad`` is empty, so that any reader of CWTs can verify a quote; no other message of ours is signed with an empty one.
* Every list in it is bounded; it says nothing of whether it should be believed (``attest.appraise``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import KID, Signer, sign1, verify1
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import BOARD_ID, DIGEST_BYTES, MODEL_NAME, bounded, checked

PROFILE = "tag:slyos-edge,2026:quote/1"
"""``eat_profile``: ``docs/attestation.md``."""
AAD = b""
MAX_QUOTE_BYTES = 24 * 2**10
NONCE_BYTES = 16
SEED_BYTES = 32
MAX_NONCES = 64
MAX_MODELS = 64
MAX_COUNT = 2**53
MAX_LIBRARY_CHARS = 128
MAX_HARDWARE_CHARS = 128
MAX_VERSION_CHARS = 64
MAX_SLOT_CHARS = 32
MAX_ENDORSEMENT_BYTES = 4096
NO_DIGEST = bytes(DIGEST_BYTES)

EXP, NBF, IAT = 4, 5, 6
"""Claims of RFC 8392, section 3.1."""
NONCE, UEID, OEMID, HWMODEL, HWVERSION, UPTIME, DBGSTAT = 10, 256, 258, 259, 260, 261, 263
EAT_PROFILE, SUBMODS, BOOTCOUNT, BOOTSEED, SWNAME, SWVERSION, MEASUREMENTS = 265, 266, 267, 268, 270, 271, 273
"""Claims of RFC 9711, section 10.2 (IANA, CBOR Web Token Claims)."""
UEID_RAND = b"\x01"
"""The UEID type of a random number or a hash (RFC 9711, section 4.2.1)."""
OEM_ID = sha256(b"sly/1/oemid").digest()[:16]
"""A random OEM identifier (RFC 9711, section 4.2.3)."""
MAX_HWMODEL_BYTES = 32
DEBUG_ENABLED = 0
"""Of a board whose owner has root nobody can say that debugging is disabled."""
SOFTWARE_NAME = "slyos-edge"
CBOR_FORMAT = 60
"""The CoAP content format application/cbor (RFC 8949, section 9.5)."""
ROOT_SUBMODULE = "root"
ENDORSEMENT = -70_000
"""A private claim (RFC 8392, section 9.1: below -65536) within the submodule."""


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
        bounded(f"slot of {self.name}, length", len(self.slot), 0, MAX_SLOT_CHARS, "characters")


@dataclass(frozen=True, slots=True)
class Measurements:
    """What runs on a board, as it measured it: SHA-256 each.

    ``code``: of the agent's Python files; ``library``: of the interpreter's shared objects, ``library_name`` with its version;
    ``delegate`` likewise, empty without one; ``policy``: of the rules that it places and appraises by.  ``models``: each name
    once.
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
        if len(self.delegate) not in (0, DIGEST_BYTES):
            raise RefusedError("digest of the delegate", f"{len(self.delegate)} bytes", f"none or {DIGEST_BYTES} bytes")
        for name in ("library_name", "delegate_name"):
            bounded(f"{name}, length", len(getattr(self, name)), 0, MAX_LIBRARY_CHARS, "characters")
        bounded("measured models", len(self.models), 0, MAX_MODELS)
        if len({model.name for model in self.models}) != len(self.models):
            raise RefusedError("measured models", ", ".join(model.name for model in self.models), "each name once")


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
        if len(self.nonces) > MAX_NONCES or any(len(each) != NONCE_BYTES for each in self.nonces):
            raise RefusedError("quote nonces", f"{len(self.nonces)}", f"at most {MAX_NONCES} of {NONCE_BYTES} bytes")
        for name, size_bytes in (("bootseed", SEED_BYTES), ("previous", DIGEST_BYTES), ("receipts_head", DIGEST_BYTES)):
            bounded(f"quote {name}, length", len(getattr(self, name)), size_bytes, size_bytes, "bytes")
        for name in ("bootcount", "issued_s", "uptime_s", "receipts"):
            bounded(f"quote {name}", getattr(self, name), 0, MAX_COUNT)
        bounded("quote counter", self.counter, 1, MAX_COUNT)
        bounded("quote receipts_dropped", self.receipts_dropped, 0, self.receipts)
        bounded("quote hardware, length", len(self.hardware), 0, MAX_HARDWARE_CHARS, "characters")
        bounded("quote version, length", len(self.version), 0, MAX_VERSION_CHARS, "characters")
        bounded("quote endorsement, length", len(self.endorsement), 0, MAX_ENDORSEMENT_BYTES, "bytes")

    @property
    def number(self) -> tuple[int, int]:
        """Its place among the quotes of its board: the boot epoch, and the counter within it."""
        return (self.bootcount, self.counter)


_MODEL = {1: ("name", str), 2: ("offered", bytes), 3: ("mapped", bytes)}
_MODEL_OPTIONAL = {4: ("golden", bytes), 5: ("delegated_permille", int), 6: ("version", int), 7: ("slot", str)}
_MEASURED = {7: ("code", bytes), 8: ("library", bytes), 9: ("library_name", str), 10: ("policy", bytes), 13: ("models", list)}
_MEASURED_OPTIONAL = {11: ("delegate", bytes), 12: ("delegate_name", str)}
_OURS = {
    1: ("board", str), 2: ("counter", int), 3: ("previous", bytes), 4: ("hardware", str), 5: ("emulated", bool),
    6: ("key_kind", str), 14: ("receipts", int), 15: ("receipts_head", bytes), 16: ("receipts_dropped", int),
}  # fmt: skip
_CLAIMS = {
    IAT: ("issued_s", int), UEID: ("ueid", bytes), OEMID: ("oemid", bytes), UPTIME: ("uptime_s", int), DBGSTAT: ("dbgstat", int),
    EAT_PROFILE: ("eat_profile", str), BOOTCOUNT: ("bootcount", int), BOOTSEED: ("bootseed", bytes), SWNAME: ("swname", str),
    SWVERSION: ("swversion", list), MEASUREMENTS: ("measurements", list),
}  # fmt: skip
_CLAIMS_OPTIONAL = {
    EXP: ("exp", int), NBF: ("nbf", int), NONCE: ("eat_nonce", object), HWMODEL: ("hwmodel", bytes),
    HWVERSION: ("hwversion", list), SUBMODS: ("submods", dict),
}  # fmt: skip


def sign_quote(quote: Quote, signer: Signer) -> bytes:
    """The signed quote, at most ``MAX_QUOTE_BYTES``. Raises ``ValueError`` for another board's signer."""
    if signer.kid != quote.board.encode():
        raise ValueError(f"{signer.kid!r} does not sign the quotes of {quote.board}")
    return sign1(encode(_claims(quote) | {UEID: ueid_of(signer.public_key)} | _submods(quote)), signer, AAD)


def open_quote(message: bytes, find_key: Callable[[bytes], bytes | None]) -> Quote:
    """The quote in a signed message.

    The key id may stand outside the signature, as other makers of CWTs put it: the board's name is signed in any case.  Raises
    ``RefusedError`` unless the token is well-formed, of this profile, signed by its own board, and its ``ueid`` that of the key.
    """
    signed = verify1(message, find_key, AAD, MAX_QUOTE_BYTES, unprotected=(KID,))
    claims = decode(signed.payload, MAX_QUOTE_BYTES, subject="quote")
    named = fields(claims, "quote", _CLAIMS, _CLAIMS_OPTIONAL)
    quote = _quote_in(named)
    if signed.kid != quote.board.encode():
        raise RefusedError("quote", f"board {quote.board!r} signed by {shown(signed.kid)}", "a board's own signature")
    expected = _claims(quote) | {UEID: ueid_of(find_key(signed.kid) or b"")} | _submods(quote) | _validity(named)
    for key, (name, _) in (_CLAIMS | _CLAIMS_OPTIONAL).items():
        if named.get(name) != expected.get(key):
            raise RefusedError(f"quote claim {name}", shown(named.get(name, "nothing")), shown(expected.get(key, "nothing")))
    return quote


def quote_digest(message: bytes) -> bytes:
    """SHA-256 of a signed quote: what the next one calls ``previous``, and appraisals ``evidence``."""
    return sha256(message).digest()


def ueid_of(public_key: bytes) -> bytes:
    """The board's Universal Entity ID: 17 bytes, type RAND over its key (RFC 9711, section 4.2.1)."""
    return UEID_RAND + sha256(b"sly/1/ueid" + public_key).digest()[:16]


def endorsed_digest(quote: Quote) -> bytes:
    """What hardware endorses: SHA-256 of all that the quote says but ``ueid`` and the endorsement itself."""
    return sha256(b"sly/1/endorsed" + encode(_claims(quote))).digest()


def _claims(quote: Quote) -> dict[int, object]:
    """The claims of a quote without ``ueid``, which is the key's, and ``submods``, which endorse the rest."""
    hwversion = quote.hardware.partition(" Rev ")[2]
    present: dict[int, object] = {NONCE: list(quote.nonces) if len(quote.nonces) > 1 else quote.nonces[0]} if quote.nonces else {}
    if quote.hardware:
        present[HWMODEL] = quote.hardware.encode()[:MAX_HWMODEL_BYTES]
    if hwversion:
        present[HWVERSION] = [hwversion]
    return present | {
        IAT: quote.issued_s, OEMID: OEM_ID, UPTIME: quote.uptime_s, DBGSTAT: DEBUG_ENABLED, EAT_PROFILE: PROFILE,
        BOOTCOUNT: quote.bootcount, BOOTSEED: quote.bootseed, SWNAME: SOFTWARE_NAME, SWVERSION: [quote.version],
        MEASUREMENTS: [[CBOR_FORMAT, encode(_ours(quote))]],
    }  # fmt: skip


def _ours(quote: Quote) -> dict[int, object]:
    measured = quote.measurements
    values: dict[int, object] = {key: getattr(quote, name) for key, (name, _) in _OURS.items()}
    values |= {key: getattr(measured, name) for key, (name, _) in _MEASURED.items()}
    values |= {key: getattr(measured, name) for key, (name, _) in _MEASURED_OPTIONAL.items() if getattr(measured, name)}
    return values | {13: [_model_map(model) for model in measured.models]}


def _model_map(model: ModelMeasurement) -> dict[int, object]:
    optional = {key: getattr(model, name) for key, (name, _) in _MODEL_OPTIONAL.items()}
    known = {key: getattr(model, name) for key, (name, _) in _MODEL.items()}
    return known | {key: value for key, value in optional.items() if value not in (b"", "", None) and (key, value) != (6, 0)}


def _submods(quote: Quote) -> dict[int, object]:
    return {SUBMODS: {ROOT_SUBMODULE: {ENDORSEMENT: quote.endorsement}}} if quote.endorsement else {}


def _validity(named: Mapping[str, Any]) -> dict[int, object]:
    """``exp`` and ``nbf``, which we do not write: no clock is agreed on, so they must fit ``iat`` and decide nothing."""
    present = {key: named[name] for key, name in ((EXP, "exp"), (NBF, "nbf")) if name in named}
    if not present.get(NBF, 0) <= named["issued_s"] < present.get(EXP, MAX_COUNT + 1):
        raise RefusedError("quote claim iat", named["issued_s"], "a time from nbf to before exp")
    return present


def _quote_in(named: Mapping[str, Any]) -> Quote:
    """The quote that these claims say, its fixed and derived claims unchecked. Raises ``RefusedError`` naming the field."""
    ours = fields(_our_map(named["measurements"]), "quote", _OURS | _MEASURED, _MEASURED_OPTIONAL)
    models = list_of(ours.pop("models"), "quote models", dict, MAX_MODELS)
    of_measurements = {name: ours.pop(name) for _, (name, _) in (_MEASURED | _MEASURED_OPTIONAL).items() if name in ours}
    if ours["key_kind"] not in list(KeyKind):
        raise RefusedError("quote key_kind", shown(ours["key_kind"]), ", ".join(KeyKind))
    ours["key_kind"] = KeyKind(ours["key_kind"])
    return Quote(
        nonces=_nonces_in(named.get("eat_nonce", [])),
        version=_version_in(named["swversion"]),
        measurements=Measurements(models=tuple(map(_model_in, models)), **of_measurements),
        endorsement=_endorsement_in(named.get("submods")),
        **{name: named[name] for name in ("bootcount", "bootseed", "issued_s", "uptime_s")},
        **ours,
    )


def _our_map(measurements: list[Any]) -> object:
    match measurements:
        case [[int(content_format), bytes(data)]] if content_format == CBOR_FORMAT:
            return decode(data, MAX_QUOTE_BYTES, subject="quote measurements")
    raise RefusedError("quote measurements", shown(measurements), f"one measurement of content format {CBOR_FORMAT}")


def _nonces_in(value: object) -> tuple[bytes, ...]:
    return (value,) if isinstance(value, bytes) else tuple(list_of(value, "quote eat_nonce", bytes, MAX_NONCES))


def _model_in(value: dict[Any, Any]) -> ModelMeasurement:
    return ModelMeasurement(**fields(value, "measured model", _MODEL, _MODEL_OPTIONAL))


def _version_in(swversion: list[Any]) -> str:
    match swversion:
        case [str(version)]:
            return version
    raise RefusedError("quote claim swversion", shown(swversion), "[text]")


def _endorsement_in(submods: dict[Any, Any] | None) -> bytes:
    """Of ``{"root": {-70000: bytes}}``; that there is nothing beside it, ``open_quote`` sees."""
    if submods is None:
        return b""
    claims = submods.get(ROOT_SUBMODULE)
    endorsement = claims.get(ENDORSEMENT) if isinstance(claims, dict) else None
    if not isinstance(endorsement, bytes):
        raise RefusedError("quote claim submods", shown(submods), f"{{{ROOT_SUBMODULE!r}: {{{ENDORSEMENT}: bytes}}}}")
    return endorsement
