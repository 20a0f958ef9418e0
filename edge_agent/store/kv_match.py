"""The longest prefix of a prompt whose KV is here, over all sessions.

Rules: a hash for each 64 ids, a look-up for each name, then a comparison of at most 127 ids with each of few sessions.  Blocks
that nothing can be restored from count for nothing: a prefix needs its whole window.  Whoever calls holds the registry's lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from edge_agent.core.kv import BLOCK_TOKENS, block_start, chain
from edge_agent.store.kv_held import common
from edge_agent.store.kv_registry import Registry
from edge_agent.store.kv_tiers import NOTHING, Restorable

MAX_TAIL_CANDIDATES = 64
"""Sessions whose rows are compared with a prompt at one place, the last used first."""


class Match(NamedTuple):
    """``names``: of the prelude and of the prompt's full blocks. ``session``: whose rows they are, "" if none are needed."""

    here: Restorable
    names: Sequence[bytes]
    session: str


def longest(registry: Registry, ids: Sequence[int]) -> Match | None:
    """Of at most ``len(ids) - 1`` tokens; ``None`` if not even a prelude is here."""
    limit = len(ids) - 1
    names = list(chain(registry.kv_format.fingerprint, ids[: max(0, limit)]))
    if not names or names[0] not in registry.blocks:
        return None
    best, found = NOTHING, ""
    for sealed in _restorable_counts(registry, names):
        if block_start(sealed + 2) <= best.tokens:
            break
        for here, name in _candidates(registry, ids, sealed, names[sealed]):
            if (here.tokens, here.canonical) > (best.tokens, best.canonical):
                best, found = here, name
    return Match(best, names, found)


def begins_with_all_of(registry: Registry, name: str, ids: Sequence[int], same: int) -> bool:
    """Do ``ids``, whose first ``same`` are those of the session, begin with all that it has?"""
    rest = registry.sessions[name].ids[same:]
    return same + len(rest) <= len(ids) and common(rest, ids[same : same + len(rest)]) == len(rest)


def _restorable_counts(registry: Registry, names: Sequence[bytes]) -> list[int]:
    """How many sealed blocks may be restored at once (their whole window is here), most first; ``names[0]`` is the root."""
    counts, run = [0], 0
    for sealed in range(1, len(names)):
        run = run + 1 if names[sealed] in registry.blocks else 0
        if run >= min(sealed, registry.kv_format.window_blocks):
            counts.append(sealed)
    return counts[::-1]


def _candidates(registry: Registry, ids: Sequence[int], sealed: int, parent: bytes) -> Iterator[tuple[Restorable, str]]:
    """What is restorable of ``ids`` with ``sealed`` sealed blocks, and the rows of each session that goes on from there."""
    start, limit = block_start(sealed), len(ids) - 1
    yield Restorable(start, sealed), ""
    for name in registry.last_used(registry.tails.get(parent, ()))[:MAX_TAIL_CANDIDATES]:
        session = registry.sessions[name]
        registry.checked_rows(session)
        same = common(session.ids[start : start + 2 * BLOCK_TOKENS], ids[start:limit])
        yield session.restorable(start + same), name
