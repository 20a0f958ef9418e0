"""Which session lies in which ring slot: the agent's table beside the pure rules of ``admission``.

Rules: a slot is taken with the bytes that its turn may grow to, and holds its real bytes when the turn is over; what the ring
holds is known by its number of tokens, and is nothing after a child's death.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.core.model_shape import ModelShape
from edge_agent.language.admission import Admitted, Resident, Room, Waits, admit, hot_bytes


@dataclass(slots=True)
class _Slot:
    session: str
    size_bytes: int
    tokens: int
    live: bool
    used_us: int


class HotSlots:
    """``restore_us`` says what bringing a session of so many tokens back is expected to take."""

    def __init__(self, shape: ModelShape, window_blocks: int, room: Room, restore_us: Callable[[int], int]) -> None:
        self._shape, self._window_blocks, self.room, self._restore_us = shape, window_blocks, room, restore_us
        self._slots: dict[int, _Slot] = {}

    @property
    def used_bytes(self) -> int:
        return sum(each.size_bytes for each in self._slots.values())

    def need_bytes(self, tokens: int) -> int:
        return hot_bytes(self._shape, self._window_blocks, tokens)

    def residents(self) -> list[Resident]:
        return [
            Resident(slot, each.session, each.size_bytes, each.live, self._restore_us(each.tokens), each.used_us)
            for slot, each in self._slots.items()
        ]

    def admit(self, need_bytes: int, session: str) -> Admitted | Waits:
        """Raises ``RefusedError`` for what can never fit."""
        return admit(need_bytes, session, self.residents(), self.room)

    def take(self, admitted: Admitted, session: str, size_bytes: int, now_us: int) -> None:
        """The slot is ``session``'s from now on; what gave way is forgotten."""
        for each in admitted.parked:
            del self._slots[each.slot]
        held = self._slots.get(admitted.slot)
        tokens = held.tokens if held is not None and held.session == session else 0
        self._slots[admitted.slot] = _Slot(session, size_bytes, tokens, True, now_us)

    def tokens_of(self, session: str) -> int:
        """How many tokens of ``session`` lie in a ring."""
        return next((each.tokens for each in self._slots.values() if each.session == session), 0)

    def holds(self, slot: int, tokens: int) -> None:
        """The slot's ring holds so many tokens of its session now."""
        self._slots[slot].tokens = tokens

    def rests(self, slot: int, now_us: int) -> None:
        """The slot's turn is over; its KV stays until it gives way."""
        each = self._slots[slot]
        each.live, each.used_us, each.size_bytes = False, now_us, self.need_bytes(each.tokens)

    def drop(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def slot_of(self, session: str) -> int | None:
        return next((slot for slot, each in self._slots.items() if each.session == session), None)

    def lost(self) -> None:
        """The child died: only who talks keeps a slot, and nothing lies in it."""
        self._slots = {slot: each for slot, each in self._slots.items() if each.live}
        for each in self._slots.values():
            each.tokens = 0
