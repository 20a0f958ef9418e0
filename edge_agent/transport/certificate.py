"""From when until when a certificate says it is good, without a library that reads all of it.

Rules: nothing is verified here, TLS does that; what is not the beginning of an X.509 certificate in DER is refused, whatever its
lengths say.  Source: RFC 5280, sections 4.1 and 4.1.2.5; X.690 for the tags.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

from edge_agent.core.errors import RefusedError

MAX_PEM_BYTES = 64 * 2**10
_INTEGER, _SEQUENCE, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x02, 0x30, 0x17, 0x18, 0xA0
_ALLOWED = "a certificate in PEM (RFC 7468)"


@dataclass(frozen=True, slots=True)
class Validity:
    """Seconds since 1970."""

    not_before_s: int
    not_after_s: int


def validity(pem: bytes) -> Validity:
    """Of the first certificate in ``pem``. Raises ``RefusedError`` if there is none that can be read so far."""
    begin, end = pem.find(b"-----BEGIN CERTIFICATE-----"), pem.find(b"-----END CERTIFICATE-----")
    if len(pem) > MAX_PEM_BYTES or not 0 <= begin < end:
        raise RefusedError("certificate", f"{len(pem)} bytes without one", _ALLOWED)
    try:
        der = ssl.PEM_cert_to_DER_cert(pem[begin:end].decode("ascii") + "-----END CERTIFICATE-----")
        return _validity(der)
    except ValueError as error:
        raise RefusedError("certificate", f"bytes that are none ({error})", _ALLOWED) from error


def _validity(der: bytes) -> Validity:
    _, certificate, _ = _element(der, _SEQUENCE)
    _, rest, _ = _element(certificate, _SEQUENCE)
    if rest[:1] == bytes([_VERSION]):
        _, _, rest = _element(rest, _VERSION)
    for expected in (_INTEGER, _SEQUENCE, _SEQUENCE):  # serial number, signature, issuer
        _, _, rest = _element(rest, expected)
    _, times, _ = _element(rest, _SEQUENCE)
    first_tag, first, times = _element(times, _UTC_TIME, _GENERALIZED_TIME)
    last_tag, last, _ = _element(times, _UTC_TIME, _GENERALIZED_TIME)
    return Validity(_seconds(first_tag, first), _seconds(last_tag, last))


def _element(data: bytes, *tags: int) -> tuple[int, bytes, bytes]:
    """Tag and content of the element that ``data`` begins with, and what follows it. Raises ``ValueError``."""
    if len(data) < 2 or data[0] not in tags:
        raise ValueError("another element than expected")
    length, at = data[1], 2
    if length >= 0x80:
        at += length & 0x7F
        length = int.from_bytes(data[2:at], "big")
    if data[1] == 0x80 or at + length > len(data):
        raise ValueError("a length that is open, or past the end")
    return data[0], data[at : at + length], data[at + length :]


def _seconds(tag: int, text: bytes) -> int:
    digits = text.decode("ascii")
    if tag == _UTC_TIME:
        digits = ("19" if digits[:2] >= "50" else "20") + digits
    return int(datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())
