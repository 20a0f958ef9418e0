"""One step of the model for rows of several sessions at once.

Rules: a step appends its rows to their rings and seals nothing.  What a row gives depends on its position, the tokens before it
and whether it is a prompt's; not on what shares its step, nor on where a prompt was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.kv import SINK_TOKENS
from edge_agent.core.model_shape import ModelShape
from edge_agent.language.attention import Rows, Tiles, Workspace, groups
from edge_agent.language.int8 import quantize
from edge_agent.language.ring import Ring
from edge_agent.language.rope import Rope
from edge_agent.language.stages import StageCalls

Floats = NDArray[np.float32]
Wanted = Literal["none", "last", "all"]
DECODE_ROWS = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one ring, at most ``ring.room``, and the rows whose logits are wanted.

    ``prompt``: a piece of one; else what was generated, or may be, at most ``DECODE_ROWS``.
    """

    ring: Ring
    ids: Sequence[int]
    wanted: Wanted = "last"
    prompt: bool = False

    def __post_init__(self) -> None:
        most = self.ring.room if self.prompt else min(DECODE_ROWS, self.ring.room)
        if not 1 <= len(self.ids) <= most:
            raise ValueError(f"a segment of {len(self.ids)} tokens; the ring takes 1 to {most} now")


class Lane:
    """A segment's rows of the step's arrays, ``(kv, whole, scales, cos, sin)``, that every layer fills anew."""

    def __init__(self, segment: Segment, place: slice, arrays: tuple[Floats, ...]) -> None:
        self._kv, whole, scales, self._cos, self._sin = (each[place] for each in arrays)
        ring = self._ring = segment.ring
        slot = ring.slot(ring.tokens)
        slots = slice(slot, slot + len(whole))
        self._whole, self._scales = whole.transpose(1, 2, 0, 3), scales.transpose(1, 2, 0)
        self._values_to, self._scales_to = ring.values[:, :, :, slots], ring.scales[:, :, :, slots]
        self._sinks = ring.tokens < SINK_TOKENS

    def append(self, layer: int) -> None:
        np.copyto(self._values_to[layer], self._whole, "unsafe")
        np.copyto(self._scales_to[layer], self._scales)
        if self._sinks:
            self._ring.write_sinks(layer, self._kv, self._cos, self._sin)


class Decoder:
    """``threads``: how many the attention of prompts may use; the stages were opened with theirs."""

    def __init__(self, stages: StageCalls, shape: ModelShape, threads: int = 1) -> None:
        self._stages, self.shape = stages, shape
        self._rope = Rope(shape.head_dim, shape.rope_base)
        self._space, self._second = Workspace(), Workspace()
        self._helper = ThreadPoolExecutor(1) if threads > 1 else None

    def step(self, segments: Sequence[Segment]) -> list[Floats]:
        """Append every segment to its ring; logits ``[0, 1 or T, vocabulary]`` a segment, in their order."""
        if len({id(each.ring) for each in segments}) != len(segments) or not segments:
            raise ValueError("a step has at least one segment, and one of each ring")
        order = sorted(range(len(segments)), key=lambda n: segments[n].prompt)
        bounds = np.cumsum([0, *(len(segments[n].ids) for n in order)])
        places = {n: slice(int(bounds[i]), int(bounds[i + 1])) for i, n in enumerate(order)}
        rows = [(segments[n], places[n]) for n in order]
        logits = self._logits(rows, self._layers(rows))
        for each in segments:
            each.ring.advance(len(each.ids))
        return [logits[n] for n in map(order.index, range(len(segments)))]

    def _layers(self, rows: list[tuple[Segment, slice]]) -> Floats:
        """All layers but what follows attention in the last one -> its ``o [T, heads * d]``."""
        shape, stages = self.shape, self._stages
        ids = np.concatenate([np.asarray(each.ids, np.int32) for each, _ in rows])
        positions = np.concatenate([each.ring.tokens + np.arange(len(each.ids)) for each, _ in rows])
        cos, sin = self._rope.angles(positions)
        qkv = stages.start(ids, cos, sin, sum(len(each.ids) for each, _ in rows if not each.prompt))
        o = np.empty((len(ids), shape.heads * shape.head_dim), np.float32)
        kv = qkv[:, shape.heads :].reshape(len(ids), 2, shape.kv_heads, shape.head_dim)
        whole, scales = np.empty_like(kv), np.empty(kv.shape[:-1], np.float32)
        column = scales[..., None]
        lanes = [Lane(each, place, (kv, whole, scales, cos, sin)) for each, place in rows]
        attentions = self._attentions(rows, qkv[:, : shape.heads], o)
        for layer in range(shape.layers):
            if layer:
                stages.next(layer, o)
            quantize(kv, whole, scales, column)
            for lane in lanes:
                lane.append(layer)
            for attention in attentions:
                attention.attend(layer)
        return o

    def _attentions(self, rows: list[tuple[Segment, slice]], q: Floats, o: Floats) -> list[Rows | Tiles]:
        found: list[Rows | Tiles] = []
        first = 0
        for group in groups([(each.ring, len(each.ids)) for each, _ in rows if not each.prompt]):
            last = first + sum(count for _, count in group)
            found.append(Rows(group, q[first:last], o[first:last], self._space))
            first = last
        prompts = ((each.ring, q[place], o[place]) for each, place in rows if each.prompt)
        return found + [Tiles(*each, self._space, self._second, self._helper) for each in prompts]

    def _logits(self, rows: list[tuple[Segment, slice]], o: Floats) -> list[Floats]:
        wanted: list[int] = []
        counts = []
        for each, place in rows:
            first = {"none": place.stop, "last": place.stop - 1, "all": place.start}[each.wanted]
            wanted += range(first, place.stop)
            counts.append(place.stop - first)
        logits = self._stages.finish(o, wanted)
        return np.split(logits, np.cumsum(counts)[:-1])
