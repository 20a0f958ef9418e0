"""Disks that are full, that fail, that are read-only: a board serves on, says so, and keeps its promises again when it can.

Real: file systems of a few MiB in mounts of their own, agents, engines, the broker, the fleet's signed metadata.  Stand-ins: a
connection of SQLite whose statements fail when told to, and a disk whose operations do, because a file system with files open for
writing cannot be remounted read-only, and no device here fails on demand.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edge_agent.agent import Agent, serve
from edge_agent.client import Client, request_for_picture
from edge_agent.configured import read_config
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import InferenceResult, Status
from edge_agent.gateway.local import LocalConnection
from edge_agent.shell import standby
from edge_agent.shell.door import SOCKET_NAME
from edge_agent.shell.state_disk import LedgerInMemory, folder_for_socket, is_of_the_disk, why_not_kept
from edge_agent.steward.enrolling import Enrolment, enroll
from edge_agent.steward.pushing import Wanted, attend, begin, planned, release_into
from edge_agent.store import blobs, database
from edge_agent.store.files import Disk
from edge_agent.store.ledger import Ledger
from ota import fetching, offer, offered, transfers, updater
from ota.course import Course
from ota.manifest import Release
from ota.release import release_of_model
from tests.cramped import remount
from tests.fetched import model_path, picture_path
from tests.needs import needs
from tests.operators import broker_of, new_fleet
from tests.test_agent import MODEL, configuration, daemon

LIMIT_S = 30.0
TASK = "detect_faces"
UNDER_WAY_S = 0.1
"""Between the requests of a client while an update takes its time."""


@contextmanager
def file_system(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own; what is open there at the end stays good until it is closed."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True)
    needs(not mounted.returncode, f"may not mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Everything else on the disk grows until nothing goes on it any more."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert os.statvfs(folder).f_bavail == 0
    return ballast


async def until(holds: Callable[[], object], what: str = "") -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.01)


# The ledger's own room.


def commit(ledger: Ledger, count: int) -> None:
    """What requests leave in a ledger, each in a transaction of its own."""
    for _ in range(count):
        with ledger.transaction():
            ledger.receipts.append(ledger.receipts.newest + 1, os.urandom(400))
            ledger.put_document("table", os.urandom(3000))


@pytest.mark.parametrize("commits", [500, pytest.param(1500, marks=pytest.mark.long)])
def test_a_ledger_that_keeps_room_goes_on_while_others_fill_the_disk_and_begins_again_on_a_full_one(
    tmp_path: Path, commits: int
) -> None:
    with file_system(tmp_path / "small", "24m") as folder:
        with Ledger(folder / "ledger.db") as ledger:
            assert ledger.keep_room() == ""
            assert ledger._database.execute("PRAGMA synchronous") == [(2,)]
            fill(folder)
            commit(ledger, 3 * commits)
            with pytest.raises(UnavailableError, match="full"), ledger.transaction():
                for number in range(3):
                    ledger.accept(f"r{number}", bytes(4 * 2**20))
            fill(folder)
            commit(ledger, commits)
        fill(folder)
        with Ledger(folder / "ledger.db") as ledger:
            commit(ledger, commits)
            assert ledger.receipts.newest == 5 * commits


def test_without_room_of_its_own_the_same_ledger_fails_at_once(tmp_path: Path) -> None:
    with file_system(tmp_path / "small", "24m") as folder, Ledger(folder / "ledger.db") as ledger:
        fill(folder)
        with pytest.raises(UnavailableError, match="full; free some space") as failed:
            commit(ledger, 1500)
        assert is_of_the_disk(failed.value)


def test_room_is_taken_once_and_never_the_last_of_a_disk(tmp_path: Path) -> None:
    with file_system(tmp_path / "small", "20m") as folder:
        with Ledger(folder / "ledger.db") as ledger:
            assert "bytes are free; room is taken when there are" in ledger.keep_room()
        assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 200_000
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.keep_room() == ""
        pages = ledger._database.execute("PRAGMA page_count")
        before = (tmp_path / "ledger.db").stat()
        assert ledger.keep_room() == ""
        after = (tmp_path / "ledger.db").stat()
        assert (after.st_mtime_ns, after.st_blocks) == (before.st_mtime_ns, before.st_blocks)
        assert ledger._database.execute("PRAGMA page_count") == pages
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.keep_room() == ""
        assert ledger._database.execute("PRAGMA page_count") == pages


def test_only_a_disk_is_blamed_for_what_a_disk_does(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError) as wrong_folder:
        Ledger(tmp_path / "file" / "ledger.db")
    with Ledger(tmp_path / "ledger.db"), pytest.raises(UnavailableError) as in_use:
        Ledger(tmp_path / "ledger.db")
    assert not is_of_the_disk(wrong_folder.value) and not is_of_the_disk(in_use.value)
    assert [is_of_the_disk(OSError(code, "")) for code in (errno.EIO, errno.EROFS, errno.ENOSPC, errno.EACCES)] == [True] * 3 + [
        False
    ]


def test_a_ledger_in_memory_leaves_nothing() -> None:
    ledger = LedgerInMemory()
    folder = ledger._folder
    assert ledger.increment("a") == 1 and folder.is_dir()
    ledger.close()
    assert not folder.exists()


class Unsyncable(Disk):
    def fsync(self, fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_the_disk_is_asked_by_a_write_that_leaves_nothing(tmp_path: Path) -> None:
    assert why_not_kept(tmp_path) == "" and not list(tmp_path.iterdir())
    assert "Input/output error" in why_not_kept(tmp_path, Unsyncable()) and not list(tmp_path.iterdir())
    with file_system(tmp_path / "small", "1m") as folder:
        ballast = fill(folder)
        assert "No space left" in why_not_kept(folder)
        ballast.unlink()
        remount(folder, "ro")
        assert "Read-only file system" in why_not_kept(folder)
        remount(folder, "rw")
        assert why_not_kept(folder) == ""


# A real agent.


def test_a_full_disk_costs_no_request_and_no_receipt_also_after_a_kill(tmp_path: Path) -> None:
    with file_system(tmp_path / "small", "40m") as folder:
        for start in range(2):
            with daemon(folder / "state") as running, Client(folder / "state" / SOCKET_NAME) as client:
                for number in range(20):
                    answer = client.look(TASK, picture_path("grace_hopper"))
                    assert answer.receipt and answer.findings, (start, number)
                    fill(folder)
                running.process.kill()
                running.process.wait()


# A ledger that cannot commit.


class Failing(sqlite3.Connection):
    """Fails at every statement that begins so, while ``where`` says how."""

    where: tuple[str, int] | None = None
    spared = False

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if Failing.where and not self.spared and sql.startswith(Failing.where[0]):
            error = sqlite3.OperationalError(f"it fails at {sql[:20]}")
            error.sqlite_errorcode = Failing.where[1]
            raise error
        return super().execute(sql, *values)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    """Of ledgers that are not in memory."""
    connected = database._connected

    def opened(path: Path) -> sqlite3.Connection:
        with monkeypatch.context() as patch:
            patch.setattr("edge_agent.store.database.sqlite3.connect", partial(sqlite3.connect, factory=Failing))
            connection = connected(path)
        assert isinstance(connection, Failing)
        connection.spared = "sly-ledger-" in str(path)
        return connection

    monkeypatch.setattr(database, "_connected", opened)
    Failing.where = None
    return Failing


class Crowd:
    """Clients that ask for one thing after the other, ``pause_s`` after each answer, and count what they get."""

    def __init__(self, agent: Agent, clients: int = 3, pause_s: float = 0.01) -> None:
        self._agent, self._picture, self._pause_s = agent, picture_path("grace_hopper").read_bytes(), pause_s
        self.answers: list[InferenceResult] = []
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(clients)]

    async def _ask(self) -> None:
        while True:
            self.answers.append(await self._agent.submit(request_for_picture(TASK, self._picture)))
            assert self.answers[-1].status is Status.OK, self.answers[-1].reason
            await asyncio.sleep(self._pause_s)

    async def until(self, count: int) -> list[InferenceResult]:
        """The next ``count`` answers, which were all good."""
        begun = len(self.answers)
        await until(lambda: len(self.answers) >= begun + count or any(task.done() for task in self._tasks))
        for task in self._tasks:
            if task.done():
                await task
        assert len({each.request_id for each in self.answers}) == len(self.answers)
        return self.answers[begun:]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def crowded(folder: Path, log: list[str], **sections: Any) -> AsyncIterator[tuple[Agent, Crowd]]:
    config = AgentConfig.from_mapping(configuration(folder, **sections))
    async with Agent(config, log.append) as agent:
        crowd = Crowd(agent)
        try:
            yield agent, crowd
        finally:
            await crowd.close()


def test_a_ledger_that_fails_at_any_statement_costs_receipts_and_no_request(tmp_path: Path, failing: type[Failing]) -> None:
    log: list[str] = []
    cases = [
        ("COMMIT", sqlite3.SQLITE_IOERR), ("COMMIT", sqlite3.SQLITE_FULL), ("BEGIN", sqlite3.SQLITE_READONLY),
        ("INSERT INTO receipt", sqlite3.SQLITE_FULL), ("SELECT", sqlite3.SQLITE_IOERR),
    ]  # fmt: skip

    async def story() -> None:
        async with crowded(tmp_path, log) as (agent, crowd):
            boot = agent.node.settings.boot_epoch
            for times, case in enumerate(cases, 1):
                assert all(each.receipt for each in await crowd.until(5))
                failing.where = case
                await until(lambda: agent.standby.why)
                await crowd.until(4)
                for each in await crowd.until(6):
                    assert not each.receipt and each.reason.startswith("no receipt: nothing can be kept")
                report = await agent.verbs.handle("status", None)
                assert isinstance(report, dict) and report["kept"] is False and "it fails at" in report["disk"]
                await agent.standby.look()
                await until(lambda: agent.standby.why)
                failing.where = None
                while agent.standby.why:
                    await agent.standby.look()
                assert agent.node.settings.boot_epoch >= boot + times
                await crowd.until(4)
            assert all(each.receipt for each in await crowd.until(5))
            assert not agent.faulty and not agent.work.broken
            report = await agent.verbs.handle("status", None)
            assert isinstance(report, dict) and (report["kept"], report["disk"]) == (True, "")

    asyncio.run(story())
    assert sum("serving goes on alone and without receipts" in line for line in log) >= len(cases)
    assert sum("what is decided is kept again" in line for line in log) >= len(cases)
    assert len(log) < 30 * len(cases), "what lasts is said once"
    assert not any("which is not running" in line for line in log), "no job was run twice"
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.receipts.newest > 25


def test_receipts_are_one_chain_over_a_disk_that_failed(tmp_path: Path, failing: type[Failing]) -> None:
    """What was lost was never given out: the next receipt follows the last that anyone holds."""
    from edge_agent.attest.receipts import unverified_receipt

    async def story() -> list[int]:
        async with crowded(tmp_path, []) as (agent, crowd):
            await crowd.until(5)
            failing.where = ("COMMIT", sqlite3.SQLITE_IOERR)
            await until(lambda: agent.standby.why)
            failing.where = None
            await agent.standby.look()
            await crowd.until(8)
            return sorted(unverified_receipt(each.receipt).counter for each in crowd.answers if each.receipt)

    counters = asyncio.run(story())
    assert counters == list(range(counters[0], counters[0] + len(counters)))


def test_a_board_without_memory_for_a_ledger_stops_as_before(
    tmp_path: Path, failing: type[Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise UnavailableError("ledger in memory", "there is none")

    log: list[str] = []
    monkeypatch.setattr(standby, "LedgerInMemory", none)

    async def story() -> None:
        async with crowded(tmp_path, log) as (agent, crowd):
            await crowd.until(2)
            failing.where = ("COMMIT", sqlite3.SQLITE_IOERR)
            await agent.stop_requested.wait()
            assert agent.faulty and agent.work.broken
            failing.where = None

    asyncio.run(story())
    assert any("a decision could not be made durable" in line for line in log)


def test_a_damaged_ledger_is_no_disk_that_fails(tmp_path: Path) -> None:
    config = AgentConfig.from_mapping(configuration(tmp_path))

    async def story() -> None:
        async with Agent(config, lambda text: None):
            pass
        (tmp_path / "ledger.db").write_bytes(b"not a ledger" * 1000)
        with pytest.raises(RefusedError, match="keep the file"):
            async with Agent(config, lambda text: None):
                pass

    asyncio.run(story())


# A start on a card that is read-only.


def test_a_start_on_a_read_only_disk_serves_and_begins_anew_when_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(standby, "LOOK_S", 0.2)

    def look(path: Path) -> tuple[bytes, dict[str, Any]]:
        with Client(path) as client, LocalConnection(path) as connection:
            while True:
                report: Any = connection.call("status", timeout_s=LIMIT_S)
                if report["boards"][0]["models"]:
                    answer = client.look(TASK, picture_path("grace_hopper"))
                    assert answer.findings
                    return answer.receipt, report
                time.sleep(0.01)

    async def story(folder: Path) -> None:
        config = AgentConfig.from_mapping(configuration(folder))
        async with Agent(config, lambda text: None):
            pass
        remount(folder, "ro")
        running = asyncio.create_task(serve(config))
        elsewhere = folder_for_socket(folder) / SOCKET_NAME
        await until(lambda: elsewhere.exists() or running.done())
        receipt, report = await asyncio.to_thread(look, elsewhere)
        assert not receipt and report["kept"] is False and "Read-only file system" in report["disk"]
        remount(folder, "rw")
        await until(lambda: (folder / SOCKET_NAME).exists() or running.done())
        receipt, report = await asyncio.to_thread(look, folder / SOCKET_NAME)
        assert receipt and report["kept"] is True and not elsewhere.parent.exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0

    with file_system(tmp_path / "small", "40m") as folder:
        asyncio.run(story(folder))
    said = capfd.readouterr().err
    assert "the socket is" in said and "starting anew" in said


# Updates.


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again after seconds is tried again at once."""
    monkeypatch.setattr(transfers, "RETRY_US", 100_000)
    monkeypatch.setattr(offered, "AFTER_FAILURE_US", 100_000)
    monkeypatch.setattr(fetching, "STALL_US", 300_000)
    monkeypatch.setattr(offer, "LAG_US", 300_000)
    monkeypatch.setattr(updater, "BUSY_TICK_S", 0.05)


