"""Which token comes next: greedy, or drawn by temperature, top-k and top-p.

Rules: a draw depends on the logits, the seed and the token's position in its session, on nothing else: not on what was drawn
before, not on who shares the step.  So a turn that goes on elsewhere draws the same tokens.  The filters apply in the order
temperature, top-k, top-p; among equal logits the lower id comes first.  Logits that are no numbers are a failure, never a token.

Source: nucleus sampling, arXiv:1904.09751; the counter-based generator is SplitMix64 (doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.chat import Sampling

Floats = NDArray[np.float32]
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
LIKELY = 1024
"""Among so many tokens the nucleus is looked for first; over all of them only when it is larger."""


class NotFiniteError(RuntimeError):
    """The model gave logits that are no numbers."""


def greedy(logits: Floats) -> int:
    """The most likely token of ``logits [vocabulary]``; raises ``NotFiniteError``."""
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise NotFiniteError(f"a logit is {logits[best]}")
    return best


def uniform(seed: int, position: int) -> float:
    """A number of [0, 1), evenly distributed over positions."""
    z = (_mixed(seed & MASK) + (position + 1) * GOLDEN) & MASK
    return (_mixed(z) >> 11) * 2.0**-53


def _mixed(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def drawn(logits: Floats, sampling: Sampling, seed: int, position: int) -> int:
    """The token at ``position`` of a session, from ``logits [vocabulary]``. Raises ``NotFiniteError``."""
    best = greedy(logits)
    if sampling.greedy or sampling.top_k == 1:
        return best
    scores = (logits.astype(np.float64) - float(logits[best])) / (sampling.temperature_milli / 1000)
    if sampling.top_k == 0 and sampling.top_p_milli == 1000:
        return _chosen(np.exp(scores), uniform(seed, position))
    ids = _candidates(scores, sampling)
    return int(ids[_chosen(np.exp(scores[ids]), uniform(seed, position))])


def _candidates(scores: NDArray[np.float64], sampling: Sampling) -> NDArray[np.intp]:
    """The ids that top-k and top-p leave, most likely first."""
    top_k = sampling.top_k or len(scores)
    if sampling.top_p_milli == 1000:
        return _highest(scores, top_k)
    share = sampling.top_p_milli / 1000
    ids = _highest(scores, min(top_k, LIKELY))
    total = np.exp(scores).sum() if top_k >= len(scores) else np.exp(scores[_highest(scores, top_k)]).sum()
    cumulative = np.exp(scores[ids]).cumsum()
    if len(ids) < min(top_k, len(scores)) and cumulative[-1] < share * total:
        ids = _highest(scores, top_k)
        cumulative = np.exp(scores[ids]).cumsum()
    kept = int(np.searchsorted(cumulative, share * total)) + 1
    return ids[:kept]


def _highest(scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` highest scores, highest first; the lower id first among equals, also at the edge."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    edge = np.partition(scores, len(scores) - count)[len(scores) - count]
    ids = np.flatnonzero(scores >= edge)
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def _chosen(weights: NDArray[np.float64], at: float) -> int:
    """The index where the running sum of ``weights`` passes the share ``at`` of it; never one of weight 0."""
    cumulative = weights.cumsum()
    index = int(np.searchsorted(cumulative, at * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))
