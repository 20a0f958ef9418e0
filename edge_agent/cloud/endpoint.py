"""Where the cloud is and who this board is to it: ``[cloud]`` as values that may be used.

Rules: nothing is connected to here; the token comes from a file that nobody else can read, goes over TLS or over loopback only,
and is in no text of this program; the model's name in the fleet begins with ``cloud.``, so that nobody takes it for one of ours.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from edge_agent.core.chat import CHAT
from edge_agent.core.config import CloudSection
from edge_agent.core.errors import ConfigError, UnavailableError, shown
from edge_agent.core.values import ModelOffer
from edge_agent.gateway.access import is_loopback

PREFIX = "cloud."
MAX_NAME_CHARS = 64
MAX_MODEL_CHARS = 256
MAX_TOKEN_BYTES = 4096
PORTS = {"http": 80, "https": 443}


class EndpointError(UnavailableError):
    """The endpoint did not serve a turn. ``of_turn``: the fault is that turn's, others may fare better; else nobody is served
    now, and perhaps after ``retry_s``, if it said so."""

    def __init__(self, reason: str, remedy: str = "", retry_s: int = 0, *, of_turn: bool = False) -> None:
        super().__init__("cloud", reason, remedy)
        self.retry_s, self.of_turn = retry_s, of_turn


@dataclass(frozen=True, slots=True)
class Endpoint:
    """``path`` of the base URL, without a slash at its end. ``model``: as the endpoint calls it."""

    host: str
    port: int
    tls: bool
    path: str
    model: str
    token: str = field(default="", repr=False)

    @property
    def authority(self) -> str:
        """What stands in ``Host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"


def endpoint_of(section: CloudSection) -> Endpoint:
    """The endpoint that ``[cloud]`` names, its token read. Raises ``ConfigError`` for what cannot or must not be used."""
    if importlib.util.find_spec("h11") is None:
        remedy = "pip install 'slyos-edge[cloud]', or set [cloud] on = false"
        raise ConfigError("[cloud] on", "true, but h11 is not installed", "", remedy)
    if not (0 < len(section.model) <= MAX_MODEL_CHARS and section.model.isprintable()):
        raise ConfigError("[cloud] model", shown(section.model), f"the model to ask for, 1 to {MAX_MODEL_CHARS} characters")
    host, port, tls, path = _parts(section.url)
    token = _token(Path(section.token_file).expanduser()) if section.token_file else ""
    if token and not tls and not is_loopback(host):
        raise ConfigError(
            "[cloud] url", f"{section.url}, with a token", "https, or a loopback address", "a token is never sent in clear"
        )
    return Endpoint(host, port, tls, path, section.model, token)


def offer_of(section: CloudSection) -> ModelOffer:
    """The cloud's model as an option of this board; its energy is none of this board's."""
    digest = sha256(f"{section.url} {section.model}".encode()).digest()
    return ModelOffer(
        name_of(section.model), CHAT, digest, section.quality_permille, section.busy_us, 0, section.parallel,
        cloud=True, price_us=section.price_us,
    )  # fmt: skip


def name_of(model: str) -> str:
    """``cloud.`` and the model's name, made fit for a name of the fleet."""
    return (PREFIX + re.sub(r"[^a-z0-9._-]", "-", model.lower()))[:MAX_NAME_CHARS]


def _parts(url: str) -> tuple[str, int, bool, str]:
    allowed = "a base URL such as https://example.com/v1, without user, query and fragment"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError("[cloud] url", str(error), allowed) from error
    host = parts.hostname or ""
    if parts.scheme not in PORTS or not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError("[cloud] url", "a user in it" if "@" in parts.netloc else shown(url), allowed)
    if not (url.isascii() and url.isprintable()) or port == 0:
        raise ConfigError("[cloud] url", shown(url), allowed, "write other letters in their ASCII form")
    return host, port or PORTS[parts.scheme], parts.scheme == "https", parts.path.rstrip("/")


def _token(path: Path) -> str:
    where = f"[cloud] token_file {path}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(where, error.strerror or str(error), "a file that this user can read") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(where, stat.filemode(mode), "a regular file")
        if mode & 0o077:
            allowed = "0600: nobody but its owner can read it"
            raise ConfigError(where, f"mode {stat.S_IMODE(mode):04o}", allowed, f"chmod 600 {path}; and change the token")
        data = os.read(descriptor, MAX_TOKEN_BYTES + 1).strip()
    finally:
        os.close(descriptor)
    if not data or len(data) > MAX_TOKEN_BYTES or not all(0x21 <= byte <= 0x7E for byte in data):
        raise ConfigError(where, f"{len(data)} bytes", f"1 to {MAX_TOKEN_BYTES} printable ASCII characters without spaces")
    return data.decode()
