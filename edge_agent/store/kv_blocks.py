"""Sealed KV blocks and preludes: immutable files named by the tokens that they stand for, in RAM and on disk.

Rules:

* A block's name is its place in the chain of ``core.kv``: a hash of the model's fingerprint and of all tokens up to its end.  So
  equal prefixes of any sessions are one file, and what is here already is not written again.
* A file is ``head | token ids | payload | SHA-256 of all before``.  It is used only if that hash is right, its fingerprint is
  this model's, and parent and ids hash to its name.  (SHA-256: 0.21 ms a block of 415 KB on x86-64 with SHA extensions; BLAKE2b
  0.31 ms; CRC-32 0.06 ms, but it says nothing against a file that was put there.)
* A file that fails is removed, and the reason is raised: that suffix is computed again.
* ``put`` writes and renames without fsync: a killed process loses nothing.  ``sync`` makes it durable; until then a block may be
  damaged after a power cut, so nothing that could replace it may be removed before.
* A block lives as long as an owner retains it.  RAM holds copies only, the least recently used leave first.
"""

from __future__ import annotations

import hashlib
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from edge_agent.core.chat import Tier
from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, KvFormat, next_name, packed_ids, root_name, unpacked_ids
from edge_agent.core.values import DIGEST_BYTES
from edge_agent.store.files import PART_PREFIX, Disk, fsync_file, reaching, read_bounded, write_unsynced

MAGIC = b"SlyKVb\x00\x01"
"""The last byte is the version of this layout."""
NO_PARENT = bytes(DIGEST_BYTES)
"""The parent of a prelude."""
_HEAD = struct.Struct(f"<8sII{DIGEST_BYTES}s{DIGEST_BYTES}s")
_FILE_NAME = re.compile(r"[0-9a-f]{64}")


