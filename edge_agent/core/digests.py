"""What receipts say of a request and its answer: SHA-256 over canonical CBOR, the same on every board and at the client.

Rules: tensors go in by name, dtype, shape and the digest of their bytes, so that nothing large is copied; of a request what its
client wanted, not what placement made of it; of a turn of talk its text and how it ended, not what it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from edge_agent.core.cbor import encode
from edge_agent.core.chat import CHAT, TURN, TurnEnd
from edge_agent.core.values import InferenceRequest, Tensor


def request_digest(request: InferenceRequest) -> bytes:
    """Of everything that its client wanted but the inputs, which have a digest of their own: 32 bytes.

    The pinned model, the deadline and the length of the answer are left out: placement sets them.
    """
    limits = request.limits
    return _sha256(
        [
            bytes.fromhex(request.request_id), request.task, request.session, request.data.value, limits.quality_permille,
            limits.energy_uj, int(limits.trust), list(request.parents),
        ]
    )  # fmt: skip


def tensors_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Of tensors by name, whatever their order: 32 bytes."""
    named = sorted(tensors.items())
    return _sha256([[name, each.dtype, list(each.shape), sha256(each.data).digest()] for name, each in named])


def output_digest(task: str, outputs: Mapping[str, Tensor]) -> bytes:
    """Of an answer: 32 bytes. Raises ``RefusedError`` for the outputs of a turn that hold no end."""
    if task != CHAT or TURN not in outputs:
        return tensors_digest(outputs)
    end = TurnEnd.decode(outputs[TURN].data)
    return _sha256([end.text, end.finish.value])


def _sha256(value: object) -> bytes:
    return sha256(encode(value)).digest()
