"""A result drawn on its picture: the one place where a client's side needs NumPy and Pillow. Import it late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import InferenceResult
from models.annotate import annotate
from models.catalog import card


def draw(path: Path, picture: bytes, result: InferenceResult, captions: Sequence[str] = ()) -> None:
    """Write ``picture`` with the result's findings, and who found them, as a PNG file."""
    outputs = {name: np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape) for name, tensor in result.outputs.items()}
    energy = f"{result.energy_uj / 1000:.2f} mJ {result.energy_kind.value}"
    made_by = f"{result.model} on {result.board}: {result.busy_us / 1000:.2f} ms, {energy}"
    data = annotate(picture, card(result.model), outputs, [made_by, *captions])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UnavailableError(f"picture {path}", error.strerror or str(error), "choose another --output") from error
