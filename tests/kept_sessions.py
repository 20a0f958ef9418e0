"""What an agent keeps of a session, from the events of its turns alone; it checks the law of each event as it takes it."""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.core.kv import SINK_TOKENS, block_start, sealed_blocks
from edge_agent.core.model_shape import ModelShape
from edge_agent.language.events import TurnEvent


class Kept:
    """``ids``: all that were told, prompts included; the first ``tokens`` of them are in KV."""

    def __init__(self, shape: ModelShape, window_blocks: int) -> None:
        self.shape, self.window_blocks = shape, window_blocks
        self.ids: list[int] = []
        self.tokens = 0
        self.prelude = b""
        self.rows: dict[int, bytes] = {}
        self.blocks: dict[int, bytes] = {}
        self.prompt_end = 0
        self.text = ""

    def ask(self, ids: Sequence[int]) -> list[int]:
        """The prompt of a turn that says ``ids``: what is pending, then they."""
        prompt = [*self.ids[self.tokens :], *ids]
        self.ids += ids
        self.prompt_end = len(self.ids)
        return prompt

    def take(self, event: TurnEvent, cancelled: bool = False, steps: int = 1) -> None:
        before = self.tokens
        self.ids += event.ids
        assert self.tokens <= event.tokens <= len(self.ids), "nothing is in KV that was not told"
        self.tokens = event.tokens
        self.text += event.text
        self._take_rows(event, before)
        for each in event.sealed:
            assert each.block == len(self.blocks) and len(each.payload) == self.shape.block_bytes
            self.blocks[each.block] = each.payload
        assert len(self.blocks) == sealed_blocks(self.tokens), "sealed as soon as the block after it is full, not sooner"
        assert bool(event.prelude) == (before < SINK_TOKENS <= self.tokens), "the prelude is told once"
        self.prelude = event.prelude or self.prelude
        if event.failed or cancelled:
            return
        if self.tokens < self.prompt_end:
            assert not event.ids and not event.rows and not event.text, "nothing is told of an answer while a prompt is read"
        else:
            assert len(event.ids) == steps + event.accepted <= steps + event.drafted or event.over
            assert self.tokens == len(self.ids) - 1, "the last id is pending, all others are in KV"
            self.must_be_whole()

    def _take_rows(self, event: TurnEvent, before: int) -> None:
        size = self.shape.row_bytes
        for index in range(len(event.rows) // size):
            position = event.first_row + index
            assert position not in self.rows or position < self.prompt_end, "a row is told once, but for a new turn's first event"
            self.rows[position] = event.rows[index * size : (index + 1) * size]
        assert not event.rows or event.first_row + len(event.rows) // size == event.tokens

    def must_be_whole(self) -> None:
        """Nothing that a restore needs is missing."""
        assert set(range(block_start(sealed_blocks(self.tokens)), self.tokens)) <= set(self.rows)

    def parked(self) -> dict[str, object]:
        """The arguments of ``open``."""
        sealed = sealed_blocks(self.tokens)
        if self.tokens < SINK_TOKENS:
            self.tokens = 0
            return {"tokens": 0}
        return {
            "tokens": self.tokens,
            "prelude": self.prelude,
            "blocks": [self.blocks[each] for each in range(max(0, sealed - self.window_blocks), sealed)],
            "rows": b"".join(self.rows[each] for each in range(block_start(sealed), self.tokens)),
            "history": self.ids,
        }
