from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.store.files import Disk
from ota import launcher
from ota.launcher import (
    RECORDS,
    Environment,
    Launcher,
    Record,
    State,
    decode,
    encode,
    locked,
    read_record,
    why_not,
    write_record,
)
from tests.virtual_disk import VirtualDisk, crashes
from tests.wheels import bare_environment

FIRST = Environment("env-1-00000001", 1, "11" * 32, 2, 2)
SECOND = Environment("env-2-00000002", 2, "22" * 32, 3, 2)
TRIAL = Record(confirmed=FIRST, previous=Environment(), candidate=SECOND, state=State.TRIAL)
LIMIT_S = 60

AGENT = """
import os, signal, sys
if __name__ == "__main__":
    print(os.environ["SLY_AGENT_SLOTS"], sys.prefix, *sys.argv[1:], flush=True)
    if "wait" in sys.argv:
        signal.pause()
"""


def take_python(folder: Path, each: Environment) -> None:
    """As an upgrade of the distribution does."""
    (folder / each.folder / "bin" / "python").unlink()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name in ("factory", FIRST.folder, SECOND.folder):
        bare_environment(folder, name, AGENT)
    return folder


@pytest.fixture
def slots(made: Path, tmp_path: Path) -> Iterator[Path]:
    """Three environments; they cannot be moved, so their launcher's folder is links to them."""
    for name in ("factory", FIRST.folder, SECOND.folder):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to(made / name / "bin" / "python")
        (tmp_path / name / "pyvenv.cfg").write_bytes((made / name / "pyvenv.cfg").read_bytes())
        (tmp_path / name / "lib").symlink_to(made / name / "lib")
    yield tmp_path
    assert not list(tmp_path.glob(".part*"))


def put(folder: Path, record: Record) -> Record:
    return write_record(Disk(), folder, record)


def now(folder: Path) -> Record:
    return read_record(Disk(), folder)[0]


