"""The sessions that outlive the power: what a board keeps of every conversation, and how it finds it again.

Owns the folders ``sessions`` (a log of ids and the last rows of each session) and ``blocks-<fingerprint>`` (sealed blocks and
preludes, shared).  Rules:

* A session is its token ids; its KV is what can be restored of them (``kv_tiers.restorable``).  Ids survive an update that
  changes the model's fingerprint, KV does not: the session is then told to be prefilled again.
* What ``append``, ``prompt``, ``seal`` and ``prelude`` wrote survives ``kill -9`` when they return, and a power cut when ``sync``
  returned after them.  A block's rows are removed only when its sealed form is durable, and sealed blocks that the window has
  left only when what came after them is.
* ``load`` gives only bytes that were checked. What is damaged is removed and reported, and the sound prefix before it is given.
* ``ram_bytes`` and ``disk_bytes`` hold always.  When the disk's is used up, whole sessions give way that are not pinned, in the
  order of ``kv_tiers.first_to_go``.  A named one gives up its KV but keeps its ids, and only for a named one that is here
  already: who is new, or has no name, is refused instead.
* Sessions without a name are called ``~<hex>`` (``new_name``).  No file is called what a user typed.
* One process owns the folder. Methods may be called from several threads; ``sync`` and ``load`` are meant for one.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from edge_agent.core.chat import Tier
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, KvFormat, block_start
from edge_agent.core.values import DIGEST_BYTES, SESSION_NAME, checked
from edge_agent.store.files import Disk, reaching
from edge_agent.store.kv_blocks import NO_PARENT, file_bytes
from edge_agent.store.kv_held import Held, KeptSession, Loaded, common, parent_name
from edge_agent.store.kv_journal import MAX_HEAD_BYTES, added_bytes
from edge_agent.store.kv_match import begins_with_all_of, longest
from edge_agent.store.kv_parked import ParkedSession
from edge_agent.store.kv_registry import Registry
from edge_agent.store.kv_room import Room
from edge_agent.store.kv_tiers import Restorable, Speeds, restorable

__all__ = ["Held", "KeptSession", "Loaded", "SessionStore"]

MAX_DAMAGES = 1024
"""After so many damaged files in one session, nothing of it is restored."""
UNNAMED = re.compile(r"~[0-9a-f]{1,32}")


class SessionStore:
    """The parked sessions of one model in ``folder``.

    ``report`` is told every damage in one line.  Opening it reads the logs of ids, lists the blocks, and removes what a crash
    left.  Raises ``UnavailableError`` if the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        kv_format: KvFormat,
        ram_bytes: int,
        disk_bytes: int,
        disk: Disk | None = None,
        report: Callable[[str], object] = lambda line: None,
    ) -> None:
        with reaching(folder):
            self.registry = Registry(folder, kv_format, ram_bytes, disk or Disk(), report)
        self._room = Room(self.registry, disk_bytes)
        self._lock = self.registry.lock
        self._room.shrink()

    @property
    def speeds(self) -> Speeds:
        """What was measured of this board, for the tier rule and the eviction rule; whoever measures puts new ones here."""
        return self._room.speeds

    @speeds.setter
    def speeds(self, speeds: Speeds) -> None:
        self._room.speeds = speeds

    def names(self) -> list[str]:
        """Of all sessions, the last used first."""
        with self._lock:
            return sorted(self.registry.sessions, key=lambda name: (-self.registry.sessions[name].last_use, name))

    def kept(self, most: int) -> list[KeptSession]:
        """The named sessions that were used last, the last one first; it is no use of them."""
        with self._lock:
            named = [name for name in self.names() if self.registry.sessions[name].named]
            return [self._account(self.registry.sessions[name]) for name in named[:most]]

    @staticmethod
    def new_name() -> str:
        """For a session that its client gives none."""
        return f"~{token_hex(16)}"

    @property
    def bytes_on_disk(self) -> int:
        with self._lock:
            return self.registry.bytes_on_disk

    @property
    def free_bytes(self) -> int:
        """Of the disk's budget, what no session uses."""
        with self._lock:
            return self._room.free_bytes

    def bytes_of(self, name: str) -> int:
        """On disk, of everything that this session needs, shared or not. Raises ``UnavailableError`` if it is not here."""
        with self._lock:
            return self.registry.bytes_of(self.registry.get(name))

    @property
    def bytes_in_ram(self) -> int:
        return self.registry.blocks.bytes_in_ram

    def create(self, name: str) -> None:
        """A new session without tokens. Raises ``RefusedError`` for a name that is taken or not allowed, ``UnavailableError``."""
        with self._lock:
            self.found(name, (), 0, None)

    def resume(self, name: str, limit: int | None = None) -> Held | None:
        """What is here of the session, of at most ``limit`` tokens; ``None`` if there is none of this name."""
        with self._lock:
            session = self.registry.sessions.get(name)
            if session is None:
                return None
            self.registry.use(session)
            notes = self.registry.checked_rows(session)
            if session.log.fingerprint != self.registry.kv_format.fingerprint:
                notes.append(f"session {name} was computed by another build of the model: its tokens must be prefilled again")
            return self.held(session, session.restorable(limit), True, tuple(notes))

    def look(self, name: str) -> Held | None:
        """What ``resume`` would say, at no cost: it is no use of the session, and rows found at the start are not checked yet."""
        with self._lock:
            session = self.registry.sessions.get(name)
            return self.held(session, session.restorable(), True, ()) if session else None

    def match(self, ids: Sequence[int]) -> Held | None:
        """The longest prefix of ``ids`` whose KV any session left here; ``None`` if not even a prelude is.

        It has at most ``len(ids) - 1`` tokens: the last one has to be computed for its logits.

        Costs a hash for each 64 ids, and a comparison of at most 127 ids with each of few sessions.
        """
        with self._lock:
            match = longest(self.registry, ids)
            if match is None:
                return None
            here, (root, *names), found = match
            if found:
                session = self.registry.sessions[found]
                self.registry.use(session)
                whole = begins_with_all_of(self.registry, found, ids, block_start(here.sealed))
                return self.held(session, here, whole, ())
            blocks = tuple(names[block] for block in here.window(self.registry.kv_format.window_blocks))
            tier = self._tier(here, root, blocks)
            return Held("", array("I", ids[: here.tokens]), here.tokens, here.sealed, root, blocks, False, tier)

    def load(self, held: Held) -> Loaded:
        """The KV bytes of ``held``, every one checked; of a shorter prefix, with notes, if something is damaged or gone."""
        notes: list[str] = []
        while (here := self._still_here(held, held.tokens)).tokens and len(notes) < MAX_DAMAGES:
            try:
                return self._read(held, here, notes)
            except (RefusedError, UnavailableError) as error:
                notes.append(f"session {held.name}: {error}; what follows it must be computed again")
                self.registry.report(notes[-1])
        return Loaded(0, 0, b"", (), b"", Tier.NONE, tuple(notes))

    def fork(self, held: Held, tokens: int, name: str) -> Held:
        """A new session ``name`` of the first ``tokens`` ids of ``held``, with as much of their KV as can be restored.

        Sealed blocks are shared, rows are copied. Raises as ``create`` does.
        """
        if not 0 <= tokens <= len(held.ids):
            raise ValueError(f"{tokens} tokens of a session of {len(held.ids)}")
        with self._lock:
            here = self._still_here(held, min(tokens, held.tokens))
            rows = self._rows_of(held, here)
            session = self.found(name, held.ids[:tokens], len(rows), held)
            names = self.names_of(held)
            session.sealed = {block: names[block] for block in here.window(self.registry.kv_format.window_blocks)}
            self.registry.blocks.retain(session.needs(), name)
            try:
                with self.writing(session, 0):
                    session.append_rows(block_start(here.sealed), rows)
            except UnavailableError:
                self.registry.remove(session)
                raise
            return self.held(session, session.restorable(), True, ())

    def append(self, name: str, position: int, ids: Sequence[int], rows: bytes | memoryview = b"", first_row: int = 0) -> None:
        """Acknowledged ``ids`` at the end of the session, and packed ``rows`` of the positions from ``first_row`` on.

        Written, not synced: it survives this process, not a power cut.  ``position``: how many ids the session has; anything
        else is the caller's bug (``ValueError``), as are rows past the ids or with a gap before them.  Rows that are here
        already are not written twice.  Raises ``UnavailableError``.
        """
        with self._lock:
            session = self.registry.get(name)
            if position != len(session.ids):
                raise ValueError(f"ids at position {position} of session {name}, which has {len(session.ids)}")
            with self.writing(session, session.append_bytes(len(ids), len(rows))):
                if ids:
                    session.append_ids(position, ids)
                if rows:
                    self.registry.checked_rows(session)
                    session.append_rows(first_row, rows)

    def prompt(self, name: str, ids: Sequence[int]) -> None:
        """Ids that are to be computed next, at the end of the session. Raises as ``append`` does."""
        with self._lock:
            self.append(name, len(self.registry.get(name).ids), ids)

    def rewind(self, name: str, tokens: int) -> None:
        """Forget the ids from position ``tokens`` on, and their KV. Raises ``UnavailableError``."""
        with self._lock:
            session = self.registry.get(name)
            if tokens < len(session.ids):
                with self.writing(session, session.append_bytes(0, 0)):
                    self.registry.blocks.release(session.append_ids(tokens, ()), name)

    def prelude(self, name: str, payload: bytes) -> None:
        """The sinks of a session of at least 4 ids. Raises ``RefusedError`` for another size, ``UnavailableError``."""
        with self._lock:
            session = self.registry.get(name)
            root = session.block_name(-1)
            stamp_bytes = session.append_bytes(DIGEST_BYTES, 0)
            with self.writing(session, self._new_bytes(root, SINK_TOKENS) + stamp_bytes):
                self.registry.blocks.put(root, NO_PARENT, session.ids[:SINK_TOKENS], payload, name)
                if session.log.fingerprint != self.registry.kv_format.fingerprint:
                    session.log.stamp(self.registry.kv_format.fingerprint)

    def seal(self, name: str, block: int, payload: bytes) -> None:
        """The sealed form of a block whose ids are all here. Written, not synced. Raises as ``prelude`` does."""
        with self._lock:
            session = self.registry.get(name)
            block_name, parent = session.block_name(block), session.block_name(block - 1)
            ids = session.ids[block_start(block) : block_start(block + 1)]
            with self.writing(session, self._new_bytes(block_name, BLOCK_TOKENS)):
                self.registry.blocks.put(block_name, parent, ids, payload, name)
                session.sealed[block] = block_name

    def sync(self, name: str) -> None:
        """Make durable what was written for the session before this call, then remove what it replaces.

        Blocking, meant for a thread; safe beside ``append`` and ``seal``. Raises ``UnavailableError``: nothing was removed then.
        """
        with self._lock:
            session = self.registry.get(name)
            files, needs = session.files(), list(session.needs())
        try:
            self.registry.blocks.sync(needs)
            for file in files:
                with reaching(file.path):
                    file.sync()
        except UnavailableError:
            with self._lock:
                session.distrust()
            raise
        with self._lock:
            if self.registry.sessions.get(name) is session:
                with reaching(self.registry.folder):
                    session.drop_sealed_rows()
                self.registry.blocks.release(session.forget_before_window(), name)
                self.registry.changed(session)

    def drop(self, name: str) -> None:
        """Forget the session, durably. Nothing to do if there is none. Raises ``UnavailableError``."""
        with self._lock:
            if name in self.registry.sessions:
                self.registry.remove(self.registry.sessions[name])
                with reaching(self.registry.folder):
                    self.registry.disk.fsync_folder(self.registry.folder)

    def pin(self, name: str) -> None:
        """Keep the session from giving way until ``unpin`` was called as often. Raises ``UnavailableError`` if it is not here."""
        with self._lock:
            self.registry.get(name).pins += 1

    def unpin(self, name: str) -> None:
        """Take back one ``pin``. Raises ``RuntimeError`` when there is none."""
        with self._lock:
            session = self.registry.get(name)
            if not session.pins:
                raise RuntimeError(f"session {name} is not pinned")
            session.pins -= 1
            if not session.pins:
                session.close()

    def close(self) -> None:
        """Give the descriptors back. The store may be used again."""
        with self._lock:
            for session in self.registry.sessions.values():
                session.close()

    def found(self, name: str, ids: Sequence[int], kv_bytes: int, donor: Held | None) -> ParkedSession:
        """A new session of these ids, with room for so many bytes of KV. Raises as ``create`` does; for this package."""
        if not UNNAMED.fullmatch(name):
            checked(SESSION_NAME, "session", name)
        if name in self.registry.sessions:
            raise RefusedError("session", f"{name}, which exists", "a new name", "resume it or drop it")
        least_bytes = added_bytes(len(ids), kv_bytes // self.registry.kv_format.row_bytes, kv_bytes) + MAX_HEAD_BYTES
        self._room.make(name, least_bytes, {donor.name} if donor else set(), spares_named=True)
        return self.registry.create(name, ids)

    @contextmanager
    def writing(self, session: ParkedSession, size_bytes: int) -> Iterator[None]:
        """Have room for so many more bytes, and the books right afterwards."""
        self._room.make(session.name, size_bytes, {session.name}, spares_named=not session.named)
        try:
            with reaching(self.registry.folder):
                yield
        finally:
            self.registry.changed(session)

    def _new_bytes(self, name: bytes, ids: int) -> int:
        return 0 if name in self.registry.blocks else file_bytes(self.registry.kv_format, ids)

    def held(self, session: ParkedSession, here: Restorable, whole: bool, notes: tuple[str, ...]) -> Held:
        blocks, root = session.window(here), session.root or b""
        return Held(
            session.name, session.ids[:], here.tokens, here.sealed, root, blocks, whole, self._tier(here, root, blocks), notes
        )

    def _account(self, session: ParkedSession) -> KeptSession:
        here = session.restorable()
        tier = self._tier(here, session.root or b"", session.window(here))
        return KeptSession(session.name, here.tokens, self.registry.bytes_of(session), tier, session.used_s)

    def _tier(self, here: Restorable, root: bytes, blocks: Sequence[bytes]) -> Tier:
        if not here.tokens:
            return Tier.NONE
        return Tier.RAM if all(self.registry.blocks.in_ram(name) for name in (root, *blocks)) else Tier.DISK

    def names_of(self, held: Held) -> dict[int, bytes]:
        """By number: the sealed blocks of its window, and those before it that its session has kept (a block that a power cut
        may still take keeps those that it pushed out of the window).
        """
        names = dict(zip(range(held.sealed - len(held.blocks), held.sealed), held.blocks, strict=True))
        session = self.registry.sessions.get(held.name)
        if session and held.blocks and session.sealed.get(held.sealed - 1) == held.blocks[-1]:
            names = {block: name for block, name in session.sealed.items() if block < held.sealed} | names
        return names

    def _still_here(self, held: Held, limit: int) -> Restorable:
        """What can be restored now of what was held."""
        with self._lock:
            names = self.names_of(held)
            sealed = {block for block, name in names.items() if name in self.registry.blocks}
            rows: dict[int, int] = {}
            session = self.registry.sessions.get(held.name)
            for block, each in session.rows.items() if session else ():
                if each.parent == parent_name(held, names, block):
                    place = slice(block_start(block), block_start(block) + each.count)
                    rows[block] = common(self.registry.sessions[held.name].ids[place], held.ids[place])
            return restorable(limit, self.registry.kv_format.window_blocks, held.root in self.registry.blocks, sealed, rows)

    def _read(self, held: Held, here: Restorable, notes: Sequence[str]) -> Loaded:
        with self._lock:
            names = self.names_of(held)
        prelude, tier = self.registry.blocks.read(held.root)
        blocks = []
        for block in here.window(self.registry.kv_format.window_blocks):
            payload, block_tier = self.registry.blocks.read(names[block])
            blocks.append(payload)
            tier = Tier.DISK if Tier.DISK in (tier, block_tier) else tier
        with self._lock:
            rows = self._rows_of(held, here)
        return Loaded(here.tokens, here.sealed, prelude, tuple(blocks), rows, tier, tuple(notes))

    def _rows_of(self, held: Held, here: Restorable) -> bytes:
        if here.tokens <= block_start(here.sealed):
            return b""
        return self.registry.get(held.name).read_rows(here)
