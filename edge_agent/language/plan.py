"""Where a turn's KV comes from: decided from token ids alone, with the reasons, so that it can be told.

Rules: pure, frozen, integers.  At least one id of a turn is computed, for its logits are what the answer begins with.  A session
of a client that resends its history goes on if the resent ids begin with all of its own; if they diverge from it, a new session
begins with what both have in common, and the other stays as it was.  A named session keeps its name whatever it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.core.values import bounded

MAX_COUNT = 2**31
UNNAMED = "~"
"""What the names of sessions begin with that their clients gave none."""


class Source(StrEnum):
    """Whose KV a turn begins with."""

    NEW = "new"
    """Nobody's: everything is computed."""
    OWN = "own"
    """Its session goes on where it ended."""
    FORK = "fork"
    """A new session begins as another one did."""
    REWOUND = "rewound"
    """Its named session goes back to where what was resent diverges."""


@dataclass(frozen=True, slots=True)
class Past:
    """A session that a turn may go on from: all its ``ids``, of which the first ``kv_tokens`` can be had as KV.

    ``name`` is empty for KV whose session is gone.  ``busy``: it answers another turn now.
    """

    name: str
    ids: Sequence[int]
    kv_tokens: int
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """The ids of a turn. ``whole``: as a conversation of its own.  ``following``: as new messages after a past.

    ``opening``: how many ids of ``whole`` come before the first words of the assistant; 0 if there are none.  ``bare``:
    ``following`` without the answer's beginning, if that was given.
    """

    whole: tuple[int, ...]
    following: tuple[int, ...] = ()
    opening: int = 0
    bare: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounded("ids of a turn", len(self.whole), 1, MAX_COUNT)


@dataclass(frozen=True, slots=True)
class Plan:
    """``session`` goes on with ``ids`` as its prompt, whose first ``keep_tokens`` are KV already; the others are computed.

    ``base_tokens``: so many ids are the session's before the turn (a fork begins with them, a rewound one is cut to them).
    """

    session: str
    source: Source
    of: str
    ids: tuple[int, ...]
    keep_tokens: int
    base_tokens: int
    reason: str


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if tuple(one[low:middle]) == tuple(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def for_anyone(asked: Asked, past: Past | None, fresh: str) -> Plan:
    """The plan of a turn without a session's name; ``past`` has the longest prefix in common, ``fresh`` is an unused name."""
    if past is None:
        return Plan(fresh, Source.NEW, "", asked.whole, 0, 0, "no session begins like this")
    common = common_prefix(asked.whole, past.ids)
    keep = min(common, past.kv_tokens, len(asked.whole) - 1)
    if past.name.startswith(UNNAMED) and common == len(past.ids) and not past.busy:
        return _going_on(past, asked.whole, common, "the resent history is all of its session")
    if keep <= 0:
        return Plan(fresh, Source.NEW, "", asked.whole, 0, 0, "no session with KV begins like this")
    return Plan(fresh, Source.FORK, past.name, asked.whole, keep, keep, _why_forked(past, common))


def _why_forked(past: Past, common: int) -> str:
    if common < len(past.ids) or not past.name:
        return f"the prompt diverges at token {common}"
    return "its session answers somebody else" if past.busy else "its session has a name, which the turn did not give"


def for_named(name: str, asked: Asked, past: Past | None) -> Plan:
    """The plan of a turn of the session ``name``, whose ``past`` is ``None`` before its first turn.

    The turn's messages are new ones, unless they begin with the session's own ids, or with all of the prompt of its first turn
    and an assistant's words after it: then they are its history, resent, and it goes on from where they diverge.  A turn whose
    answer has begun may be the session's last one, broken off: then that one goes on.
    """
    if past is None or not past.ids:
        return Plan(name, Source.NEW, "", asked.whole, 0, 0, "the session is new")
    common = common_prefix(asked.whole, past.ids)
    if common == len(past.ids):
        return _going_on(past, asked.whole, common, "the resent history is all of the session")
    if 0 < asked.opening <= common:
        return _going_on(past, asked.whole, common, f"the resent history diverges at token {common}")
    last = _last(past.ids, asked.bare)
    if last is not None:
        ids = (*past.ids[:last], *asked.following)
        return _going_on(past, ids, common_prefix(ids, past.ids), "its last turn, which was broken off, goes on")
    following = asked.following[1:] if asked.following[:1] == tuple(past.ids[-1:]) else asked.following
    return _going_on(past, (*past.ids, *following), len(past.ids), "new messages after its own")


def _going_on(past: Past, ids: tuple[int, ...], common: int, reason: str) -> Plan:
    """``past`` goes on with ``ids``, of which it has ``common``: as it is, or cut to them, or to all but the last id."""
    keep = min(common, past.kv_tokens, len(ids) - 1)
    base = common if past.kv_tokens < len(ids) else keep
    source = Source.OWN if base == len(past.ids) else Source.REWOUND
    return Plan(past.name, source, past.name, ids, keep, base, reason)


def _last(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """Where ``part`` lies in ``ids`` for the last time; ``None`` if nowhere, or if it is empty."""
    size = len(part)
    for at in range(len(ids) - size, -1, -1) if size else ():
        if ids[at] == part[0] and tuple(ids[at : at + size]) == tuple(part):
            return at
    return None
