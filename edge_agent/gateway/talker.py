"""Who answers turns of talk: the contract between the doors (HTTP, local socket) and the agent behind them.

Owns the Protocol, the figures for ``/metrics``, and the subjects by which a door tells one refusal from another.  Rules: an
error's text is what travels between processes and boards, and it begins with its subject, so a door looks at the subject
alone; a turn whose iterator is closed, or whose awaiting task is cancelled, is over and holds nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from edge_agent.core.chat import Turn, TurnEnd, TurnPart
from edge_agent.core.values import DataClass, Limits

UNKNOWN_MODEL = "chat model"
"""Subject of a ``RefusedError``: no board hosts this language model (HTTP 404, ``model_not_found``)."""
CONTEXT_LENGTH = "context length"
"""Subject of a ``RefusedError``: the prompt and ``max_tokens`` do not fit the model (HTTP 400, ``context_length_exceeded``)."""
SESSION_BUSY = "session in use"
"""Subject of a ``RefusedError``: another turn of this named session runs (HTTP 409, ``session_busy``)."""
KV_ROOM = "KV room"
"""Subject of an ``UnavailableError``: no room for the turn's KV now, with the bytes in its text (HTTP 503, ``overloaded``)."""
DRAINING = "draining"
"""Subject of an ``UnavailableError``: the agent is stopping and takes nothing new (HTTP 503, ``draining``)."""

Parts = AsyncGenerator[TurnPart | TurnEnd, None]
"""``TurnPart`` as they are made, then one ``TurnEnd``, then no more."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One sample for ``/metrics``. ``name`` without prefix and with its unit: ``kv_bytes``; a counter ends in ``_total``."""

    name: str
    about: str
    value: float
    kind: Literal["counter", "gauge"] = "gauge"
    labels: tuple[tuple[str, str], ...] = ()
    """From a set that is bounded by the configuration: a model, a tier; never a session or a text of a client."""


class Talker(Protocol):
    """The agent, as a door sees it."""

    def models(self) -> Sequence[str]:
        """The language models that can be asked for here, by name; the first is the default."""
        ...

    def talk(self, turn: Turn, model: str | None, *, data: DataClass = DataClass.PRIVATE, limits: Limits | None = None) -> Parts:
        """Serve one turn within ``limits``; ``model`` ``None`` is the default; ``data`` says how far the turn may travel.

        Raises ``SlyError`` from the first or a later step of the iterator; nothing follows it.  Closing the iterator ends the
        turn and frees what it held; the text that came out stays in its session.
        """
        ...

    async def ready(self) -> str:
        """Why no turn could be served now, tested on the real way of work; empty when one could."""
        ...

    def figures(self) -> Iterable[Figure]:
        """What the agent counts. Called at each scrape; must not block."""
        ...
