"""Who may come in by HTTP: the token, and without one the loopback rule.

Rules: beyond loopback a token is a must; tokens are compared in constant time; ``/v1`` and ``/metrics`` ask for the token when
there is one, ``OPEN_PATHS`` never do; without a token only a loopback name is a good ``Host``, so that a page in a browser
cannot reach this door by a name of its own (DNS rebinding).
"""

from __future__ import annotations

import hmac
import ipaddress
from http import HTTPStatus

from edge_agent.core.config import GatewaySection
from edge_agent.core.errors import ConfigError, shown
from edge_agent.gateway.errors import ApiError

OPEN_PATHS = ("/healthz", "/readyz")


class Access:
    """The rule of one door. Raises ``ConfigError`` for settings that would let strangers in."""

    def __init__(self, section: GatewaySection) -> None:
        token = section.token
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ConfigError("[gateway] token", "characters that no header can carry", "printable ASCII without spaces")
        if not token and not is_loopback(section.host):
            allowed = "an empty token only on a loopback address"
            raise ConfigError("[gateway] token", f"none, with host = {section.host}", allowed, "set a token")
        self._token = token.encode()

    def check(self, path: str, host: str, authorization: str) -> None:
        """Raises ``ApiError`` (401, 403) for a request that may not come in. ``path`` as the server routes it."""
        if not self._token and not is_loopback(_name_of(host)):
            message = f"Host: got {shown(host)}; allowed without a token: localhost or a loopback address"
            raise ApiError(HTTPStatus.FORBIDDEN, message, "host_not_allowed")
        if path not in OPEN_PATHS and not self.authorized(authorization):
            message = "this board's token is needed: Authorization: Bearer TOKEN"
            raise ApiError(HTTPStatus.UNAUTHORIZED, message, "invalid_api_key")

    def authorized(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token)
        return not self._token or (scheme.lower() == "bearer" and right)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name_of(host: str) -> str:
    """``name`` of ``name``, ``name:port``, ``[address]`` and ``[address]:port``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
