"""The engine child of a language model in the mood that its stages end with: ``|<what>|<after>``, as in ``moody_engines``.

After so many steps of its own it does ``what``.
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

from edge_agent.language import slot, worker
from edge_agent.language.sampling import NotFiniteError

MOOD = re.compile(rb"\|(\w+)\|(\d+)$")


def mood_of(model_fd: int) -> tuple[str, int]:
    tail = os.pread(model_fd, 64, max(0, os.fstat(model_fd).st_size - 64))
    found = MOOD.search(tail)
    return (found[1].decode(), int(found[2])) if found else ("", 0)


class Moody(worker.LanguageWorker):
    what, after, steps = "", 0, 0

    def step(self, body: Any, bulk: memoryview) -> Any:
        Moody.steps += 1
        if Moody.what and Moody.steps > Moody.after:
            if Moody.what == "crash":
                os._exit(9)
            while Moody.what == "hang":
                time.sleep(600)
            if Moody.what == "slow":
                time.sleep(0.02)
        return super().step(0, bulk)


def drawn_badly(*arguments: Any) -> int:
    if Moody.what == "nan" and Moody.steps > Moody.after:
        raise NotFiniteError("a logit is nan")
    return drawn(*arguments)


if __name__ == "__main__":
    drawn, slot.drawn = slot.drawn, drawn_badly
    Moody.what, Moody.after = mood_of(int(sys.argv[2]))
    worker.LanguageWorker = Moody  # type: ignore[misc]
    worker.main(sys.argv[1:])
