"""The summary statistics of the public traces, for runs without their files.

Owns the figures and how lengths are drawn from them.  Rules: measured on the traces' own files (Azure LLM inference trace 2023,
conversation, 19,366 requests, CC-BY 4.0; Mooncake FAST'25 synthetic trace, 3,993 requests, Apache-2.0); nothing of the
traces themselves is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

QUANTILES_PERMILLE = (0, 10, 100, 250, 500, 750, 900, 990, 1000)


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """``cv_permille``: deviation over mean of the time between two requests.  Lengths in tokens at ``QUANTILES_PERMILLE``.

    ``turns_permille``: requests a session, of 1000.
    """

    rate_mhz: int
    cv_permille: int
    prompt: Sequence[int]
    answer: Sequence[int]
    turns_permille: int


STATISTICS: Mapping[str, TraceStatistics] = {
    "azure": TraceStatistics(
        5530, 1094, (2, 29, 207, 396, 1020, 1189, 2735, 4142, 14050), (7, 16, 54, 85, 129, 395, 424, 601, 1000), 1000
    ),
    "mooncake": TraceStatistics(
        3906, 1011, (13, 16, 30, 277, 11587, 23175, 38615, 66458, 191378), (1, 2, 4, 11, 69, 250, 389, 769, 893), 1587
    ),
}
OWN_RATE_MHZ: Mapping[str, int] = {name: each.rate_mhz for name, each in STATISTICS.items()}


def draw_length(quantiles: Sequence[int], random: Random) -> int:
    """A length by the inverse of its distribution function, straight between the quantiles."""
    at = random.randrange(QUANTILES_PERMILLE[-1] * 1000)
    for low, high, first, last in zip(QUANTILES_PERMILLE, QUANTILES_PERMILLE[1:], quantiles, quantiles[1:], strict=False):
        if at < high * 1000:
            return first + (last - first) * (at - low * 1000) // ((high - low) * 1000)
    return quantiles[-1]
