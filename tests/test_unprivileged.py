"""The agent as a board runs it: its own user, no capability, and an engine child that gets at nothing of that user's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.client import Client
from edge_agent.core.errors import UnavailableError
from tests.fetched import model_path, picture_path
from tests.needs import needs
from tests.odd_engines import PROBES
from tests.passable import passable
from tests.service_manager import READY, Service
from tests.taken_over import AGENTS_PROCESS

ROOT = Path(__file__).resolve().parents[1]
MODEL = "blazeface-short"
NEEDED = sorted({ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()})
START_LIMIT_S = 120.0
FIRST_UID = 60_100
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def as_user(uid: int, *command: str) -> list[str]:
    """As the unit has it: User=, CapabilityBoundingSet= and AmbientCapabilities= of nothing, NoNewPrivileges."""
    who = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    what = ("--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs")
    return passable(NEEDED, ["setpriv", *who, *what, *command])


def run_as(uid: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        as_user(uid, *command), capture_output=True, text=True, errors="replace", timeout=START_LIMIT_S, cwd="/"
    )


@pytest.fixture(scope="module")
def uid() -> int:
    """A number that no user has; nobody needs to be made."""
    needs(os.geteuid() == 0, "only root can become another user")
    needs(shutil.which("setpriv"), "setpriv is not installed (apt-get install util-linux)")
    free = next(uid for uid in range(FIRST_UID, FIRST_UID + 4000) if unknown(uid) and unknown(uid + 1))
    can = run_as(free, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", "import edge_agent.agent")
    needs(can.returncode == 0, f"another user cannot run this checkout: {can.stderr.strip()[-200:]}")
    return free


def unknown(uid: int) -> bool:
    return not any(line.split(":")[2] == str(uid) for line in Path("/etc/passwd").read_text().splitlines())


class Unprivileged:
    """The real agent below ``folder``, in its state folder ``state``, started by a service manager's ways."""

    def __init__(self, folder: Path, uid: int, module: str) -> None:
        self.state, self.uid = folder / "state", uid
        models = folder / "models"
        models.mkdir()
        shutil.copy(model_path(MODEL), models)
        config = folder / "agent.toml"
        config.write_text(
            f'[board]\nid = "kitchen"\nbackend = "jalapeno"\nprofile = "raspberry_pi_5"\n[state]\nfolder = "{self.state}"\n'
            f'[models]\nserve = ["{MODEL}"]\nfolder = "{models}"\n'
        )
        os.chown(config, 0, uid)
        config.chmod(0o640)
        self.state.mkdir(mode=0o700)
        os.chown(self.state, uid, uid)
        words = [sys.executable, "-m", module, "agent", "--config", str(config)]
        self.service = Service(as_user(uid, "env", "-C", str(self.state), f"PYTHONPATH={ROOT}", *words), folder, START_LIMIT_S)
        (folder / "notify.sock").chmod(0o777)

    @property
    def pid(self) -> int:
        assert self.service.process is not None
        return self.service.process.pid

    @property
    def engine(self) -> int:
        """The child that holds the model, by /proc alone."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        found = [int(pid) for pid in children if b"edge_agent.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(found) == 1
        return found[0]

    def ask(self) -> Client:
        return Client(self.state / "agent.sock")


@contextmanager
def unprivileged(uid: int, module: str = "edge_agent.cli") -> Iterator[Unprivileged]:
    """In a folder that others may pass: what is shut is the agent's own doing."""
    with tempfile.TemporaryDirectory(prefix="sly-unprivileged-") as made:
        folder = Path(made)
        folder.chmod(0o755)
        agent = Unprivileged(folder, uid, module)
        with agent.service:
            assert agent.service.start() == READY, agent.service.log.read_text()
            yield agent


