"""The disk that ``tests/boot`` pulls the plug of: what was flushed is there after it, what was not may be lost, in part."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.boot.disk import SECTOR_BYTES, VolatileDisk

SECTORS = 256
WRITE, READ, FLUSH, FUA = 1, 0, 3, 1
SEED = 7


class Guest:
    """What a virtual machine's end of NBD says."""

    def __init__(self, disk: VolatileDisk) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(disk.socket))
        assert self._take(16) == b"NBDMAGICIHAVEOPT"
        self._take(2)
        self._socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 0))
        self.size_bytes, self.flags = struct.unpack(">QH", self._take(10))

    def ask(self, kind: int, offset: int = 0, data: bytes = b"", length: int = 0, flags: int = 0) -> bytes:
        """Raises ``AssertionError`` for an answer that is an error."""
        head = struct.pack(">IHHQQI", 0x25609513, flags, kind, 1, offset, len(data) or length)
        self._socket.sendall(head + data)
        assert struct.unpack(">IIQ", self._take(16)) == (0x67446698, 0, 1)
        return self._take(length)

    def end(self) -> None:
        self._socket.close()

    def _take(self, count: int) -> bytes:
        data = self._socket.recv(count, socket.MSG_WAITALL) if count else b""
        assert len(data) == count
        return data


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[VolatileDisk]:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * SECTOR_BYTES))
    made = VolatileDisk(path, tmp_path / "disk.sock", SEED)
    made.open()
    yield made
    made.close()


def sectors_of(path: Path) -> list[int]:
    """The first byte of each."""
    return list(path.read_bytes()[::SECTOR_BYTES])


def test_what_was_flushed_outlives_the_power_and_of_the_rest_some_sectors_are_lost(disk: VolatileDisk, tmp_path: Path) -> None:
    guest = Guest(disk)
    for sector in range(SECTORS):
        guest.ask(WRITE, sector * SECTOR_BYTES, b"\1" * SECTOR_BYTES)
    guest.ask(FLUSH)
    for sector in range(SECTORS):
        guest.ask(WRITE, sector * SECTOR_BYTES, b"\2" * SECTOR_BYTES)
    guest.ask(WRITE, 5 * SECTOR_BYTES, b"\3" * SECTOR_BYTES, flags=FUA)
    assert guest.ask(READ, 9 * SECTOR_BYTES, length=SECTOR_BYTES)[:1] == b"\2"
    guest.end()
    unflushed, lost = disk.cut()
    after = sectors_of(tmp_path / "disk.img")
    assert unflushed == (SECTORS - 1) * SECTOR_BYTES and after[5] == 3
    assert 0 < after.count(1) == lost // SECTOR_BYTES < SECTORS - 1, "some are lost, some are kept"
    assert after != sorted(after) and after != sorted(after, reverse=True), "in no order"


def test_a_machine_that_shuts_down_loses_nothing(disk: VolatileDisk, tmp_path: Path) -> None:
    guest = Guest(disk)
    guest.ask(WRITE, 0, b"\1" * SECTOR_BYTES * SECTORS)
    guest.end()
    disk.close()
    assert sectors_of(tmp_path / "disk.img") == [1] * SECTORS


def test_reads_see_every_write_whatever_its_place_and_length(disk: VolatileDisk) -> None:
    guest, random, expected = Guest(disk), Random(SEED), bytearray(SECTORS * SECTOR_BYTES)
    for _ in range(300):
        offset = random.randrange(0, len(expected) - 3 * SECTOR_BYTES, 512)
        data = random.randbytes(random.randrange(512, 3 * SECTOR_BYTES, 512))
        guest.ask(WRITE, offset, data)
        expected[offset : offset + len(data)] = data
        if random.random() < 0.1:
            guest.ask(FLUSH)
        start = random.randrange(0, len(expected) - 5 * SECTOR_BYTES, 512)
        assert guest.ask(READ, start, length=5 * SECTOR_BYTES) == expected[start : start + 5 * SECTOR_BYTES]
    guest.end()


def test_it_says_how_large_it_is_and_that_it_must_be_flushed(disk: VolatileDisk) -> None:
    guest = Guest(disk)
    assert (guest.size_bytes, guest.flags) == (SECTORS * SECTOR_BYTES, 1 | 4 | 8)
    guest.end()
