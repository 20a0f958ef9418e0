from __future__ import annotations

import asyncio
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store import ledger as ledger_module
from edge_agent.store.database import Database
from edge_agent.store.files import Disk
from edge_agent.store.ledger import MIGRATIONS, SCHEMA, Ledger
from ota.agent_slots import AgentSlots, launched_from
from ota.launcher import SLOTS_VARIABLE, Environment, Record, State, read_record, write_record
from ota.manifest import CHUNK_BYTES, Kind, Release, encode_release
from ota.slots import Held, IllegalMoveError
from ota.wheelhouse import FACTS, decode_facts, encode_facts, wheelhouse_files
from tests.virtual_disk import PowerCutError, VirtualDisk, survivals
from tests.wheels import facts, release_of, tiny_agent

FIRST = Environment("env-1-00000001", 1, "11" * 32, SCHEMA, SCHEMA)
SECOND = Environment("env-2-00000002", 2, "22" * 32, SCHEMA, SCHEMA)
TRIAL = Record(confirmed=FIRST, previous=Environment(reads=SCHEMA), candidate=SECOND, state=State.TRIAL, needs=SCHEMA)
MOVES: dict[str, Callable[[AgentSlots], None]] = {
    "try": AgentSlots.try_,
    "confirm": AgentSlots.confirm,
    "roll back": lambda slots: slots.roll_back("it hung"),
    "give up": AgentSlots.give_up,
    "go back": lambda slots: slots.go_back("the operator's word"),
}
LEGAL = {
    State.EMPTY: {"go back"},
    State.STAGING: set(),
    State.READY: {"try", "give up"},
    State.TRIAL: {"confirm", "roll back"},
    State.ROLLED_BACK: {"go back"},
}


def slots(folder: Path, environment: str = "", record: Record | None = None) -> AgentSlots:
    """As the agent sees them that runs from ``environment``."""
    if record is not None:
        write_record(Disk(), folder, record)
    return AgentSlots(folder, prefix=folder / environment if environment else Path("/usr"))


def install(agent: AgentSlots, release: Release, files: dict[str, Path]) -> None:
    asyncio.run(agent.install(release, files))


def said(agent: AgentSlots, environment: Environment) -> str:
    python = agent.folder / environment.folder / "bin" / "python"
    return subprocess.run([python, "-I", "-m", "tiny"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("move", MOVES)
def test_a_move_that_the_table_has_not_raises_and_changes_nothing(tmp_path: Path, state: State, move: str) -> None:
    candidate = None if state is State.EMPTY else SECOND
    agent = slots(tmp_path, SECOND.folder, replace(TRIAL, state=state, candidate=candidate))
    before = agent.record
    if move in LEGAL[state]:
        MOVES[move](agent)
        assert agent.record.counter == before.counter + 1
    else:
        with pytest.raises(IllegalMoveError, match=f"cannot {move}"):
            MOVES[move](agent)
        assert agent.record == before


@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=12), st.sampled_from([FIRST.folder, SECOND.folder, ""]))
def test_whatever_moves_come_there_is_a_confirmed_agent_and_it_is_never_the_candidate(moves: list[str], runs: str) -> None:
    folder = Path("/slots")
    disk = VirtualDisk()
    agent = Unlocked(folder, disk, folder / runs)
    write_record(disk, folder, replace(TRIAL, state=State.READY))
    for move in moves:
        before = agent.record
        try:
            MOVES[move](agent)
        except IllegalMoveError:
            assert agent.record == before
        record = agent.record
        assert record.confirmed in (Environment(reads=SCHEMA), FIRST, SECOND)
        assert record.order()[-1].folder == "", "the factory's is always the last resort"
        if before.confirmed != record.confirmed == SECOND:
            assert before.state is State.TRIAL and runs == SECOND.folder, "only who is tried confirms itself"


class Unlocked(AgentSlots):
    """On a virtual disk, where no other process is."""

    def sweep(self) -> None:
        pass

    def _move(self, change: Callable[[Record], Record]) -> None:
        record, _ = read_record(self._disk, self.folder)
        moved = change(record)
        if moved != record:
            write_record(self._disk, self.folder, moved)


