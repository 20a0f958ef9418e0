"""Proof of what ran: a signed receipt for each answer, in one chain a board, with the receipts that its inputs came from.

Owns ``Receipt``, its bytes, its signature and the chain.  Rules: a board's receipts are numbered from 1 over all its boots, each
naming the one before, so that none can be left out, put in or counted anew unseen; ``quote`` is the last quote that the board had
signed, so that a receipt and a quote of one boot can be put in order; only the board itself can sign its receipts.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.attest.evidence import MAX_COUNT
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import (
    BOARD_ID,
    DIGEST_BYTES,
    MAX_PARENTS,
    MODEL_NAME,
    REQUEST_ID,
    EnergyKind,
    bounded,
    checked,
)

AAD = b"sly/1/receipt"


@dataclass(frozen=True, slots=True)
class Receipt:
    """``bootcount``, ``quote``: the boot epoch and the counter of the last quote of that boot, 0 before the first.

    ``counter``: 1, 2, ... over all boots; ``previous``: SHA-256 of the signed receipt before, ``NO_DIGEST`` for the first.
    ``request``, ``inputs``, ``outputs``: as ``core.digests`` has them; ``parents``: SHA-256 of signed receipts.
    ``started_us``: µs since 1970 as the board takes it; ``busy_us``, ``energy_uj``: as in the result.
    """

    board: str
    bootcount: int
    quote: int
    counter: int
    previous: bytes
    request_id: str
    request: bytes
    model: str
    model_digest: bytes
    inputs: bytes
    outputs: bytes
    parents: tuple[bytes, ...]
    started_us: int
    busy_us: int
    energy_uj: int
    energy_kind: EnergyKind

    def __post_init__(self) -> None:
        checked(BOARD_ID, "receipt board", self.board)
        checked(REQUEST_ID, "receipt request id", self.request_id)
        checked(MODEL_NAME, "receipt model", self.model)
        for name in ("previous", "request", "model_digest", "inputs", "outputs"):
            bounded(f"receipt {name}, length", len(getattr(self, name)), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        for name in ("bootcount", "quote", "counter", "busy_us", "energy_uj"):
            bounded(f"receipt {name}", getattr(self, name), 0, MAX_COUNT)
        bounded("receipt started_us", self.started_us, 0, 2**63 - 1, "µs")
        if len(self.parents) > MAX_PARENTS or any(len(each) != DIGEST_BYTES for each in self.parents):
            raise RefusedError("receipt parents", f"{len(self.parents)}", f"at most {MAX_PARENTS} of {DIGEST_BYTES} bytes")
