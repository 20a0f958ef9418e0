"""The agent's side of one hosted language model: turns in, streams of text out, sessions that outlive every process.

Owns the way of a turn: encode -> plan (whose KV) -> admission by bytes -> into a ring slot -> steps -> journal -> client, and the
life of what that takes.  Rules: an id is shown only after it and the KV before it were written to the journal; the ring is a
cache of the store, so an idle session gives way at no cost and a dead child loses nothing; one turn a session; whoever leaves
holds nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from secrets import randbits
from typing import Any

from edge_agent.attest.measure import MappedFile
from edge_agent.core.chat import Sampling, Tier, Turn, TurnEnd, TurnPart
from edge_agent.core.config import LanguageSection
from edge_agent.core.errors import SlyError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS, KvFormat
from edge_agent.gateway.talker import DRAINING, Figure
from edge_agent.language import measured
from edge_agent.language.admission import Room
from edge_agent.language.admitting import Admitting
from edge_agent.language.asking import asked_ids
from edge_agent.language.child import Death, LanguageChild
from edge_agent.language.hot import HotSlots
from edge_agent.language.kept_curve import KeptCurve
from edge_agent.language.live import LiveTurn, Phase, Times
from edge_agent.language.pump import Pump, Work
from edge_agent.language.ring_memory import MAX_SLOTS, RingMemory
from edge_agent.language.turns import Turns
from edge_agent.runtime import quarantine
from edge_agent.runtime.settings import RUNTIMES, EngineSettings
from edge_agent.store.kv_sessions import KeptSession, SessionStore
from models.language_card import LanguageCard

SCHEME = b"sly/1/kv-int8-int4"
"""What the bytes of rows and blocks mean; part of every fingerprint."""
PROBE_LIMIT_S = 30.0
DRAIN_LIMIT_S = 10.0


class LanguageService:
    """``start``, then ``talk`` until ``close``. ``folder`` has the model's files, ``state`` keeps its sessions, in a folder
    called ``kept_as``, by default as the model: what runs at the same time has one of its own."""

    def __init__(
        self, card: LanguageCard, folder: Path, state: Path, language: LanguageSection, engine: EngineSettings,
        report: Callable[[str], None] = lambda line: None, kept_as: str = "",
    ) -> None:  # fmt: skip
        kept_as = kept_as or card.name
        self.card, self._folder, self.settings, self._report = card, folder, language, report
        self._engine = replace(engine, runtime=runtime_of(engine.runtime))
        self.shape = card.shape
        self.format = kv_format(card, self._engine.runtime, language.window_tokens)
        self.store = SessionStore(state / "kv" / kept_as, self.format, language.ram_bytes, language.disk_bytes, report=report)
        slots = min(language.max_sessions, MAX_SLOTS)
        self.ring = RingMemory(self.shape, self.format.window_blocks, slots)
        self.hot = HotSlots(self.shape, self.format.window_blocks, Room(slots, language.hot_bytes), self._restore_us)
        self.turns = Turns(self.store, self.hot, self.format, language.speculate, now_us, self._spawn, self._post, self._freed)
        record = quarantine.Record(engine.max_deaths, engine.death_window)
        self.pump = Pump(card.name, self._new_child, self.turns, record, report)
        key = b"%d " % self._engine.threads + card.digest(self._engine.runtime)
        self._kept = KeptCurve(state / "curves" / kept_as, key, report)
        window_tokens = self.format.window_tokens
        self.admitting = Admitting(self.store, self.hot, self.turns, window_tokens, language.max_waiting)
        self._under_way: set[LiveTurn] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.turns_served = 0
        self.died = asyncio.Event()
        """Its child has died, once at least."""
        self.notes: dict[str, str] = {}
        """By session: what its next turn is to say of what became of it."""
        self._model_fd = -1

    async def start(self) -> None:
        """Load the model. Raises what it cannot be loaded with; nothing is left behind then."""
        try:
            await self.pump.start()
        except BaseException:
            self.ring.close()
            self.store.close()
            self._let_go()
            raise

    async def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        """Serve one turn: parts that follow ``turn.begun``, then the end, whose text is the whole.

        Raises ``RefusedError`` (``CONTEXT_LENGTH``, ``SESSION_BUSY``, or what the turn has wrong) and ``UnavailableError``
        (``KV_ROOM``, ``DRAINING``, or why the model cannot answer). Closing the iterator ends the turn.
        """
        live = LiveTurn(turn, _seeded(turn.sampling), Times(now_us()))
        if self._closing:
            raise UnavailableError(DRAINING, "this board is stopping", "ask another one")
        self.admitting.claim(turn.session)
        if note := self.notes.pop(turn.session, ""):
            live.note(note)
            self._report(f"model {self.card.name}: {note}")
        self._under_way.add(live)
        try:
            await self._begin(live)
            while not isinstance(said := await live.out.get(), TurnEnd):
                if isinstance(said, SlyError):
                    raise said
                yield said
            yield said
        finally:
            self._leave(live)

    async def ready(self) -> str:
        """Why no turn could be served now, after asking the child something; empty when one could."""
        if self._closing or self.pump.why:
            return self.pump.why or "it is stopping"
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                await self.pump.call(lambda child: child.encode("ready", limit=64))
        except TimeoutError:
            return f"its engine did not answer within {PROBE_LIMIT_S:g} s"
        except SlyError as error:
            return str(error)
        return ""

    def figures(self) -> list[Figure]:
        return measured.figures(self)

    async def close(self, drain_s: float = DRAIN_LIMIT_S) -> None:
        """End live turns with what they have, make their sessions durable, end the child, which has ``drain_s`` for its part."""
        self._closing = True
        stopping = UnavailableError(DRAINING, "this board is stopping; what was said is kept", "ask another one")
        self.admitting.turn_away(stopping)
        for live in list(self._under_way):
            self._end_in_child(live, stopping)
        with suppress(SlyError, TimeoutError):
            async with asyncio.timeout(drain_s):
                await self.pump.call(_nothing)
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await self.pump.close()
        self.store.close()
        self.ring.close()
        self._let_go()

    def sessions(self, most: int) -> list[KeptSession]:
        """The named sessions that were used last, the last one first, each where a turn of it would find its KV now."""
        kept = self.store.kept(most)
        hot = {each.name: self.hot.tokens_of(each.name) for each in kept}
        return [replace(each, tokens=hot[each.name], tier=Tier.HOT) if hot[each.name] else each for each in kept]

    def cool(self, session: str) -> None:
        """Take a session that answers nobody out of hot memory; the store holds all of it. Raises ``RefusedError``."""
        self.admitting.must_rest(session)
        self._cool(session)

    async def forget(self, session: str) -> bool:
        """Forget a session that answers nobody, durably and with its memory; ``False`` if it is not here.

        Raises ``RefusedError`` (``SESSION_BUSY``) while it talks, ``UnavailableError`` if the store cannot.
        """
        if self.store.look(session) is None:
            return False
        self.admitting.claim(session)
        try:
            self._cool(session)
            await asyncio.to_thread(self.store.drop, session)
        finally:
            self.admitting.release(session)
        return True

    def _cool(self, session: str) -> None:
        slot = self.hot.slot_of(session)
        if slot is not None:
            self.hot.drop(slot)
            self._post(lambda child: child.close_slot(slot))

    @property
    def waiting(self) -> int:
        return len(self.admitting)

    def _restore_us(self, tokens: int) -> int:
        """What an idle session that gives way is expected to cost when it comes back."""
        return self.store.speeds.restore_us(Tier.RAM, tokens)

    # a turn's way in

    async def _begin(self, live: LiveTurn) -> None:
        asked = await self.pump.call(lambda child: asked_ids(child, live.turn, self._limit_tokens))
        chosen = await self.admitting.place(live, asked)
        await self.pump.call(lambda child: self.turns.begin(live, chosen, child))

    @property
    def _limit_tokens(self) -> int:
        """Of a whole conversation as it is sent; what of it may be new is bounded by the window."""
        return max(self.shape.context_tokens, 8 * self.format.window_tokens)

    # a turn's way out

    def _leave(self, live: LiveTurn) -> None:
        """Whoever asked is gone, with the answer or without."""
        self._under_way.discard(live)
        if live.phase is Phase.ASKED:
            live.phase = Phase.FREED
            self._freed(live)
        else:
            self._end_in_child(live, UnavailableError("turn", "whoever asked has gone"))

    def _end_in_child(self, live: LiveTurn, error: SlyError) -> None:
        if live.phase in (Phase.PLACED, Phase.LIVE):
            self._post(lambda child: self.turns.cancel(live, error, child))

    def _freed(self, live: LiveTurn) -> None:
        self.turns_served += 1
        self.admitting.freed(live)

    # the child

    async def _new_child(self, on_death: Callable[[Death], None]) -> LanguageChild:
        def died(death: Death) -> None:
            self.died.set()
            on_death(death)

        child = await LanguageChild.start(self.card, self._folder, self._engine, self.ring, died, self._kept.curve, self._mapped)
        self._kept.keep(child.account.curve)
        return child

    def _mapped(self, model_fd: int) -> None:
        self._let_go()
        self._model_fd = os.dup(model_fd)

    def _let_go(self) -> None:
        if self._model_fd >= 0:
            os.close(self._model_fd)
            self._model_fd = -1

    @property
    def files(self) -> tuple[MappedFile, MappedFile]:
        """The stages as the newest child maps them, and the tokenizer, which it was given a copy of."""
        stages, tokenizer = self.card.files[self._engine.runtime], self.card.tokenizer
        return (
            MappedFile(self._folder / stages.filename, bytes.fromhex(stages.sha256), self._model_fd),
            MappedFile(self._folder / tokenizer.filename, bytes.fromhex(tokenizer.sha256)),
        )

    def _post(self, work: Work[object]) -> None:
        self.pump.post(work)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(f"model {self.card.name}: {error}")


def kv_format(card: LanguageCard, runtime: str, window_tokens: int) -> KvFormat:
    """The sizes of the model's KV bytes. KV of another runtime's stages is other KV: the last bits differ."""
    shape = card.shape
    parts = (SCHEME, card.digest(runtime), card.name.encode())
    fingerprint = hashlib.sha256(b"\0".join(parts)).digest()
    blocks = max(1, window_tokens // BLOCK_TOKENS)
    return KvFormat(fingerprint, shape.row_bytes, shape.block_bytes, shape.prelude_bytes, blocks)


def runtime_of(wanted: str) -> str:
    """The library that ``auto`` stands for here. Raises ``UnavailableError`` if there is none."""
    found = [each for each in RUNTIMES[1:] if wanted in (each, "auto") and find_spec(each) is not None]
    if not found:
        raise UnavailableError("runtime", f"{wanted} is not installed", "pip install ai-edge-litert")
    return found[0]


def now_us() -> int:
    return time.monotonic_ns() // 1000


def _seeded(sampling: Sampling) -> Sampling:
    """A turn that goes on in another child draws alike: the agent chooses the seed."""
    return sampling if sampling.greedy or sampling.seed is not None else replace(sampling, seed=randbits(63))


async def _nothing(child: LanguageChild) -> None:
    """Everything that was asked of the child before has been done."""
