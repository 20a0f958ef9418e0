"""uvicorn, bounded: no signals of its own, no endless headers, no endless connections, no lines on the terminal.

Rules: h11, which is Python, on every board alike; a connection that has not sent a whole head within ``HEAD_S``, or the rest
of a body that was answered already, is closed, so is one that takes nothing of its answer for ``STALLED_S``, and the one over
``MAX_CONNECTIONS`` at once; a stop leaves no connection behind.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0
STALLED_S = 60.0
KEEP_ALIVE_S = 30
STOP_S = 2
MAX_CONNECTIONS = 512
MAX_HEAD_BYTES = 32 * 2**10


class _Limit:
    """Aborts a connection unless it is lifted in time; setting it again does not move it."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._timer: asyncio.TimerHandle | None = None

    def set(self, transport: asyncio.Transport) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limit_s, transport.abort)

    def lift(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 of one connection, with time limits on what is waited for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head, self._stall = _Limit(HEAD_S), _Limit(STALLED_S)
        self._head.set(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE:
            self._head.set(self.transport)
        else:
            self._head.lift()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.set(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.lift()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.lift()
        self._stall.lift()
        super().connection_lost(exc)


class BoundedServer(uvicorn.Server):
    """A server inside somebody else's loop: ``start`` returns when it listens, ``stop`` when nothing of it is left."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=STOP_S,
            )
        )
        self._listener = listener
        self._listening = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """The agent has the signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening.set()

    async def start(self) -> None:
        self._serving = asyncio.create_task(self.serve(sockets=[self._listener]), name="gateway")
        listening = asyncio.create_task(self._listening.wait())
        await asyncio.wait((self._serving, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._serving.done():
            self._serving.result()

    async def stop(self) -> None:
        assert self._serving is not None
        self.should_exit = True
        await self._serving
        for connection in list(self.server_state.connections):
            connection.transport.abort()
