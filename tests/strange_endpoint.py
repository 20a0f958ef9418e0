"""An endpoint in the cloud that answers what a test tells it to, byte for byte, over a real socket; and words of its protocol."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

Play = Callable[["Asked"], Awaitable[None]]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Asked:
    """One POST: what was asked, and the way to answer it."""

    def __init__(self, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.head, self.body, self._reader, self._writer = head.decode(), body, reader, writer

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()

    async def gone(self) -> None:
        """Wait until the client has ended the connection."""
        with suppress(ConnectionError):
            while await self._reader.read(1024):
                pass


class StrangeEndpoint:
    """``play`` answers each POST; a GET is answered with ``get_status``. ``asked``: the POSTs; ``probes``: how many GETs."""

    def __init__(self) -> None:
        self.play: Play = fine()
        self.get_status = 200
        self.asked: list[Asked] = []
        self.probes = 0
        self.port = 0
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def close(self) -> None:
        """End what is being answered, also what was not begun."""
        serving = dict(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        for writer in serving.values():
            await _closed(writer)

    def begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving[task] = writer
        task.add_done_callback(self._serving.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                self.probes += 1
                writer.write(f"HTTP/1.1 {self.get_status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                await writer.drain()
                return
            length = next(int(line[15:]) for line in head.decode().split("\r\n") if line.lower().startswith("content-length:"))
            asked = Asked(head, await reader.readexactly(length), reader, writer)
            self.asked.append(asked)
            await self.play(asked)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            await _closed(writer)


@asynccontextmanager
async def strange_endpoint(context: ssl.SSLContext | None = None) -> AsyncIterator[StrangeEndpoint]:
    endpoint = StrangeEndpoint()
    server = await asyncio.start_server(endpoint.begin, "127.0.0.1", 0, ssl=context)
    endpoint.port = server.sockets[0].getsockname()[1]
    try:
        yield endpoint
    finally:
        server.close()
        await endpoint.close()


async def _closed(writer: asyncio.StreamWriter) -> None:
    """What was said is sent, to a client that listens."""
    with suppress(ConnectionError, TimeoutError, ssl.SSLError):
        async with asyncio.timeout(1):
            await writer.drain()
            writer.close()
            await writer.wait_closed()
    writer.transport.abort()
    await asyncio.sleep(0)


def event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def word(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


END = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = event(b"[DONE]")


def saying(*pieces: bytes) -> Play:
    """Say these and end."""

    async def play(asked: Asked) -> None:
        await asked.say(*pieces)

    return play


def holding(*pieces: bytes) -> Play:
    """Say these, then nothing more, until the client ends it."""

    async def play(asked: Asked) -> None:
        await asked.say(*pieces)
        await asked.gone()

    return play


def fine(*words: str) -> Play:
    return saying(STREAM, *map(word, words or ("fine",)), END, DONE)


def status(code: int, body: bytes = b"", *headers: str) -> Play:
    lines = [f"HTTP/1.1 {code} X", f"Content-Length: {len(body)}", *headers]
    return saying("\r\n".join([*lines, "", ""]).encode() + body)
