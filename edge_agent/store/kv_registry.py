"""All parked sessions of one model that are here, the blocks that they share, and the books over both.

Owns the folders, what is found in them at the start, and two indexes: sessions by name, and sessions by the sealed block that
their rows go on from.  Rules: whoever calls holds ``lock``; after any change of a session ``changed`` is called.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import KvFormat
from edge_agent.store.files import PART_PREFIX, Disk, reaching
from edge_agent.store.kv_blocks import BlockFiles
from edge_agent.store.kv_journal import LOG_SUFFIX, ROWS_SUFFIX, TokenLog
from edge_agent.store.kv_parked import ParkedSession, key_of

_FILE = re.compile(rf"([0-9a-f]{{32}})(?:{re.escape(LOG_SUFFIX)}|\.(\d{{1,10}}){re.escape(ROWS_SUFFIX)})")


class Registry:
    """Opening it reads the logs of ids, lists the blocks, and removes what a crash left. Raises ``OSError``."""

    def __init__(self, folder: Path, kv_format: KvFormat, ram_bytes: int, disk: Disk, report: Callable[[str], object]) -> None:
        self.kv_format, self.disk, self.report = kv_format, disk, report
        self.lock = threading.RLock()
        self.folder = folder / "sessions"
        self.uses = self.own_bytes = 0
        self.sessions: dict[str, ParkedSession] = {}
        self.tails: dict[bytes, set[str]] = {}
        """By the name of the last sealed block (or the prelude): the sessions that go on from there."""
        self._tail_of: dict[str, bytes] = {}
        disk.make_folder(self.folder)
        blocks = folder / f"blocks-{kv_format.fingerprint.hex()[:16]}"
        self.blocks = BlockFiles(blocks, kv_format, ram_bytes, disk)
        for text in disk.names(folder):
            if text.startswith("blocks-") and text != blocks.name:
                self._remove_all(folder / text)
        self._recall()

    @property
    def bytes_on_disk(self) -> int:
        return self.blocks.bytes_on_disk + self.own_bytes

    def get(self, name: str) -> ParkedSession:
        """Raises ``UnavailableError`` if it is not here."""
        if name not in self.sessions:
            raise UnavailableError(f"session {name}", "it is not in the store", "create it, or look at the names")
        return self.sessions[name]

    def bytes_of(self, session: ParkedSession) -> int:
        """On disk, of everything that this session needs, shared or not."""
        return session.size_bytes + sum(map(self.blocks.size_bytes, session.needs()))

    def create(self, name: str, ids: Sequence[int]) -> ParkedSession:
        """A new session of these ids, without KV. Raises ``UnavailableError``."""
        path = self.folder / f"{key_of(name)}{LOG_SUFFIX}"
        with reaching(path):
            log = TokenLog.create(self.disk, path, name, self.kv_format.fingerprint, ids)
        session = ParkedSession(self.disk, self.folder, self.kv_format, self.blocks, log)
        self.sessions[name] = session
        self.use(session)
        self.changed(session)
        return session

    def use(self, session: ParkedSession) -> None:
        self.uses += 1
        session.last_use = self.uses

    def changed(self, session: ParkedSession) -> None:
        """Keep the books right: bytes, the index of tails, and no descriptor open for a session that is not live."""
        self._unindex(session)
        self.own_bytes += session.size_bytes - session.counted_bytes
        session.counted_bytes = session.size_bytes
        if session.root is not None:
            tail = session.block_name(session.restorable().sealed - 1)
            self.tails.setdefault(tail, set()).add(session.name)
            self._tail_of[session.name] = tail
        if not session.pins:
            session.close()

    def _unindex(self, session: ParkedSession) -> None:
        tail = self._tail_of.pop(session.name, b"")
        names = self.tails.get(tail, set())
        names.discard(session.name)
        if not names:
            self.tails.pop(tail, None)

    def remove(self, session: ParkedSession) -> None:
        """The log first: without it the rest is an orphan, which the next start removes."""
        needs = list(session.needs())
        with reaching(self.folder):
            session.log.file.remove()
        self._unindex(session)
        del self.sessions[session.name]
        self.own_bytes -= session.counted_bytes
        with suppress(OSError):
            session.remove_rows()
        self.blocks.release(needs, session.name)

    def checked_rows(self, session: ParkedSession) -> list[str]:
        notes = [f"session {session.name}: {note}" for note in session.check_rows()]
        for note in notes:
            self.report(note)
        return notes

    def last_used(self, names: Collection[str]) -> list[str]:
        return sorted(names, key=lambda name: (-self.sessions[name].last_use, name))

    def _remove_all(self, folder: Path) -> None:
        """The blocks of another build of the model: nothing is restored from them any more."""
        for text in self.disk.names(folder):
            self.disk.unlink(folder / text)

    def _recall(self) -> None:
        """Open every session that is here, and remove what belongs to none."""
        rows: dict[str, list[int]] = {}
        logs: list[tuple[int, str]] = []
        for text in self.disk.names(self.folder):
            facts, match = self.disk.facts(self.folder / text), _FILE.fullmatch(text)
            if match and match[2] and facts:
                rows.setdefault(match[1], []).append(int(match[2]))
            elif match and facts:
                logs.append((facts.mtime_s, match[1]))
            elif text.startswith(PART_PREFIX):
                self.disk.unlink(self.folder / text)
        for _, key in sorted(logs):
            self._recall_session(key, rows)
        for key, blocks in rows.items():
            for block in blocks:
                self.disk.unlink(self.folder / f"{key}.{block}{ROWS_SUFFIX}")
        self.blocks.remove_unowned()

    def _recall_session(self, key: str, rows: dict[str, list[int]]) -> None:
        path = self.folder / f"{key}{LOG_SUFFIX}"
        try:
            log = TokenLog.open(self.disk, path)
            if key_of(log.name) != key:
                raise RefusedError(f"session log {path.name}", f"the log of session {log.name}", "its own")
        except RefusedError as error:
            self.report(f"{error}; removed")
            self.disk.unlink(path)
            return
        session = ParkedSession(self.disk, self.folder, self.kv_format, self.blocks, log)
        if log.cut_bytes:
            self.report(f"session {log.name}: {log.cut_bytes} bytes at the end of its log are not sound; {len(log.ids)} ids are")
        for note in session.recall(rows.pop(key, [])):
            self.report(f"session {log.name}: {note}")
        self.sessions[log.name] = session
        self.blocks.retain(session.needs(), log.name)
        self.use(session)
        self.changed(session)
        if not session.named and not session.restorable().tokens:
            self.remove(session)
