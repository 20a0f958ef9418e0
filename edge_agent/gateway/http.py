"""The HTTP door in the agent's own loop: ``HttpGateway``, started and stopped like every other part of the agent.

Owns the listening socket and the server's life.  Rules: starlette and uvicorn are imported only when the door is opened; the
process's signals stay with the agent; beyond loopback a token is a must; stopping takes nothing new, waits for the turns in
work as long as it is told to, and then ends them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from edge_agent.core.config import GatewaySection
from edge_agent.core.errors import ConfigError, UnavailableError
from edge_agent.gateway.access import Access
from edge_agent.gateway.talker import Talker

if TYPE_CHECKING:
    from edge_agent.gateway.app import Door
    from edge_agent.gateway.server import BoundedServer

DRAIN_S = 10.0
BACKLOG = 128


class HttpGateway:
    """Serves ``talker`` on HTTP as ``section`` says. ``port`` is the one that is listened on.

    Raises ``ConfigError`` for an address beyond loopback without a token.
    """

    def __init__(self, section: GatewaySection, talker: Talker, say: Callable[[str], None]) -> None:
        self._access = Access(section)
        self._section, self._talker, self._say = section, talker, say
        self._server: BoundedServer | None = None
        self._door: Door | None = None
        self.port = section.port

    async def start(self) -> None:
        """Listen and serve. Raises ``ConfigError`` without the packages, ``UnavailableError`` for an address it cannot have."""
        try:
            from edge_agent.gateway.app import Door
            from edge_agent.gateway.server import BoundedServer
        except ModuleNotFoundError as error:
            remedy = "pip install 'slyos-edge[gateway]', or set [gateway] on = false"
            raise ConfigError("[gateway] on", f"true, but {error.name} is not installed", "", remedy) from error
        listener = _listen(self._section.host, self._section.port)
        self.port = listener.getsockname()[1]
        self._door = Door(self._section, self._access, self._talker, self._say)
        self._server = BoundedServer(self._door.app, listener)
        await self._server.start()

    async def close(self, drain_s: float = DRAIN_S) -> None:
        """Refuse what is new, let the turns in work end for ``drain_s``, end them. Harmless when it never started."""
        if self._server is None or self._door is None:
            return
        self._door.stopping.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._door.empty.wait()
        self._door.ending.set()
        await self._door.empty.wait()
        await self._server.stop()
        self._server = None


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UnavailableError(f"gateway on {host}:{port}", reason, "choose another [gateway] host or port") from error
