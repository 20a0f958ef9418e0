"""The disk of the state folder: does it take what is written, and where else a board can go on.

Rules: what is asked is asked of the disk itself, by a small write and an fsync, beside the event loop; folders in memory are this
user's alone, and nothing in them outlives the agent.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from edge_agent.core.errors import UnavailableError
from edge_agent.store.files import PART_PREFIX, Disk
from edge_agent.store.ledger import Ledger

LEDGER_NAME = "ledger.db"
PROBE_NAME = f"{PART_PREFIX}probe"
PROBE_BYTES = 64 * 2**10
IN_MEMORY = ("/dev/shm", "/run")
WHERE_SOCKETS_GO = ("/run", "/dev/shm")
_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
_CODES = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN})


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk that is full, failing or read-only is behind an error: no wrong setting, and no other process."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError):
        return cause.errno in _ERRNOS
    return isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", 0) & 0xFF in _CODES


def why_not_kept(folder: Path, disk: Disk | None = None) -> str:
    """Why ``folder`` does not keep what is written to it now; empty if it does."""
    disk, path = disk or Disk(), folder / PROBE_NAME
    try:
        with suppress(FileNotFoundError):
            disk.unlink(path)
        fd = disk.create(path)
        try:
            disk.write(fd, bytes(PROBE_BYTES))
            disk.fsync(fd)
        finally:
            disk.close(fd)
            disk.unlink(path)
        disk.fsync_folder(folder)
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return ""


def folder_for_socket(folder: Path) -> Path:
    """Where the socket of the agent of the state folder ``folder`` goes when that takes none; always the same one here.

    Raises ``UnavailableError`` where there is none.
    """
    name = f"sly-{sha256(os.fsencode(folder.absolute())).hexdigest()[:12]}"
    for base in _bases(WHERE_SOCKETS_GO):
        place = base / name
        with suppress(OSError):
            place.mkdir(0o700, exist_ok=True)
            facts = place.lstat()
            if place.is_dir() and not place.is_symlink() and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077:
                return place
    raise UnavailableError("socket", f"neither {folder} nor {', '.join(WHERE_SOCKETS_GO)} takes one", "make one of them writable")


class LedgerInMemory(Ledger):
    """A ledger that nothing is promised on: it goes with the process. Raises ``UnavailableError`` where there is no memory."""

    def __init__(self) -> None:
        self._folder = _private_folder()
        try:
            super().__init__(self._folder / LEDGER_NAME)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _private_folder() -> Path:
    for base in _bases(IN_MEMORY):
        with suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="sly-ledger-", dir=base))
    raise UnavailableError("ledger in memory", f"none of {', '.join(IN_MEMORY)} takes one", "let the agent write to /dev/shm")


def _bases(usual: Iterable[str]) -> list[Path]:
    """What the service manager gave this agent comes first."""
    given = [os.environ.get(name, "") for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR")]
    return [Path(each.split(":")[0]) for each in (*given, *usual) if each]
