"""A whole fleet on one machine: real agents in real processes, for the demo, the tests and the benchmarks.

Owns the folders, configurations and processes.  Rules: readiness is what the agents say through ``sd_notify``; every process
is ended by its own process id; nothing outside ``folder`` is written.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from board_support.device_root import DeviceRoot
from edge_agent.core.cose import Signer
from edge_agent.core.errors import UnavailableError
from edge_agent.gateway.local import LocalConnection
from edge_agent.store.identity import load_or_make_seed

READY_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
NOTIFY_BYTES = 4096
LAST_WORDS_LINES = 3


@dataclass(frozen=True, slots=True)
class Member:
    """One board of a local fleet: an emulated board of this profile."""

    board: str
    profile: str


class LocalFleet:
    """``start`` brings every agent up; as a context manager, the fleet lives for the time of the block.

    With ``broker_port`` 0 every board stands alone.
    """

    def __init__(
        self, folder: Path, members: Iterable[Member], models: Iterable[str], broker_port: int, *,
        name: str = "demo", settings: str = "", models_folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.name = folder, name
        self.members = {member.board: member for member in members}
        self.models, self._broker_port, self._settings = list(models), broker_port, settings
        self._models_folder = models_folder
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self.keys: Mapping[str, bytes] = {}
        self.roots: Mapping[str, bytes] = {}

    def socket_of(self, board: str) -> Path:
        return self.folder / board / "agent.sock"

    def log_of(self, board: str) -> Path:
        return self.folder / board / "agent.log"

    def prepare(self) -> None:
        """Make the boards' folders, keys and configurations."""
        for board in self.members:
            (self.folder / board).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.keys = {
            board: Signer(board.encode(), load_or_make_seed(self.folder / board / "identity.key")).public_key
            for board in self.members
        }
        self.roots = {
            board: DeviceRoot(load_or_make_seed(self.folder / board / "device_root.key")).public_key for board in self.members
        }
        for member in self.members.values():
            (self.folder / member.board / "agent.toml").write_text(self._configuration(member))

    def start(self, boards: Iterable[str] | None = None) -> None:
        """Start agents and wait until each is ready. Raises ``UnavailableError`` with the last words of one that is not."""
        wanted = list(self.members if boards is None else boards)
        with _ReadyWatch(self.folder) as watch:
            for board in wanted:
                self._agents[board] = self._spawn(board, watch.path)
            watch.wait({self._agents[board].pid: board for board in wanted}, self._must_live)

    def wait_acquainted(self, boards: Iterable[str]) -> None:
        """Return when each of ``boards`` knows that all of them are online."""
        names = list(boards)
        for board in names:
            with LocalConnection(self.socket_of(board)) as connection:
                connection.call("status", len(names), timeout_s=READY_LIMIT_S)

    def pid_of(self, board: str) -> int:
        return self._agents[board].pid

    def kill(self, board: str) -> None:
        """End an agent as a pulled plug would."""
        self._agents[board].kill()
        self._agents[board].wait()

    def stop(self) -> list[int]:
        """Let every agent drain and end; their exit codes."""
        alive = [agent for agent in self._agents.values() if agent.poll() is None]
        for agent in alive:
            agent.send_signal(signal.SIGTERM)
        codes = [_ended(agent) for agent in alive]
        self._agents.clear()
        return codes

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            for agent in self._agents.values():
                agent.kill()
        self.stop()

    def _configuration(self, member: Member) -> str:
        keys = "\n".join(f'{board} = "{key.hex()}"' for board, key in self.keys.items())
        roots = "\n".join(f'{board} = "{key.hex()}"' for board, key in self.roots.items())
        serve = ", ".join(f'"{model}"' for model in self.models)
        return (
            f'[board]\nid = "{member.board}"\nbackend = "jalapeno"\nprofile = "{member.profile}"\n\n'
            f'[state]\nfolder = "{self.folder / member.board}"\n\n'
            f"{self._broker()}"
            f'[models]\nserve = [{serve}]\nfolder = "{self._models_folder or ""}"\n\n{self._settings}\n'
            f'[fleet]\nname = "{self.name}"\n\n[fleet.members]\n{keys}\n\n[fleet.endorsers]\n{roots}\n'
        )

    def _broker(self) -> str:
        if not self._broker_port:
            return ""
        return f'[broker]\nhost = "127.0.0.1"\nport = {self._broker_port}\nkeepalive_s = 5\nreconnect_max_ms = 500\n\n'

    def _spawn(self, board: str, notify_path: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "edge_agent.cli", "agent", "--config", str(self.folder / board / "agent.toml")]
        environment = {**os.environ, "NOTIFY_SOCKET": str(notify_path)}
        with self.log_of(board).open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def _must_live(self, board: str) -> None:
        code = self._agents[board].poll()
        if code is not None:
            lines = self.log_of(board).read_text("utf-8", "replace").splitlines()
            words = " | ".join(lines[-LAST_WORDS_LINES:])
            raise UnavailableError(f"agent {board}", f"it ended with code {code} before it was ready: {words}")


class _ReadyWatch:
    """The service manager's end of ``sd_notify``: learns from the kernel which process said ``READY=1``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify.sock"

    def __enter__(self) -> _ReadyWatch:
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self.path))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def wait(self, boards: dict[int, str], must_live: Callable[[str], None]) -> None:
        """Return when every process has said it is ready; ``must_live`` raises for the board of one that ended before."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            ends = {os.pidfd_open(pid): board for pid, board in boards.items()}
            try:
                for end in ends:
                    selector.register(end, selectors.EVENT_READ)
                while boards:
                    found = selector.select(READY_LIMIT_S)
                    if not found:
                        names = ", ".join(boards.values())
                        raise UnavailableError(f"agents {names}", f"not ready within {READY_LIMIT_S:g} s", "see their logs")
                    for key, _ in found:
                        if key.fileobj is self._socket:
                            boards.pop(self._who_is_ready(), None)
                        else:
                            must_live(ends[int(key.fd)])
            finally:
                for end in ends:
                    os.close(end)

    def _who_is_ready(self) -> int:
        data, ancillary, _, _ = self._socket.recvmsg(NOTIFY_BYTES, socket.CMSG_SPACE(12))
        if b"READY=1" not in data:
            return 0
        return int.from_bytes(ancillary[0][2][:4], sys.byteorder)


def _ended(agent: subprocess.Popen[bytes]) -> int:
    try:
        return agent.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        agent.kill()
        return agent.wait()
