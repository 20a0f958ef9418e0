"""Durable files, written through a disk that tests replace.

Owns ``Disk``, the few operations that this project does to a disk, and the two patterns built on them: replace a file in
whole, read a file that may not be larger than expected.  Rules:

* Every durable write of a file goes through a ``Disk``, so that a test can cut the power at any one of them.
* The order is law: write a temporary file in the same folder, fsync it, rename it, fsync the folder.  A reader sees the
  old content or the new, never a mix; when the call returned, the new content survives a power cut.
* Temporary names begin with ``PART_PREFIX``; the owner of a folder sweeps what a crash left there when it starts.
* Files are opened without following a symbolic link in the last component, and only regular files are.
* ``Disk`` raises ``OSError``; what is built on it turns that into ``UnavailableError`` by ``reaching``.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from edge_agent.core.errors import RefusedError, UnavailableError

PART_PREFIX = ".part-"
PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700
READ_CHUNK_BYTES = 256 * 2**10

_REMEDIES = {
    errno.ENOSPC: "free some space, then try again; what was there before is unchanged",
    errno.EDQUOT: "raise the quota or free some space, then try again; what was there before is unchanged",
    errno.EFBIG: "raise the file size limit (ulimit -f), then try again; what was there before is unchanged",
    errno.EIO: "the storage is failing: check dmesg, and replace the card or disk",
    errno.EROFS: "remount the file system for writing (a damaged one is remounted read-only: check dmesg)",
    errno.EACCES: "let this user have the file and its folder",
    errno.EPERM: "let this user own the file and its folder",
    errno.ENOENT: "check the path",
}


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a folder knows of a regular file. ``mtime_s`` is whole seconds."""

    size_bytes: int
    mtime_s: int


class Disk:
    """The real disk, over ``os``. A stand-in implements the same methods; descriptors are its own integers.

    Every method raises ``OSError`` as the system call behind it does.
    """

    def make_folder(self, folder: Path) -> None:
        """Create ``folder`` and its parents where they are missing, each one durably and for this user only."""
        if folder.is_dir():
            return
        if folder != folder.parent:
            self.make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(PRIVATE_FOLDER)
        self.fsync_folder(folder.parent)

    def create(self, path: Path) -> int:
        """A descriptor for writing a file that must not exist yet; only this user may read it."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)

    def open_append(self, path: Path) -> int:
        """A descriptor for writing at the end of a file that exists."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)

    def open_write(self, path: Path) -> int:
        """A descriptor for reading and writing anywhere in a file that exists."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def open_read(self, path: Path) -> int:
        """A read-only descriptor of a regular file, at its start. ``OSError`` EINVAL for a device, a pipe, a socket."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "not a regular file", str(path))
        return fd

    def read(self, fd: int, max_bytes: int) -> bytes:
        """The next 1 to ``max_bytes`` bytes; empty at the end of the file."""
        return os.read(fd, max_bytes)

    def rewind(self, fd: int) -> None:
        os.lseek(fd, 0, os.SEEK_SET)

    def write(self, fd: int, data: bytes) -> None:
        """All of ``data``, however often the system call must be made."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def read_at(self, fd: int, max_bytes: int, offset: int) -> bytes:
        """1 to ``max_bytes`` bytes from ``offset`` on; empty at the end of the file."""
        return os.pread(fd, max_bytes, offset)

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """All of ``data`` from ``offset`` on; what lies between the old end and ``offset`` becomes zeros."""
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def chmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def set_mtime(self, fd: int, mtime_s: int) -> None:
        os.utime(fd, (mtime_s, mtime_s))

    def forget_cached(self, fd: int) -> None:
        """What is read next comes from the storage, as far as it was written there (posix_fadvise, POSIX_FADV_DONTNEED)."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target``, in place of what may be there."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def fsync_folder(self, folder: Path) -> None:
        """Make the creations, renames and removals in ``folder`` durable."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def names(self, folder: Path) -> list[str]:
        """The names in ``folder``, sorted."""
        return sorted(path.name for path in folder.iterdir())

    def facts(self, path: Path) -> FileFacts | None:
        """``None`` where there is no regular file (a symbolic link is not followed)."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        return FileFacts(status.st_size, int(status.st_mtime)) if stat.S_ISREG(status.st_mode) else None