@pytest.mark.parametrize("move", MOVES)
def test_19_a_power_cut_in_any_move_leaves_it_made_or_not_begun(move: str) -> None:
    folder, runs = Path("/slots"), SECOND.folder
    start = next(state for state, legal in LEGAL.items() if move in legal)
    before = VirtualDisk()
    old = write_record(before, folder, replace(TRIAL, state=start, candidate=SECOND if start is not State.EMPTY else None))
    done = VirtualDisk()
    write_record(done, folder, replace(old, counter=0))
    MOVES[move](Unlocked(folder, done, folder / runs))
    new, _ = read_record(done, folder)
    outcomes = set()
    for cut_at in range(1, 12):
        disk = before.rebooted(lambda _: True, cut_at)
        finished = False
        try:
            MOVES[move](Unlocked(folder, disk, folder / runs))
            finished = True
        except PowerCutError:
            pass
        for keeps in survivals(20):
            found, _ = read_record(disk.rebooted(keeps), folder)
            assert found in (old, new)
            assert found == new or not finished, "it had returned, and was not durable"
            outcomes.add(found.counter)
    assert len(outcomes) == 2


def test_another_agent_than_the_one_on_trial_cannot_confirm_it(tmp_path: Path) -> None:
    for environment in ("", FIRST.folder):
        with pytest.raises(IllegalMoveError, match="cannot confirm release 2"):
            slots(tmp_path, environment, TRIAL).confirm()
    assert slots(tmp_path).state is State.TRIAL


def test_what_runs_is_told_from_where_this_process_lies(tmp_path: Path) -> None:
    assert slots(tmp_path, SECOND.folder, TRIAL).running == Held(2, bytes.fromhex("22" * 32))
    assert slots(tmp_path, FIRST.folder).running.number == 1
    assert slots(tmp_path).running == Held()
    assert [slots(tmp_path, each).on_trial for each in (SECOND.folder, FIRST.folder, "")] == [True, False, False]
    assert slots(tmp_path).tell() == (Held(1, bytes.fromhex("11" * 32)), Held(2, bytes.fromhex("22" * 32)), 0)


def test_an_agent_that_no_launcher_started_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SLOTS_VARIABLE, raising=False)
    assert launched_from() is None
    monkeypatch.setenv(SLOTS_VARIABLE, "/var/lib/sly/agent")
    assert launched_from() == Path("/var/lib/sly/agent")


# building


