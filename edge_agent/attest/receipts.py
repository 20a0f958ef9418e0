"""Proof of what ran: a signed receipt for each answer, in one chain a board, with the receipts that its inputs came from.

Owns ``Receipt``, its bytes, its signature and the chain.  Rules: a board's receipts are numbered from 1 over all its boots, each
naming the one before, so that none can be left out, put in or counted anew unseen; ``quote`` is the last quote whose content was
fixed by then, so that a receipt and a quote can be put in order; only the board itself can sign its receipts, and a receipt has
one encoding.  The chain is what the ledger holds, nothing besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from edge_agent.attest.evidence import MAX_COUNT, NO_DIGEST
from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.cose import Signer, decode_sign1, sign1, verify1
from edge_agent.core.digests import output_digest, request_digest, tensors_digest
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import (
    BOARD_ID,
    DIGEST_BYTES,
    MAX_PARENTS,
    MAX_RECEIPT_BYTES,
    MODEL_NAME,
    REQUEST_ID,
    EnergyKind,
    InferenceRequest,
    InferenceResult,
    bounded,
    checked,
)
from edge_agent.store.ledger import Ledger

AAD = b"sly/1/receipt"
REQUEST_ID_BYTES = 16
MAX_ANY_TIME_US = 2**63 - 1

_RECEIPT = {
    1: ("board", str), 2: ("bootcount", int), 3: ("quote", int), 4: ("counter", int), 5: ("previous", bytes),
    6: ("request_id", bytes), 7: ("request", bytes), 8: ("model", str), 9: ("model_digest", bytes), 10: ("inputs", bytes),
    11: ("outputs", bytes), 13: ("started_us", int), 14: ("busy_us", int), 15: ("energy_uj", int), 16: ("energy_kind", str),
}  # fmt: skip
_RECEIPT_OPTIONAL = {12: ("parents", list)}


@dataclass(frozen=True, slots=True)
class Receipt:
    """``bootcount``, ``quote``: the boot epoch, and the counter of the last quote of that boot whose content was fixed, 0 before
    the first; every later quote counts this receipt.

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
        for name in ("bootcount", "quote", "busy_us", "energy_uj"):
            bounded(f"receipt {name}", getattr(self, name), 0, MAX_COUNT)
        bounded("receipt counter", self.counter, 1, MAX_COUNT)
        bounded("receipt started_us", self.started_us, 0, MAX_ANY_TIME_US, "µs")
        if (self.counter == 1) != (self.previous == NO_DIGEST):
            raise RefusedError(f"receipt {self.counter}, previous", self.previous.hex(), "zeros for the first, and for it alone")
        if len(self.parents) > MAX_PARENTS or any(len(each) != DIGEST_BYTES for each in self.parents):
            raise RefusedError("receipt parents", f"{len(self.parents)}", f"at most {MAX_PARENTS} of {DIGEST_BYTES} bytes")

    def to_map(self) -> dict[int, object]:
        known = {key: getattr(self, name) for key, (name, _) in _RECEIPT.items()}
        known |= {6: bytes.fromhex(self.request_id), 16: self.energy_kind.value}
        return known | ({12: list(self.parents)} if self.parents else {})

    @classmethod
    def from_map(cls, value: object) -> Receipt:
        """The receipt in a decoded map. Raises ``RefusedError`` naming the field."""
        entry = fields(value, "receipt", _RECEIPT, _RECEIPT_OPTIONAL)
        if entry.get("parents") == []:
            raise RefusedError("receipt parents", "an empty list", "nothing, where there is none")
        bounded("receipt request id, length", len(entry["request_id"]), REQUEST_ID_BYTES, REQUEST_ID_BYTES, "bytes")
        if entry["energy_kind"] not in list(EnergyKind):
            raise RefusedError("receipt energy_kind", entry["energy_kind"], ", ".join(EnergyKind))
        entry["request_id"], entry["energy_kind"] = entry["request_id"].hex(), EnergyKind(entry["energy_kind"])
        entry["parents"] = tuple(list_of(entry.get("parents", []), "receipt parents", bytes, MAX_PARENTS))
        return cls(**entry)


def sign_receipt(receipt: Receipt, signer: Signer) -> bytes:
    return sign1(encode(receipt.to_map()), signer, AAD)


def open_receipt(message: bytes, find_key: Callable[[bytes], bytes | None]) -> Receipt:
    """The receipt in a signed message. Raises ``RefusedError`` unless it is well-formed and signed by its own board."""
    signed = verify1(message, find_key, AAD, max_bytes=MAX_RECEIPT_BYTES)
    receipt = _receipt_in(signed.payload)
    if signed.kid != receipt.board.encode():
        raise RefusedError("receipt", f"board {receipt.board!r} signed by {signed.kid!r}", "a board's own signature")
    return receipt


