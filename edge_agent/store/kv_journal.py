"""What a session's past is written to as it happens: the log of its token ids, and the rows of its unsealed blocks.

Rules:

* The log is append-only: records ``crc32 | kind | count | position | payload``.  The checksum is seeded with the log's own salt,
  so a record of another file is none.  Reading stops at the first record that is not sound: a torn tail is cut, never misread.
* A record says where its ids begin. If that is before the end, what was there is forgotten from there on (``rewind``); a record
  past the end is not sound.
* A rows file holds one block's rows: a head that names the block's parent, then records ``digest | id | row`` in order.  A row
  is used only if its digest (16 bytes of SHA-256 over salt, parent, position, id and row) is right and its id is the log's.
* ``append`` is a write without fsync.  What a failed write left behind is replaced by a sound file before the next one.
* Ids are held as 4 bytes a token.  A log in more than ``FRAGMENTS`` pieces is rewritten once, when it is opened.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_bytes
from typing import Self, TypeAlias

from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.core.kv import BLOCK_TOKENS, MAX_TOKENS, KvFormat, block_start, packed_ids
from edge_agent.core.values import DIGEST_BYTES
from edge_agent.store.files import PRIVATE_FILE, Disk, Part, fsync_file, read_bounded, write_unsynced

LOG_SUFFIX, ROWS_SUFFIX = ".log", ".rows"
MAGIC = b"SlyKVj\x00\x01"
MAX_LOG_BYTES = 2**31
MAX_RECORD_IDS = 2**14
MAX_HEAD_BYTES = 1024
FRAGMENTS = 4096
"""A log of more records than this, and of more than one in 16 ids, is rewritten when it is opened."""
SALT_BYTES = 16
ROW_DIGEST_BYTES = 16

_RECORD = struct.Struct("<IHHI")
_HEAD, _IDS, _FINGERPRINT = 1, 2, 3
_ROWS_HEAD = struct.Struct(f"<8sII{DIGEST_BYTES}s{DIGEST_BYTES}s{SALT_BYTES}s")
_ROW_PLACE = struct.Struct("<II")
_ROW_ID = struct.Struct("<I")

Ids: TypeAlias = "array[int]"


def no_ids() -> Ids:
    return array("I")


class AppendedFile:
    """A file that grows at its end, and is replaced in whole when its end cannot be trusted. Methods raise ``OSError``."""

    def __init__(self, disk: Disk, path: Path, size_bytes: int) -> None:
        self.disk, self.path, self.size_bytes = disk, path, size_bytes
        self._fd: int | None = None
        self._unsynced = self._unnamed = True

    def append(self, data: bytes) -> None:
        """Write at the end. When it raised, the end must be replaced."""
        if self._fd is None:
            self._fd = self.disk.open_append(self.path)
        self._unsynced = True
        self.disk.write(self._fd, data)
        self.size_bytes += len(data)

    def replace(self, data: bytes) -> None:
        """The whole content anew: durably if there was one, since what was durable must not give way to what is not."""
        self.close()
        if self.size_bytes:
            with Part(self.disk, self.path.parent) as part:
                part.write(data)
                part.publish(self.path, PRIVATE_FILE)
        else:
            write_unsynced(self.disk, self.path, data)
            self._unsynced = self._unnamed = True
        self.size_bytes = len(data)

    def sync(self) -> None:
        """Make durable what was appended before this call. Blocking; safe beside ``append`` in another thread."""
        unsynced, self._unsynced = self._unsynced, False
        unnamed, self._unnamed = self._unnamed, False
        try:
            if unsynced:
                fsync_file(self.disk, self.path)
            if unnamed:
                self.disk.fsync_folder(self.path.parent)
        except FileNotFoundError:
            if self.size_bytes:
                raise
        except OSError:
            self._unsynced, self._unnamed = True, True
            raise

    def close(self) -> None:
        """Give the descriptor back; the next ``append`` opens the file again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                self.disk.close(fd)

    def remove(self) -> None:
        self.close()
        with suppress(FileNotFoundError):
            self.disk.unlink(self.path)
        self.size_bytes, self._unsynced, self._unnamed = 0, False, False


