"""Runtimes that are broken in the ways in which a board's can be: they run in the real sandbox, in the place of the real one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from board_support.board import Delegate
from edge_agent.core.errors import UnavailableError
from edge_agent.runtime.engine import Arrays
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.tflite import TfliteEngine


class Illegal(TfliteEngine):
    """Made for another processor: it ends at its first instruction that this one does not have."""

    def __init__(self, settings: EngineSettings, delegate: Delegate | None) -> None:
        os.kill(os.getpid(), signal.SIGILL)
        super().__init__(settings, delegate)


class Wrong(TfliteEngine):
    """One bit of one number is another."""

    def invoke(self, inputs: Mapping[str, Any]) -> Arrays:
        outputs = {name: array.copy() for name, array in super().invoke(inputs).items()}
        outputs["y"][0, 7] ^= 1
        return outputs


class Hung(TfliteEngine):
    def invoke(self, inputs: Mapping[str, Any]) -> Arrays:
        while True:
            time.sleep(1)


class Unfit(TfliteEngine):
    """Sound alone; with a delegate it dies."""

    def __init__(self, settings: EngineSettings, delegate: Delegate | None) -> None:
        super().__init__(settings, None)
        self._with = delegate

    def invoke(self, inputs: Mapping[str, Any]) -> Arrays:
        if self._with:
            os._exit(7)
        return super().invoke(inputs)


class Loose(TfliteEngine):
    """It never gets to a sandbox."""

    def __init__(self, settings: EngineSettings, delegate: Delegate | None) -> None:
        raise UnavailableError("sandbox", "seccomp: Function not implemented", "unsafe_without_seccomp runs models without it")
