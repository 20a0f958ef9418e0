"""Sessions that move between this board and others, step by step, from and into the language models that speak here.

Rules: every way a step can fail is an answer with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import MAX_REFUSAL_CHARS
from edge_agent.node.events import KvFind, KvFound, KvGave, KvGive, KvPut, KvStored

if TYPE_CHECKING:
    from edge_agent.speaking import Speaker


class Moving:
    def __init__(self, speakers: Mapping[str, Speaker]) -> None:
        self._speakers = speakers

    async def find(self, effect: KvFind) -> KvFound:
        """Make a session ready to move here."""
        try:
            missing, rows = await self._speakers[effect.model].adopt(effect.session, effect.manifest)
        except (RefusedError, UnavailableError) as error:
            return KvFound(effect.key, refusal=str(error))
        return KvFound(effect.key, missing, rows)

    async def put(self, effect: KvPut) -> KvStored:
        """Keep an item of a session that moves here."""
        try:
            await self._speakers[effect.model].put(effect.session, effect.item, effect.name, effect.payload)
        except (RefusedError, UnavailableError) as error:
            return KvStored(effect.key, effect.item, effect.name, str(error))
        return KvStored(effect.key, effect.item, effect.name)

    async def give(self, effect: KvGive) -> KvGave:
        """Read what another board asks of a session here."""
        ask = effect.ask
        try:
            for speaker in self._speakers.values():
                state = speaker.kv_state()
                if state is not None and state.fingerprint == ask.fingerprint:
                    return KvGave(effect.board, ask, await speaker.give(ask))
            raise UnavailableError("session", "no model here has KV of this format", "")
        except (RefusedError, UnavailableError) as error:
            return KvGave(effect.board, ask, refusal=str(error)[:MAX_REFUSAL_CHARS])
