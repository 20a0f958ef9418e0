"""The files of a TUF repository's targets, as any HTTP server serves them (TUF specification 1.0.33, section 6.2).

Owns ``targets/``.  Rules: a file has its SHA-256 in its name, so one is never changed, only added and dropped; what is copied in
is hashed while it is copied, and what is read is hashed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from tuf.api.metadata import TargetFile

from edge_agent.core.errors import RefusedError
from edge_agent.store.files import READ_CHUNK_BYTES, Disk, Part, reaching, read_bounded, sweep_parts, write_atomically
from ota.manifest import ReleasedFile

PUBLIC_FILE = 0o444


class TargetFiles:
    """Its methods raise ``UnavailableError`` where the disk refuses."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder, self._disk = folder, disk

    def path_of(self, target: TargetFile) -> Path:
        parent, _, name = target.path.rpartition("/")
        return self._folder / parent / f"{target.hashes['sha256']}.{name}"

    def holds(self, target: TargetFile) -> bool:
        path = self.path_of(target)
        with reaching(path):
            return self._disk.facts(path) is not None

    def put(self, path: str, data: bytes) -> TargetFile:
        """Make ``data`` the target ``path``, durably."""
        target = TargetFile.from_data(path, data, ["sha256"])
        write_atomically(self._disk, self.path_of(target), data, PUBLIC_FILE)
        return target

    def read(self, target: TargetFile, max_bytes: int) -> bytes:
        """Raises ``RefusedError`` for a file that is not what was signed."""
        file = self.path_of(target)
        data = read_bounded(self._disk, file, max_bytes) if self.holds(target) else None
        if data is None or sha256(data).hexdigest() != target.hashes["sha256"]:
            came = "no file" if data is None else "other bytes"
            raise RefusedError(f"target {file}", came, "what was signed", "restore it from a backup")
        return data

    def make_folder(self, name: str) -> None:
        """A folder for targets below ``name``, without what a crash left half written in it."""
        with reaching(self._folder):
            self._disk.make_folder(self._folder / name)
        sweep_parts(self._disk, self._folder / name)

    def copy(self, path: str, source: Path, released: ReleasedFile) -> TargetFile:
        """Make a copy of ``source`` the target ``path``, durably. Raises ``RefusedError`` unless it is the released file."""
        target = TargetFile(released.size_bytes, {"sha256": released.digest.hex()}, path)
        with reaching(source):
            fd = self._disk.open_read(source)
            try:
                with reaching(self.path_of(target)), Part(self._disk, self.path_of(target).parent) as part:
                    self._copy_checked(fd, part, source, released)
                    part.publish(self.path_of(target), PUBLIC_FILE)
            finally:
                self._disk.close(fd)
        return target

    def _copy_checked(self, fd: int, part: Part, source: Path, released: ReleasedFile) -> None:
        hashed, size_bytes = sha256(), 0
        while chunk := self._disk.read(fd, READ_CHUNK_BYTES):
            part.write(chunk)
            hashed.update(chunk)
            size_bytes += len(chunk)
        if hashed.digest() != released.digest or size_bytes != released.size_bytes:
            came = f"{size_bytes} bytes with SHA-256 {hashed.hexdigest()}"
            allowed = f"{released.size_bytes} bytes with {released.digest.hex()}"
            raise RefusedError(f"file {source}", came, allowed, "it changed since the release was built: build it again")

    def drop(self, targets: Iterable[TargetFile]) -> None:
        for target in targets:
            if self.holds(target):
                with reaching(self.path_of(target)):
                    self._disk.unlink(self.path_of(target))
