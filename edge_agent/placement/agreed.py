"""The agreed table as a value: its entries and bookings, its one encoding and its digest.

Rules: frozen; everything in it is ascending and there once; what is read is bounded by name before it is built, and is written
again and compared, so that a table has one encoding.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from typing import Any, NamedTuple

from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import (
    BOARD_ID,
    DIGEST_BYTES,
    MAX_BOARDS,
    MAX_TABLE_BYTES,
    MODEL_NAME,
    DataClass,
    TrustTier,
    bounded,
    checked,
)
from edge_agent.core.wanted import MAX_RATE_MHZ, Wanted

MAX_ENTRIES = 1_000
MAX_OPTIONS = 256
"""Of one entry."""
MAX_MODELS = 2**16
"""64 on each of 1,024 boards: every table that can be made can be read."""
MAX_TABLE_ITEMS = 2**17
MAX_FIGURE = 2**53
"""Costs, bookings and moves saturate here."""

_OPTION = struct.Struct(">HHHQ")
"""An option: index of the board, index of the model, share in per mille, cost in µs."""
_PART = struct.Struct(">HQ")
"""A part of a booking: index of the board where it comes in, work in µs."""
_TABLE = {
    1: ("facts_digest", bytes), 2: ("rules_digest", bytes), 3: ("moves", int), 4: ("move_bound", int), 5: ("boards", list),
    6: ("models", list), 7: ("entries", list), 8: ("bookings", list),
}  # fmt: skip


class Ranked(NamedTuple):
    """``share_permille`` of the class's demand goes there; ``cost_us``: what a request of it costs there at equilibrium."""

    board: str
    model: str
    share_permille: int
    cost_us: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Requests of class ``wanted`` that come in at ``ingress``: all feasible options, by (cost, model, board).

    No options: nothing may serve it. Else the shares are 1000 together, or less where KV memory does not hold all of it.
    """

    ingress: str
    wanted: Wanted
    rate_mhz: int
    options: tuple[Ranked, ...]


@dataclass(frozen=True, slots=True)
class Booking:
    """The work in µs that ``board`` is booked for within the horizon, by the board where it comes in."""

    board: str
    by_ingress: tuple[tuple[str, int], ...]

    @property
    def total_us(self) -> int:
        return sum(work_us for _, work_us in self.by_ingress)


@dataclass(frozen=True, slots=True)
class Table:
    """``entries`` by (ingress, class) and ``bookings`` by board, ascending. ``moves`` of at most ``move_bound`` settled it."""

    entries: tuple[Entry, ...] = ()
    bookings: tuple[Booking, ...] = ()
    facts_digest: bytes = bytes(DIGEST_BYTES)
    rules_digest: bytes = bytes(DIGEST_BYTES)
    moves: int = 0
    move_bound: int = 0
    _booked: Mapping[str, Mapping[str, int]] = field(init=False, repr=False, compare=False)
    _found: dict[tuple[str, Wanted], Entry] = field(init=False, repr=False, compare=False, default_factory=dict)
    _encoded: list[bytes] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_booked", {each.board: dict(each.by_ingress) for each in self.bookings})

    def entry(self, ingress: str, wanted: Wanted) -> Entry | None:
        """For requests of a class that come in at a board; ``None`` if it was not foreseen."""
        if not self._found:
            self._found.update({(each.ingress, each.wanted): each for each in self.entries})
        return self._found.get((ingress, wanted))

    def booked_us(self, board: str) -> int:
        """All the work that a board is booked for within the horizon."""
        return sum(self._booked.get(board, {}).values())

    def planned_us(self, ingress: str, board: str) -> int:
        """Of it, the work that comes in at ``ingress``."""
        return self._booked.get(board, {}).get(ingress, 0)

    @property
    def digest(self) -> bytes:
        """SHA-256 of ``encode()``."""
        return sha256(self.encode()).digest()

    def encode(self) -> bytes:
        """The one encoding of this table, for the ledger and the digest."""
        if not self._encoded:
            self._encoded.append(encode(_table_out(self)))
        return self._encoded[0]

    @classmethod
    def decode(cls, data: bytes) -> Table:
        """Inverse of ``encode``. Raises ``RefusedError`` naming the field for anything that ``encode`` does not write."""
        table = _table_in(data)
        if table.encode() != data:
            raise RefusedError("table", "another encoding", "what encode() writes: everything ascending, every name once")
        return table


EMPTY = Table()


def _table_out(table: Table) -> dict[int, object]:
    boards = {entry.ingress for entry in table.entries} | {each.board for each in table.bookings}
    boards |= {option.board for entry in table.entries for option in entry.options}
    boards |= {ingress for each in table.bookings for ingress, _ in each.by_ingress}
    models = {option.model for entry in table.entries for option in entry.options}
    board_at = {name: index for index, name in enumerate(sorted(boards))}
    model_at = {name: index for index, name in enumerate(sorted(models))}
    return {
        1: table.facts_digest, 2: table.rules_digest, 3: table.moves, 4: table.move_bound,
        5: list(board_at), 6: list(model_at),
        7: [_entry_out(entry, board_at, model_at) for entry in table.entries],
        8: [_booking_out(each, board_at) for each in table.bookings],
    }  # fmt: skip


def _booking_out(booking: Booking, board_at: Mapping[str, int]) -> list[object]:
    return [board_at[booking.board], b"".join([_PART.pack(board_at[of], work_us) for of, work_us in booking.by_ingress])]


def _entry_out(entry: Entry, board_at: Mapping[str, int], model_at: Mapping[str, int]) -> list[object]:
    w = entry.wanted
    options = b"".join(
        [_OPTION.pack(board_at[board], model_at[model], share, cost) for board, model, share, cost in entry.options]
    )
    wanted = [
        w.task, w.model, w.shape, w.size_bytes, w.deadline_us, w.quality_permille, w.energy_uj, int(w.trust), w.data.value,
    ]  # fmt: skip
    return [board_at[entry.ingress], wanted, entry.rate_mhz, options]


def _table_in(data: bytes) -> Table:
    value = decode(data, MAX_TABLE_BYTES, max_items=MAX_TABLE_ITEMS, subject="table")
    entry = fields(value, "table", _TABLE)
    boards = _names(entry["boards"], "table board", BOARD_ID, MAX_BOARDS)
    models = _names(entry["models"], "table model", MODEL_NAME, MAX_MODELS)
    for name in ("facts_digest", "rules_digest"):
        bounded(f"table {name} length", len(entry[name]), DIGEST_BYTES, DIGEST_BYTES, "bytes")
    entries = [_entry_in(each, boards, models) for each in list_of(entry["entries"], "table entries", list, MAX_ENTRIES)]
    bookings = [_booking_in(each, boards) for each in list_of(entry["bookings"], "table bookings", list, MAX_BOARDS)]
    _ascending("table entries", [(each.ingress, each.wanted) for each in entries])
    _ascending("table bookings", [each.board for each in bookings])
    return Table(
        tuple(entries),
        tuple(bookings),
        entry["facts_digest"],
        entry["rules_digest"],
        bounded("table moves", entry["moves"], 0, MAX_FIGURE),
        bounded("table move_bound", entry["move_bound"], 0, MAX_FIGURE),
    )


def _names(value: object, subject: str, pattern: re.Pattern[str], most: int) -> list[str]:
    return [checked(pattern, subject, name) for name in list_of(value, f"{subject}s", str, most)]


def _entry_in(value: list[Any], boards: list[str], models: list[str]) -> Entry:
    match value:
        case [int(ingress), list(wanted), rate_mhz, bytes(options)]:
            ranked = [_option_in(each, boards, models) for each in _unpacked(_OPTION, options, "table options", MAX_OPTIONS)]
            _ascending("table options", [(option.cost_us, option.model, option.board) for option in ranked])
            rate_mhz = bounded("table rate_mhz", rate_mhz, 1, MAX_RATE_MHZ, "mHz")
            return Entry(_at(boards, ingress, "table ingress"), _wanted_in(wanted), rate_mhz, tuple(ranked))
    raise RefusedError("table entry", shown(value), "[ingress, class, rate, packed options]")


def _wanted_in(value: list[Any]) -> Wanted:
    match value:
        case [str(task), str(model), shape, size_bytes, deadline_us, quality_permille, energy_uj, int(trust), str(data)]:
            tier = TrustTier(bounded("table trust", trust, TrustTier.CONTRAINDICATED, TrustTier.AFFIRMING))
            if data not in list(DataClass):
                raise RefusedError("table data class", shown(data), ", ".join(DataClass))
            return Wanted(task, model, shape, size_bytes, deadline_us, quality_permille, energy_uj, tier, DataClass(data))
    raise RefusedError("table class", shown(value), "its nine fields")


def _option_in(each: tuple[Any, ...], boards: list[str], models: list[str]) -> Ranked:
    board, model, share_permille, cost_us = each
    bounded("table share", share_permille, 0, 1000, "‰")
    bounded("table cost", cost_us, 0, MAX_FIGURE, "µs")
    return Ranked(_at(boards, board, "table option's board"), _at(models, model, "table option's model"), share_permille, cost_us)


def _booking_in(value: list[Any], boards: list[str]) -> Booking:
    match value:
        case [int(board), bytes(parts)]:
            unpacked = _unpacked(_PART, parts, "table booking", MAX_BOARDS)
            by_ingress = [(_at(boards, of, "table booking's ingress"), us) for of, us in unpacked]
            _ascending("table booking", [ingress for ingress, _ in by_ingress])
            for _, work_us in by_ingress:
                bounded("table booking", work_us, 0, MAX_FIGURE, "µs")
            return Booking(_at(boards, board, "table booking's board"), tuple(by_ingress))
    raise RefusedError("table booking", shown(value), "[board, packed parts]")


def _unpacked(form: struct.Struct, data: bytes, subject: str, most: int) -> list[tuple[Any, ...]]:
    if len(data) % form.size or len(data) > most * form.size:
        raise RefusedError(f"{subject} length", f"{len(data)} bytes", f"at most {most} times {form.size} bytes")
    return list(form.iter_unpack(data))


def _at(names: list[str], index: int, subject: str) -> str:
    return names[bounded(subject, index, 0, len(names) - 1)]


def _ascending(subject: str, keys: Sequence[Any]) -> None:
    for one, other in pairwise(keys):
        if not one < other:
            raise RefusedError(subject, f"{shown(one)} before {shown(other)}", "ascending, each once")
