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

import hashlib
import re
import threading
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from edge_agent.core.chat import Tier
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, KvFormat, block_start, chain, full_blocks, next_name
from edge_agent.core.values import DIGEST_BYTES, SESSION_NAME, checked
from edge_agent.store.files import PART_PREFIX, Disk, reaching
from edge_agent.store.kv_blocks import NO_PARENT, BlockFiles, file_bytes
from edge_agent.store.kv_journal import LOG_SUFFIX, MAX_HEAD_BYTES, ROWS_SUFFIX, Ids, TokenLog, added_bytes
from edge_agent.store.kv_manifest import Manifest
from edge_agent.store.kv_parked import ParkedSession, key_of
from edge_agent.store.kv_tiers import NOTHING, Parked, Restorable, Speeds, first_to_go, restorable

UNNAMED = re.compile(r"~[0-9a-f]{1,32}")
MAX_TAIL_CANDIDATES = 64
"""Sessions whose rows are compared with a prompt at one place, the last used first."""
_FILE = re.compile(rf"([0-9a-f]{{32}})(?:{re.escape(LOG_SUFFIX)}|\.(\d{{1,10}}){re.escape(ROWS_SUFFIX)})")


@dataclass(frozen=True, slots=True)
class Held:
    """A prefix of tokens whose KV the store holds.

    ``name``: the session it was found in ("" if only blocks without one are left).  ``ids``: all of that session's ids.
    ``tokens``: how many of them are in KV, as ``sealed`` sealed blocks and the rows after them.  ``root``, ``blocks``: names of
    the prelude and of the sealed blocks in the window.  ``whole``: the ids that were asked for begin with all of the session's,
    so that it may simply go on; otherwise ``fork`` it.  ``tier``: where it lies.  ``notes``: what a person should know.

    ``sealed`` is ``core.kv.sealed_blocks(tokens)`` for a session that is resumed, and one more where a match ends at the sealed
    block of another session, whose rows are gone: a ring that is restored must take the number from here.
    """

    name: str
    ids: Ids
    tokens: int
    sealed: int
    root: bytes
    blocks: tuple[bytes, ...]
    whole: bool
    tier: Tier
    notes: tuple[str, ...] = ()

    @property
    def pending(self) -> Ids:
        """Acknowledged ids that are not in KV."""
        return self.ids[self.tokens :]


