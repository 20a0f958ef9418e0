"""The engine child's core: slots, turns and the batched step, with no process and no socket.

Rules:

* between two steps a slot's ring holds exactly what was reported: rejected guesses and what comes after an answer's end are
  taken back before anything is told;
* every id that is told but the last lies in KV; the last one is pending and comes first in the next turn's prompt;
* a step that fails as a whole ends every turn in it and leaves the slots at what was reported; a turn whose logits are no
  numbers ends alone;
* greedy turns give the same ids with guesses and without, alone and in company.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.chat import MAX_NEW_TOKENS, Finish, Sampling
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import MAX_TOKENS, SINK_TOKENS, room_in_block
from edge_agent.core.values import bounded
from edge_agent.language.batching import CostCurve, Need, Share, plan
from edge_agent.language.decoder import Segment
from edge_agent.language.events import SealedBlock, TurnEvent, checked_ids
from edge_agent.language.ring import Ring
from edge_agent.language.sampling import NotFiniteError, drawn
from edge_agent.language.speculation import MAX_GUESSES, Drafter, Proposal
from edge_agent.language.text import TextStream

Floats = NDArray[np.float32]
MAX_PROMPT_TOKENS = 2**20


class Decodes(Protocol):
    """``Decoder``, as far as it is needed here."""

    def step(self, segments: Sequence[Segment]) -> list[Floats]: ...


@dataclass(frozen=True, slots=True)
class Options:
    """How one turn goes on. ``begun``: what was shown of its answer elsewhere; ``answered``: ids of it that were told before."""

    sampling: Sampling = Sampling()
    max_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    speculate: bool = True
    begun: str = ""
    answered: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounded("max_tokens", self.max_tokens, 1, MAX_NEW_TOKENS, "tokens")


@dataclass(slots=True)
class _Turn:
    """``prompt``: ids that are not in KV yet. ``pending``: the last id told, once the prompt is through."""

    options: Options
    seed: int
    text: TextStream
    prompt: tuple[int, ...]
    pending: int = -1
    made: int = 0
    rows_told: int | None = None
    proposal: Proposal = Proposal()

    @property
    def guesses(self) -> bool:
        return self.options.speculate and self.options.sampling.greedy


@dataclass(slots=True)
class _Slot:
    ring: Ring
    prelude_told: bool
    drafter: Drafter = field(default_factory=Drafter)
    turn: _Turn | None = None


@dataclass(slots=True)
class Stepped:
    events: list[TurnEvent]
    rows: int
    live: int


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
        curve: CostCurve,
        slots: int,
        most_chunk: int = 64,
    ) -> None:
        self._decoder, self._ring_of, self._free = decoder, ring_of, free
        self._token_bytes, self._stop_ids, self._curve = token_bytes, stop_ids, curve
        self._slots: dict[int, _Slot] = {}
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
        opened = _Slot(ring, prelude_told=tokens >= SINK_TOKENS)
        opened.drafter.extend(ids)
        self._slots[slot] = opened

    def begin(self, slot: int, prompt: Sequence[int], options: Options) -> None:
        """Begin a turn. Raises ``RefusedError``; the slot stays as it was."""
        found = self._slot(slot)
        if found.turn is not None:
            raise RefusedError(f"slot {slot}", "a turn", "one turn at a time", "wait for its end or cancel it")
        bounded("length of the prompt", len(prompt), 1, MAX_PROMPT_TOKENS, "tokens")
        ids = checked_ids(prompt, found.ring.shape.vocabulary)
        given = options.sampling.seed
        seed = given if given is not None else int.from_bytes(os.urandom(8), "big")
        found.turn = _Turn(options, seed, self._text(options, found.ring.shape.vocabulary), ids)

    def _text(self, options: Options, vocabulary: int) -> TextStream:
        """The answer's text as it stood after the ids that were told before: what was shown is not shown again."""
        stream = TextStream(options.stop, options.begun)
        for each in checked_ids(options.answered, vocabulary):
            stream.feed(self._token_bytes(each))
        return stream

    def cancel(self, slot: int) -> TurnEvent:
        """End the slot's turn; the event carries the unsealed rows that were not told."""
        found = self._slot(slot)
        turn, found.turn = found.turn, None
        told = turn.rows_told if turn is not None else found.ring.tokens
        first_row, rows = _rows(found.ring, told)
        return TurnEvent(slot, found.ring.tokens, first_row=first_row, rows=rows)

    def close(self, slot: int) -> None:
        """Forget the slot and what it holds; nothing if it is not open."""
        bounded("slot", slot, 0, self._most_slots - 1)
        if self._slots.pop(slot, None) is not None:
            self._free(slot)

    @property
    def live(self) -> int:
        """Turns that want a step."""
        return sum(each.turn is not None for each in self._slots.values())

    def step(self) -> Stepped:
        """One step of all live turns. Raises what the decoder raises; every turn is then over."""
        turns = {slot: each.turn for slot, each in sorted(self._slots.items()) if each.turn is not None}
        if not turns:
            return Stepped([], 0, 0)
        shares = plan([self._need(slot, turn) for slot, turn in turns.items()], self._curve, self._last_prompt, self._most_chunk)
        segments = [self._segment(share, turns[share.slot]) for share in shares]
        logits = self._decoded(segments)
        events = [self._settled(share, segment, rows) for share, segment, rows in zip(shares, segments, logits, strict=True)]
        return Stepped(events, sum(each.rows for each in shares), self.live)

    def _need(self, slot: int, turn: _Turn) -> Need:
        found = self._slots[slot]
        room = room_in_block(found.ring.tokens)
        if turn.prompt:
            return Need(slot, room, len(turn.prompt))
        useful = min(MAX_GUESSES, turn.options.max_tokens - turn.made - 1)
        turn.proposal = found.drafter.propose(useful) if turn.guesses and useful > 0 else Proposal()
        return Need(slot, room, 0, len(turn.proposal.ids), turn.proposal.chance)

    def _segment(self, share: Share, turn: _Turn) -> Segment:
        ring = self._slots[share.slot].ring
        if not share.prompt:
            return Segment(ring, (turn.pending, *turn.proposal.ids[: share.rows - 1]), "all")
        self._last_prompt = share.slot
        return Segment(ring, turn.prompt[: share.rows], "last" if share.rows == len(turn.prompt) else "none")

    def _decoded(self, segments: Sequence[Segment]) -> list[Floats]:
        before = [(each.ring, each.ring.tokens) for each in segments]
        try:
            return self._decoder.step(segments)
        except (RuntimeError, ValueError, MemoryError):
            for ring, tokens in before:
                _take_back(ring, tokens)
            for each in self._slots.values():
                each.turn = None
            raise

    def _settled(self, share: Share, segment: Segment, logits: Floats) -> TurnEvent:
        """What the computed rows mean for their turn; its ring and its text move on together."""
        found = self._slots[share.slot]
        turn = found.turn
        assert turn is not None
        if share.prompt:
            found.drafter.extend(segment.ids)
            turn.prompt = turn.prompt[share.rows :]
            if turn.prompt:
                return self._told(share.slot, [], "", None)
        drafts = () if share.prompt else tuple(segment.ids[1:])
        end = segment.ring.tokens
        ids: list[int] = []
        try:
            text, finish = self._accept(turn, end - len(drafts), drafts, logits, ids)
        except NotFiniteError as error:
            _take_back(segment.ring, end - len(segment.ids))
            return self._told(share.slot, [], "", None, failed=str(error))
        accepted = len(ids) - 1
        segment.ring.truncate(end - len(drafts) + accepted)
        found.drafter.extend(ids)
        found.drafter.learn(turn.proposal, len(drafts), accepted)
        turn.pending = ids[-1]
        return self._told(share.slot, ids, text, finish, len(drafts), accepted)

    def _accept(
        self, turn: _Turn, position: int, drafts: tuple[int, ...], logits: Floats, ids: list[int]
    ) -> tuple[str, Finish | None]:
        """Append to ``ids`` what the model chooses from ``position`` on, as long as it chooses what the ``drafts`` say."""
        text = ""
        for index in range(len(drafts) + 1):
            chosen = drawn(logits[index], turn.options.sampling, turn.seed, position + index)
            ids.append(chosen)
            turn.made += 1
            shown, finish = self._shown(turn, chosen)
            text += shown
            if finish is not None or index == len(drafts) or drafts[index] != chosen:
                return text, finish
        raise AssertionError("the loop ends with its last draft")

    def _shown(self, turn: _Turn, chosen: int) -> tuple[str, Finish | None]:
        if chosen in self._stop_ids:
            return turn.text.end(), Finish.STOP
        text = turn.text.feed(self._token_bytes(chosen))
        if turn.text.stopped:
            return text, Finish.STOP
        if turn.made >= turn.options.max_tokens:
            text += turn.text.end()
            return text, Finish.STOP if turn.text.stopped else Finish.LENGTH
        return text, None

    def _told(
        self, slot: int, ids: list[int], text: str, finish: Finish | None, drafted: int = 0, accepted: int = 0, failed: str = ""
    ) -> TurnEvent:
        """Seal what is due, and tell what the slot holds now."""
        found = self._slots[slot]
        turn, ring = found.turn, found.ring
        assert turn is not None
        sealed = tuple(SealedBlock(block, payload) for block, payload in ring.seal())
        prelude = b""
        if not found.prelude_told and ring.tokens >= SINK_TOKENS:
            prelude, found.prelude_told = ring.prelude(), True
        first_row, rows = (0, b"") if turn.prompt or failed else _rows(ring, turn.rows_told)
        if rows:
            turn.rows_told = ring.tokens
        if finish is not None or failed:
            found.turn = None
        return TurnEvent(slot, ring.tokens, tuple(ids), text, finish, drafted, accepted, first_row, rows, sealed, prelude, failed)

    def _slot(self, slot: int) -> _Slot:
        if slot not in self._slots:
            raise RefusedError("slot", slot, f"an open one: {', '.join(map(str, sorted(self._slots))) or 'none is'}", "open it")
        return self._slots[slot]


def _take_back(ring: Ring, tokens: int) -> None:
    """Undo a step that failed; sinks are only forgotten all together."""
    if tokens >= SINK_TOKENS:
        ring.truncate(tokens)
    else:
        ring.reset()


def _rows(ring: Ring, told: int | None) -> tuple[int, bytes]:
    """The first position and the packed rows that no event has carried: from ``told`` on, or all that are not sealed."""
    first = ring.first_row if told is None else max(told, ring.first_row)
    return (first, ring.rows(first, ring.tokens)) if first < ring.tokens else (0, b"")
