"""What the agreed table costs: made from nothing, and again after one record has changed.

How: 16 unlike boards, 40 demands of 25 units each, so 1,000 players, over several fleets drawn from a seed; from the rounded
facts to the table's digest, in processor time of one thread.  After a change, the other boards' facts are the same objects, as
the node keeps them; the table is equal to one that is made from nothing.  The last rows are the hardest case for the game alone:
1,000 players no two of which have the same costs, so that none can move together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from edge_agent.core.errors import UnavailableError
from edge_agent.placement.facts import BoardFacts
from edge_agent.placement.game import settle
from edge_agent.placement.table import TableMaker
from tests.bench.figures import Figure, Progress, p50, p95
from tests.fleet_facts import Draw, crowds, full_fleet, rules

FLEETS, CHANGES = 12, 12
PLAYERS, BOARDS = 1_000, 16
NOTHING_MS, CHANGE_MS = 50, 5


def measure(progress: Progress) -> Iterator[Figure]:
    nothing, changed = list[float](), list[float]()
    for seed in range(FLEETS):
        progress(f"fleet {seed + 1} of {FLEETS}")
        facts = full_fleet(seed, BOARDS)
        nothing += [_ms(lambda facts=facts: TableMaker(rules()).make(facts).digest) for _ in range(3)]  # type: ignore[misc]
        changed += _changes_ms(facts)
    size = f"{PLAYERS:,} requests x {BOARDS} boards"
    yield Figure(f"table of {size}, from nothing, p50", p50(nothing), "ms", NOTHING_MS)
    yield Figure(f"table of {size}, from nothing, p95", p95(nothing), "ms", NOTHING_MS)
    yield Figure(f"table of {size}, after one record changed, p50", p50(changed), "ms", CHANGE_MS)
    yield Figure(f"table of {size}, after one record changed, p95", p95(changed), "ms")
    progress("players that are all unlike")
    yield from _unlike()


def _changes_ms(facts: list[BoardFacts]) -> list[float]:
    """One board's heat and demand change, and so does the table. Raises ``UnavailableError`` if the result is another."""
    maker = TableMaker(rules())
    maker.make(facts)
    samples = []
    for number in range(CHANGES):
        at = number % len(facts)
        demand = tuple(replace(each, rate_mhz=each.rate_mhz * 3 // 4) for each in facts[at].demand)
        facts = [*facts[:at], replace(facts[at], headroom_mdegc=16_000 + 8_000 * (number % 3), demand=demand), *facts[at + 1 :]]
        samples.append(_ms(lambda facts=facts: maker.make(facts).digest))  # type: ignore[misc]
    if maker.make(facts).encode() != TableMaker(rules()).make(facts).encode():
        raise UnavailableError("the table after changes", "it is not the one that is made from nothing")
    return samples


def _unlike() -> Iterator[Figure]:
    samples, moves, bound = list[float](), 0, 0
    for seed in range(FLEETS):
        players = crowds(Draw(seed), PLAYERS, BOARDS, horizon=10_000)
        samples.append(_ms(lambda players=players: settle(players, BOARDS, 10, 10_000)))  # type: ignore[misc]
        settled = settle(players, BOARDS, 10, 10_000)
        moves, bound = max(moves, settled.moves), max(bound, settled.bound)
    yield Figure(f"game of {PLAYERS:,} players, no two alike, {BOARDS} boards, p50", p50(samples), "ms")
    yield Figure("its moves, at most", moves, "")
    yield Figure("the bound on them, at most", bound, "")


def _ms(call: Callable[[], object]) -> float:
    started_ns = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - started_ns) / 10**6
