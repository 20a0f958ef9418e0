from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.commands import pack_agent
from edge_agent.core.errors import ConfigError
from edge_agent.store.files import Disk
from ota import launcher
from ota.agent_slots import AgentSlots
from ota.launcher import Environment, Record, State, write_record
from ota.wheelhouse import wheelhouse_files
from tests import killed_updates
from tests.needs import needs
from tests.service_manager import ENDED, LATE, READY, Service
from tests.wheels import bare_environment, tiny_agent, wheel

UNIT = Path(__file__).resolve().parents[1] / "board_support" / "systemd" / "sly-agent.service"
START_LIMIT_S = 3.0
"""Of agents that are meant to be late; what is meant to be ready gets all the time that it needs."""
PATIENCE_S = 60.0
FEW, MANY = 3, 6
"""Kills."""

TELLS_THAT_IT_IS_READY = """
import os, signal, socket
VERSION = {version!r}
if __name__ == "__main__":
    print(VERSION, flush=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    signal.pause()
"""
NEVER_READY = """
import signal
if __name__ == "__main__":
    signal.pause()
"""
DIES = """
if __name__ == "__main__":
    os.abort()
"""


FIRST, SECOND = Environment("env-1-00000001", 1, "11" * 32), Environment("env-2-00000002", 2, "22" * 32)


