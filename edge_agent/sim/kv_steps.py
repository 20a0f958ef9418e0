"""A session's steps from board to board, as the store of a simulated board carries them out.

Owns what each step takes and answers.  Rules: a step's effect on the store comes when its time is over, with its answer; a piece
takes the time of its true bytes on the holder's way up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from edge_agent.core.kv import KvAsk, KvItem
from edge_agent.node.events import KvFind, KvFound, KvGave, KvGive, KvPut, KvStored
from edge_agent.sim.costs import digest_of
from edge_agent.sim.shelf import Shelf

STORE_US = 2_000
"""What the store of sessions takes for a piece, assumed."""
ROWS_TOKENS = 128
"""The last blocks of a session move as they are in hot memory."""
NAME_BYTES = 32

Later = tuple[int, Callable[[], KvFound | KvStored | KvGave]]
"""After so many µs, this gives the answer."""


class KvSteps:
    """``shelves`` by model; ``bytes_per_ms`` of the board's way up."""

    def __init__(self, shelves: Mapping[str, Shelf], bytes_per_ms: int) -> None:
        self._shelves, self._bytes_per_ms = shelves, bytes_per_ms

    def step(self, effect: KvFind | KvPut | KvGive) -> Iterator[Later]:
        match effect:
            case KvFind(key, model, session, manifest):
                names = [manifest[at : at + NAME_BYTES] for at in range(0, len(manifest), NAME_BYTES)]
                found = KvFound(key, tuple(self._shelves[model].missing(session, names)))
                yield STORE_US, lambda: found
            case KvPut():
                yield STORE_US, lambda: self._put(effect)
            case KvGive(board, ask):
                yield self._give(board, ask)

    def _put(self, effect: KvPut) -> KvStored:
        shelf = self._shelves[effect.model]
        if effect.item is KvItem.ROWS:
            shelf.hold(effect.session, int.from_bytes(effect.payload))
        else:
            shelf.put(effect.session, effect.name)
        return KvStored(effect.key, effect.item, effect.name)

    def _give(self, board: str, ask: KvAsk) -> Later:
        shelf = next((each for name, each in self._shelves.items() if digest_of(name) == ask.fingerprint), None)
        session = shelf.named(ask.session) if shelf else ""
        if shelf is None or not session:
            return STORE_US, lambda: KvGave(board, ask, refusal="session: it is not here")
        tokens, way_bytes, payload = shelf.tokens(session), 0, b""
        if ask.item is KvItem.MOVED:
            shelf.drop(session)
        elif ask.item is KvItem.MANIFEST:
            payload = b"".join(shelf.pieces(session, tokens))
        elif ask.item is KvItem.ROWS:
            payload, way_bytes = tokens.to_bytes(8), ROWS_TOKENS * shelf.model.kv_bytes
        else:
            payload, way_bytes = ask.name, shelf.piece_bytes()
        return STORE_US + way_bytes * 1000 // self._bytes_per_ms, lambda: KvGave(board, ask, payload)
