"""The engine child of one language model, seen from the agent: asyncio, bytes and integers, no NumPy.

Rules:

* calls run one at a time, first come first served: ``encode`` and ``begin`` get their turn between two steps, and a burst of
  steps ends for them;
* a caller that gives up leaves its call running; a step whose caller gave up is not lost: the next ``step`` gives its reply;
* what the child says is decoded strictly; one that says what a sound child would not say is killed;
* the ring memory is the agent's: it stays when a child dies, and the next child maps it;
* a death is told to ``on_death`` and to whoever waits (``ChildDiedError``); whether there is a next child is the caller's
  decision (``runtime.quarantine`` has the rule for it).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from edge_agent.core.cbor import encode
from edge_agent.core.chat import ChatMessage, Sampling
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import packed_ids, unpacked_ids
from edge_agent.core.model_shape import ModelShape
from edge_agent.core.values import bounded
from edge_agent.language import events
from edge_agent.language.events import MAX_BURST_US, SealedBlock, StepReply, TurnEvent
from edge_agent.language.handshake import Account, Order, step_bytes
from edge_agent.language.ring_memory import RingMemory
from edge_agent.language.speculation import HISTORY_TOKENS
from edge_agent.runtime.child import ChildDiedError, Death
from edge_agent.runtime.doorbell import items, natural
from edge_agent.runtime.settings import RUNTIMES, EngineSettings
from edge_agent.runtime.verbs import Reply, VerbChild
from models.language_card import LanguageCard

__all__ = ["Account", "ChildDiedError", "Death", "LanguageChild", "SealedBlock", "StepReply", "TurnEvent"]

WORKER = "edge_agent.language.worker"
MAX_TOKENIZER_BYTES = 32 * 2**20
MAX_ENCODED_TOKENS = 2**20
BEGUN_CHARS = 64
"""Of the answer's beginning; a stop text is no longer."""

Part = bytes | memoryview
T = TypeVar("T")


