"""The rules of parked KV: what can be restored, when restoring pays, what gives way.

Rules: pure functions of integers; no I/O, no clock, no state.  Design: KV.md, "Parked sessions: tiers".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, block_start, full_blocks, sealed_blocks

MAX_SPEED = 10**12
"""Bytes a second, or thousandths of a token a second."""
_LEARNING = 8
"""A new measurement counts one part in this many."""


class Restorable(NamedTuple):
    """The first ``tokens`` tokens, made of ``sealed`` sealed blocks and the rows after them."""

    tokens: int
    sealed: int

    def window(self, window_blocks: int) -> range:
        """The sealed blocks that attention sees: the ones that must be there."""
        return range(max(0, self.sealed - window_blocks), self.sealed)

    @property
    def canonical(self) -> bool:
        """Is this the state of a session that never stopped: its last full block still in rows?"""
        return self.sealed == sealed_blocks(self.tokens)


NOTHING = Restorable(0, 0)


def restorable(limit: int, window_blocks: int, prelude: bool, sealed: Collection[int], rows: Mapping[int, int]) -> Restorable:
    """The longest prefix of at most ``limit`` tokens whose KV can be restored from what is here.

    A prefix of m tokens can be restored iff the prelude is here, and for some number s of sealed blocks all blocks
    max(0, s - window_blocks) to s - 1 are here, and all rows of the positions block_start(s) to m - 1.  At most 127 rows are
    restored, since with 128 a session would have sealed another block.

    ``sealed``: numbers of the sealed blocks that are here.  ``rows``: by block, how many rows from its start are here.  Among
    ways to the same length, the one that a session which never stopped would be in comes first (``Restorable.canonical``).
    """
    if not prelude or limit < SINK_TOKENS:
        return NOTHING
    found = NOTHING
    for count in sorted({0, *(block + 1 for block in sealed)}, reverse=True):
        if count > full_blocks(limit) or any(block not in sealed for block in Restorable(0, count).window(window_blocks)):
            continue
        here = Restorable(min(limit, _rows_end(count, rows)), count)
        if here.tokens > found.tokens or (here.tokens == found.tokens and here.canonical):
            found = here
    return found


def _rows_end(sealed: int, rows: Mapping[int, int]) -> int:
    first = rows.get(sealed, 0)
    if first < BLOCK_TOKENS:
        return block_start(sealed) + first
    return block_start(sealed + 1) + min(rows.get(sealed + 1, 0), BLOCK_TOKENS - 1)
