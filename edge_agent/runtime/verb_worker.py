"""The child's end of ``verbs``: one answer to each call until the socket closes.

Rules: a verb takes the body and the bulk as they came and gives a body and bulk parts.  It raises ``RefusedError`` for bad data
and one of ``FAILURES`` if it could not be done; any other exception ends the child.  A verb has taken what it needs of its bulk
when it returns, for its own bulk is written over it.
"""

from __future__ import annotations

import mmap
import socket
import time
from collections.abc import Callable, Sequence

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.runtime import confine, doorbell
from edge_agent.runtime.doorbell import MAX_DOORBELL_BYTES

FAILURES = (RuntimeError, ValueError, MemoryError, UnavailableError)

Verb = Callable[[object, memoryview], tuple[object, Sequence[bytes]]]


class VerbWorker:
    """``verbs`` may be changed by a verb: the first one loads what the others need. ``cpu_limit_s`` 0 sets no limit."""

    def __init__(self, arena: mmap.mmap, verbs: dict[str, Verb]) -> None:
        self.verbs, self.cpu_limit_s = verbs, 0
        self._arena = memoryview(arena)
        self._cpu_due_s = 0.0
        self._channel: socket.socket | None = None

    def serve(self, channel: socket.socket) -> None:
        self._channel = channel
        while message := channel.recv(MAX_DOORBELL_BYTES):
            if message != doorbell.HURRY:
                channel.send(self.answer(message))

    def asked(self) -> bool:
        """Whether something waits in the socket, or it was closed: a call that may end early is to do so."""
        assert self._channel is not None, "there is no call before it is served"
        try:
            self._channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def answer(self, message: bytes) -> bytes:
        call = doorbell.decode_call(message, len(self._arena))
        self._allow_cpu_time()
        started_ns = time.monotonic_ns()
        try:
            body, parts = self._verb(call.verb)(call.body, self._arena[: call.bulk_bytes])
        except RefusedError as error:
            return doorbell.encode_refused(call.sequence, error)
        except FAILURES as error:
            return doorbell.encode_failed(call.sequence, " ".join(str(error).split()) or type(error).__name__)
        bulk_bytes = self._put(parts)
        return doorbell.encode_said(call.sequence, (time.monotonic_ns() - started_ns) // 1000, body, bulk_bytes)

    def _verb(self, name: str) -> Verb:
        if name not in self.verbs:
            raise RefusedError("verb", name, ", ".join(self.verbs))
        return self.verbs[name]

    def _put(self, parts: Sequence[bytes]) -> int:
        end = 0
        for part in parts:
            start, end = end, end + len(part)
            self._arena[start:end] = part
        return end

    def _allow_cpu_time(self) -> None:
        """Move the CPU limit ahead, at most once a second of CPU time, for two system calls are 3 µs."""
        if self.cpu_limit_s and time.process_time() >= self._cpu_due_s:
            confine.allow_cpu_time(self.cpu_limit_s + 1)
            self._cpu_due_s = time.process_time() + 1
