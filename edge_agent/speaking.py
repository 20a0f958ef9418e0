"""A language model that this board hosts, as the node and the fleet see it: its offer, its turns, and where its sessions lie.

Owns the bringing up of a ``LanguageService`` from the configuration and the board's word on its KV (``KvState``).  Rules: only
named sessions are told of, by their hash, the last used first; what is told of speeds was measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import Protocol

from board_support.board import Board
from edge_agent.core.chat import CHAT, Tier, Turn, TurnEnd, TurnPart
from edge_agent.core.config import AgentConfig
from edge_agent.core.kv import BLOCK_TOKENS, MAX_HOMES, KvHome, KvState, Place, session_hash
from edge_agent.core.values import MAX_PARALLEL, ModelOffer
from edge_agent.gateway.talker import Figure
from edge_agent.language.service import LanguageService, runtime_of
from edge_agent.runtime.settings import EngineSettings
from models.language_card import LanguageCard

TYPICAL_TOKENS = 128
"""Of an answer: what a turn is thought to take before any was measured."""
PRIOR_TOKEN_US = 50_000


class Speaker(Protocol):
    """A language model that runs here."""

    def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        """Serve one turn: parts that follow ``turn.begun``, then the end, whose text is the whole. Raises ``SlyError``."""
        ...

    async def ready(self) -> str:
        """Why no turn could be served now; empty when one could."""
        ...

    def figures(self) -> Iterable[Figure]: ...

    def kv_state(self) -> KvState | None:
        """What is told of its KV; ``None`` for one without."""
        ...

    async def close(self) -> None: ...


class HostedLanguage:
    """A ``Speaker`` over a service that was started."""

    def __init__(self, service: LanguageService) -> None:
        self.service = service
        self._homes: dict[str, tuple[int, Place]] = {}
        """Tokens in KV of each named session, and where they lie when they are not hot; the last used last."""

    async def recall(self) -> None:
        """Learn what the store holds from before this boot."""
        store = self.service.store

        def held() -> dict[str, tuple[int, Place]]:
            found = {name: store.resume(name) for name in reversed(_named(store.names()))}
            return {name: (each.tokens, Place.DISK) for name, each in found.items() if each is not None}

        self._homes = await asyncio.to_thread(held)

    async def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        parts = self.service.talk(turn)
        try:
            async for part in parts:
                if isinstance(part, TurnEnd) and turn.session:
                    self._homes.pop(turn.session, None)
                    self._homes[turn.session] = (max(0, part.prompt_tokens + part.completion_tokens - 1), Place.RAM)
                yield part
        finally:
            await parts.aclose()

    async def ready(self) -> str:
        return await self.service.ready()

    def figures(self) -> Iterable[Figure]:
        return self.service.figures()

    def kv_state(self) -> KvState:
        service, kv = self.service, self.service.format
        live_bytes = sum(each.size_bytes for each in service.hot.residents() if each.live)
        restore = service.speeds.restore
        return KvState(
            model=service.card.name,
            fingerprint=kv.fingerprint,
            parked_bytes=-(-kv.block_bytes // BLOCK_TOKENS),
            hot_bytes=-(-service.hot.need_bytes(kv.window_tokens) // kv.window_tokens),
            free_bytes=max(0, service.hot.room.size_bytes - live_bytes),
            window_tokens=kv.window_tokens,
            prefill_tok_s=service.speeds.prefill,
            ram_tok_s=restore.get(Tier.RAM, 0),
            disk_tok_s=restore.get(Tier.DISK, 0),
            homes=tuple(self._told_homes()),
        )

    def _told_homes(self) -> Iterable[KvHome]:
        here = set(_named(self.service.store.names()))
        self._homes = {name: home for name, home in self._homes.items() if name in here}
        for name, (tokens, place) in list(reversed(self._homes.items()))[:MAX_HOMES]:
            hot_tokens = self.service.hot.tokens_of(name)
            yield KvHome(session_hash(name), hot_tokens or tokens, Place.HOT if hot_tokens else place)

    async def close(self) -> None:
        await self.service.close()


async def speaker_of(
    card: LanguageCard, folder: Path, state: Path, config: AgentConfig, engine: EngineSettings, board: Board,
    report: Callable[[str], None],
) -> tuple[ModelOffer, HostedLanguage]:  # fmt: skip
    """Bring a language model up. Raises ``RefusedError`` or ``UnavailableError`` saying why it cannot be hosted."""
    service = LanguageService(card, folder, state, config.language, engine, report)
    await service.start()
    hosted = HostedLanguage(service)
    await hosted.recall()
    busy_us = TYPICAL_TOKENS * PRIOR_TOKEN_US
    return ModelOffer(
        card.name, CHAT, card.digest(runtime_of(engine.runtime)), card.quality_permille, busy_us,
        busy_us * board.profile.active_mw // 1000, min(service.hot.room.slots, MAX_PARALLEL),
    ), hosted  # fmt: skip


def _named(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("~")]
