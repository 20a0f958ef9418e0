"""The engine child of one language model, seen from the agent: asyncio, bytes and integers, no NumPy.

Rules:

* calls run one at a time, first come first served: ``encode`` and ``begin`` get their turn between two steps;
* a caller that gives up leaves its call running; a step whose caller gave up is not lost: the next ``step`` gives its reply;
* what the child says is decoded strictly; one that says what a sound child would not say is killed;
* the ring memory is the agent's: it stays when a child dies, and the next child maps it;
* a death is told to ``on_death`` and to whoever waits (``ChildDiedError``); whether there is a next child is the caller's decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.core.chat import ChatMessage, Sampling
from edge_agent.language.events import SealedBlock, StepReply, TurnEvent
from edge_agent.language.ring_memory import RingMemory
from edge_agent.runtime.child import ChildDiedError, Death
from edge_agent.runtime.settings import EngineSettings
from models.language_card import LanguageCard

__all__ = ["Account", "ChildDiedError", "Death", "LanguageChild", "SealedBlock", "StepReply", "TurnEvent"]


@dataclass(frozen=True, slots=True)
class Account:
    """A child's account of itself once its model is loaded and has passed its self-test.

    ``curve``: what a step of so many rows costs, (rows, µs) ascending.  ``stop_ids``: what ends an answer.
    """

    library: str
    confinement: tuple[str, ...]
    resident_bytes: int
    stop_ids: tuple[int, ...]
    curve: tuple[tuple[int, int], ...]


class LanguageChild:
    """Use ``start``; then call until ``on_death`` is called or you ``close`` it."""

    account: Account

    @classmethod
    async def start(
        cls,
        card: LanguageCard,
        folder: Path,
        settings: EngineSettings,
        ring: RingMemory,
        on_death: Callable[[Death], None] = lambda death: None,
        curve: Sequence[tuple[int, int]] = (),
    ) -> LanguageChild:
        """A confined child with the model of ``card``, whose files lie in ``folder``, over ``ring``: all slots empty.

        ``curve`` (rows, µs) of an earlier child saves measuring it.  ``on_death`` is called once if the child ends later
        without being closed.  Raises ``RefusedError`` for a file at fault, ``ChildDiedError`` if loading kills the child or
        takes too long, ``UnavailableError`` if the world lacks something (a file, a runtime library, seccomp).
        """
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        raise NotImplementedError

    @property
    def pid(self) -> int:
        raise NotImplementedError

    async def encode(
        self, text: str | None = None, messages: Sequence[ChatMessage] = (), *, continuing: bool = False, limit: int
    ) -> tuple[int, ...]:
        """Token ids of raw ``text``, or of ``messages`` in the model's chat template with the answer's beginning asked for.

        ``continuing``: the messages follow an existing session.  Raises ``RefusedError`` for more than ``limit`` tokens.
        """
        raise NotImplementedError

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
        raise NotImplementedError

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
    ) -> None:
        """Begin a turn in an open slot. ``prompt``: the ids that are not in KV yet, at least 1 (a pending id counts).

        ``begun``: the beginning of the answer that was shown before (its ids are in KV or in ``prompt``); stop texts are
        looked for across it.  A draw depends on the seed and the token's position only, so a turn that goes on in another
        child goes on alike.  Raises ``RefusedError``; the slot stays as it was.
        """
        raise NotImplementedError

    async def step(self) -> StepReply:
        """One batched step of all live turns; an empty reply if there is none.

        Raises ``ChildDiedError``; ``UnavailableError`` if the step failed as a whole: every turn is then over, and the slots
        hold what was reported.
        """
        raise NotImplementedError

    async def cancel(self, slot: int) -> TurnEvent:
        """End the slot's turn; its KV stays. The event carries every unsealed row that no event has carried yet."""
        raise NotImplementedError

    async def close_slot(self, slot: int) -> None:
        """Forget the slot, and a turn in it, and give its memory back to the system."""
        raise NotImplementedError

    def kill(self, cause: str) -> None:
        """End the child now; whoever waits for it is told ``cause``, and so is ``on_death``."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the child. The ring memory is the caller's and stays. May be called twice."""
        raise NotImplementedError
