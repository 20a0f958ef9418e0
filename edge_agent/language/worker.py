"""The engine child of a language model: started with exec, confined, then one answer to each call until the socket closes.

Rules: the order of ``_start`` is law, as in ``runtime.worker``: libraries first, then the digest of the bytes, then confinement,
and only then is a byte of the model or of its tokenizer parsed.  Everything that the child learns of the outside comes through
four inherited descriptors: the socket, the model's file, the arena, the ring memory.  The agent's calls are trusted in their
form; what they bring is not: messages, ids and KV bytes come from outside.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_agent.core.cbor import decode
from edge_agent.core.chat import MAX_TURN_BYTES, ChatMessage, Sampling
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import packed_ids, unpacked_ids
from edge_agent.core.model_shape import ring_bytes
from edge_agent.language import events, measuring
from edge_agent.language.batching import CostCurve
from edge_agent.language.costs import Costs
from edge_agent.language.decoder import Decoder
from edge_agent.language.engine import Engine, Options
from edge_agent.language.handshake import Account, Order
from edge_agent.language.ring import Ring
from edge_agent.language.ring_memory import slot_bytes
from edge_agent.language.stages import open_stages
from edge_agent.runtime import confine
from edge_agent.runtime.engine import path_of, read_whole
from edge_agent.runtime.tflite import WARM_UP_MODEL, interpreter_module
from edge_agent.runtime.verb_worker import Verb, VerbWorker
from edge_agent.runtime.worker import ACCOUNT_OF_MEMORY, check_digest, resident_bytes
from models.tokenizer import Tokenizer

ID_BYTES = 4
LITERT_CHUNK, STATIC_CHUNK = 68, 64
"""A piece of a prompt at most; the first block with its sinks has 68 tokens."""

Answer = tuple[object, Sequence[bytes]]


class Memory:
    """The rings of all slots in one mapping."""

    def __init__(self, ring_fd: int, order: Order) -> None:
        self._order, self._map = order, mmap.mmap(ring_fd, 0)
        self._slot_bytes = slot_bytes(order.shape, order.window_blocks)

    def ring(self, slot: int) -> Ring:
        start = slot * self._slot_bytes
        size_bytes = ring_bytes(self._order.shape, self._order.window_blocks)
        return Ring(memoryview(self._map)[start : start + size_bytes], self._order.shape, self._order.window_blocks)

    def free(self, slot: int) -> None:
        """Give the slot's pages back to the system; they read as zeros from now on."""
        self._map.madvise(mmap.MADV_REMOVE, slot * self._slot_bytes, self._slot_bytes)


@dataclass(slots=True)
class _Opening:
    """A slot whose bytes have not all come yet. ``sizes``: of prelude, blocks, rows and history, in this order."""

    tokens: int
    sizes: tuple[int, int, int, int]
    blocks: int
    data: bytearray = field(default_factory=bytearray)


class LanguageWorker:
    """The verbs, over one engine. ``asked`` says whether the agent has something to say, or nothing any more."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, block_bytes: int, asked: Callable[[], bool]) -> None:
        self._engine, self._tokenizer, self._block_bytes, self._asked = engine, tokenizer, block_bytes, asked
        self._opening: dict[int, _Opening] = {}

    @property
    def verbs(self) -> dict[str, Verb]:
        return {
            "encode": self.encode, "open": self.open, "load": self.load, "begin": self.begin, "step": self.step,
            "cancel": self.cancel, "close": self.close,
        }  # fmt: skip

    def encode(self, body: Any, bulk: memoryview) -> Answer:
        """[continuing, limit]; bulk: [text or null, [[role, content]...], begun] as CBOR -> how many; bulk: ids."""
        continuing, limit = body
        value: Any = decode(bulk, 2 * MAX_TURN_BYTES, subject="messages")
        text, messages, begun = value
        if text is not None:
            ids = self._tokenizer.encode(text + begun, limit=limit)
        else:
            ids = self._tokenizer.render([ChatMessage(*each) for each in messages], continuing, begun=begun)
        if len(ids) > limit:
            raise RefusedError("prompt", f"{len(ids)} tokens", f"at most {limit} tokens")
        return len(ids), [packed_ids(ids)]

    def open(self, body: Any, bulk: memoryview) -> Answer:
        """[slot, tokens, prelude bytes, blocks, rows bytes, ids of history]; bulk: their beginning -> whether it is open."""
        slot, tokens, prelude_bytes, blocks, rows_bytes, history = body
        sizes = (prelude_bytes, blocks * self._block_bytes, rows_bytes, history * ID_BYTES)
        opening = _Opening(tokens, sizes, blocks)
        self._engine.close(slot)
        if len(bulk) == sum(sizes):
            self._opened(slot, opening, bulk)
            return True, []
        self._opening[slot] = opening
        return self.load(slot, bulk)

    def load(self, slot: Any, bulk: memoryview) -> Answer:
        """More of what ``open`` announced -> whether it is open."""
        opening = self._opening.get(slot)
        if opening is None:
            raise RefusedError("load", f"slot {slot}", "a slot that is being opened", "open it")
        opening.data += bulk
        if len(opening.data) < sum(opening.sizes):
            return False, []
        del self._opening[slot]
        with memoryview(opening.data) as data:
            self._opened(slot, opening, data)
        return True, []

    def _opened(self, slot: int, opening: _Opening, data: memoryview) -> None:
        parts, at = [], 0
        for size in opening.sizes:
            parts.append(data[at : at + size])
            at += size
        prelude, blocks, rows, history = parts
        size = self._block_bytes
        each = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        self._engine.open(slot, opening.tokens, prelude, each, rows, unpacked_ids(history))

    def begin(self, body: Any, bulk: memoryview) -> Answer:
        """[slot, sampling, max_tokens, stop, speculate, begun, ids in the prompt]; bulk: prompt's ids, then the answer's."""
        slot, sampling, max_tokens, stop, speculate, begun, prompt = body
        ids = unpacked_ids(bulk)
        options = Options(Sampling(*sampling), max_tokens, tuple(stop), speculate, begun, ids[prompt:])
        self._engine.begin(slot, ids[:prompt], options)
        return None, []

    def step(self, body: Any, bulk: memoryview) -> Answer:
        """For how many µs steps may follow the first one -> [events, rows, live turns, steps]; bulk: the events'."""
        until_ns = time.monotonic_ns() + 1000 * body
        stepped = self._engine.step(lambda: time.monotonic_ns() < until_ns and not self._asked())
        bodies = [events.to_body(each) for each in stepped.events]
        return [bodies, stepped.rows, stepped.live, stepped.steps], events.bulk_of(stepped.events)

    def cancel(self, body: Any, bulk: memoryview) -> Answer:
        """slot -> its last event; bulk: the event's."""
        event = self._engine.cancel(body)
        return [events.to_body(event)], events.bulk_of([event])

    def close(self, body: Any, bulk: memoryview) -> Answer:
        """slot -> nothing."""
        self._opening.pop(body, None)
        self._engine.close(body)
        return None, []