class BlockFiles:
    """The block files in ``folder``, of one KV format, with at most ``ram_bytes`` of payloads in memory.

    Safe to be used from several threads. Opening it lists the folder and reads no file; it raises ``UnavailableError``.
    """

    def __init__(self, folder: Path, kv_format: KvFormat, ram_bytes: int, disk: Disk) -> None:
        self._folder, self._format, self._ram_budget_bytes, self._disk = folder, kv_format, ram_bytes, disk
        self._lock = threading.RLock()
        self._ram: OrderedDict[bytes, bytes] = OrderedDict()
        self._owners: dict[bytes, set[str]] = {}
        self._durable: set[bytes] = set()
        self._checked: set[bytes] = set()
        """Written or read in whole by this process."""
        self._left: dict[bytes, int] = {}
        """Sizes of files that are used no more but could not be removed: the next start does."""
        self.bytes_in_ram = 0
        with reaching(folder):
            disk.make_folder(folder)
            self._sizes = dict(self._found())
        self.bytes_on_disk = sum(self._sizes.values())

    def __contains__(self, name: bytes) -> bool:
        """Is a file of this name here? Its content is not checked."""
        return name in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def put(self, name: bytes, parent: bytes, ids: Sequence[int], payload: bytes, owner: str) -> None:
        """Write a block (64 ids) or a prelude (4 ids, ``NO_PARENT``) for ``owner``; if it is here already, only retain it.

        Raises ``RefusedError`` for a payload of another size and ``UnavailableError`` if it cannot be written.
        """
        data = encoded(self._format, parent, ids, payload)
        if name_of(self._format, parent, ids) != name:
            raise ValueError(f"block {name.hex()} does not stand for these ids")
        self._put(name, data, payload, owner)

    def put_file(self, name: bytes, data: bytes, owner: str) -> None:
        """``put`` of what ``file`` gave on another board. Raises ``RefusedError`` unless it is a sound file of this name."""
        self._put(name, data, payload_of(self._format, name, data), owner)

    def read(self, name: bytes) -> tuple[bytes, Tier]:
        """The payload, and where it lay.

        Raises ``RefusedError`` for a damaged or foreign file, which is gone then, and ``UnavailableError`` for a missing one.
        """
        with self._lock:
            if name in self._ram:
                self._ram.move_to_end(name)
                return self._ram[name], Tier.RAM
        payload = payload_of(self._format, name, self.file(name))
        with self._lock:
            if name in self._sizes:
                self._checked.add(name)
                self._keep_in_ram(name, payload)
        return payload, Tier.DISK

    def file(self, name: bytes) -> bytes:
        """The whole file, checked, as a peer stores it. Raises as ``read`` does."""
        path = self._path(name)
        try:
            data = read_bounded(self._disk, path, max(file_bytes(self._format, n) for n in (SINK_TOKENS, BLOCK_TOKENS)))
            payload_of(self._format, name, data)
        except SlyError:
            self.remove(name)
            raise
        return data

    def in_ram(self, name: bytes) -> bool:
        return name in self._ram

    def size_bytes(self, name: bytes) -> int:
        """On disk; 0 if it is not here."""
        return self._sizes.get(name, 0)

    def retain(self, names: Iterable[bytes], owner: str) -> None:
        """Keep these, whether they are here now or will be, until ``owner`` releases them."""
        with self._lock:
            for name in names:
                self._owners.setdefault(name, set()).add(owner)

    def release(self, names: Iterable[bytes], owner: str) -> None:
        """``owner`` needs these no more; those that nobody needs are removed."""
        with self._lock:
            for name in names:
                owners = self._owners.get(name, set())
                owners.discard(owner)
                if not owners:
                    self._owners.pop(name, None)
                    self.remove(name)

    def owners(self, name: bytes) -> Collection[str]:
        return self._owners.get(name, ())

    def remove(self, name: bytes) -> None:
        """Whoever needs it, it is not here any more; a file that the disk cannot remove now still counts as used bytes."""
        with self._lock:
            self._forget_copy(name)
            self._durable.discard(name)
            self._checked.discard(name)
            if name in self._sizes:
                size_bytes = self._sizes.pop(name)
                try:
                    self._disk.unlink(self._path(name))
                except FileNotFoundError:
                    self.bytes_on_disk -= size_bytes
                except OSError:
                    self._left[name] = size_bytes
                else:
                    self.bytes_on_disk -= size_bytes

    def remove_unowned(self) -> int:
        """For the start, when every owner has retained what it needs; how many were removed."""
        with self._lock:
            unowned = [name for name in self._sizes if name not in self._owners]
            for name in unowned:
                self.remove(name)
            return len(unowned)

    def sync(self, names: Iterable[bytes]) -> None:
        """Make those of them durable that are here. Blocking. Raises ``UnavailableError``."""
        due = [name for name in names if name in self._sizes and name not in self._durable]
        if not due:
            return
        with reaching(self._folder):
            for name in due:
                with suppress(FileNotFoundError):
                    fsync_file(self._disk, self._path(name))
            self._disk.fsync_folder(self._folder)
        with self._lock:
            self._durable.update(name for name in due if name in self._sizes)

    def durable(self, name: bytes) -> bool:
        """Did this process see its content, and make it durable?"""
        return name in self._durable and name in self._checked

    def _put(self, name: bytes, data: bytes, payload: bytes, owner: str) -> None:
        with self._lock:
            if name not in self._sizes or not self._is_sound(name):
                with reaching(self._path(name)):
                    write_unsynced(self._disk, self._path(name), data)
                self._sizes[name] = len(data)
                self.bytes_on_disk += len(data) - self._left.pop(name, 0)
                self._keep_in_ram(name, payload)
            self._checked.add(name)
            self.retain([name], owner)

    def _is_sound(self, name: bytes) -> bool:
        """A file that was left by a power cut must not stand in for the block that somebody has in hand."""
        if name not in self._checked:
            with suppress(SlyError):
                self.file(name)
                return True
        return name in self._checked

    def _keep_in_ram(self, name: bytes, payload: bytes) -> None:
        self._forget_copy(name)
        if len(payload) > self._ram_budget_bytes:
            return
        while self.bytes_in_ram + len(payload) > self._ram_budget_bytes:
            self._forget_copy(next(iter(self._ram)))
        self._ram[name] = bytes(payload)
        self.bytes_in_ram += len(payload)

    def _forget_copy(self, name: bytes) -> None:
        self.bytes_in_ram -= len(self._ram.pop(name, b""))

    def _path(self, name: bytes) -> Path:
        return self._folder / name.hex()

    def _found(self) -> Iterable[tuple[bytes, int]]:
        for text in self._disk.names(self._folder):
            facts = self._disk.facts(self._folder / text)
            if facts is not None and _FILE_NAME.fullmatch(text):
                yield bytes.fromhex(text), facts.size_bytes
            elif facts is not None and text.startswith(PART_PREFIX):
                self._disk.unlink(self._folder / text)


