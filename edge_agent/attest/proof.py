"""The proof file: receipts with the quotes and appraisals around them, for who was not there (``attest.audit`` judges it).

Owns ``Proof``, ``Asked`` and their one encoding.  Rules: what boards said is in it as they signed it, byte for byte; each thing
once and in one order, so that a proof has one encoding; what its writer asked for is in it too, unsigned, for the reader to
compare; everything is bounded, and reading a file judges nothing of what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from edge_agent.attest.appraisal import MAX_APPRAISAL_BYTES
from edge_agent.attest.evidence import MAX_COUNT, MAX_QUOTE_BYTES
from edge_agent.attest.receipts import receipt_digest
from edge_agent.core.cbor import decode, encode, fields, list_of
from edge_agent.core.digests import output_digest, request_digest, tensors_digest
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import (
    BOARD_ID,
    DIGEST_BYTES,
    MAX_BOARDS,
    MAX_RECEIPT_BYTES,
    REQUEST_ID,
    InferenceRequest,
    InferenceResult,
    bounded,
    checked,
)
from edge_agent.core.wire import LOCAL, REQUEST_ID_BYTES, decode_request, decode_result, encode_request, encode_result
from edge_agent.store.files import Disk, write_atomically

FORM = "sly/1/proof"
"""How a proof file begins; a later form has another number."""
MAX_PROOF_BYTES = 64 * 2**20
MAX_RECEIPTS = 4096
MAX_EVIDENCE = 1024
"""Quotes, and appraisals, of each."""
MAX_ASKED = 1024
MAX_PROOF_ITEMS = 65_536

_PROOF = {1: ("form", str), 2: ("receipts", list)}
_PROOF_OPTIONAL = {3: ("quotes", list), 4: ("appraisals", list), 5: ("asked", list), 6: ("spans", list)}
_ASKED = {1: ("request_id", bytes), 2: ("request", bytes), 3: ("inputs", bytes), 4: ("outputs", bytes), 5: ("receipt", bytes)}
_ASKED_OPTIONAL = {6: ("asked_for", bytes), 7: ("answer", bytes)}


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody asked for and got, by its digests as in ``core.digests``, and the SHA-256 of the receipt that came with it.

    ``asked_for`` and ``answer``: the request and its result themselves, where they shall go with it.
    """

    request_id: str
    request: bytes
    inputs: bytes
    outputs: bytes
    receipt: bytes
    asked_for: InferenceRequest | None = None
    answer: InferenceResult | None = None

    def __post_init__(self) -> None:
        checked(REQUEST_ID, "asked request id", self.request_id)
        for name in ("request", "inputs", "outputs", "receipt"):
            bounded(f"asked {name}, length", len(getattr(self, name)), DIGEST_BYTES, DIGEST_BYTES, "bytes")
        if self.answer is not None and self.asked_for is None:
            raise RefusedError("asked", "an answer without what was asked", "the request beside it")

    @classmethod
    def of(cls, request: InferenceRequest, result: InferenceResult, *, whole: bool = False) -> Asked:
        """``whole``: with the request and its answer themselves.

        Raises ``RefusedError`` for an answer without a receipt, and for the outputs of a turn that hold no end.
        """
        if not result.receipt:
            raise RefusedError(f"answer to {request.request_id}", "no receipt", "an answer of a board that attests")
        digests = (
            request.request_id, request_digest(request), tensors_digest(request.inputs),
            output_digest(request.task, result.outputs), receipt_digest(result.receipt),
        )  # fmt: skip
        return cls(*digests, request, result) if whole else cls(*digests)

    def to_map(self) -> dict[int, object]:
        known: dict[int, object] = {
            1: bytes.fromhex(self.request_id), 2: self.request, 3: self.inputs, 4: self.outputs, 5: self.receipt,
        }  # fmt: skip
        if self.asked_for is not None:
            known[6] = encode_request(self.asked_for, LOCAL)
        if self.answer is not None:
            known[7] = encode_result(self.answer, LOCAL)
        return known

    @classmethod
    def from_map(cls, value: object) -> Asked:
        """Raises ``RefusedError`` naming the field."""
        entry = fields(value, "asked", _ASKED, _ASKED_OPTIONAL)
        bounded("asked request id, length", len(entry["request_id"]), REQUEST_ID_BYTES, REQUEST_ID_BYTES, "bytes")
        entry["request_id"] = entry["request_id"].hex()
        if "asked_for" in entry:
            entry["asked_for"] = decode_request(entry["asked_for"], LOCAL)
        if "answer" in entry:
            entry["answer"] = decode_result(entry["answer"], LOCAL)
        return cls(**entry)