def start(model_fd: int, ring_fd: int, worker: VerbWorker) -> Verb:
    """The first verb: an ``Order``, bulk: the tokenizer's bytes -> an ``Account``; then the others may be called."""

    def verb(body: object, bulk: memoryview) -> Answer:
        order = Order.from_body(body)
        verbs, account = _start(order, bytes(bulk), model_fd, ring_fd, worker.asked)
        worker.verbs = verbs
        worker.cpu_limit_s = -(-order.invoke_limit_us // 10**6) * order.threads + 1
        return account.to_body(), []

    return verb


def _start(
    order: Order, tokenizer_bytes: bytes, model_fd: int, ring_fd: int, asked: Callable[[], bool]
) -> tuple[dict[str, Verb], Account]:
    runtime, module = interpreter_module(order.runtime)
    module.Interpreter(model_content=WARM_UP_MODEL).allocate_tensors()
    version = importlib.import_module(runtime).__version__
    memory = Memory(ring_fd, order)
    check_digest(model_fd, order.digest)
    account_fd = os.open(ACCOUNT_OF_MEMORY, os.O_RDONLY | os.O_CLOEXEC)
    layers = confine.confine(model_fd, order.memory_bytes, device=False, unsafe_without_seccomp=order.unsafe_without_seccomp)
    tokenizer = Tokenizer.from_bytes(tokenizer_bytes)
    model = path_of(model_fd) if confine.files_open(layers) else read_whole(model_fd)
    stages = open_stages(module, model, order.shape, order.threads, runtime)
    decoder = Decoder(stages, order.shape, order.threads)
    curve = _tested(decoder, memory, CostCurve(order.curve) if order.curve else None)
    engine = Engine(
        decoder, memory.ring, memory.free, tokenizer.token_bytes, tokenizer.stop_ids, Costs(curve), order.slots,
        LITERT_CHUNK if runtime == "ai_edge_litert" else STATIC_CHUNK,
    )  # fmt: skip
    _settle_memory()
    account = Account(f"{runtime} {version}", layers, resident_bytes(account_fd), tuple(sorted(tokenizer.stop_ids)), curve.points)
    return LanguageWorker(engine, tokenizer, order.shape.block_bytes, asked).verbs, account


def _tested(decoder: Decoder, memory: Memory, curve: CostCurve | None) -> CostCurve:
    ring = memory.ring(0)
    measuring.self_test(decoder, ring)
    curve = curve or measuring.measured(decoder, ring)
    memory.free(0)
    return curve


def _settle_memory() -> None:
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)


def main(arguments: list[str]) -> None:
    """``arguments``: the descriptors of socket, model, arena and ring memory, and the agent's process id."""
    channel_fd, model_fd, arena_fd, ring_fd, parent_pid = map(int, arguments)
    confine.die_with(parent_pid)
    worker = VerbWorker(mmap.mmap(arena_fd, 0), {})
    worker.verbs = {"start": start(model_fd, ring_fd, worker)}
    worker.serve(socket.socket(fileno=channel_fd))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
