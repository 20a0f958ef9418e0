"""The engine child's core: slots, turns and the batched step, with no process and no socket.

Rules:

* between two calls of ``step`` a slot's ring holds exactly what was reported (``slot`` has the laws of one turn);
* several steps may run in one call, a burst: while all live turns decode and nothing happens that somebody waits for;
* a step that fails as a whole ends every turn in it and leaves the slots at what was reported; a turn whose logits are no
  numbers ends alone;
* greedy turns give the same ids with guesses and without, alone and in company, in bursts and step by step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import MAX_TOKENS
from edge_agent.core.values import bounded
from edge_agent.language.batching import Share, plan
from edge_agent.language.costs import Costs
from edge_agent.language.decoder import Segment
from edge_agent.language.events import MAX_BURST_IDS, TurnEvent, checked_ids
from edge_agent.language.ring import Ring
from edge_agent.language.slot import Options, Slot, Turn, Words, take_back
from edge_agent.language.text import TextStream

Floats = NDArray[np.float32]
MAX_PROMPT_TOKENS = 2**20
FAILURES = (RuntimeError, ValueError, MemoryError)

__all__ = ["Decodes", "Engine", "Options", "Stepped"]


class Decodes(Protocol):
    """``Decoder``, as far as it is needed here."""

    def step(self, segments: Sequence[Segment]) -> list[Floats]: ...


@dataclass(slots=True)
class Stepped:
    """``rows``: how many the decoder computed, in all ``steps``."""

    events: list[TurnEvent]
    rows: int
    live: int
    steps: int


def _never() -> bool:
    return False


class Engine:
    """``ring_of`` gives a slot's ring, empty; ``free`` gives its memory back.

    ``token_bytes`` and ``stop_ids`` are the tokenizer's; ``most_chunk`` is the longest piece of a prompt that a step takes.
    """

    def __init__(
        self,
        decoder: Decodes,
        ring_of: Callable[[int], Ring],
        free: Callable[[int], None],
        token_bytes: Callable[[int], bytes],
        stop_ids: frozenset[int],
        costs: Costs,
        slots: int,
        most_chunk: int = 64,
    ) -> None:
        self._decoder, self._ring_of, self._free = decoder, ring_of, free
        self._words, self._costs = Words(token_bytes, stop_ids), costs
        self._slots: dict[int, Slot] = {}
        self._most_slots, self._most_chunk, self._last_prompt = slots, most_chunk, -1

    def open(
        self, slot: int, tokens: int, prelude: Any = b"", blocks: Sequence[Any] = (), rows: Any = b"", history: Sequence[int] = ()
    ) -> None:
        """Make ``slot`` hold a session of ``tokens`` tokens. Raises ``RefusedError``; the slot is then closed."""
        bounded("slot", slot, 0, self._most_slots - 1)
        bounded("tokens", tokens, 0, MAX_TOKENS)
        self.close(slot)
        ring = self._ring_of(slot)
        ids = checked_ids(history, ring.shape.vocabulary)
        if tokens:
            try:
                ring.restore(tokens, prelude, blocks, rows)
            except RefusedError:
                self._free(slot)
                raise
        self._slots[slot] = Slot(slot, ring, self._words, ids)

    def begin(self, slot: int, prompt: Sequence[int], options: Options) -> None:
        """Begin a turn. Raises ``RefusedError``; the slot stays as it was."""
        found = self._slot(slot)
        if found.turn is not None:
            raise RefusedError(f"slot {slot}", "a turn", "one turn at a time", "wait for its end or cancel it")
        bounded("length of the prompt", len(prompt), 1, MAX_PROMPT_TOKENS, "tokens")
        ids = checked_ids(prompt, found.ring.shape.vocabulary)
        given = options.sampling.seed
        seed = given if given is not None else int.from_bytes(os.urandom(8), "big")
        found.turn = Turn(options, seed, self._text(options, found.ring.shape.vocabulary), ids)

    def _text(self, options: Options, vocabulary: int) -> TextStream:
        """The answer's text as it stood after the ids that were told before: what was shown is not shown again."""
        stream = TextStream(options.stop, options.begun)
        for each in checked_ids(options.answered, vocabulary):
            stream.feed(self._words.token_bytes(each))
        return stream

    def cancel(self, slot: int) -> TurnEvent:
        """End the slot's turn; the event carries the unsealed rows that were not told."""
        return self._slot(slot).cancelled()

    def close(self, slot: int) -> None:
        """Forget the slot and what it holds; nothing if it is not open."""
        bounded("slot", slot, 0, self._most_slots - 1)
        if self._slots.pop(slot, None) is not None:
            self._free(slot)

    @property
    def live(self) -> int:
        """Turns that want a step."""
        return sum(each.turn is not None for each in self._slots.values())

    def step(self, go_on: Callable[[], bool] = _never) -> Stepped:
        """One step of all live turns, and while ``go_on()`` more: until a turn ends, seals or reads its prompt.

        Raises what the decoder raises in the first step; every turn is then over.  A later step that fails is as if it had not
        been tried.
        """
        turns = {number: each.turn for number, each in sorted(self._slots.items()) if each.turn is not None}
        steps = rows = 0
        shares: tuple[Share, ...] = ()
        while turns and (not steps or (self._quiet(turns, shares) and go_on())):
            try:
                shares = self._step(turns)
            except FAILURES:
                if steps:
                    break
                for number in turns:
                    self._slots[number].turn = None
                raise
            steps, rows = steps + 1, rows + sum(each.rows for each in shares)
        events = [self._slots[each.slot].told(turns[each.slot]) for each in shares]
        return Stepped(events, rows, self.live, steps)

    def _quiet(self, turns: dict[int, Turn], shares: Sequence[Share]) -> bool:
        """Whether nothing happened that somebody waits for, and the next event still has room."""
        if any(share.prompt for share in shares) or sum(len(each.untold.ids) for each in turns.values()) >= MAX_BURST_IDS:
            return False
        return not any(each.over or each.untold.sealed for each in turns.values())

    def _step(self, turns: dict[int, Turn]) -> tuple[Share, ...]:
        needs = [self._slots[number].need(turn) for number, turn in turns.items()]
        shares = plan(needs, self._costs.curve, self._last_prompt, self._most_chunk)
        segments = [self._slots[each.slot].segment(turns[each.slot], each.rows) for each in shares]
        logits = self._decoded(segments)
        for share, segment, rows in zip(shares, segments, logits, strict=True):
            if share.prompt:
                self._last_prompt = share.slot
            self._slots[share.slot].settle(turns[share.slot], segment, rows)
        return shares

    def _decoded(self, segments: Sequence[Segment]) -> list[Floats]:
        before = [(each.ring, each.ring.tokens) for each in segments]
        started_ns = time.monotonic_ns()
        try:
            logits = self._decoder.step(segments)
        except FAILURES:
            for ring, tokens in before:
                take_back(ring, tokens)
            raise
        self._costs.took(sum(len(each.ids) for each in segments), (time.monotonic_ns() - started_ns) // 1000)
        return logits

    def _slot(self, slot: int) -> Slot:
        if slot not in self._slots:
            raise RefusedError("slot", slot, f"an open one: {', '.join(map(str, sorted(self._slots))) or 'none is'}", "open it")
        return self._slots[slot]
