"""How long a new job would wait on a board, by how urgent it is.

Rules: pure; where the earliest deadline runs first, an urgent job waits only for what is more urgent still, so that one number is
not enough: a board tells the wait of jobs that are due within each of ``SLACKS_US``, and its whole queue for all later ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_COST, bounded

SLACKS_US = tuple(250_000 << step for step in range(9))
"""From a quarter of a second to 64 s."""


def wait_us(queue_us: int, waits_us: Sequence[int], slack_us: int) -> int:
    """The wait of a job that is due in ``slack_us``, by what a board tells; ``queue_us`` is that of an unhurried one."""
    return next((wait for slack, wait in zip(SLACKS_US, waits_us, strict=False) if slack_us <= slack), queue_us)


def checked_waits(subject: str, waits_us: tuple[int, ...], queue_us: int) -> None:
    """Raises ``RefusedError`` unless there is none, or one for each slack, ascending up to the whole queue."""
    if not waits_us:
        return
    if len(waits_us) != len(SLACKS_US):
        raise RefusedError(subject, f"{len(waits_us)} waits", f"none or {len(SLACKS_US)}")
    for shorter, longer in zip(waits_us, (*waits_us[1:], queue_us), strict=True):
        bounded(subject, shorter, 0, MAX_COST, "µs")
        if shorter > longer:
            raise RefusedError(subject, waits_us, f"ascending, up to the queue of {queue_us} µs")
