"""The agent's own door: a Unix socket for clients on this board, which needs no broker and no network.

Owns the framing and both ends of it.  Rules: a frame is a length of four bytes (big endian) and one strict CBOR map; calls
of one connection may overlap and are answered by their number; a call of a streaming verb is answered by parts, in order,
and then by the one answer that every call has; a part waits until the client has taken what came before, and a client that
takes nothing for ``STALLED_S`` is given up; a client that goes away cancels what it asked for; the socket's file mode is the
access control (0600: the agent's own user).
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Generator, Mapping
from pathlib import Path

from edge_agent.core.cbor import decode, encode, fields
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError

MAX_FRAME_BYTES = 66 * 2**20
MAX_CALLS_PER_CONNECTION = 64
MAX_CONNECTIONS = 256
MAX_PART_BYTES = 2**20
LENGTH_BYTES = 4
STALLED_S = 60.0

Handler = Callable[[str, object], Awaitable[object]]
"""Answers ``(verb, body)``; raises ``SlyError`` for what the client must be told."""

SendPart = Callable[[object], Awaitable[None]]
"""Sends one part; returns when the client may be sent the next one. A part is at most ``MAX_PART_BYTES`` of CBOR."""
Streamer = Callable[[object, SendPart], Awaitable[object]]
"""Answers ``(body, send)`` of a streaming verb: parts through ``send``, then the answer. Cancelled when the client goes."""

_CALL = {0: ("call", int), 1: ("verb", str), 2: ("body", object)}
_ANSWER = {0: ("call", int), 1: ("error", str), 2: ("body", object)}
_PART = {0: ("call", int), 3: ("part", object)}


class LocalServer:
    """Serves ``handler`` on ``path``, and the verbs of ``streams`` in parts.

    Raises ``UnavailableError`` from ``start`` if another agent holds the socket.
    """

    def __init__(self, path: Path, handler: Handler, streams: Mapping[str, Streamer] | None = None) -> None:
        self._path, self._handler, self._streams = path, handler, dict(streams or {})
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        _clear_stale_socket(self._path)
        old_mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._connected, self._path)
        except OSError as error:
            raise UnavailableError(f"socket {self._path}", str(error), "choose another [state] folder") from error
        finally:
            os.umask(old_mask)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        calls: set[asyncio.Task[None]] = set()
        try:
            if len(self._connections) <= MAX_CONNECTIONS:
                await self._serve(reader, writer, calls)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        except RefusedError as error:
            await _send(writer, {0: 0, 1: str(error), 2: None})
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, calls: set[asyncio.Task[None]]) -> None:
        while True:
            size_bytes = _frame_size(await reader.readexactly(LENGTH_BYTES))
            entry = fields(decode(await reader.readexactly(size_bytes), max_bytes=MAX_FRAME_BYTES), "call", _CALL)
            if len(calls) >= MAX_CALLS_PER_CONNECTION:
                await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            call = asyncio.create_task(self._answer(writer, entry["call"], entry["verb"], entry["body"]))
            calls.add(call)
            call.add_done_callback(calls.discard)
            call.add_done_callback(lambda ended: _report_fault(ended, writer))

    async def _answer(self, writer: asyncio.StreamWriter, number: int, verb: str, body: object) -> None:
        async def send(part: object) -> None:
            await _send(writer, {0: number, 3: part}, MAX_PART_BYTES)

        stream = self._streams.get(verb)
        try:
            answer = await (self._handler(verb, body) if stream is None else stream(body, send))
        except SlyError as error:
            await _send(writer, {0: number, 1: str(error), 2: None})
        else:
            await _send(writer, {0: number, 1: "", 2: answer})


def _report_fault(call: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
    """A call that failed by a bug of ours: said loudly, and its client is not left waiting."""
    if not call.cancelled() and (error := call.exception()) is not None:
        asyncio.get_running_loop().call_exception_handler({"message": "a client's call failed", "exception": error})
        writer.close()


async def _send(writer: asyncio.StreamWriter, frame: dict[int, object], max_bytes: int = MAX_FRAME_BYTES) -> None:
    data = encode(frame)
    if len(data) > max_bytes:
        raise ValueError(f"a frame of {len(data)} bytes; at most {max_bytes}")
    writer.write(len(data).to_bytes(LENGTH_BYTES, "big"))
    writer.write(data)
    try:
        async with asyncio.timeout(STALLED_S):
            await writer.drain()
    except TimeoutError:
        writer.transport.abort()


def _frame_size(header: bytes) -> int:
    size_bytes = int.from_bytes(header, "big")
    if size_bytes > MAX_FRAME_BYTES:
        raise RefusedError("frame", f"{size_bytes} bytes", f"at most {MAX_FRAME_BYTES} bytes")
    return size_bytes


def _clear_stale_socket(path: Path) -> None:
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise UnavailableError(f"socket {path}", "something else lies there", "move it away")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise UnavailableError(f"socket {path}", "another agent answers on it", "stop that one or choose another [state] folder")


class LocalConnection:
    """A client's blocking connection to an agent's socket; one call or stream at a time. Use it as a context manager.

    Raises ``UnavailableError`` when no agent is there or it goes away, ``RefusedError`` for what the agent refuses.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._socket: socket.socket | None = None
        self._calls = 0

    def __enter__(self) -> LocalConnection:
        self.connect()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def connect(self) -> None:
        if self._socket is not None:
            return
        candidate = socket.socket(socket.AF_UNIX)
        try:
            candidate.connect(str(self.path))
        except OSError as error:
            candidate.close()
            reason = error.strerror or str(error)
            raise UnavailableError(f"agent at {self.path}", reason, "start one with: sly agent --config FILE") from error
        self._socket = candidate

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def call(self, verb: str, body: object = None, timeout_s: float | None = None) -> object:
        """Ask and wait for the answer, for ever without ``timeout_s``."""
        number = self._ask(verb, body, timeout_s)
        return _answered(self._next_frame(), number)

    def stream(self, verb: str, body: object = None, timeout_s: float | None = None) -> Generator[object, None, object]:
        """The parts of a streaming verb as they come; the generator's return value is the answer.

        ``timeout_s`` bounds the wait for each part.  Closing the generator early closes the connection, which cancels the call
        in the agent; the next call connects anew.
        """
        number = self._ask(verb, body, timeout_s)
        ended = False
        try:
            while isinstance(frame := self._next_frame(), dict) and 3 in frame:
                part = fields(frame, "part", _PART)
                if part["call"] != number:
                    raise RefusedError("part", f"of call {part['call']}", f"of call {number}")
                yield part["part"]
            ended = True
            return _answered(frame, number)
        finally:
            if not ended:
                self.close()

    def _ask(self, verb: str, body: object, timeout_s: float | None) -> int:
        self.connect()
        assert self._socket is not None
        self._calls += 1
        data = encode({0: self._calls, 1: verb, 2: body})
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(len(data).to_bytes(LENGTH_BYTES, "big") + data)
        except OSError as error:
            self.close()
            raise UnavailableError(f"agent at {self.path}", f"it went away ({error})") from error
        return self._calls

    def _next_frame(self) -> object:
        try:
            data = self._receive(_frame_size(self._receive(LENGTH_BYTES)))
        except OSError as error:
            self.close()
            raise UnavailableError(f"agent at {self.path}", f"it went away ({error})") from error
        return decode(data, max_bytes=MAX_FRAME_BYTES)

    def _receive(self, size_bytes: int) -> bytes:
        assert self._socket is not None
        buffer = bytearray(size_bytes)
        view = memoryview(buffer)
        while view:
            received = self._socket.recv_into(view)
            if not received:
                raise ConnectionResetError("the connection was closed")
            view = view[received:]
        return bytes(buffer)


def _answered(frame: object, number: int) -> object:
    entry = fields(frame, "answer", _ANSWER)
    if entry["error"]:
        raise RefusedError(entry["error"])
    if entry["call"] != number:
        raise RefusedError("answer", f"of call {entry['call']}", f"of call {number}")
    return entry["body"]