@dataclass(frozen=True, slots=True)
class Proof:
    """``receipts``, ``quotes``, ``appraisals``: as signed, each once, ascending bytewise; ``asked``: by request id.

    ``spans``: of a board's chain the counters of the first and the last receipt that this file shows without a gap.
    """

    receipts: tuple[bytes, ...]
    quotes: tuple[bytes, ...] = ()
    appraisals: tuple[bytes, ...] = ()
    asked: tuple[Asked, ...] = ()
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ascending("receipts", self.receipts, MAX_RECEIPTS, MAX_RECEIPT_BYTES)
        _ascending("quotes", self.quotes, MAX_EVIDENCE, MAX_QUOTE_BYTES)
        _ascending("appraisals", self.appraisals, MAX_EVIDENCE, MAX_APPRAISAL_BYTES)
        _ascending("asked", [each.request_id.encode() for each in self.asked], MAX_ASKED)
        bounded("proof spans", len(self.spans), 0, MAX_BOARDS)
        for board, (first, last) in self.spans.items():
            checked(BOARD_ID, "span's board", board)
            bounded(f"span of {board}, last", last, bounded(f"span of {board}, first", first, 1, MAX_COUNT), MAX_COUNT)
        if not self.receipts:
            raise RefusedError("proof receipts", "none", f"1 to {MAX_RECEIPTS}")


def gathered(
    receipts: Iterable[bytes],
    quotes: Iterable[bytes] = (),
    appraisals: Iterable[bytes] = (),
    asked: Iterable[Asked] = (),
    spans: Mapping[str, tuple[int, int]] | None = None,
) -> Proof:
    """The proof that holds all of these, in whatever order they come and however often."""
    by_id = {each.request_id: each for each in asked}
    in_order = [tuple(sorted(set(signed))) for signed in (receipts, quotes, appraisals)]
    return Proof(in_order[0], in_order[1], in_order[2], tuple(by_id[each] for each in sorted(by_id)), spans or {})


def encode_proof(proof: Proof) -> bytes:
    """Raises ``RefusedError`` for one over ``MAX_PROOF_BYTES``."""
    known = {
        2: list(proof.receipts), 3: list(proof.quotes), 4: list(proof.appraisals),
        5: [each.to_map() for each in proof.asked], 6: [[board, *span] for board, span in sorted(proof.spans.items())],
    }  # fmt: skip
    data = encode({1: FORM, **{key: value for key, value in known.items() if value}})
    if len(data) > MAX_PROOF_BYTES:
        raise RefusedError("proof", f"{len(data)} bytes", f"at most {MAX_PROOF_BYTES} bytes", "leave out what was asked")
    return data


def decode_proof(data: bytes) -> Proof:
    """Inverse of ``encode_proof``. Raises ``RefusedError`` for anything else; believes nothing of what is in it."""
    value = decode(data, MAX_PROOF_BYTES, max_items=MAX_PROOF_ITEMS, subject="proof")
    if isinstance(value, dict) and value.get(1, FORM) != FORM:
        raise RefusedError("proof form", value[1], FORM, "a newer sly may read it")
    entry = fields(value, "proof", _PROOF, _PROOF_OPTIONAL)
    for name in ("quotes", "appraisals", "asked", "spans"):
        if name in entry and not entry[name]:
            raise RefusedError(f"proof {name}", "an empty one", "nothing, where there is none")
    spans = list(map(_span_in, list_of(entry.get("spans", []), "proof spans", list, MAX_BOARDS)))
    _ascending("spans", [board.encode() for board, _ in spans], MAX_BOARDS)
    return Proof(
        tuple(list_of(entry["receipts"], "proof receipts", bytes, MAX_RECEIPTS)),
        tuple(list_of(entry.get("quotes", []), "proof quotes", bytes, MAX_EVIDENCE)),
        tuple(list_of(entry.get("appraisals", []), "proof appraisals", bytes, MAX_EVIDENCE)),
        tuple(map(Asked.from_map, list_of(entry.get("asked", []), "proof asked", dict, MAX_ASKED))),
        dict(spans),
    )


def write_proof(path: Path, proof: Proof) -> None:
    """Put a proof into the file ``path``, in place of what was there, in whole or not at all.

    Raises ``UnavailableError`` when the disk is full, failing or read-only.
    """
    write_atomically(Disk(), path, encode_proof(proof))


def read_proof(path: Path) -> Proof:
    """The proof in a file. Raises ``RefusedError`` if it cannot be read or is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROOF_BYTES + 1)
    except OSError as error:
        raise RefusedError(f"proof {path}", error.strerror or str(error), "a readable file") from error
    try:
        return decode_proof(data)
    except RefusedError as error:
        raise RefusedError(f"proof {path}: {error}") from error


def _ascending(what: str, signed: Iterable[bytes], max_count: int, max_bytes: int = REQUEST_ID_BYTES * 2) -> None:
    each_bytes = list(signed)
    if len(each_bytes) > max_count or any(len(each) > max_bytes for each in each_bytes):
        raise RefusedError(f"proof {what}", f"{len(each_bytes)}", f"at most {max_count} of {max_bytes} bytes")
    if any(one >= other for one, other in pairwise(each_bytes)):
        raise RefusedError(f"proof {what}", "one twice, or out of order", "each once, ascending")


def _span_in(span: list[object]) -> tuple[str, tuple[int, int]]:
    match span:
        case [str(board), int(first), int(last)]:
            return board, (first, last)
    raise RefusedError("proof span", span, "[board, first, last]")
