"""Receipts at work: each answer that was made here gets one, and none of another board is taken without.

Owns where receipts are signed and looked at; what is in them is ``attest.receipts``.  Rules: a receipt becomes durable in the
very transaction of its answer; what a cloud said, or what failed, has none, as nothing of the fleet ran; a receipt that does
not fit is no proof of anything, and so neither is the answer.
"""

from __future__ import annotations

from dataclasses import replace

from edge_agent.attest.receipts import Chain, Receipt, open_receipt, why_not
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import InferenceRequest, InferenceResult, Status, failure
from edge_agent.node.settings import NodeSettings
from edge_agent.store.ledger import Ledger


class Proofs:
    """``wall_offset_us``: what this board's monotonic clock lacks to the time of day; ``None`` while nobody has told it."""

    def __init__(self, settings: NodeSettings, ledger: Ledger) -> None:
        self.chain = Chain(ledger, settings.board, settings.boot_epoch, settings.signer)
        self._board, self._settings = settings.board, settings
        self.wall_offset_us: int | None = None

    def signed(self, request: InferenceRequest, result: InferenceResult, quote: int, began_us: int) -> InferenceResult:
        """An answer of this board's with its receipt; ``quote`` is the number of the last quote.

        What no receipt can be made for is a failure that says so.
        """
        if result.status is not Status.OK:
            return result
        try:
            receipt = self.chain.append(request, result, quote, self.wall_us(began_us))
        except RefusedError as error:
            return failure(result.request_id, Status.FAILED, result.board, f"no receipt can be signed: {error}", result.model)
        return replace(result, receipt=receipt)

    def wall_us(self, now_us: int) -> int:
        """µs since 1970 at a moment of the monotonic clock, as this board takes it; 0 if it does not know."""
        return max(0, now_us + self.wall_offset_us) if self.wall_offset_us is not None else 0

    def opened(self, result: InferenceResult) -> Receipt:
        """The receipt of another board's answer. Raises ``RefusedError`` if there is none, or nobody of the fleet signed it."""
        if not result.receipt:
            raise RefusedError("answer", "no receipt", "a receipt for each answer, where boards attest")
        return open_receipt(result.receipt, self._key_of)

    def why_unproven(self, receipt: Receipt, request: InferenceRequest, result: InferenceResult) -> str:
        """Why a receipt does not prove the answer to ``request``, as it was given to that board; empty if it does."""
        return why_not(receipt, request, result)

    def _key_of(self, kid: bytes) -> bytes | None:
        return self._settings.members.get(kid.decode("utf-8", "replace"))
