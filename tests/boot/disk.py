"""A disk with a volatile cache: what it was not told to keep is lost, some of it, when the power goes.

Owns ``VolatileDisk``: a file, served to a virtual machine by the NBD protocol
(https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, fixed newstyle, simple replies).  Why: a write that left the
guest is in the host's page cache, which outlives the end of qemu; a real disk loses what is in its own.  Rules:

* A write is kept in memory until the guest flushes (NBD_CMD_FLUSH) or the write says so itself (NBD_CMD_FLAG_FUA).
* ``cut`` writes a random part of the sectors that were not flushed, in no order, and forgets
  the rest: torn writes, reordered writes.
* One client at a time; the socket lies in a folder that is the caller's.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from random import Random

SECTOR_BYTES = 4096
"""What is kept or lost as a whole."""
MAX_REQUEST_BYTES = 32 * 2**20
MAX_OPTION_BYTES = 4096
CLOSE_LIMIT_S = 30.0
_MAGIC, _OPTION_MAGIC, _OPTION_REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _REPLY_INFO, _UNSUPPORTED = 1, 3, 2**31 + 1
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_FUA = 1
_HAS_FLAGS, _SEND_FLUSH, _SEND_FUA = 1, 4, 8
_FLAGS = _HAS_FLAGS | _SEND_FLUSH | _SEND_FUA
_INVALID = 22


class VolatileDisk:
    """The file ``path``, served at ``socket`` from ``open`` to ``cut`` or ``close``; ``seed`` decides what a cut keeps."""

    def __init__(self, path: Path, socket_path: Path, seed: int) -> None:
        self.socket = socket_path
        self._path, self._random = path, Random(seed)
        self._cache: dict[int, bytes] = {}
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self.flushes = 0

    def open(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._file = os.open(self._path, os.O_RDWR)
        self._size_bytes = os.fstat(self._file).st_size
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, args=(self._listener,), daemon=True)
        self._thread.start()

    def cut(self) -> tuple[int, int]:
        """After the client's end: keep some of what was not flushed, lose the rest.

        Returns how many bytes were not flushed, and how many of them are lost.
        """
        self._stop()
        sectors = list(self._cache)
        self._random.shuffle(sectors)
        for sector in sectors[: self._random.randrange(len(sectors) + 1)]:
            os.pwrite(self._file, self._cache.pop(sector), sector * SECTOR_BYTES)
        lost = len(self._cache)
        self._cache.clear()
        os.close(self._file)
        return len(sectors) * SECTOR_BYTES, lost * SECTOR_BYTES

    def close(self) -> None:
        """As a machine that was shut down leaves it: everything is kept."""
        if self._listener is None:
            return
        self._stop()
        self._flush()
        os.close(self._file)

    def _stop(self) -> None:
        assert self._listener is not None and self._thread is not None
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(CLOSE_LIMIT_S)
        self._listener = None

    # The protocol.

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError, EOFError):
            client, _ = listener.accept()
            with client:
                if self._shake_hands(client):
                    self._answer(client)

    def _shake_hands(self, client: socket.socket) -> bool:
        client.sendall(struct.pack(">QQH", _MAGIC, _OPTION_MAGIC, 3))
        (answer,) = struct.unpack(">I", _exactly(client, 4))
        while True:
            magic, option, length = struct.unpack(">QII", _exactly(client, 16))
            if magic != _OPTION_MAGIC or length > MAX_OPTION_BYTES:
                return False
            _exactly(client, length)
            if option == _EXPORT_NAME:
                client.sendall(struct.pack(">QH", self._size_bytes, _FLAGS) + (b"" if answer & 2 else bytes(124)))
                return True
            if option in (_INFO, _GO):
                about = struct.pack(">HQH", 0, self._size_bytes, _FLAGS)
                client.sendall(_option_reply(option, _REPLY_INFO, about) + _option_reply(option, _ACK))
                if option == _GO:
                    return True
            elif option == _ABORT:
                client.sendall(_option_reply(option, _ACK))
                return False
            else:
                client.sendall(_option_reply(option, _UNSUPPORTED))

    def _answer(self, client: socket.socket) -> None:
        while True:
            magic, flags, kind, handle, offset, length = struct.unpack(">IHHQQI", _exactly(client, 28))
            if magic != _REQUEST_MAGIC or kind == _DISCONNECT or length > MAX_REQUEST_BYTES:
                return
            data = _exactly(client, length) if kind == _WRITE else b""
            error, answer = 0, b""
            if kind == _READ:
                answer = self._read(offset, length)
            elif kind == _WRITE:
                self._write(offset, data, durable=bool(flags & _FUA))
            elif kind == _FLUSH:
                self._flush()
            else:
                error = _INVALID
            client.sendall(struct.pack(">IIQ", _REPLY_MAGIC, error, handle) + answer)

    # The cache.

    def _read(self, offset: int, length: int) -> bytes:
        first, last = offset // SECTOR_BYTES, (offset + length - 1) // SECTOR_BYTES
        data = bytearray(os.pread(self._file, length, offset))
        for sector in range(first, last + 1):
            if sector in self._cache:
                at = sector * SECTOR_BYTES - offset
                start, end = max(at, 0), min(at + SECTOR_BYTES, length)
                data[start:end] = self._cache[sector][start - at : end - at]
        return bytes(data)

    def _write(self, offset: int, data: bytes, *, durable: bool) -> None:
        if durable:
            self._keep(self._touched(offset, data))
            os.fdatasync(self._file)
        else:
            self._cache.update(self._touched(offset, data))

    def _touched(self, offset: int, data: bytes) -> dict[int, bytes]:
        """The sectors that hold ``data``, whole, with what is in them besides."""
        first, last = offset // SECTOR_BYTES, (offset + len(data) - 1) // SECTOR_BYTES
        begin = first * SECTOR_BYTES
        if offset != begin or len(data) % SECTOR_BYTES:
            whole = bytearray(self._read(begin, (last + 1 - first) * SECTOR_BYTES))
            whole[offset - begin : offset - begin + len(data)] = data
            data = bytes(whole)
        return {first + at: data[at * SECTOR_BYTES : (at + 1) * SECTOR_BYTES] for at in range(last + 1 - first)}

    def _keep(self, sectors: dict[int, bytes]) -> None:
        for sector, data in sectors.items():
            self._cache.pop(sector, None)
            os.pwrite(self._file, data, sector * SECTOR_BYTES)

    def _flush(self) -> None:
        self.flushes += 1
        self._keep(dict(self._cache))
        os.fdatasync(self._file)


def _option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data


def _exactly(client: socket.socket, length: int) -> bytes:
    """Raises ``EOFError`` when the client is gone."""
    parts, left = [], length
    while left:
        data = client.recv(min(left, 2**20))
        if not data:
            raise EOFError
        parts.append(data)
        left -= len(data)
    return b"".join(parts)
