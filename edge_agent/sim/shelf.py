"""The KV of sessions that one simulated board holds, for its language models.

Owns which sessions are held, in which tier they lie, and what is said of them.  Rules: last used first; what does not fit into
hot memory is parked in memory, what does not fit there is on disk; a session that moves is a list of named pieces of
``PIECE_TOKENS`` tokens; a piece stands for its bytes but is small here (the time that its bytes take is the board's affair).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256

from edge_agent.core.kv import MAX_HOMES, KvHome, KvState, Place, session_hash
from edge_agent.sim.costs import Costs, digest_of
from edge_agent.sim.scenario import BoardPlan, ModelPlan

MAX_SESSIONS = 1024
"""Of one model on one board; the one used longest ago is dropped."""
PIECE_TOKENS = 256


@dataclass(slots=True)
class Shelf:
    """The sessions of one model on one board, used last at the end. ``running`` are the tokens of each turn under way."""

    model: ModelPlan
    plan: BoardPlan
    costs: Costs
    running: dict[str, int] = field(default_factory=dict)
    _tokens: OrderedDict[str, int] = field(default_factory=OrderedDict)
    _arriving: dict[str, set[bytes]] = field(default_factory=dict)

    def hold(self, session: str, tokens: int) -> None:
        """So much of the session's past is here from now on."""
        self._arriving.pop(session, None)
        self._tokens[session] = tokens
        self._tokens.move_to_end(session)
        if len(self._tokens) > MAX_SESSIONS:
            self._tokens.popitem(last=False)

    def tokens(self, session: str) -> int:
        return self._tokens.get(session, 0)

    def drop(self, session: str) -> None:
        self._tokens.pop(session, None)

    def place(self, session: str) -> Place:
        """Where a session lies. Raises ``KeyError`` for one that is not here."""
        for name, _, place in self._placed():
            if name == session:
                return place
        raise KeyError(session)

    def named(self, hashed: bytes) -> str:
        """The session of this hash; empty if it is not here."""
        return next((name for name in self._tokens if session_hash(name) == hashed), "")

    def state(self) -> KvState:
        """What the board says of it. Its speeds are known from the start, as they are after an engine's self-test."""
        homes = [KvHome(session_hash(name), tokens, place) for name, tokens, place in self._placed()][:MAX_HOMES]
        model = self.model
        return KvState(
            model.name, digest_of(model.name), model.parked_bytes, model.kv_bytes, self._free_bytes(), model.window_tokens,
            prefill_tok_s=self.costs.prefill_tok_s(model), ram_tok_s=self.costs.ram_tok_s(model),
            disk_tok_s=self.costs.disk_tok_s(model), homes=tuple(homes),
        )  # fmt: skip

    def _free_bytes(self) -> int:
        """Hot memory that no turn under way has: parked sessions give way."""
        taken = sum(min(tokens, self.model.window_tokens) for tokens in self.running.values())
        return max(0, self.plan.kv_bytes - taken * self.model.kv_bytes)

    def _placed(self) -> Iterator[tuple[str, int, Place]]:
        hot_bytes, ram_bytes = self._free_bytes(), self.plan.ram_bytes
        for name, tokens in reversed(self._tokens.items()):
            kept = min(tokens, self.model.window_tokens)
            if hot_bytes >= kept * self.model.kv_bytes:
                hot_bytes -= kept * self.model.kv_bytes
                yield name, tokens, Place.HOT
            elif ram_bytes >= kept * self.model.parked_bytes:
                hot_bytes = 0
                ram_bytes -= kept * self.model.parked_bytes
                yield name, tokens, Place.RAM
            else:
                hot_bytes = ram_bytes = 0
                yield name, tokens, Place.DISK

    # on the way to another board, and from it

    def pieces(self, session: str, tokens: int) -> list[bytes]:
        """The names of the whole pieces of a session; a longer past begins with the same ones."""
        whole = min(tokens, self.model.window_tokens) // PIECE_TOKENS
        return [sha256(f"{self.model.name} {session} {number}".encode()).digest() for number in range(whole)]

    def piece_bytes(self) -> int:
        return PIECE_TOKENS * self.model.parked_bytes

    def missing(self, session: str, names: list[bytes]) -> list[bytes]:
        """What of these pieces is not here yet."""
        here = {*self.pieces(session, self.tokens(session)), *self._arriving.get(session, ())}
        return [name for name in names if name not in here]

    def put(self, session: str, name: bytes) -> None:
        self._arriving.setdefault(session, set()).add(name)
