"""The engines of one board: a sandboxed child for each loaded model, kept alive as long as its model deserves it.

Rules: requests to one model run one at a time, first come first served, and only ``max_waiting`` may wait.  A child that
dies takes one request with it, is replaced, and counts against its model (``quarantine``).  Nothing that a model does ends
the agent, and nothing that a caller does (a short budget, a cancellation) counts against a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from board_support.board import Delegate
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import Tensor
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervised import EngineState, Invocation, Loaded, Supervised
from models.card import Card

__all__ = ["EngineSettings", "EngineState", "EngineSupervisor", "Invocation", "Loaded"]

MAX_ENGINES = 64


class EngineSupervisor:
    """``report`` gets one line for each death, restart and quarantine."""

    def __init__(
        self, settings: EngineSettings, delegate: Delegate | None = None, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self._settings, self._delegate, self._report = settings, delegate, report
        self._engines: dict[str, Supervised] = {}

    async def load(self, name: str, model_fd: int, digest: bytes, card: Card | None = None) -> Loaded:
        """Run ``model_fd``'s model, whose bytes the caller hashed (SHA-256 ``digest``), as ``name``. The descriptor is copied.

        Raises ``RefusedError`` for a model that cannot be served, ``UnavailableError`` if loading killed the child or a
        runtime library is missing, ``RuntimeError`` if ``name`` is loaded already.
        """
        if name in self._engines:
            raise RuntimeError(f"model {name} is loaded already")
        if len(self._engines) >= MAX_ENGINES:
            raise RefusedError("engines", f"{len(self._engines)} loaded", f"at most {MAX_ENGINES}", "unload one")
        engine = Supervised(name, model_fd, digest, card, self._settings, self._delegate, self._report)
        self._engines[name] = engine
        try:
            return await engine.start()
        except BaseException:
            self._engines.pop(name, None)
            raise

    async def invoke(self, name: str, inputs: Mapping[str, Tensor], budget_us: int) -> Invocation:
        """Run ``name`` once, on its own input tensors or, if it has a card, on ``{"image": encoded picture}``.

        Raises ``RefusedError`` for inputs that the model does not take, ``UnavailableError`` if the child died, the budget
        (which also covers waiting) ran out, too many wait, or the model is quarantined.
        """
        return await self._named(name).invoke(inputs, budget_us)

    def state(self, name: str) -> EngineState:
        return self._named(name).state

    def deaths(self, name: str) -> tuple[str, ...]:
        """How the children of ``name`` ended that are held against it, the last one last."""
        return self._named(name).deaths

    def idle(self, name: str) -> bool:
        """Whether a request to ``name`` would run at once."""
        return self._named(name).idle

    def loaded(self) -> dict[str, int]:
        """The descriptors that the children of all loaded models map, by the models' names; they are good while this call's
        caller does not wait."""
        return {name: engine.model_fd for name, engine in self._engines.items() if engine.state is not EngineState.CLOSED}

    def release(self, name: str) -> None:
        """End the quarantine of ``name`` and start it again in the background; nothing for a model that has none."""
        self._named(name).release()

    async def unload(self, name: str) -> None:
        """End the child of ``name``; whoever waits for it gets ``UnavailableError``."""
        await self._named(name).close()
        self._engines.pop(name, None)

    async def close(self) -> None:
        """End every child."""
        for name in list(self._engines):
            await self.unload(name)

    def _named(self, name: str) -> Supervised:
        if name not in self._engines:
            raise RefusedError("model", name, ", ".join(self._engines) or "none is loaded", "load it first")
        return self._engines[name]
