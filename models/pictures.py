"""Photographs from outside: decoded within bounds, upright, in RGB.

Rules: JPEG and PNG only.  Size is judged by the header, before a pixel is decoded; whatever the decoder dislikes becomes a
``RefusedError``.  EXIF orientation is applied, so width and height here are those that a person sees.  Transparent pixels
show white.  16-bit grey keeps its upper 8 bits.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from edge_agent.core.errors import RefusedError
from models.geometry import Box, Size

MAX_PICTURE_BYTES = 16 * 2**20
MAX_PICTURE_PIXELS = 25_000_000
MAX_PICTURE_SIDE_PX = 20_000

FORMATS = ("JPEG", "PNG")
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.3 tag 0x0112 to the turn that sets the picture upright; 1 is upright already."""
SIDEWAYS = range(5, 9)
MIRRORED = {2: (True, False), 3: (True, True), 4: (False, True), 6: (False, True), 7: (True, True), 8: (True, False)}
"""Which of the file's own axes run against the upright ones, once those are swapped where the picture lies sideways."""

_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for bytes that are not the picture they say they are."""


def preload() -> None:
    """Import what Pillow would import on meeting its first picture: in the sandbox there is no file system by then."""
    from PIL import MpoImagePlugin, TiffImagePlugin  # noqa: F401  (JPEG reads EXIF and multi-picture files through these)

    Image.preinit()


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RefusedError:
        raise
    except MemoryError as error:
        raise RefusedError("picture", "more pixels than there is memory for", "a smaller picture") from error
    except _DECODER_ERRORS as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "neither JPEG nor PNG" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise RefusedError("picture", f"bytes that do not decode ({reason[:80]})", "a whole JPEG or PNG file") from error


def _opened(encoded: bytes | memoryview) -> Image.Image:
    """The picture with its header read and judged, its pixels not yet decoded."""
    size_bytes = memoryview(encoded).nbytes
    if not 0 < size_bytes <= MAX_PICTURE_BYTES:
        raise RefusedError("picture", f"{size_bytes} bytes", f"1 to {MAX_PICTURE_BYTES} bytes", "send a smaller JPEG")
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    width, height = image.size
    if not 0 < width * height <= MAX_PICTURE_PIXELS or max(width, height) > MAX_PICTURE_SIDE_PX:
        raise RefusedError(
            "picture", f"{width} x {height} pixels", f"at most {MAX_PICTURE_PIXELS} pixels and {MAX_PICTURE_SIDE_PX} a side"
        )
    return image


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ORIENTATION_TAG, 1)
    return value if value in TURNS else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGB", layer.size, "white")
        ground.paste(layer, mask=layer)
        return ground
    return image.convert("RGB")


def decode(encoded: bytes | memoryview) -> Image.Image:
    """The whole picture, upright, RGB. Raises ``RefusedError`` for anything but a JPEG or PNG within the bounds."""
    with _refusing():
        image = _opened(encoded)
        turn = TURNS.get(_orientation(image))
        rgb = _rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def decode_fitted(encoded: bytes | memoryview, fit: Callable[[Size], tuple[Size, Box]]) -> tuple[Image.Image, Size]:
    """A box of the picture scaled to a size, upright, RGB, and the size of the whole upright picture, by which ``fit`` says both.

    A JPEG is decoded at 1/2, 1/4 or 1/8 when that still gives twice the pixels asked for (libjpeg's scaled DCT), which is
    where the time goes for a camera's picture.  Raises ``RefusedError`` as ``decode``, and what ``fit`` raises.
    """
    with _refusing():
        image = _opened(encoded)
        orientation = _orientation(image)
        swap = orientation in SIDEWAYS
        size = _swapped(image.size, swap)
        upright, box = fit(size)
        scaled = _rescaled(image, _swapped(upright, swap), _in_file(box, size, orientation))
        turn = TURNS.get(orientation)
        return (scaled if turn is None else scaled.transpose(turn)), size


def _rescaled(image: Image.Image, wanted: Size, box: Box) -> Image.Image:
    whole = image.size
    least = [math.ceil(2 * wanted[axis] * whole[axis] / (box[axis + 2] - box[axis])) for axis in (0, 1)]
    drafted = image.draft(None, (min(least[0], whole[0]), min(least[1], whole[1])))
    scale = [drafted[1][axis + 2] / whole[axis] if drafted else 1.0 for axis in (0, 1)]
    left, top, right, bottom = (min(edge * scale[axis % 2], image.size[axis % 2]) for axis, edge in enumerate(box))
    return _rgb(image).resize(wanted, Image.Resampling.BILINEAR, box=(left, top, right, bottom), reducing_gap=2.0)


def _in_file(box: Box, size: Size, orientation: int) -> Box:
    """A box of the upright picture of ``size`` in the coordinates of the file, which may lie on its side or be mirrored."""
    left, top, right, bottom = box
    width, height = size
    if orientation in SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
        width, height = height, width
    mirrored_x, mirrored_y = MIRRORED.get(orientation, (False, False))
    if mirrored_x:
        left, right = width - right, width - left
    if mirrored_y:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _swapped(size: Size, swap: bool) -> Size:
    return (size[1], size[0]) if swap else size
