"""A board that says what the question tells it to, so that doors can be tested without a model; and the doors over it.

The last message is the script: ``say a b c`` answers word by word, ``hold`` gives one word and then waits for ``go_on``,
``wait`` waits before the first word, ``refuse SUBJECT`` and ``break SUBJECT`` fail with that subject, ``late`` fails after a
word, ``bug`` raises what no contract names.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edge_agent.core.chat import Finish, Tier, Turn, TurnEnd, TurnPart
from edge_agent.core.config import GatewaySection
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import DataClass, Limits
from edge_agent.gateway.http import HttpGateway
from edge_agent.gateway.local import LocalServer
from edge_agent.gateway.local_talk import TALK, talk_stream
from edge_agent.gateway.talker import Figure

MODEL = "smollm2"
LONG_S = 30.0
END = TurnEnd(
    "", Finish.STOP, prompt_tokens=9, cached_tokens=6, completion_tokens=0, recomputed_tokens=1, kv_bytes=64_800, tier=Tier.DISK,
    first_token_us=12_000, restore_us=3_000, prefill_us=5_000, decode_us=20_000, drafted_tokens=4, accepted_tokens=3,
    notes=("block 2 was damaged",), receipt=b"signed",
)  # fmt: skip


class ScriptedTalker:
    """``turns`` holds what was asked, ``live`` how many are in work; ``began`` and ``freed`` are told to the test's thread."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.terms: list[tuple[DataClass, Limits | None]] = []
        self.live = 0
        self.began, self.freed = threading.Semaphore(0), threading.Semaphore(0)
        self.why_not = ""
        self.probes = 0
        self._go_on = asyncio.Event()

    def models(self) -> Sequence[str]:
        return [MODEL, "other"]

    async def ready(self) -> str:
        self.probes += 1
        return self.why_not

    def figures(self) -> Iterable[Figure]:
        return [
            Figure("kv_bytes", "KV that sessions hold", 4096, labels=(("tier", "hot"),)),
            Figure("kv_bytes", "KV that sessions hold", 8192, labels=(("tier", 'd"\\k\n'),)),
        ]

    def go_on(self) -> None:
        self._go_on.set()

    async def talk(
        self, turn: Turn, model: str | None, *, data: DataClass = DataClass.PRIVATE, limits: Limits | None = None
    ) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        self.turns.append(turn)
        self.terms.append((data, limits))
        self.live += 1
        try:
            async for part in self._played(turn):
                yield part
        finally:
            self.live -= 1
            self.freed.release()

    async def _played(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        verb, _, rest = (turn.prompt or turn.messages[-1].content).partition(" ")
        self.began.release()
        if verb == "wait":
            await self._go_on.wait()
        elif verb == "refuse":
            raise RefusedError(rest, "this", "that")
        elif verb == "break":
            raise UnavailableError(rest, "it is away")
        elif verb == "bug":
            raise LookupError("a bug")
        words = rest.split() or ["word"]
        for at, word in enumerate(words):
            yield TurnPart(word if at == 0 else f" {word}", 1)
            if verb == "late":
                raise UnavailableError("engine", "it died")
            if verb == "hold":
                await self._go_on.wait()
        text = " ".join(words[: turn.max_tokens])
        finish = Finish.LENGTH if len(words) > turn.max_tokens else Finish.STOP
        yield replace(END, text=text, finish=finish, completion_tokens=len(words), session=turn.session or "~ab12")


class OnSocket:
    """The scripted board behind the real local socket, in a loop of its own thread; ``sessions`` is what it keeps."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.path, self.loop, self.talker = path, loop, ScriptedTalker()
        self.sessions: list[list[object]] = []
        self.server = LocalServer(path, self._handle, {TALK: talk_stream(self.talker)})

    async def _handle(self, verb: str, body: object) -> object:
        if verb == "sessions":
            return self.sessions
        kept = [entry for entry in self.sessions if entry[0] != body]
        if verb != "drop" or kept == self.sessions:
            raise RefusedError("session", body, "one that sly sessions list shows")
        self.sessions = kept
        return None

    def do(self, action: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(action)


@contextmanager
def on_socket(path: Path) -> Iterator[OnSocket]:
    with _loop() as loop:
        board = OnSocket(path, loop)
        asyncio.run_coroutine_threadsafe(board.server.start(), loop).result(LONG_S)
        try:
            yield board
        finally:
            asyncio.run_coroutine_threadsafe(board.server.close(), loop).result(LONG_S)


class Served:
    """A gateway in a loop of its own thread."""

    def __init__(self, gateway: HttpGateway, talker: ScriptedTalker, loop: asyncio.AbstractEventLoop, said: list[str]) -> None:
        self.gateway, self.talker, self.loop, self.said = gateway, talker, loop, said
        self.url = f"http://127.0.0.1:{gateway.port}"

    def do(self, action: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(action)

    def close_soon(self, drain_s: float) -> None:
        asyncio.run_coroutine_threadsafe(self.gateway.close(drain_s), self.loop)

    def close(self, drain_s: float) -> None:
        asyncio.run_coroutine_threadsafe(self.gateway.close(drain_s), self.loop).result(LONG_S)


@contextmanager
def served(section: GatewaySection | None = None) -> Iterator[Served]:
    """A scripted board behind a real HTTP server on loopback."""
    with _loop() as loop:
        said: list[str] = []
        talker = ScriptedTalker()
        gateway = HttpGateway(section or GatewaySection(on=True, port=0), talker, said.append)
        try:
            asyncio.run_coroutine_threadsafe(gateway.start(), loop).result(LONG_S)
            yield Served(gateway, talker, loop, said)
        finally:
            asyncio.run_coroutine_threadsafe(gateway.close(0), loop).result(LONG_S)


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