def started(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """By the system's Python, which has none of our packages, from a copy that lies alone."""
    return subprocess.run(command(folder, *words), capture_output=True, text=True, timeout=LIMIT_S)


def command(folder: Path, *words: str) -> list[str]:
    copy = folder / "launcher.py"
    copy.write_bytes(Path(launcher.__file__).read_bytes())
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    factory = str(folder / "factory" / "bin" / "python")
    return [python, "-I", str(copy), "--folder", str(folder), "--factory", factory, "--module", "tiny", "--probe", "tiny", *words]


def prefix(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split()[1]).name


# the record


def test_a_record_is_read_as_it_was_written() -> None:
    for record in (Record(), TRIAL, replace(TRIAL, state=State.ROLLED_BACK, why="it hung — twice", boots=3, needs=2)):
        assert decode(encode(record)) == record


def test_what_a_newer_agent_added_to_the_record_stays_when_this_launcher_counts_a_start(tmp_path: Path) -> None:
    put(tmp_path, replace(TRIAL, unknown={"colour": ["blue"]}))
    Launcher(tmp_path, Path(sys.executable), "json").decide()
    assert now(tmp_path).unknown == {"colour": ["blue"]}


def test_every_flipped_bit_and_every_truncation_of_a_record_is_refused() -> None:
    data = encode(TRIAL).rstrip()
    for cut in range(len(data)):
        with pytest.raises(ValueError):
            decode(data[:cut])
    random = Random(1)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << random.randrange(8)
        try:
            assert decode(bytes(flipped)) == TRIAL, "only what JSON does not mind"
        except ValueError:
            continue


@given(st.recursive(st.none() | st.integers() | st.text(), lambda each: st.lists(each) | st.dictionaries(st.text(), each)))
def test_whatever_lies_in_the_place_of_a_record_is_refused_with_one_kind_of_error(body: object) -> None:
    for whole in (body, {"record": body, "sha256": ""}, {"record": {"format": 1}, "sha256": body}):
        with pytest.raises(ValueError):
            decode(json.dumps(whole).encode())


@pytest.mark.parametrize("folder", ["../etc", "env-1-0000000g", "/bin", "env-1-00000001/../.."])
def test_a_record_that_names_a_folder_elsewhere_is_refused(folder: str) -> None:
    body = json.loads(encode(TRIAL))["record"]
    body["confirmed"]["folder"] = folder
    with pytest.raises(ValueError, match="folder"):
        decode(json.dumps({"record": body, "sha256": launcher._checksum(body)}).encode())


def test_20_with_the_newest_copy_torn_the_one_before_counts_and_with_both_torn_the_factory(tmp_path: Path) -> None:
    before, newest = put(tmp_path, Record(confirmed=FIRST)), put(tmp_path, replace(TRIAL, counter=1))
    assert now(tmp_path) == newest
    (tmp_path / RECORDS[newest.counter % 2]).write_bytes(b"{")
    assert read_record(Disk(), tmp_path)[0] == before
    (tmp_path / RECORDS[before.counter % 2]).write_bytes(encode(before)[:-30])
    record, complaint = read_record(Disk(), tmp_path)
    assert record == Record() and "the factory's agent counts as confirmed" in complaint


def test_19_a_power_cut_at_any_write_leaves_the_record_before_or_the_one_after() -> None:
    folder = Path("/slots")
    disk = VirtualDisk()
    old = write_record(disk, folder, write_record(disk, folder, Record(confirmed=FIRST)))
    states = 0
    for survivor in crashes(lambda disk: write_record(disk, folder, replace(TRIAL, counter=2)), disk, random_ones=20):
        found, _ = read_record(survivor, folder)
        assert found in (old, replace(TRIAL, counter=3))
        for again in crashes(partial(count_a_start, record=found), survivor, random_ones=2):
            states += 1
            last, _ = read_record(again, folder)
            assert last in (found, replace(found.begun(), counter=found.counter + 1))
    assert states > 5000


def count_a_start(disk: VirtualDisk, record: Record) -> None:
    write_record(disk, Path("/slots"), record.begun())


def test_a_written_record_is_durable_when_the_call_returns() -> None:
    folder, disk = Path("/slots"), VirtualDisk()
    write_record(disk, folder, TRIAL)
    assert read_record(disk.rebooted(lambda _: False), folder)[0].candidate == SECOND


# the choice


@pytest.mark.parametrize(
    ("record", "best"),
    [
        (Record(), Environment()),
        (Record(confirmed=FIRST), FIRST),
        (Record(confirmed=FIRST, candidate=SECOND, state=State.STAGING), FIRST),
        (Record(confirmed=FIRST, candidate=SECOND, state=State.READY), FIRST),
        (TRIAL, SECOND),
        (replace(TRIAL, state=State.ROLLED_BACK), FIRST),
    ],
)
def test_only_a_trial_starts_what_is_not_confirmed(record: Record, best: Environment) -> None:
    order = record.order()
    assert order[0] == best and order[-1] == Environment() and len({each.folder for each in order}) == len(order)


def test_23_a_trial_is_bounded_by_its_starts() -> None:
    record, tried = TRIAL, 0
    for _ in range(20):
        record = record.begun()
        tried += record.state is State.TRIAL
    assert tried == TRIAL.max_boots
    assert (record.state, record.why, record.order()[0]) == (State.ROLLED_BACK, "3 starts without confirmation", FIRST)


def test_without_a_record_the_factory_agent_starts_with_the_words_it_was_given(slots: Path) -> None:
    done = started(slots, "--", "agent", "--config", "x.toml")
    assert done.stdout.split() == [str(slots), str(slots / "factory"), "agent", "--config", "x.toml"]
    assert done.stderr == ""


def test_the_launcher_becomes_the_agent_that_it_starts(slots: Path) -> None:
    put(slots, Record(confirmed=FIRST))
    with subprocess.Popen(command(slots, "--", "wait"), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.readline()
        words = Path(f"/proc/{running.pid}/cmdline").read_bytes().split(b"\0")
        running.send_signal(signal.SIGTERM)
    assert words[0] == str(slots / FIRST.folder / "bin" / "python").encode()
    assert running.returncode == -signal.SIGTERM


def test_a_trial_that_ends_at_once_each_time_is_over_after_its_starts(slots: Path) -> None:
    put(slots, TRIAL)
    assert [prefix(started(slots)) for _ in range(5)] == [SECOND.folder] * 3 + [FIRST.folder] * 2
    assert now(slots).why == "3 starts without confirmation"


@pytest.mark.parametrize("copies", [RECORDS, RECORDS[:1]])
def test_20_with_every_record_that_is_there_torn_the_factory_agent_starts_and_it_is_said(slots: Path, copies: list[str]) -> None:
    for name in copies:
        (slots / name).write_bytes(b"\0" * 100)
    done = started(slots)
    assert prefix(done) == "factory" and "the factory's agent counts as confirmed" in done.stderr


def test_an_agent_on_trial_whose_python_is_gone_is_rolled_back_at_once(slots: Path) -> None:
    put(slots, TRIAL)
    take_python(slots, SECOND)
    done = started(slots)
    assert prefix(done) == FIRST.folder and "release 2 cannot run" in done.stderr
    assert now(slots).state is State.ROLLED_BACK and "No such file" in now(slots).why


def test_a_confirmed_agent_whose_python_is_gone_gives_way_to_the_one_before_and_that_to_the_factory(slots: Path) -> None:
    put(slots, Record(confirmed=SECOND, previous=FIRST))
    take_python(slots, SECOND)
    assert prefix(started(slots)) == FIRST.folder
    take_python(slots, FIRST)
    done = started(slots)
    assert prefix(done) == "factory"
    assert "release 2 cannot run" in done.stderr and "release 1 cannot run" in done.stderr
    assert now(slots).confirmed == SECOND, "the record does not lie: it was not unconfirmed"


def test_a_python_of_another_version_that_does_not_see_the_packages_is_passed_over(slots: Path) -> None:
    put(slots, Record(confirmed=SECOND, previous=FIRST))
    (slots / SECOND.folder / "lib").unlink()
    done = started(slots)
    assert prefix(done) == FIRST.folder and "No module named 'tiny'" in done.stderr


def test_where_nothing_passes_the_probe_the_confirmed_agent_is_started_all_the_same(slots: Path) -> None:
    put(slots, Record(confirmed=FIRST))
    found = Launcher(slots, slots / "factory" / "bin" / "python", "no_such_module").decide()
    assert found is not None and found.environment == FIRST


def test_with_no_python_left_it_says_of_each_why_and_ends(slots: Path) -> None:
    put(slots, Record(confirmed=FIRST))
    take_python(slots, FIRST)
    (slots / "factory" / "bin" / "python").unlink()
    done = started(slots)
    assert done.returncode == 2 and "release 1 cannot run" in done.stderr
    assert "the factory's agent cannot run" in done.stderr and "flash.sh" in done.stderr


def test_a_probe_that_hangs_is_no_agent_that_runs(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    assert "did not import x within 0.2 s" in why_not(tmp_path / "python", "x", 0.2)


class FullDisk(Disk):
    def write(self, fd: int, data: bytes) -> None:
        raise OSError(28, os.strerror(28))


def test_a_start_that_cannot_be_counted_is_none_of_the_trial_and_the_trial_goes_on_when_there_is_room(slots: Path) -> None:
    put(slots, TRIAL)
    factory = slots / "factory" / "bin" / "python"
    for _ in range(10):
        full = Launcher(slots, factory, "tiny", FullDisk())
        start = full.decide()
        assert start is not None and start.environment == FIRST and not start.guarded
        assert any("No space left" in line for line in full.said)
    start = Launcher(slots, factory, "tiny").decide()
    assert start is not None and start.environment == SECOND and start.guarded and now(slots).boots == 1


def test_the_lock_is_waited_for_and_given_up_after_its_limit(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TimeoutError, match="held by another process"), locked(tmp_path, 0.1):
        pass
    with locked(tmp_path, 0.1):
        pass


# the guard


def on_trial(slots: Path, trial_s: int) -> int:
    put(slots, replace(TRIAL, trial_s=trial_s))
    with subprocess.Popen(command(slots, "--", "wait"), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.readline()
        try:
            return running.wait(LIMIT_S)
        finally:
            running.kill()


def test_a_trial_that_is_ready_and_never_confirmed_is_ended_by_the_guard_and_rolled_back(slots: Path) -> None:
    assert on_trial(slots, 1) == -signal.SIGTERM
    assert (now(slots).state, now(slots).why) == (State.ROLLED_BACK, "not confirmed within 1 s")
    assert prefix(started(slots)) == FIRST.folder


def test_a_trial_that_hangs_and_minds_no_sigterm_is_killed(slots: Path) -> None:
    put(slots, TRIAL)
    child = os.fork()
    if not child:
        launcher.guard(slots, SECOND, 0.2, 0.2)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(LIMIT_S)
        while True:
            signal.pause()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert now(slots).state is State.ROLLED_BACK


def test_the_guard_lets_a_confirmed_agent_live_and_ends_by_itself(slots: Path) -> None:
    """The pipe's end is seen when the guard, which holds it too, has ended; the agent has closed its own before."""
    put(slots, TRIAL)
    read, write = os.pipe()
    held, hold = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.close(hold)
        launcher.guard(slots, SECOND, 0.5)
        os.close(write)
        os.read(held, 1)
        os._exit(7)
    os.close(write)
    os.close(held)
    put(slots, replace(now(slots), confirmed=SECOND, candidate=None, state=State.EMPTY))
    assert os.read(read, 1) == b""
    os.close(hold)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    os.close(read)


def test_the_guard_is_no_child_of_the_agent_and_ends_with_it(slots: Path) -> None:
    put(slots, TRIAL)
    with subprocess.Popen(command(slots, "--", "wait"), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert not Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
        running.kill()
        assert running.stdout.read() == "", "the guard held it as long as it lived"
    assert now(slots).state is State.TRIAL
