"""A job in a trial: tried on the new release, with the old one behind it, so that no request fails because of an update.

Rules: the new release gets at most half of a job's time, and what it does not do well the old one does in the rest; a job that
leaves no time for both, or that would have to wait for the new release, goes to the old one alone; what the old one cannot do
either is not held against the new one, and neither is a lack of time that was the job's own; after the first thing that is held
against it nothing more is tried on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_agent.core.clock import Clock
from edge_agent.core.values import InferenceResult, Status
from edge_agent.node.events import Execute
from ota.health import unsound

if TYPE_CHECKING:
    from edge_agent.hosting.pictures import PictureRelease

PATIENCE_US = 2_000_000
"""So long an answer is waited for at least before the new release is said to hang."""
SLOWER = 20
"""So many times as long as the old release lately took is no hang yet."""
SPARE = 2
"""So many times as long as it lately took the old release is left."""

Tell = Callable[["PictureRelease", str], None]
"""Of an inference of the new release: why it was not clean, empty if it was."""


def patience_us(longest_us: int) -> int:
    """When a release hangs that stands for one whose jobs lately took ``longest_us`` at most."""
    return max(PATIENCE_US, SLOWER * longest_us)


def share_us(budget_us: int, longest_us: int) -> int:
    """How much of a job's time the new release may have; 0 if the rest could be too little for the old one."""
    half_us = budget_us // 2
    return 0 if half_us < SPARE * longest_us else min(half_us, patience_us(longest_us))


async def run_in_trial(job: Execute, new: PictureRelease, old: PictureRelease, clock: Clock, tell: Tell) -> InferenceResult:
    """``job``, done by ``new`` if it can, else by ``old``."""
    if not new.spoiled and new.there and (deaths := new.deaths):
        tell(new, f"its engine died: {deaths[-1]}")
    allowed_us = share_us(job.budget_us, old.longest_us)
    if new.spoiled or not allowed_us or not new.rests:
        return await old.run(job, job.budget_us)
    started_us = clock.monotonic_us()
    with old.at_work():
        result = await new.run(job, allowed_us)
        took_us = clock.monotonic_us() - started_us
        why = _why_unclean(result)
        if not why:
            tell(new, "")
            return result
        again = await old.run(job, max(1, job.budget_us - took_us))
    hurried = took_us >= allowed_us < patience_us(old.longest_us)
    if not _why_unclean(again) and not hurried:
        tell(new, why)
    return again


def _why_unclean(result: InferenceResult) -> str:
    return unsound(result.outputs) if result.status is Status.OK else result.reason or result.status.value
