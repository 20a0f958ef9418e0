"""What the steps of one call of the engine child gave each turn, as values and as bytes: one event a turn.

Rules: frozen; no NumPy, for both sides of the doorbell read this.  An event's body is a short list; its bulk bytes (packed rows,
sealed blocks, the prelude) lie one after another in the reply's bulk in the order of the events, so sizes alone place them.
The agent decodes strictly: every id, size and position is checked against the model's shape.

What a session holds after an event is a function of the event: ``tokens`` ids lie in KV, and the last of ``ids`` does not yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edge_agent.core.chat import Finish
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS, MAX_TOKENS, full_blocks
from edge_agent.core.model_shape import ModelShape
from edge_agent.core.values import bounded

MAX_EVENT_IDS = 256
"""Ids that one call may give one turn; a step makes one and what was guessed."""
MAX_BURST_IDS = 64
"""After so many ids, of all turns, a call makes no further step; so what is told fits the arena."""
MAX_BURST_US = 1_000_000
MAX_EVENT_CHARS = 65_536
MAX_EVENT_SEALED = 2
MAX_EVENT_ROWS = 2 * BLOCK_TOKENS
MAX_FAILURE_CHARS = 400


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A block in its immutable int4 form: ``payload`` has ``ModelShape.block_bytes`` bytes."""

    block: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class TurnEvent:
    """What one call, of one step or several, did for the turn in ``slot``.

    ``tokens``: how many are in KV now.  ``ids``: new acknowledged ids; the last one was sampled and is not in KV yet, and the one
    that ended an answer is among them.  ``text``: whole characters that may be shown now.  ``finish``: why the turn is over.
    ``drafted``, ``accepted``: guesses of these steps.  ``rows``: packed rows of the positions ``first_row`` to ``tokens - 1``,
    b"" while a prompt is prefilled; the first event after the prompt carries all unsealed rows.  ``sealed``: blocks that were
    sealed in this step, oldest first.  ``prelude``: the sinks, once, when they are full.  ``failed``: why the turn could not
    go on ("" if it did); its KV stays at ``tokens``.
    """

    slot: int
    tokens: int
    ids: tuple[int, ...] = ()
    text: str = ""
    finish: Finish | None = None
    drafted: int = 0
    accepted: int = 0
    first_row: int = 0
    rows: bytes = b""
    sealed: tuple[SealedBlock, ...] = ()
    prelude: bytes = b""
    failed: str = ""

    @property
    def over(self) -> bool:
        """Whether the slot has no turn any more."""
        return self.finish is not None or bool(self.failed)


@dataclass(frozen=True, slots=True)
class StepReply:
    """Steps of all live turns. ``rows``: how many the stages computed.  ``live``: turns that want another step.

    ``steps``: how many there were; in each of them every turn that decodes made an id, and those that came of a guess.
    """

    events: tuple[TurnEvent, ...]
    elapsed_us: int
    rows: int
    live: int
    steps: int


def to_body(event: TurnEvent) -> list[object]:
    return [
        event.slot, event.tokens, list(event.ids), event.text, event.finish.value if event.finish else "", event.drafted,
        event.accepted, event.first_row, len(event.rows), [[each.block, len(each.payload)] for each in event.sealed],
        len(event.prelude), event.failed,
    ]  # fmt: skip


def bulk_of(events: Iterable[TurnEvent]) -> list[bytes]:
    """The bulk of ``events`` in their order: rows, sealed blocks, prelude of each."""
    parts: list[bytes] = []
    for event in events:
        parts += [event.rows, *(each.payload for each in event.sealed), event.prelude]
    return [part for part in parts if part]


def from_bodies(bodies: object, bulk: bytes, shape: ModelShape, slots: int) -> tuple[TurnEvent, ...]:
    """Inverse of ``to_body`` and ``bulk_of``. Raises ``RefusedError`` for what a sound child would not say."""
    if not isinstance(bodies, list) or len(bodies) > slots:
        raise RefusedError("events", bodies, f"a list of at most {slots}")
    reader = _Bulk(bulk)
    events = tuple(_event(body, reader, shape, slots) for body in bodies)
    if reader.at != len(bulk):
        raise RefusedError("bulk of events", f"{len(bulk)} bytes", f"the {reader.at} that the events name")
    if len({event.slot for event in events}) != len(events):
        raise RefusedError("events", [event.slot for event in events], "one event a slot")
    return events


