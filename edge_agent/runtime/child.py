"""The process of an engine child: how it is started, and how its end is told.

Rules: a fresh interpreter by exec, never a fork that goes on; it gets three descriptors (a language model's child: four) and an
environment without secrets, and imports from where this package lies, whatever the folder it is started in holds.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_agent.core.errors import UnavailableError
from edge_agent.runtime.doorbell import MAX_DOORBELL_BYTES, printable

WORKER = "edge_agent.runtime.worker"
ROOT = Path(__file__).resolve().parents[2]
"""Where the packages lie; the child gets it as its only extra module path."""
PASSED_ON = ("LD_LIBRARY_PATH", "PATH", "LANG", "TZ")
QUIET = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
SOCKET_BUFFER_BYTES = 4 * MAX_DOORBELL_BYTES


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended: ``cause`` for a person, and its last words on stderr."""

    cause: str
    last_words: str = ""

    def __str__(self) -> str:
        return f"{self.cause} ({self.last_words})" if self.last_words else self.cause


class ChildDiedError(UnavailableError):
    """The child ended, or was killed, before it answered."""

    def __init__(self, subject: str, death: Death) -> None:
        self.death = death
        super().__init__(subject, f"its engine died: {death}")


def start_child(worker: str, channel: socket.socket, *fds: int) -> subprocess.Popen[bytes]:
    """The module ``worker`` ("": what runs one model) in a fresh interpreter and a session of its own (Ctrl-C is the agent's).

    Its arguments are the numbers of its descriptors, ``channel`` first, and the agent's process id.
    """
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    descriptors = (channel.fileno(), *fds)
    return subprocess.Popen(
        [sys.executable, "-P", "-s", "-m", worker or WORKER, *map(str, descriptors), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,
        pass_fds=descriptors,
        env=child_environment(),
        cwd="/",
        start_new_session=True,
    )


def child_environment() -> dict[str, str]:
    """What an engine child gets of the agent's environment: nothing that could hold a secret or change what it imports."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return kept | QUIET | {"PYTHONPATH": str(ROOT)}


def ended(status: int) -> str:
    """A wait status, as ``Popen`` gives it, in words."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def last_words(stderr: bytes) -> str:
    """The last line that is not mere information, made safe to show."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines()]
    telling = [line for line in lines if line and not line.startswith(("INFO", "W0000", "I0000"))]
    return printable(telling[-1]) if telling else ""
