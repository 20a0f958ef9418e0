"""From a detector's raw tensors to boxes: decode, threshold, suppress.

Rules: every function is an equation over arrays; boxes are (left, top, right, bottom).  Order is by falling score, equal
scores by rising row, so that the same tensors give the same answer everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]

MAX_DETECTIONS = 100
MAX_OFFSET_PX = 1e6
"""Beyond any picture; keeps what a broken model says within the arithmetic of float32."""
LOGIT_LIMIT = 80.0
"""exp(-80) is the last that a float32 holds with room; MediaPipe clips raw scores at 100, where it underflows."""


def sigmoid(logits: Float32) -> Float32:  # [n] -> [n]
    return (1 / (1 + np.exp(-np.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT)))).astype(np.float32)


def by_falling_score(scores: Float32) -> Rows:  # [n] -> [n]
    return np.argsort(-scores, kind="stable")


def decoded(raw: Float32, anchors: Float32) -> Float32:  # [n, 4 + 2k], [n, 2] -> [n, 2 + k, 2]
    """Corners and keypoints as points: c - s/2, c + s/2, then each keypoint, where c and keypoints are told from the anchor.

    Source: MediaPipe, tensors_to_detections_calculator.cc, with reverse_output_order.
    """
    pairs = np.clip(raw, -MAX_OFFSET_PX, MAX_OFFSET_PX).reshape(-1, raw.shape[1] // 2, 2)
    centres, halves = pairs[:, 0] + anchors, pairs[:, 1] / 2
    points: Float32 = np.concatenate(
        [np.stack([centres - halves, centres + halves], axis=1), pairs[:, 2:] + anchors[:, None]], axis=1
    )
    return points


def areas(boxes: Float32) -> Float32:  # [n, 4] -> [n]
    sides: Float32 = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    area: Float32 = sides.prod(axis=1, dtype=np.float32)
    return area


def overlaps(box: Float32, boxes: Float32) -> Float32:  # [4], [n, 4] -> [n]
    """Intersection over union; 0 where the union is empty."""
    corners = np.concatenate([np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])], axis=1)
    shared = areas(corners)
    union = areas(box[None]) + areas(boxes) - shared
    ratio: Float32 = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return ratio


def weighted_mean(points: Float32, scores: Float32) -> Float32:  # [m, p, 2], [m] -> [p, 2]
    mean: Float32 = np.average(points, axis=0, weights=scores).astype(np.float32)
    return mean


def best(points: Float32, scores: Float32) -> Float32:  # [m, p, 2], [m] -> [p, 2]
    first: Float32 = points[scores.argmax()]
    return first


MERGES: dict[str, Callable[[Float32, Float32], Float32]] = {"weighted": weighted_mean, "plain": best}


def suppressed(
    points: Float32, scores: Float32, overlap: float, merge: str
) -> tuple[Float32, Float32]:  # [n, p, 2], [n] -> [m, p, 2], [m]
    """Non-maximum suppression over points whose first two are a box's corners.

    The best-scored row left takes all rows that overlap it by more than ``overlap`` and stands for them with its own score:
    as it is (``plain``) or moved to their score-weighted mean (``weighted``, the blending of the BlazeFace paper,
    arXiv 1907.05047 section 3.3).
    """
    boxes = points[:, :2].reshape(-1, 4)
    left = by_falling_score(scores)
    kept_points, kept_scores = [points[:0]], [scores[:0]]
    while len(left) and len(kept_scores) <= MAX_DETECTIONS:
        taken = overlaps(boxes[left[0]], boxes[left]) > overlap
        taken[0] = True
        group = left[taken]
        kept_points.append(MERGES[merge](points[group], scores[group])[None])
        kept_scores.append(scores[group[:1]])
        left = left[~taken]
    return np.concatenate(kept_points), np.concatenate(kept_scores)
