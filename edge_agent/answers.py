"""What a picture task's result says: labels, scores, boxes and points in pixels, and who found them at what cost.

Rules: no NumPy; a result is held against its model's card and its own shapes before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import DTYPE_BYTES, EnergyKind, InferenceResult, Status, Tensor


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing in a picture. ``box`` is (left, top, right, bottom), ``points`` are (x, y), in pixels of the upright picture;
    both are empty for a class."""

    label: str
    score: float
    box: tuple[float, ...] = ()
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found, and who found it at what cost."""

    findings: tuple[Finding, ...]
    request_id: str
    board: str
    model: str
    busy_us: int
    energy_uj: int
    energy_kind: EnergyKind
    receipt: bytes = b""
    """What the board that ran it signed of that; ``sly verify`` reads it."""


def answer_of(result: InferenceResult) -> Answer:
    """The findings in a result. Raises ``RefusedError`` or ``UnavailableError`` with its reason if it is not OK."""
    if result.status is Status.REFUSED:
        raise RefusedError(result.reason)
    if result.status is not Status.OK:
        raise UnavailableError(f"request {result.request_id} was {result.status.value} by {result.board}", result.reason)
    return Answer(
        tuple(findings_of(result)),
        result.request_id,
        result.board,
        result.model,
        result.busy_us,
        result.energy_uj,
        result.energy_kind,
        result.receipt,
    )


def findings_of(result: InferenceResult) -> list[Finding]:
    """The labels, scores and boxes of a picture task's outputs, best first."""
    from models.catalog import card

    names = card(result.model).labels
    labels, scores = _numbers(result, "labels", "int32"), _numbers(result, "scores", "float32")
    boxes = _numbers(result, "boxes", "float32") if "boxes" in result.outputs else []
    points = _points(result, len(labels))
    if any(not 0 <= label < len(names) for label in labels) or len(labels) != len(scores):
        raise RefusedError(f"answer of {result.board}", labels, f"labels of the card of {result.model}, one a score")
    return [
        Finding(names[int(label)], score, tuple(boxes[4 * i : 4 * i + 4]), points[i])
        for i, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]


def _points(result: InferenceResult, findings: int) -> list[tuple[tuple[float, float], ...]]:
    """For each finding the points of its own, if the task finds any."""
    if "points" not in result.outputs:
        return [()] * findings
    numbers, shape = _numbers(result, "points", "float32"), result.outputs["points"].shape
    if len(shape) != 3 or shape[0] != findings or shape[2] != 2:
        raise RefusedError(f"answer of {result.board}", f"points {list(shape)}", f"[{findings}, points, 2]")
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    return [tuple(pairs[i * shape[1] : (i + 1) * shape[1]]) for i in range(findings)]


def _numbers(result: InferenceResult, name: str, dtype: str) -> Sequence[float]:
    tensor = result.outputs.get(name, Tensor(dtype, (0,), b""))
    if tensor.dtype != dtype:
        raise RefusedError(f"output {name} of {result.model}", str(tensor), dtype)
    form = {"int32": "i", "float32": "f"}[dtype]
    return struct.unpack(f"<{tensor.size_bytes // DTYPE_BYTES[dtype]}{form}", tensor.data)
