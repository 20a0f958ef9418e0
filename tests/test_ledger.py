"""The ledger keeps what it said it kept, in order and once, within its bounds, and never begins anew in silence."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import fields
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store import database, entries
from edge_agent.store import ledger as ledger_module
from edge_agent.store.files import Disk
from edge_agent.store.ledger import MIGRATIONS, Bounds, Ledger, Owed
from tests.cramped import file_system_of_1_mb, files_of_at_most, remount


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as opened:
        yield opened


def owed(key: str, payload: bytes = b"payload") -> Owed:
    return Owed(key, f"sly/1/fleet/{key}", payload, b"correlation", "sly/1/fleet/reply", 60)


def after_kill(path: Path, folder: Path) -> Path:
    """The files as a process that was killed now leaves them, in a folder of their own."""
    folder.mkdir()
    for name in (path.name, f"{path.name}-wal", f"{path.name}.lock"):
        if (path.parent / name).exists():
            shutil.copyfile(path.parent / name, folder / name)
    return folder / path.name


class Plain:
    """What the ledger must do, over dictionaries."""

    BOUNDS = Bounds(4, 60, 4, 60, 3, 40, 3, 4)

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        self.marks: dict[str, int] = {}
        self.documents: dict[str, bytes] = {}
        self.inbox: dict[str, bytes] = {}
        self.answers: dict[str, tuple[bytes, int]] = {}
        self.outbox: dict[int, Owed] = {}
        self.done: dict[int, str] = {}
        self.tickets = 0

    def increment(self, name: str) -> int:
        self.counters[name] = self.counters.get(name, 0) + 1
        return self.counters[name]

    def raise_high_water(self, name: str, value: int) -> None:
        if value < self.marks.get(name, 0):
            raise RefusedError("rollback")
        self.marks[name] = value

    def put_document(self, name: str, data: bytes) -> None:
        self.documents[name] = data

    def accept(self, request_id: str, envelope: bytes) -> bool:
        if request_id in self.inbox or request_id in self.answers:
            return False
        if len(self.inbox) == 4 or sum(map(len, self.inbox.values())) + len(envelope) > 60:
            raise UnavailableError("inbox", "full")
        self.inbox[request_id] = envelope
        return True

    def answer(self, request_id: str, answer: bytes, owed: Owed | None) -> None:
        if request_id not in self.inbox:
            raise RuntimeError("not in the inbox")
        before = deepcopy(self)
        try:
            ticket = self.owe(owed) if owed else 0
            while len(self.answers) == 4 or sum(len(old) for old, _ in self.answers.values()) + len(answer) > 60:
                free = [old for old, (_, waits_for) in self.answers.items() if waits_for not in self.outbox]
                if not free:
                    raise UnavailableError("answers", "full")
                del self.answers[free[0]]
        except UnavailableError:
            self.__dict__.update(before.__dict__)
            raise
        del self.inbox[request_id]
        self.answers[request_id] = (answer, ticket)

    def owe(self, owed: Owed) -> int:
        for ticket, key in [*((ticket, waiting.key) for ticket, waiting in self.outbox.items()), *self.done.items()]:
            if key == owed.key:
                return ticket
        if len(self.outbox) == 3 or sum(len(waiting.payload) for waiting in self.outbox.values()) + len(owed.payload) > 40:
            raise UnavailableError("outbox", "full")
        self.tickets += 1
        self.outbox[self.tickets] = owed
        return self.tickets

    def delivered(self, ticket: int) -> bool:
        if ticket not in self.outbox:
            return False
        key = self.outbox.pop(ticket).key
        if len(self.done) == 3:
            del self.done[min(self.done)]
        self.done[ticket] = key
        return True


names = st.sampled_from(["a", "b"])
ids = st.integers(0, 9).map(lambda number: f"{number:032x}")
data = st.integers(0, 25).map(bytes)
messages = st.builds(owed, st.sampled_from("stuvwxyz"), data)
calls = st.one_of(
    st.tuples(st.just("increment"), names),
    st.tuples(st.just("raise_high_water"), names, st.integers(0, 5)),
    st.tuples(st.just("put_document"), names, data),
    st.tuples(st.just("accept"), ids, data),
    st.tuples(st.just("accept"), ids, data),
    st.tuples(st.just("answer"), ids, data, st.none() | messages),
    st.tuples(st.just("answer"), ids, data, messages),
    st.tuples(st.just("owe"), messages),
    st.tuples(st.just("delivered"), st.integers(0, 12)),
)


def outcome(target: object, call: tuple[object, ...]) -> object:
    """What the call returned, or the class of what it raised."""
    try:
        return getattr(target, str(call[0]))(*call[1:])
    except (RefusedError, UnavailableError, RuntimeError) as error:
        return type(error)


class GivenUpError(Exception):
    pass


class LedgerAgainstPlain(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = TemporaryDirectory()
        self.numbers = count()
        self.path = Path(self.folder.name) / "start" / "ledger.db"
        self.ledger = Ledger(self.path, Plain.BOUNDS)
        self.plain = Plain()

    @rule(call=calls)
    def one(self, call: tuple[object, ...]) -> None:
        assert outcome(self.ledger, call) == outcome(self.plain, call)

    @rule(group=st.lists(calls, max_size=8))
    def together(self, group: list[tuple[object, ...]]) -> None:
        with self.ledger.transaction():
            for call in group:
                assert outcome(self.ledger, call) == outcome(self.plain, call)

    @rule(group=st.lists(calls, max_size=8))
    def given_up(self, group: list[tuple[object, ...]]) -> None:
        scratch = deepcopy(self.plain)
        with pytest.raises(GivenUpError), self.ledger.transaction():
            for call in group:
                assert outcome(self.ledger, call) == outcome(scratch, call)
            raise GivenUpError

    @rule(group=st.lists(calls, max_size=8))
    def killed(self, group: list[tuple[object, ...]]) -> None:
        """A process dies inside a transaction; the next one finds what was committed."""
        with pytest.raises(GivenUpError), self.ledger.transaction():
            for call in group:
                outcome(self.ledger, call)
            survivor = after_kill(self.path, Path(self.folder.name) / str(next(self.numbers)))
            raise GivenUpError
        self.reopen(survivor)

    @rule()
    def restarted(self) -> None:
        self.reopen(self.path)

    def reopen(self, path: Path) -> None:
        self.ledger.close()
        self.path, self.ledger = path, Ledger(path, Plain.BOUNDS)

    @invariant()
    def agree(self) -> None:
        assert {name: self.ledger.count(name) for name in "ab"} == {name: self.plain.counters.get(name, 0) for name in "ab"}
        assert [self.ledger.high_water(name) for name in "ab"] == [self.plain.marks.get(name, 0) for name in "ab"]
        assert [self.ledger.document(name) for name in "ab"] == [self.plain.documents.get(name) for name in "ab"]
        assert self.ledger.unanswered(100) == list(self.plain.inbox.items())
        assert self.ledger.owed(100) == list(self.plain.outbox.items())
        answers = {f"{number:032x}": self.ledger.answer_of(f"{number:032x}") for number in range(10)}
        assert {key: value for key, value in answers.items() if value is not None} == {
            key: answer for key, (answer, _) in self.plain.answers.items()
        }

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()


LedgerAgainstPlain.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLedgerAgainstPlain = LedgerAgainstPlain.TestCase


def test_what_was_acknowledged_outlives_a_kill(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.increment("a")
        survivor = after_kill(path, tmp_path / "killed")
    with Ledger(survivor) as found:
        assert found.count("a") == 1


def test_a_mark_is_never_lowered(ledger: Ledger) -> None:
    ledger.raise_high_water("tuf timestamp", 7)
    ledger.raise_high_water("tuf timestamp", 7)
    with pytest.raises(RefusedError, match="high-water mark tuf timestamp: got 6; allowed: 7 or more; this is a rollback"):
        ledger.raise_high_water("tuf timestamp", 6)
    for value in (-1, 2**63):
        with pytest.raises(RefusedError, match="a whole number from 0"):
            ledger.raise_high_water("tuf timestamp", value)
    assert ledger.high_water("tuf timestamp") == 7
    ledger.raise_high_water("tuf timestamp", 2**63 - 1)


def test_a_second_answer_is_the_callers_bug_and_changes_nothing(ledger: Ledger) -> None:
    ledger.accept("r1", b"envelope")
    ledger.answer("r1", b"first", None)
    with pytest.raises(RuntimeError, match="r1 is answered already"):
        ledger.answer("r1", b"second", owed("k"))
    with pytest.raises(RuntimeError, match="r2 is not in the inbox"):
        ledger.answer("r2", b"second", owed("k"))
    assert (ledger.answer_of("r1"), ledger.owed(10)) == (b"first", [])
    assert not ledger.accept("r1", b"envelope")


def test_a_key_is_owed_once_also_after_its_delivery(ledger: Ledger) -> None:
    ticket = ledger.owe(owed("k", b"first"))
    assert ledger.owe(owed("k", b"second")) == ticket
    assert ledger.owed(10) == [(ticket, owed("k", b"first"))]
    assert ledger.delivered(ticket)
    assert not ledger.delivered(ticket)
    assert ledger.owe(owed("k", b"third")) == ticket
    assert ledger.owed(10) == []


def test_tickets_are_not_used_again(ledger: Ledger) -> None:
    first = ledger.owe(owed("a"))
    ledger.delivered(first)
    assert ledger.owe(owed("b")) > first


def test_pages_of_the_outbox_and_the_inbox_are_in_order_and_complete(ledger: Ledger) -> None:
    with ledger.transaction():
        for number in range(10):
            ledger.accept(f"r{number}", b"")
            ledger.owe(owed(f"k{number}"))
    ledger.answer("r3", b"", None)
    page, keys = ledger.owed(4), []
    while page:
        keys += [message.key for _, message in page]
        page = ledger.owed(4, page[-1][0])
    assert keys == [f"k{number}" for number in range(10)]
    assert [key for key, _ in ledger.unanswered(3)] == ["r0", "r1", "r2"]
    assert [key for key, _ in ledger.unanswered(3, "r2")] == ["r4", "r5", "r6"]
    assert [key for key, _ in ledger.unanswered(9, "r3")] == ["r4", "r5", "r6", "r7", "r8", "r9"]
    assert ledger.unanswered(3, "r9") == []
    with pytest.raises(ValueError, match="not known"):
        ledger.unanswered(3, "elsewhere")
    with pytest.raises(ValueError, match="a limit of 0"):
        ledger.owed(0)


def test_one_page_holds_a_bounded_number_of_bytes(ledger: Ledger) -> None:
    large = bytes(3 * 2**20)
    for number in range(4):
        ledger.accept(f"r{number}", large)
        ledger.owe(owed(f"k{number}", large))
    assert [key for key, _ in ledger.unanswered(100)] == ["r0", "r1"]
    assert [key for key, _ in ledger.unanswered(100, "r1")] == ["r2", "r3"]
    assert [message.key for _, message in ledger.owed(100)] == ["k0", "k1"]


def test_a_full_inbox_pushes_back_and_tells_the_figures(path: Path) -> None:
    with Ledger(path, Bounds(unanswered_count=2, unanswered_bytes=100)) as ledger:
        ledger.accept("r1", bytes(90))
        with pytest.raises(UnavailableError, match=r"no room for 11 bytes: holds 1 of 2 entries and 90 of 100 bytes; answer"):
            ledger.accept("r2", bytes(11))
        ledger.accept("r2", bytes(10))
        with pytest.raises(UnavailableError, match="holds 2 of 2 entries"):
            ledger.accept("r3", b"")
        with pytest.raises(RefusedError, match="request r4: got 101 bytes; allowed: at most 100 bytes"):
            ledger.accept("r4", bytes(101))
        ledger.answer("r1", b"", None)
        assert ledger.accept("r3", b"")


def test_a_full_outbox_pushes_back_and_drops_nothing(path: Path) -> None:
    with Ledger(path, Bounds(owed_count=2, owed_bytes=100)) as ledger:
        ledger.accept("r1", b"")
        tickets = [ledger.owe(owed("a", bytes(60))), ledger.owe(owed("b"))]
        for attempt in (lambda: ledger.owe(owed("c")), lambda: ledger.answer("r1", b"", owed("c"))):
            with pytest.raises(UnavailableError, match="ledger, owed: no room for 7 bytes: holds 2 of 2 entries"):
                attempt()
        assert [key for key, _ in ledger.unanswered(10)] == ["r1"]
        assert [ticket for ticket, _ in ledger.owed(10)] == tickets
        ledger.delivered(tickets[0])
        ledger.answer("r1", b"", owed("c"))


def test_old_answers_go_but_never_one_whose_delivery_is_owed(path: Path) -> None:
    with Ledger(path, Bounds(answered_count=3)) as ledger:
        for number in range(6):
            ledger.accept(f"r{number}", b"")
        ledger.answer("r0", b"0", owed("k0"))
        for number in range(1, 5):
            ledger.answer(f"r{number}", b"%d" % number, None)
        assert [ledger.answer_of(f"r{number}") for number in range(5)] == [b"0", None, None, b"3", b"4"]
        ledger.delivered(1)
        ledger.answer("r5", b"5", None)
        assert [ledger.answer_of(f"r{number}") for number in range(6)] == [None, None, None, b"3", b"4", b"5"]


def test_answers_that_nobody_fetched_push_back(path: Path) -> None:
    with Ledger(path, Bounds(answered_count=2)) as ledger:
        for number in range(3):
            ledger.accept(f"r{number}", b"")
        ledger.answer("r0", b"", owed("k0"))
        ledger.answer("r1", b"", owed("k1"))
        with pytest.raises(UnavailableError, match="ledger, answered: no room.*deliver what is owed first"):
            ledger.answer("r2", b"", owed("k2"))
        assert len(ledger.owed(10)) == 2


def test_a_refused_call_leaves_nothing_in_a_transaction_that_goes_on(path: Path) -> None:
    """Here the answer's message was put in the outbox before there was found to be no room for the answer itself."""
    with Ledger(path, Bounds(answered_count=1)) as ledger:
        with ledger.transaction():
            ledger.accept("r0", b"")
            ledger.accept("r1", b"")
            ledger.answer("r0", b"", owed("k0"))
            with pytest.raises(UnavailableError):
                ledger.answer("r1", b"", owed("k1"))
            ledger.increment("a")
        assert [message.key for _, message in ledger.owed(10)] == ["k0"]
        assert ledger.unanswered(10) == [("r1", b"")]
        assert ledger.count("a") == 1


