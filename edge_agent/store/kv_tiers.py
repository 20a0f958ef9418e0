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

MAX_TOK_S = 10**9
LEAST_PREFILLED, LEAST_RESTORED = 256, 32
"""Fewer tokens say more about the overhead than about the speed."""
MARGIN = 2
PRIOR_PREFILL_TOK_S, PRIOR_RESTORE_TOK_S = 200, 6000
"""Before anything was measured: a small board reads slowly, and restores thirty times as fast (KV.md, figures)."""
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
    """What this board was measured to do, in tokens a second; 0 before it was. A tier of a peer ends on this board's disk."""

    prefill_tok_s: int = 0
    ram_tok_s: int = 0
    disk_tok_s: int = 0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            bounded(f"speed {name}", getattr(self, name), 0, MAX_TOK_S, "tokens a second")

    def after_prefill(self, tokens: int, elapsed_us: int) -> Speeds:
        """These speeds, having seen a prefill of ``tokens`` tokens take ``elapsed_us``."""
        if tokens < LEAST_PREFILLED:
            return self
        return replace(self, prefill_tok_s=_learned(self.prefill_tok_s, tokens, elapsed_us))

    def after_restore(self, tier: Tier, tokens: int, elapsed_us: int) -> Speeds:
        """These speeds, having seen ``tokens`` tokens come out of ``tier`` in ``elapsed_us``; other tiers have none."""
        if tokens < LEAST_RESTORED or tier not in (Tier.RAM, Tier.DISK):
            return self
        learned = _learned(self.restore_tok_s(tier), tokens, elapsed_us)
        return replace(self, ram_tok_s=learned) if tier is Tier.RAM else replace(self, disk_tok_s=learned)

    def restore_tok_s(self, tier: Tier) -> int:
        return {Tier.RAM: self.ram_tok_s, Tier.DISK: self.disk_tok_s}.get(tier, 0)

    def restore_us(self, tier: Tier, tokens: int) -> int:
        """What restoring ``tokens`` tokens from ``tier`` is expected to take; from the hot ring, nothing."""
        return 0 if tier is Tier.HOT else tokens * _US_PER_S // (self.restore_tok_s(tier) or PRIOR_RESTORE_TOK_S)

    def prefill_us(self, tokens: int) -> int:
        """What computing ``tokens`` tokens is expected to take."""
        return tokens * _US_PER_S // (self.prefill_tok_s or PRIOR_PREFILL_TOK_S)

    def restoring_pays(self, tier: Tier) -> bool:
        """The tier rule for KV that lies in ``tier``; before both were measured, it pays."""
        known = self.restore_tok_s(tier)
        return not known or not self.prefill_tok_s or restore_pays(known, self.prefill_tok_s)


def restore_pays(restore_tok_s: int, prefill_tok_s: int) -> bool:
    """KV.md, the tier rule: restore beats recompute iff bandwidth > bytes/token * prefill tokens/s, that is, iff it gives more
    tokens a second.  ``MARGIN`` is on the side of restoring, which gives the very same bytes back."""
    return MARGIN * restore_tok_s > prefill_tok_s


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


def _learned(old: int, tokens: int, elapsed_us: int) -> int:
    """A measured speed after one more measurement: one part in four is new."""
    new = min(MAX_TOK_S, max(1, tokens * _US_PER_S // max(1, elapsed_us)))
    return new if not old else (3 * old + new) // 4
