"""The anchors of an SSD detector: the points that its boxes are told from."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


@cache
def ssd_anchors(width: int, height: int, layers: tuple[tuple[int, int], ...]) -> Float32:
    """Centres of the cells in input pixels, row by row, a cell repeated for each of its anchors: -> [rows, 2] (x, y).

    ``layers`` are (stride in pixels, anchors a cell).  Anchor sizes are 1 (fixed), so that only centres matter.
    Source: MediaPipe, ssd_anchors_calculator.cc with fixed_anchor_size and anchor offsets of 0.5; consecutive layers of
    one stride are one entry here.
    """
    grids = [_grid(-(-width // stride), -(-height // stride), stride, anchors) for stride, anchors in layers]
    return np.concatenate(grids)


def _grid(columns: int, rows: int, stride: int, anchors: int) -> Float32:
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    centres = (np.stack([x, y], axis=-1) + np.float32(0.5)) * np.float32(stride)
    return centres.reshape(-1, 2).repeat(anchors, axis=0)
