"""The agent's own door, a socket: in the state folder or, while that takes none, as near as can be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge_agent.core.errors import UnavailableError
from edge_agent.gateway.local import LocalServer
from edge_agent.shell.state_disk import folder_for_socket, is_of_the_disk

SOCKET_NAME = "agent.sock"


class Door:
    """``serving`` makes the server of a path; ``open``, then ``close``, also of one that never opened."""

    def __init__(self, folder: Path, serving: Callable[[Path], LocalServer], say: Callable[[str], None]) -> None:
        self._folder, self._serving, self._say = folder, serving, say
        self._elsewhere: Path | None = None
        self._server: LocalServer | None = None

    async def open(self, disk_fails: bool) -> Path:
        """Where the socket is. Raises ``OSError`` or ``UnavailableError``; where the disk fails only if it can be nowhere."""
        path = self._folder / SOCKET_NAME
        try:
            await self._listen_on(path)
        except (OSError, UnavailableError) as error:
            if not disk_fails or not is_of_the_disk(error):
                raise
            self._elsewhere = folder_for_socket(self._folder)
            path = self._elsewhere / SOCKET_NAME
            self._say(f"the socket is {path} meanwhile: {error}")
            await self._listen_on(path)
        return path

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()
        if self._elsewhere is not None:
            with suppress(OSError):
                self._elsewhere.rmdir()

    async def _listen_on(self, path: Path) -> None:
        server = self._serving(path)
        await server.start()
        self._server = server
