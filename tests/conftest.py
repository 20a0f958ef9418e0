"""What holds for every test: a Ctrl-C means what it means to a person, however the tests were started; no example of a law has a
time limit of its own, for the machine is shared."""

from __future__ import annotations

import importlib.util
import signal


def pytest_configure() -> None:
    """A shell lets what it starts in the background ignore SIGINT, and every process that a test starts would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import settings

        settings.register_profile("shared machine", deadline=None)
        settings.load_profile("shared machine")
