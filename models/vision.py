"""The door of perception: an encoded picture to a model's input tensor, its output tensors to what a person wants to know.

Rules: NumPy and Pillow live here and below, so only the engine child and the shell import this module.  Everything that a
model needs is on its card.  Answers are in pixels of the upright picture as it came, whatever the model's input was and
whichever region of the picture it was shown.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_agent.core.errors import RefusedError
from models.anchors import ssd_anchors
from models.annotate import annotate
from models.card import MAX_SIDE_PX, BoxReading, Card, ClassReading, PointReading
from models.detection import Float32, by_falling_score, decoded, sigmoid, suppressed
from models.geometry import FITS, Box, Geometry, Size, checked_region, cropped
from models.pictures import decode_fitted

__all__ = ["Geometry", "annotate", "interpret", "prepare"]

TOP_CLASSES = 5
Arrays = dict[str, NDArray[np.generic]]


def prepare(
    card: Card, encoded: bytes | memoryview, region: NDArray[np.generic] | None = None
) -> tuple[Arrays, Geometry]:  # fmt: skip
    """A JPEG or PNG file to the model's input ``{name: [1, height, width, 3]}`` and where the picture lies in it.

    ``region``, float32 [4]: left, top, right, bottom of the part of the upright picture to look at, which is widened by the
    card's margin.  Raises ``RefusedError`` for bytes that are no such picture or that pass the bounds of ``models.pictures``, and
    for a region that is not one or does not lie on the picture.
    """
    geometry: Geometry | None = None

    def fit(size: Size) -> tuple[Size, Box]:
        nonlocal geometry
        geometry = placed(card, size, region)
        return geometry.fitted, geometry.shown

    image, _ = decode_fitted(encoded, fit)
    assert geometry is not None
    if geometry.fitted != card.input_size:
        canvas = Image.new("RGB", card.input_size)
        canvas.paste(image, (geometry.left, geometry.top))
        image = canvas
    values = pixel_values(card.prepare.low, card.prepare.high, card.inputs[0].dtype)
    return {card.inputs[0].name: values[np.asarray(image)][None]}, geometry


def placed(card: Card, picture: Size, region: NDArray[np.generic] | None) -> Geometry:
    """Where a picture of this size, or a region of it, lies in the model's input. Raises ``RefusedError`` for no region."""
    if region is None:
        return FITS[card.prepare.resize](picture, card.input_size)
    if region.dtype != np.float32 or region.shape != (4,):
        raise RefusedError("input 'region'", f"{region.dtype}{list(region.shape)}", "float32[4]: left, top, right, bottom")
    box = checked_region(region.tolist(), picture)
    return cropped(picture, card.input_size, card.prepare.resize, box, card.prepare.margin_permille)


def pixel_values(low: int, high: int, dtype: str) -> NDArray[np.generic]:  # -> [256]
    """What each pixel value p becomes: low + p (high - low) / 255, rounded for an integer dtype."""
    exact = low + np.arange(256) * ((high - low) / 255)
    return (np.rint(exact) if np.dtype(dtype).kind in "iu" else exact).astype(dtype)


def interpret(card: Card, outputs: Mapping[str, NDArray[np.generic]], geometry: Geometry) -> Arrays:
    """A model's output tensors to the answer of its task, best score first.

    Detectors: ``boxes`` float32 [n, 4] (left, top, right, bottom) inside the picture, ``scores`` float32 [n], ``labels``
    int32 [n] and, where the model has them, ``keypoints`` float32 [n, k, 2] (x, y).  Classifiers: ``scores`` float32 [m] and
    ``labels`` int32 [m], m = min(5, labels).  Finders of points: ``points`` float32 [n, p, 2] (x, y), ``scores`` float32 [n] and
    ``labels`` int32 [n], n = 1, or 0 where the thing is not there.  ``labels`` count into ``card.labels``.
    Raises ``RefusedError`` for an output that is missing, of another shape or dtype, or not finite.
    """
    checked = {tensor.name: _checked(card, tensor.name, outputs) for tensor in card.outputs}
    if isinstance(card.interpret, ClassReading):
        return classes(card.interpret, checked)
    if isinstance(card.interpret, PointReading):
        return points_of(card.interpret, checked, geometry)
    return boxes(card, card.interpret, checked, geometry)


def _checked(card: Card, name: str, outputs: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    spec = next(tensor for tensor in card.outputs if tensor.name == name)
    subject, remedy = f"output {name} of model {card.name}", "the model file is not the one of its card"
    if name not in outputs:
        raise RefusedError(subject, f"only {', '.join(outputs) or 'nothing'}", str(spec), remedy)
    array = outputs[name]
    if array.shape != spec.shape or array.dtype != spec.dtype:
        raise RefusedError(subject, f"{array.dtype}{list(array.shape)}", str(spec), remedy)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RefusedError(subject, "NaN or infinity", "finite numbers", "the model file or the delegate is broken")
    return array


def boxes(card: Card, reading: BoxReading, outputs: Arrays, geometry: Geometry) -> Arrays:
    """SSD rows [1, rows, 4 + 2k] and logits [1, rows, 1] to boxes, scores, labels, keypoints in picture pixels."""
    scores = sigmoid(outputs[reading.scores][0, :, 0].astype(np.float32))
    rows = np.flatnonzero(scores >= reading.score_permille / 1000)
    raw = outputs[reading.boxes][0, rows].astype(np.float32)
    points = decoded(raw, ssd_anchors(*card.input_size, reading.layers)[rows])
    points, kept = suppressed(points, scores[rows], reading.overlap_permille / 1000, reading.suppression)
    points = in_picture(points, geometry)
    corners = np.clip(points[:, :2], 0, np.array(geometry.picture, np.float32)).reshape(-1, 4)
    seen = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    answer: Arrays = {"boxes": corners[seen], "scores": kept[seen], "labels": np.zeros(seen.sum(), np.int32)}
    return answer | ({"keypoints": points[seen, 2:]} if reading.keypoints else {})


def in_picture(points: Float32, geometry: Geometry) -> Float32:  # [n, p, 2] -> [n, p, 2]
    """(point - offset) / scale + shown: input pixels to picture pixels."""
    offset, scale = np.array((geometry.left, geometry.top), np.float32), np.array(geometry.scale, np.float32)
    return (points - offset) / scale + np.array(geometry.shown[:2], np.float32)


def points_of(reading: PointReading, outputs: Arrays, geometry: Geometry) -> Arrays:
    """Coordinates [.., 3p] and a logit to points, scores, labels: [n, p, 2], [n], [n]."""
    scores = sigmoid(outputs[reading.score].reshape(1).astype(np.float32))
    there = scores >= reading.score_permille / 1000
    flat = outputs[reading.points].reshape(1, -1, 3)[there, :, :2].astype(np.float32)
    near = np.clip(flat, -MAX_SIDE_PX, 2 * MAX_SIDE_PX)
    return {"points": in_picture(near, geometry), "scores": scores[there], "labels": np.zeros(there.sum(), np.int32)}


def classes(reading: ClassReading, outputs: Arrays) -> Arrays:
    """Class values [1, labels] to the best (v - zero) / (one - zero), [m] each."""
    values = outputs[reading.scores][0].astype(np.float32)
    scores = (values - np.float32(reading.zero)) / np.float32(reading.one - reading.zero)
    top = by_falling_score(scores)[:TOP_CLASSES]
    return {"scores": scores[top], "labels": top.astype(np.int32)}