class LanguageChild:
    """Use ``start``; then call until ``on_death`` is called or you ``close`` it."""

    account: Account

    def __init__(self, model: str, settings: EngineSettings, ring: RingMemory) -> None:
        self._model, self._limit_us, self._ring = model, settings.invoke_limit_us, ring
        self._shape: ModelShape = ring.shape
        self._arena_bytes = settings.arena_bytes
        self._child = VerbChild(model)
        self._stepping: asyncio.Task[StepReply] | None = None

    @classmethod
    async def start(
        cls,
        card: LanguageCard,
        folder: Path,
        settings: EngineSettings,
        ring: RingMemory,
        on_death: Callable[[Death], None] = lambda death: None,
        curve: Sequence[tuple[int, int]] = (),
        mapped: Callable[[int], None] = lambda model_fd: None,
    ) -> LanguageChild:
        """A confined child with the model of ``card``, whose files lie in ``folder``, over ``ring``: all slots empty.

        ``curve`` (rows, µs) of an earlier child saves measuring it.  ``mapped`` is lent the descriptor that the child maps.
        ``on_death`` is called once if the child ends later without being closed.  Raises ``RefusedError`` for a file at fault,
        ``ChildDiedError`` if loading kills the child or takes too long, ``UnavailableError`` if the world lacks something (a
        file, a runtime library, seccomp).
        """
        child = cls(card.name, settings, ring)
        needed_bytes = step_bytes(ring.shape, ring.slots)
        bounded("engine arena_bytes for a language model", settings.arena_bytes, needed_bytes, 2**31, "bytes")
        runtime = _runtime(settings.runtime, card)
        tokenizer = _tokenizer(folder / card.tokenizer.filename, card.tokenizer.sha256)
        order = Order(
            card.name, bytes.fromhex(card.files[runtime].sha256), runtime, settings.threads, settings.memory_bytes,
            settings.invoke_limit_us, settings.unsafe_without_seccomp, ring.shape, ring.window_blocks, ring.slots, tuple(curve),
        )  # fmt: skip
        with _opened(folder / card.files[runtime].filename) as model_fd:
            child._child.spawn(WORKER, settings.arena_bytes, model_fd, ring.fd)
            mapped(model_fd)
        try:
            reply = await child._child.call("start", order.to_body(), [tokenizer], settings.load_limit_us)
            child.account = await child._sound(lambda: Account.from_body(reply.body, ring.shape.vocabulary))
            child._child.watch(on_death)
        except BaseException:
            await child.close()
            raise
        return child

    @property
    def alive(self) -> bool:
        return self._child.alive

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def stepping(self) -> bool:
        """Whether the child is at a step."""
        return self._stepping is not None and self._child.busy

    async def encode(
        self,
        text: str | None = None,
        messages: Sequence[ChatMessage] = (),
        *,
        continuing: bool = False,
        begun: str = "",
        limit: int,
    ) -> tuple[int, ...]:
        """Token ids of raw ``text``, or of ``messages`` in the model's chat template with the answer asked for.

        ``continuing``: the messages follow a session that ends with an answer; the ids first close it (the id that ended the
        answer, if one did, comes again).  ``begun`` follows: the beginning of the answer.  Raises ``RefusedError`` for more than
        ``limit`` tokens.
        """
        bounded("limit of tokens", limit, 1, MAX_ENCODED_TOKENS, "tokens")
        talk = [[each.role, each.content] for each in messages]
        bulk = encode([text, talk, begun])
        reply = await self._call("encode", [continuing, limit], [bulk])
        return await self._sound(lambda: self._ids(reply, limit))

    def _ids(self, reply: Reply, limit: int) -> tuple[int, ...]:
        count = bounded("count of ids", reply.body, 0, limit)
        if len(reply.bulk) != len(packed_ids((0,))) * count:
            raise RefusedError("ids", f"{len(reply.bulk)} bytes", f"{count} ids")
        return events.checked_ids(unpacked_ids(reply.bulk), self._shape.vocabulary)

    async def open(
        self,
        slot: int,
        tokens: int = 0,
        prelude: bytes = b"",
        blocks: Iterable[bytes] = (),
        rows: bytes = b"",
        history: Sequence[int] = (),
    ) -> int:
        """Make ``slot`` hold a session of ``tokens`` tokens; how many µs it took in the child.

        ``blocks``: the last min(sealed, window_blocks) sealed blocks, oldest first.  ``rows``: packed rows of all unsealed
        positions.  ``history``: ids of the session, the last ones are enough; they serve only for guessing.  A slot in use is
        opened anew.  Raises ``RefusedError`` if the sizes do not make ``tokens`` tokens; the slot is then closed.
        """
        known = tuple(blocks)
        for each in known:
            bounded("length of a sealed block", len(each), self._shape.block_bytes, self._shape.block_bytes, "bytes")
        last = history[-HISTORY_TOKENS:]
        body: object = [slot, tokens, len(prelude), len(known), len(rows), len(last)]
        verb, took_us = "open", 0
        for piece in _pieces((prelude, *known, rows, packed_ids(last)), self._arena_bytes):
            reply = await self._call(verb, body, piece)
            verb, body = "load", slot
            took_us += reply.elapsed_us
        if reply.body is not True:
            raise await self._child.breach("a slot is not open when all has come")
        return took_us

    async def begin(
        self,
        slot: int,
        prompt: Sequence[int],
        *,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        speculate: bool = True,
        begun: str = "",
        answered: Sequence[int] = (),
    ) -> None:
        """Begin a turn in an open slot. ``prompt``: the ids that are not in KV yet, at least 1 (a pending id counts).

        ``begun``: the beginning of the answer that was shown elsewhere, as text; ``answered``: ids of the answer that were told
        before, by a child that died: its text goes on at the very character, and stop texts are looked for across both.
        ``max_tokens`` counts what is still to come.  A draw depends on the seed and the token's position only, so a turn that
        goes on in another child goes on alike.  Raises ``RefusedError``; the slot stays as it was.
        """
        drawing = [sampling.temperature_milli, sampling.top_k, sampling.top_p_milli, sampling.seed]
        body = [slot, drawing, max_tokens, list(stop), speculate, begun[-BEGUN_CHARS:], len(prompt)]
        await self._call("begin", body, [packed_ids(prompt), packed_ids(answered)])

    async def step(self, burst_us: int = 0) -> StepReply:
        """One batched step of all live turns; an empty reply if there is none.

        For ``burst_us`` more steps follow it, while all live turns decode and none of them ends or seals a block; ``hurry``
        and every other call end that.  Raises ``ChildDiedError``; ``UnavailableError`` if the step failed as a whole: every
        turn is then over, and the slots hold what was reported.
        """
        if self._stepping is None:
            bounded("burst_us", burst_us, 0, MAX_BURST_US, "µs")
            self._stepping = asyncio.get_running_loop().create_task(self._step(burst_us), name=f"step of {self._model}")
        task = self._stepping
        try:
            return await asyncio.shield(task)
        finally:
            if task.done() and self._stepping is task:
                self._stepping = None

    def hurry(self) -> None:
        """Somebody waits for the child: a burst that is under way ends after the step that it is at."""
        if self._stepping is not None:
            self._child.hurry()

    async def _step(self, burst_us: int) -> StepReply:
        reply = await self._child.call_through("step", burst_us, (), self._limit_us)
        return await self._sound(lambda: self._step_reply(reply))

    def _step_reply(self, reply: Reply) -> StepReply:
        bodies, rows, live, steps = items(reply.body, "step", 4)
        told = events.from_bodies(bodies, reply.bulk, self._shape, self._ring.slots)
        bounded("live turns", live, 0, self._ring.slots)
        return StepReply(told, reply.elapsed_us, natural(rows), live, natural(steps))

    async def cancel(self, slot: int) -> TurnEvent:
        """End the slot's turn; its KV stays. The event carries every unsealed row that no event has carried yet."""
        reply = await self._call("cancel", slot, ())
        return await self._sound(lambda: self._only_event(reply, slot))

    def _only_event(self, reply: Reply, slot: int) -> TurnEvent:
        told = events.from_bodies(reply.body, reply.bulk, self._shape, self._ring.slots)
        if [each.slot for each in told] != [slot]:
            raise RefusedError("cancel", f"{len(told)} events", f"one of slot {slot}")
        return told[0]

    async def close_slot(self, slot: int) -> None:
        """Forget the slot, and a turn in it, and give its memory back to the system."""
        await self._call("close", slot, ())

    def kill(self, cause: str) -> None:
        """End the child now; whoever waits for it is told ``cause``, and so is ``on_death``."""
        self._child.kill(cause)

    async def close(self) -> None:
        """End the child. The ring memory is the caller's and stays. May be called twice."""
        await self._child.close()

    async def _call(self, verb: str, body: object, bulk: Iterable[Part]) -> Reply:
        self.hurry()
        return await self._child.call(verb, body, bulk, self._limit_us)

    async def _sound(self, read: Callable[[], T]) -> T:
        """What ``read`` makes of an answer; a child whose answer it refuses is killed."""
        try:
            return read()
        except RefusedError as error:
            raise await self._child.breach(str(error)) from error


