"""One SQLite file that survives a power cut, belongs to one process, and never begins anew unasked.

Owns the life of the file: lock, birth, check, migration, transactions, and what SQLite's errors mean.  Rules:

* Born whole: a new file gets its schema under a temporary name, then its fsync, its name and the folder's fsync; so a file
  that is empty or lacks the schema is damaged, not new.
* The lock file remembers that a database was made.  If it is gone, or damaged, the database is refused;
  ``unsafe_start_over`` moves what is left aside and begins a new one.  (A whole folder that was deleted or restored from a
  backup cannot be told from here: that is for who verifies the counters from outside.)
* WAL with ``synchronous=FULL``: a commit is one fsync (sqlite.org/wal.html, section 2.3).  ``locking_mode=EXCLUSIVE`` keeps
  the WAL index in private memory and other programs out.
* A transaction in which a statement failed takes no other and is not committed, even if the error was swallowed: SQLite may
  have rolled it back already, and what came next would be committed alone.
* A database that keeps room (``keep_room``) has what it needs of the disk beforehand: free pages in the file, and blocks of the
  log, which stay its own when the log is folded, and over a stop.  Others may then fill the disk, and it goes on.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from edge_agent.core.errors import RefusedError, UnavailableError, shown
from edge_agent.store.files import PART_PREFIX, PRIVATE_FILE, Disk, reaching

APPLICATION_ID = 0x536C794C
"""Tells a ledger from any other SQLite file ("SlyL", in the header)."""
PAGE_CACHE_KIB = 512
WAL_LIMIT_BYTES = 9 * 2**20
"""What a log keeps of the disk.  It is folded when 1000 pages of 4 KiB lie in it (SQLite's ``wal_autocheckpoint``); the rest is
for one transaction with an entry of the largest size."""
RESERVE_BYTES = 2 * 2**20
"""Free pages that ``keep_room`` makes in a file that has less than half of that."""
SPARE_FACTOR = 2
"""Room is taken only where the disk has this many times as much: never the last of it."""
BUSY_TIMEOUT_MS = 2000
HOLDER_BYTES = 128
HEADER_BYTES = 100

Migrations = Sequence[Sequence[str]]
"""Steps of the schema, each a list of statements.  ``user_version`` counts in its low half the steps that a file has taken; its
high half is the oldest schema whose programs can use it, 0 where that is the schema itself."""
SCHEMA_BITS = 16

_MADE = b"A database was made beside this lock.\n"
_COMPANIONS = ("", "-wal", "-shm", "-journal")
_PRAGMAS = (
    "locking_mode=EXCLUSIVE",
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    "trusted_schema=OFF",
    "temp_store=MEMORY",
    "mmap_size=0",
    f"cache_size=-{PAGE_CACHE_KIB}",
    f"journal_size_limit={WAL_LIMIT_BYTES}",
)
_UNAVAILABLE = {
    sqlite3.SQLITE_FULL: "free some space, then try again; nothing of this was kept",
    sqlite3.SQLITE_IOERR: "check the free space and dmesg, then try again; nothing of this was kept",
    sqlite3.SQLITE_READONLY: "remount the file system for writing (a damaged one is remounted read-only: check dmesg)",
    sqlite3.SQLITE_CANTOPEN: "let this user have the file and its folder",
    sqlite3.SQLITE_PERM: "let this user have the file and its folder",
    sqlite3.SQLITE_BUSY: "end the program that has it open",
    sqlite3.SQLITE_LOCKED: "end the program that has it open",
    sqlite3.SQLITE_NOMEM: "free some memory, then try again",
}
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_KEEP_IT = "keep the file and restore a good copy, or start over unsafely: high-water marks and what is owed are then lost"


class Database:
    """The SQLite file ``path``, brought to the newest of ``migrations``.

    ``moved_aside`` is where the bad file went if ``unsafe_start_over`` had to begin anew. Raises ``RefusedError`` when the file
    is damaged, gone, foreign or of a schema too new, ``UnavailableError`` when it cannot be reached or another process has it.
    """

    def __init__(self, path: Path, migrations: Migrations, unsafe_start_over: bool = False, usable_from: int = 0) -> None:
        self._path, self._migrations, self._disk = path, migrations, Disk()
        self._usable_from = usable_from or len(migrations)
        self._open_transaction = self._begun = self._fold_is_due = self._keeps_room = False
        self._failure: Exception | None = None
        self.moved_aside: Path | None = None
        with reaching(path):
            self._disk.make_folder(path.parent)
            self._lock = self._lock_file()
        try:
            self._connection = self._opened(unsafe_start_over)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Fold the WAL into the file and let the next process in. May be called twice."""
        if self._lock >= 0:
            with suppress(sqlite3.Error):
                self._connection.close()
            if self._keeps_room:
                with suppress(OSError):
                    self._take_log_room()
            os.close(self._lock)
            self._lock = -1

    def keep_room(self) -> str:
        """Take of the disk now what will be written later; why that cannot be had, empty if it is there.

        Costs a few commits the first time; else it looks at two numbers.  For a file system that writes in place (ext4, XFS,
        tmpfs): one that never does (Btrfs, ZFS, F2FS) may refuse on a full disk anyway.
        """
        try:
            self._keeps_room = self._log_has_room()
            if why := self._why_no_room():
                return why
            self._take_log_room()
            self._keeps_room = True
            if self._free_bytes() < RESERVE_BYTES // 2:
                self._take_file_room()
        except OSError as error:
            return error.strerror or str(error)
        except UnavailableError as error:
            return str(error)
        return ""

    def _why_no_room(self) -> str:
        """Empty if nothing is needed any more, or there is plenty."""
        needed_bytes = 0 if self._keeps_room else WAL_LIMIT_BYTES
        if self._free_bytes() < RESERVE_BYTES // 2:
            needed_bytes += RESERVE_BYTES
        disk = os.statvfs(self._path.parent)
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes >= SPARE_FACTOR * needed_bytes:
            return ""
        return f"{free_bytes} bytes are free; room is taken when there are {SPARE_FACTOR * needed_bytes}"

    def _log_has_room(self) -> bool:
        return self._log().exists() and self._log().stat().st_blocks * 512 >= WAL_LIMIT_BYTES

    def _free_bytes(self) -> int:
        pages, page_bytes = (self.execute(f"PRAGMA {name}")[0][0] for name in ("freelist_count", "page_size"))
        return int(pages * page_bytes)

    def _log(self) -> Path:
        return self._path.with_name(self._path.name + "-wal")

    def _take_log_room(self) -> None:
        """Zeros behind the last frame, or in the place of a log, are no frames (sqlite.org/fileformat.html, section 4.1)."""
        fd = os.open(self._log(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)
        try:
            os.posix_fallocate(fd, 0, WAL_LIMIT_BYTES)
        finally:
            os.close(fd)

    def _take_file_room(self) -> None:
        """Pages that are made and thrown away again stay in the file. None of that need outlive a power cut: no commit waits."""
        self.execute("PRAGMA synchronous=NORMAL")
        self.execute(f"PRAGMA cache_size=-{2 * RESERVE_BYTES // 1024}")
        try:
            with self.transaction():
                self.execute("CREATE TABLE ballast (bytes BLOB)")
                self.execute(f"INSERT INTO ballast VALUES (zeroblob({RESERVE_BYTES}))")
                self.execute("DROP TABLE ballast")
            self.execute("PRAGMA wal_checkpoint(RESTART)")
        finally:
            self.execute(f"PRAGMA cache_size=-{PAGE_CACHE_KIB}")
            self.execute("PRAGMA synchronous=FULL")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it is left without an error. Raises ``RuntimeError`` when one is open already.

        It begins with its first statement: one without any costs nothing, and that is what most events of a node need.
        """
        if self._open_transaction:
            raise RuntimeError("a transaction is open already: they do not nest")
        if self._fold_is_due:
            self._fold()
        self._open_transaction, self._begun, self._failure = True, False, None
        try:
            yield
            if self._begun:
                self.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        finally:
            self._open_transaction = False

    @contextmanager
    def atomically(self) -> Iterator[None]:
        """A part of the open transaction that is all or nothing by itself, or a transaction of its own."""
        if not self._open_transaction:
            with self.transaction():
                yield
            return
        self.execute("SAVEPOINT part")
        try:
            yield
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK TO part")
                self._connection.execute("RELEASE part")
            raise
        self.execute("RELEASE part")

    def execute(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of one statement. Raises ``UnavailableError`` or ``RefusedError``; see the head of this file."""
        if self._open_transaction:
            if self._failure is not None:
                raise self._failure
            if not self._begun:
                self._begun = True
                self.execute("BEGIN IMMEDIATE")
        try:
            return self._connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            self._failure = _meaning(self._path, error)
            raise self._failure from error

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        if isinstance(self._failure, UnavailableError):
            self._fold_is_due = True
            self._fold()

    def _fold(self) -> None:
        """After the disk was full: fold the log into the file while there is room for that, so that it needs no more."""
        how = "RESTART" if self._keeps_room else "TRUNCATE"
        with suppress(sqlite3.Error):
            self._connection.execute(f"PRAGMA wal_checkpoint({how})").fetchall()
            self._fold_is_due = False

    def _lock_file(self) -> int:
        path = self._path.with_name(self._path.name + ".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(fd, _holder().ljust(HOLDER_BYTES), len(_MADE))
        except BlockingIOError as error:
            holder = os.pread(fd, HOLDER_BYTES, len(_MADE)).decode("utf-8", "replace").strip()
            os.close(fd)
            remedy = "end it first, or use another state folder"
            raise UnavailableError(str(self._path), f"in use by {shown(holder)}", remedy) from error
        except OSError:
            os.close(fd)
            raise
        return fd

    def _opened(self, unsafe_start_over: bool) -> sqlite3.Connection:
        with reaching(self._path):
            try:
                if not self._path.exists():
                    self._must_be_new()
                    self._give_birth()
                return self._checked_connection()
            except _DamagedError:
                if not unsafe_start_over:
                    raise
            self._move_aside()
            self._give_birth()
            return self._checked_connection()

    def _must_be_new(self) -> None:
        left_over = [path.name for path in _files(self._path) if path.exists()]
        if left_over or os.pread(self._lock, len(_MADE), 0) == _MADE:
            raise _DamagedError(str(self._path), "no file, though there was one", "the file that was made here", _KEEP_IT)

    def _give_birth(self) -> None:
        part = self._path.with_name(PART_PREFIX + self._path.name)
        for path in _files(part):
            path.unlink(missing_ok=True)
        self._disk.close(self._disk.create(part))
        with _understood(self._path), closing(_connected(part)) as connection:
            self._migrate(connection)
        fd = self._disk.open_read(part)
        self._disk.fsync(fd)
        self._disk.close(fd)
        self._disk.rename(part, self._path)
        self._disk.fsync_folder(self._path.parent)

    def _checked_connection(self) -> sqlite3.Connection:
        self._path.chmod(PRIVATE_FILE)
        if os.pread(self._lock, len(_MADE), 0) != _MADE:
            os.pwrite(self._lock, _MADE, 0)
            self._disk.fsync(self._lock)
            self._disk.fsync_folder(self._path.parent)
        self._check_header()
        with _understood(self._path):
            connection = _connected(self._path)
            try:
                self._check(connection)
                self._migrate(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def _check_header(self) -> None:
        """Look at the file's own header (sqlite.org/fileformat.html, section 1.3) before SQLite, which may write to it."""
        fd = self._disk.open_read(self._path)
        header = self._disk.read(fd, HEADER_BYTES)
        self._disk.close(fd)
        if header[:16] != b"SQLite format 3\0" or header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
            raise _DamagedError(str(self._path), f"a file that begins with {shown(header[:16])}", "a ledger", _KEEP_IT)

    def _check(self, connection: sqlite3.Connection) -> None:
        findings = " ".join(connection.execute("PRAGMA quick_check(1)").fetchone()[0].split())
        if findings != "ok":
            raise _DamagedError(str(self._path), f"a damaged file ({findings})", "a whole one", _KEEP_IT)

    def _migrate(self, connection: sqlite3.Connection) -> None:
        mark = connection.execute("PRAGMA user_version").fetchone()[0]
        version = mark & ((1 << SCHEMA_BITS) - 1)
        if (mark >> SCHEMA_BITS or version) > len(self._migrations):
            allowed = f"schema version {len(self._migrations)} or older"
            raise RefusedError(str(self._path), f"schema version {version}", allowed, "run the newer agent that wrote it")
        for step in range(version, len(self._migrations)):
            connection.execute("BEGIN IMMEDIATE")
            for statement in self._migrations[step]:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={self._mark(step + 1)}")
            connection.execute("COMMIT")

    def _mark(self, version: int) -> int:
        return version if version <= self._usable_from else self._usable_from << SCHEMA_BITS | version

    def _move_aside(self) -> None:
        number = 1
        while any(path.exists() for path in _files(self._aside(number))):
            number += 1
        for old, new in zip(_files(self._path), _files(self._aside(number)), strict=True):
            if old.exists():
                old.rename(new)
                self.moved_aside = self._aside(number)

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.bad-{number}")


class _DamagedError(RefusedError):
    """What ``unsafe_start_over`` may leave behind."""


def _files(path: Path) -> list[Path]:
    return [path.with_name(path.name + companion) for companion in _COMPANIONS]


def _holder() -> bytes:
    program = Path(sys.argv[0] if sys.argv else "").name
    return os.fsencode(f"process {os.getpid()} {program}")[:HOLDER_BYTES]


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False)
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _meaning(path, error) from error


def _meaning(path: Path, error: sqlite3.Error) -> Exception:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _DAMAGED:
        return _DamagedError(str(path), f"a damaged file ({error})", "a whole one", _KEEP_IT)
    if code in _UNAVAILABLE:
        return UnavailableError(str(path), str(error), _UNAVAILABLE[code])
    return RuntimeError(f"{path}: {error}")