class Operator:
    """A fleet of one board on a real broker, and what the operator pushes to it."""

    def __init__(self, path: Path, state: Path) -> None:
        self.folder, self.state = new_fleet(path), state
        enroll(self.folder, Enrolment("kitchen", "jalapeno", state=state, serve=(MODEL,), models=str(model_path(MODEL).parent)))
        shutil.copytree(self.folder.board_folder("kitchen"), state)
        text = (state / "agent.toml").read_text().replace("[ota]\n", "[ota]\ntrial_s = 1\ntrial_inferences = 3\n", 1)
        (state / "agent.toml").write_text(text)

    def release(self, size_bytes: int) -> Release:
        """The model that is served already, with a tail that no interpreter reads."""
        path = self.folder.folder.parent / f"{MODEL}.tflite"
        path.write_bytes(model_path(MODEL).read_bytes() + os.urandom(size_bytes))
        built = release_of_model(str(path), 1, golden=False)
        return release_into(self.folder, built.release, built.files)

    async def push(self, release: Release) -> Any:
        async with self.folder.session() as session:
            await self.folder.publish(session)
            await begin(self.folder, session, planned(self.folder, release, Wanted()))
            return await attend(self.folder, session, MODEL, lambda status: None)


def test_a_full_disk_at_any_write_of_an_update_costs_no_request_and_the_update_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    log: list[str] = []

    async def story(operator: Operator, disk: Path) -> None:
        release = operator.release(4 * 2**20)
        async with Agent(read_config(operator.state / "agent.toml"), log.append) as agent:
            crowd = Crowd(agent, 2, UNDER_WAY_S)
            assert agent.updater is not None
            ballast, refusals, is_full_under_way = fill(disk), set[str](), False
            pushing = asyncio.create_task(operator.push(release))
            while not pushing.done():
                await asyncio.sleep(0.01)
                await crowd.until(0)
                if course_of(agent).transfers.permille(release.files[0].digest) and not is_full_under_way:
                    is_full_under_way = bool(fill(disk))
                elif "No space left" in (note := course_of(agent).note) and note not in refusals:
                    refusals.add(note)
                    room_bytes = ballast.stat().st_size if is_full_under_way or "bytes are missing" in note else 500_000
                    os.truncate(ballast, max(0, ballast.stat().st_size - room_bytes))
            status = await pushing
            assert (status["state"], status["boards"][0]["serves"], is_full_under_way) == ("done", 1, True), (status, refusals)
            assert all(any(part in note for note in refusals) for part in ("metadata", "bytes are missing", "staging")), refusals
            answers = await crowd.until(5)
            await crowd.close()
            assert answers[-1].model_digest == release.files[0].digest
            assert all(each.receipt for each in crowd.answers)

    with file_system(tmp_path / "small", "64m") as disk:
        operator = Operator(tmp_path / "fleet", disk / "board")
        with broker_of(operator.folder):
            asyncio.run(asyncio.wait_for(story(operator, disk), 2 * LIMIT_S))


