"""The engine child of one model that takes tensors and gives tensors, seen from the agent.

Rules: one request at a time; its inputs are written to the arena, then one small message goes each way.  How the child is
watched and ended is the rule of ``WatchedChild``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from board_support.board import Delegate
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import Tensor
from edge_agent.runtime import doorbell
from edge_agent.runtime.child import ChildDiedError, Death
from edge_agent.runtime.doorbell import MAX_DOORBELL_BYTES, Answer, Done, Loaded
from edge_agent.runtime.handshake import Order, Ready
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.watched import KEPT_STDERR_BYTES, STDERR_BYTES_A_SECOND, WatchedChild
from models.card import Card

__all__ = ["KEPT_STDERR_BYTES", "STDERR_BYTES_A_SECOND", "ChildDiedError", "Death", "Sandbox"]


class Sandbox(WatchedChild):
    """Use ``start``; then ``invoke`` until ``on_death`` is called or you ``close`` it."""

    ready: Ready
    _output_types: list[tuple[str, str]]

    def __init__(self, model: str, settings: EngineSettings, on_death: Callable[[Death], None]) -> None:
        super().__init__(model, on_death)
        self._settings = settings

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
        sandbox._spawn(settings.arena_bytes, model_fd)
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

    def _handshake(self, answer: Answer) -> Ready:
        self._raise_if_failed(answer)
        if not isinstance(answer.reply, Loaded):
            raise RefusedError(f"engine of model {self._model}", "an answer before the handshake", "a handshake")
        return Ready.decode(self._arena.head(answer.reply.size_bytes))