@dataclass
class Built:
    """A first release in the slots of ``folder``, and what was seen while it was built. Each test goes on with a copy."""

    folder: Path
    release: Release
    witness: Witness
    seen: list[tuple[str, int, int]] = field(default_factory=list)

    def copied(self, folder: Path) -> AgentSlots:
        """A virtual environment works where it is copied to, but for scripts in it, and pip made none."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return slots(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    release, files = tiny_agent(folder / "one", 1, reads=SCHEMA + 2)
    made = Built(folder / "slots", release, Witness())
    agent = AgentSlots(made.folder, made.witness, Path("/usr"))
    asyncio.run(agent.install(release, files, progress=lambda *each: made.seen.append(each)))
    return made


def confirmed(built: Built, folder: Path) -> tuple[AgentSlots, Environment]:
    """The agent that runs from the first release, in a copy of its own."""
    agent = built.copied(folder)
    made = agent.record.candidate
    assert made
    agent.try_()
    slots(agent.folder, made.folder).confirm()
    return slots(agent.folder, made.folder), made


def test_a_release_is_built_tried_confirmed_and_built_upon(tmp_path: Path, built: Built) -> None:
    release, agent = built.release, built.copied(tmp_path / "unconfirmed")
    made = agent.record.candidate
    assert made and said(agent, made) == "1.0" and made.manifest == sha256(encode_release(release)).hexdigest()
    assert (agent.state, agent.record.order()[0].folder) == (State.READY, ""), "it is not started yet"
    assert ("checking wheels", release.size_bytes, release.size_bytes) in built.seen
    assert not list((agent.folder / made.folder).glob(".wheels*"))
    agent, made = confirmed(built, tmp_path / "slots")
    assert agent.tell().confirmed == Held(1, sha256(encode_release(release)).digest())

    second = slots(agent.folder, made.folder)
    python = str(agent.folder / made.folder / "bin" / "python")
    with pytest.raises(RefusedError, match="No module named pip"):
        asyncio.run(second.install(*tiny_agent(tmp_path / "two", 2), python=python))
    install(second, *tiny_agent(tmp_path / "two", 2))
    candidate = second.record.candidate
    assert candidate and said(second, candidate) == "2.0"
    assert said(second, made) == "1.0", "the one that runs was not touched"


class Witness(Disk):
    """Remembers what was made durable, and whether the record said already that it is whole."""

    def __init__(self) -> None:
        self.durable: set[int] = set()
        self.listed: dict[Path, list[str]] = {}

    def fsync(self, fd: int) -> None:
        self.durable.add(os.fstat(fd).st_ino)
        super().fsync(fd)

    def fsync_folder(self, folder: Path) -> None:
        self.durable.add(folder.stat().st_ino)
        self.listed[folder] = [path.name for path in folder.glob("env-*")]
        super().fsync_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        if source.parent == target.parent and b'"ready"' in source.read_bytes():
            built = [path for env in target.parent.glob("env-*") for path in (env, *env.rglob("*")) if not path.is_symlink()]
            late = [path for path in (target.parent, *built) if path.stat().st_ino not in self.durable]
            assert len(built) > 5 and not late
            assert self.listed[target.parent], "the name of the environment"
            self.durable.clear()
        super().rename(source, target)


def test_19_every_file_of_an_environment_is_durable_before_it_is_called_whole(built: Built) -> None:
    """``Witness`` has looked, when the record was to say so."""
    assert slots(built.folder).state is State.READY and len(built.witness.durable) == 1, "the name of the record came after"


def test_an_environment_made_from_another_does_not_lean_on_it(tmp_path: Path) -> None:
    """The interpreter behind both is the same, and the one that ran when it was made may go."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "running")], check=True)
    script = [str(tmp_path / "running" / "bin" / "python"), "-I", "-m", "venv", "--without-pip", str(tmp_path / "new")]
    subprocess.run(script, check=True)
    shutil.rmtree(tmp_path / "running")
    subprocess.run([tmp_path / "new" / "bin" / "python", "-I", "-c", "import json"], check=True)


def test_only_two_environments_stay_and_never_the_one_that_runs_goes(tmp_path: Path, built: Built) -> None:
    folder = tmp_path / "slots"
    agent, _ = confirmed(built, folder)
    for number in (2, 3):
        install(agent, *tiny_agent(tmp_path / str(number), number))
        made = agent.record.candidate
        assert made
        agent.try_()
        agent = slots(folder, made.folder)
        agent.confirm()
        assert agent.environment in {path.name for path in folder.glob("env-*")}
        assert len(list(folder.glob("env-*"))) <= 2
    assert agent.record.previous and said(agent, agent.record.previous) == "2.0"


@pytest.mark.parametrize(
    "state", [State.STAGING, *(pytest.param(state, marks=pytest.mark.long) for state in (State.READY, State.ROLLED_BACK))]
)
def test_what_lay_in_the_slot_is_replaced_by_what_is_built_from_nothing(tmp_path: Path, state: State) -> None:
    agent = slots(tmp_path, "", Record(candidate=SECOND, state=state))
    torn = tmp_path / SECOND.folder / "bin"
    torn.mkdir(parents=True)
    (torn / "python").write_text("half of")
    install(agent, *tiny_agent(tmp_path / "new", 3))
    assert not torn.exists() and agent.record.candidate and said(agent, agent.record.candidate) == "3.0"


def test_nothing_is_built_while_another_is_on_trial(tmp_path: Path) -> None:
    agent = slots(tmp_path, SECOND.folder, TRIAL)
    with pytest.raises(IllegalMoveError, match="cannot install while trial"):
        install(agent, *tiny_agent(tmp_path / "new", 3))
    assert agent.record.candidate == SECOND


def test_after_a_crash_within_a_build_the_start_gives_it_up_and_takes_its_bytes_away(tmp_path: Path) -> None:
    agent = slots(tmp_path, "", Record(confirmed=FIRST, candidate=SECOND, state=State.STAGING))
    for name in (FIRST.folder, SECOND.folder, "env-9-deadbeef"):
        (tmp_path / name).mkdir()
    agent.recover()
    assert (agent.state, [path.name for path in tmp_path.glob("env-*")]) == (State.EMPTY, [FIRST.folder])


