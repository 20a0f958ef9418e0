"""One step of the model for rows of several sessions at once.

Rules: a step appends its rows to their rings and seals nothing.  Rows of segments of at most ``DECODE_ROWS`` give the same bits
whatever shares their step; longer segments are pieces of a prompt and are computed by matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.kv import SINK_TOKENS
from edge_agent.language.attention import Attention
from edge_agent.language.int8 import int8_of
from edge_agent.language.ring import Ring
from edge_agent.language.rope import Rope
from edge_agent.language.shape import ModelShape
from edge_agent.language.stages import StageCalls

Floats = NDArray[np.float32]
Wanted = Literal["none", "last", "all"]
DECODE_ROWS = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one ring, at most ``ring.room``, and the rows whose logits are wanted."""

    ring: Ring
    ids: Sequence[int]
    wanted: Wanted = "last"

    def __post_init__(self) -> None:
        if not 1 <= len(self.ids) <= self.ring.room:
            raise ValueError(f"a segment of {len(self.ids)} tokens; the ring takes 1 to {self.ring.room} now")

    @property
    def decodes(self) -> bool:
        return len(self.ids) <= DECODE_ROWS


class Decoder:
    """``threads``: how many the attention may use; the stages were opened with theirs."""

    def __init__(self, stages: StageCalls, shape: ModelShape, threads: int = 1) -> None:
        self._stages, self.shape, self._threads = stages, shape, threads
        self._rope = Rope(shape.head_dim, shape.rope_base)
        self._attention = Attention(shape)

    def step(self, segments: Sequence[Segment]) -> list[Floats]:
        """Append every segment to its ring; logits ``[0, 1 or T, vocabulary]`` a segment, in their order."""
        if len({id(each.ring) for each in segments}) != len(segments) or not segments:
            raise ValueError("a step has at least one segment, and one of each ring")
        order = sorted(range(len(segments)), key=lambda n: not segments[n].decodes)
        bounds = np.cumsum([0, *(len(segments[n].ids) for n in order)])
        places = {n: slice(int(bounds[i]), int(bounds[i + 1])) for i, n in enumerate(order)}
        rows = [(segments[n], places[n]) for n in order]
        logits = self._logits(rows, self._layers(rows))
        for each in segments:
            each.ring.advance(len(each.ids))
        return [logits[n] for n in map(order.index, range(len(segments)))]

    def _layers(self, rows: list[tuple[Segment, slice]]) -> Floats:
        """All layers but what follows attention in the last one -> its ``o [T, heads * d]``."""
        shape = self.shape
        ids = np.concatenate([np.asarray(each.ids, np.int32) for each, _ in rows])
        positions = np.concatenate([each.ring.tokens + np.arange(len(each.ids)) for each, _ in rows])
        cos, sin = self._rope.angles(positions)
        decode = sum(len(each.ids) for each, _ in rows if each.decodes)
        o = np.empty((len(ids), shape.heads * shape.head_dim), np.float32)
        qkv = self._stages.start(ids, cos, sin, decode)
        for layer in range(shape.layers):
            if layer:
                qkv = self._stages.next(layer, o)
            kv = qkv[:, shape.heads :].reshape(len(ids), 2, shape.kv_heads, shape.head_dim)
            whole, scales = int8_of(kv)
            for each, place in rows:
                ring = each.ring
                ring.write(layer, whole[place], scales[place])
                if ring.tokens < SINK_TOKENS:
                    ring.write_sinks(layer, kv[place], cos[place], sin[place])
                attend = self._attention.rows if each.decodes else self._attention.chunk
                attend(ring, layer, qkv[place, : shape.heads], o[place])
        return o

    def _logits(self, rows: list[tuple[Segment, slice]], o: Floats) -> list[Floats]:
        wanted: list[int] = []
        counts = []
        for each, place in rows:
            first = {"none": place.stop, "last": place.stop - 1, "all": place.start}[each.wanted]
            wanted += range(first, place.stop)
            counts.append(place.stop - first)
        logits = self._stages.finish(o, wanted)
        return np.split(logits, np.cumsum(counts)[:-1])