def file_bytes(kv_format: KvFormat, ids: int) -> int:
    """The size of a block's file (``BLOCK_TOKENS`` ids) or a prelude's (``SINK_TOKENS``)."""
    payload_bytes = kv_format.prelude_bytes if ids == SINK_TOKENS else kv_format.block_bytes
    return _HEAD.size + 4 * ids + payload_bytes + DIGEST_BYTES


def name_of(kv_format: KvFormat, parent: bytes, ids: Sequence[int]) -> bytes:
    """The name of the block, or for ``NO_PARENT`` of the prelude, with these ids."""
    return root_name(kv_format.fingerprint, ids) if parent == NO_PARENT else next_name(parent, ids)


def encoded(kv_format: KvFormat, parent: bytes, ids: Sequence[int], payload: bytes) -> bytes:
    """A file's whole content. Raises ``RefusedError`` for a payload of another size than the format's."""
    expected_bytes = kv_format.prelude_bytes if parent == NO_PARENT else kv_format.block_bytes
    if len(payload) != expected_bytes:
        raise RefusedError("KV payload", f"{len(payload)} bytes", f"{expected_bytes} bytes")
    head = _HEAD.pack(MAGIC, len(ids), len(payload), kv_format.fingerprint, parent) + packed_ids(ids)
    digest = hashlib.sha256(head)
    digest.update(payload)
    return b"".join((head, payload, digest.digest()))


def payload_of(kv_format: KvFormat, name: bytes, data: bytes) -> bytes:
    """What ``data``, the file of the block or prelude ``name``, holds. Raises ``RefusedError`` saying what is wrong with it."""
    subject = f"KV block {name.hex()[:16]}"
    if data[: len(MAGIC)] != MAGIC or len(data) < _HEAD.size:
        raise RefusedError(
            subject, f"{len(data)} bytes that begin with {data[:8].hex()}", f"a file that begins with {MAGIC.hex()}"
        )
    _, count, payload_bytes, fingerprint, parent = _HEAD.unpack_from(data)
    if fingerprint != kv_format.fingerprint:
        raise RefusedError(subject, f"fingerprint {fingerprint.hex()[:16]}", f"this model's: {kv_format.fingerprint.hex()[:16]}")
    ids_allowed = SINK_TOKENS if parent == NO_PARENT else BLOCK_TOKENS
    size_bytes = file_bytes(kv_format, ids_allowed)
    if (count, len(data), _HEAD.size + 4 * count + payload_bytes + DIGEST_BYTES) != (ids_allowed, size_bytes, size_bytes):
        raise RefusedError(subject, f"{len(data)} bytes for {count} tokens", f"{size_bytes} bytes for {ids_allowed} tokens")
    view = memoryview(data)
    if hashlib.sha256(view[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise RefusedError(subject, "bytes that do not match their checksum", "what was written")
    ids_end = _HEAD.size + 4 * count
    if name_of(kv_format, parent, unpacked_ids(view[_HEAD.size : ids_end])) != name:
        raise RefusedError(subject, "a block of other tokens", "the tokens that its name stands for")
    return data[ids_end:-DIGEST_BYTES]
