"""Whom this board trusts, now: the node's door to continuous attestation.

Owns the answers to "how far is this board trusted, and why", and what the node does with receipts and spot checks.  Rules:
without ``NodeSettings.attest`` the operator's word is all that is known, and nothing is signed or asked for; with it, that
word is a ceiling; ``agreed_tier`` is a function of what was published, so that all boards put the same into the table, and
``tier`` adds what this board knows itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_agent.attest.evidence import Measurements
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import InferenceRequest, InferenceResult, Status, TrustTier
from edge_agent.gossip.state import FleetState
from edge_agent.node.attestation import Attestation
from edge_agent.node.events import Effect, Endorsed, Log
from edge_agent.node.execution import Execution
from edge_agent.node.proofs import Proofs
from edge_agent.node.rechecks import PREFIX, Rechecks
from edge_agent.node.settings import NodeSettings
from edge_agent.node.voice import Voice
from edge_agent.store.ledger import Ledger
from edge_agent.transport.link import Message
from edge_agent.transport.topics import Kind, Topic

HEARD = frozenset({Kind.QUOTE, Kind.CHALLENGE, Kind.APPRAISAL, Kind.EPOCH, Kind.WORD})


class Trust:
    """``attestation``, ``rechecks``: ``None`` where boards do not attest."""

    def __init__(self, settings: NodeSettings, fleet: FleetState, ledger: Ledger, voice: Voice, execution: Execution) -> None:
        self._settings, self._board = settings, settings.board
        self._proofs: Proofs | None = None
        self.attestation: Attestation | None = None
        self.rechecks: Rechecks | None = None
        if settings.attest is not None:
            self._proofs = Proofs(settings, ledger)
            self.attestation = Attestation(settings, settings.attest, fleet, ledger, voice, self._proofs)
            self.rechecks = Rechecks(settings.board, settings.attest, execution)

    def recharter(self, now_us: int) -> None:
        """The settings have other members or references."""
        if self.attestation is not None:
            self.attestation.recharter(now_us)

    # how far boards are trusted

    def tier(self, board: str) -> TrustTier:
        """How far ``board`` is trusted with a request at this moment."""
        return self.attestation.tier(board) if self.attestation else self._settings.trust.get(board, TrustTier.NONE)

    def agreed_tier(self, board: str) -> TrustTier:
        """The same by what was published alone, for the table."""
        return self.attestation.agreed_tier(board) if self.attestation else self._settings.trust.get(board, TrustTier.NONE)

    def why(self, board: str) -> str:
        """What is held against ``board``, for a person; empty if nothing is."""
        return self.attestation.why(board) if self.attestation else ""

    @property
    def changes(self) -> int:
        """Moves whenever an agreed tier does."""
        return self.attestation.changes if self.attestation else 0

    def take_contraindicated(self) -> list[str]:
        """Boards that are contraindicated since this was last asked: what they have must go elsewhere."""
        return self.attestation.take_contraindicated() if self.attestation else []

    # evidence

    def topic_filters(self) -> Iterator[str]:
        yield from self.attestation.topic_filters() if self.attestation else ()

    def listens_to(self, kind: Kind) -> bool:
        return self.attestation is not None and kind in HEARD

    def hear(self, topic: Topic, message: Message, now_us: int) -> Iterator[Effect]:
        """A message of a kind that this ``listens_to``. Raises ``RefusedError`` for what is not to be believed."""
        if self.attestation is not None:
            yield from self.attestation.hear(topic, message, now_us)

    def measured(self, measurements: Measurements, now_us: int) -> None:
        """What runs on this board was measured."""
        if self.attestation is not None:
            self.attestation.measured(measurements, now_us)

    def endorsed(self, event: Endorsed, now_us: int) -> Iterator[Effect]:
        yield from self.attestation.endorsed(event, now_us) if self.attestation else ()

    def told_wall_us(self, wall_us: int, now_us: int) -> None:
        """The time of day, where the shell knows it."""
        if self._proofs is not None and wall_us:
            self._proofs.wall_offset_us = wall_us - now_us

    def connected(self) -> None:
        if self.attestation is not None:
            self.attestation.connected()

    def disconnected(self) -> None:
        if self.attestation is not None:
            self.attestation.disconnected()

    def repeat(self) -> None:
        """Something that was said was not sent."""
        if self.attestation is not None:
            self.attestation.repeat()

    def go_on(self, now_us: int) -> Iterator[Effect]:
        """What time and news have made due."""
        if self.attestation is not None and self.rechecks is not None:
            yield from self.attestation.go_on(now_us)
            self.rechecks.begin(now_us)

    def drain(self, now_us: int) -> None:
        """The board stops: no check begins, and what must outlive this boot is kept."""
        if self.attestation is not None and self.rechecks is not None:
            self.rechecks.stop()
            self.attestation.keep(now_us, everything=True)

    # receipts

    def proven(self, request: InferenceRequest, result: InferenceResult, began_us: int) -> InferenceResult:
        """What this board made of ``request``, with its receipt."""
        if self._proofs is None or self.attestation is None:
            return result
        return self._proofs.signed(request, result, self.attestation.attester.number, began_us)

    def why_unproven(self, board: str, request: InferenceRequest | None, result: InferenceResult) -> str:
        """Why an answer of another board is not taken, by its receipt; empty if it is. What the receipt shows is heard."""
        if self._proofs is None or self.attestation is None or board == self._board or result.status is not Status.OK:
            return ""
        try:
            receipt = self._proofs.opened(result)
        except RefusedError as error:
            return str(error)
        if request is None or receipt.board != board:
            return f"its receipt is one of {receipt.board}"
        return self.attestation.hear_receipt(result.receipt, receipt) or self._proofs.why_unproven(receipt, request, result)

    # spot checks

    def taken(self, board: str, request: InferenceRequest | None, result: InferenceResult) -> None:
        """An answer of ``board`` was taken: perhaps it is one of the sample."""
        if self.attestation is None or self.rechecks is None or request is None:
            return
        if board in self.attestation.verifier.boards:
            self.rechecks.consider(board, request, result)

    def is_check(self, key: str) -> bool:
        """Is a job of this key a second run, which nobody waits for?"""
        return key.startswith(PREFIX)

    def checked(self, key: str, again: InferenceResult | None) -> Iterator[Effect]:
        """A second run has ended; ``None``: it never began."""
        if self.attestation is None or self.rechecks is None:
            return
        board = self.rechecks.board_of(key)
        if again is None:
            self.rechecks.forget(key)
            return
        for each in self.rechecks.finish(key, again, like_engines=self.attestation.is_like(board)):
            if each.difference is None:
                self.attestation.checked(board)
                continue
            yield Log(f"spot check of request {each.request_id}: {board} is wrong, {each.difference.what}")
            self.attestation.struck(board, each.difference.exact, f"request {each.request_id}, {each.difference.what}")
