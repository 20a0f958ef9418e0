"""The start-up test of a loaded language model: does it answer soundly, and what does a step of so many rows cost.

Rules: it runs on a scratch ring in the middle of a context, so that attention is in the cost.  A model whose logits are no
numbers, or whose rows depend on their company, is refused.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS, block_start
from edge_agent.language.batching import CostCurve
from edge_agent.language.decoder import DECODE_ROWS, Decoder, Segment
from edge_agent.language.ring import Ring

ROWS = (1, 2, 4, 8, 16, 64)
"""What lies between them is learned from the steps themselves (``costs``), and so is what noise made of these."""
ROUNDS, CHUNK_ROUNDS = 3, 1
LIMIT_US = 500_000
"""After this long no further round is begun, once there was one after the first, which also makes room."""
CONTEXT_BLOCKS = 7
MOST_DIFFERENCE = 0.1
"""Between the logits of a row alone and in company, over the largest: the last bits of tflite-runtime's graphs of 1 and of 4 rows
differ, and what rounds them to int8 makes more of it."""


def self_test(decoder: Decoder, ring: Ring) -> None:
    """Raises ``RefusedError`` for a model that does not answer soundly. Leaves the ring empty."""
    ids = [each % ring.shape.vocabulary for each in (1, 2, 3, 5)]
    together = decoder.step([Segment(ring, ids, "all")])[0].copy()
    ring.reset()
    alone = np.concatenate([decoder.step([Segment(ring, [each], "all")])[0] for each in ids])
    ring.reset()
    if not (np.isfinite(together).all() and np.isfinite(alone).all()):
        raise RefusedError("model file", "logits that are no numbers", "a model that answers", "build it again")
    if np.ptp(alone) == 0 or np.abs(together - alone).max() > MOST_DIFFERENCE * np.abs(alone).max():
        raise RefusedError("model file", "rows that depend on their company", "a model whose rows do not", "build it again")


def measured(decoder: Decoder, ring: Ring) -> CostCurve:
    """The cost of steps of ``ROWS`` rows: the best of some rounds. Leaves the ring empty."""
    start = _filled(ring)
    samples: list[tuple[int, int]] = []
    begun_ns = time.monotonic_ns()
    for each in range(1 + ROUNDS):
        for rows in ROWS:
            if rows <= DECODE_ROWS or each <= CHUNK_ROUNDS:
                samples.append((rows, _step_us(decoder, ring, rows)))
                ring.truncate(start)
        if each and (time.monotonic_ns() - begun_ns) // 1000 > LIMIT_US:
            break
    ring.reset()
    return CostCurve.measured(samples)


def _filled(ring: Ring) -> int:
    """Fill the ring with zeros up to the end of a block; how many tokens that is."""
    shape, blocks = ring.shape, min(CONTEXT_BLOCKS, ring.window_blocks)
    tokens = block_start(blocks + 1)
    zeros = [bytes(shape.block_bytes)] * blocks
    ring.restore(tokens, bytes(shape.prelude_bytes), zeros, bytes(BLOCK_TOKENS * shape.row_bytes))
    return tokens


def _step_us(decoder: Decoder, ring: Ring, rows: int) -> int:
    ids: NDArray[np.int32] = np.arange(rows, dtype=np.int32) % ring.shape.vocabulary
    prompt = rows > DECODE_ROWS
    segment = Segment(ring, [int(each) for each in ids], "last" if prompt else "all", prompt)
    started_ns = time.monotonic_ns()
    decoder.step([segment])
    return max(1, (time.monotonic_ns() - started_ns) // 1000)
