"""What holds for every test: a Ctrl-C means what it means to a person, however the tests were started; no example of a law has a
time limit of its own, for the machine is shared; no process that a test starts compiles again what another has compiled."""

from __future__ import annotations

import compileall
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("edge_agent", "board_support", "models", "ota")


def pytest_configure(config: pytest.Config) -> None:
    """A shell lets what it starts in the background ignore SIGINT, and every process that a test starts would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import settings

        settings.register_profile("shared machine", deadline=None)
        settings.load_profile("shared machine")
    if not hasattr(config, "workerinput"):
        compile_once()


def compile_once() -> None:
    """Else a container that sets PYTHONDONTWRITEBYTECODE pays most of a second in each of the many hundred processes of a run.

    An engine's child has a clean environment and writes nothing, but reads what lies there.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    for folder in PRODUCT:
        compileall.compile_dir(ROOT / folder, quiet=2)