def course_of(agent: Agent) -> Course:
    assert agent.updater is not None and agent.updater.course is not None
    return agent.updater.course


class FailsAtFirst(Disk):
    """Every operation on every file fails with EIO the first time, once this is ``on``."""

    on = False
    failed: ClassVar[set[tuple[str, str]]] = set()

    def _try(self, operation: str, path: Path) -> None:
        if FailsAtFirst.on and (operation, path.name) not in FailsAtFirst.failed:
            FailsAtFirst.failed.add((operation, path.name))
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def __getattribute__(self, name: str) -> Any:
        work = super().__getattribute__(name)
        if name.startswith("_") or name in ("close", "on", "failed") or not FailsAtFirst.on:
            return work

        def tried(first: Path | int, *more: Any) -> Any:
            path = first if isinstance(first, Path) else Path(f"/proc/self/fd/{first}").readlink()
            self._try(name, path)
            return work(first, *more)

        return tried


def test_eio_at_every_operation_of_the_disk_in_an_update_costs_no_request_and_the_update_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(updater, "Disk", FailsAtFirst)
    monkeypatch.setattr(blobs, "Disk", FailsAtFirst)
    monkeypatch.setattr(FailsAtFirst, "failed", set())
    log: list[str] = []

    async def story(operator: Operator) -> None:
        release = operator.release(100_000)
        async with Agent(read_config(operator.state / "agent.toml"), log.append) as agent:
            crowd = Crowd(agent, 2, UNDER_WAY_S)
            monkeypatch.setattr(FailsAtFirst, "on", True)
            status = await operator.push(release)
            monkeypatch.setattr(FailsAtFirst, "on", False)
            assert (status["state"], status["boards"][0]["serves"]) == ("done", 1), status
            assert (await crowd.until(5))[-1].model_digest == release.files[0].digest
            await crowd.close()
            assert all(each.receipt for each in crowd.answers)
        failed = {operation for operation, name in FailsAtFirst.failed if name == release.files[0].digest.hex()}
        assert {"create", "open_write", "write_at", "fsync", "rename", "chmod"} <= failed, failed

    operator = Operator(tmp_path / "fleet", tmp_path / "board")
    with broker_of(operator.folder):
        asyncio.run(asyncio.wait_for(story(operator), 2 * LIMIT_S))
