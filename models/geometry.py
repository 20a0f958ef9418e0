"""Where a picture, or a region of it, lies inside a model's input, and the way back.

Rules: no NumPy, no I/O.  Coordinates are continuous pixels with the origin at the upper left corner of the upright picture;
the centre of the first pixel is at (0.5, 0.5).  A box is left, top, right, bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from edge_agent.core.errors import RefusedError

Size = tuple[int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is ``shown`` of an upright ``picture`` of width x height pixels lies at ``left``, ``top`` in ``fitted`` pixels of the
    input."""

    picture: Size
    fitted: Size
    left: int
    top: int
    shown: Box

    @property
    def scale(self) -> tuple[float, float]:
        """Input pixels for a picture pixel, along x and y."""
        left, top, right, bottom = self.shown
        return self.fitted[0] / (right - left), self.fitted[1] / (bottom - top)

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.shown[0]) * self.scale[0] + self.left, (y - self.shown[1]) * self.scale[1] + self.top

    def to_picture(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.left) / self.scale[0] + self.shown[0], (y - self.top) / self.scale[1] + self.shown[1]


def letterboxed(picture: Size, size: Size) -> Geometry:
    """The largest place of the picture's aspect, to whole pixels, in the middle of an input of ``size``."""
    fitted = _letterbox(picture, size)
    return Geometry(picture, fitted, (size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2, _whole(picture))


def stretched(picture: Size, size: Size) -> Geometry:
    """The whole of an input of ``size``."""
    return Geometry(picture, size, 0, 0, _whole(picture))


def _letterbox(shown: tuple[float, float], size: Size) -> Size:
    scale = min(size[0] / shown[0], size[1] / shown[1])
    return min(size[0], max(1, round(shown[0] * scale))), min(size[1], max(1, round(shown[1] * scale)))


def _stretch(shown: tuple[float, float], size: Size) -> Size:
    return size


def _whole(picture: Size) -> Box:
    return 0.0, 0.0, float(picture[0]), float(picture[1])


FITS: dict[str, Callable[[Size, Size], Geometry]] = {"letterbox": letterboxed, "stretch": stretched}
_FITTED = {"letterbox": _letterbox, "stretch": _stretch}


def checked_region(region: Sequence[float], picture: Size) -> Box:
    """``region`` if it is a box with an area that lies on the upright picture; raises ``RefusedError`` otherwise."""
    allowed = f"left < right, top < bottom within the {picture[0]} x {picture[1]} pixels of the upright picture"
    if len(region) != 4 or not all(map(isfinite, region)):
        raise RefusedError("input 'region'", list(region[:4]), f"four finite numbers: {allowed}")
    left, top, right, bottom = map(float, region)
    if not (0 <= left < right <= picture[0] and 0 <= top < bottom <= picture[1]):
        raise RefusedError("input 'region'", [left, top, right, bottom], allowed)
    return left, top, right, bottom


def cropped(picture: Size, size: Size, resize: str, region: Box, margin_permille: int) -> Geometry:
    """A region, widened on each side by ``margin_permille`` of its width and height, in the middle of an input of ``size``.

    Where it reaches beyond the picture the input stays black, so that what the region shows keeps its place in the middle.
    """
    wide = _widened(region, margin_permille)
    fitted = _FITTED[resize]((wide[2] - wide[0], wide[3] - wide[1]), size)
    shown = max(0.0, wide[0]), max(0.0, wide[1]), min(float(picture[0]), wide[2]), min(float(picture[1]), wide[3])
    (left, width), (top, height) = (_span(wide, shown, fitted, size, axis) for axis in (0, 1))
    return Geometry(picture, (width, height), left, top, shown)


def _widened(region: Box, margin_permille: int) -> Box:
    left, top, right, bottom = region
    x, y = (right - left) * margin_permille / 1000, (bottom - top) * margin_permille / 1000
    return left - x, top - y, right + x, bottom + y


def _span(wide: Box, shown: Box, fitted: Size, size: Size, axis: int) -> tuple[int, int]:
    """Where the part that is on the picture begins in the input, and how long it is, in whole pixels."""
    scale = fitted[axis] / (wide[axis + 2] - wide[axis])
    start = (size[axis] - fitted[axis]) // 2
    first = min(size[axis] - 1, start + round((shown[axis] - wide[axis]) * scale))
    last = min(size[axis], start + round((shown[axis + 2] - wide[axis]) * scale))
    return first, max(1, last - first)
