"""What a session store says of a prefix of tokens: that its KV is held, and the bytes of it.

Rules: values only; ids are copies, 4 bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_agent.core.chat import Tier
from edge_agent.core.kv import block_start, full_blocks, next_name
from edge_agent.store.kv_journal import Ids


@dataclass(frozen=True, slots=True)
class Held:
    """A prefix of tokens whose KV the store holds.

    ``name``: the session it was found in ("" if only blocks without one are left).  ``ids``: all of that session's ids.
    ``tokens``: how many of them are in KV, as ``sealed`` sealed blocks and the rows after them.  ``root``, ``blocks``: names of
    the prelude and of the sealed blocks in the window.  ``whole``: the ids that were asked for begin with all of the session's,
    so that it may simply go on; otherwise ``fork`` it.  ``tier``: where it lies.  ``notes``: what a person should know.

    ``sealed`` is ``core.kv.sealed_blocks(tokens)`` for a session that is resumed, and one more where a match ends at the sealed
    block of another session, whose rows are gone: a ring that is restored must take the number from here.
    """

    name: str
    ids: Ids
    tokens: int
    sealed: int
    root: bytes
    blocks: tuple[bytes, ...]
    whole: bool
    tier: Tier
    notes: tuple[str, ...] = ()

    @property
    def pending(self) -> Ids:
        """Acknowledged ids that are not in KV."""
        return self.ids[self.tokens :]


@dataclass(frozen=True, slots=True)
class Loaded:
    """KV bytes of the first ``tokens`` tokens: what ``LanguageChild.open`` takes.

    ``prelude``: the sinks.  ``blocks``: the last min(``sealed``, window_blocks) sealed blocks, oldest first.  ``rows``: packed
    rows of the positions after them.  ``tier``: the slowest place that something was read from.
    """

    tokens: int
    sealed: int
    prelude: bytes
    blocks: tuple[bytes, ...]
    rows: bytes
    tier: Tier
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptSession:
    """A named session that is here. ``tokens`` of it are in KV, and lie in ``tier``; ``size_bytes`` on disk are of all that it
    needs, shared or not; ``used_s``: when it was last written, in seconds since 1970.
    """

    name: str
    tokens: int
    size_bytes: int
    tier: Tier
    used_s: int


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next(
        (at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right))
    )


def parent_name(held: Held, names: dict[int, bytes], block: int) -> bytes:
    """The name of what comes before a block of what is held; b"" if that is not known."""
    if block == 0:
        return held.root
    if block == held.sealed + 1 and full_blocks(len(held.ids)) >= block:
        return next_name(parent_name(held, names, held.sealed), held.ids[block_start(held.sealed) : block_start(block)])
    return names.get(block - 1, b"")