class TokenLog:
    """A session's name, the fingerprint that its KV was made with, and all its token ids."""

    def __init__(self, file: AppendedFile, name: str, fingerprint: bytes, salt: bytes, ids: Ids) -> None:
        self._file, self.name, self.fingerprint, self._salt, self.ids = file, name, fingerprint, salt, ids
        self._seed = zlib.crc32(salt)
        self.sound = True
        self.cut_bytes = 0
        """What was not sound at the end of the file when it was opened."""

    @classmethod
    def create(cls, disk: Disk, path: Path, name: str, fingerprint: bytes, ids: Sequence[int] = ()) -> Self:
        """Raises ``OSError``."""
        log = cls(AppendedFile(disk, path, 0), name, fingerprint, token_bytes(SALT_BYTES), array("I", ids))
        log._rewrite()
        return log

    @classmethod
    def open(cls, disk: Disk, path: Path) -> Self:
        """Raises ``RefusedError`` if not even the head is sound, ``UnavailableError`` if it cannot be read."""
        data = read_bounded(disk, path, MAX_LOG_BYTES)
        name, fingerprint, salt, at = _log_head(path, data)
        log = cls(AppendedFile(disk, path, len(data)), name, fingerprint, salt, no_ids())
        records, end = log._read(data, at)
        log.cut_bytes = len(data) - end
        log.sound = not log.cut_bytes and not (records > FRAGMENTS and records > len(log.ids) // 16)
        return log

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    @property
    def file(self) -> AppendedFile:
        return self._file

    def append(self, position: int, ids: Sequence[int]) -> None:
        """``ids`` from ``position`` on; what the log held from there on is forgotten. Raises ``OSError``.

        Raises ``ValueError`` for a position past the end.
        """
        if not 0 <= position <= len(self.ids) or position + len(ids) > MAX_TOKENS:
            raise ValueError(f"position {position} of a session of {len(self.ids)} tokens")
        packed = packed_ids(ids)
        data = b"".join(self._ids_records(position, packed))
        self.mend()
        self.sound = False
        self._file.append(data)
        self.sound = True
        del self.ids[position:]
        self.ids.frombytes(packed)

    def stamp(self, fingerprint: bytes) -> None:
        """From now on the KV is made with this fingerprint. Raises ``OSError``."""
        self.mend()
        self.sound = False
        self._file.append(self._record(_FINGERPRINT, 0, len(fingerprint), fingerprint))
        self.sound, self.fingerprint = True, fingerprint

    def mend(self) -> None:
        """Replace a file whose end is not sound by one that is. Raises ``OSError``."""
        if not self.sound:
            self._rewrite()

    def distrust(self) -> None:
        """An fsync failed: what the file holds is unknown, and it is written anew before the next append."""
        self.sound = False

    def _rewrite(self) -> None:
        head = MAGIC + self._salt + self.fingerprint + self.name.encode()
        records = [_record(_HEAD, 0, len(head), head, 0)]
        records += self._ids_records(0, self.ids.tobytes()) if self.ids else ()
        self._file.replace(b"".join(records))
        self.sound = True

    def _ids_records(self, position: int, packed: bytes) -> Iterator[bytes]:
        for start in range(0, max(len(packed), 1), 4 * MAX_RECORD_IDS):
            part = packed[start : start + 4 * MAX_RECORD_IDS]
            yield self._record(_IDS, position + start // 4, len(part) // 4, part)

    def _record(self, kind: int, position: int, count: int, payload: bytes) -> bytes:
        return _record(kind, position, count, payload, self._seed)

    def _read(self, data: bytes, at: int) -> tuple[int, int]:
        """Take all sound records from ``at`` on; how many, and where they end."""
        records, view, ids = 0, memoryview(data), self.ids
        while at + _RECORD.size <= len(data):
            crc, kind, count, position = _RECORD.unpack_from(data, at)
            start = at + _RECORD.size
            end = start + (4 * count if kind == _IDS else count)
            if end > len(data) or zlib.crc32(view[at + 4 : end], self._seed) != crc:
                break
            if kind == _IDS and position <= len(ids):
                if position < len(ids):
                    del ids[position:]
                ids.frombytes(view[start:end])
            elif kind == _FINGERPRINT and count == DIGEST_BYTES:
                self.fingerprint = bytes(view[start:end])
            else:
                break
            records, at = records + 1, end
        return records, at


def _record(kind: int, position: int, count: int, payload: bytes, seed: int) -> bytes:
    data = _RECORD.pack(0, kind, count, position) + payload
    return zlib.crc32(data[4:], seed).to_bytes(4, "little") + data[4:]


def _log_head(path: Path, data: bytes) -> tuple[str, bytes, bytes, int]:
    """Name, fingerprint, salt, and where the records begin."""
    least_bytes = len(MAGIC) + SALT_BYTES + DIGEST_BYTES
    if len(data) >= _RECORD.size + least_bytes:
        crc, kind, count, _ = _RECORD.unpack_from(data)
        head = data[_RECORD.size : _RECORD.size + count]
        sound = zlib.crc32(data[4 : _RECORD.size + count]) == crc
        if sound and kind == _HEAD and least_bytes <= count <= MAX_HEAD_BYTES and head.startswith(MAGIC):
            salt, rest = head[len(MAGIC) : len(MAGIC) + SALT_BYTES], head[len(MAGIC) + SALT_BYTES :]
            return rest[DIGEST_BYTES:].decode(), rest[:DIGEST_BYTES], salt, _RECORD.size + count
    raise RefusedError(f"session log {path.name}", "a file without a sound head", "what was written", "its session is lost")


class BlockRows:
    """The rows of one unsealed block, as the hot ring holds them.

    Opening reads the head only; ``check`` must be called before anything else is asked of a file that was there.
    """

    def __init__(self, file: AppendedFile, kv_format: KvFormat, block: int, parent: bytes, salt: bytes, count: int) -> None:
        self.file, self._format, self.block, self.parent, self._salt = file, kv_format, block, parent, salt
        self.count = count
        """How many rows from the block's start are here; until ``check`` as the file's size says."""
        self._digests: list[bytes] = []
        self.sound = self.checked = False

    @classmethod
    def create(cls, disk: Disk, path: Path, kv_format: KvFormat, block: int, parent: bytes) -> Self:
        """Nothing is written before the first row."""
        rows = cls(AppendedFile(disk, path, 0), kv_format, block, parent, token_bytes(SALT_BYTES), 0)
        rows.checked = True
        return rows

    @classmethod
    def open(cls, disk: Disk, path: Path, kv_format: KvFormat) -> Self:
        """Raises ``RefusedError`` for a head that is not sound or of another model, ``OSError`` if it cannot be read."""
        fd = disk.open_read(path)
        try:
            head = disk.read(fd, _ROWS_HEAD.size)
        finally:
            disk.close(fd)
        facts = disk.facts(path)
        if len(head) == _ROWS_HEAD.size and facts is not None:
            magic, block, row_bytes, fingerprint, parent, salt = _ROWS_HEAD.unpack(head)
            if (magic, row_bytes, fingerprint) == (MAGIC, kv_format.row_bytes, kv_format.fingerprint):
                count = min((facts.size_bytes - len(head)) // _record_bytes(kv_format), BLOCK_TOKENS)
                return cls(AppendedFile(disk, path, facts.size_bytes), kv_format, block, parent, salt, count)
        raise RefusedError(f"KV rows {path.name}", "a file without a sound head", "rows of this model")

    def check(self, ids: Ids) -> int:
        """Read the rows and keep those that are sound and of the tokens ``ids`` of their session; how many bytes are not.

        Raises ``UnavailableError`` or ``RefusedError`` if the file cannot be read; then no row is here.
        """
        if self.checked:
            return 0
        self.count, self.checked = 0, True
        data = self._read()
        mine = ids[block_start(self.block) : block_start(self.block + 1)]
        records = self._records(data)
        for index, (digest, row_id, row) in zip(range(len(mine)), records, strict=False):
            if row_id != mine[index] or self._digest(index, row_id, row) != digest:
                break
            self._digests.append(digest)
        self.count = len(self._digests)
        unsound_bytes = len(data) - _ROWS_HEAD.size - self.count * _record_bytes(self._format)
        self.sound = not unsound_bytes
        return unsound_bytes

    def append(self, index: int, ids: Sequence[int], rows: bytes | memoryview) -> None:
        """Rows from the ``index``-th of the block on; ``ids`` are their tokens. Raises ``OSError``.

        Those that are here already are not written again; from the first that differs on, the old ones give way.
        Raises ``ValueError`` for a gap.
        """
        if not 0 <= index <= self.count or index + len(ids) > BLOCK_TOKENS:
            raise ValueError(f"rows {index} to {index + len(ids)} after {self.count} of block {self.block}")
        size = self._format.row_bytes
        parts = [rows[size * at : size * (at + 1)] for at in range(len(ids))]
        digests = [self._digest(index + at, row_id, parts[at]) for at, row_id in enumerate(ids)]
        known = self._digests[index : index + len(ids)]
        same = next((at for at, digest in enumerate(known) if digest != digests[at]), len(known))
        if same < len(ids):
            records = [b"".join((digests[at], _ROW_ID.pack(ids[at]), parts[at])) for at in range(same, len(ids))]
            self._write(index + same, b"".join(records))
            self._digests[index + same :] = digests[same:]
            self.count = len(self._digests)

    def read(self, count: int) -> bytes:
        """The first ``count`` rows, packed and checked.

        Raises ``RefusedError`` if they are not what was written (then only the sound ones are here), ``UnavailableError``.
        """
        found, rows = 0, []
        try:
            data = self._read()
        except SlyError:
            self.cut(0)
            raise
        for digest, row_id, row in self._records(data):
            if found == count or digest != self._digests[found] or self._digest(found, row_id, row) != digest:
                break
            rows.append(row)
            found += 1
        if found < count:
            self.cut(found)
            raise RefusedError(f"KV rows {self.file.path.name}", f"{found} sound rows", f"{count} rows as they were written")
        return b"".join(rows)

    def cut(self, count: int) -> None:
        """Forget all rows but the first ``count``; the file is checked before."""
        if count < self.count:
            del self._digests[count:]
            self.count, self.sound = count, False

    def distrust(self) -> None:
        """A write or an fsync failed: the file is written anew before the next row."""
        self.sound = False

    def _write(self, index: int, records: bytes) -> None:
        if self.sound and index == self.count:
            self.sound = False
            self.file.append(records)
        else:
            kept = self._read()[_ROWS_HEAD.size : _ROWS_HEAD.size + index * _record_bytes(self._format)] if index else b""
            self.file.replace(self._head() + kept + records)
        self.sound = True

    def _head(self) -> bytes:
        fingerprint = self._format.fingerprint
        return _ROWS_HEAD.pack(MAGIC, self.block, self._format.row_bytes, fingerprint, self.parent, self._salt)

    def _digest(self, index: int, row_id: int, row: bytes | memoryview) -> bytes:
        digest = hashlib.sha256(self._salt + self.parent + _ROW_PLACE.pack(block_start(self.block) + index, row_id))
        digest.update(row)
        return digest.digest()[:ROW_DIGEST_BYTES]

    def _read(self) -> bytes:
        return read_bounded(self.file.disk, self.file.path, _ROWS_HEAD.size + (BLOCK_TOKENS + 1) * _record_bytes(self._format))

    def _records(self, data: bytes) -> Iterator[tuple[bytes, int, memoryview]]:
        view, size = memoryview(data), _record_bytes(self._format)
        for at in range(_ROWS_HEAD.size, len(data) - size + 1, size):
            id_at = at + ROW_DIGEST_BYTES
            yield data[at:id_at], _ROW_ID.unpack_from(data, id_at)[0], view[id_at + _ROW_ID.size : at + size]


def added_bytes(ids: int, rows: int, rows_bytes: int) -> int:
    """The most that records of so many ids and rows take on disk, heads of files included."""
    records = ids // MAX_RECORD_IDS + 2
    heads = (rows // BLOCK_TOKENS + 2) * _ROWS_HEAD.size if rows else 0
    return 4 * ids + records * _RECORD.size + rows_bytes + rows * (ROW_DIGEST_BYTES + _ROW_ID.size) + heads


def _record_bytes(kv_format: KvFormat) -> int:
    return ROW_DIGEST_BYTES + _ROW_ID.size + kv_format.row_bytes
