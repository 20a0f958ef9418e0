"""What a board knows of all boards: one record and one standing a board, joined by version.

Rules: the join keeps the record with the larger ``(boot_epoch, sequence)`` and is commutative, associative and idempotent,
even over a board that signs two records with one version (the larger encoding stays); a board is gone only when that was
delivered (its will, its farewell), never because a local clock ran; the table is bounded, and the digest is a function of the
joined records alone.  A board's own record is joined like any other, as it was published, so that what is computed from all of
them is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from hashlib import sha256

from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_BOARDS
from edge_agent.gossip.presence import Presence, Standing
from edge_agent.gossip.record import BoardRecord


class FleetState:
    """``board``: this one; empty for who is none of them."""

    def __init__(self, board: str = "") -> None:
        self._board = board
        self._records: dict[str, BoardRecord] = {}
        self._heard_us: dict[str, int] = {}
        self._presence: dict[str, Presence] = {}
        self._signed: dict[tuple[str, type], bytes] = {}
        self.changes = 0
        """How often something new was taken in."""

    def join(self, record: BoardRecord, now_us: int = 0, signed: bytes = b"") -> bool:
        """Take in a record, and as its board ``signed`` it; ``False`` if one at least as new is held.

        Raises ``RefusedError`` when the table is full.
        """
        held = self._records.get(record.board)
        if held is not None and not _is_newer(record, held):
            return False
        self._bound(self._records, record.board)
        self._records[record.board] = record
        self._heard_us[record.board] = now_us
        self._signed[record.board, BoardRecord] = signed
        self.changes += 1
        return True

    def join_presence(self, presence: Presence, signed: bytes = b"") -> bool:
        """Take in a birth, farewell or will, as its board ``signed`` it; ``False`` if of an older boot, or if nothing is new."""
        held = self._presence.get(presence.board)
        if held == presence or (held is not None and held.boot_epoch > presence.boot_epoch):
            return False
        self._bound(self._presence, presence.board)
        self._presence[presence.board] = presence
        self._signed[presence.board, Presence] = signed
        self.changes += 1
        return True

    def keep_only(self, boards: Collection[str]) -> None:
        """Forget whoever is none of ``boards``."""
        for board in (self._records.keys() | self._presence.keys()) - set(boards):
            self._records.pop(board, None)
            self._heard_us.pop(board, None)
            self._presence.pop(board, None)
            self._signed.pop((board, BoardRecord), None)
            self._signed.pop((board, Presence), None)
            self.changes += 1

    def records(self) -> Iterator[BoardRecord]:
        """The newest record of every other board, in the order of their ids."""
        return iter([self._records[board] for board in sorted(self._records) if board != self._board])

    def all_records(self) -> Iterator[BoardRecord]:
        """The newest record of every board, this one's as it was published, in the order of their ids."""
        return iter([self._records[board] for board in sorted(self._records)])

    def version(self, board: str) -> tuple[int, int]:
        """Of the newest record of ``board``; lower than any there is, if none is held."""
        record = self._records.get(board)
        return record.version if record else (-1, -1)

    def standing(self, board: str) -> Standing:
        """What was last said of a board; a record without a word of presence counts as online."""
        presence = self.presence(board)
        return presence.standing if presence else Standing.ONLINE

    @property
    def knows_others(self) -> bool:
        """Is there a record of any board besides this one?"""
        return len(self._records) > (self._board in self._records)

    def presence(self, board: str) -> Presence | None:
        """What was last said of whether ``board`` is there, unless its record is of a later boot; ``None`` if nothing was."""
        held, record = self._presence.get(board), self._records.get(board)
        return None if held is None or (record is not None and record.boot_epoch > held.boot_epoch) else held

    def signed(self, board: str) -> bytes:
        """What a board said of itself that counts most, as it signed it, for who did not hear it: that it is gone, or else its
        record. Empty if that is not held."""
        return self._signed.get((board, BoardRecord if self.standing(board) is Standing.ONLINE else Presence), b"")

    def heard_us(self, board: str) -> int:
        """When the newest record of ``board`` came in, on this board's monotonic clock."""
        return self._heard_us.get(board, 0)

    def digest(self) -> bytes:
        """SHA-256 over the joined records: equal on any two boards that joined the same set."""
        return sha256(encode([record.to_map() for record in self.all_records()])).digest()

    def _bound(self, table: dict[str, BoardRecord] | dict[str, Presence], board: str) -> None:
        if board not in table and len(table) >= MAX_BOARDS:
            raise RefusedError(f"board {board}", f"a fleet of {len(table)} boards already", f"at most {MAX_BOARDS} boards")


def _is_newer(record: BoardRecord, held: BoardRecord) -> bool:
    if record.version != held.version or record == held:
        return record.version > held.version
    return encode(record.to_map()) > encode(held.to_map())
