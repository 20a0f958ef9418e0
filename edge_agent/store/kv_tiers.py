"""The rules of parked KV: what can be restored, when restoring pays, what gives way.

Rules: pure functions of integers; no I/O, no clock, no state.  Design: KV.md, "Parked sessions: tiers".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from edge_agent.core.chat import Tier
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, block_start, full_blocks, sealed_blocks
from edge_agent.core.values import bounded

MAX_SPEED = 10**12
"""Bytes a second, or thousandths of a token a second."""
LEARNING = 4
"""A measurement counts one part in this many of the average."""
_US_PER_S = 1_000_000


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
        if block_start(count + 2) <= found.tokens:
            break
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


@dataclass(frozen=True, slots=True)
class Speeds:
    """What this board was measured to do: bytes a second out of each tier, and prefill in thousandths of a token a second.

    The defaults are cautious; KV.md's measured figures (842 tokens/s of prefill, 144 MB/s of restore) replace them as soon as
    something was measured.
    """

    prefill_mtps: int = 200_000
    ram_bps: int = 500_000_000
    disk_bps: int = 50_000_000
    peer_bps: int = 2_000_000

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            bounded(f"speed {name}", getattr(self, name), 1, MAX_SPEED)

    def after_prefill(self, tokens: int, elapsed_us: int) -> Speeds:
        """These speeds, having seen a prefill of ``tokens`` tokens take ``elapsed_us``."""
        return replace(self, prefill_mtps=_learned(self.prefill_mtps, 1000 * tokens, elapsed_us))

    def after_restore(self, tier: Tier, size_bytes: int, elapsed_us: int) -> Speeds:
        """These speeds, having seen ``size_bytes`` come out of ``tier`` in ``elapsed_us``; other tiers have none."""
        match tier:
            case Tier.RAM:
                return replace(self, ram_bps=_learned(self.ram_bps, size_bytes, elapsed_us))
            case Tier.DISK:
                return replace(self, disk_bps=_learned(self.disk_bps, size_bytes, elapsed_us))
            case Tier.PEER:
                return replace(self, peer_bps=_learned(self.peer_bps, size_bytes, elapsed_us))
        return self

    def bandwidth_bps(self, tier: Tier) -> int:
        """Raises ``ValueError`` for a tier that nothing is restored from."""
        known = {Tier.RAM: self.ram_bps, Tier.DISK: self.disk_bps, Tier.PEER: self.peer_bps}
        if tier not in known:
            raise ValueError(f"nothing is restored from tier {tier}")
        return known[tier]

    def restore_us(self, tier: Tier, size_bytes: int) -> int:
        """What restoring ``size_bytes`` from ``tier`` is expected to take; from the hot ring, nothing."""
        return 0 if tier is Tier.HOT or not size_bytes else _ceil(size_bytes * _US_PER_S, self.bandwidth_bps(tier))

    def prefill_us(self, tokens: int) -> int:
        """What computing ``tokens`` tokens is expected to take."""
        return _ceil(tokens * 1000 * _US_PER_S, self.prefill_mtps)


def restore_pays(tokens: int, size_bytes: int, bandwidth_bps: int, prefill_mtps: int) -> bool:
    """KV.md, the tier rule: restore beats recompute iff bandwidth > bytes/token * prefill tokens/s."""
    return bandwidth_bps * 1000 * tokens > size_bytes * prefill_mtps


class Parked(NamedTuple):
    """A session that may give way. ``idle``: how many uses of other sessions have come since its own last."""

    name: str
    named: bool
    freed_bytes: int
    restore_us: int
    idle: int


def first_to_go(sessions: Iterable[Parked]) -> Parked | None:
    """KV.md, the eviction rule: unnamed ones first, then the best bytes freed a us of expected restore cost.

    The expected cost is what coming back would take, times the odds of it, which are taken as 1 in ``idle + 1``.  Ties: the
    smaller name.  One that frees nothing never goes.
    """
    candidates = [each for each in sessions if each.freed_bytes]
    return min(candidates, key=_staying_power, default=None)


def _staying_power(session: Parked) -> tuple[bool, int, str]:
    scaled_us = max(1, session.restore_us) * 2**32
    return session.named, scaled_us // (session.freed_bytes * (session.idle + 1)), session.name


def _learned(average: int, amount: int, elapsed_us: int) -> int:
    """The integer moving average of a speed; nothing is learned from nothing."""
    if amount <= 0 or elapsed_us <= 0:
        return average
    seen = min(MAX_SPEED, amount * _US_PER_S // elapsed_us)
    return max(1, average + (seen - average) // LEARNING)


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
