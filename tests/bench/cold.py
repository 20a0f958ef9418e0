"""How much slower this machine runs code that it has not run for a while: the measure of every figure of an agent that waits.

How: the same piece of Python (JSON, a regular expression, a dataclass, a sort) is timed again and again at once, and then each
time after ``PAUSE_S`` in which the process never sleeps but runs a loop of one line; so no scheduler is in it, only caches and
predictors that others have filled meanwhile.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, replace

from tests.bench.figures import p50

PAUSE_S = 0.012
HOT_RUNS, COLD_RUNS = 300, 100


@dataclass(frozen=True)
class _Value:
    number: int
    text: str


def cold_factor() -> float:
    """The median after a pause over the median at once."""
    for _ in range(HOT_RUNS):
        _work_ns()
    hot = p50(_work_ns() for _ in range(HOT_RUNS))
    return p50(_after_pause_ns() for _ in range(COLD_RUNS)) / hot


def _after_pause_ns() -> int:
    end = time.perf_counter() + PAUSE_S
    while time.perf_counter() < end:
        pass
    return _work_ns()


def _work_ns() -> int:
    started_ns = time.perf_counter_ns()
    json.loads(json.dumps({"a": [1, 2, 3], "b": {"c": "d"}}))
    replace(_Value(1, "x"), number=2)
    re.fullmatch(r"[a-z]+[0-9]*", "abc12")
    sorted([3, 1, 2], key=lambda value: -value)
    return time.perf_counter_ns() - started_ns
