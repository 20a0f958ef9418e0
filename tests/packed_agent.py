"""The real agent, packed with all its wheels, updates itself on this machine: ``python -m tests.packed_agent [FOLDER]``.

Packs this checkout (or takes ``FOLDER``, a pack of before), builds it beside the agent that runs here, starts it by the launcher
with an emulated board, confirms it from within its own environment, tries it again as a release that breaks, and prints how long
each took.  It needs the package index, so it is no part of the tests: ``make packed-agent``.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.commands.pack_agent import here, pack
from ota import launcher
from ota.agent_slots import AgentSlots
from ota.launcher import Environment, State
from ota.wheelhouse import decode_facts, wheelhouse_files
from tests.service_manager import READY, Service
from tests.wheels import release_of

PATIENCE_S = 300.0
CONFIRM = "import sys; from pathlib import Path; from ota.agent_slots import AgentSlots; AgentSlots(Path(sys.argv[1])).confirm()"


def run(packed: Path, folder: Path) -> None:
    slots = folder / "slots"
    with _service(folder, slots) as service:
        with _timed("the factory's agent starts"):
            assert service.start() == READY
        made = _installed(AgentSlots(slots), packed, 1)
        AgentSlots(slots).try_()
        service.stop()
        with _timed("release 1 starts, on trial"):
            assert service.start() == READY
        assert _runs_from(service) == made.folder
        subprocess.run([slots / made.folder / "bin" / "python", "-I", "-c", CONFIRM, slots], check=True)
        assert AgentSlots(slots).record.confirmed == made
        _memory(service)
        own = AgentSlots(slots, prefix=slots / made.folder)
        second = _installed(own, packed, 2, str(slots / made.folder / "bin" / "python"))
        shutil.rmtree(next((slots / second.folder / "lib").glob("python*")) / "site-packages" / "nacl")
        own.try_()
        assert service.stop() == 0
        with _timed("release 2 was broken, and release 1 starts instead"):
            assert service.start() == READY
        assert _runs_from(service) == made.folder and AgentSlots(slots).state is State.ROLLED_BACK
        print(f"why: {AgentSlots(slots).record.why}")
        assert service.stop() == 0


def _installed(agent: AgentSlots, packed: Path, number: int, python: str = sys.executable) -> Environment:
    files = wheelhouse_files(packed)
    with _timed(f"release {number} is built by {'the factory' if number == 1 else 'release 1'}"):
        asyncio.run(agent.install(release_of(number, files), files, python))
    made = agent.record.candidate
    assert made
    size_bytes = sum(path.lstat().st_size for path in (agent.folder / made.folder).rglob("*"))
    print(f"{size_bytes / 2**20:8.1f} MiB  release {number} on the disk")
    return made


def _service(folder: Path, slots: Path) -> Service:
    config = folder / "agent.toml"
    config.write_text(
        f'[board]\nid = "kitchen"\nbackend = "jalapeno"\nprofile = "raspberry_pi_5"\n[state]\nfolder = "{folder / "state"}"\n'
    )
    words = ["--folder", str(slots), "--factory", sys.executable, "--", "agent", "--config", str(config)]
    return Service([sys.executable, "-I", launcher.__file__, *words], folder, PATIENCE_S)


def _runs_from(service: Service) -> str:
    assert service.process is not None
    return Path(f"/proc/{service.process.pid}/cmdline").read_bytes().split(b"\0")[0].decode().split("/")[-3]


def _memory(service: Service) -> None:
    """Of the agent, and of the guard of its trial if that lives still (proc(5), smaps_rollup)."""
    assert service.process is not None
    guards = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"launcher.py" in path.read_bytes()]
    for what, pid in (("the agent", service.process.pid), *(("the guard of the trial", int(each.parts[2])) for each in guards)):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        print(f"{int(next(line for line in lines if line.startswith('Pss:')).split()[1]) / 1024:8.1f} MiB  PSS of {what}")


@contextmanager
def _timed(what: str) -> Iterator[None]:
    began_s = time.monotonic()
    yield
    print(f"{time.monotonic() - began_s:8.1f} s    {what}", flush=True)


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="sly-packed-") as made:
        folder = Path(made)
        packed = Path(arguments[0]) if arguments else folder / "packed"
        if not arguments:
            with _timed("packed"):
                pack(packed, "", *here(), [], lambda text: print(text, file=sys.stderr))
        print(decode_facts((packed / "wheelhouse.json").read_bytes()))
        run(packed, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
