"""What a model saw, drawn on the picture: boxes with labels and scores, keypoints, and lines of text in a band beneath.

Rules: widths and letters follow the size of the picture, so that a thumbnail and a photograph are read alike; every text
stands on its own ground; Pillow's built-in scalable font, so that nothing has to be installed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edge_agent.core.errors import UnavailableError
from models.card import BoxReading, Card, PointReading
from models.pictures import decode

COLOURS = ("#00c853", "#ff6d00", "#2979ff", "#d500f9", "#ffd600", "#00b8d4")
"""Taken in turn by label; each is legible under black letters."""
POINT_COLOURS = ("#00e5ff", "#ffea00", "#ff80ab")
BAND, BAND_TEXT = "#202124", "#f1f3f4"
MIN_FONT_PX = 11
PX_A_LETTER = 30
"""A letter is as high as the picture's shorter side divided by this."""
MAX_CAPTIONS = 32

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def annotate(
    picture: Path | str | bytes, card: Card, outputs: Mapping[str, NDArray[np.generic]], captions: Sequence[str] = ()
) -> bytes:
    """The picture with what ``interpret`` found, as a PNG file.

    Boxes and keypoints for a detector, points for a finder of points, its classes for a classifier as the first lines of the
    band; then ``captions``.  Raises ``UnavailableError`` for a path that cannot be read, ``RefusedError`` for a picture that
    cannot be decoded.
    """
    return annotate_all(picture, [(card, outputs)], captions)


def annotate_all(
    picture: Path | str | bytes, answers: Sequence[tuple[Card, Mapping[str, NDArray[np.generic]]]], captions: Sequence[str] = ()
) -> bytes:
    """As ``annotate``, with what several models found on the same picture, in this order."""
    image = decode(picture if isinstance(picture, bytes) else _read(Path(picture)))
    font = ImageFont.load_default(size=max(MIN_FONT_PX, min(image.size) // PX_A_LETTER))
    lines = list[str]()
    for card, outputs in answers:
        if isinstance(card.interpret, BoxReading):
            _draw_boxes(image, card, outputs, font)
        elif isinstance(card.interpret, PointReading):
            _draw_points(image, outputs["points"], outputs["labels"])
        else:
            lines += described(card, outputs)
    encoded = io.BytesIO()
    _with_band(image, [*lines, *captions][:MAX_CAPTIONS], font).save(encoded, "PNG")
    return encoded.getvalue()


def described(card: Card, outputs: Mapping[str, NDArray[np.generic]]) -> list[str]:
    """What was found, one line each: ``face 93 %``."""
    pairs = zip(outputs["labels"].tolist(), outputs["scores"].tolist(), strict=True)
    return [f"{card.labels[label]} {score * 100:.0f} %" for label, score in pairs]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnavailableError(f"picture {path}", error.strerror or str(error), "name a file that can be read") from error


def _draw_boxes(image: Image.Image, card: Card, outputs: Mapping[str, NDArray[np.generic]], font: Font) -> None:
    draw = ImageDraw.Draw(image)
    line_px = max(2, min(image.size) // 200)
    colours = [COLOURS[label % len(COLOURS)] for label in outputs["labels"].tolist()]
    for colour, points in zip(colours, outputs.get("keypoints", np.zeros((0, 0, 2))).tolist(), strict=False):
        for x, y in points:
            draw.ellipse((x - line_px, y - line_px, x + line_px, y + line_px), fill=colour, outline="black")
    for colour, box, text in zip(colours, outputs["boxes"].tolist(), described(card, outputs), strict=True):
        draw.rectangle(tuple(box), outline=colour, width=line_px)
        _draw_tag(draw, image.size, box, text, colour, font)


def _draw_points(image: Image.Image, points: NDArray[np.generic], labels: NDArray[np.generic]) -> None:
    """Dots [n, p, 2] as large as the points of one thing leave room for."""
    draw = ImageDraw.Draw(image)
    for label, each in zip(labels.tolist(), points, strict=True):
        spread_px = float(np.ptp(np.asarray(each, np.float64), axis=0).max())
        dot_px = max(0.5, min(min(image.size) / 250, spread_px / 120))
        for x, y in each.tolist():
            draw.ellipse((x - dot_px, y - dot_px, x + dot_px, y + dot_px), fill=POINT_COLOURS[label % len(POINT_COLOURS)])


def _draw_tag(draw: ImageDraw.ImageDraw, size: tuple[int, int], box: Sequence[float], text: str, colour: str, font: Font) -> None:
    """The text on a ground of the box's colour: above the box, or within it where there is no room, never off the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(2, (bottom - top) // 4)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = max(0.0, min(box[0], size[0] - width))
    y = box[1] - height if box[1] >= height else max(0.0, min(box[1], size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + pad - left, y + pad - top), text, fill="black", font=font)


def _with_band(image: Image.Image, lines: Sequence[str], font: Font) -> Image.Image:
    if not lines:
        return image
    draw = ImageDraw.Draw(image)
    line_px = round(1.4 * max(draw.textbbox((0, 0), line or " ", font=font)[3] for line in lines))
    width = max(image.width, *(round(draw.textlength(line, font=font)) + line_px for line in lines))
    whole = Image.new("RGB", (width, image.height + line_px * len(lines) + line_px // 2), BAND)
    whole.paste(image, (0, 0))
    pen = ImageDraw.Draw(whole)
    for row, line in enumerate(lines):
        pen.text((line_px // 2, image.height + line_px // 4 + row * line_px), line, fill=BAND_TEXT, font=font)
    return whole
