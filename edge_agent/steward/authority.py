"""The fleet's certificate authority: it says which broker is the fleet's, and which connection is which board's.

Owns the CA's key, the certificates it signs (X.509, RFC 5280) and its list of revoked ones.  Rules:

* Keys are ECDSA P-256: Mosquitto 2.0 with OpenSSL 3 and Python's ``ssl`` take Ed25519 certificates too, but older OpenSSL, other
  brokers and secure elements do not.
* A certificate is for one thing: the CA's signs, the broker's serves the names in it, a client's is one board's or one
  operator's, whose name is its common name; a name is decided by the fleet's registry, never by who asks.
* All are valid from 1970 on, so that a board whose clock has lost its battery can join; what ends a certificate early is the list
  of revoked ones, which the broker reads.
* A private key is written with mode 0600 and is in no message.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from edge_agent.store.files import Disk, read_bounded, write_atomically

CA_FILE, CA_KEY_FILE, CRL_FILE, ISSUED_FOLDER = "ca.pem", "ca.key", "crl.pem", "issued"
AUTHORITY_DAYS, CLIENT_DAYS, BROKER_DAYS = 30 * 365, 20 * 365, 5 * 365
MAX_PEM_BYTES = 2**20
MAX_NAMES = 32
PUBLIC_FILE = 0o644
_BEGIN = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


class Authority:
    """A CA in ``folder``. ``create`` makes one, ``Authority(folder)`` opens it.

    Raises ``UnavailableError`` for files that cannot be read, ``RefusedError`` for what is none of a CA's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._disk = folder, Disk()
        self.certificate = self._certificate(folder / CA_FILE)
        self._key = _private_key(folder / CA_KEY_FILE, read_bounded(self._disk, folder / CA_KEY_FILE, MAX_PEM_BYTES))
        if self._key.public_key() != self.certificate.public_key():
            raise RefusedError(f"CA {folder}", f"{CA_KEY_FILE} of another certificate", f"the key of {CA_FILE}")

    @classmethod
    def create(cls, folder: Path, fleet: str) -> Authority:
        """A new CA named after ``fleet``, in a folder that has none. Raises ``RefusedError`` if it has."""
        if (folder / CA_KEY_FILE).exists():
            raise RefusedError(f"CA {folder}", "a key that is there already", "a folder without one")
        disk, key = Disk(), ec.generate_private_key(ec.SECP256R1())
        name = _named(f"SlyOS fleet {fleet}")
        public = key.public_key()
        certificate = (
            _begun(name, name, public, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        disk.make_folder(folder)
        disk.make_folder(folder / ISSUED_FOLDER)
        write_atomically(disk, folder / CA_KEY_FILE, _pem_of(key))
        write_atomically(disk, folder / CA_FILE, certificate.public_bytes(Encoding.PEM), PUBLIC_FILE)
        made = cls(folder)
        made._write_revoked([])
        return made

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def crl_pem(self) -> bytes:
        return read_bounded(self._disk, self._folder / CRL_FILE, MAX_PEM_BYTES)

    def issue_broker(self, names: Sequence[str]) -> Issued:
        """For a server under these host names and addresses. Raises ``RefusedError`` for a name that cannot be one."""
        if not 0 < len(names) <= MAX_NAMES:
            raise ConfigError("broker's names", f"{len(names)}", f"1 to {MAX_NAMES}")
        alternative = x509.SubjectAlternativeName([_host(name) for name in dict.fromkeys(names)])
        return self._issue(f"broker.{names[0]}"[:64], BROKER_DAYS, ExtendedKeyUsageOID.SERVER_AUTH, alternative)

    def issue_client(self, name: str) -> Issued:
        """For the client that the broker shall know as ``name``: a board's id, or an operator's name as its ACL has it."""
        return self._issue(name, CLIENT_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH, None)

    def issued_to(self, name: str) -> list[x509.Certificate]:
        """Every certificate that was ever made for ``name``, in no order."""
        folder = self._folder / ISSUED_FOLDER
        names = [each for each in self._disk.names(folder) if each.rsplit(".", 2)[0] == name]
        return [self._certificate(folder / each) for each in names]

    def revoke(self, name: str, besides: Iterable[bytes] = ()) -> int:
        """Take back every certificate of ``name`` but those whose PEM is in ``besides``; how many are revoked that were not."""
        kept = {x509.load_pem_x509_certificate(pem).serial_number for pem in besides}
        serials = {each.serial_number for each in self.issued_to(name)} - kept
        known = {each.serial_number: each for each in x509.load_pem_x509_crl(self.crl_pem)}
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        fresh = [_revoked(serial, now) for serial in sorted(serials - set(known))]
        self._write_revoked([*known.values(), *fresh])
        return len(fresh)

    def _issue(
        self, name: str, days: int, purpose: x509.ObjectIdentifier, alternative: x509.SubjectAlternativeName | None
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        public, issuer = key.public_key(), self.certificate.public_key()
        begun = (
            _begun(_named(name), self.certificate.subject, public, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)  # type: ignore[arg-type]
        )
        if alternative is not None:
            begun = begun.add_extension(alternative, critical=False)
        signed = begun.sign(self._key, hashes.SHA256())
        pem = signed.public_bytes(Encoding.PEM)
        path = self._folder / ISSUED_FOLDER / f"{name}.{signed.serial_number:x}.pem"
        write_atomically(self._disk, path, pem, PUBLIC_FILE)
        return Issued(pem, _pem_of(key))

    def _write_revoked(self, revoked: Sequence[x509.RevokedCertificate]) -> None:
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(_BEGIN)
            .next_update(_BEGIN + datetime.timedelta(days=(now - _BEGIN).days + AUTHORITY_DAYS))
        )
        for each in revoked:
            builder = builder.add_revoked_certificate(each)
        signed = builder.sign(self._key, hashes.SHA256())
        write_atomically(self._disk, self._folder / CRL_FILE, signed.public_bytes(Encoding.PEM), PUBLIC_FILE)

    def _certificate(self, path: Path) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificate(read_bounded(self._disk, path, MAX_PEM_BYTES))
        except ValueError as error:
            raise RefusedError(f"certificate {path}", "no PEM certificate", "as sly fleet made it", "restore it") from error


def days_left(certificate: bytes, now_s: int) -> int:
    """Whole days until a PEM certificate expires, negative after."""
    end = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    return (int(end.timestamp()) - now_s) // 86_400


def _begun(subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _named(name: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError as error:
        raise ConfigError("certificate's name", name, "1 to 64 characters") from error


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise ConfigError("broker's name", name, "an address, or a host name in ASCII") from error


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=key_cert_sign, crl_sign=crl_sign, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _revoked(serial: int, now: datetime.datetime) -> x509.RevokedCertificate:
    return x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _private_key(path: Path, pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"CA key {path}", "no plain PEM key", "as sly fleet init made it", "restore it") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UnavailableError(f"CA key {path}", "it is of another kind than P-256", "restore the fleet's own")
    return key
