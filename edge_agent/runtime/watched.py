"""A child process, seen from the agent: started, asked, watched, reaped; all on the event loop, with no thread.

Rules:

* one question at a time, with one answer; what is asked and answered is the business of who uses this;
* every wait has an end: a child that has not answered at the limit is killed and counts as dead;
* a caller that gives up leaves the question open; the next one waits for it to end;
* a child that says something a sound child would not say is killed;
* the process is known by its pidfd, so that nothing else is ever signalled or waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.runtime import doorbell
from edge_agent.runtime.arena import Arena
from edge_agent.runtime.child import ChildDiedError, Death, ended, last_words, start_child
from edge_agent.runtime.doorbell import MAX_DOORBELL_BYTES, Answer, Failed, Refused

KEPT_STDERR_BYTES = 2048
STDERR_BYTES_A_SECOND = 64 * 2**10
"""After this much the child's next words wait in the pipe, and so does the child."""


class WatchedChild:
    """One child and its arena. ``model`` names it in errors; ``on_death`` is called once if it ends without being closed."""

    def __init__(self, model: str, on_death: Callable[[Death], None]) -> None:
        self._model, self._on_death = model, on_death
        self._loop = asyncio.get_running_loop()
        self._sequence = doorbell.HANDSHAKE
        self._answer: asyncio.Future[Answer] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._exited: asyncio.Future[Death] = self._loop.create_future()
        self._cause = ""
        self._stderr, self._stderr_bytes, self._closing = b"", 0, False
        self._listening_again: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._exited.done() and not self._cause and not self._closing

    @property
    def busy(self) -> bool:
        """Whether a request runs, even if its caller has given up on it."""
        return self._answer is not None

    async def becomes_idle(self) -> None:
        """Wait for the running request's end, whatever it is."""
        if self._answer is not None:
            self._idle = self._idle or self._loop.create_future()
            await asyncio.shield(self._idle)

    def kill(self, cause: str) -> None:
        """End the child now; whoever waits for it is told ``cause``."""
        if not self._exited.done():
            self._cause = self._cause or cause
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def close(self) -> None:
        """End the child and free everything. May be called twice; a cancelled close still frees everything later."""
        self._closing = True
        self.kill("closed")
        await self._ended()

    def _spawn(self, arena_bytes: int, model_fd: int, *more_fds: int, worker: str = "") -> None:
        """Start ``worker`` (by default what runs one model) with the arena, the model's file and ``more_fds``."""
        try:
            with contextlib.ExitStack() as undo:
                self._arena = Arena(arena_bytes)
                undo.callback(self._arena.close)
                self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.callback(self._channel.close)
                with theirs:
                    self._process = start_child(worker, theirs, model_fd, self._arena.fd, *more_fds)
                self._pidfd = os.pidfd_open(self._process.pid)
                undo.pop_all()
        except OSError as error:
            raise UnavailableError("sandbox", f"no child can be started: {error.strerror}") from error
        assert self._process.stderr is not None
        self._channel.setblocking(False)
        os.set_blocking(self._process.stderr.fileno(), False)
        self._listen()
        self._loop.add_reader(self._channel.fileno(), self._receive)
        self._loop.add_reader(self._pidfd, self._reap)

    def _raise_if_failed(self, answer: Answer) -> None:
        if not self._exited.done():
            self._arena.trim()
        if isinstance(answer.reply, Refused):
            raise answer.reply.error()
        if isinstance(answer.reply, Failed):
            raise UnavailableError(f"model {self._model}", answer.reply.reason)

    async def _ask(self, message: bytes, limit_us: int) -> Answer:
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._answer = answer
        self._watchdog = self._loop.call_later(limit_us / 1e6, self._overdue, limit_us)
        try:
            self._channel.send(message)
        except OSError:
            self._loop.call_later(1.0, self.kill, "its socket is closed")
        answered = await answer
        if self._exited.done() and not isinstance(answered.reply, Refused | Failed):
            # It died in the same turn of the loop, and what it left in the arena is gone; a refusal is told in the answer itself.
            raise ChildDiedError(f"model {self._model}", self._exited.result())
        return answered

    def _overdue(self, limit_us: int) -> None:
        self.kill(f"hung: no answer within {limit_us / 1e6:g} s")

    def _receive(self) -> None:
        try:
            message = self._channel.recv(MAX_DOORBELL_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._loop.remove_reader(self._channel.fileno())
            self._loop.call_later(1.0, self.kill, "closed its socket")
            return
        try:
            answer = doorbell.decode_answer(message, self._arena.size_bytes)
        except RefusedError as error:
            self.kill(f"broke the protocol: {error}")
            return
        if self._answer is None or answer.sequence != self._sequence:
            self.kill("broke the protocol: an answer to no question")
            return
        self._settle(answer)

    def _settle(self, outcome: Answer | ChildDiedError) -> None:
        """The running request is over: its caller, if it still waits, gets ``outcome``."""
        answer, self._answer = self._answer, None
        if self._watchdog is not None:
            self._watchdog.cancel()
        if answer is not None and not answer.done():
            if isinstance(outcome, ChildDiedError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    async def _ended(self) -> Death:
        return await asyncio.shield(self._exited)

    async def _breach(self, what: str) -> Death:
        self.kill(f"broke the protocol: {what}")
        return await self._ended()

    def _hear(self) -> None:
        """Keep the end of what the child says on stderr; one that says too much in a second waits for the next."""
        stderr = self._process.stderr
        assert stderr is not None
        try:
            words = os.read(stderr.fileno(), 4096)
        except BlockingIOError:
            return
        self._stderr = (self._stderr + words)[-KEPT_STDERR_BYTES:]
        self._stderr_bytes += len(words)
        if not words or self._stderr_bytes > STDERR_BYTES_A_SECOND:
            self._loop.remove_reader(stderr.fileno())
            if words:
                self._listening_again = self._loop.call_later(1.0, self._listen)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        self._stderr_bytes = 0
        self._loop.add_reader(self._process.stderr.fileno(), self._hear)

    def _reap(self) -> None:
        if self._answer is not None and not self._cause:
            self._receive()
        status = self._process.poll()
        if status is None:
            return
        self._hear()
        death = Death(self._cause or ended(status), last_words(self._stderr))
        self._free()
        self._exited.set_result(death)
        self._settle(ChildDiedError(f"model {self._model}", death))
        if not self._closing:
            self._on_death(death)

    def _free(self) -> None:
        assert self._process.stderr is not None
        self._loop.remove_reader(self._process.stderr.fileno())
        if self._listening_again is not None:
            self._listening_again.cancel()
        self._process.stderr.close()
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_reader(self._pidfd)
        self._channel.close()
        os.close(self._pidfd)
        self._arena.close()