class Board:
    """The factory's agent and release 1 confirmed upon it, run as the unit says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.slots = folder, folder / "slots"
        factory = bare_environment(folder, "factory", killed_updates.FACTORY_AGENT)
        bare_environment(self.slots, FIRST.folder, TELLS_THAT_IT_IS_READY)
        write_record(Disk(), self.slots, Record(confirmed=FIRST))
        words = ["--folder", str(self.slots), "--factory", str(factory), "--module", "tiny", "--probe", "tiny"]
        self.service = Service([sys.executable, "-I", launcher.__file__, *words], folder, PATIENCE_S)

    def agent(self, candidate: bool = False) -> AgentSlots:
        record = AgentSlots(self.slots).record
        each = record.candidate if candidate else record.confirmed
        return AgentSlots(self.slots, prefix=self.slots / each.folder if each and each.folder else Path("/usr"))

    def try_second(self, module: str, **trial: int) -> None:
        """As if it had been installed."""
        bare_environment(self.slots, SECOND.folder, module)
        write_record(Disk(), self.slots, Record(confirmed=FIRST, candidate=SECOND, state=State.READY, counter=1))
        self.agent().try_(**trial)

    def install(self, number: int, module: str) -> None:
        asyncio.run(self.agent().install(*tiny_agent(self.folder / str(number), number, module)))

    def runs(self) -> str:
        assert self.service.process is not None
        return Path(f"/proc/{self.service.process.pid}/cmdline").read_bytes().split(b"\0")[0].decode().split("/")[-3][:5]


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    made = Board(tmp_path)
    with made.service:
        yield made


def test_a_new_agent_that_becomes_ready_and_confirms_stays(board: Board) -> None:
    assert (board.service.start(), board.runs()) == (READY, "env-1")
    board.install(2, TELLS_THAT_IT_IS_READY)
    board.agent().try_()
    board.service.stop()
    assert (board.service.start(), board.runs()) == (READY, "env-2")
    board.agent(candidate=True).confirm()
    board.service.stop(signal.SIGKILL)
    assert (board.service.start(), board.runs()) == (READY, "env-2")


def test_22_a_new_agent_that_dies_at_each_start_is_left_after_its_starts(board: Board) -> None:
    board.try_second(DIES)
    assert board.service.restart_until_ready(10) == [ENDED] * 3 + [READY]
    assert board.runs() == "env-1" and board.agent().record.why == "3 starts without confirmation"


def test_22_a_new_agent_that_never_becomes_ready_is_left_after_its_starts(board: Board) -> None:
    board.try_second(NEVER_READY, boots=1)
    assert board.service.start(START_LIMIT_S) == LATE
    assert (board.service.start(), board.runs()) == (READY, "env-1")


def test_22_a_new_agent_that_is_ready_and_never_confirms_is_left_when_its_time_is_up(board: Board) -> None:
    board.try_second(TELLS_THAT_IT_IS_READY, trial_s=1)
    assert (board.service.start(), board.runs()) == (READY, "env-2")
    assert board.service.process is not None and board.service.process.wait(PATIENCE_S) == -signal.SIGTERM
    assert (board.service.start(), board.runs()) == (READY, "env-1")
    assert board.agent().state is State.ROLLED_BACK


def test_an_upgrade_of_the_distribution_that_takes_every_slot_leaves_the_factory_agent(board: Board) -> None:
    for folder in board.slots.glob("env-*"):
        shutil.rmtree(folder / "lib")
    assert board.service.start() == ENDED, "the factory's says its name and ends: it is no service here"
    assert board.service.log.read_text().endswith("factory\n")


@pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
def test_19_a_kill_at_any_point_of_an_update_leaves_an_agent_that_runs_and_the_right_one(kills: int, tmp_path: Path) -> None:
    assert sum(killed_updates.run(kills, tmp_path).values()) == kills


# the unit


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    needs(shutil.which("systemd-analyze"), "systemd-analyze is not installed (apt-get install systemd)")
    needs(Path("/usr/bin/python3").exists(), "there is no /usr/bin/python3, which /opt/sly/python leads to")
    for each in UNIT.parent.glob("*.service"):
        (tmp_path / each.name).write_text(each.read_text().replace("=/opt/sly/python ", "=/usr/bin/python3 "))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stderr) == (0, "")


def setting(name: str) -> str:
    found = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


def test_no_limit_of_starts_stops_the_fall_back() -> None:
    assert (setting("StartLimitIntervalSec"), setting("Restart")) == ("0", "always")
    assert "RestartPreventExitStatus" not in UNIT.read_text()


def test_the_unit_starts_a_launcher_that_no_update_reaches_and_that_takes_its_words() -> None:
    words = setting("ExecStart").split()
    assert words[:3] == ["/opt/sly/python", "-I", "/opt/sly/launcher.py"]
    args = launcher._parser().parse_args(words[3:])
    assert args.words == ["--", "agent", "--config", "/etc/sly/agent.toml"]
    assert args.folder.is_relative_to("/var/lib/sly") and not args.factory.is_relative_to(args.folder)


def test_the_times_of_the_unit_leave_room_for_what_they_bound() -> None:
    from edge_agent.agent import DRAIN_S

    assert float(setting("TimeoutStopSec")) > DRAIN_S
    assert float(setting("TimeoutStartSec")) > launcher.PROBE_LIMIT_S * 2
    assert launcher.GRACE_S > DRAIN_S


# packing


def test_a_folder_that_exists_is_not_packed_into(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a name that is free"):
        pack_agent.pack(tmp_path, "", "3.11", "x86_64", [], print)


def test_what_is_no_agent_is_not_packed_and_leaves_nothing(tmp_path: Path) -> None:
    for source, words in ((str(tmp_path), "a checkout of slyos-edge"), (str(wheel(tmp_path, "odd", "1", {})), "which schema")):
        with pytest.raises(ConfigError, match=words):
            pack_agent.pack(tmp_path / "out", source, "3.11", "x86_64", [], lambda text: None)
        assert not (tmp_path / "out").exists()


def test_what_the_agent_says_of_its_ledger_is_read_from_its_wheel_and_not_from_what_runs_here(tmp_path: Path) -> None:
    ledger = "SCHEMA, USABLE_FROM = 9, 7\n"
    files = {"edge_agent/__init__.py": "", "edge_agent/store/__init__.py": "", "edge_agent/store/ledger.py": ledger}
    facts = pack_agent._facts(wheel(tmp_path, "slyos_edge", "9.9", files), "3.13", "aarch64")
    assert (facts.agent, facts.reads, facts.needs, facts.python, facts.machine) == ("slyos_edge-9.9", 9, 7, "3.13", "aarch64")


def test_versions_of_an_earlier_pack_are_asked_for_again(tmp_path: Path) -> None:
    _, files = tiny_agent(tmp_path / "packed", 1)
    wheel(tmp_path / "packed", "slyos_edge", "0.1", {})
    wheel(tmp_path / "packed", "numpy", "2.4.6", {})
    assert pack_agent._pinned(tmp_path / "packed") == ["numpy==2.4.6", "tiny==1.0"]
    assert set(wheelhouse_files(tmp_path / "packed")) > set(files)


def test_wheels_for_boards_are_chosen_by_python_machine_and_c_library() -> None:
    chosen = pack_agent._chosen_for("3.10", "aarch64")
    assert "--platform=manylinux_2_35_aarch64" in chosen and "--platform=manylinux_2_36_aarch64" not in chosen
    assert chosen[:3] == ["--only-binary=:all:", "--python-version", "3.10"]
