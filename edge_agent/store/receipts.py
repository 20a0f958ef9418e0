"""The receipts that this board signed: the room of the ledger in which their chain lies.

Owns the table ``receipt``.  Rules:

* Counters go 1, 2, 3 and on without a gap; a receipt that is not the next one is the caller's bug, and nothing is changed.
* Bounded: the oldest give way, never the last one.  How many they were is told by the counter of the oldest that is left.
* What is kept here is bytes as they were signed; they are read by ``attest.receipts``.
"""

from __future__ import annotations

from edge_agent.core.values import MAX_RECEIPT_BYTES
from edge_agent.store.database import Database
from edge_agent.store.entries import MAX_BATCH_BYTES, checked_size

SCHEMA = ("CREATE TABLE receipt (counter INTEGER PRIMARY KEY, message BLOB NOT NULL) STRICT",)
MAX_BATCH = MAX_BATCH_BYTES // MAX_RECEIPT_BYTES
"""Receipts that one call of ``after`` gives at most."""


class Receipts:
    """The table in an open ``database``; at most ``max_count`` receipts are kept. Every method raises as the ledger's do."""

    def __init__(self, database: Database, max_count: int) -> None:
        self._database, self._max_count = database, max_count

    @property
    def newest(self) -> int:
        """The counter of the last receipt; 0 before the first."""
        return self._number("max")

    @property
    def oldest(self) -> int:
        """The counter of the oldest that is kept; 0 before the first."""
        return self._number("min")

    def append(self, counter: int, message: bytes) -> None:
        """Keep a signed receipt of at most ``MAX_RECEIPT_BYTES``. Raises ``RuntimeError`` unless ``counter`` is the next."""
        checked_size(f"receipt {counter}", message, MAX_RECEIPT_BYTES)
        with self._database.atomically():
            if counter != self.newest + 1:
                raise RuntimeError(f"receipt {counter} does not follow receipt {self.newest}")
            self._database.execute("INSERT INTO receipt (counter, message) VALUES (?, ?)", counter, message)
            self._database.execute("DELETE FROM receipt WHERE counter <= ?", counter - self._max_count)

    def get(self, counter: int) -> bytes | None:
        """The signed receipt of this counter, if it is kept."""
        rows = self._database.execute("SELECT message FROM receipt WHERE counter = ?", counter)
        return rows[0][0] if rows else None

    def after(self, counter: int, limit: int) -> list[tuple[int, bytes]]:
        """At most ``limit``, and ``MAX_BATCH``, of those behind ``counter`` as (counter, signed receipt), oldest first."""
        if limit < 1:
            raise ValueError(f"a limit of {limit}")
        return self._database.execute(
            "SELECT counter, message FROM receipt WHERE counter > ? ORDER BY counter LIMIT ?", counter, min(limit, MAX_BATCH)
        )

    def _number(self, function: str) -> int:
        return int(self._database.execute(f"SELECT coalesce({function}(counter), 0) FROM receipt")[0][0])
