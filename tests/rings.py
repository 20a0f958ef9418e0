"""Sessions of the language path without an engine: a ring, its ids, and what a store would have kept of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.kv import SINK_TOKENS, block_start, sealed_blocks
from edge_agent.core.model_shape import ModelShape, ring_bytes
from edge_agent.language.decoder import Decoder, Segment
from edge_agent.language.ring import Ring


class Session:
    """A ring with everything that was ever sealed from it, as a store keeps it."""

    def __init__(self, decoder: Decoder, shape: ModelShape, window_blocks: int) -> None:
        self.decoder, self.shape = decoder, shape
        self.ring = Ring(bytearray(ring_bytes(shape, window_blocks)), shape, window_blocks)
        self.ids: list[int] = []
        self.blocks: dict[int, bytes] = {}

    def read(self, ids: Sequence[int], step: int = 64, prompt: bool = True) -> NDArray[np.float32]:
        """Append ``ids``, at most ``step`` at a time; the logits after each."""
        logits = [np.empty((0, self.shape.vocabulary), np.float32)]
        while ids:
            count = min(step, self.ring.room, len(ids))
            logits += self.decoder.step([Segment(self.ring, ids[:count], "all", prompt)])
            self.ids += ids[:count]
            self.seal()
            ids = ids[count:]
        return np.concatenate(logits)

    def seal(self) -> None:
        self.blocks |= dict(self.ring.seal())

    def greedy(self, logits: NDArray[np.float32], count: int) -> list[int]:
        """The next ``count`` ids, one by one."""
        ids = []
        for _ in range(count):
            ids.append(int(logits.argmax()))
            logits = self.read(ids[-1:], prompt=False)[-1]
        return ids

    def parked(self) -> tuple[bytes, list[bytes], bytes]:
        sealed = sealed_blocks(self.ring.tokens)
        first = max(0, sealed - self.ring.window_blocks)
        rows = self.ring.rows(min(block_start(sealed), self.ring.tokens), self.ring.tokens)
        return self.ring.prelude(), [self.blocks[block] for block in range(first, sealed)], rows

    def resumed(self) -> Session:
        """Another session, in memory that held something else, with what a store has of this one."""
        other = Session(self.decoder, self.shape, self.ring.window_blocks)
        other.ring.values[...] = 99
        other.ring.scales[...] = 99
        other.ring.restore(self.ring.tokens, *self.parked())
        other.ids, other.blocks = list(self.ids), dict(self.blocks)
        return other


def visible(ring: Ring) -> tuple[NDArray[np.generic], ...]:
    """All that attention can see, and the sinks' exact form."""
    prelude = np.frombuffer(ring.prelude(), np.float16).reshape(-1, SINK_TOKENS, ring.shape.head_dim)
    return ring.values[..., : ring.used, :], ring.scales[..., : ring.used], prelude[:, : ring.tokens]


def same_ring(one: Ring, other: Ring) -> bool:
    return one.tokens == other.tokens and all(map(np.array_equal, visible(one), visible(other)))


def text(count: int, vocabulary: int, seed: int = 1) -> list[int]:
    return [int(each) for each in np.random.default_rng(seed).integers(0, vocabulary, count)]
