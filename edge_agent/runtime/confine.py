"""An engine child gives up its rights, after its libraries are in and before a byte of the model is parsed.

Rules: the order is law (limits, Landlock, seccomp), because each step still needs what the next one takes away.  What the
kernel cannot do is said, not passed over: the names of the layers that hold go into the handshake, and without seccomp
the child refuses to go on unless the settings say ``unsafe_without_seccomp``.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from edge_agent.core.errors import UnavailableError
from edge_agent.runtime import landlock, seccomp

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
MAX_OPEN_FILES = 32


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def die_with(parent_pid: int) -> None:
    """Be killed when the agent ends; exit now if it already has."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the agent is gone")


def address_space_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _limit(memory_bytes: int) -> None:
    for kind, ceiling in (
        (resource.RLIMIT_AS, address_space_bytes() + memory_bytes),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        ceiling = ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard)
        resource.setrlimit(kind, (ceiling, ceiling))


def confine(model_fd: int, memory_bytes: int, *, device: bool, unsafe_without_seccomp: bool) -> tuple[str, ...]:
    """Give up everything that reading and running a model does not need. Returns the layers that hold.

    Raises ``UnavailableError`` if the kernel has no seccomp and that is not explicitly accepted.
    """
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _limit(memory_bytes)
    held = ["rlimits", "no_new_privs", "not_dumpable"]
    try:
        held.append(f"landlock {landlock.restrict(model_fd)}")
        files_restricted = True
    except OSError as error:
        held.append(f"no landlock ({error.strerror}): no file can be opened at all")
        files_restricted = False
    try:
        seccomp.install(may_open=files_restricted, device=device)
        held.append("seccomp")
    except OSError as error:
        if not unsafe_without_seccomp:
            raise UnavailableError(
                "sandbox", f"seccomp: {error.strerror}", "unsafe_without_seccomp runs models without it"
            ) from error
        held.append(f"no seccomp ({error.strerror})")
    return tuple(held)


def files_open(layers: tuple[str, ...]) -> bool:
    """Whether the model's file can still be opened by path under these layers."""
    return "seccomp" not in layers or any(layer.startswith("landlock") for layer in layers)


def allow_cpu_time(limit_s: int) -> None:
    """Move the soft CPU limit to ``limit_s`` from now: past it the kernel ends this process with SIGXCPU."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(used.ru_utime + used.ru_stime) + limit_s + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
