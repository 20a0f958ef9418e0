"""Updates of the agent, killed with SIGKILL at random points: ``python -m tests.killed_updates N``.

A child goes through the table with real environments, and says what it did after each move was durable.  After each kill, of that
process alone (what it had started goes on, as without a service manager), the launcher must start an agent, and the right one.
When the kill falls is decided by lines and a short random wait; nothing here depends on that wait.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from edge_agent.store.files import Disk
from ota import launcher
from ota.launcher import Environment, Record, State, read_record
from tests.wheels import bare_environment, tiny_agent

RELEASES = 40
FACTORY_AGENT = 'if __name__ == "__main__":\n    print("factory")\n'
MAX_WAIT_S = 1.2
LIMIT_S = 120

BOARD = """
import asyncio, sys
from pathlib import Path
from ota.agent_slots import AgentSlots
from ota.launcher import State
from ota.wheelhouse import wheelhouse_files
from tests.wheels import release_of

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

def of(environment):
    return AgentSlots(slots, prefix=slots / environment.folder if environment.folder else Path("/usr"))

slots, packed = Path(sys.argv[1]), Path(sys.argv[2])
of(AgentSlots(slots).record.confirmed).recover()
say("recovered")
while True:
    record = AgentSlots(slots).record
    if record.state is State.READY:
        of(record.confirmed).try_(boots=99)
        say("tried", record.candidate.number)
    elif record.state is State.TRIAL:
        agent = of(record.candidate)
        if record.candidate.number % 3:
            agent.confirm()
            say("confirmed", record.candidate.number)
        else:
            agent.roll_back("every third")
            say("returned", record.candidate.number)
    else:
        newest = max(record.confirmed.number, record.candidate.number if record.candidate else 0)
        number = newest % int(sys.argv[3]) + 1
        files = wheelhouse_files(packed / str(number))
        asyncio.run(of(record.confirmed).install(release_of(number, files), files))
        say("installed", number)
"""


def run(cycles: int, folder: Path) -> dict[str, int]:
    """Kill ``cycles`` times; how often each state was found. Raises ``AssertionError`` if no or a wrong agent started."""
    random, found = Random(1), dict.fromkeys(State, 0)
    slots, packed = folder / "slots", folder / "packed"
    for number in range(1, RELEASES + 1):
        tiny_agent(packed / str(number), number)
    factory = bare_environment(folder, "factory", FACTORY_AGENT)
    for cycle in range(cycles):
        within_a_build = cycle % 2 == 0
        lines, wait_s = (1, random.uniform(0, MAX_WAIT_S)) if within_a_build else (random.randint(2, 5), 0.0)
        said = _killed(slots, packed, lines, wait_s)
        record, complaint = read_record(Disk(), slots)
        assert not complaint
        _acknowledged_holds(said, record)
        found[record.state] += 1
        version = _started(slots, factory)
        expected = record.order()[0]
        assert version == _version(expected), f"{record} started {version}"
        for each in {record.confirmed, record.previous or record.confirmed}:
            assert not launcher.why_not(_python(slots, each, factory), "tiny"), f"{each} of {record}"
    return {state.value: count for state, count in found.items()}


def _killed(slots: Path, packed: Path, lines: int, wait_s: float) -> list[list[str]]:
    command = [sys.executable, "-c", BOARD, str(slots), str(packed), str(RELEASES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as child:
        assert child.stdout is not None
        printed = [child.stdout.readline() for _ in range(lines)]
        time.sleep(wait_s)
        child.send_signal(signal.SIGKILL)
        printed += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL, "the child ended by itself"
    return [line.split() for line in printed if line.endswith("\n")]


def _acknowledged_holds(said: list[list[str]], record: Record) -> None:
    """What was said last holds, or the move after it was made and not said any more."""
    verb, *number = said[-1]
    candidate = record.candidate.number if record.candidate else 0
    holds = {
        "recovered": True,
        "installed": [str(candidate)] == number and record.state in (State.READY, State.TRIAL),
        "tried": [str(candidate)] == number or [str(record.confirmed.number)] == number,
        "confirmed": [str(record.confirmed.number)] == number,
        "returned": [str(record.confirmed.number)] != number,
    }
    assert holds[verb], f"{' '.join(said[-1])}, and then {record}"


def _started(slots: Path, factory: Path) -> str:
    command = [sys.executable, "-I", launcher.__file__, "--folder", str(slots), "--factory", str(factory)]
    done = subprocess.run(
        [*command, "--module", "tiny", "--probe", "tiny"], capture_output=True, text=True, check=True, timeout=LIMIT_S
    )
    return done.stdout.strip()


def _version(environment: Environment) -> str:
    return f"{environment.number}.0" if environment.folder else "factory"


def _python(slots: Path, environment: Environment, factory: Path) -> Path:
    return slots / environment.folder / "bin" / "python" if environment.folder else factory


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        print(run(int(sys.argv[1]), Path(made)))
