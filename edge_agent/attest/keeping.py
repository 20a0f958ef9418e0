"""What a verifier must know of a board after a power cut, as one document a board.

Owns its encoding, and when it is due.  Rules: one encoding, strict and bounded when read back; what is kept is how far the board
had come, what is held against it with the quotes that show it, what an operator said last, and its strikes; that it was good is
not kept: it has to show itself anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_agent.attest.appraisal import MAX_RAW, MAX_REASON_CHARS, MAX_REASONS, Vector
from edge_agent.attest.claims import Verdict, vector_tier
from edge_agent.attest.evidence import MAX_COUNT, MAX_QUOTE_BYTES, SEED_BYTES
from edge_agent.attest.history import NOWHERE, QuoteTrace
from edge_agent.attest.standing import MAX_STRIKES, Floor, Standing
from edge_agent.attest.words import Action, OperatorWord
from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import DIGEST_BYTES, TrustTier, bounded

MAX_KEPT_BYTES = MAX_RAW * MAX_QUOTE_BYTES + 16 * 2**10

KEEP_PERIOD_US = 60_000_000
KEEP_BOOT_PERIOD_US = 1_000_000
"""A board that counts up its boots as fast as it can has this one write no more often."""

_KEPT = {
    1: ("mark", list), 2: ("floor", list), 3: ("vector", list), 4: ("reasons", list), 5: ("proof", list), 6: ("word", list),
    7: ("checks", int), 8: ("strikes", list),
}  # fmt: skip
_COUNT = (0, MAX_COUNT)
_CLAIMS = len(Vector.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Kept:
    """``standing`` is ``None`` for a board that others verify."""

    standing: Standing | None
    word: OperatorWord | None = None


class Keeper:
    """When what is held of a board is to be written."""

    def __init__(self) -> None:
        self._written: dict[str, _Written] = {}

    def due(self, board: str, kept: Kept, now_us: int, everything: bool) -> bool:
        """Must it be written now?  It counts as written by that.

        At once what is held against the board and what an operator said; that it booted at most once a second; how far it came
        once a minute, or with ``everything``.
        """
        now, was = _written(kept, now_us), self._written.get(board, _NOTHING)
        since_us = now_us - was.at_us
        is_due = (
            now.held != was.held
            or (now.boot != was.boot and (everything or since_us >= KEEP_BOOT_PERIOD_US))
            or (now.rest != was.rest and (everything or since_us >= KEEP_PERIOD_US))
        )
        if is_due:
            self._written[board] = now
        return is_due

    def written(self, board: str, kept: Kept) -> None:
        """It was read back: it need not be written again."""
        self._written[board] = _written(kept, 0)


@dataclass(frozen=True, slots=True)
class _Written:
    """What was written last, by how soon a change of it must be; ``at_us``: when."""

    held: tuple[object, ...]
    boot: int
    rest: tuple[object, ...]
    at_us: int


_NOTHING = _Written((None,), NOWHERE[0], (), -KEEP_PERIOD_US)


def _written(kept: Kept, now_us: int) -> _Written:
    standing = kept.standing
    if standing is None:
        return _Written((kept.word,), NOWHERE[0], (), now_us)
    held = (kept.word, standing.floor, standing.found, standing.proof, standing.strikes)
    return _Written(held, standing.history.place[0], (standing.history.mark, standing.checks), now_us)


def encode_kept(kept: Kept) -> bytes:
    entry: dict[int, object] = {}
    if kept.word is not None:
        entry[6] = [kept.word.operator, kept.word.serial, kept.word.action.value, kept.word.reason]
    if kept.standing is not None:
        entry |= _standing_map(kept.standing)
    return encode(entry)


def decode_kept(data: bytes, board: str, missed: int) -> Kept:
    """What was kept of ``board``. Raises ``RefusedError`` for bytes that ``encode_kept`` does not make."""
    entry = fields(decode(data, MAX_KEPT_BYTES, subject="kept standing"), "kept standing", {}, _KEPT)
    if [] in entry.values() or entry.get("checks") == 0 or ("vector" in entry) != ("reasons" in entry):
        raise RefusedError("kept standing", "an empty field, or half of what was found", "nothing, where there is nothing")
    standing = Standing(missed)
    standing.recall(
        mark=_mark_in(entry["mark"]) if "mark" in entry else None,
        floor=_floor_in(entry["floor"]) if "floor" in entry else None,
        found=_found_in(entry) if "vector" in entry else None,
        proof=_proof_in(entry.get("proof", [])),
        checks=bounded("kept checks", entry.get("checks", 0), *_COUNT),
        strikes=tuple(
            _count("kept strike", each) for each in list_of(entry.get("strikes", []), "kept strikes", int, MAX_STRIKES)
        ),
    )
    return Kept(standing, _word_in(entry["word"], board) if "word" in entry else None)


def _standing_map(standing: Standing) -> dict[int, object]:
    mark, floor, found = standing.history.mark, standing.floor, standing.found
    known: dict[int, object] = {}
    if mark is not None:
        known[1] = [
            mark.bootcount, mark.counter, mark.bootseed, mark.digest, mark.previous, mark.receipts, mark.receipts_head
        ]  # fmt: skip
    if floor is not None:
        known[2] = [*floor.place, floor.bootseed]
    if found is not None:
        known[3] = [getattr(found.vector, name) for name in Vector.__dataclass_fields__]
        known[4] = list(found.reasons)
    full: dict[int, Any] = {5: list(standing.proof), 7: standing.checks, 8: list(standing.strikes)}
    return known | {key: value for key, value in full.items() if value}


def _mark_in(value: list[Any]) -> QuoteTrace:
    match value:
        case [int(bootcount), int(counter), bytes(seed), bytes(digest), bytes(previous), int(receipts), bytes(head)]:
            _sizes("kept mark", (seed, SEED_BYTES), (digest, DIGEST_BYTES), (previous, DIGEST_BYTES), (head, DIGEST_BYTES))
            counts = [_count("kept mark", each) for each in (bootcount, counter, receipts)]
            return QuoteTrace(counts[0], counts[1], seed, digest, previous, counts[2], head)
    raise RefusedError("kept mark", value, "[bootcount, counter, seed, digest, previous, receipts, head]")


def _floor_in(value: list[Any]) -> Floor:
    match value:
        case [int(bootcount), int(counter), bytes(seed)]:
            _sizes("kept floor", (seed, SEED_BYTES))
            return Floor((_count("kept floor", bootcount), _count("kept floor", counter)), seed)
    raise RefusedError("kept floor", value, "[bootcount, counter, seed]")


def _found_in(entry: dict[str, Any]) -> Verdict:
    claims = list_of(entry["vector"], "kept vector", int, _CLAIMS)
    reasons = list_of(entry["reasons"], "kept reasons", str, MAX_REASONS)
    if len(claims) != _CLAIMS or any(not 0 < len(each) <= MAX_REASON_CHARS for each in reasons):
        raise RefusedError("kept vector and reasons", f"{len(claims)} claims", f"{_CLAIMS}, and short reasons")
    vector = Vector(*claims)
    if vector_tier(vector) is not TrustTier.CONTRAINDICATED:
        raise RefusedError("kept vector", vector_tier(vector).name.lower(), "contraindicated")
    return Verdict(TrustTier.CONTRAINDICATED, vector, tuple(reasons))


def _proof_in(value: object) -> tuple[bytes, ...]:
    proof = list_of(value, "kept proof", bytes, MAX_RAW)
    for each in proof:
        bounded("kept proof, length", len(each), 1, MAX_QUOTE_BYTES, "bytes")
    return tuple(proof)


def _word_in(value: list[Any], board: str) -> OperatorWord:
    match value:
        case [str(operator), int(serial), str(action), str(reason)] if action in list(Action):
            return OperatorWord(operator, board, serial, Action(action), reason)
    raise RefusedError("kept word", value, "[operator, serial, action, reason]")


def _count(subject: str, value: int) -> int:
    if isinstance(value, bool):
        raise RefusedError(subject, value, "a count")
    return bounded(subject, value, *_COUNT)


def _sizes(subject: str, *sized: tuple[bytes, int]) -> None:
    for value, size_bytes in sized:
        bounded(f"{subject}, length", len(value), size_bytes, size_bytes, "bytes")
