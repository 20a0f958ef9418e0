"""Where a picture lies inside a model's input, and the way back.

Rules: no NumPy, no I/O.  Coordinates are continuous pixels with the origin at the upper left corner of the upright picture;
the centre of the first pixel is at (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Geometry:
    """A ``picture`` of width x height pixels, shown upright, lies at ``left``, ``top`` in ``fitted`` pixels of the input."""

    picture: tuple[int, int]
    fitted: tuple[int, int]
    left: int
    top: int

    @property
    def scale(self) -> tuple[float, float]:
        """Input pixels for a picture pixel, along x and y."""
        return self.fitted[0] / self.picture[0], self.fitted[1] / self.picture[1]

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        return x * self.scale[0] + self.left, y * self.scale[1] + self.top

    def to_picture(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.left) / self.scale[0], (y - self.top) / self.scale[1]


def letterboxed(picture: tuple[int, int], size: tuple[int, int]) -> Geometry:
    """The largest place of the picture's aspect, to whole pixels, in the middle of an input of ``size``."""
    width, height = picture
    scale = min(size[0] / width, size[1] / height)
    fitted = min(size[0], max(1, round(width * scale))), min(size[1], max(1, round(height * scale)))
    return Geometry(picture, fitted, (size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2)


def stretched(picture: tuple[int, int], size: tuple[int, int]) -> Geometry:
    """The whole of an input of ``size``."""
    return Geometry(picture, size, 0, 0)


FITS = {"letterbox": letterboxed, "stretch": stretched}
