"""The storage half of the peer tier: a session goes to another board and comes back, block by block.

The board that has it: ``export``, then ``export_block`` and ``export_rows`` for what the other asks for.  The board that wants
it: ``adopt``, then ``import_block`` and ``import_rows`` for all that is ``missing``, then the store's ``sync``.  Rules:

* Every byte that comes is checked against the manifest's digest, and a block also against its name, before it is written.
* A move may stop at any block, on either board, and goes on with what is missing.  What is here already is not asked for.
* Room for all of it is made when the session is adopted, so a move that cannot fit costs nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, block_start
from edge_agent.core.values import DIGEST_BYTES
from edge_agent.store.kv_blocks import file_bytes
from edge_agent.store.kv_held import Held
from edge_agent.store.kv_manifest import Manifest
from edge_agent.store.kv_parked import ParkedSession
from edge_agent.store.kv_sessions import SessionStore
from edge_agent.store.kv_tiers import Restorable


@dataclass(frozen=True, slots=True)
class Missing:
    """What a moved session lacks: files by name, and whether its rows."""

    blocks: tuple[bytes, ...]
    rows: bool

    def __bool__(self) -> bool:
        return bool(self.blocks) or self.rows


class PeerKv:
    """Moves sessions out of and into a ``SessionStore``; any number of these may exist over one."""

    def __init__(self, store: SessionStore) -> None:
        self._store, self._registry, self._format = store, store.registry, store.registry.kv_format

    def export(self, name: str) -> Manifest:
        """What another board needs to know to take the session over; reads and checks every file of it.

        Raises ``UnavailableError`` if it is not here, ``RefusedError`` if it is too long to move.
        """
        held = self._store.resume(name)
        if held is None:
            raise UnavailableError(f"session {name}", "it is not in the store", "create it, or look at the names")
        loaded = self._store.load(held)
        ids, fingerprint = held.ids.tobytes(), self._format.fingerprint
        with self._registry.lock:
            names = self._store.names_of(held)
        here = Restorable(loaded.tokens, loaded.sealed)
        blocks = [held.root, *(names[block] for block in here.window(self._format.window_blocks))] if here.tokens else []
        files = tuple(self._registry.blocks.file(each)[-DIGEST_BYTES:] for each in blocks)
        return Manifest(name, fingerprint, ids, here.tokens, here.sealed, files, hashlib.sha256(loaded.rows).digest())

    def export_block(self, name: bytes) -> bytes:
        """The file of a prelude or a sealed block, checked. Raises ``RefusedError`` (damaged) or ``UnavailableError``."""
        return self._registry.blocks.file(name)

    def export_rows(self, manifest: Manifest) -> bytes:
        """The packed rows of an exported session. Raises ``UnavailableError`` if it has moved on since."""
        with self._registry.lock:
            session = self._registry.get(manifest.name)
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
        with self._registry.lock:
            session = self._registry.sessions.get(manifest.name)
            if session is None:
                session = self._store.found(manifest.name, ids, self._missing_bytes(manifest), None)
            elif session.ids != ids[: len(session.ids)]:
                got = f"ids that differ from those of session {manifest.name}, which is here"
                raise RefusedError("KV manifest", got, "ids that begin with them", "drop the session first")
            else:
                more = session.append_bytes(len(ids) - len(session.ids), 0)
                with self._store.writing(session, more + self._missing_bytes(manifest)):
                    session.append_ids(len(session.ids), ids[len(session.ids) :])
            here = [name for name in manifest.names(self._format) if name in self._registry.blocks]
            self._take(session, manifest, here)
            return self._store.held(session, session.restorable(), True, ())

    def missing(self, manifest: Manifest) -> Missing:
        """What has to be fetched yet. Raises ``UnavailableError`` if the session was not adopted."""
        with self._registry.lock:
            session = self._registry.get(manifest.name)
            session.check_rows()
            blocks = tuple(name for name in manifest.names(self._format) if name not in self._registry.blocks)
            here = {block: rows.count for block, rows in session.rows.items()}
            here |= {block: BLOCK_TOKENS for block, name in session.sealed.items() if name in self._registry.blocks}
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
        with self._registry.lock:
            session = self._registry.get(manifest.name)
            with self._store.writing(session, len(data)):
                self._registry.blocks.put_file(name, data, session.name)
            self._take(session, manifest, [name])

    def import_rows(self, manifest: Manifest, data: bytes) -> None:
        """What another board's ``export_rows`` gave. Written, not synced. Raises as ``import_block`` does."""
        if len(data) != manifest.rows_bytes(self._format) or hashlib.sha256(data).digest() != manifest.rows:
            raise RefusedError("moved KV rows", f"{len(data)} bytes, not those that the manifest names", "", "fetch them again")
        with self._registry.lock:
            session = self._registry.get(manifest.name)
            with self._store.writing(session, session.append_bytes(0, len(data))):
                session.check_rows()
                session.append_rows(block_start(manifest.sealed), data)

    def _missing_bytes(self, manifest: Manifest) -> int:
        names = manifest.names(self._format).items()
        files = [
            file_bytes(self._format, SINK_TOKENS if block < 0 else BLOCK_TOKENS)
            for name, (block, _) in names
            if name not in self._registry.blocks
        ]
        return sum(files) + manifest.rows_bytes(self._format)

    def _take(self, session: ParkedSession, manifest: Manifest, here: Sequence[bytes]) -> None:
        """These files are here, and the session needs them."""
        numbers = manifest.names(self._format)
        session.sealed |= {numbers[name][0]: name for name in here if numbers[name][0] >= 0}
        self._registry.blocks.retain(session.needs(), session.name)
        self._registry.changed(session)