def _pieces(parts: Iterable[Part], most_bytes: int) -> Iterator[list[Part]]:
    """``parts`` one after another in pieces of at most ``most_bytes``; at least one piece."""
    piece: list[Part] = []
    left = most_bytes
    for part in parts:
        rest = memoryview(part)
        while len(rest) > left:
            yield [*piece, rest[:left]]
            rest, piece, left = rest[left:], [], most_bytes
        piece.append(rest)
        left -= len(rest)
    yield piece


def _runtime(wanted: str, card: LanguageCard) -> str:
    """The first runtime that is installed here and that the card has a file for."""
    allowed = RUNTIMES[1:] if wanted == "auto" else (wanted,)
    for each in allowed:
        if each in card.files and importlib.util.find_spec(each) is not None:
            return each
    raise UnavailableError(
        f"model {card.name}", f"none of {', '.join(allowed)} is installed and has a file", "pip install ai-edge-litert"
    )


def _tokenizer(path: Path, sha256: str) -> bytes:
    with _opened(path) as fd:
        data = os.pread(fd, MAX_TOKENIZER_BYTES, 0)
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise RefusedError(f"tokenizer {path}", f"bytes of SHA-256 {digest}", sha256, "build the model again")
    return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnavailableError(f"model file {path}", str(error.strerror), "build it: sly models build") from error
    try:
        yield fd
    finally:
        os.close(fd)
