"""A request that is not sent: what it would be, from the plain values of ``sly place --dry-run``.

Rules: it has no payload, only a payload's size; a value that could not be in a request is refused as it would be in one.
"""

from __future__ import annotations

from typing import Any

from edge_agent.core.chat import CHAT, TURN
from edge_agent.core.errors import RefusedError, shown
from edge_agent.core.values import MAX_TENSOR_BYTES, DataClass, InferenceRequest, Limits, Tensor, TrustTier, bounded

NOT_SENT = "0" * 32
"""The id of a request that has none."""
KINDS: dict[str, type] = {
    "task": str, "model": str, "size_bytes": int, "deadline_us": int, "quality_permille": int, "energy_uj": int, "trust": str,
    "data": str, "session": str, "answer_tokens": int,
}  # fmt: skip


def imagined(body: dict[Any, Any]) -> InferenceRequest:
    """The request that these values describe; all of ``KINDS`` must be there, an ``energy_uj`` of 0 is no ceiling.

    Raises ``RefusedError`` naming the value at fault.
    """
    if body.keys() != KINDS.keys() or any(type(body[name]) is not kind for name, kind in KINDS.items()):
        raise RefusedError("place", shown(body), ", ".join(f"{name} ({kind.__name__})" for name, kind in KINDS.items()))
    size_bytes = bounded("place size_bytes", body["size_bytes"], 0, MAX_TENSOR_BYTES, "bytes")
    payload = Tensor("uint8", (size_bytes,), bytes(size_bytes))
    limits = Limits(body["deadline_us"], body["energy_uj"] or None, body["quality_permille"], _tier(body["trust"]))
    return InferenceRequest(
        NOT_SENT, body["task"], {TURN if body["task"] == CHAT else "image": payload}, body["model"] or None, limits,
        body["session"], _data(body["data"]), body["answer_tokens"],
    )  # fmt: skip


def _tier(name: str) -> TrustTier:
    try:
        return TrustTier[name.upper()]
    except KeyError:
        raise RefusedError("place trust", shown(name), "none, warning or affirming") from None


def _data(name: str) -> DataClass:
    try:
        return DataClass(name)
    except ValueError:
        raise RefusedError("place data", shown(name), ", ".join(DataClass)) from None