@dataclass(frozen=True, slots=True)
class Loaded:
    """KV bytes of the first ``tokens`` tokens: what ``LanguageChild.open`` takes.

    ``prelude``: the sinks.  ``blocks``: the last min(``sealed``, window_blocks) sealed blocks, oldest first.  ``rows``: packed
    rows of the positions after them.  ``tier``: the slowest place that something was read from.
    """

    tokens: int
    sealed: int
    prelude: bytes
    blocks: tuple[bytes, ...]
    rows: bytes
    tier: Tier
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Missing:
    """What a moved session lacks: files by name, and whether its rows."""

    blocks: tuple[bytes, ...]
    rows: bool

    def __bool__(self) -> bool:
        return bool(self.blocks) or self.rows


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
        self._format, self._disk, self._report = kv_format, disk or Disk(), report
        self._budget_bytes, self._own_bytes = disk_bytes, 0
        self.speeds = Speeds()
        """What the eviction rule reckons with; whoever measures puts better ones here."""
        self._lock = threading.RLock()
        self._folder, self._uses = folder / "sessions", 0
        self._sessions: dict[str, ParkedSession] = {}
        self._tails: dict[bytes, set[str]] = {}
        """By the name of the last sealed block (or the prelude): the sessions that go on from there."""
        self._tail_of: dict[str, bytes] = {}
        with reaching(folder):
            self._disk.make_folder(self._folder)
            blocks = folder / f"blocks-{kv_format.fingerprint.hex()[:16]}"
            self._blocks = BlockFiles(blocks, kv_format, ram_bytes, self._disk)
            for text in self._disk.names(folder):
                if text.startswith("blocks-") and text != blocks.name:
                    self._remove_all(folder / text)
            self._recall()
            self._shrink()

    def names(self) -> list[str]:
        """Of all sessions, the last used first."""
        with self._lock:
            return sorted(self._sessions, key=lambda name: (-self._sessions[name].last_use, name))

    @staticmethod
    def new_name() -> str:
        """For a session that its client gives none."""
        return f"~{token_hex(16)}"

    @property
    def bytes_on_disk(self) -> int:
        with self._lock:
            return self._blocks.bytes_on_disk + self._own_bytes

    @property
    def free_bytes(self) -> int:
        """Of the disk's budget, what no session uses."""
        return max(0, self._budget_bytes - self.bytes_on_disk)

    def bytes_of(self, name: str) -> int:
        """On disk, of everything that this session needs, shared or not. Raises ``UnavailableError`` if it is not here."""
        with self._lock:
            session = self._session(name)
            return session.size_bytes + sum(map(self._blocks.size_bytes, session.needs()))

    @property
    def bytes_in_ram(self) -> int:
        return self._blocks.bytes_in_ram

    def create(self, name: str) -> None:
        """A new session without tokens. Raises ``RefusedError`` for a name that is taken or not allowed, ``UnavailableError``."""
        with self._lock:
            self._create(name, (), 0, None)

    def resume(self, name: str) -> Held | None:
        """What is here of the session; ``None`` if there is none of this name."""
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                return None
            self._use(session)
            notes = self._checked_rows(session)
            if session.log.fingerprint != self._format.fingerprint:
                notes.append(f"session {name} was computed by another build of the model: its tokens must be prefilled again")
            return self._held(session, session.restorable(), True, tuple(notes))

    def match(self, ids: Sequence[int]) -> Held | None:
        """The longest prefix of ``ids`` whose KV any session left here; ``None`` if not even a prelude is.

        It has at most ``len(ids) - 1`` tokens: the last one has to be computed for its logits.

        Costs a hash for each 64 ids, and a comparison of at most 127 ids with each of few sessions.
        """
        with self._lock:
            return self._match(ids)

    def load(self, held: Held) -> Loaded:
        """The KV bytes of ``held``, every one checked; of a shorter prefix, with notes, if something is damaged or gone."""
        notes: list[str] = []
        while True:
            with self._lock:
                here = self._still_here(held, held.tokens)
            if not here.tokens:
                return Loaded(0, 0, b"", (), b"", Tier.NONE, tuple(notes))
            try:
                return self._read(held, here, notes)
            except (RefusedError, UnavailableError) as error:
                note = f"session {held.name}: {error}; what follows it must be computed again"
                notes.append(note)
                self._report(note)

    def fork(self, held: Held, tokens: int, name: str) -> Held:
        """A new session ``name`` of the first ``tokens`` ids of ``held``, with as much of their KV as can be restored.

        Sealed blocks are shared, rows are copied. Raises as ``create`` does.
        """
        if not 0 <= tokens <= len(held.ids):
            raise ValueError(f"{tokens} tokens of a session of {len(held.ids)}")
        with self._lock:
            here = self._still_here(held, min(tokens, held.tokens))
            rows = self._rows_of(held, here)
            session = self._create(name, held.ids[:tokens], len(rows), held)
            names = self._names_of(held)
            session.sealed = {block: names[block] for block in here.window(self._format.window_blocks)}
            self._blocks.retain(session.needs(), name)
            try:
                with self._writing(session, 0):
                    session.append_rows(block_start(here.sealed), rows)
            except UnavailableError:
                self._remove(session)
                raise
            return self._held(session, session.restorable(), True, ())

    def append(self, name: str, position: int, ids: Sequence[int], rows: bytes | memoryview = b"", first_row: int = 0) -> None:
        """Acknowledged ``ids`` at the end of the session, and packed ``rows`` of the positions from ``first_row`` on.

        Written, not synced: it survives this process, not a power cut.  ``position``: how many ids the session has; anything
        else is the caller's bug (``ValueError``), as are rows past the ids or with a gap before them.  Rows that are here
        already are not written twice.  Raises ``UnavailableError``.
        """
        with self._lock:
            session = self._session(name)
            if position != len(session.ids):
                raise ValueError(f"ids at position {position} of session {name}, which has {len(session.ids)}")
            with self._writing(session, session.append_bytes(len(ids), len(rows))):
                if ids:
                    session.append_ids(position, ids)
                if rows:
                    self._checked_rows(session)
                    session.append_rows(first_row, rows)

    def prompt(self, name: str, ids: Sequence[int]) -> None:
        """Ids that are to be computed next, at the end of the session. Raises as ``append`` does."""
        with self._lock:
            self.append(name, len(self._session(name).ids), ids)

    def rewind(self, name: str, tokens: int) -> None:
        """Forget the ids from position ``tokens`` on, and their KV. Raises ``UnavailableError``."""
        with self._lock:
            session = self._session(name)
            if tokens < len(session.ids):
                with self._writing(session, session.append_bytes(0, 0)):
                    self._blocks.release(session.append_ids(tokens, ()), name)

    def prelude(self, name: str, payload: bytes) -> None:
        """The sinks of a session of at least 4 ids. Raises ``RefusedError`` for another size, ``UnavailableError``."""
        with self._lock:
            session = self._session(name)
            root = session.block_name(-1)
            stamp_bytes = session.append_bytes(DIGEST_BYTES, 0)
            with self._writing(session, self._new_bytes(root, SINK_TOKENS) + stamp_bytes):
                self._blocks.put(root, NO_PARENT, session.ids[:SINK_TOKENS], payload, name)
                if session.log.fingerprint != self._format.fingerprint:
                    session.log.stamp(self._format.fingerprint)

    def seal(self, name: str, block: int, payload: bytes) -> None:
        """The sealed form of a block whose ids are all here. Written, not synced. Raises as ``prelude`` does."""
        with self._lock:
            session = self._session(name)
            block_name, parent = session.block_name(block), session.block_name(block - 1)
            ids = session.ids[block_start(block) : block_start(block + 1)]
            with self._writing(session, self._new_bytes(block_name, BLOCK_TOKENS)):
                self._blocks.put(block_name, parent, ids, payload, name)
                session.sealed[block] = block_name

    def sync(self, name: str) -> None:
        """Make durable what was written for the session before this call, then remove what it replaces.

        Blocking, meant for a thread; safe beside ``append`` and ``seal``. Raises ``UnavailableError``: nothing was removed then.
        """
        with self._lock:
            session = self._session(name)
            files, needs = session.files(), list(session.needs())
        try:
            self._blocks.sync(needs)
            for file in files:
                with reaching(file.path):
                    file.sync()
        except UnavailableError:
            with self._lock:
                session.distrust()
            raise
        with self._lock:
            if self._sessions.get(name) is session:
                with reaching(self._folder):
                    session.drop_sealed_rows()
                self._blocks.release(session.forget_before_window(), name)
                self._changed(session)

    def drop(self, name: str) -> None:
        """Forget the session, durably. Nothing to do if there is none. Raises ``UnavailableError``."""
        with self._lock:
            if name in self._sessions:
                self._remove(self._sessions[name])
                with reaching(self._folder):
                    self._disk.fsync_folder(self._folder)

    def export(self, name: str) -> Manifest:
        """What another board needs to know to take the session over; reads and checks every file of it.

        Raises ``UnavailableError`` if it is not here, ``RefusedError`` if it is too long to move.
        """
        held = self.resume(name)
        if held is None:
            raise UnavailableError(f"session {name}", "it is not in the store", "create it, or look at the names")
        loaded = self.load(held)
        ids, fingerprint = held.ids.tobytes(), self._format.fingerprint
        with self._lock:
            names = self._names_of(held)
        here = Restorable(loaded.tokens, loaded.sealed)
        blocks = [held.root, *(names[block] for block in here.window(self._format.window_blocks))] if here.tokens else []
        files = tuple(self._blocks.file(each)[-DIGEST_BYTES:] for each in blocks)
        return Manifest(name, fingerprint, ids, here.tokens, here.sealed, files, hashlib.sha256(loaded.rows).digest())

    def export_block(self, name: bytes) -> bytes:
        """The file of a prelude or a sealed block, checked. Raises ``RefusedError`` (damaged) or ``UnavailableError``."""
        return self._blocks.file(name)

    def export_rows(self, manifest: Manifest) -> bytes:
        """The packed rows of an exported session. Raises ``UnavailableError`` if it has moved on since."""
        with self._lock:
            session = self._session(manifest.name)
            here = session.restorable(manifest.tokens)
            if (
                here != (manifest.tokens, manifest.sealed)
                or session.ids[: here.tokens].tobytes() != manifest.ids[: 4 * here.tokens]
            ):
                raise UnavailableError(f"session {manifest.name}", "it has moved on since it was exported", "export it again")
            return session.read_rows(here)

    def adopt(self, manifest: Manifest) -> Held:
        """Take over a session: its ids now, its KV as it arrives. May be repeated; what is here already is not asked for.

        Raises ``RefusedError`` if the manifest does not fit this model, or a session of this name has other ids (drop it
        first); ``UnavailableError`` if there is no room for all of it.  ``pin`` it while it arrives.
        """
        manifest.must_fit(self._format)
        ids = array("I", manifest.ids)
        with self._lock:
            session = self._sessions.get(manifest.name)
            if session is None:
                session = self._create(manifest.name, ids, self._missing_bytes(manifest), None)
            elif session.ids != ids[: len(session.ids)]:
                got = f"ids that differ from those of session {manifest.name}, which is here"
                raise RefusedError("KV manifest", got, "ids that begin with them", "drop the session first")
            else:
                more = session.append_bytes(len(ids) - len(session.ids), 0)
                with self._writing(session, more + self._missing_bytes(manifest)):
                    session.append_ids(len(session.ids), ids[len(session.ids) :])
            here = [name for name in manifest.names(self._format) if name in self._blocks]
            self._take(session, manifest, here)
            return self._held(session, session.restorable(), True, ())

    def missing(self, manifest: Manifest) -> Missing:
        """What has to be fetched yet. Raises ``UnavailableError`` if the session was not adopted."""
        with self._lock:
            session = self._session(manifest.name)
            session.check_rows()
            blocks = tuple(name for name in manifest.names(self._format) if name not in self._blocks)
            here = {block: rows.count for block, rows in session.rows.items()}
            here |= {block: BLOCK_TOKENS for block, name in session.sealed.items() if name in self._blocks}
            have = sum(here.get(block, 0) for block in (manifest.sealed, manifest.sealed + 1))
            return Missing(blocks, have < manifest.tokens - block_start(manifest.sealed))

    def import_block(self, manifest: Manifest, name: bytes, data: bytes) -> None:
        """A file that another board's ``export_block`` gave. Written, not synced.

        Raises ``RefusedError`` for a block that the manifest does not name or other bytes than it names, ``UnavailableError``.
        """
        _, digest = manifest.names(self._format).get(name, (0, b""))
        if not digest:
            raise RefusedError("moved KV block", name.hex()[:16], "one that the manifest names")
        if data[-DIGEST_BYTES:] != digest:
            raise RefusedError(f"moved KV block {name.hex()[:16]}", "other bytes than the manifest names", "", "fetch it again")
        with self._lock:
            session = self._session(manifest.name)
            with self._writing(session, len(data)):
                self._blocks.put_file(name, data, session.name)
            self._take(session, manifest, [name])

    def import_rows(self, manifest: Manifest, data: bytes) -> None:
        """What another board's ``export_rows`` gave. Written, not synced. Raises as ``import_block`` does."""
        if len(data) != manifest.rows_bytes(self._format) or hashlib.sha256(data).digest() != manifest.rows:
            raise RefusedError("moved KV rows", f"{len(data)} bytes, not those that the manifest names", "", "fetch them again")
        with self._lock:
            session = self._session(manifest.name)
            with self._writing(session, session.append_bytes(0, len(data))):
                session.check_rows()
                session.append_rows(block_start(manifest.sealed), data)

    def pin(self, name: str) -> None:
        """Keep the session from giving way until ``unpin`` was called as often. Raises ``UnavailableError`` if it is not here."""
        with self._lock:
            self._session(name).pins += 1

    def unpin(self, name: str) -> None:
        """Take back one ``pin``. Raises ``RuntimeError`` when there is none."""
        with self._lock:
            session = self._session(name)
            if not session.pins:
                raise RuntimeError(f"session {name} is not pinned")
            session.pins -= 1
            if not session.pins:
                session.close()

    def close(self) -> None:
        """Give the descriptors back. The store may be used again."""
        with self._lock:
            for session in self._sessions.values():
                session.close()

    def _missing_bytes(self, manifest: Manifest) -> int:
        names = manifest.names(self._format).items()
        files = [
            file_bytes(self._format, SINK_TOKENS if block < 0 else BLOCK_TOKENS)
            for name, (block, _) in names
            if name not in self._blocks
        ]
        return sum(files) + manifest.rows_bytes(self._format)

    def _take(self, session: ParkedSession, manifest: Manifest, here: Sequence[bytes]) -> None:
        """These files are here, and the session needs them."""
        numbers = manifest.names(self._format)
        session.sealed |= {numbers[name][0]: name for name in here if numbers[name][0] >= 0}
        self._blocks.retain(session.needs(), session.name)
        self._changed(session)

    def _session(self, name: str) -> ParkedSession:
        if name not in self._sessions:
            raise UnavailableError(f"session {name}", "it is not in the store", "create it, or look at the names")
        return self._sessions[name]

    def _create(self, name: str, ids: Sequence[int], rows_bytes: int, donor: Held | None) -> ParkedSession:
        if not UNNAMED.fullmatch(name):
            checked(SESSION_NAME, "session", name)
        if name in self._sessions:
            raise RefusedError("session", f"{name}, which exists", "a new name", "resume it or drop it")
        path = self._folder / f"{key_of(name)}{LOG_SUFFIX}"
        least_bytes = added_bytes(len(ids), rows_bytes // self._format.row_bytes, rows_bytes) + MAX_HEAD_BYTES
        self._make_room(name, least_bytes, {donor.name} if donor else set(), spares_named=True)
        with reaching(path):
            log = TokenLog.create(self._disk, path, name, self._format.fingerprint, ids)
        session = ParkedSession(self._disk, self._folder, self._format, self._blocks, log)
        self._sessions[name] = session
        self._use(session)
        self._changed(session)
        return session

    @contextmanager
    def _writing(self, session: ParkedSession, size_bytes: int) -> Iterator[None]:
        """Have room for so many more bytes, and the books right afterwards."""
        self._make_room(session.name, size_bytes, {session.name}, spares_named=not session.named)
        try:
            with reaching(self._folder):
                yield
        finally:
            self._changed(session)

    def _new_bytes(self, name: bytes, ids: int) -> int:
        return 0 if name in self._blocks else file_bytes(self._format, ids)

    def _make_room(self, name: str, size_bytes: int, kept: Collection[str], spares_named: bool) -> None:
        while self.bytes_on_disk + size_bytes > self._budget_bytes:
            victim = first_to_go(self._may_give_way(kept, spares_named))
            if victim is None:
                named_bytes = sum(self.bytes_of(each.name) for each in self._sessions.values() if each.named or each.pins)
                reason = f"{size_bytes} bytes needed, {self.free_bytes} free of {self._budget_bytes}"
                reason += f", and at most {named_bytes} held by sessions that are named or live"
                raise UnavailableError(f"session {name}", f"no room for its KV: {reason}", "drop a session, or raise disk_bytes")
            self._give_way(self._sessions[victim.name])

    def _may_give_way(self, kept: Collection[str], spares_named: bool) -> Iterator[Parked]:
        for session in self._sessions.values():
            if session.pins or session.name in kept or (spares_named and session.named):
                continue
            freed = sum(rows.file.size_bytes for rows in session.rows.values()) if session.named else session.size_bytes
            freed += sum(self._blocks.size_bytes(name) for name in session.needs() if len(self._blocks.owners(name)) == 1)
            tokens = min(session.restorable().tokens, self._format.window_tokens)
            cost_us = self.speeds.prefill_us(tokens)
            yield Parked(session.name, session.named, freed, cost_us, self._uses - session.last_use)

    def _give_way(self, session: ParkedSession) -> None:
        """An unnamed session goes, a named one keeps its ids."""
        if not session.named:
            self._remove(session)
            return
        needs = list(session.needs())
        session.sealed.clear()
        with reaching(self._folder):
            session.remove_rows()
        self._blocks.release(needs, session.name)
        self._changed(session)
        self._report(f"session {session.name} gave up its KV for room; its {len(session.ids)} ids stay")

    def _use(self, session: ParkedSession) -> None:
        self._uses += 1
        session.last_use = self._uses

    def _changed(self, session: ParkedSession) -> None:
        """Keep the books right: bytes, the index of tails, and no descriptor open for a session that is not live."""
        self._unindex(session)
        self._own_bytes += session.size_bytes - session.counted_bytes
        session.counted_bytes = session.size_bytes
        if session.root is not None:
            tail = session.block_name(session.restorable().sealed - 1)
            self._tails.setdefault(tail, set()).add(session.name)
            self._tail_of[session.name] = tail
        if not session.pins:
            session.close()

    def _unindex(self, session: ParkedSession) -> None:
        tail = self._tail_of.pop(session.name, b"")
        names = self._tails.get(tail, set())
        names.discard(session.name)
        if not names:
            self._tails.pop(tail, None)

    def _remove(self, session: ParkedSession) -> None:
        """The log first: without it the rest is an orphan, which the next start removes."""
        needs = list(session.needs())
        with reaching(self._folder):
            session.log.file.remove()
        self._unindex(session)
        del self._sessions[session.name]
        self._own_bytes -= session.counted_bytes
        with suppress(OSError):
            session.remove_rows()
        self._blocks.release(needs, session.name)

    def _checked_rows(self, session: ParkedSession) -> list[str]:
        notes = [f"session {session.name}: {note}" for note in session.check_rows()]
        for note in notes:
            self._report(note)
        return notes

    def _held(self, session: ParkedSession, here: Restorable, whole: bool, notes: tuple[str, ...]) -> Held:
        blocks, root = session.window(here), session.root or b""
        return Held(
            session.name, session.ids[:], here.tokens, here.sealed, root, blocks, whole, self._tier(here, root, blocks), notes
        )

    def _tier(self, here: Restorable, root: bytes, blocks: Sequence[bytes]) -> Tier:
        if not here.tokens:
            return Tier.NONE
        return Tier.RAM if all(self._blocks.in_ram(name) for name in (root, *blocks)) else Tier.DISK

    def _match(self, ids: Sequence[int]) -> Held | None:
        limit = len(ids) - 1
        names = list(chain(self._format.fingerprint, ids[: max(0, limit)]))
        if not names or names[0] not in self._blocks:
            return None
        best, found = NOTHING, ""
        for sealed in self._restorable_counts(names):
            if block_start(sealed + 2) <= best.tokens:
                break
            for here, name in self._candidates(ids, limit, sealed, names[sealed]):
                if (here.tokens, here.canonical) > (best.tokens, best.canonical):
                    best, found = here, name
        blocks = tuple(names[block + 1] for block in best.window(self._format.window_blocks))
        session = self._sessions.get(found)
        if session is None:
            tier = self._tier(best, names[0], blocks)
            return Held("", array("I", ids[: best.tokens]), best.tokens, best.sealed, names[0], blocks, False, tier)
        self._use(session)
        return self._found(session, best, ids)

    def _restorable_counts(self, names: Sequence[bytes]) -> list[int]:
        """How many sealed blocks may be restored at once (their whole window is here), most first; ``names[0]`` is the root."""
        counts, run = [0], 0
        for sealed in range(1, len(names)):
            run = run + 1 if names[sealed] in self._blocks else 0
            if run >= min(sealed, self._format.window_blocks):
                counts.append(sealed)
        return counts[::-1]

    def _candidates(self, ids: Sequence[int], limit: int, sealed: int, parent: bytes) -> Iterator[tuple[Restorable, str]]:
        """What is restorable of ``ids`` with ``sealed`` sealed blocks, and the rows of each session that goes on from there."""
        start = block_start(sealed)
        yield Restorable(start, sealed), ""
        for name in self._last_used(self._tails.get(parent, ()))[:MAX_TAIL_CANDIDATES]:
            session = self._sessions[name]
            self._checked_rows(session)
            yield session.restorable(start + _common(session.ids[start : start + 2 * BLOCK_TOKENS], ids[start:limit])), name

    def _found(self, session: ParkedSession, here: Restorable, ids: Sequence[int]) -> Held:
        start = block_start(here.sealed)
        rest = session.ids[start:]
        whole = len(session.ids) <= len(ids) and _common(rest, ids[start : start + len(rest)]) == len(rest)
        return self._held(session, here, whole, ())

    def _last_used(self, names: Collection[str]) -> list[str]:
        return sorted(names, key=lambda name: (-self._sessions[name].last_use, name))

    def _names_of(self, held: Held) -> dict[int, bytes]:
        """By number: the sealed blocks of its window, and those before it that its session has kept (a block that a power cut
        may still take keeps those that it pushed out of the window).
        """
        names = dict(zip(range(held.sealed - len(held.blocks), held.sealed), held.blocks, strict=True))
        session = self._sessions.get(held.name)
        if session and held.blocks and session.sealed.get(held.sealed - 1) == held.blocks[-1]:
            names = {block: name for block, name in session.sealed.items() if block < held.sealed} | names
        return names

    def _still_here(self, held: Held, limit: int) -> Restorable:
        """What can be restored now of what was held."""
        names = self._names_of(held)
        sealed = {block for block, name in names.items() if name in self._blocks}
        rows: dict[int, int] = {}
        session = self._sessions.get(held.name)
        for block, each in session.rows.items() if session else ():
            if each.parent == _parent(held, names, block):
                place = slice(block_start(block), block_start(block) + each.count)
                rows[block] = _common(self._sessions[held.name].ids[place], held.ids[place])
        return restorable(limit, self._format.window_blocks, held.root in self._blocks, sealed, rows)

    def _read(self, held: Held, here: Restorable, notes: Sequence[str]) -> Loaded:
        with self._lock:
            names = self._names_of(held)
        prelude, tier = self._blocks.read(held.root)
        blocks = []
        for block in here.window(self._format.window_blocks):
            payload, block_tier = self._blocks.read(names[block])
            blocks.append(payload)
            tier = Tier.DISK if Tier.DISK in (tier, block_tier) else tier
        with self._lock:
            rows = self._rows_of(held, here)
        return Loaded(here.tokens, here.sealed, prelude, tuple(blocks), rows, tier, tuple(notes))

    def _rows_of(self, held: Held, here: Restorable) -> bytes:
        if here.tokens <= block_start(here.sealed):
            return b""
        return self._session(held.name).read_rows(here)

    def _shrink(self) -> None:
        """The budget may be smaller than it was; ids of named sessions stay even so."""
        try:
            self._make_room("of an earlier start", 0, (), spares_named=False)
        except UnavailableError as error:
            self._report(str(error))

    def _remove_all(self, folder: Path) -> None:
        """The blocks of another build of the model: nothing is restored from them any more."""
        for text in self._disk.names(folder):
            self._disk.unlink(folder / text)

    def _recall(self) -> None:
        """Open every session that is here, and remove what belongs to none."""
        rows: dict[str, list[int]] = {}
        logs: list[tuple[int, str]] = []
        for text in self._disk.names(self._folder):
            facts, match = self._disk.facts(self._folder / text), _FILE.fullmatch(text)
            if match and match[2] and facts:
                rows.setdefault(match[1], []).append(int(match[2]))
            elif match and facts:
                logs.append((facts.mtime_s, match[1]))
            elif text.startswith(PART_PREFIX):
                self._disk.unlink(self._folder / text)
        for _, key in sorted(logs):
            self._recall_session(key, rows)
        for key, blocks in rows.items():
            for block in blocks:
                self._disk.unlink(self._folder / f"{key}.{block}{ROWS_SUFFIX}")
        self._blocks.remove_unowned()

    def _recall_session(self, key: str, rows: dict[str, list[int]]) -> None:
        path = self._folder / f"{key}{LOG_SUFFIX}"
        try:
            log = TokenLog.open(self._disk, path)
            if key_of(log.name) != key:
                raise RefusedError(f"session log {path.name}", f"the log of session {log.name}", "its own")
        except RefusedError as error:
            self._report(f"{error}; removed")
            self._disk.unlink(path)
            return
        session = ParkedSession(self._disk, self._folder, self._format, self._blocks, log)
        if log.cut_bytes:
            self._report(f"session {log.name}: {log.cut_bytes} bytes at the end of its log are not sound; {len(log.ids)} ids are")
        for note in session.recall(rows.pop(key, [])):
            self._report(f"session {log.name}: {note}")
        self._sessions[log.name] = session
        self._blocks.retain(session.needs(), log.name)
        self._use(session)
        self._changed(session)
        if not session.named and not session.restorable().tokens:
            self._remove(session)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next(
        (at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right))
    )


def _parent(held: Held, names: dict[int, bytes], block: int) -> bytes:
    """The name of what comes before a block of what is held; b"" if that is not known."""
    if block == 0:
        return held.root
    if block == held.sealed + 1 and full_blocks(len(held.ids)) >= block:
        return next_name(_parent(held, names, held.sealed), held.ids[block_start(held.sealed) : block_start(block)])
    return names.get(block - 1, b"")
