"""Boards that deceive the fleet: the production node, with another hand on what it sends or on its disk.

Owns what is made of a board's messages on their way out, and a disk that is put back.  Rules: whoever has a board's key signs
what he likes, and that is all he can do: what goes out here is signed by that board's own key; the node behind it is the honest
one.

``equivocates``: half of the boards are shown another quote under the same number, by a broker that is in league.
``forks_receipts``: all its answers to others carry receipts of one number.  ``denounces``: its appraisals contraindicate
everybody.  ``stale_quotes``: it is silent about itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_agent.attest.appraisal import Vector, open_appraisal, sign_appraisal
from edge_agent.attest.evidence import open_quote, quote_digest, sign_quote
from edge_agent.attest.receipts import Receipt, sign_receipt, unverified_receipt
from edge_agent.core import wire
from edge_agent.core.cose import Signer, decode_sign1, sign1
from edge_agent.core.values import TrustTier
from edge_agent.transport.link import MAX_PAYLOAD_BYTES, Message
from edge_agent.transport.topics import Kind, Topics

if TYPE_CHECKING:
    from edge_agent.sim.shell import BoardShell
    from edge_agent.sim.world import Network

Tongue = Callable[[Message], Message | None]
"""What becomes of a message on its way out; ``None``: it is kept back, and the node believes that it was sent."""
CONTRAINDICATED_CLAIM = 96


class Deceit:
    """One board's tongue: by topic. ``others``: the boards of the fleet besides it."""

    def __init__(self, signer: Signer, topics: Topics, network: Network, others: tuple[str, ...]) -> None:
        self._signer, self._topics, self._network = signer, topics, network
        self._misled = frozenset(sorted(others)[::2])
        self._other_line = b""
        """The last quote that the misled were shown."""
        self._forked: Receipt | None = None
        self.kinds: set[str] = set()

    def __call__(self, message: Message) -> Message | None:
        kind = self._topics.parse(message.topic).kind
        if kind is Kind.QUOTE and "stale_quotes" in self.kinds:
            return None
        if kind is Kind.QUOTE and "equivocates" in self.kinds:
            self._show_another(message)
        if kind is Kind.REPLY and "forks_receipts" in self.kinds:
            return self._with_forked_receipt(message)
        if kind is Kind.APPRAISAL and "denounces" in self.kinds:
            return self._denouncing(message)
        return message

    def _find_key(self, _kid: bytes) -> bytes:
        return self._signer.public_key

    def _show_another(self, message: Message) -> None:
        """A second line of quotes, each linked to the one before it as an honest one would be."""
        quote = open_quote(message.payload, self._find_key)
        previous = quote_digest(self._other_line) if self._other_line else quote.previous
        self._other_line = sign_quote(replace(quote, previous=previous, uptime_s=quote.uptime_s + 1), self._signer)
        self._network.show_another(message.payload, self._other_line, self._misled)

    def _with_forked_receipt(self, message: Message) -> Message:
        payload = decode_sign1(message.payload, MAX_PAYLOAD_BYTES).payload
        if wire.is_part(message.payload):
            return message
        addressee = self._topics.parse(message.topic).client
        result = wire.decode_result(payload, addressee)
        if not result.receipt:
            return message
        receipt = unverified_receipt(result.receipt)
        self._forked = self._forked or receipt
        forked = replace(receipt, counter=self._forked.counter, previous=self._forked.previous)
        forged = replace(result, receipt=sign_receipt(forked, self._signer))
        return replace(message, payload=sign1(wire.encode_result(forged, addressee), self._signer, wire.AAD_RESULT))

    def _denouncing(self, message: Message) -> Message:
        appraisal = open_appraisal(message.payload, self._find_key)
        vector = Vector(instance_identity=CONTRAINDICATED_CLAIM)
        lie = replace(appraisal, tier=TrustTier.CONTRAINDICATED, vector=vector, reasons=("it lies",))
        return replace(message, payload=sign_appraisal(lie, self._signer))


def back_up(board: BoardShell) -> None:
    """Its disk is copied while the plug is pulled."""
    board.kill()
    shutil.copytree(board.disk, board.disk.with_suffix(".backup"), dirs_exist_ok=True)
    board.boot()


def restart(board: BoardShell) -> None:
    board.kill()
    board.boot()


def restore(board: BoardShell) -> None:
    """Its disk is what it was when it was copied."""
    board.kill()
    shutil.rmtree(board.disk)
    shutil.copytree(board.disk.with_suffix(".backup"), board.disk)
    board.boot()
