"""Updates over the air as the agent has them: its board, its host and its node around ``ota.updater``.

Owns what of the agent the updates may touch: offers come and go, the fleet's charter is adopted, the agent starts anew.  Rules:
without ``[ota] root`` there are none; a charter that does not fit this board is refused and said.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from board_support.board import Board
from edge_agent.configured import chartered, signing_keys
from edge_agent.core.clock import Clock
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import ModelOffer
from edge_agent.hosting import Host
from edge_agent.node.events import Chartered, Event, Hosted, Withdrawn
from edge_agent.node.settings import NodeSettings
from edge_agent.store.blobs import BlobStore
from edge_agent.store.ledger import Ledger
from ota.agent_slots import AgentSlots, launched_from
from ota.charter import Charter
from ota.lifecycle import Here
from ota.updater import Updater

DISTRIBUTION = "slyos-edge"


def _runtime(config: AgentConfig) -> str:
    """The library that runs language models here; empty where there is none, and no model to be run."""
    from edge_agent.language.service import runtime_of

    try:
        return runtime_of(config.engine.runtime)
    except UnavailableError:
        return ""


class Updating:
    """``base``: the node's settings as configured; ``feed`` takes the node's events; ``start_anew`` ends this agent."""

    def __init__(
        self, config: AgentConfig, base: NodeSettings, feed: Callable[[Event], None], say: Callable[[str], None],
        start_anew: Callable[[str], None], ruled: Callable[[], None], library: str = "",
    ) -> None:  # fmt: skip
        self._config, self._base, self._feed, self.say = config, base, feed, say
        self._start_anew, self._ruled, self._library = start_anew, ruled, library

    def open(self, board: Board, ledger: Ledger, blobs: BlobStore, host: Host, clock: Clock) -> Updater:
        """Raises ``SlyError`` for a root that cannot be read."""
        config, ota, slots = self._config, self._config.ota, launched_from()
        here = Here(
            config.board.id, board.backend, version(DISTRIBUTION), _runtime(config), ota.trial_inferences,
            ota.trial_s * 1_000_000, ota.confirm_s * 1_000_000,
        )  # fmt: skip
        return Updater(
            ota, here, config.fleet.name, self._base.boot_epoch, self._base.signer, Path(config.state.folder) / "ota", ledger,
            blobs, host, self, clock, members=self._base.members,
            operators=signing_keys("[fleet.operators]", config.fleet.operators), agent=AgentSlots(slots) if slots else None,
        )  # fmt: skip

    # ota.updater.Door

    def hosted(self, offer: ModelOffer) -> None:
        self._feed(Hosted(offer))

    def withdrawn(self, model: str, why: str) -> None:
        self._feed(Withdrawn(model, why))

    def adopt(self, charter: Charter) -> None:
        try:
            self._feed(Chartered(chartered(self._base, self._config, charter)))
            self._ruled()
        except RefusedError as error:
            self.say(f"the charter is not adopted: {error}")

    def start_anew(self, why: str) -> None:
        self._start_anew(why)

    def library(self) -> str:
        return self._library
