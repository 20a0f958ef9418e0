"""The engine child of a language model whose steps take a while: ``STEP_US`` and what they really take."""

from __future__ import annotations

import sys
import time

from edge_agent.language import engine, worker

STEP_US = 40_000


class Slow(engine.Engine):
    def _step(self, turns):  # type: ignore[no-untyped-def]
        time.sleep(STEP_US / 1e6)
        return super()._step(turns)


if __name__ == "__main__":
    worker.Engine = Slow  # type: ignore[misc]
    worker.main(sys.argv[1:])
