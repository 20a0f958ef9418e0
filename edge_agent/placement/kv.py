"""Where the past of a session comes from on each board that could run its next turn, and what that costs.

Rules: integers only; a session is restored iff that gives more tokens a second than computing them again, i.e. iff the
bandwidth of where it lies is above ``bytes a token * prefill tokens/s`` (the tier rule of the KV cache); a board without room
for it is out, with the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from edge_agent.core.config import PolicySection
from edge_agent.core.kv import KvHome, KvState, Place

PRIOR_PREFILL_TOK_S = 200
PRIOR_RESTORE_FACTOR = 30
"""Before anything was measured: a small board reads slowly, and restores thirty times as fast as it reads (KV.md, figures)."""
BYTES_A_TOKEN = 4
"""Of a turn's encoding: what a token of English takes."""
ANSWER_TOKENS = 256
"""Room that is asked for the answer of every turn, however long it may become."""


class KvAction(StrEnum):
    RESIDENT = "resident"
    """It lies in hot memory there."""
    RAM = "ram"
    DISK = "disk"
    PEER = "peer"
    """It is fetched from the board that holds it."""
    RECOMPUTE = "recompute"
    NONE = "none"
    """There is no past, or none that is known."""


@dataclass(frozen=True, slots=True)
class KvPlan:
    """``action`` for ``tokens`` tokens of a session's past in ``kv_us``; ``prefill_us`` for what is new in the turn.

    ``source`` is the board that they are fetched from. ``lacking``: why there is no room; empty when there is.
    ``room_bytes``: the hot memory that the turn holds while it is answered.
    """

    action: KvAction
    kv_us: int
    prefill_us: int
    tokens: int = 0
    source: str = ""
    lacking: str = ""
    room_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Holding:
    """``board`` holds KV of the session in the format of ``fingerprint``."""

    board: str
    fingerprint: bytes
    home: KvHome


def holdings(session: bytes, states: Iterable[tuple[str, KvState]]) -> list[Holding]:
    """Who holds KV of the session, most tokens first; ``states`` of the boards that can be reached, by board."""
    found = [Holding(board, state.fingerprint, home) for board, state in states if (home := state.home(session))]
    return sorted(found, key=lambda each: (-each.home.tokens, each.board, each.fingerprint))


def plan_kv(board: str, state: KvState, turn_bytes: int, held: Iterable[Holding], policy: PolicySection) -> KvPlan:
    """What ``board`` has to do before a turn of ``turn_bytes`` can be answered there."""
    held = list(held)
    sent_tokens = max(1, turn_bytes // BYTES_A_TOKEN)
    past_tokens = held[0].home.tokens if held else 0
    new_tokens = sent_tokens - past_tokens if sent_tokens > past_tokens else sent_tokens
    prefill_tok_s = state.prefill_tok_s or PRIOR_PREFILL_TOK_S
    action, kv_us, source = KvAction.NONE, 0, ""
    if past_tokens:
        recompute_us = _us(past_tokens, prefill_tok_s)
        ways = [(recompute_us, 1, KvAction.RECOMPUTE, "")]
        for each in held:
            if each.board == board:
                missing_us = _us(past_tokens - each.home.tokens, prefill_tok_s)
                restored_us, how = _own(each.home, state)
                ways.append((restored_us + missing_us, 0, how, ""))
            elif each.fingerprint == state.fingerprint:
                missing_us = _us(past_tokens - each.home.tokens, prefill_tok_s)
                ways.append((_fetched_us(each.home, state, policy) + missing_us, 2, KvAction.PEER, each.board))
        kv_us, _, action, source = min(ways, key=lambda way: (way[0], way[1], way[3]))
    plan = KvPlan(action, kv_us, _us(new_tokens, prefill_tok_s), past_tokens, source)
    return _with_room(plan, state, new_tokens)


def _own(home: KvHome, state: KvState) -> tuple[int, KvAction]:
    if home.place is Place.HOT:
        return 0, KvAction.RESIDENT
    if home.place is Place.RAM:
        return _us(home.tokens, _restore_tok_s(state, state.ram_tok_s)), KvAction.RAM
    return _us(home.tokens, _restore_tok_s(state, state.disk_tok_s)), KvAction.DISK


def _restore_tok_s(state: KvState, measured: int) -> int:
    return measured or PRIOR_RESTORE_FACTOR * (state.prefill_tok_s or PRIOR_PREFILL_TOK_S)


def _fetched_us(home: KvHome, state: KvState, policy: PolicySection) -> int:
    size_bytes = min(home.tokens, state.window_tokens) * state.parked_bytes
    way_us = policy.link_latency_us + size_bytes * 1000 // policy.link_bytes_per_ms
    return way_us + _us(home.tokens, _restore_tok_s(state, state.ram_tok_s))


def _with_room(plan: KvPlan, state: KvState, new_tokens: int) -> KvPlan:
    tokens = min(plan.tokens + new_tokens + ANSWER_TOKENS, state.window_tokens)
    need_bytes = tokens * state.hot_bytes
    if need_bytes <= state.free_bytes:
        return replace(plan, room_bytes=need_bytes)
    lacking = f"no room for its KV: {tokens} tokens need {need_bytes} bytes, {state.free_bytes} are free"
    return replace(plan, lacking=lacking, room_bytes=need_bytes)


def _us(tokens: int, tok_s: int) -> int:
    return max(0, tokens) * 1_000_000 // tok_s