def refused(tmp_path: Path, release: Release, files: dict[str, Path], words: str) -> None:
    agent = slots(tmp_path / "slots", "", None)
    with pytest.raises(RefusedError, match=words):
        install(agent, release, files)
    assert agent.state is State.EMPTY and not list(agent.folder.glob("env-*"))


def test_a_model_in_the_place_of_an_agent_is_refused(tmp_path: Path) -> None:
    release, files = tiny_agent(tmp_path, 1)
    refused(tmp_path, replace(release, model="faces", kind=Kind.PERCEPTION), files, "got perception; allowed: an agent's")


def test_11_a_wheel_that_was_changed_between_fetch_and_use_is_refused(tmp_path: Path) -> None:
    release, files = tiny_agent(tmp_path, 1)
    wheel = next(path for name, path in files.items() if name != FACTS)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    refused(tmp_path, release, files, r"tiny-1.0-py3-none-any.whl: got .* fetch the release again")


def test_facts_that_were_changed_are_refused(tmp_path: Path) -> None:
    release, files = tiny_agent(tmp_path, 1)
    files[FACTS].write_bytes(encode_facts(facts(needs=1)))
    refused(tmp_path, release, files, FACTS)


def test_a_file_too_many_or_too_few_is_refused(tmp_path: Path) -> None:
    release, files = tiny_agent(tmp_path, 1)
    refused(tmp_path, release, {**files, "more.whl": files[FACTS]}, "one side only has more.whl")
    refused(tmp_path, release, {FACTS: files[FACTS]}, "one side only has tiny")


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    _, files = tiny_agent(tmp_path, 1)
    (tmp_path / "evil.tar.gz").write_bytes(b"setup.py")
    files["evil.tar.gz"] = tmp_path / "evil.tar.gz"
    refused(tmp_path, release_of(1, files), files, "got evil.tar.gz; allowed: wheels and")


@pytest.mark.parametrize("changed", [{"python": "3.9"}, {"machine": "riscv64"}])
def test_wheels_for_another_python_or_machine_are_refused_before_anything_is_touched(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    refused(tmp_path, *tiny_agent(tmp_path, 1, **changed), f"on {platform.machine()}, which this board has")


def test_a_wheel_whose_dependency_is_not_in_the_release_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, *tiny_agent(tmp_path, 1, requires="Requires-Dist: absent-thing\n"), "requires absent-thing")


def test_a_new_agent_that_cannot_be_imported_here_is_never_tried(tmp_path: Path) -> None:
    refused(tmp_path, *tiny_agent(tmp_path, 1, module="import no_such_library\n"), "no_such_library")


def test_bytes_that_are_no_wheel_are_refused_in_the_words_of_pip(tmp_path: Path) -> None:
    _, files = tiny_agent(tmp_path, 1)
    wheel = next(path for name, path in files.items() if name != FACTS)
    wheel.write_bytes(b"not a zip" * CHUNK_BYTES)
    refused(tmp_path, release_of(1, files), files, "pip: ERROR")


def test_18_a_full_disk_leaves_the_slot_empty_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        agent = slots(small)
        huge = f"{'# filler' * 200_000}\n"
        with pytest.raises(UnavailableError, match="No space left"):
            install(agent, *tiny_agent(tmp_path / "new", 1, module=huge))
        assert agent.state is State.EMPTY and not list(small.glob("env-*"))
        install(agent, *tiny_agent(tmp_path / "fine", 2))
        assert agent.state is State.READY
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_build_that_is_cancelled_ends_its_children_and_leaves_the_slot_empty(tmp_path: Path) -> None:
    agent, begun = slots(tmp_path / "slots"), tmp_path / "begun"
    os.mkfifo(begun)
    module = f"import time\nbegun = open({str(begun)!r}, 'w')\ntime.sleep(3600)\n"
    release, files = tiny_agent(tmp_path, 1, module=module)

    async def cancelled() -> None:
        task = asyncio.create_task(agent.install(release, files))
        child_lives = await asyncio.to_thread(begun.open)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with child_lives:
            assert child_lives.read() == "", "this ends when no child holds it any more"

    asyncio.run(cancelled())
    assert agent.state is State.EMPTY and not list(agent.folder.glob("env-*"))