@pytest.mark.parametrize("name", ["", "x" * 257, "ü" * 129, "a\nb", "a\0b", "\ud800"])
def test_a_name_out_of_bounds_is_refused_everywhere(ledger: Ledger, name: str) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: ledger.count(name),
        lambda: ledger.increment(name),
        lambda: ledger.raise_high_water(name, 1),
        lambda: ledger.put_document(name, b""),
        lambda: ledger.document(name),
        lambda: ledger.accept(name, b""),
        lambda: owed(name),
    ]
    for attempt in attempts:
        with pytest.raises(RefusedError, match="1 to 256 bytes of printable text"):
            attempt()


def test_sizes_out_of_bounds_are_refused(ledger: Ledger) -> None:
    ledger.accept("r", b"")
    large = bytes(entries.MAX_ENTRY_BYTES + 1)
    attempts: list[Callable[[], object]] = [
        lambda: ledger.put_document("d", bytes(entries.MAX_DOCUMENT_BYTES + 1)),
        lambda: ledger.accept("s", large),
        lambda: ledger.answer("r", large, None),
        lambda: owed("k", large),
        lambda: Owed("k", "t", b"", bytes(257)),
        lambda: Owed("k", "t" * 513, b""),
        lambda: Owed("k", "\ud800", b""),
        lambda: Owed("k", "t", b"", response_topic="a\0b"),
        lambda: Owed("k", "t", b"", expiry_s=-1),
        lambda: Bounds(owed_count=0),
    ]
    for attempt in attempts:
        with pytest.raises(RefusedError, match="allowed: "):
            attempt()


