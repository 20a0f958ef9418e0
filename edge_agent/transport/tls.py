"""TLS towards the broker: the files, the context, and the one reason why a connection could not be made.

Rules: TLS 1.2 or later, the broker's certificate must chain to the fleet's CA and carry the name that was dialled; there is
no switch to turn that off.  A file that cannot be used is a ``ConfigError`` when the link is built, not a connection that
fails again and again.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from edge_agent.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the CA that signs the broker's certificate and, for mutual TLS, this board's certificate and its key."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("TLS", "a certificate without its key or a key without its certificate", "both or neither")

    def context(self) -> ssl.SSLContext:
        """A client context. Raises ``ConfigError`` naming the file that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _readable("TLS CA file", self.ca)
        try:
            context.load_verify_locations(cafile=self.ca)
        except ssl.SSLError as error:
            raise ConfigError("TLS CA file", str(self.ca), "PEM certificates", f"it holds none ({error.reason})") from error
        if self.certificate is not None and self.key is not None:
            self._load_identity(context, self.certificate, self.key)
        return context

    @staticmethod
    def _load_identity(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
        _readable("TLS certificate file", certificate)
        _readable("TLS key file", key)
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except ssl.SSLError as error:
            got = f"{certificate} with {key}"
            raise ConfigError("TLS certificate and key", got, "a PEM pair that belongs together", str(error.reason)) from error


def _no_password() -> str:
    raise ConfigError("TLS key file", "an encrypted key", "a plain PEM key, mode 0600", "a board starts with nobody to ask")


def _readable(subject: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(subject, f"{path} ({error.strerror})", "a readable PEM file") from error


# X509_V_ERR_* of OpenSSL's x509_vfy.h, said for a person.
_CERTIFICATE_FAULTS = {
    9: "the broker's certificate is not valid yet; check this board's clock",
    10: "the broker's certificate has expired; renew it on the broker",
    18: "the broker's certificate is self-signed, not signed by our CA; check the CA file",
    19: "the broker's certificate is not signed by our CA; check the CA file",
    20: "the broker's certificate is not signed by our CA; check the CA file",
    21: "the broker's certificate is not signed by our CA; check the CA file",
    23: "the broker's certificate is revoked",
    62: "the broker's certificate is for another host name than the one that was dialled",
    64: "the broker's certificate is for another address than the one that was dialled",
}


HUNG_UP = "the broker hung up"
HUNG_UP_BEFORE = f"{HUNG_UP} before it accepted us; check our certificate or password, and that TLS is on or off on both sides"
HUNG_UP_LATER = f"{HUNG_UP} without a reason; it stopped, the network broke, or another client uses our id"


def connect_fault(error: OSError) -> str:
    """Why a connection could not be made or was lost, in one line that says what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _CERTIFICATE_FAULTS.get(error.verify_code, f"the broker's certificate is not good: {error.verify_message}")
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)):
        return HUNG_UP
    if isinstance(error, ssl.SSLError):
        return _tls_fault(error)
    if isinstance(error, socket.gaierror):
        return f"the broker's name cannot be resolved ({error.strerror}); check the host name"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there; check host and port, and that the broker runs"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror or str(error) or type(error).__name__).lower()


def _tls_fault(error: ssl.SSLError) -> str:
    reason = error.reason or str(error)
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "the broker does not speak TLS on this port"
    if "ALERT" in reason:
        return f"the broker refused our certificate or TLS settings ({reason.lower().replace('_', ' ')})"
    return f"TLS failed ({reason.lower().replace('_', ' ')})"
