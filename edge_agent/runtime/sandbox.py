"""One engine child, seen from the agent: started, asked, watched, reaped; all on the event loop, with no thread.

Rules:

* one request at a time; its inputs are written to the arena, then one small message goes each way;
* every wait has an end: a child that has not answered at the limit is killed and counts as dead;
* a caller that gives up leaves the request running; the next one waits for it to end;
* a child that says something a sound child would not say is killed;
* the process is known by its pidfd, so that nothing else is ever signalled or waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping

from board_support.board import Delegate
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import Tensor
from edge_agent.runtime import doorbell
from edge_agent.runtime.arena import Arena
from edge_agent.runtime.child import ChildDiedError, Death, ended, last_words, start_child
from edge_agent.runtime.doorbell import MAX_DOORBELL_BYTES, Answer, Done, Failed, Loaded, Refused
from edge_agent.runtime.handshake import Order, Ready
from edge_agent.runtime.settings import EngineSettings
from models.card import Card

__all__ = ["ChildDiedError", "Death", "Sandbox"]

KEPT_STDERR_BYTES = 2048
STDERR_BYTES_A_SECOND = 64 * 2**10
"""After this much the child's next words wait in the pipe, and so does the child."""


class Sandbox:
    """Use ``start``; then ``invoke`` until ``on_death`` is called or you ``close`` it."""

    ready: Ready
    _output_types: list[tuple[str, str]]

    def __init__(self, model: str, settings: EngineSettings, on_death: Callable[[Death], None]) -> None:
        self._model, self._settings, self._on_death = model, settings, on_death
        self._loop = asyncio.get_running_loop()
        self._sequence = doorbell.HANDSHAKE
        self._answer: asyncio.Future[Answer] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._exited: asyncio.Future[Death] = self._loop.create_future()
        self._cause = ""
        self._stderr, self._stderr_bytes, self._closing = b"", 0, False
        self._listening_again: asyncio.TimerHandle | None = None

    @classmethod
    async def start(
        cls,
        model: str,
        model_fd: int,
        digest: bytes,
        settings: EngineSettings,
        delegate: Delegate | None = None,
        card: Card | None = None,
        on_death: Callable[[Death], None] = lambda death: None,
    ) -> Sandbox:
        """A child with the model loaded. ``on_death`` is called once if it ends later without being closed.

        Raises ``RefusedError`` if the child finds the model at fault, ``ChildDiedError`` if loading kills it or takes too
        long, ``UnavailableError`` if the world lacks something (a runtime library, seccomp).
        """
        sandbox = cls(model, settings, lambda death: None)
        sandbox._spawn(model_fd)
        try:
            order = Order(model, digest, settings, delegate, card).encode()
            if len(order) > MAX_DOORBELL_BYTES:
                raise RefusedError(f"card and settings of model {model}", f"{len(order)} bytes", f"{MAX_DOORBELL_BYTES}")
            answer = await sandbox._ask(order, settings.load_limit_us)
            sandbox.ready = sandbox._handshake(answer)
            sandbox._output_types = [(spec.name, spec.dtype) for spec in sandbox.ready.signature.outputs]
            if sandbox._exited.done():
                raise ChildDiedError(f"model {model}", sandbox._exited.result())
        except BaseException:
            await sandbox.close()
            raise
        sandbox._on_death = on_death
        return sandbox

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

    async def invoke(self, inputs: Mapping[str, Tensor], whole_task: bool) -> tuple[Done, int]:
        """Run the model once: where its outputs lie, and how many µs the child took.

        Raises ``RefusedError`` for inputs that are at fault, ``ChildDiedError``, ``UnavailableError`` if the model failed and
        its child lives on, ``RuntimeError`` if a request runs already.
        """
        if self.busy:
            raise RuntimeError(f"the child of model {self._model} runs one request at a time")
        if not self.alive:
            raise ChildDiedError(f"model {self._model}", await self._ended())
        message = doorbell.encode_request(self._sequence + 1, whole_task, self._arena.put(inputs))
        if len(message) > MAX_DOORBELL_BYTES:
            raise RefusedError("request", f"{len(message)} bytes of names and shapes", f"at most {MAX_DOORBELL_BYTES}")
        self._sequence += 1
        answer = await self._ask(message, self._settings.invoke_limit_us)
        if isinstance(answer.reply, Done) and (whole_task or self._as_signed(answer.reply)):
            return answer.reply, answer.elapsed_us
        self._raise_if_failed(answer)
        raise ChildDiedError(f"model {self._model}", await self._breach("not the outputs that its handshake announced"))

    def _as_signed(self, done: Done) -> bool:
        """Names and dtypes must be those of the handshake; shapes may depend on the inputs."""
        return [(place.name, place.dtype) for place in done.outputs] == self._output_types

    def take(self, done: Done) -> dict[str, Tensor]:
        """The outputs of the last ``invoke``, copied out of the arena."""
        outputs = {place.name: self._arena.take(place) for place in done.outputs}
        self._arena.trim()
        return outputs

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

    def _spawn(self, model_fd: int) -> None:
        try:
            with contextlib.ExitStack() as undo:
                self._arena = Arena(self._settings.arena_bytes)
                undo.callback(self._arena.close)
                self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.callback(self._channel.close)
                with theirs:
                    self._process = start_child(theirs, model_fd, self._arena.fd)
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

    def _handshake(self, answer: Answer) -> Ready:
        self._raise_if_failed(answer)
        if not isinstance(answer.reply, Loaded):
            raise RefusedError(f"engine of model {self._model}", "an answer before the handshake", "a handshake")
        return Ready.decode(self._arena.head(answer.reply.size_bytes))

    def _raise_if_failed(self, answer: Answer) -> None:
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
            self.kill("its socket is closed")
        return await answer

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
            answer = doorbell.decode_answer(message, self._settings.arena_bytes)
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
