"""Fleets drawn from a seed by integer arithmetic alone, so that golden tables hold on every Python: boards that are unlike, their
models, and what is asked where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from edge_agent.core.config import PolicySection
from edge_agent.core.kv import KvState
from edge_agent.core.values import DataClass, ModelOffer, ShapeCost, TrustTier
from edge_agent.core.wanted import Demand, Wanted
from edge_agent.placement.facts import BoardFacts
from edge_agent.placement.game import Crowd
from edge_agent.placement.options import Rules

T = TypeVar("T")

MODELS = (
    ("faces-big", "detect_faces", 900, 300_000),
    ("faces-small", "detect_faces", 700, 60_000),
    ("classes", "classify", 800, 120_000),
    ("talker", "chat", 600, 2_000_000),
)
"""Name, task, quality, and what one inference takes on the slowest board, in µs."""
DIGESTS = {name: bytes([number]) * 32 for number, (name, _, _, _) in enumerate(MODELS)}
FINGERPRINT = b"\x07" * 32


class Draw:
    """Knuth's 64-bit linear congruential generator (MMIX), high bits only."""

    def __init__(self, seed: int) -> None:
        self._state = seed * 2 + 1

    def below(self, limit: int) -> int:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self._state >> 33) % limit

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]


def rules(**policy: int) -> Rules:
    """All models but the last of a fleet's are signed by these; the policy may differ from the default."""
    return Rules(PolicySection(**policy), frozenset(DIGESTS.values()))


def wanted(draw: Draw) -> Wanted:
    """A request class of some task, limits and sensitivity."""
    task = draw.one_of(("detect_faces", "classify", "chat"))
    return Wanted(
        task, "", 64 + draw.between(4, 9) if task == "chat" else draw.between(10, 20), 1 << draw.between(8, 20),
        1 << draw.between(17, 24), draw.one_of((0, 0, 500, 800)), draw.one_of((0, 0, 0, 1 << 20)),
        draw.one_of((TrustTier.NONE, TrustTier.NONE, TrustTier.WARNING, TrustTier.AFFIRMING)), draw.one_of(list(DataClass)),
    ).classed()  # fmt: skip


def supply(draw: Draw, most_mib: int = 64) -> dict[str, Any]:
    """What one board is and offers; its language model has up to ``most_mib`` of memory for sessions."""
    speed = draw.one_of((1, 2, 3, 5, 8, 12))
    offers, kv = [], []
    for name, task, quality, slow_us in MODELS:
        if draw.below(5) == 0:
            continue
        busy_us = slow_us * draw.between(80, 120) // 100 // speed
        shape = ShapeCost(draw.between(10, 73), busy_us + draw.below(1000), draw.between(1, 5) * busy_us // 2, draw.below(9))
        digest = DIGESTS[name] if draw.below(20) else bytes(31) + b"\xff"
        offers.append(
            ModelOffer(
                name,
                task,
                digest,
                quality,
                busy_us,
                draw.between(1, 5) * busy_us,
                draw.one_of((1, 4)) if task == "chat" else 1,
                (shape,),
            )
        )
        if task == "chat":
            free_bytes, prefill_tok_s = draw.below(most_mib) << 20, draw.between(20, 2000)
            kv.append(KvState(name, FINGERPRINT, 4_096, 16_384, free_bytes, 4_096, draw.below(10**6), prefill_tok_s))
    return {
        "up": draw.below(12) > 0, "trust": draw.one_of((TrustTier.AFFIRMING,) * 4 + tuple(TrustTier)),
        "headroom_mdegc": draw.one_of((None, 30_000, 9_000, 2_500, 1_500)),
        "offers": tuple(offers), "kv": tuple(kv),
    }  # fmt: skip


def fleet(seed: int, boards: int = 6, classes: int = 4, most_mhz: int = 4_000) -> list[BoardFacts]:
    """Boards at random; at each of them, some of ``classes`` classes come in."""
    draw = Draw(seed)
    known = sorted({wanted(draw) for _ in range(classes)})
    made = []
    for number in range(boards):
        name = f"board-{number:02}"
        demand = tuple(Demand(each, draw.between(1, most_mhz)) for each in known if draw.below(2))
        made.append(BoardFacts.rounded(name, demand=demand, **supply(draw)))
    return made


def crowds(draw: Draw, players: int, boards: int, *, horizon: int = 10_000) -> list[Crowd]:
    """Players of one each, in ms: a few kinds of work, a speed for each board, and costs that no two players have alike."""
    speeds = [draw.one_of((1, 2, 3, 5, 8, 12)) for _ in range(boards)]
    kinds_ms = [draw.between(20, 2_000) for _ in range(4)]
    return [_crowd(draw, speeds, draw.one_of(kinds_ms), horizon) for _ in range(players)]


def _crowd(draw: Draw, speeds: Sequence[int], slow_ms: int, horizon: int) -> Crowd:
    ingress, options = draw.below(len(speeds)), []
    for board, speed in enumerate(speeds):
        if board != ingress and draw.below(7) == 0:
            continue
        busy_ms = max(1, slow_ms * draw.between(70, 130) // 100 // speed)
        cost_ms = busy_ms + busy_ms * draw.between(1, 4) // 2 + (board != ingress) * draw.between(2, 40)
        options.append((board, cost_ms * horizon, busy_ms))
    return Crowd(1, *zip(*options, strict=True))


def full_fleet(
    seed: int, boards: int = 16, demands: int = 40, units: int = 1_000, horizon_us: int = 10_000_000
) -> list[BoardFacts]:
    """Unlike boards that are all up, and at random ones of them ``demands`` demands of equally many units, ``units`` in all."""
    draw = Draw(seed)
    rate_mhz = units // demands * 1000 * 10**6 // horizon_us
    classes = [
        Wanted(
            draw.one_of(("detect_faces", "classify")),
            "",
            draw.between(10, 20),
            1 << draw.between(8, 20),
            1 << draw.between(17, 24),
        )
        for _ in range(12)
    ]
    classes += [
        Wanted("chat", "", 64 + draw.between(4, 8), 1 << draw.between(8, 12), 1 << draw.between(20, 24)) for _ in range(4)
    ]
    pairs: dict[tuple[int, Wanted], None] = {}
    while len(pairs) < demands:
        pairs[draw.below(boards), draw.one_of(classes).classed()] = None
    return [
        BoardFacts.rounded(
            f"board-{board:02}",
            demand=tuple(Demand(each, rate_mhz) for at, each in sorted(pairs) if at == board),
            **{**supply(draw, 1024), "up": True, "trust": TrustTier.NONE, "headroom_mdegc": 30_000},
        )
        for board in range(boards)
    ]
