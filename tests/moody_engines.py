"""An engine that runs models with the real interpreter, but in the mood that its file ends with: for releases that turn out bad.

A mood is ``|<what>|<after>``: after so many answers the model does ``what`` for ever, or does so each time it is started anew.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_agent.core.errors import RefusedError
from edge_agent.runtime.engine import Arrays, read_whole
from edge_agent.runtime.tflite import TfliteEngine

MOODY = "tests.moody_engines:Moody"


class Moody(TfliteEngine):
    _what, _after, _answers = "", 0, 0

    def open(self, model_fd: int, by_path: bool) -> None:
        model = read_whole(model_fd)
        if found := re.search(rb"\|(\w+)\|(\d+)$", model):
            self._what, self._after = found[1].decode(), int(found[2])
        if self._what == "unloadable":
            raise RefusedError("model", "a graph that this engine cannot run", "another one")
        super().open(model_fd, by_path)

    def invoke(self, inputs: Mapping[str, Any]) -> Arrays:
        answer = super().invoke(inputs)
        self._answers += 1
        return answer if self._answers <= self._after or not self._what else getattr(self, f"_{self._what}")(answer)

    def _crash(self, answer: Arrays) -> Arrays:
        os._exit(9)

    def _hang(self, answer: Arrays) -> Arrays:
        while True:
            time.sleep(3600)

    def _nan(self, answer: Arrays) -> Arrays:
        return {name: np.full_like(each, np.nan) for name, each in answer.items()}

    def _fail(self, answer: Arrays) -> Arrays:
        raise RuntimeError("an operator that failed")

    def _refuse(self, answer: Arrays) -> Arrays:
        raise RefusedError("picture", "one of a kind that the old release takes", "another one")

    def _once(self, answer: Arrays) -> Arrays:
        return self._nan(answer) if self._answers == self._after + 1 else answer

    def _late(self, answer: Arrays) -> Arrays:
        time.sleep(0.2)
        return self._fail(answer)

    def _slow(self, answer: Arrays) -> Arrays:
        time.sleep(0.3)
        return answer
