"""The agent's own release all the way: pushed by ``sly ota push``, built beside the agent that runs, started by the launcher.

The releases are small and real: a wheel that takes this checkout into an environment of its own, so that the agent in it is this
one under another version.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import distribution
from pathlib import Path

import pytest

from edge_agent.shell.updating import DISTRIBUTION
from ota import launcher
from ota.agent_slots import AgentSlots
from ota.launcher import Record, State
from ota.manifest import AGENT
from ota.wheelhouse import FACTS, encode_facts
from tests.enrolled_fleet import MODEL, EnrolledAgents, enrolled, sly, told
from tests.fetched import model_path
from tests.operators import broker_of, new_fleet
from tests.service_manager import ENDED, READY, Service
from tests.wheels import facts, wheel

BOARD = "kitchen"
STARTS = 3
SETTINGS = {"ota": f"confirm_s = 1\ntrial_boots = {STARTS}\n", "attest": "epoch_s = 600\n"}
PATIENCE_S = 120.0
DIES = """
import os, sys
if "agent" in sys.orig_argv:
    os._exit(7)
"""
"""Where nobody but who is started as an agent notices."""


def packed(folder: Path, version: str, **modules: str) -> Path:
    """A wheelhouse: what is installed is this checkout with what it needs, and ``modules``, imported by every Python there."""
    folder.mkdir()
    paths = [path for path in (str(Path(__file__).parents[1]), *sys.path) if Path(path).is_dir()]
    lines = [*paths, *(f"import {name}" for name in modules)]
    files = {"this_checkout.pth": "\n".join(lines) + "\n", **{f"{name}.py": text for name, text in modules.items()}}
    boards = distribution(DISTRIBUTION).read_text("entry_points.txt") or ""
    wheel(folder, "slyos_edge", version, {**files, f"slyos_edge-{version}.dist-info/entry_points.txt": boards})
    (folder / FACTS).write_bytes(encode_facts(facts(agent=f"slyos_edge-{version}", probe="edge_agent.agent")))
    return folder


class Board:
    """A board of a fleet whose agent is kept running, as systemd does by ``Restart=always``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.slots = folder, folder / "slots"
        self.operator = new_fleet(folder / "op")
        state = enrolled(self.operator, folder, BOARD, "jalapeno", SETTINGS)
        self.agents = EnrolledAgents(folder, [BOARD])
        words = ["--folder", str(self.slots), "--factory", sys.executable, "--", "agent", "--config", str(state / "agent.toml")]
        self.service = Service([sys.executable, "-I", launcher.__file__, *words], folder, PATIENCE_S)
        self.starts: list[str] = []
        self._ending = False
        self._changed = threading.Condition()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def start(self) -> None:
        self._keeper.start()
        self.wait_ready(0)

    def _keep(self) -> None:
        while not self._ending:
            outcome = self.service.start()
            with self._changed:
                self.starts.append(outcome)
                self._changed.notify_all()
            if outcome == READY and self.service.process is not None:
                self.service.process.wait()

    def wait_ready(self, before: int) -> None:
        """Another start than the first ``before`` was a good one."""
        with self._changed:
            assert self._changed.wait_for(lambda: READY in self.starts[before:], PATIENCE_S), self.last_words()

    def wait_for(self, holds: Callable[[], object]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < until_s, self.last_words()
            time.sleep(0.01)

    def kill(self) -> None:
        """As a power cut ends it; what it had started ends with it, as under systemd."""
        assert self.service.process is not None
        agent = self.service.process
        children = [pid for path in Path(f"/proc/{agent.pid}/task").glob("*/children") for pid in path.read_text().split()]
        agent.kill()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    @property
    def record(self) -> Record:
        return AgentSlots(self.slots).record

    def runs(self) -> str:
        """The folder of the environment that the agent runs from."""
        assert self.service.process is not None
        python = Path(f"/proc/{self.service.process.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        return python.split("/")[-3] if str(self.slots) in python else launcher.FACTORY

    def serves(self) -> bool:
        return self.agents.served_by(BOARD) == sha256(model_path(MODEL).read_bytes()).digest()

    def version(self) -> str:
        return str(told(self.operator, "fleet", "show", BOARD)["agent"])

    def last_words(self) -> str:
        return f"{self.starts}: {self.service.log.read_text('utf-8', 'replace')[-4000:]}"

    def end(self) -> None:
        self._ending = True
        assert self.service.process is not None
        self.service.process.send_signal(signal.SIGTERM)
        self._keeper.join(PATIENCE_S)


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    made = Board(tmp_path_factory.mktemp("push"))
    with broker_of(made.operator), made.service:
        assert sly(made.operator, "fleet", "publish").returncode == 0
        made.start()
        try:
            yield made
        finally:
            made.end()


def test_a_new_agent_is_built_started_and_confirmed_though_the_power_fails_while_it_is_built(board: Board) -> None:
    before, starts = board.record.confirmed.folder, len(board.starts)
    wheels = packed(board.folder / "good", "9.1")
    with ThreadPoolExecutor(1) as beside:
        pushing = beside.submit(sly, board.operator, "ota", "push", str(wheels))
        board.wait_for(lambda: board.record.state is State.STAGING or pushing.done())
        board.kill()
    pushed = pushing.result()
    assert pushed.returncode == 0, f"{pushed.stderr} {board.last_words()}"
    record = board.record
    assert board.runs() == record.confirmed.folder != before, board.last_words()
    assert record.previous is not None and record.previous.folder == before
    assert record.state is State.EMPTY and board.starts[starts:] == [READY, READY]
    assert board.version() == "9.1" and board.serves()


def test_22_a_new_agent_that_never_becomes_ready_is_left_and_the_fleet_hears_why(board: Board) -> None:
    before, version, starts = board.record.confirmed.folder, board.version(), len(board.starts)
    wheels = packed(board.folder / "dies", "9.2", dies_as_an_agent=DIES)
    pushed = sly(board.operator, "ota", "push", str(wheels))
    assert pushed.returncode == 1, f"{pushed.stderr} {board.last_words()}"
    why = f"{STARTS} starts without confirmation"
    assert f"{BOARD}: failed: {why}" in pushed.stdout and f"of {AGENT}" in pushed.stdout
    assert board.starts[starts:] == [ENDED] * STARTS + [READY], board.last_words()
    assert board.runs() == board.record.confirmed.folder == before and board.record.why == why
    assert board.version() == version and board.serves()


def test_a_new_agent_that_its_operator_takes_back_makes_room_for_the_one_before(board: Board) -> None:
    before, version = board.record.confirmed.folder, board.version()
    pushed = sly(board.operator, "ota", "push", str(packed(board.folder / "regretted", "9.3")))
    assert pushed.returncode == 0 and board.version() == "9.3", f"{pushed.stderr} {board.last_words()}"
    starts = len(board.starts)
    taken_back = sly(board.operator, "ota", "rollback", AGENT, "--reason", "regretted")
    assert taken_back.returncode == 0, f"{taken_back.stderr} {board.last_words()}"
    board.wait_ready(starts)
    assert board.runs() == board.record.confirmed.folder == before, board.last_words()
    assert board.version() == version and board.serves()