def unverified_receipt(message: bytes) -> Receipt:
    """What a signed message says, whoever signed it: for our own, and for what is shown of one that is refused.

    Raises ``RefusedError`` for what is no receipt.
    """
    return _receipt_in(decode_sign1(message, MAX_RECEIPT_BYTES).payload)


def receipt_digest(message: bytes) -> bytes:
    """By what others name a signed receipt: SHA-256 of all its bytes."""
    return sha256(message).digest()


def why_not(receipt: Receipt, request: InferenceRequest, result: InferenceResult) -> str:
    """Why a receipt is no proof of ``result``; empty if it is.

    ``request`` is as it was given to that board: a turn of talk that it took up from another has inputs of its own.  Token counts
    that were added to the end of a turn since do not matter.
    """
    try:
        outputs = output_digest(request.task, result.outputs)
    except RefusedError as error:
        return str(error)
    said_and_done: list[tuple[str, object, object]] = [
        ("board", receipt.board, result.board),
        ("request id", receipt.request_id, request.request_id),
        ("request id of the answer", receipt.request_id, result.request_id),
        ("request", receipt.request, request_digest(request)),
        ("model", receipt.model, result.model),
        ("model digest", receipt.model_digest, result.model_digest),
        ("inputs", receipt.inputs, tensors_digest(request.inputs)),
        ("outputs", receipt.outputs, outputs),
        ("parents", receipt.parents, request.parents),
        ("busy time", receipt.busy_us, result.busy_us),
        ("energy", (receipt.energy_uj, receipt.energy_kind), (result.energy_uj, result.energy_kind)),
    ]
    wrong = [what for what, said, done in said_and_done if said != done]
    return f"its receipt is of another {' and another '.join(wrong)}" if wrong else ""


class Chain:
    """The receipts that this board signed, in the ledger; as many of the last as its bounds say are kept.

    Everything is read from and put into the ledger: inside a transaction of the caller it becomes durable with the rest, and what
    is rolled back was never there.
    """

    def __init__(self, ledger: Ledger, board: str, bootcount: int, signer: Signer) -> None:
        self._kept, self._board, self._bootcount, self._signer = ledger.receipts, board, bootcount, signer

    @property
    def count(self) -> int:
        """How many receipts this board has signed, ever."""
        return self._kept.newest

    @property
    def head(self) -> bytes:
        """SHA-256 of the last signed receipt, ``NO_DIGEST`` before the first."""
        return self._digest_of(self._kept.newest)

    @property
    def dropped(self) -> int:
        """How many of them are kept no more, the first ones."""
        return max(0, self._kept.oldest - 1)

    @property
    def anchor(self) -> bytes:
        """What the oldest receipt that is kept follows: SHA-256 of the last that was dropped, ``NO_DIGEST`` if none was."""
        oldest = self._kept.after(0, 1)
        return unverified_receipt(oldest[0][1]).previous if oldest else NO_DIGEST

    def append(self, request: InferenceRequest, result: InferenceResult, quote: int, started_us: int) -> bytes:
        """The signed receipt for ``result``, which this board gave to ``request`` as it had it, now the last of the chain.

        Raises ``RefusedError`` for an answer without a model, or outputs of a turn that hold no end, and as the ledger does.
        """
        counter, previous = self._kept.newest + 1, self.head
        receipt = Receipt(
            board=self._board,
            bootcount=self._bootcount,
            quote=quote,
            counter=counter,
            previous=previous,
            request_id=request.request_id,
            request=request_digest(request),
            model=result.model,
            model_digest=result.model_digest,
            inputs=tensors_digest(request.inputs),
            outputs=output_digest(request.task, result.outputs),
            parents=request.parents,
            started_us=started_us,
            busy_us=result.busy_us,
            energy_uj=result.energy_uj,
            energy_kind=result.energy_kind,
        )
        message = sign_receipt(receipt, self._signer)
        self._kept.append(counter, message)
        return message

    def recent(self, count: int) -> list[bytes]:
        """At most the last ``count`` that are kept, as signed, oldest first."""
        return [message for _, message in self._kept.after(max(0, self.count - count), max(1, count))] if count > 0 else []

    def after(self, counter: int, limit: int = 256) -> list[bytes]:
        """At most ``limit`` of those behind ``counter`` that are kept, as signed, oldest first."""
        return [message for _, message in self._kept.after(counter, limit)]

    def _digest_of(self, counter: int) -> bytes:
        message = self._kept.get(counter)
        return receipt_digest(message) if message else NO_DIGEST


def _receipt_in(payload: bytes) -> Receipt:
    return Receipt.from_map(decode(payload, MAX_RECEIPT_BYTES, subject="receipt"))