@contextmanager
def reaching(subject: Path | str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into ``UnavailableError`` that names ``subject`` and says what to do."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UnavailableError(str(subject), reason, _REMEDIES.get(error.errno or 0, "")) from error


class Part:
    """A file that is being written under a temporary name in ``folder``, and appears in whole or not at all.

    To be used as a context manager: what was not published at its end is removed. Every method raises ``OSError``.
    """

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk = disk
        for number in itertools.count():
            self._path = folder / f"{PART_PREFIX}{number}"
            with suppress(FileExistsError):
                self._fd: int | None = disk.create(self._path)
                break

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not published; what cannot be removed now is swept at the next start."""
        if self._fd is not None:
            with suppress(OSError):
                self._close()
            with suppress(OSError):
                self._disk.unlink(self._path)

    def write(self, data: bytes) -> None:
        self._disk.write(self._descriptor(), data)

    def publish(self, target: Path, mode: int, mtime_s: int | None = None) -> None:
        """Make what was written durable as ``target``, a name in the same folder.

        When this raised, ``target`` holds what it held before, or (if only the last fsync failed) the whole new content.
        """
        fd = self._descriptor()
        self._disk.chmod(fd, mode)
        if mtime_s is not None:
            self._disk.set_mtime(fd, mtime_s)
        self._disk.fsync(fd)
        self._disk.rename(self._path, target)
        self._close()
        self._disk.fsync_folder(target.parent)

    def _descriptor(self) -> int:
        if self._fd is None:
            raise RuntimeError(f"{self._path} was published or given up already")
        return self._fd

    def _close(self) -> None:
        fd, self._fd = self._descriptor(), None
        self._disk.close(fd)


def write_atomically(disk: Disk, path: Path, data: bytes, mode: int = PRIVATE_FILE) -> None:
    """Make ``data`` the whole content of ``path``, with permissions ``mode``, durably and all or nothing.

    Raises ``UnavailableError`` when the disk is full, read-only, failing or forbidden; the old content is then whole.
    """
    with reaching(path), Part(disk, path.parent) as part:
        part.write(data)
        part.publish(path, mode)


def write_unsynced(disk: Disk, path: Path, data: bytes) -> None:
    """Make ``data`` the whole content of ``path``, all or nothing if this process is killed, but not yet durably.

    For content that tells by itself whether it is whole, and is made durable later by ``fsync_file`` and ``fsync_folder``;
    after a power cut before that, ``path`` may be anything. Raises ``OSError``; the old content is then whole.
    """
    part = path.with_name(PART_PREFIX + path.name)
    with suppress(FileNotFoundError):
        disk.unlink(part)
    fd = disk.create(part)
    try:
        try:
            disk.write(fd, data)
        finally:
            disk.close(fd)
        disk.rename(part, path)
    except OSError:
        with suppress(OSError):
            disk.unlink(part)
        raise


def fsync_file(disk: Disk, path: Path) -> None:
    """Make durable what was written to ``path`` by whatever descriptor. Raises ``OSError``."""
    fd = disk.open_read(path)
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


def read_bounded(disk: Disk, path: Path, max_bytes: int) -> bytes:
    """The content of ``path``.

    Raises ``RefusedError`` when it is longer than ``max_bytes``, or is no regular file (a symbolic link, a folder, a
    device); ``UnavailableError`` when it is missing or cannot be read.
    """
    try:
        with reaching(path):
            return _read_whole(disk, path, max_bytes)
    except UnavailableError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ELOOP, errno.EISDIR, errno.EINVAL):
            raise RefusedError(str(path), error.reason, "a regular file, not a link, folder or device") from error
        raise


def _read_whole(disk: Disk, path: Path, max_bytes: int) -> bytes:
    fd = disk.open_read(path)
    try:
        chunks, total_bytes = [], 0
        while chunk := disk.read(fd, min(READ_CHUNK_BYTES, max_bytes + 1 - total_bytes)):
            chunks.append(chunk)
            total_bytes += len(chunk)
            if total_bytes > max_bytes:
                raise RefusedError(str(path), f"more than {max_bytes} bytes", f"at most {max_bytes} bytes")
        return b"".join(chunks)
    finally:
        disk.close(fd)


def sweep_parts(disk: Disk, folder: Path) -> int:
    """Remove the temporary files that a crash left in ``folder``; how many. For the folder's owner, at its start.

    Raises ``UnavailableError`` when the folder cannot be read or written.
    """
    with reaching(folder):
        parts = [name for name in disk.names(folder) if name.startswith(PART_PREFIX)]
        for name in parts:
            disk.unlink(folder / name)
        return len(parts)
