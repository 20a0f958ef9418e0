"""The engine child: started by ``sandbox`` with exec, confined, then one answer to each request until the socket closes.

Rules: the order of ``open_model`` is law: libraries first, then the digest of the bytes, then confinement, and only then
is a byte of the model parsed.  Everything that the child learns of the outside comes through three inherited descriptors:
the socket, the model's file, the arena.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import mmap
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import MAX_RANK, MAX_TENSOR_BYTES
from edge_agent.runtime import confine, doorbell
from edge_agent.runtime.arena import Place, Placed, aligned
from edge_agent.runtime.doorbell import MAX_DOORBELL_BYTES, Request
from edge_agent.runtime.engine import Arrays, Engine, engine_class
from edge_agent.runtime.handshake import Order, Ready

WHOLE_TASK_INPUT = "image"
REGION_INPUT = "region"
HASHED_AT_ONCE_BYTES = 2**20
INVOKE_ERRORS = (RuntimeError, ValueError, MemoryError, UnavailableError)
ACCOUNT_OF_MEMORY = "/proc/self/smaps_rollup"


class Worker:
    """One opened model. ``vision`` is the module of the card's task, ``None`` without a card."""

    def __init__(self, engine: Engine, arena: mmap.mmap, order: Order, vision: Any) -> None:
        self._engine, self._arena, self._card, self._vision = engine, arena, order.card, vision
        self._bytes = np.frombuffer(arena, np.uint8)
        self._cpu_limit_s = -(-order.settings.invoke_limit_us // 10**6) * order.settings.threads + 1
        self._cpu_due_s = 0.0

    def answer(self, message: bytes) -> bytes:
        request = doorbell.decode_request(message, len(self._arena))
        self._allow_cpu_time()
        started_ns = time.monotonic_ns()
        try:
            outputs = self._put(self._run(request), max((place.end for place in request.inputs), default=0))
        except RefusedError as error:
            return doorbell.encode_refused(request.sequence, error)
        except INVOKE_ERRORS as error:
            return doorbell.encode_failed(request.sequence, " ".join(str(error).split()) or type(error).__name__)
        return doorbell.encode_done(request.sequence, (time.monotonic_ns() - started_ns) // 1000, outputs)

    def _allow_cpu_time(self) -> None:
        """Move the CPU limit ahead, at most once a second of CPU time, for two system calls are 3 µs."""
        if time.process_time() >= self._cpu_due_s:
            confine.allow_cpu_time(self._cpu_limit_s + 1)
            self._cpu_due_s = time.process_time() + 1

    def _run(self, request: Request) -> Mapping[str, NDArray[np.generic]]:
        inputs = {place.name: self._view(place) for place in request.inputs}
        if not request.whole_task:
            return self._engine.invoke(inputs)
        prepared, geometry = self._vision.prepare(self._card, inputs[WHOLE_TASK_INPUT].data, inputs.get(REGION_INPUT))
        answer: Arrays = self._vision.interpret(self._card, self._engine.invoke(prepared), geometry)
        return answer

    def _view(self, place: Placed) -> NDArray[np.generic]:
        return self._bytes[place.offset : place.end].view(place.dtype).reshape(place.shape)

    def _put(self, outputs: Mapping[str, NDArray[np.generic]], offset: int) -> tuple[Place, ...]:
        places: list[Place] = []
        for name, array in outputs.items():
            offset = aligned(offset)
            end = offset + array.nbytes
            if end > len(self._bytes) or array.nbytes > MAX_TENSOR_BYTES or array.ndim > MAX_RANK:
                raise RuntimeError(f"output {name} of shape {array.shape} is too large: {array.nbytes} bytes")
            if array.nbytes:
                np.copyto(self._bytes[offset:end].view(array.dtype).reshape(array.shape), array)
            places.append((name, array.dtype.name, array.shape, offset))
            offset = end
        return tuple(places)


def check_digest(model_fd: int, expected: bytes) -> None:
    """Raises ``RefusedError`` unless the file behind ``model_fd`` still holds the bytes that were hashed (SHA-256)."""
    digest, offset = hashlib.sha256(), 0
    while piece := os.pread(model_fd, HASHED_AT_ONCE_BYTES, offset):
        digest.update(piece)
        offset += len(piece)
    if digest.digest() != expected:
        raise RefusedError("model file", f"bytes of SHA-256 {digest.hexdigest()}", expected.hex(), "fetch the model again")


def load_vision() -> Any:
    """Everything that a picture needs, imported while files can still be read."""
    importlib.import_module("models.pictures").preload()
    return importlib.import_module("models.vision")


def open_model(order: Order, model_fd: int, arena: mmap.mmap) -> tuple[Worker, Ready]:
    """The opened model and the account of it. Raises ``RefusedError`` or ``UnavailableError``."""
    engine = engine_class(order.settings.engine)(order.settings, order.delegate)
    vision = load_vision() if order.card else None
    model_work = importlib.import_module("board_support.work").model_work
    library = engine.library
    check_digest(model_fd, order.digest)
    account = os.open(ACCOUNT_OF_MEMORY, os.O_RDONLY | os.O_CLOEXEC)
    layers = confine.confine(
        model_fd,
        order.settings.memory_bytes,
        device=order.delegate is not None,
        unsafe_without_seccomp=order.settings.unsafe_without_seccomp,
    )
    with mmap.mmap(model_fd, 0, prot=mmap.PROT_READ) as model, memoryview(model) as view:
        work = model_work(view)
    engine.open(model_fd, confine.files_open(layers))
    signature = engine.signature()
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
    ready = Ready(signature, work, library, engine.delegate, layers, resident_bytes(account), engine.delegated_permille)
    return Worker(engine, arena, order, vision), ready


def resident_bytes(account_fd: int) -> int:
    """This process's proportional share of memory (PSS), from an open ``smaps_rollup``, which is closed."""
    account = os.pread(account_fd, 8192, 0)
    os.close(account_fd)
    for line in account.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def serve(channel: socket.socket, model_fd: int, arena: mmap.mmap) -> None:
    order = Order.decode(channel.recv(MAX_DOORBELL_BYTES))
    try:
        worker, ready = open_model(order, model_fd, arena)
    except RefusedError as error:
        channel.send(doorbell.encode_refused(doorbell.HANDSHAKE, error))
        return
    except UnavailableError as error:
        channel.send(doorbell.encode_failed(doorbell.HANDSHAKE, str(error)))
        return
    account = ready.encode()
    arena[: len(account)] = account
    channel.send(doorbell.encode_loaded(len(account)))
    while message := channel.recv(MAX_DOORBELL_BYTES):
        channel.send(worker.answer(message))


def main(arguments: list[str]) -> None:
    """``arguments``: the descriptors of socket, model and arena, and the agent's process id."""
    channel_fd, model_fd, arena_fd, parent_pid = map(int, arguments)
    confine.die_with(parent_pid)
    serve(socket.socket(fileno=channel_fd), model_fd, mmap.mmap(arena_fd, 0))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