def test_a_packed_agent_is_wheels_and_its_facts(tmp_path: Path) -> None:
    _, files = tiny_agent(tmp_path / "packed", 1)
    (tmp_path / "packed" / "notes.txt").write_text("not part of it")
    assert wheelhouse_files(tmp_path / "packed") == dict(sorted(files.items()))
    (tmp_path / "packed" / FACTS).unlink()
    with pytest.raises(RefusedError, match="pack one: sly ota pack-agent"):
        wheelhouse_files(tmp_path / "packed")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"agent": "x"}', b"[" * 9999, encode_facts(facts()).replace(b'"tiny"', b"7")],
)  # fmt: skip
def test_facts_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(RefusedError, match=FACTS):
        decode_facts(data)


def test_facts_that_a_newer_packer_added_are_passed_over() -> None:
    assert decode_facts(encode_facts(facts()).replace(b"{", b'{"colour": "blue",', 1)) == facts()


# the ledger, when an agent goes back


def test_a_release_whose_ledger_the_confirmed_agent_could_not_use_is_not_installed(tmp_path: Path) -> None:
    release, files = tiny_agent(tmp_path, 1, reads=SCHEMA + 2, needs=SCHEMA + 1)
    refused(tmp_path, release, files, "release an agent between the two")


def test_a_release_that_only_adds_to_the_ledger_is_installed(built: Built) -> None:
    record = slots(built.folder).record
    assert record.state is State.READY and record.candidate and record.candidate.reads == SCHEMA + 2


def test_going_back_to_an_agent_that_could_not_use_the_ledger_is_refused(tmp_path: Path) -> None:
    agent = slots(tmp_path, SECOND.folder, Record(confirmed=SECOND, previous=replace(FIRST, reads=1), needs=2))
    with pytest.raises(RefusedError, match="a ledger that agents before schema 2 cannot use"):
        agent.go_back("the operator's word")
    assert agent.record.confirmed == SECOND


def test_a_ledger_is_no_less_demanding_after_a_trial_that_was_rolled_back(tmp_path: Path) -> None:
    """What was tried has written to it, so what is older than both may not use it any more."""
    agent = slots(
        tmp_path,
        "",
        Record(confirmed=FIRST, previous=Environment(reads=1), candidate=replace(SECOND, needs=2), state=State.READY),
    )
    agent.try_()
    agent.roll_back("it hung")
    with pytest.raises(RefusedError, match="agents before schema 2"):
        agent.go_back("the operator's word")


def test_an_older_agent_uses_a_ledger_to_which_a_newer_one_has_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.raise_high_water("floor", 3)
    with monkeypatch.context() as newer:
        newer.setattr(ledger_module, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE more (x)",)))
        with Ledger(path) as ledger:
            ledger.raise_high_water("floor", 7)
            ledger._database.execute("INSERT INTO more VALUES (1)")
    with Ledger(path) as ledger:
        assert ledger.high_water("floor") == 7, "nothing that was written on trial is lost"
        ledger.raise_high_water("floor", 8)
    monkeypatch.setattr(ledger_module, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE more (x)",), ("CREATE TABLE again (x)",)))
    with Ledger(path) as ledger:
        assert ledger._database.execute("SELECT x FROM more") == [(1,)]
        assert ledger.high_water("floor") == 8


def test_an_older_agent_refuses_a_ledger_that_a_newer_one_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    for usable_from, opens in ((0, False), (SCHEMA + 1, False), (SCHEMA, True)):
        path = tmp_path / f"{usable_from}.db"
        Database(path, (*MIGRATIONS, ("CREATE TABLE more (x)",)), usable_from=usable_from).close()
        if opens:
            Ledger(path).close()
        else:
            with pytest.raises(RefusedError, match=f"schema version {SCHEMA + 1}; allowed: schema version {SCHEMA} or older"):
                Ledger(path)


def test_a_ledger_that_was_not_added_to_is_marked_as_it_always_was(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger._database.execute("PRAGMA user_version") == [(SCHEMA,)]
