"""Where a broker is, who we are to it, and what may be tuned on the connection.

Rule: everything that comes from a configuration is judged when the value is built.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass, field

from edge_agent.core.errors import ConfigError
from edge_agent.core.values import CLIENT_ID, bounded, checked
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.tls import TlsFiles

MAX_HOST_CHARS = 253
LABEL = re.compile(r"(?!-)[\w-]{1,63}(?<!-)")
"""Of a host's name (RFC 1123 section 2.1), with underscores and other alphabets, which some resolvers know."""


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where the broker is and who we are to it. Raises ``RefusedError`` for a bad host, port or password without a name."""

    host: str
    port: int = 1883
    tls: TlsFiles | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not _is_address(self.host) and not _is_name(self.host):
            raise ConfigError("broker host", self.host, f"an IP address, or a host's name of up to {MAX_HOST_CHARS} characters")
        bounded("broker port", self.port, 1, 65535)
        if self.password is not None and self.username is None:
            raise ConfigError("broker password", "a password without a username", "both, or none")

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_name(host: str) -> bool:
    """Whether it can be a name. One that ends in a number is an address with a mistake in it."""
    labels = host.removesuffix(".").split(".")
    return len(host) <= MAX_HOST_CHARS and all(map(LABEL.fullmatch, labels)) and not labels[-1].isdecimal()


@dataclass(frozen=True, slots=True)
class MqttOptions:
    """What may be tuned on a link; all of it goes into the CONNECT packet except the back-off."""

    keepalive_s: int = 15
    session_expiry_s: int = 3600
    backoff: BackoffLimits = BackoffLimits()

    def __post_init__(self) -> None:
        bounded("keepalive", self.keepalive_s, 1, 65535, "s")
        bounded("session expiry", self.session_expiry_s, 0, 2**32 - 1, "s")


class Endpoint:
    """A broker address, a client id and the options, with the TLS context loaded.

    Raises ``ConfigError`` for TLS files that cannot be used, ``RefusedError`` for a bad client id.
    """

    def __init__(self, address: BrokerAddress, client_id: str, options: MqttOptions) -> None:
        self.address, self.options = address, options
        self.client_id = checked(CLIENT_ID, "MQTT client id", client_id)
        self.tls: ssl.SSLContext | None = address.tls.context() if address.tls else None
