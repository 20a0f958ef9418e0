"""Which rows one step computes: of every live turn that decodes, of their guesses, and of one prompt.

Rules: pure, integers only.  In this order:

1. every turn that decodes gets its one row;
2. guesses, the likeliest first, as many as make the most expected tokens a microsecond by the measured cost of rows;
3. one piece of one prompt, the prompts taking turns: a whole block when nobody decodes, else what keeps the step within
   ``SLOWDOWN`` times its cost without it, and at least one tile so that prompts get on as well.

A piece never crosses the end of a block and ends at the end of a tile of ``TILE_TOKENS`` or of its prompt: where a prompt may be
cut depends on positions alone, not on who else is served.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from edge_agent.core.kv import BLOCK_TOKENS
from edge_agent.core.values import bounded
from edge_agent.language.speculation import MAX_GUESSES

SLOWDOWN = 4
TILE_TOKENS = 16
"""Blocks are whole tiles; the first tile of all has the sinks as well."""
GAIN_PERMILLE = 1050
"""Guesses must promise this much of what is made without them: what they cost beside the stages is not in the curve."""
MAX_CURVE_POINTS = 64
MAX_STEP_US = 3_600_000_000


@dataclass(frozen=True, slots=True)
class CostCurve:
    """What a step of so many rows costs: (rows, µs), both ascending; straight between the points and on after the last."""

    points: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        bounded("points of a cost curve", len(self.points), 1, MAX_CURVE_POINTS)
        for rows, us in self.points:
            bounded("cost curve rows", rows, 1, 2**20, "rows")
            bounded("cost curve cost", us, 1, MAX_STEP_US, "µs")
        if any(later[0] <= sooner[0] or later[1] < sooner[1] for sooner, later in pairwise(self.points)):
            raise ValueError(f"a cost curve ascends: {self.points}")

    @classmethod
    def measured(cls, samples: Sequence[tuple[int, int]]) -> CostCurve:
        """The curve under the best of ``samples``: more rows never cost less, so what a larger step took bounds a smaller one."""
        best: dict[int, int] = {}
        for rows, us in samples:
            best[rows] = min(us, best.get(rows, us))
        points: list[tuple[int, int]] = []
        for rows in sorted(best, reverse=True):
            points.append((rows, max(1, min(best[rows], points[-1][1] if points else best[rows]))))
        return cls(tuple(reversed(points)))

    def us(self, rows: int) -> int:
        """The cost of a step of ``rows`` rows, 0 for none."""
        if rows < 1:
            return 0
        points = self.points
        at = bisect_left(points, (rows, 0))
        if at == 0:
            return points[0][1]
        if at == len(points):
            at -= 1
        if at == 0:
            return points[0][1] * rows // points[0][0]
        (low, low_us), (high, high_us) = points[at - 1], points[at]
        return low_us + (high_us - low_us) * (rows - low) // (high - low)

    def most_rows(self, limit_us: int, most: int) -> int:
        """The most rows, up to ``most``, that cost no more than ``limit_us``."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.us(middle) <= limit_us else (low, middle - 1)
        return low


@dataclass(frozen=True, slots=True)
class Need:
    """A live turn. ``prompt``: ids that are not in KV yet and have to be before it decodes; 0 for one that decodes.

    ``room``: rows that fit before its block ends, at least 1.  ``guesses`` and their ``chance`` in thousandths.
    """

    slot: int
    room: int
    prompt: int = 0
    guesses: int = 0
    chance: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of one turn in a step: a piece of its prompt, or its next id and ``rows - 1`` guesses."""

    slot: int
    rows: int
    prompt: bool


def plan(needs: Sequence[Need], curve: CostCurve, last_prompt: int = -1, most_chunk: int = 64) -> tuple[Share, ...]:
    """One step. ``last_prompt``: the slot whose prompt got a piece last; ``most_chunk``: the largest piece, a tile or more."""
    decoding = [each for each in needs if not each.prompt]
    guesses = _guesses(decoding, curve)
    shares = [Share(each.slot, 1 + guesses[each.slot], False) for each in decoding]
    waiting = sorted((each for each in needs if each.prompt), key=lambda each: (each.slot <= last_prompt, each.slot))
    if waiting:
        rows = _chunk(waiting[0], sum(each.rows for each in shares), curve, most_chunk)
        shares.append(Share(waiting[0].slot, rows, True))
    return tuple(shares)


def _guesses(decoding: Sequence[Need], curve: CostCurve) -> dict[int, int]:
    """How many guesses of each turn are tried: the prefix of all, likeliest first, that makes the most tokens a µs."""
    offers = sorted(
        ((chance, each.slot) for each in decoding for chance in _chances(each)), key=lambda offer: (-offer[0], offer[1])
    )
    turns = len(decoding)
    expected, best, kept = turns * 1000, turns * GAIN_PERMILLE * 1000 // max(1, curve.us(turns)), 0
    for count, (chance, _) in enumerate(offers, 1):
        expected += chance
        rate = expected * 1000 // max(1, curve.us(turns + count))
        if rate > best:
            best, kept = rate, count
    found = dict.fromkeys((each.slot for each in decoding), 0)
    for _, slot in offers[:kept]:
        found[slot] += 1
    return found


def _chances(need: Need) -> list[int]:
    """That the first guess comes true, the first two, ... in thousandths; never rising, so a prefix is whole for each turn."""
    chances, chance = [], 1000
    for _ in range(min(need.guesses, need.room - 1, MAX_GUESSES)):
        chance = chance * need.chance // 1000
        chances.append(chance)
    return chances


def _chunk(need: Need, others: int, curve: CostCurve, most_chunk: int) -> int:
    wanted = min(need.prompt, need.room)
    fitting = most_chunk if not others else curve.most_rows(SLOWDOWN * curve.us(others), others + most_chunk) - others
    if wanted <= fitting:
        return wanted
    first = need.room - (BLOCK_TOKENS - TILE_TOKENS) if need.room > BLOCK_TOKENS else need.room % TILE_TOKENS or TILE_TOKENS
    return min(wanted, first + max(0, fitting - first) // TILE_TOKENS * TILE_TOKENS)
