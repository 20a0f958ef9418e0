"""The real agent, whose model takes its engine child over: ``python -m tests.taken_over agent --config FILE``.

The agent runs in its state folder, so that what took over knows where ``identity.key`` is.  Before its child is confined it shows
that nothing but the sandbox stands between it and the secrets: same user, no capability needed (but for the agent's memory where
the kernel's Yama guards that, too).  Every request then tries all of
``tests.odd_engines.PROBES``, and the three below, and fails with what came of it.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from board_support.board import Delegate
from edge_agent import cli, configured
from edge_agent.runtime.engine import Arrays
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.tflite import TfliteEngine
from tests.odd_engines import PROBES

DENIED = {errno.EPERM, errno.EACCES, errno.ENOSYS}
AGENTS_PROCESS: dict[str, Callable[[], bytes]] = {
    "the identity key": lambda: Path("identity.key").read_bytes(),
    "the agent's environment": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "the agent's memory": lambda: read_at(f"/proc/{os.getppid()}/mem", first_address()),
}


def first_address() -> int:
    return int(Path(f"/proc/{os.getppid()}/maps").read_text().split("-")[0], 16)


def read_at(path: str, address: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, 4, address)
    finally:
        os.close(fd)


class TakenOver(TfliteEngine):
    """Reads the secrets as long as it may, then tells what it may still do."""

    def __init__(self, settings: EngineSettings, delegate: Delegate | None) -> None:
        os.chdir(f"/proc/{os.getppid()}/cwd")
        self.key = os.path.abspath("identity.key")  # noqa: PTH100
        self.before = [name for name, read in AGENTS_PROCESS.items() if got_through(read)]
        super().__init__(settings, delegate)

    def invoke(self, inputs: Mapping[str, Any]) -> Arrays:
        got = [name for name, read in AGENTS_PROCESS.items() if got_through(read)]
        got += [name for name, probe in PROBES.items() if got_through(functools.partial(probe, self.key))]
        raise RuntimeError(
            f"before: {'+'.join(self.before)}; tried {len(PROBES | AGENTS_PROCESS)}; got: {'+'.join(got) or 'nothing'}."
        )


def got_through(attempt: Callable[[], object]) -> bool:
    """Also when it failed for its arguments alone: the kernel did not say no."""
    try:
        attempt()
    except OSError as error:
        return error.errno not in DENIED
    except ValueError as error:
        return "not allowed to raise maximum limit" not in str(error)
    return True


if __name__ == "__main__":
    engine = functools.partial(EngineSettings, engine="tests.taken_over:TakenOver")
    vars(configured)["EngineSettings"] = engine
    sys.exit(cli.main(sys.argv[1:]))
