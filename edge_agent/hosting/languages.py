"""Language models: each release with a service, a folder of files and a store of sessions of its own.

Rules: when a release goes, its sessions go over to the one that stays before; its folders go only when all of them did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from hashlib import sha256
from pathlib import Path

from board_support.board import Board
from edge_agent.attest.measure import MappedModel
from edge_agent.core.chat import Turn, TurnEnd
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import SlyError
from edge_agent.core.values import ModelOffer
from edge_agent.hosting import sessions
from edge_agent.hosting.between import Between, GoingOn, Tell
from edge_agent.hosting.cached import CachedFiles
from edge_agent.hosting.files import models_folder
from edge_agent.hosting.release import Release
from edge_agent.hosting.succession import Succession
from edge_agent.language.service import DRAIN_LIMIT_S
from edge_agent.runtime.settings import EngineSettings
from edge_agent.speaking import HostedLanguage, Speaker, speaker_of
from models.installed import Installed
from models.language_card import LanguageCard, language_digest

PROBE = Turn(prompt="The board says that", max_tokens=8)
"""Greedy: what a sound release answers is the same each time."""
PROBE_LIMIT_S = 30.0


class LanguageRelease(Release):
    """``state``: the board's folder; ``discard``: gives its files back when it goes."""

    def __init__(self, offer: ModelOffer, number: int, hosted: HostedLanguage, state: Path, discard: Callable[[], None]) -> None:
        super().__init__(offer, number)
        self.hosted, self._state, self._discard = hosted, state, discard
        self.speaker: Speaker = hosted
        self.succession: Succession | None = None
        self._emptied = False

    @property
    def tokenizer(self) -> str:
        return self.hosted.service.card.tokenizer.sha256

    @property
    def deaths(self) -> int:
        return self.hosted.service.pump.deaths

    def busy(self, session: str) -> bool:
        return self.hosted.service.admitting.busy(session)

    async def golden(self) -> tuple[bytes, str]:
        """Of a short greedy answer: SHA-256 of its text."""
        before = self.deaths
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                text = await self._answer(PROBE)
        except SlyError as error:
            return b"", str(error)
        except TimeoutError:
            return b"", f"no answer within {PROBE_LIMIT_S:g} s"
        if self.deaths != before:
            return b"", "its engine died while it answered"
        return sha256(text.encode()).digest(), ""

    async def _answer(self, turn: Turn) -> str:
        with self.at_work():
            async with aclosing(self.hosted.talk(turn)) as parts:
                async for part in parts:
                    if isinstance(part, TurnEnd):
                        return part.text
        raise RuntimeError(f"a turn of {self} ended without its end")

    def mapped(self, slot: str) -> MappedModel | None:
        return MappedModel(self.name, self.digest, self.hosted.service.files, language_digest, None, self.number, slot)

    def going(self, turn: Turn, budget_us: int, tell: Tell | None) -> GoingOn:
        """A turn that begins here."""
        return GoingOn(self, turn, budget_us, tell)

    def take_over(self, other: Release) -> None:
        """From now on new turns come here, and the sessions of ``other`` with them."""
        if isinstance(other, LanguageRelease):
            shared = other.succession or Succession(other, self)
            self.succession = other.succession = shared
            self.speaker = Between(shared, self, other)

    async def hand_on(self, at_once: bool) -> None:
        """Its sessions go where new turns go; ``at_once``: its live turns, too."""
        shared = self.succession
        if shared is not None and at_once:
            shared.given_up.set()
        await self.at_rest()
        if shared is not None:
            heir = shared.other(self)
            await shared.bring_all(heir)
            heir.succession, heir.speaker = None, heir.hosted
        self._emptied = shared is None or not shared.left_out

    async def end(self) -> None:
        await self.hosted.service.close(0 if self.spoiled else DRAIN_LIMIT_S)
        if self._emptied:
            sessions.forget(self._state, self.name, self.number)
        self._discard()


class Languages:
    """Brings releases of language models up. ``factory``: the card of what set-up brought, if there is one."""

    def __init__(
        self, config: AgentConfig, engine: EngineSettings, board: Board, cache: CachedFiles, factory: LanguageCard | None,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._config, self._engine, self._board, self._cache, self._factory = config, engine, board, cache, factory
        self._state, self._report = Path(config.state.folder), report

    async def load(self, card: LanguageCard, installed: Installed | None, beside: bool) -> LanguageRelease:
        """A release, or what set-up left of the model; ``beside`` another one that serves.

        Raises ``RefusedError`` or ``UnavailableError``.
        """
        number, files = (installed.number, installed.files) if installed is not None else (0, {})
        if beside:
            sessions.forget(self._state, card.name, number)
        else:
            self._cache.sweep(card.name, {number})
        folder = self._cache.link(card.name, number, files) if files else models_folder(self._config)

        def discard() -> None:
            if files:
                self._cache.unlink(card.name, number, files)

        try:
            sessions.keep_tokenizer(self._state, card.name, number, card.tokenizer.sha256)
            offer, hosted = await speaker_of(
                card, folder, self._state, self._config, self._engine, self._board, self._report,
                sessions.kept_as(card.name, number),
            )  # fmt: skip
        except BaseException:
            discard()
            raise
        if not beside:
            await asyncio.to_thread(self._take_in, card, number, hosted)
        return LanguageRelease(offer, number, hosted, self._state, discard)

    def _take_in(self, card: LanguageCard, number: int, hosted: HostedLanguage) -> None:
        factory, service = self._factory.tokenizer.sha256 if self._factory else "", hosted.service
        service.notes |= sessions.take_in_left(
            self._state, card.name, number, service.store, card.tokenizer.sha256, factory, self._report
        )
