"""A tiny language model served as an agent serves it: its real child, its real files; and how tests talk with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from edge_agent.core.chat import ChatMessage, Sampling, Turn, TurnEnd, TurnPart
from edge_agent.core.config import LanguageSection
from edge_agent.language.service import LanguageService
from edge_agent.runtime.settings import EngineSettings
from models.language_card import LanguageCard

LIMIT_S = 120
Report = Callable[[str], None]
WINDOW_TOKENS = 256
LIVELY = Sampling(temperature_milli=1000, seed=7)
"""Greedy talk of a tiny model soon repeats itself; a seeded draw depends on all that was said, and is as repeatable."""


@cache
def tiny() -> tuple[LanguageCard, Path]:
    """Card and folder of the tiny model, built once a run. It talks plainly and without end, on every runtime."""
    from tests.tiny_llama import PLAIN, tiny_model  # NumPy, which who only serves does not need

    folder = Path(mkdtemp(prefix="sly-tiny-"))
    return tiny_model(folder, seed=3, says=PLAIN)[0], folder


def new_service(
    state: Path, report: Report = lambda line: None, of: tuple[LanguageCard, Path] | None = None, **settings: Any
) -> LanguageService:
    """``of``: card and folder of another model than the tiny one."""
    engine = {name: settings.pop(name) for name in ("max_deaths", "threads") if name in settings}
    section = LanguageSection(**{"window_tokens": WINDOW_TOKENS, **settings})
    card, folder = of or tiny()
    return LanguageService(card, folder, state, section, EngineSettings(**engine), report)


@asynccontextmanager
async def serving(
    state: Path, report: Callable[[str], None] = lambda line: None, **settings: Any
) -> AsyncIterator[LanguageService]:
    service = new_service(state, report, **settings)
    await service.start()
    try:
        yield service
    finally:
        await service.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await work

    asyncio.run(bounded())


def says(text: str, session: str = "", tokens: int = 24, sampling: Sampling = LIVELY, **more: Any) -> Turn:
    return Turn((ChatMessage("user", text),), session=session, max_tokens=tokens, sampling=sampling, **more)


async def answer(service: LanguageService, turn: Turn, heard: Callable[[str], Awaitable[None]] | None = None) -> TurnEnd:
    """The end of a turn, whose parts make up its text and its tokens. ``heard`` is awaited after each part."""
    text, tokens = turn.begun, 0
    async for said in service.talk(turn):
        if isinstance(said, TurnPart):
            text, tokens = text + said.text, tokens + said.tokens
            if heard is not None:
                await heard(text)
    assert isinstance(said, TurnEnd)
    assert said.text == text, "the parts are the answer"
    assert tokens <= said.completion_tokens
    return said


async def until(holds: Callable[[], bool]) -> None:
    """Return when ``holds()``; the events that make it so are not the test's."""
    while not holds():
        await asyncio.sleep(0.002)


def chat_turn(number: int) -> Turn:
    """A turn of a chat that goes on and on, greedy and drawn by turns."""
    return says(f"What about {number}?", "chat", 24, Sampling(seed=number, temperature_milli=1000 * (number % 2)))
