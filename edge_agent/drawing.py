"""A result drawn on its picture: the one place where a client's side needs NumPy and Pillow. Import it late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import InferenceResult
from models.annotate import annotate_all
from models.catalog import card


def draw(path: Path, picture: bytes, result: InferenceResult, captions: Sequence[str] = ()) -> None:
    """Write ``picture`` with the result's findings, and who found them, as a PNG file."""
    draw_all(path, picture, [result], captions)


def draw_all(path: Path, picture: bytes, results: Sequence[InferenceResult], captions: Sequence[str] = ()) -> None:
    """As ``draw``, with what several models found on the same picture."""
    answers = [(card(result.model), _arrays(result)) for result in results]
    data = annotate_all(picture, answers, [*map(_made_by, results), *captions])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UnavailableError(f"picture {path}", error.strerror or str(error), "choose another --output") from error


def _arrays(result: InferenceResult) -> dict[str, NDArray[np.generic]]:
    return {name: np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape) for name, tensor in result.outputs.items()}


def _made_by(result: InferenceResult) -> str:
    energy = f"{result.energy_uj / 1000:.2f} mJ {result.energy_kind.value}"
    return f"{result.model} on {result.board}: {result.busy_us / 1000:.2f} ms, {energy}"
