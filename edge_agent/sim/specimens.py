"""A message of each kind as a board of middling load says it, signed by the production voice: what sizes are computed from."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

from edge_agent.attest.appraisal import Appraisal, Vector
from edge_agent.attest.epoch import Challenge, EpochMark
from edge_agent.attest.evidence import NONCE_BYTES, Measurements, ModelMeasurement, Quote, sign_quote
from edge_agent.attest.quorum import NEIGHBOURS
from edge_agent.attest.receipts import Receipt, sign_receipt
from edge_agent.core.cose import Signer
from edge_agent.core.values import (
    DataClass,
    EnergyKind,
    InferenceRequest,
    InferenceResult,
    Limits,
    ModelOffer,
    ShapeCost,
    Status,
    Tensor,
    TrustTier,
)  # fmt: skip
from edge_agent.gossip.agreement import BoardDigest
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.record import BoardRecord
from edge_agent.node.settings import NodeSettings
from edge_agent.node.voice import Voice
from edge_agent.transport.link import Message
from edge_agent.transport.topics import Kind

BOARD, OTHER, FLEET = "board-1234", "board-5678", "cell-123"
DIGEST = sha256(b"a digest").digest()
REQUEST_ID = DIGEST[:16].hex()
HARDWARE = "Raspberry Pi 5 Model B Rev 1.0"
MODEL, TASK, LIBRARY = "ssd-mobilenet", "detect_objects", "ai-edge-litert 2.3.0"
OUTPUT_BYTES = 32
"""Of an answer's tensors: what simulated boards give."""
NOW_S = 1_790_000_000
LARGE = 200_000
"""A counter that has gone on for days."""


@lru_cache(maxsize=64)
def specimens(boards: int, request_bytes: int = 16_384, working: bool = True) -> dict[Kind, Message]:
    """One message of each kind that boards say of themselves and to each other, in a cell of so many boards."""
    signer = Signer(BOARD.encode(), bytes(32))
    voice = Voice(NodeSettings(board=BOARD, boot_epoch=12, signer=signer, fleet=FLEET))
    request = _request(request_bytes)
    neighbours = min(NEIGHBOURS, boards - 1)
    return {
        Kind.ONLINE: voice.presence(Standing.ONLINE),
        Kind.RECORD: voice.record(_record(request, working)),
        Kind.DIGEST: voice.digest(BoardDigest(BOARD, 12, LARGE, DIGEST, DIGEST, DIGEST, boards)),
        Kind.QUOTE: voice.quote(sign_quote(_quote(neighbours), signer)),
        Kind.EPOCH: voice.epoch(EpochMark(BOARD, 12, LARGE, DIGEST[:NONCE_BYTES])),
        Kind.CHALLENGE: voice.challenge(Challenge(BOARD, OTHER, DIGEST[:NONCE_BYTES])),
        Kind.APPRAISAL: voice.appraisal(_appraisal()),
        Kind.REQUEST: voice.dispatch(request, OTHER),
        Kind.REPLY: voice.reply(_result(signer), OTHER),
    }


def _request(size_bytes: int) -> InferenceRequest:
    picture = Tensor("uint8", (size_bytes,), bytes(size_bytes))
    return InferenceRequest(REQUEST_ID, TASK, {"image": picture}, limits=Limits(deadline_us=5_000_000), data=DataClass.PUBLIC)


def _record(request: InferenceRequest, working: bool) -> BoardRecord:
    """Of a board that hosts a model, or of one at which requests come in: about equally long."""
    costs = (ShapeCost(14, 31_000, 160_000, 512),) if working else ()
    offer = ModelOffer(MODEL, TASK, DIGEST, 600, 31_000, 160_000, shapes=costs, measured=512 if working else 0)
    return BoardRecord(
        board=BOARD, boot_epoch=12, sequence=LARGE, hardware=HARDWARE, offers=(offer,), temperature_mdegc=48_300,
        trip_mdegc=80_000, queue_us=31_000, forecast_mdegc=(48_400, 48_600, 48_800),
    )  # fmt: skip


def _quote(neighbours: int) -> Quote:
    measured = Measurements(DIGEST, DIGEST, LIBRARY, DIGEST, models=(ModelMeasurement(MODEL, DIGEST, DIGEST),))
    nonces = tuple(sha256(bytes([number])).digest()[:NONCE_BYTES] for number in range(neighbours))
    return Quote(
        BOARD, nonces, 12, DIGEST, LARGE, DIGEST, NOW_S, LARGE, HARDWARE, False, "0.1.0", measured, LARGE, DIGEST,
    )  # fmt: skip


def _appraisal() -> Appraisal:
    claims = Vector(*(2 for _ in Vector.__dataclass_fields__))
    return Appraisal(
        BOARD,
        12,
        LARGE,
        OTHER,
        TrustTier.WARNING,
        claims,
        reasons=("its key is a file",),
        evidence=DIGEST,
        bootcount=12,
        counter=LARGE,
        epoch=LARGE,
        issued_s=NOW_S,
    )


def _result(signer: Signer) -> InferenceResult:
    receipt = Receipt(
        BOARD, 12, LARGE, LARGE, DIGEST, REQUEST_ID, DIGEST, MODEL, DIGEST, DIGEST, DIGEST, (), NOW_S * 1_000_000, 31_000,
        160_000, EnergyKind.ESTIMATED,
    )  # fmt: skip
    outputs = {"boxes": Tensor("uint8", (OUTPUT_BYTES,), bytes(OUTPUT_BYTES))}
    return InferenceResult(
        REQUEST_ID, Status.OK, BOARD, MODEL, DIGEST, outputs, 31_000, 160_000, EnergyKind.ESTIMATED,
        receipt=sign_receipt(receipt, signer),
    )  # fmt: skip
