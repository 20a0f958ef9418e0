"""The model cache: files named by the SHA-256 of their content.

Rules:

* A name that can be seen is whole: the bytes are hashed while they are written under a temporary name, and renamed only
  when the digest is the one that was announced.  Blobs have mode 0444 and never change.
* What is used is what was checked: ``open_verified`` hashes through the descriptor that it returns.  A blob that rotted is
  set aside, never served.
* The folder never holds more than its budget: before bytes are written, room is made for them, first of what was set
  aside, then of the least recently used blob (ties: smaller name).  A pinned blob is never removed.  What is fetched in
  another folder, to be adopted, counts from the moment at which room was reserved for it.
* The modification time of a blob is no time but the number of its last use, in seconds since 1970: an order that survives
  a restart, needs no clock and is the same on every file system.
* Pins live in memory: whoever needs a blob over a restart pins it again before anything is added.
* One process owns the folder.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.files import READ_CHUNK_BYTES, Disk, Part, reaching, sweep_parts

DIGEST_BYTES = 32
MAX_BLOBS = 4096
"""How many blobs a cache holds, whatever its budget."""
BLOB_MODE = 0o444
ASIDE_PREFIX = ".bad-"

_BLOB_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file that counts against the budget; ``use`` orders eviction (0 for what was set aside)."""

    size_bytes: int
    use: int


