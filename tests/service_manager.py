"""What a service manager does of the unit: starts it, hears ``READY=1`` (sd_notify(3)), ends what is late, starts again."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

READY, LATE, ENDED = "ready", "late", "ended"
NOTIFY_BYTES = 4096


class Service:
    """``Type=notify`` with ``TimeoutStartSec`` = ``start_limit_s``; what the agent prints goes to ``log``."""

    def __init__(self, command: Sequence[str], folder: Path, start_limit_s: float) -> None:
        self.log = folder / "service.log"
        self._command, self._limit_s, self._address = list(command), start_limit_s, folder / "notify.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._address))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, limit_s: float = 0) -> str:
        """One start: READY, LATE (and killed), or ENDED by itself."""
        with self.log.open("ab") as log:
            environment = {**os.environ, "NOTIFY_SOCKET": str(self._address)}
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        end = os.pidfd_open(self.process.pid)
        try:
            outcome = self._heard(end, limit_s or self._limit_s)
        finally:
            os.close(end)
        if outcome != READY:
            self.stop(signal.SIGKILL)
        return outcome

    def _heard(self, end: int, limit_s: float) -> str:
        """What it says of itself besides READY=1 is passed over, and what the one before said last."""
        until_s = time.monotonic() + limit_s
        while (left_s := until_s - time.monotonic()) > 0:
            ready, _, _ = select.select([self._socket, end], [], [], left_s)
            if self._socket in ready and b"READY=1" in self._socket.recv(NOTIFY_BYTES):
                return READY
            if ready == [end]:
                return ENDED
        return LATE

    def restart_until_ready(self, most: int) -> list[str]:
        """``Restart=always``: what became of each start."""
        seen = [self.start()]
        while seen[-1] != READY and len(seen) < most:
            seen.append(self.start())
        return seen

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGKILL)
        self._socket.close()
