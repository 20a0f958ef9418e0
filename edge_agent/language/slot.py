"""One slot of the engine child: a session's ring, the turn that goes on in it, and what of it was not told yet.

Rules:

* after ``settle`` the ring holds exactly what was accepted: rejected guesses and what comes after an answer's end are taken back;
* every id but the last lies in KV; the last one is pending and comes first in the next turn's prompt;
* ids that were generated are computed as such again where a turn goes on after a restore: their KV is then the same bits;
* ``told`` gives what happened since it was last called as one event: ids and rows are contiguous, however many steps made them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.chat import MAX_NEW_TOKENS, Finish, Sampling
from edge_agent.core.kv import SINK_TOKENS, room_in_block
from edge_agent.core.values import bounded
from edge_agent.language.batching import Need
from edge_agent.language.decoder import DECODE_ROWS, Segment, Wanted
from edge_agent.language.events import SealedBlock, TurnEvent
from edge_agent.language.ring import Ring
from edge_agent.language.sampling import NotFiniteError, drawn
from edge_agent.language.speculation import MAX_GUESSES, Drafter, Proposal
from edge_agent.language.text import TextStream

Floats = NDArray[np.float32]


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


@dataclass(frozen=True, slots=True)
class Words:
    """``token_bytes`` and ``stop_ids`` are the tokenizer's."""

    token_bytes: Callable[[int], bytes]
    stop_ids: frozenset[int]


@dataclass(slots=True)
class Untold:
    """What happened in a slot since the last event."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    drafted: int = 0
    accepted: int = 0
    sealed: list[SealedBlock] = field(default_factory=list)
    failed: str = ""


@dataclass(slots=True)
class Turn:
    """``prompt``: ids that are not in KV yet. ``pending``: the last id made, once the prompt is through."""

    options: Options
    seed: int
    text: TextStream
    prompt: tuple[int, ...]
    pending: int = -1
    made: int = 0
    rows_told: int | None = None
    proposal: Proposal = Proposal()
    untold: Untold = field(default_factory=Untold)

    @property
    def read(self) -> int:
        """How many ids of the ``prompt`` come before those of the answer that were told before."""
        return max(0, len(self.prompt) - len(self.options.answered))

    @property
    def guesses(self) -> bool:
        return self.options.speculate and self.options.sampling.greedy

    @property
    def over(self) -> bool:
        return self.untold.finish is not None or bool(self.untold.failed)


class Slot:
    """``turn`` is ``None`` while nobody talks."""

    def __init__(self, number: int, ring: Ring, words: Words, history: Sequence[int]) -> None:
        self._number, self.ring, self._words = number, ring, words
        self._prelude_told = ring.tokens >= SINK_TOKENS
        self._drafter = Drafter()
        self._drafter.extend(history)
        self.turn: Turn | None = None

    # a step

    def need(self, turn: Turn) -> Need:
        """What the turn wants of the next step; it guesses on the way."""
        room = room_in_block(self.ring.tokens)
        if turn.prompt:
            return Need(self._number, room, turn.read or min(DECODE_ROWS, len(turn.prompt)))
        useful = min(MAX_GUESSES, turn.options.max_tokens - turn.made - 1)
        turn.proposal = self._drafter.propose(useful) if turn.guesses and useful > 0 else Proposal()
        return Need(self._number, room, 0, len(turn.proposal.ids), turn.proposal.chance)

    def segment(self, turn: Turn, rows: int) -> Segment:
        if not turn.prompt:
            return Segment(self.ring, (turn.pending, *turn.proposal.ids[: rows - 1]), "all")
        wanted: Wanted = "last" if rows == len(turn.prompt) else "none"
        return Segment(self.ring, turn.prompt[:rows], wanted, prompt=turn.read > 0)

    def settle(self, turn: Turn, segment: Segment, logits: Floats) -> None:
        """What the computed rows mean for the turn; its ring and its text move on together, and what is due is sealed."""
        prompted = bool(turn.prompt)
        if prompted:
            self._drafter.extend(segment.ids)
            turn.prompt = turn.prompt[len(segment.ids) :]
        if not turn.prompt:
            self._answer(turn, segment, () if prompted else tuple(segment.ids[1:]), logits)
        turn.untold.sealed += [SealedBlock(block, payload) for block, payload in self.ring.seal()]

    def _answer(self, turn: Turn, segment: Segment, drafts: tuple[int, ...], logits: Floats) -> None:
        end, untold = self.ring.tokens, turn.untold
        ids: list[int] = []
        try:
            text, untold.finish = self._accept(turn, end - len(drafts), drafts, logits, ids)
        except NotFiniteError as error:
            untold.failed = str(error)
            take_back(self.ring, end - len(segment.ids))
            return
        accepted = len(ids) - 1
        self.ring.truncate(end - len(drafts) + accepted)
        self._drafter.extend(ids)
        self._drafter.learn(turn.proposal, len(drafts), accepted)
        turn.pending = ids[-1]
        untold.ids += ids
        untold.text += text
        untold.drafted += len(drafts)
        untold.accepted += accepted

    def _accept(
        self, turn: Turn, position: int, drafts: tuple[int, ...], logits: Floats, ids: list[int]
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

    def _shown(self, turn: Turn, chosen: int) -> tuple[str, Finish | None]:
        if chosen in self._words.stop_ids:
            return turn.text.end(), Finish.STOP
        text = turn.text.feed(self._words.token_bytes(chosen))
        if turn.text.stopped:
            return text, Finish.STOP
        if turn.made >= turn.options.max_tokens:
            text += turn.text.end()
            return text, Finish.STOP if turn.text.stopped else Finish.LENGTH
        return text, None

    # what is told

    def told(self, turn: Turn) -> TurnEvent:
        """What was not told yet, and what the slot holds now; a turn that is over is gone."""
        ring, new = self.ring, turn.untold
        prelude = b""
        if not self._prelude_told and ring.tokens >= SINK_TOKENS:
            prelude, self._prelude_told = ring.prelude(), True
        reading = bool(turn.prompt) or (bool(new.failed) and turn.rows_told is None)
        first_row, rows = (0, b"") if reading else _rows(ring, turn.rows_told)
        if rows:
            turn.rows_told = ring.tokens
        if turn.over:
            self.turn = None
        turn.untold = Untold()
        return TurnEvent(
            self._number, ring.tokens, tuple(new.ids), new.text, new.finish, new.drafted, new.accepted, first_row, rows,
            tuple(new.sealed), prelude, new.failed,
        )  # fmt: skip

    def cancelled(self) -> TurnEvent:
        """End the turn; the event carries the unsealed rows that were not told."""
        turn, self.turn = self.turn, None
        first_row, rows = _rows(self.ring, turn.rows_told if turn is not None else self.ring.tokens)
        return TurnEvent(self._number, self.ring.tokens, first_row=first_row, rows=rows)


def take_back(ring: Ring, tokens: int) -> None:
    """Undo a step that failed; sinks are only forgotten all together."""
    if tokens >= SINK_TOKENS:
        ring.truncate(tokens)
    else:
        ring.reset()


def _rows(ring: Ring, told: int | None) -> tuple[int, bytes]:
    """The first position and the packed rows that no event has carried: from ``told`` on, or all that are not sealed."""
    first = ring.first_row if told is None else max(told, ring.first_row)
    return (first, ring.rows(first, ring.tokens)) if first < ring.tokens else (0, b"")