@pytest.fixture(scope="module")
def agent(uid: int) -> Iterator[Unprivileged]:
    with unprivileged(uid) as running:
        yield running


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_agent_answers_as_its_own_user_with_no_capability(agent: Unprivileged) -> None:
    with agent.ask() as client:
        assert [each.label for each in client.look("detect_faces", picture_path("grace_hopper")).findings] == ["face"]
    of_agent = status(agent.pid)
    assert of_agent["Uid"].split() == of_agent["Gid"].split() == [str(agent.uid)] * 4
    assert {name: int(of_agent[name], 16) for name in CAPABILITIES} == dict.fromkeys(CAPABILITIES, 0)
    assert (of_agent["NoNewPrivs"], of_agent["Groups"]) == ("1", "")


def test_its_engine_has_the_same_user_no_capability_and_a_filter(agent: Unprivileged) -> None:
    of_engine = status(agent.engine)
    assert of_engine["Uid"].split() == [str(agent.uid)] * 4
    assert {name: int(of_engine[name], 16) for name in CAPABILITIES} == dict.fromkeys(CAPABILITIES, 0)
    assert (of_engine["NoNewPrivs"], of_engine["Seccomp"]) == ("1", "2")


def test_the_kernel_holds_no_socket_of_the_engine_but_the_one_to_its_agent(agent: Unprivileged) -> None:
    """What sockets a process has, by proc(5); those to the agent are pairs without a name."""
    held = [os.readlink(path) for path in Path(f"/proc/{agent.engine}/fd").iterdir()]  # noqa: PTH115
    numbers = [each[len("socket:[") : -1] for each in held if each.startswith("socket:[")]
    unix = {line.split()[6]: line.split()[7:] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    assert [unix.get(number) for number in numbers] == [[]]


def test_a_model_that_took_the_engine_over_gets_no_socket_no_key_and_nothing_of_its_agents_process(uid: int) -> None:
    with unprivileged(uid, "tests.taken_over") as agent, agent.ask() as client:
        with pytest.raises(UnavailableError) as failed:
            client.look("detect_faces", picture_path("grace_hopper"))
        told = re.search(r"before: (.*); tried ([0-9]+); got: (.*)\.", str(failed.value))
        assert told and (int(told[2]), told[3]) == (len(PROBES) + len(AGENTS_PROCESS), "nothing"), failed.value
        assert set(told[1].split("+")) >= set(AGENTS_PROCESS) - {"the agent's memory"}, "only the sandbox stood in the way"
        assert status(agent.engine)["Uid"].split() == status(agent.pid)["Uid"].split()


def test_another_user_reads_no_state_no_key_no_configuration_and_reaches_no_socket(agent: Unprivileged) -> None:
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    tries = {
        "state": ("ls", str(agent.state)),
        "key": ("cat", str(agent.state / "identity.key")),
        "configuration": ("cat", str(agent.state.parent / "agent.toml")),
        "socket": (sys.executable, "-I", "-c", connect, str(agent.state / "agent.sock")),
        "memory": ("cat", f"/proc/{agent.pid}/environ"),
    }
    assert {what: denied(agent.uid + 1, command) for what, command in tries.items()} == dict.fromkeys(tries, True)
    own = {what: denied(agent.uid, command) for what, command in tries.items()}
    assert own == dict.fromkeys(tries, False), "the tries themselves are sound"


def denied(uid: int, command: Sequence[str]) -> bool:
    done = run_as(uid, *command)
    assert (done.returncode == 0) != ("Permission denied" in done.stderr), done.stderr
    return done.returncode != 0


def test_what_it_keeps_is_its_own_alone(agent: Unprivileged) -> None:
    found = [path for path in agent.state.rglob("*") if not path.is_symlink()]
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in found} == {(agent.uid, agent.uid)}
    assert (agent.state / "identity.key").stat().st_mode & 0o777 == 0o600
    assert agent.state.stat().st_mode & 0o777 == 0o700


def test_it_ends_in_order_when_it_is_told_to(uid: int) -> None:
    with unprivileged(uid) as agent:
        assert agent.service.stop(signal.SIGTERM) == 0
        assert not re.search("Traceback|Permission denied|not permitted", agent.service.log.read_text())