class BlobStore:
    """A content-addressed cache in ``folder`` that holds at most ``budget_bytes``.

    Opening it makes the folder, sweeps what a crash left, and makes durable what a killed process had renamed but not yet
    synced. Raises ``UnavailableError`` when that cannot be done.
    """

    def __init__(self, folder: Path, budget_bytes: int, disk: Disk | None = None) -> None:
        if budget_bytes < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes")
        self._folder, self._budget_bytes, self._disk = folder, budget_bytes, disk or Disk()
        self._pins: Counter[str] = Counter()
        self._arriving_bytes = 0
        with reaching(folder):
            self._disk.make_folder(folder)
            sweep_parts(self._disk, folder)
            self._disk.fsync_folder(folder)
            self._entries = dict(self._found())
        self._last_use = max((entry.use for entry in self._entries.values()), default=0)

    @property
    def used_bytes(self) -> int:
        """All bytes in the folder: blobs, what was set aside, what is arriving."""
        return self._arriving_bytes + sum(entry.size_bytes for entry in self._entries.values())

    @property
    def free_bytes(self) -> int:
        return max(0, self._budget_bytes - self.used_bytes)

    @property
    def pinned_bytes(self) -> int:
        return sum(entry.size_bytes for name, entry in self._entries.items() if self._pins[name])

    def path_of(self, digest: bytes) -> Path:
        """Where a blob of this name lies, or would."""
        return self._folder / _name(digest)

    def contains(self, digest: bytes) -> bool:
        """Whether a blob of this name is here; its bytes are not checked."""
        return _name(digest) in self._entries

    def digests(self) -> list[bytes]:
        """What is here, in the order in which it would be evicted were nothing pinned."""
        return [bytes.fromhex(name) for name in self._oldest_first() if not name.startswith(ASIDE_PREFIX)]

    def add(self, chunks: Iterable[bytes], digest: bytes, announced_bytes: int | None = None) -> None:
        """Store what ``chunks`` bring, if it hashes to ``digest``; durable on return. Nothing to do if it is here already.

        Raises ``RefusedError`` when the bytes hash to something else or are more than ``announced_bytes`` or the budget, and
        ``UnavailableError`` when there is no room or the disk fails; then nothing new can be seen.
        """
        if _name(digest) in self._entries:
            self._touch_closed(_name(digest))
        else:
            self._receive(chunks, digest, announced_bytes)

    def add_file(self, path: Path, digest: bytes | None = None) -> bytes:
        """Store a copy of the file ``path``, which must hash to ``digest`` if one is given. Returns its digest.

        Raises as ``add`` does, and ``UnavailableError`` when ``path`` cannot be read.
        """
        if digest is not None and self.contains(digest):
            self._touch_closed(_name(digest))
            return digest
        with reaching(path):
            size_bytes = path.stat().st_size
        return self._receive(_chunks_of(path), digest, size_bytes)

    def reserve(self, subject: str, size_bytes: int) -> None:
        """Make room for bytes that will be written beside this folder, and count them until ``release``.

        Raises ``RefusedError`` for more than the budget, ``UnavailableError`` when there is no room; then nothing is evicted.
        """
        self._must_fit(subject, size_bytes)
        with reaching(self._folder):
            self._make_room(subject, size_bytes)
        self._arriving_bytes += size_bytes

    def count(self, size_bytes: int) -> None:
        """Count bytes that lie beside this folder already, until ``release``; nothing is evicted for them."""
        self._arriving_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """What was reserved or counted is not there any more."""
        if size_bytes > self._arriving_bytes:
            raise RuntimeError(f"{size_bytes} bytes were not reserved; {self._arriving_bytes} are")
        self._arriving_bytes -= size_bytes

    def adopt(self, path: Path, digest: bytes, size_bytes: int) -> None:
        """Take the file ``path``, of a folder on the same file system, in without a copy; durable on return.

        The caller has hashed its content, made that durable, and reserved its room, which becomes the blob's. If the blob is
        here already, the file is removed. Raises ``UnavailableError`` when the disk fails; then the file is still ``path``,
        or (if not even that can be had) gone.
        """
        name = _name(digest)
        with reaching(path):
            if name in self._entries:
                self._disk.unlink(path)
            else:
                self._make_room(f"blob {name}", 0)
                self._last_use += 1
                self._move_in(path, self._folder / name)
                self._entries[name] = _Entry(size_bytes, self._last_use)
        self.release(size_bytes)

    def open_verified(self, digest: bytes) -> int:
        """A read-only descriptor, at offset 0, through which the bytes were hashed and found to be ``digest``'s.

        The caller closes it; it stays good when the blob is evicted. Raises ``UnavailableError`` when the blob is not here or
        cannot be read, ``RefusedError`` when it rotted: then it is set aside, and must be fetched again.
        """
        name = _name(digest)
        self._must_have(name)
        with reaching(self._folder / name):
            fd = self._open(name)
            try:
                actual = self._hash(fd)
                if actual != digest:
                    self._set_aside(name)
                    raise RefusedError(
                        f"blob {name}", f"bytes that hash to {actual.hex()}", "", "set aside; fetch the model again"
                    )
                self._disk.rewind(fd)
            except BaseException:
                self._disk.close(fd)
                raise
        self._touch(name, fd)
        return fd

    def pin(self, digest: bytes) -> None:
        """Keep this blob from eviction until ``unpin`` was called as often. ``UnavailableError`` when it is not here."""
        self._must_have(_name(digest))
        self._pins[_name(digest)] += 1

    def unpin(self, digest: bytes) -> None:
        """Take back one ``pin``. Raises ``RuntimeError`` when there is none."""
        name = _name(digest)
        if not self._pins[name]:
            raise RuntimeError(f"blob {name} is not pinned")
        self._pins[name] -= 1

    def _receive(self, chunks: Iterable[bytes], digest: bytes | None, announced_bytes: int | None) -> bytes:
        subject = f"blob {digest.hex()}" if digest else "blob"
        allowed_bytes = self._budget_bytes if announced_bytes is None else announced_bytes
        self._must_fit(subject, announced_bytes or 0)
        hasher, size_bytes = hashlib.sha256(), 0
        try:
            with self._new_part() as part:
                for chunk in chunks:
                    if size_bytes + len(chunk) > allowed_bytes:
                        raise RefusedError(subject, f"more than {allowed_bytes} bytes", f"at most {allowed_bytes} bytes")
                    self._write(part, chunk, subject)
                    size_bytes += len(chunk)
                    hasher.update(chunk)
                if digest is not None and hasher.digest() != digest:
                    raise RefusedError(subject, f"{size_bytes} bytes that hash to {hasher.hexdigest()}")
                self._publish(part, hasher.hexdigest(), size_bytes)
        finally:
            self._arriving_bytes -= size_bytes
        return hasher.digest()

    def _new_part(self) -> Part:
        with reaching(self._folder):
            return Part(self._disk, self._folder)

    def _write(self, part: Part, chunk: bytes, subject: str) -> None:
        with reaching(self._folder):
            self._make_room(subject, len(chunk))
            part.write(chunk)
        self._arriving_bytes += len(chunk)

    def _publish(self, part: Part, name: str, size_bytes: int) -> None:
        if name in self._entries:
            return
        self._last_use += 1
        target = self._folder / name
        with reaching(target):
            try:
                part.publish(target, BLOB_MODE, self._last_use)
            except OSError:
                with suppress(OSError):
                    self._disk.unlink(target)
                raise
        self._entries[name] = _Entry(size_bytes, self._last_use)

    def _move_in(self, path: Path, target: Path) -> None:
        fd = self._disk.open_read(path)
        try:
            self._disk.chmod(fd, BLOB_MODE)
            self._disk.set_mtime(fd, self._last_use)
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)
        self._disk.rename(path, target)
        try:
            self._disk.fsync_folder(self._folder)
        except OSError:
            with suppress(OSError):
                self._disk.rename(target, path)
            raise
        with suppress(OSError):  # a name that is left behind there is removed at the next start
            self._disk.fsync_folder(path.parent)

    def _must_fit(self, subject: str, size_bytes: int) -> None:
        if size_bytes > self._budget_bytes:
            remedy = "raise the budget of the model cache"
            raise RefusedError(subject, f"{size_bytes} bytes", f"at most {self._budget_bytes} bytes", remedy)
        if size_bytes > self._budget_bytes - self._arriving_bytes - self.pinned_bytes:
            raise self._no_room(subject, size_bytes)

    def _make_room(self, subject: str, size_bytes: int) -> None:
        while self.used_bytes + size_bytes > self._budget_bytes or len(self._entries) >= MAX_BLOBS:
            victim = next((name for name in self._oldest_first() if not self._pins[name]), None)
            if victim is None:
                raise self._no_room(subject, size_bytes)
            with suppress(FileNotFoundError):
                self._disk.unlink(self._folder / victim)
            del self._entries[victim]

    def _no_room(self, subject: str, size_bytes: int) -> UnavailableError:
        figures = f"{size_bytes} bytes needed, {self.free_bytes} free, {self.pinned_bytes} pinned of {self._budget_bytes}"
        return UnavailableError(subject, f"no room in the model cache: {figures}", "unpin a model or raise the budget")

    def _oldest_first(self) -> list[str]:
        return sorted(self._entries, key=lambda name: (self._entries[name].use, name))

    def _must_have(self, name: str) -> None:
        if name not in self._entries:
            raise UnavailableError(f"blob {name}", "it is not in the model cache", "add it first")

    def _open(self, name: str) -> int:
        try:
            return self._disk.open_read(self._folder / name)
        except FileNotFoundError:
            del self._entries[name]
            raise

    def _hash(self, fd: int) -> bytes:
        hasher = hashlib.sha256()
        while chunk := self._disk.read(fd, READ_CHUNK_BYTES):
            hasher.update(chunk)
        return hasher.digest()

    def _set_aside(self, name: str) -> None:
        self._disk.rename(self._folder / name, self._folder / (ASIDE_PREFIX + name))
        self._entries[ASIDE_PREFIX + name] = replace(self._entries.pop(name), use=0)

    def _touch(self, name: str, fd: int) -> None:
        """Remember this use; a disk that cannot is no reason not to serve, and forgets it at the next start."""
        self._last_use += 1
        self._entries[name] = replace(self._entries[name], use=self._last_use)
        with suppress(OSError):
            self._disk.set_mtime(fd, self._last_use)

    def _touch_closed(self, name: str) -> None:
        with reaching(self._folder / name):
            fd = self._open(name)
            try:
                self._touch(name, fd)
            finally:
                self._disk.close(fd)

    def _found(self) -> Iterator[tuple[str, _Entry]]:
        for name in self._disk.names(self._folder):
            facts = self._disk.facts(self._folder / name)
            if facts is not None and _BLOB_NAME.fullmatch(name):
                yield name, _Entry(facts.size_bytes, max(1, facts.mtime_s))
            elif facts is not None and name.startswith(ASIDE_PREFIX):
                yield name, _Entry(facts.size_bytes, 0)


def _name(digest: bytes) -> str:
    if len(digest) != DIGEST_BYTES:
        raise RefusedError("blob digest", f"{len(digest)} bytes", f"the {DIGEST_BYTES} bytes of a SHA-256")
    return digest.hex()


def _chunks_of(path: Path) -> Iterator[bytes]:
    with reaching(path), path.open("rb") as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            yield chunk
