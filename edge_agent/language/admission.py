"""Which turns may have KV in the hot memory now, and which idle session gives way for them: pure, integers only.

Rules: a turn is admitted with the bytes that it can grow to, so that nothing which was admitted runs out of room; a session that
talks never gives way; an idle one gives way at no cost but its restore, for the store holds all of it; who frees the most bytes a
microsecond of expected restore goes first, then the one that was used longest ago, then the lower slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS
from edge_agent.core.model_shape import ModelShape
from edge_agent.core.values import bounded
from edge_agent.gateway.talker import CONTEXT_LENGTH

PAGE_BYTES = 4096
SCALE_BYTES = 4


def window_tokens(window_blocks: int) -> int:
    """Rows of a full ring: sinks, sealed blocks, and two blocks that are not sealed."""
    return SINK_TOKENS + (window_blocks + 2) * BLOCK_TOKENS


def hot_bytes(shape: ModelShape, window_blocks: int, tokens: int) -> int:
    """The most memory that ``tokens`` tokens touch in a ring: whole pages of values and of scales, a strip each."""
    rows = min(tokens, window_tokens(window_blocks))
    pages = _pages(rows * shape.head_dim) + _pages(rows * SCALE_BYTES)
    return shape.strips * pages * PAGE_BYTES


def _pages(size_bytes: int) -> int:
    """Pages that this many bytes touch at most, wherever they begin."""
    return (size_bytes + PAGE_BYTES - 2) // PAGE_BYTES + 1 if size_bytes else 0


@dataclass(frozen=True, slots=True)
class Resident:
    """A session whose KV lies in ring ``slot``. ``size_bytes``: held, or while it talks (``live``) what it may grow to."""

    slot: int
    session: str
    size_bytes: int
    live: bool
    restore_us: int
    used_us: int

    def __post_init__(self) -> None:
        bounded("ring slot", self.slot, 0, 2**16)
        bounded("resident size_bytes", self.size_bytes, 0, 2**50, "bytes")
        bounded("resident restore_us", self.restore_us, 0, 2**50, "µs")


@dataclass(frozen=True, slots=True)
class Room:
    """The hot memory: ``slots`` rings, and the bytes that all of them together may touch."""

    slots: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """Take ``slot``, after ``parked`` gave way. ``resident``: the session's KV lies there already."""

    slot: int
    parked: tuple[Resident, ...]
    resident: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Waits:
    """There is no room until somebody who talks has ended."""

    needed_bytes: int
    free_bytes: int
    reason: str


def admit(need_bytes: int, session: str, residents: Iterable[Resident], room: Room) -> Admitted | Waits:
    """Room for ``session`` (``""``: one that is nowhere yet) to grow to ``need_bytes``.

    Raises ``RefusedError`` (``CONTEXT_LENGTH``) with the bytes needed and allowed for what can never fit.
    """
    if need_bytes > room.size_bytes:
        raise RefusedError(
            CONTEXT_LENGTH, f"{need_bytes} bytes of KV", f"{room.size_bytes} bytes", "shorten it, or raise [language] hot_bytes"
        )
    everyone = list(residents)
    own = next((each for each in everyone if session and each.session == session), None)
    others = [each for each in everyone if each is not own]
    free_bytes = room.size_bytes - sum(each.size_bytes for each in others)
    free_slots = room.slots - len(others)
    parked = []
    for each in giving_way(others):
        if free_slots > 0 and free_bytes >= need_bytes:
            break
        parked.append(each)
        free_bytes, free_slots = free_bytes + each.size_bytes, free_slots + 1
    if free_slots <= 0 or free_bytes < need_bytes:
        lack = (
            f"{need_bytes} bytes needed, {free_bytes} free of {room.size_bytes}"
            if free_slots > 0
            else f"all {room.slots} slots talk"
        )
        return Waits(need_bytes, max(0, free_bytes), lack)
    if own is not None:
        return Admitted(own.slot, tuple(parked), True, "its KV is in hot memory")
    taken = {each.slot for each in others if each not in parked}
    slot = next(number for number in range(room.slots) if number not in taken)
    return Admitted(slot, tuple(parked), False, f"{len(parked)} idle sessions give way" if parked else "there is room")


def giving_way(residents: Iterable[Resident]) -> list[Resident]:
    """The idle sessions, in the order in which they give way."""
    return sorted((each for each in residents if not each.live), key=_worth_keeping)


def _worth_keeping(resident: Resident) -> tuple[int, int, int]:
    freed_a_second = resident.size_bytes * 10**6 // max(1, resident.restore_us)
    return (-freed_a_second, resident.used_us, resident.slot)
