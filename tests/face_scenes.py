"""Scenes with known faces, made from two photographs, and how well a detector does on them.

The faces were noted by hand on the photographs (hairline or brow to chin, ear to ear).  A scene is a photograph scaled down
and set somewhere on a grey canvas, as it is or mirrored: the smaller the face in the frame, the harder.  The cat is in it
for the faces that are not there.  The figure is F1 over all scenes, a face being found by a box that overlaps it by half.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image, ImageOps

from tests.fetched import picture_path

Box = tuple[float, float, float, float]
FACES: dict[str, tuple[Box, ...]] = {
    "astronaut": ((172, 72, 278, 180),),
    "grace_hopper": ((165, 130, 368, 335),),
    "chelsea": (),
}
"""Left, top, right, bottom in pixels of the photograph."""
CANVAS_PX = 640
SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
PLACES = ((0.0, 0.0), (0.5, 0.5), (0.3, 0.9))
FOUND_OVERLAP = 0.5


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, as the definition has it."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def scenes() -> Iterator[tuple[bytes, tuple[Box, ...]]]:
    """PNG files with the faces that are in them."""
    for name, faces in FACES.items():
        photograph = Image.open(picture_path(name)).convert("RGB")
        for scale in SCALES:
            for place in PLACES:
                for mirrored in (False, True):
                    yield _scene(photograph, faces, scale, place, mirrored)


def _scene(
    photograph: Image.Image, faces: tuple[Box, ...], scale: float, place: tuple[float, float], mirrored: bool
) -> tuple[bytes, tuple[Box, ...]]:
    small = ImageOps.scale(photograph, scale, Image.Resampling.BOX)
    canvas = Image.new("RGB", (CANVAS_PX, CANVAS_PX), "gray")
    left, top = (round(part * (CANVAS_PX - side)) for part, side in zip(place, small.size, strict=True))
    canvas.paste(small, (left, top))
    placed = [tuple(np.multiply(face, scale) + (left, top, left, top)) for face in faces]
    if mirrored:
        canvas = ImageOps.mirror(canvas)
        placed = [(CANVAS_PX - right, top, CANVAS_PX - left, bottom) for left, top, right, bottom in placed]
    encoded = io.BytesIO()
    canvas.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue(), tuple(placed)


def f1_permille(detect: Callable[[bytes], Mapping[str, np.ndarray]]) -> int:
    """2 found / (boxes + faces), in thousandths, over all scenes."""
    found = boxes = faces = 0
    for encoded, truth in scenes():
        seen = [tuple(box) for box in detect(encoded)["boxes"].tolist()]
        found += sum(any(overlap(face, box) >= FOUND_OVERLAP for box in seen) for face in truth)
        boxes, faces = boxes + len(seen), faces + len(truth)
    return round(2000 * found / (boxes + faces))
