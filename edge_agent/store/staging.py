"""Files that grow piece by piece, out of order, until they are whole and become blobs.

Owns a folder beside the model cache, on its file system: one file for each artefact, named by the SHA-256 of the whole.  Rules:

* What is on the disk is believed only as far as its pieces hash to what they should; nothing else says what was written, so a
  file may be cut short, torn or full of holes after a crash, and what is good of it is kept.
* A piece that does not hash to its digest is not written.  A file becomes a blob only when the whole of it was hashed, after it
  was made durable.
* Its room in the cache is taken before its first byte, so that no fetch ends for want of a budget at its last piece.
* A disk that is full, failing or read-only is ``UnavailableError``; what was written stays, and the same call may work later.
* ``scan``, ``put``, ``settle``, ``seed`` and ``verify`` of one ``Receiving`` touch its own file alone, so one thread other than
  the cache's may run them; the rest belongs to the thread of the cache.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.blobs import BlobStore
from edge_agent.store.files import PRIVATE_FILE, READ_CHUNK_BYTES, Disk, reaching

_NAME = re.compile(r"[0-9a-f]{64}")


class Pieces(Protocol):
    """What is fetched (``ota.chunks.Artefact``): its SHA-256, and its ``count`` pieces of ``step_bytes``, the last shorter."""

    @property
    def digest(self) -> bytes: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def step_bytes(self) -> int: ...
    @property
    def count(self) -> int: ...
    def piece_bytes(self, index: int) -> int: ...
    def piece_digest(self, index: int) -> bytes: ...
    def check(self, index: int, data: bytes | memoryview) -> None:
        """Raises ``RefusedError`` unless ``data`` is piece ``index``."""


class Staging:
    """The files in ``folder`` that grow. Opening it makes the folder, removes what was adopted already, and counts the rest
    against the budget of ``blobs``. Raises ``UnavailableError`` when that cannot be done."""

    def __init__(self, folder: Path, blobs: BlobStore, disk: Disk | None = None) -> None:
        self.folder, self.blobs, self.disk = folder, blobs, disk or Disk()
        self._counted: dict[bytes, int] = {}
        with reaching(folder):
            self.disk.make_folder(folder)
            for name in self.disk.names(folder):
                self._find(name)

    def digests(self) -> list[bytes]:
        """The artefacts of which something is here, sorted."""
        return sorted(self._counted)

    def path_of(self, digest: bytes) -> Path:
        return self.folder / digest.hex()

    def open(self, pieces: Pieces, scan: bool = True) -> Receiving:
        """Go on with an artefact, or begin it. Without ``scan`` nothing counts as held until ``Receiving.scan`` was called.

        Raises ``RefusedError`` when the cache can never hold it, ``UnavailableError`` when there is no room or the disk fails.
        """
        self._reserve(pieces)
        receiving = Receiving(self, pieces)
        try:
            if scan:
                receiving.scan()
        except UnavailableError:
            receiving.close()
            raise
        return receiving

    def sweep(self, keep: Collection[bytes]) -> int:
        """Remove what is here of artefacts that are not in ``keep``; how many there were. ``UnavailableError`` if it cannot."""
        gone = [digest for digest in self.digests() if digest not in keep]
        for digest in gone:
            self.remove(digest)
        return len(gone)

    def remove(self, digest: bytes) -> None:
        """For ``Receiving`` and ``sweep``: the file goes, and its room is free."""
        path = self.path_of(digest)
        with reaching(path), suppress(FileNotFoundError):
            self.disk.unlink(path)
        self.blobs.release(self._counted.pop(digest, 0))

    def adopted(self, digest: bytes) -> None:
        """For ``Receiving``: the cache has it now, with its room."""
        self._counted.pop(digest)

    def _find(self, name: str) -> None:
        path = self.folder / name
        facts = self.disk.facts(path)
        if facts is None:
            return
        if not _NAME.fullmatch(name) or self.blobs.contains(bytes.fromhex(name)):
            self.disk.unlink(path)
        else:
            self._counted[bytes.fromhex(name)] = facts.size_bytes
            self.blobs.count(facts.size_bytes)

    def _reserve(self, pieces: Pieces) -> None:
        """Its whole size from now on; what lies there and is longer cannot be it."""
        if self._counted.get(pieces.digest, 0) > pieces.size_bytes:
            self.remove(pieces.digest)
        already_bytes = self._counted.get(pieces.digest, 0)
        self.blobs.reserve(f"artefact {pieces.digest.hex()}", pieces.size_bytes - already_bytes)
        self._counted[pieces.digest] = pieces.size_bytes


class Receiving:
    """One artefact that grows. ``held``: the set of its pieces that are written and were checked, bit ``i`` for piece ``i``."""

    def __init__(self, staging: Staging, pieces: Pieces) -> None:
        self.pieces, self.held = pieces, 0
        self._staging, self._disk = staging, staging.disk
        self._path = staging.path_of(pieces.digest)
        self._fd: int | None = None
        self._verified = False
        with reaching(self._path):
            self._fd = self._opened()

    @property
    def done(self) -> bool:
        """Every piece is held."""
        return self.held.bit_count() == self.pieces.count

    def scan(self) -> int:
        """Hash what the file has and hold what is good of it; how many pieces are held. ``UnavailableError`` if it cannot."""
        self.held = 0
        with reaching(self._path):
            for index in range(self.pieces.count):
                data = self._read(self._descriptor(), index * self.pieces.step_bytes, self.pieces.piece_bytes(index))
                if not data:
                    break
                if sha256(data).digest() == self.pieces.piece_digest(index):
                    self.held |= 1 << index
        return self.held.bit_count()

    def put(self, index: int, data: bytes | memoryview, checked: bool = False) -> bool:
        """Write a piece; ``False`` if it is held already. Not durable before ``settle`` or ``finish``.

        ``checked``: the caller has just done ``pieces.check`` on these very bytes, and it is not done again.
        Raises ``RefusedError`` for what is not that piece, ``UnavailableError`` when the disk fails: it is lacking then.
        """
        if not checked:
            self.pieces.check(index, data)
        if self.held >> index & 1:
            return False
        with reaching(self._path):
            self._write(index, data)
        return True

    def settle(self) -> None:
        """Make what was written so far durable. Raises ``UnavailableError`` when the disk fails: see ``held`` then."""
        with reaching(self._path):
            self._sync()

    def seed(self, digest: bytes) -> int:
        """Copy the pieces that a blob, or another artefact that grows here, shares with this one, wherever they stand; how many.

        It needs no other check: what is copied has the digest of its piece. What is not there shares nothing.
        Raises ``UnavailableError`` when the disk fails.
        """
        return self.seed_file(self._staging.blobs.path_of(digest)) + self.seed_file(self._staging.path_of(digest))

    def seed_file(self, path: Path) -> int:
        """The same of any file."""
        wanted = self._lacking_by_digest()
        held = self.held.bit_count()
        with reaching(path), suppress(FileNotFoundError):
            fd = self._disk.open_read(path)
            try:
                self._copy(fd, wanted)
            finally:
                self._disk.close(fd)
        return self.held.bit_count() - held

    def verify(self) -> None:
        """Make what was written durable, and hash the whole of it.

        Raises ``RefusedError`` if it is not what it should be: pieces that rotted on the way are lacking then, and can be
        fetched again. Raises ``UnavailableError`` when the disk fails, ``RuntimeError`` while pieces are lacking.
        """
        if not self.done:
            raise RuntimeError(f"{self.pieces.count - self.held.bit_count()} pieces of {self._path.name} are lacking")
        with reaching(self._path):
            self._sync()
            actual = self._whole_digest()
        if actual != self.pieces.digest:
            self.scan()
            lacking = self.pieces.count - self.held.bit_count()
            remedy = f"{lacking} pieces rotted on this disk; they are fetched again" if lacking else "the release is wrong"
            raise RefusedError(f"artefact {self._path.name}", f"bytes that hash to {actual.hex()}", remedy=remedy)
        self._verified = True

    def finish(self) -> None:
        """Verify, unless that was done, and become a blob; durable on return. Raises as ``verify`` does."""
        if not self._verified:
            self.verify()
        self._staging.blobs.adopt(self._path, self.pieces.digest, self.pieces.size_bytes)
        self._staging.adopted(self.pieces.digest)
        self.close()

    def abandon(self) -> None:
        """It is not wanted any more. Raises ``UnavailableError`` when it cannot be removed."""
        self.close()
        self._staging.remove(self.pieces.digest)

    def close(self) -> None:
        """Leave it as it is, to be opened again. May be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                self._disk.close(fd)

    def _opened(self) -> int:
        if self._disk.facts(self._path) is None:
            self._disk.close(self._disk.create(self._path))
            self._disk.fsync_folder(self._path.parent)
        else:
            self._make_writable()
        return self._disk.open_write(self._path)

    def _make_writable(self) -> None:
        """It may be that it was to be adopted, and that this failed."""
        fd = self._disk.open_read(self._path)
        try:
            self._disk.chmod(fd, PRIVATE_FILE)
        finally:
            self._disk.close(fd)

    def _sync(self) -> None:
        """After an fsync that failed the cached pages count as clean and say nothing of the storage, so it is asked again
        (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020)."""
        try:
            self._disk.fsync(self._descriptor())
        except OSError:
            self.held = 0
            self._disk.forget_cached(self._descriptor())
            self.scan()
            raise

    def _read(self, fd: int, offset: int, size_bytes: int) -> bytes:
        """What is there, up to ``size_bytes``."""
        data = b""
        while len(data) < size_bytes and (more := self._disk.read_at(fd, size_bytes - len(data), offset + len(data))):
            data = data + more if data else more
        return data

    def _write(self, index: int, data: bytes | memoryview) -> None:
        self._disk.write_at(self._descriptor(), data, index * self.pieces.step_bytes)
        self.held |= 1 << index
        self._verified = False

    def _lacking_by_digest(self) -> dict[bytes, list[int]]:
        wanted: dict[bytes, list[int]] = {}
        for index in range(self.pieces.count):
            if not self.held >> index & 1:
                wanted.setdefault(self.pieces.piece_digest(index), []).append(index)
        return wanted

    def _copy(self, fd: int, wanted: dict[bytes, list[int]]) -> None:
        offset, step_bytes = 0, self.pieces.step_bytes
        while wanted and (data := self._read(fd, offset, step_bytes)):
            for index in wanted.pop(sha256(data).digest(), ()):
                self._write(index, data)
            offset += len(data)

    def _whole_digest(self) -> bytes:
        hasher, offset = sha256(), 0
        while data := self._disk.read_at(self._descriptor(), READ_CHUNK_BYTES, offset):
            hasher.update(data)
            offset += len(data)
        return hasher.digest()

    def _descriptor(self) -> int:
        if self._fd is None:
            raise RuntimeError(f"{self._path} is not open any more")
        return self._fd