def test_the_number_of_names_is_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_NAMES", 2)
    for name in ("a", "b", "a", "b"):
        ledger.increment(name)
    with pytest.raises(RefusedError, match="at most 2 names"):
        ledger.increment("c")
    assert [ledger.count(name) for name in "abc"] == [2, 2, 0]


def test_transactions_do_not_nest(ledger: Ledger) -> None:
    with pytest.raises(RuntimeError, match="do not nest"), ledger.transaction(), ledger.transaction():
        pass
    assert ledger.increment("a") == 1


def test_the_settings_that_make_a_commit_durable(ledger: Ledger) -> None:
    def setting(name: str) -> object:
        return ledger._database.execute(f"PRAGMA {name}")[0][0]

    full = 2
    assert {name: setting(name) for name in ("journal_mode", "synchronous", "foreign_keys", "locking_mode", "mmap_size")} == {
        "journal_mode": "wal", "synchronous": full, "foreign_keys": 1, "locking_mode": "exclusive", "mmap_size": 0,
    }  # fmt: skip
    assert setting("cache_size") == -database.PAGE_CACHE_KIB


def test_its_files_belong_to_this_user_only(path: Path) -> None:
    before = os.umask(0)
    try:
        with Ledger(path) as ledger:
            ledger.increment("a")
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["ledger.db", "ledger.db-wal", "ledger.db.lock"], 0o600)
    path.chmod(0o666)
    Ledger(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_torn_log_gives_a_prefix_of_what_was_committed(path: Path, tmp_path: Path) -> None:
    """Each transaction raises two marks; however the log is cut or garbled at its end, the two agree and none is invented."""
    with Ledger(path) as ledger:
        for number in range(1, 9):
            with ledger.transaction():
                ledger.raise_high_water("one", number)
                ledger.put_document("two", b"%d" % number * 3000)
        survivor = after_kill(path, tmp_path / "killed")
    log = survivor.with_name("ledger.db-wal")
    whole = log.read_bytes()
    found: list[int] = []
    for length in [*range(0, len(whole), 1531), len(whole)]:
        for tail in (b"", bytes(len(whole) - length), os.urandom(len(whole) - length)):
            folder = tmp_path / f"{length}-{len(found)}"
            torn = after_kill(survivor, folder)
            torn.with_name("ledger.db-wal").write_bytes(whole[:length] + tail)
            with Ledger(torn) as ledger:
                number = ledger.high_water("one")
                assert ledger.document("two") == (b"%d" % number * 3000 if number else None)
                found.append(number)
            shutil.rmtree(folder)
    assert found == sorted(found)
    assert set(found) == set(range(9))


class CutDisk(Disk):
    """The real disk, until the ``cut_at``-th call."""

    cut_at = 0

    def __getattribute__(self, name: str) -> object:
        if not name.startswith("_") and name != "cut_at":
            CutDisk.cut_at -= 1
            if CutDisk.cut_at <= 0:
                raise KeyboardInterrupt(name)
        return super().__getattribute__(name)


def test_a_birth_that_was_cut_anywhere_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cut_at in count(1):
        path = tmp_path / str(cut_at) / "ledger.db"
        with monkeypatch.context() as patched:
            patched.setattr(database, "Disk", CutDisk)
            CutDisk.cut_at = cut_at
            try:
                Ledger(path).close()
                born = True
            except KeyboardInterrupt:
                born = False
        with Ledger(path) as ledger:
            assert ledger.increment("a") == 1
        assert sorted(file.name for file in path.parent.iterdir()) == ["ledger.db", "ledger.db.lock"]
        if born:
            break
    assert cut_at > 6


def test_a_birth_is_synced_before_and_after_it_gets_its_name_and_then_remembered(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    class Recorder(Disk):
        def fsync(self, fd: int) -> None:
            steps.append(f"fsync {Path(f'/proc/self/fd/{fd}').resolve().name}")
            super().fsync(fd)

        def rename(self, source: Path, target: Path) -> None:
            steps.append(f"rename {source.name}")
            super().rename(source, target)

        def fsync_folder(self, folder: Path) -> None:
            steps.append(f"fsync {folder.name}")
            super().fsync_folder(folder)

    path.parent.mkdir()
    monkeypatch.setattr(database, "Disk", Recorder)
    Ledger(path).close()
    part = ".part-ledger.db"
    assert steps == [f"fsync {part}", f"rename {part}", "fsync state", "fsync ledger.db.lock", "fsync state"]


def damaged(path: Path, how: str) -> None:
    """Harm the closed ledger ``path``."""
    content = path.read_bytes()
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "cut in half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "another file":
        path.write_bytes(b"not a database at all" * 1000)
    elif how == "another database":
        path.unlink()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE mine (x)")
    elif how == "page overwritten":
        path.write_bytes(content[:4096] + b"\xa5" * 4096 + content[8192:])
    elif how == "deleted":
        path.unlink()


@pytest.mark.parametrize("how", ["emptied", "cut in half", "another file", "another database", "page overwritten", "deleted"])
def test_a_damaged_or_deleted_ledger_is_refused_and_started_over_only_unsafely(path: Path, how: str) -> None:
    with Ledger(path) as ledger:
        ledger.raise_high_water("mark", 7)
        for number in range(40):
            ledger.put_document(f"d{number}", bytes(1000))
    damaged(path, how)
    harmed = path.read_bytes() if path.exists() else None
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"ledger\.db: got .*restore a good copy, or start over unsafely"):
            Ledger(path)
    assert (path.read_bytes() if path.exists() else None) == harmed
    with Ledger(path, unsafe_start_over=True) as ledger:
        assert ledger.high_water("mark") == 0
        assert (ledger.moved_aside.read_bytes() if ledger.moved_aside else None) == harmed
        ledger.raise_high_water("mark", 3)
    with Ledger(path, unsafe_start_over=True) as ledger:
        assert (ledger.high_water("mark"), ledger.moved_aside) == (3, None)


def test_a_log_without_its_ledger_is_not_taken_into_a_new_one(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.raise_high_water("mark", 7)
        survivor = after_kill(path, tmp_path / "killed")
    survivor.unlink()
    survivor.with_name("ledger.db.lock").unlink()
    with pytest.raises(RefusedError, match="no file, though there was one"):
        Ledger(survivor)
    with Ledger(survivor, unsafe_start_over=True) as ledger:
        assert ledger.high_water("mark") == 0
        assert survivor.with_name("ledger.db.bad-1-wal").exists()


def test_every_bad_ledger_is_kept(path: Path) -> None:
    for number in (1, 2, 3):
        Ledger(path).close()
        damaged(path, "emptied")
        with Ledger(path, unsafe_start_over=True) as ledger:
            assert ledger.moved_aside == path.with_name(f"ledger.db.bad-{number}")


def test_damage_found_while_it_runs_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        for number in range(200):
            ledger.put_document(f"d{number}", bytes(9000))
    with Ledger(path) as ledger:
        with path.open("r+b") as file:
            for page in range(12, 400):
                file.seek(4096 * page)
                file.write(b"\xa5" * 4096)
        with pytest.raises(RefusedError, match="damaged"):
            for number in range(200):
                ledger.document(f"d{number}")


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger._database.execute("PRAGMA user_version=99")
    with pytest.raises(RefusedError, match="schema version 99; allowed: schema version 2 or older; run the newer agent"):
        Ledger(path, unsafe_start_over=True)
    assert not list(path.parent.glob("*bad*"))


def test_a_new_migration_step_is_taken_once_and_in_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(path) as ledger:
        ledger.increment("a")
    monkeypatch.setattr(ledger_module, "USABLE_FROM", len(MIGRATIONS) + 1)
    monkeypatch.setattr(ledger_module, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE more (x)", "CREATE TABL")))
    with pytest.raises(RuntimeError, match="syntax"):
        Ledger(path)
    monkeypatch.setattr(ledger_module, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE more (x)",)))
    for _ in range(2):
        with Ledger(path) as ledger:
            assert ledger._database.execute("PRAGMA user_version") == [(len(MIGRATIONS) + 1,)]
            assert ledger._database.execute("SELECT * FROM more") == []
            assert ledger.count("a") == 1


def test_a_second_process_is_told_who_has_the_ledger(path: Path) -> None:
    program = f"from edge_agent.store.ledger import Ledger; Ledger(__import__('pathlib').Path({str(path)!r}))"
    with Ledger(path) as ledger:
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert f"ledger.db: in use by 'process {os.getpid()} " in second.stderr
        assert "UnavailableError" in second.stderr
        with pytest.raises(UnavailableError, match="end it first, or use another state folder"):
            Ledger(path)
        assert ledger.increment("a") == 1
    with Ledger(path) as ledger:
        assert ledger.increment("a") == 2


def test_another_program_that_has_the_file_open_is_waited_for_and_then_named_busy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 10)
    Ledger(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="database is locked; end the program that has it open"):
            Ledger(path)
    Ledger(path).close()


def test_a_closed_ledger_says_so_and_closes_twice(path: Path) -> None:
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(RuntimeError, match="closed"):
        ledger.increment("a")


def test_a_folder_that_may_not_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="Not a directory|File exists"):
        Ledger(tmp_path / "file" / "ledger.db")


def fill(ledger: Ledger, prefix: str, size_bytes: int = 20_000) -> int:
    """Accept requests until the disk is full; how many."""
    for number in count():
        try:
            ledger.accept(f"{prefix}{number}", bytes(size_bytes))
        except UnavailableError:
            return number
    raise AssertionError("never full")


def check_whole(ledger: Ledger, prefix: str, accepted: int) -> None:
    assert [key for key, _ in ledger.unanswered(1000)] == [f"{prefix}{number}" for number in range(accepted)]


def test_a_full_database_refuses_the_whole_transaction_and_works_again(ledger: Ledger) -> None:
    pages = ledger._database.execute("PRAGMA page_count")[0][0]
    ledger._database.execute(f"PRAGMA max_page_count={pages + 20}")
    accepted = fill(ledger, "r")
    assert accepted > 0
    with pytest.raises(UnavailableError, match="full; free some space"), ledger.transaction():
        ledger.increment("a")
        ledger.accept("s", bytes(200_000))
    assert ledger.count("a") == 0
    check_whole(ledger, "r", accepted)
    ledger._database.execute("PRAGMA max_page_count=100000")
    assert ledger.increment("a") == 1
    assert ledger.accept("s", bytes(200_000))


def test_a_swallowed_failure_of_one_statement_still_undoes_its_transaction(ledger: Ledger) -> None:
    pages = ledger._database.execute("PRAGMA page_count")[0][0]
    ledger._database.execute(f"PRAGMA max_page_count={pages + 5}")
    with pytest.raises(UnavailableError, match="full"), ledger.transaction():
        ledger.increment("a")
        with pytest.raises(UnavailableError, match="full"):
            ledger.accept("s", bytes(200_000))
        with pytest.raises(UnavailableError, match="full"):
            ledger.increment("b")
    assert [ledger.count(name) for name in "ab"] == [0, 0]
    assert ledger.increment("b") == 1


def test_a_file_size_limit_at_commit_loses_nothing_that_was_acknowledged(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        with files_of_at_most(200_000):
            accepted = fill(ledger, "r")
            with pytest.raises(UnavailableError, match="try again"), ledger.transaction():
                ledger.increment("a")
                ledger.accept("s", bytes(200_000))
        assert (accepted > 0, ledger.count("a")) == (True, 0)
        check_whole(ledger, "r", accepted)
        survivor = after_kill(path, tmp_path / "killed")
        assert ledger.increment("a") == 1
    for again in (path, survivor):
        with Ledger(again) as ledger:
            check_whole(ledger, "r", accepted)


def test_a_full_file_system_refuses_and_works_again_when_there_is_room(tmp_path: Path) -> None:
    with file_system_of_1_mb(tmp_path / "small") as folder, Ledger(folder / "ledger.db") as ledger:
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(600_000))
        accepted = fill(ledger, "r")
        assert accepted > 0
        check_whole(ledger, "r", accepted)
        with pytest.raises(UnavailableError, match="full"):
            ledger.accept("s", bytes(200_000))
        ballast.unlink()
        for number in range(accepted):
            ledger.answer(f"r{number}", b"", owed(f"k{number}", b""))
        assert len(ledger.owed(1000)) == accepted


def test_a_ledger_opens_on_a_full_disk(tmp_path: Path) -> None:
    with file_system_of_1_mb(tmp_path / "small") as folder:
        with Ledger(folder / "ledger.db") as ledger:
            ledger.raise_high_water("mark", 7)
        with pytest.raises(OSError, match="No space left"), (folder / "ballast").open("wb") as ballast:
            while True:
                ballast.write(bytes(4096))
        with Ledger(folder / "ledger.db") as ledger:
            assert ledger.high_water("mark") == 7
            with pytest.raises(UnavailableError, match="free some space"):
                ledger.raise_high_water("mark", 8)
            (folder / "ballast").unlink()
            ledger.raise_high_water("mark", 8)


def test_the_log_of_a_full_disk_is_folded_so_that_its_room_can_be_used(tmp_path: Path) -> None:
    """Rewriting one document grows the log only; without the fold it would fill the disk for ever."""
    with file_system_of_1_mb(tmp_path / "small") as folder:
        with Ledger(folder / "ledger.db") as ledger:
            ledger.put_document("table", bytes(50_000))
        with Ledger(folder / "ledger.db") as ledger:
            refused = 0
            for number in range(100):
                try:
                    ledger.put_document("table", bytes([number]) * 50_000)
                except UnavailableError:
                    refused += 1
                    ledger.put_document("table", bytes([number]) * 50_000)
                assert ledger.document("table") == bytes([number]) * 50_000
        assert 0 < refused < 20


def test_a_file_system_that_went_read_only_is_unavailable_until_it_is_writable_again(tmp_path: Path) -> None:
    with file_system_of_1_mb(tmp_path / "small") as folder:
        path = folder / "ledger.db"
        with Ledger(path) as ledger:
            ledger.increment("a")
        remount(folder, "ro")
        with pytest.raises(UnavailableError, match="Read-only file system; remount"):
            Ledger(path)
        remount(folder, "rw")
        with Ledger(path) as ledger:
            assert ledger.increment("a") == 2


def test_every_field_of_an_owed_message_comes_back(ledger: Ledger) -> None:
    full = Owed("k", "t", b"p", b"c", "r", 5)
    bare = Owed("l", "t", b"")
    assert all(getattr(full, column.name) is not None for column in fields(full))
    ledger.owe(full)
    ledger.owe(bare)
    assert [message for _, message in ledger.owed(10)] == [full, bare]
