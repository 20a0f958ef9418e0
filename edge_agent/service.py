"""What the service manager is told: ready, alive, stopping (sd_notify(3)).

Rules: without ``NOTIFY_SOCKET`` nothing is said; a service manager that does not listen never stops the agent.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(state: str) -> bool:
    """Send ``READY=1``, ``WATCHDOG=1``, ``STOPPING=1`` or ``STATUS=...``; ``False`` if nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(state.encode(), address)
        return True
    return False


def watchdog_period_s() -> float | None:
    """How often ``WATCHDOG=1`` is due: half of what the service manager asks for, ``None`` if it does not watch us."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 2_000_000
