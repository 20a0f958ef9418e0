"""The ledger: what a board must still know after a power cut, in one SQLite file.

Owns counters, high-water marks, documents, the inbox (requests that were accepted and what was answered) and the outbox
(what is owed to others); the receipts that were signed have a room of their own (``store.receipts``).  Rules:

* What returned, or left ``transaction()``, is durable (WAL, ``synchronous=FULL``); what raised changed nothing.  Calls
  inside one ``transaction()`` become durable together, by one fsync.
* A high-water mark never goes down, and never vanishes silently: a ledger that is damaged, or gone though it was there, is
  refused; only ``unsafe_start_over`` begins a new one, and keeps the bad one beside it.
* Everything is bounded by ``Bounds``.  A full inbox or outbox pushes back with ``UnavailableError``; nothing is dropped but
  old answers, and no answer whose delivery is still owed, and old receipts.
* A request id is accepted once, an owed key is owed once, for as long as the ledger remembers them.
* One process at a time, from one thread at a time.  The lock belongs to the open file: a child that was forked without
  exec holds it too.
* An ``sqlite3.Error`` never leaves here: a full, failing or read-only disk is ``UnavailableError``, damage ``RefusedError``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import bounded
from edge_agent.store.database import Database
from edge_agent.store.entries import (
    MAX_BATCH_BYTES,
    MAX_DOCUMENT_BYTES,
    MAX_ENTRY_BYTES,
    MAX_INTEGER,
    MAX_NAMES,
    Bounds,
    Owed,
    checked_name,
    checked_size,
)
from edge_agent.store.receipts import SCHEMA as _SCHEMA_2
from edge_agent.store.receipts import Receipts

__all__ = ["Bounds", "Ledger", "Owed"]

_SCHEMA_1 = (
    "CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE high_water (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE document (name TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT",
    """CREATE TABLE inbox (
        number INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL UNIQUE, envelope BLOB NOT NULL
    ) STRICT""",
    """CREATE TABLE outbox (
        ticket INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, topic TEXT NOT NULL, payload BLOB NOT NULL,
        correlation BLOB, response_topic TEXT, expiry_s INTEGER
    ) STRICT""",
    "CREATE TABLE delivered (ticket INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE) STRICT",
    """CREATE TABLE answered (
        number INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL UNIQUE, accepted INTEGER NOT NULL,
        answer BLOB NOT NULL, owed_ticket INTEGER REFERENCES outbox (ticket) ON DELETE SET NULL
    ) STRICT""",
    "CREATE INDEX answered_owed ON answered (owed_ticket) WHERE owed_ticket IS NOT NULL",
    "CREATE INDEX answered_free ON answered (number) WHERE owed_ticket IS NULL",
)
MIGRATIONS = (_SCHEMA_1, _SCHEMA_2)
"""Never change a step that was released: add one."""
SCHEMA = len(MIGRATIONS)
USABLE_FROM = 2
"""The oldest schema whose agents can use a ledger of this one.  A step that only adds (tables, columns with a default), and bears
that an agent which does not know it writes meanwhile, leaves it; any other raises it to its own number (docs/self-update.md)."""

_USAGE = (
    ("unanswered", "inbox", "envelope"),
    ("answered", "answered", "answer"),
    ("owed", "outbox", "payload"),
    ("delivered", "delivered", "''"),
)
"""What counts against ``Bounds``: kind, table, column."""


class Ledger:
    """The ledger in the file ``path``, opened for this process alone; see ``Database`` for what opening raises.

    Every method raises ``UnavailableError`` when the disk is full, failing or read-only, and ``RefusedError`` for a name or
    data over its bound.
    """

    def __init__(self, path: Path, bounds: Bounds | None = None, unsafe_start_over: bool = False) -> None:
        self._bounds = bounds or Bounds()
        self._database = Database(path, MIGRATIONS, unsafe_start_over, USABLE_FROM)
        self._usage: dict[str, tuple[int, int]] = {}
        self.receipts = Receipts(self._database, self._bounds.receipts_count)

    @property
    def moved_aside(self) -> Path | None:
        """Where the bad file went if this ledger was started over."""
        return self._database.moved_aside

    def keep_room(self) -> str:
        """Take of the disk now what is needed while others fill it; why that cannot be had, empty if it is there."""
        return self._database.keep_room()

    def close(self) -> None:
        """May be called twice."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make everything inside durable together when the block ends, or nothing of it if it raises.

        Raises ``RuntimeError`` inside another one.
        """
        with self._forgetting_usage(), self._database.transaction():
            yield

    def count(self, name: str) -> int:
        """The counter ``name``; 0 before its first ``increment``."""
        return self._value("counter", name)

    def increment(self, name: str) -> int:
        """Add one to the counter ``name``; its new value."""
        with self._atomically():
            value = self.count(name) + 1
            self._put("counter", "value", name, value)
            return value

    def high_water(self, name: str) -> int:
        """The mark ``name``; 0 before it was first raised."""
        return self._value("high_water", name)

    def raise_high_water(self, name: str, value: int) -> None:
        """Raise the mark ``name`` to ``value``. Raises ``RefusedError`` (a rollback) when it is higher already."""
        bounded(f"high-water mark {name}", value, 0, MAX_INTEGER)
        with self._atomically():
            mark = self.high_water(name)
            if value < mark:
                raise RefusedError(f"high-water mark {name}", value, f"{mark} or more", "this is a rollback to an older state")
            if value > mark:
                self._put("high_water", "value", name, value)

    def document(self, name: str) -> bytes | None:
        """What was last put under ``name``."""
        rows = self._database.execute("SELECT data FROM document WHERE name = ?", checked_name("document", name))
        return rows[0][0] if rows else None

    def put_document(self, name: str, data: bytes) -> None:
        """Keep ``data``, at most ``MAX_DOCUMENT_BYTES``, under ``name`` in place of what was there."""
        checked_size(f"document {name}", data, MAX_DOCUMENT_BYTES)
        with self._atomically():
            self._put("document", "data", name, data)

    def accept(self, request_id: str, envelope: bytes) -> bool:
        """Take a request in; ``False``, and nothing done, when its id is known already, answered or not.

        Raises ``UnavailableError`` when the inbox is full.
        """
        checked_name("request id", request_id)
        checked_size(f"request {request_id}", envelope, min(MAX_ENTRY_BYTES, self._bounds.unanswered_bytes))
        with self._atomically():
            if self._known(request_id):
                return False
            self._must_have_room("unanswered", len(envelope), "answer requests first")
            self._database.execute("INSERT INTO inbox (request_id, envelope) VALUES (?, ?)", request_id, envelope)
            self._account("unanswered", 1, len(envelope))
            return True

    def unanswered(self, limit: int, after: str | None = None) -> list[tuple[str, bytes]]:
        """At most ``limit`` accepted requests without an answer, oldest first, as (id, envelope); those behind ``after``.

        Fewer when they are over ``MAX_BATCH_BYTES`` together: go on with the last id as ``after`` until nothing comes.
        Raises ``ValueError`` for an ``after`` that is not known.
        """
        first = 0 if after is None else self._accepted_as(after) + 1
        last = self._batch_end(
            "SELECT number, length(envelope) FROM inbox WHERE number >= ? ORDER BY number LIMIT ?", first, limit
        )
        return self._database.execute(
            "SELECT request_id, envelope FROM inbox WHERE number BETWEEN ? AND ? ORDER BY number", first, last
        )

    def answer(self, request_id: str, answer: bytes, owed: Owed | None) -> None:
        """Mark a request answered, keep ``answer`` for its duplicates, and owe ``owed``: together or not at all.

        Raises ``RuntimeError`` when the request is answered already or was never accepted, ``UnavailableError`` when the outbox
        is full, or full of answers that nobody has fetched yet.
        """
        checked_size(f"answer to {request_id}", answer, min(MAX_ENTRY_BYTES, self._bounds.answered_bytes))
        with self._atomically():
            rows = self._database.execute("SELECT number, length(envelope) FROM inbox WHERE request_id = ?", request_id)
            if not rows:
                state = "answered already" if self._known(request_id) else "not in the inbox"
                raise RuntimeError(f"request {request_id} is {state}")
            (number, envelope_bytes) = rows[0]
            ticket = self._owe(owed) if owed else None
            self._make_room_for_answer(len(answer))
            self._database.execute("DELETE FROM inbox WHERE number = ?", number)
            self._database.execute(
                "INSERT INTO answered (request_id, accepted, answer, owed_ticket)"
                " VALUES (?, ?, ?, (SELECT ticket FROM outbox WHERE ticket = ?))",
                *(request_id, number, answer, ticket),
            )
            self._account("unanswered", -1, -envelope_bytes)
            self._account("answered", 1, len(answer))

    def answer_of(self, request_id: str) -> bytes | None:
        """The answer that was given, as long as it is kept."""
        rows = self._database.execute("SELECT answer FROM answered WHERE request_id = ?", request_id)
        return rows[0][0] if rows else None

    def owe(self, owed: Owed) -> int:
        """Put a message in the outbox; its ticket. A key that is owed, or was delivered, keeps its ticket and first content.

        Raises ``UnavailableError`` when the outbox is full.
        """
        with self._atomically():
            return self._owe(owed)

    def owed(self, limit: int, after: int = 0) -> list[tuple[int, Owed]]:
        """At most ``limit`` messages that were not delivered, as (ticket, message), in the order in which they were owed.

        Fewer when they are over ``MAX_BATCH_BYTES`` together: go on with the last ticket as ``after`` until nothing comes.
        """
        sizes = "SELECT ticket, length(payload) FROM outbox WHERE ticket >= ? ORDER BY ticket LIMIT ?"
        rows = self._database.execute(
            "SELECT ticket, key, topic, payload, correlation, response_topic, expiry_s FROM outbox"
            " WHERE ticket BETWEEN ? AND ? ORDER BY ticket",
            *(after + 1, self._batch_end(sizes, after + 1, limit)),
        )
        return [(ticket, Owed(*columns)) for ticket, *columns in rows]

    def delivered(self, ticket: int) -> bool:
        """Take a message out of the outbox; ``False``, and nothing done, when it is not there (any more)."""
        with self._atomically():
            rows = self._database.execute("SELECT key, length(payload) FROM outbox WHERE ticket = ?", ticket)
            if not rows:
                return False
            (key, payload_bytes) = rows[0]
            self._database.execute("DELETE FROM outbox WHERE ticket = ?", ticket)
            self._account("owed", -1, -payload_bytes)
            if not self._has_room("delivered", 0):
                self._database.execute("DELETE FROM delivered WHERE ticket = (SELECT min(ticket) FROM delivered)")
                self._account("delivered", -1, 0)
            self._database.execute("INSERT INTO delivered (ticket, key) VALUES (?, ?)", ticket, key)
            self._account("delivered", 1, 0)
            return True

    def _owe(self, owed: Owed) -> int:
        known = "SELECT ticket FROM outbox WHERE key = ? UNION ALL SELECT ticket FROM delivered WHERE key = ?"
        rows = self._database.execute(known, owed.key, owed.key)
        if not rows:
            checked_size(f"owed payload of {owed.key}", owed.payload, self._bounds.owed_bytes)
            self._must_have_room("owed", len(owed.payload), "deliver what is owed first")
            rows = self._database.execute(
                "INSERT INTO outbox (key, topic, payload, correlation, response_topic, expiry_s)"
                " VALUES (?, ?, ?, ?, ?, ?) RETURNING ticket",
                *(owed.key, owed.topic, owed.payload, owed.correlation, owed.response_topic, owed.expiry_s),
            )
            self._account("owed", 1, len(owed.payload))
        return int(rows[0][0])

    def _make_room_for_answer(self, size_bytes: int) -> None:
        oldest = "SELECT number, length(answer) FROM answered WHERE owed_ticket IS NULL ORDER BY number LIMIT 1"
        while not self._has_room("answered", size_bytes):
            rows = self._database.execute(oldest)
            if not rows:
                raise self._full("answered", size_bytes, "deliver what is owed first: its answers are kept until then")
            self._database.execute("DELETE FROM answered WHERE number = ?", rows[0][0])
            self._account("answered", -1, -rows[0][1])

    def _known(self, request_id: str) -> bool:
        known = "SELECT 1 FROM inbox WHERE request_id = ? UNION ALL SELECT 1 FROM answered WHERE request_id = ?"
        return bool(self._database.execute(known, request_id, request_id))

    def _accepted_as(self, request_id: str) -> int:
        accepted = "SELECT number FROM inbox WHERE request_id = ? UNION ALL SELECT accepted FROM answered WHERE request_id = ?"
        rows = self._database.execute(accepted, request_id, request_id)
        if not rows:
            raise ValueError(f"request {request_id} is not known (any more)")
        return int(rows[0][0])

    def _batch_end(self, sizes: str, first: int, limit: int) -> int:
        """The last number of a batch that begins at ``first``; ``sizes`` selects numbers and their bytes, in order."""
        if limit < 1:
            raise ValueError(f"a limit of {limit}")
        last, total_bytes = first - 1, 0
        for number, size_bytes in self._database.execute(sizes, first, limit):
            total_bytes += size_bytes
            if total_bytes > MAX_BATCH_BYTES and last >= first:
                break
            last = number
        return last

    def _value(self, table: str, name: str) -> int:
        rows = self._database.execute(f"SELECT value FROM {table} WHERE name = ?", checked_name(table, name))
        return int(rows[0][0]) if rows else 0

    def _put(self, table: str, column: str, name: str, value: int | bytes) -> None:
        checked_name(table, name)
        if self._database.execute(f"UPDATE {table} SET {column} = ? WHERE name = ? RETURNING 1", value, name):
            return
        if self._database.execute(f"SELECT count(*) FROM {table}")[0][0] >= MAX_NAMES:
            raise RefusedError(f"{table} {name}", f"one more than {MAX_NAMES}", f"at most {MAX_NAMES} names")
        self._database.execute(f"INSERT INTO {table} (name, {column}) VALUES (?, ?)", name, value)

    def _must_have_room(self, kind: str, size_bytes: int, remedy: str) -> None:
        if not self._has_room(kind, size_bytes):
            raise self._full(kind, size_bytes, remedy)

    def _has_room(self, kind: str, size_bytes: int) -> bool:
        count, total_bytes = self._allowed(kind)
        return self._usage[kind][0] < count and self._usage[kind][1] + size_bytes <= total_bytes

    def _full(self, kind: str, size_bytes: int, remedy: str) -> UnavailableError:
        (count, total_bytes), (max_count, max_bytes) = self._usage[kind], self._allowed(kind)
        holds = f"holds {count} of {max_count} entries and {total_bytes} of {max_bytes} bytes"
        return UnavailableError(f"ledger, {kind}", f"no room for {size_bytes} bytes: {holds}", remedy)

    def _allowed(self, kind: str) -> tuple[int, int]:
        bounds = self._bounds
        return {
            "unanswered": (bounds.unanswered_count, bounds.unanswered_bytes),
            "answered": (bounds.answered_count, bounds.answered_bytes),
            "owed": (bounds.owed_count, bounds.owed_bytes),
            "delivered": (bounds.delivered_count, 0),
        }[kind]

    def _account(self, kind: str, count: int, size_bytes: int) -> None:
        used_count, used_bytes = self._usage[kind]
        self._usage[kind] = (used_count + count, used_bytes + size_bytes)

    def _counted(self, table: str, column: str) -> tuple[int, int]:
        count, size_bytes = self._database.execute(f"SELECT count(*), coalesce(sum(length({column})), 0) FROM {table}")[0]
        return count, size_bytes

    @contextmanager
    def _atomically(self) -> Iterator[None]:
        with self._forgetting_usage(), self._database.atomically():
            if not self._usage:
                self._usage = {kind: self._counted(table, column) for kind, table, column in _USAGE}
            yield

    @contextmanager
    def _forgetting_usage(self) -> Iterator[None]:
        """What is counted in memory is counted anew after a rollback."""
        try:
            yield
        except BaseException:
            self._usage = {}
            raise
