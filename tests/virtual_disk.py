"""A disk in memory that forgets: it keeps apart what was written and what was made durable, and its power can be cut.

It models the worst that POSIX allows between two fsyncs: data that was not fsynced survives by any subset of its 512-byte
sectors, with any length; creations, renames and removals in a folder survive by any subset until the folder is fsynced. A rename
from one folder to another is two such changes: the file may be found in both, or in neither.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NoReturn

from edge_agent.store.files import Disk, FileFacts

SECTOR_BYTES = 512
DATA, NAME = "data", "name"
Keeps = Callable[[str], bool]
"""Asked of each thing that was not durable when the power failed, ``DATA`` or ``NAME``: did it survive?"""


class PowerCutError(BaseException):
    """Not an ``OSError``: no program handles it."""


@dataclass
class Inode:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    mtime_s: int = 0
    durable_mtime_s: int = 0
    mode: int = 0o600
    pages_lie: bool = False
    """Set by a disk that loses what it could not sync."""

    def put(self, data: bytes | memoryview, offset: int) -> None:
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset : offset + len(data)] = data

    def survivor(self, keeps: Keeps) -> Inode:
        """What is found after the power came back; ``keeps`` is asked for each thing that was not fsynced."""
        grown = max(0, len(self.data) - len(self.durable))
        data = bytearray(self.durable) + bytearray(grown if grown and keeps(DATA) else 0)
        for start in range(0, len(data), SECTOR_BYTES):
            sector = self.data[start : start + SECTOR_BYTES]
            if data[start : start + SECTOR_BYTES] != sector and keeps(DATA):
                data[start : start + len(sector)] = sector
        mtime_s = self.mtime_s if keeps(DATA) else self.durable_mtime_s
        return Inode(data, bytes(data), mtime_s, mtime_s, self.mode)


Names = dict[Path, Inode]
Change = Callable[[Names], object]


class VirtualDisk(Disk):
    """``cut_at``: the number of the change during which the power fails. ``fail_at``: the operation that raises ``errno``."""

    def __init__(self, cut_at: int | None = None, fail_at: int | None = None, error: int = errno.EIO) -> None:
        self.names_now: Names = {}
        self.names_durable: Names = {}
        self.pending: list[tuple[Path, Change]] = []
        self.folders: set[Path] = set()
        self.open_files: dict[int, tuple[Inode, list[int]]] = {}
        self.cut_at, self.fail_at, self.error = cut_at, fail_at, error
        self.changes = self.operations = 0
        self.dead = False

    def rebooted(self, keeps: Keeps, cut_at: int | None = None, kind: type[VirtualDisk] | None = None) -> VirtualDisk:
        """The disk after a power cut now; its own power fails at change ``cut_at``."""
        names = dict(self.names_durable)
        for _, change in self.pending:
            if keeps(NAME):
                change(names)
        twins: dict[int, Inode] = {}
        for inode in names.values():
            twins.setdefault(id(inode), inode.survivor(keeps))
        new = (kind or type(self))(cut_at)
        new.folders = set(self.folders)
        new.names_now = {path: twins[id(inode)] for path, inode in names.items()}
        new.names_durable = dict(new.names_now)
        return new

    def killed(self) -> VirtualDisk:
        """The same disk for the next process: the descriptors are gone, nothing else is."""
        self.open_files.clear()
        self.dead, self.cut_at = False, None
        return self

    def content(self, path: Path) -> bytes | None:
        return bytes(self.names_now[path].data) if path in self.names_now else None

    def make_folder(self, folder: Path) -> None:
        self._operation()
        self.folders.add(folder)

    def create(self, path: Path) -> int:
        self._change()
        if path in self.names_now:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        inode = Inode()
        self._rename_in(path.parent, lambda names: names.__setitem__(path, inode))
        return self._descriptor(inode)

    def open_append(self, path: Path) -> int:
        self._operation()
        return self._descriptor(self._inode(path))

    def open_write(self, path: Path) -> int:
        self._operation()
        if not self._inode(path).mode & 0o200:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return self._descriptor(self._inode(path))

    def open_read(self, path: Path) -> int:
        self._operation()
        return self._descriptor(self._inode(path))

    def read(self, fd: int, max_bytes: int) -> bytes:
        self._operation()
        inode, offset = self.open_files[fd]
        data = bytes(inode.data[offset[0] : offset[0] + max_bytes])
        offset[0] += len(data)
        return data

    def rewind(self, fd: int) -> None:
        self._operation()
        self.open_files[fd][1][0] = 0

    def write(self, fd: int, data: bytes) -> None:
        inode = self.open_files[fd][0]
        self._change(lambda: inode.data.extend(data[: len(data) // 2]))
        inode.data.extend(data)

    def read_at(self, fd: int, max_bytes: int, offset: int) -> bytes:
        self._operation()
        return bytes(self.open_files[fd][0].data[offset : offset + max_bytes])

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        inode = self.open_files[fd][0]
        self._change(lambda: inode.put(data[: len(data) // 2], offset))
        inode.put(data, offset)

    def chmod(self, fd: int, mode: int) -> None:
        self._change()
        self.open_files[fd][0].mode = mode

    def set_mtime(self, fd: int, mtime_s: int) -> None:
        self._change()
        self.open_files[fd][0].mtime_s = mtime_s

    def forget_cached(self, fd: int) -> None:
        self._operation()

    def fsync(self, fd: int) -> None:
        self._change()
        inode = self.open_files[fd][0]
        inode.durable, inode.durable_mtime_s = bytes(inode.data), inode.mtime_s

    def close(self, fd: int) -> None:
        """Frees the descriptor even when it fails, as close(2) does on Linux."""
        del self.open_files[fd]
        self._operation()

    def rename(self, source: Path, target: Path) -> None:
        self._change()
        inode = self._inode(source)

        def leave(names: Names) -> None:
            if names.get(source) is inode:
                del names[source]

        def move(names: Names) -> None:
            leave(names)
            names[target] = inode

        if source.parent == target.parent:
            self._rename_in(source.parent, move)
        else:
            self._rename_in(target.parent, lambda names: names.__setitem__(target, inode))
            self._rename_in(source.parent, leave)

    def unlink(self, path: Path) -> None:
        self._change()
        self._inode(path)
        self._rename_in(path.parent, lambda names: names.pop(path, None) and None)

    def fsync_folder(self, folder: Path) -> None:
        self._change()
        for parent, change in self.pending:
            if parent == folder:
                change(self.names_durable)
        self.pending = [(parent, change) for parent, change in self.pending if parent != folder]

    def names(self, folder: Path) -> list[str]:
        self._operation()
        return sorted(path.name for path in self.names_now if path.parent == folder)

    def facts(self, path: Path) -> FileFacts | None:
        self._operation()
        inode = self.names_now.get(path)
        return FileFacts(len(inode.data), inode.mtime_s) if inode else None

    def _descriptor(self, inode: Inode) -> int:
        fd = max(self.open_files, default=2) + 1
        self.open_files[fd] = (inode, [0])
        return fd

    def _inode(self, path: Path) -> Inode:
        if path not in self.names_now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return self.names_now[path]

    def _rename_in(self, folder: Path, change: Change) -> None:
        change(self.names_now)
        self.pending.append((folder, change))

    def _operation(self) -> None:
        if self.dead:
            raise PowerCutError
        self.operations += 1
        if self.operations == self.fail_at:
            raise OSError(self.error, os.strerror(self.error))

    def _change(self, torn: Callable[[], None] | None = None) -> None:
        self._operation()
        self.changes += 1
        if self.changes == self.cut_at:
            self._cut(torn)

    def _cut(self, torn: Callable[[], None] | None) -> NoReturn:
        if torn:
            torn()
        self.dead = True
        raise PowerCutError


def survivals(random_ones: int) -> Iterator[Keeps]:
    """None of it survives, all of it, the names only, the data only, and seeded random mixtures."""
    yield lambda _: False
    yield lambda _: True
    yield lambda kind: kind == NAME
    yield lambda kind: kind == DATA
    for seed in range(random_ones):
        yield mixture(Random(seed))


def mixture(random: Random) -> Keeps:
    share = random.choice((0.2, 0.5, 0.8))
    return lambda _: random.random() < share


def crashes(
    scenario: Callable[[VirtualDisk], object],
    before: VirtualDisk,
    kind: type[VirtualDisk] | None = None,
    random_ones: int = 6,
) -> Iterator[VirtualDisk]:
    """Every disk that may be found after ``scenario`` ran on ``before`` and the power failed at any one change or at its end."""
    cut_at = 1
    while True:
        crashed = before.rebooted(lambda _: True, cut_at, kind)
        try:
            scenario(crashed)
            finished = True
        except PowerCutError:
            finished = False
        for keeps in survivals(random_ones):
            yield crashed.rebooted(keeps)
        if finished:
            return
        cut_at += 1