class _Bulk:
    """Hands out what comes next in the bulk bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, size_bytes: int) -> bytes:
        end = self.at + size_bytes
        if end > len(self._data):
            raise RefusedError("bulk of an event", f"{end} bytes named", f"at most the {len(self._data)} that came")
        self.at, start = end, self.at
        return self._data[start:end]


def _event(body: object, bulk: _Bulk, shape: ModelShape, slots: int) -> TurnEvent:
    if not isinstance(body, list) or len(body) != 12:
        raise RefusedError("event", body, "a list of 12")
    slot, tokens, ids, text, finish, drafted, accepted, first_row, rows_bytes, sealed, prelude_bytes, failed = body
    bounded("event slot", slot, 0, slots - 1)
    bounded("event tokens", tokens, 0, MAX_TOKENS)
    bounded("event drafted", drafted, 0, MAX_EVENT_IDS)
    bounded("event accepted", accepted, 0, drafted)
    _check_rows(tokens, first_row, rows_bytes, shape)
    if prelude_bytes not in (0, shape.prelude_bytes) or type(prelude_bytes) is not int:
        raise RefusedError("event prelude", prelude_bytes, f"0 or {shape.prelude_bytes} bytes")
    rows = bulk.take(rows_bytes)
    blocks = _sealed(sealed, bulk, tokens, shape)
    return TurnEvent(
        slot, tokens, _ids(ids, shape.vocabulary), _text("event text", text, MAX_EVENT_CHARS), _finish(finish), drafted, accepted,
        first_row, rows, blocks, bulk.take(prelude_bytes), _text("event failed", failed, MAX_FAILURE_CHARS),
    )  # fmt: skip


def _check_rows(tokens: int, first_row: object, rows_bytes: object, shape: ModelShape) -> None:
    size_bytes = bounded("event rows", rows_bytes, 0, MAX_EVENT_ROWS * shape.row_bytes, "bytes")
    count, rest = divmod(size_bytes, shape.row_bytes)
    first = bounded("event first_row", first_row, 0, tokens)
    if rest or (count and first + count != tokens):
        raise RefusedError("event rows", f"{size_bytes} bytes from position {first}", f"whole rows up to position {tokens}")


def _sealed(value: object, bulk: _Bulk, tokens: int, shape: ModelShape) -> tuple[SealedBlock, ...]:
    if not isinstance(value, list) or len(value) > MAX_EVENT_SEALED:
        raise RefusedError("event sealed", value, f"a list of at most {MAX_EVENT_SEALED}")
    found = []
    for item in value:
        if not isinstance(item, list) or len(item) != 2 or item[1] != shape.block_bytes or type(item[1]) is not int:
            raise RefusedError("event sealed", item, f"block and {shape.block_bytes} bytes")
        block = bounded("event sealed block", item[0], 0, max(0, full_blocks(tokens) - 1))
        found.append(SealedBlock(block, bulk.take(shape.block_bytes)))
    return tuple(found)


def _ids(value: object, vocabulary: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_EVENT_IDS:
        raise RefusedError("event ids", value, f"a list of at most {MAX_EVENT_IDS}")
    return checked_ids(value, vocabulary)


def checked_ids(ids: Sequence[object], vocabulary: int) -> tuple[int, ...]:
    """``ids`` if each is a token of the vocabulary; raises ``RefusedError`` otherwise."""
    for each in ids:
        if type(each) is not int or not 0 <= each < vocabulary:
            raise RefusedError("token id", each, f"0 to {vocabulary - 1}")
    return tuple(ids)  # type: ignore[arg-type]


def _text(subject: str, value: object, max_chars: int) -> str:
    if not isinstance(value, str) or len(value) > max_chars:
        raise RefusedError(subject, value, f"text of at most {max_chars} characters")
    return value


def _finish(value: object) -> Finish | None:
    if value == "":
        return None
    if not isinstance(value, str) or value not in list(Finish):
        raise RefusedError("event finish", value, "stop, length or nothing")
    return Finish(value)
