"""A session outlives the process and the power; what it gives back is checked, or not given."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_agent.core.chat import Tier
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import KvFormat, block_start, sealed_blocks
from edge_agent.store.files import Disk
from edge_agent.store.kv_sessions import SessionStore
from tests.kv_child import FORMAT, Bytes, Chat
from tests.test_kill import over_cycles
from tests.virtual_disk import VirtualDisk, crashes, mixture

FOLDER = Path("/state/kv")
PLENTY = 2**30


def store_on(disk: Disk, folder: Path = FOLDER, kv_format: KvFormat = FORMAT) -> SessionStore:
    return SessionStore(folder, kv_format, PLENTY, PLENTY, disk)


def long_chat(store: SessionStore, name: str, blocks: int = 5, salt: int = 0) -> Chat:
    """A session over more blocks than the window has, by a prompt and steps of 16 tokens."""
    chat = Chat(store, name).begin()
    chat.prompt([salt + n for n in range(7)])
    while len(chat.ids) < block_start(blocks) + 20:
        chat.answer([salt + len(chat.ids) + n for n in range(16)])
    chat.end()
    return chat


def test_a_session_comes_back_after_a_restart_with_every_token() -> None:
    disk = VirtualDisk()
    chat = long_chat(store_on(disk), "alice")
    again = Chat.resumed(store_on(disk), "alice")
    assert (again.ids, again.tokens, again.sealed) == (chat.ids, len(chat.ids) - 1, sealed_blocks(len(chat.ids) - 1))


def test_a_power_cut_at_any_write_loses_nothing_that_was_synced_and_gives_back_nothing_unsound() -> None:
    chats: list[Chat] = []

    def talk(disk: VirtualDisk) -> None:
        chats.append(Chat(store_on(disk), "alice"))
        chats[-1].begin()
        chats[-1].prompt(list(range(7)))
        for _ in range(3):
            while len(chats[-1].ids) % 96 < 70:
                chats[-1].answer([len(chats[-1].ids) + n for n in range(24)])
            chats[-1].prompt([1000 + n for n in range(40)])
            chats[-1].end()

    disk = VirtualDisk()
    disk.make_folder(FOLDER)
    states = 0
    for crashed in crashes(talk, disk, random_ones=3):
        states += 1
        must_be_sound(crashed, chats[-1])
    assert states > 700


def test_a_second_power_cut_while_the_first_is_made_good_loses_nothing_either() -> None:
    def talk(disk: VirtualDisk) -> None:
        chats.append(Chat(store_on(disk), "alice"))
        chats[-1].begin()
        chats[-1].prompt(list(range(264)))
        chats[-1].end()
        chats[-1].answer(list(range(70)))

    def go_on(disk: VirtualDisk) -> None:
        again = Chat.resumed(store_on(disk), "alice")
        again.prompt([9] * 70)
        again.end()

    chats: list[Chat] = []
    disk = VirtualDisk()
    disk.make_folder(FOLDER)
    synced = [crashed for crashed in crashes(talk, disk, random_ones=3) if chats[-1].synced >= 265]
    before = chats[-1]
    states = 0
    for crashed in synced[::20]:
        for twice in crashes(go_on, crashed, random_ones=1):
            states += 1
            store = store_on(twice)
            held = store.resume("alice")
            assert held is not None
            assert list(held.ids[:265]) == before.ids[:265]
            loaded = store.load(held)
            assert loaded.tokens >= 264
            assert Bytes(held.ids).agree(loaded)
    assert states > 200


def must_be_sound(disk: VirtualDisk, before: Chat) -> None:
    store = store_on(disk)
    held = store.resume("alice")
    if held is None:
        assert before.synced == 0
        return
    loaded = store.load(held)
    assert list(held.ids) == before.ids[: len(held.ids)]
    assert len(held.ids) >= before.synced
    assert loaded.tokens >= before.synced_tokens
    assert Bytes(held.ids).agree(loaded)
    after = Chat.resumed(store, "alice")
    after.prompt([7] * 30)
    after.end()
    again = Chat.resumed(store_on(disk.killed()), "alice")
    assert (again.ids, again.tokens) == (after.ids, len(after.ids) - 1)


def test_a_block_that_a_power_cut_spoilt_keeps_those_that_it_pushed_out_of_the_window() -> None:
    disk = VirtualDisk()
    store = store_on(disk)
    chat = long_chat(store, "alice", blocks=4)
    before = set(disk.names_now)
    store.seal("alice", 3, chat.kv.block(3))
    (path,) = set(disk.names_now) - before
    damage(disk, path, "zero tail")
    again = store_on(disk)
    again.sync("alice")
    held = again.resume("alice")
    assert held is not None
    loaded = again.load(held)
    assert chat.kv.agree(loaded)
    assert loaded.tokens == chat.tokens


def test_sync_in_a_thread_beside_appends_loses_nothing(tmp_path: Path) -> None:
    store = store_on(Disk(), tmp_path)
    store.create("alice")
    store.pin("alice")
    ended = threading.Event()

    def sync() -> None:
        while not ended.is_set():
            store.sync("alice")

    class Unsynced(Chat):
        def _sync(self) -> None:
            pass

    chat = Unsynced(store, "alice")
    with ThreadPoolExecutor() as pool:
        syncing = pool.submit(sync)
        chat.prompt(list(range(30)))
        for _ in range(300):
            chat.answer([len(chat.ids), 5])
        ended.set()
        syncing.result()
    store.sync("alice")
    again = Chat.resumed(store_on(Disk(), tmp_path), "alice")
    assert (again.ids, again.tokens, again.sealed) == (chat.ids, chat.tokens, chat.sealed)
    assert len(list((tmp_path / "sessions").iterdir())) <= 3


def damage(disk: VirtualDisk, path: Path, how: str) -> None:
    data = disk.names_now[path].data
    size_bytes = len(data)
    match how:
        case "flip":
            data[size_bytes // 2] ^= 1
        case "truncate":
            del data[size_bytes // 2 :]
        case "empty":
            data.clear()
        case "zero tail":
            data[size_bytes // 2 :] = bytes(size_bytes - size_bytes // 2)
        case "foreign":
            data[:] = b"SlyKVb\x00\x01" + bytes(size_bytes - 8)
        case "missing":
            disk.unlink(path)


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "zero tail", "foreign", "missing"])
def test_whatever_file_is_damaged_a_sound_prefix_comes_back_and_the_reason_is_told(how: str) -> None:
    clean = VirtualDisk()
    chat = long_chat(store_on(clean), "alice", blocks=3)
    paths = [path for path in clean.names_now if path.suffix != ".log"]
    assert len(paths) == 1 + 2 + 2, "a prelude, two blocks, two files of rows"
    for path in paths:
        disk = clean.rebooted(lambda _: True)
        damage(disk, path, how)
        reports: list[str] = []
        store = SessionStore(FOLDER, FORMAT, PLENTY, PLENTY, disk, reports.append)
        held = store.resume("alice")
        assert held is not None
        loaded = store.load(held)
        assert loaded.tokens < chat.tokens
        assert chat.kv.agree(loaded)
        assert list(held.ids) == chat.ids
        assert reports or how == "missing"
        again = Chat.resumed(store, "alice")
        again.prompt([5, 6, 7])
        again.end()
        after = Chat.resumed(store_on(disk), "alice")
        assert (after.ids, after.tokens) == (again.ids, len(again.ids) - 1)


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "zero tail", "foreign", "missing"])
def test_damage_while_the_process_runs_is_found_when_it_is_read(how: str) -> None:
    for number in range(5):
        disk = VirtualDisk()
        store = SessionStore(FOLDER, FORMAT, 0, PLENTY, disk)
        chat = long_chat(store, "alice", blocks=3)
        path = [path for path in disk.names_now if path.suffix != ".log"][number]
        held = store.resume("alice")
        assert held is not None
        damage(disk, path, how)
        loaded = store.load(held)
        assert chat.kv.agree(loaded)
        assert 1 <= len(loaded.notes) <= 2
        assert loaded.tokens < held.tokens


def test_a_log_without_a_sound_head_is_removed_with_all_that_hung_on_it() -> None:
    disk = VirtualDisk()
    long_chat(store_on(disk), "alice")
    damage(disk, next(path for path in disk.names_now if path.suffix == ".log"), "foreign")
    reports: list[str] = []
    store = SessionStore(FOLDER, FORMAT, PLENTY, PLENTY, disk, reports.append)
    assert (store.names(), store.bytes_on_disk, disk.names_now) == ([], 0, {})
    assert "without a sound head" in reports[0]


def test_a_log_under_another_name_is_not_that_session() -> None:
    disk = VirtualDisk()
    store = store_on(disk)
    store.create("alice")
    log = next(iter(disk.names_now))
    disk.rename(log, log.with_name("0" * 32 + ".log"))
    assert store_on(disk).names() == []


def test_no_file_is_called_what_a_user_typed() -> None:
    disk = VirtualDisk()
    long_chat(store_on(disk), "alice-and-bob")
    assert not [path for path in disk.names_now if "alice" in path.name]
    for name in ("../../etc/passwd", "a/b", "", "~", "~xyz", ".hidden", "a" * 65, "a\x00", "~" + "a" * 33):
        with pytest.raises(RefusedError, match="session"):
            store_on(disk).create(name)


def test_unnamed_sessions_get_names_that_no_user_can_give() -> None:
    store = store_on(VirtualDisk())
    names = {store.new_name() for _ in range(100)}
    assert len(names) == 100
    for name in names:
        store.create(name)
    with pytest.raises(RefusedError, match="which exists"):
        store.create(next(iter(names)))


def test_what_is_not_there_is_said_so() -> None:
    store = store_on(VirtualDisk())
    assert store.resume("nobody") is None
    assert store.match([1] * 100) is None
    store.drop("nobody")
    for call in (lambda: store.append("nobody", 0, [1]), lambda: store.sync("nobody"), lambda: store.pin("nobody")):
        with pytest.raises(UnavailableError, match="session nobody: it is not in the store"):
            call()


def test_bugs_of_the_caller_are_told_and_change_nothing() -> None:
    disk = VirtualDisk()
    store = store_on(disk)
    chat = long_chat(store, "alice")
    before = {path: bytes(inode.data) for path, inode in disk.names_now.items()}
    position, row = len(chat.ids), bytes(FORMAT.row_bytes)
    with pytest.raises(ValueError, match="ids at position 3"):
        store.append("alice", 3, [1])
    with pytest.raises(ValueError, match="bytes of rows from position"):
        store.append("alice", position, [], row[:-1], position - 1)
    with pytest.raises(ValueError, match="bytes of rows from position"):
        store.append("alice", position, [], row, position)
    with pytest.raises(ValueError, match="block 99 of a session"):
        store.seal("alice", 99, bytes(FORMAT.block_bytes))
    with pytest.raises(RefusedError, match="KV payload"):
        store.seal("alice", 4, b"short")
    with pytest.raises(RuntimeError, match="not pinned"):
        store.unpin("alice")
    assert {path: bytes(inode.data) for path, inode in disk.names_now.items()} == before


def test_a_client_that_resends_its_history_finds_all_of_it() -> None:
    store = store_on(VirtualDisk())
    chat = long_chat(store, "~a1")
    long_chat(store, "~b2", salt=5000)
    held = store.match([*chat.ids, 9, 9, 9])
    assert held is not None
    assert (held.name, held.tokens, held.whole, list(held.pending)) == ("~a1", chat.tokens, True, chat.ids[-1:])
    assert chat.kv.agree(store.load(held))


def test_at_least_one_token_of_a_prompt_is_left_to_be_computed() -> None:
    store = store_on(VirtualDisk())
    chat = long_chat(store, "~a1")
    held = store.match(chat.ids[: chat.tokens])
    assert held is not None
    assert (held.tokens, held.whole) == (chat.tokens - 1, False)
    assert chat.kv.agree(store.load(held))


@pytest.mark.parametrize("same", [3, 4, 5, 67, 68, 69, 131, 132, 133, 200, 259, 260, 261, 300, 330])
def test_a_match_goes_as_far_as_what_is_restorable_and_no_further(same: int) -> None:
    """Over a window of two blocks: blocks that have left it are gone, and what needs them cannot be restored."""
    wide = KvFormat(b"f" * 32, 48, 1200, 96, window_blocks=8)
    for kv_format in (FORMAT, wide):
        store = store_on(VirtualDisk(), kv_format=kv_format)
        chat = Chat(store, "~a1", kv_format).begin()
        chat.prompt(list(range(310)))
        chat.answer([1, 2, 3])
        chat.end()
        held = store.match([*chat.ids[:same], 77_777, 77_777])
        if held is None:
            assert same < 4
            continue
        assert chat.kv.agree(store.load(held))
        assert held.tokens <= same
        if kv_format is wide or same >= block_start(3):
            assert held.tokens == (min(same, 313) if same >= block_start(3) else block_start(max(0, same - 4) // 64))


def test_sealed_blocks_are_shared_and_counted_once_and_outlive_their_first_session() -> None:
    disk = VirtualDisk()
    kv_format = KvFormat(b"f" * 32, 48, 1200, 96, window_blocks=8)
    store = store_on(disk, kv_format=kv_format)
    first = Chat(store, "first", kv_format).begin()
    first.prompt(list(range(300)))
    first.end()
    alone = store.bytes_on_disk
    held = store.match([*first.ids[:190], 1, 2, 3])
    assert held is not None
    fork = store.fork(held, held.tokens, "~f")
    assert (fork.tokens, fork.sealed, fork.blocks, list(fork.ids)) == (132, 2, held.blocks, first.ids[:132])
    assert store.bytes_on_disk - alone < 1200
    store.drop("first")
    loaded = store.load(fork)
    assert loaded.tokens == 132
    assert first.kv.agree(loaded)
    store.drop("~f")
    assert (store.bytes_on_disk, disk.names_now) == (0, {})


def test_a_fork_in_the_tail_copies_its_rows_and_both_go_on_by_themselves() -> None:
    disk = VirtualDisk()
    store = store_on(disk)
    first = long_chat(store, "first")
    held = store.match([*first.ids[:330], 1, 2, 3])
    assert held is not None
    assert held.tokens == 330
    store.fork(held, 330, "second")
    second = Chat.resumed(store, "second")
    assert (second.tokens, second.ids) == (330, first.ids[:330])
    for chat, token in ((first, 1), (second, 2)):
        chat.prompt([token] * 100)
        chat.end()
    for chat in (first, second):
        again = Chat.resumed(store_on(disk), chat.name)
        assert (again.ids, again.tokens) == (chat.ids, chat.tokens)


def test_a_rewound_session_has_forgotten_what_came_after() -> None:
    disk = VirtualDisk()
    store = store_on(disk)
    chat = long_chat(store, "alice")
    for tokens in (len(chat.ids) - 1, 330, 300, 200, 3, 0):
        store.rewind("alice", tokens)
        for each in (store, store_on(disk)):
            held = each.resume("alice")
            assert held is not None
            assert list(held.ids) == chat.ids[:tokens]
            assert chat.kv.agree(each.load(held))
            assert held.tokens <= tokens
    again = Chat.resumed(store, "alice")
    again.prompt([4, 5, 6] * 70)
    again.end()
    store.rewind("alice", 190)
    store.prompt("alice", [8] * 20)
    for each in (store, store_on(disk)):
        held = each.resume("alice")
        assert held is not None
        assert held.tokens == each.load(held).tokens == 190
    store.rewind("alice", 190)
    again = Chat.resumed(store, "alice")
    again.prompt([4, 5, 6] * 70)
    again.end()
    assert Chat.resumed(store_on(disk), "alice").tokens == len(again.ids) - 1


def test_an_update_of_the_model_keeps_the_history_and_says_that_it_must_be_prefilled(tmp_path: Path) -> None:
    chat = long_chat(store_on(Disk(), tmp_path), "alice")
    long_chat(store_on(Disk(), tmp_path), "~a1", salt=9000)
    updated = KvFormat(b"u" * 32, 48, 1200, 96, 2)
    store = store_on(Disk(), tmp_path, updated)
    held = store.resume("alice")
    assert held is not None
    assert (list(held.ids), held.tokens) == (chat.ids, 0)
    assert "another build of the model" in held.notes[0]
    assert store.names() == ["alice"]
    assert store.bytes_on_disk == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10_000
    again = Chat.resumed(store, "alice", updated)
    again.prompt([1, 2])
    again.end()
    held = store_on(Disk(), tmp_path, updated).resume("alice")
    assert held is not None
    assert (held.tokens, held.notes) == (len(again.ids) - 1, ())


def test_load_says_where_it_came_from() -> None:
    disk = VirtualDisk()
    store = store_on(disk)
    long_chat(store, "alice")
    cold = store_on(disk)
    for each, tier in ((store, Tier.RAM), (cold, Tier.DISK), (cold, Tier.RAM)):
        held = each.resume("alice")
        assert held is not None
        assert (held.tier, each.load(held).tier) == (tier, tier)


def test_a_look_is_no_use() -> None:
    disk = VirtualDisk()
    store = store_on(disk)
    for name in ("a", "b"):
        short_chat(store, name, ord(name))
    assert store.look("c") is None
    assert store.look("a") == store.resume("a")
    assert store.names() == ["a", "b"]
    store.look("b")
    assert store.names() == ["a", "b"]


def test_a_descriptor_is_open_only_for_a_live_session() -> None:
    disk = VirtualDisk()
    store = store_on(disk)
    chat = long_chat(store, "alice")
    assert not disk.open_files
    store.pin("alice")
    chat.answer([1])
    assert disk.open_files
    store.unpin("alice")
    assert not disk.open_files


def used(disk: VirtualDisk) -> int:
    return sum(len(inode.data) for inode in disk.names_now.values())


def short_chat(store: SessionStore, name: str, salt: int) -> Chat:
    """About 6 KB: a prelude and 80 rows."""
    chat = Chat(store, name).begin()
    chat.prompt([salt * 1000 + n for n in range(84)])
    chat.end()
    return chat


def test_unnamed_sessions_give_way_before_named_ones_the_least_recently_used_first() -> None:
    one = VirtualDisk()
    short_chat(store_on(one), "named", 0)
    disk, budget_bytes = VirtualDisk(), 5 * used(one) + used(one) // 2
    store = SessionStore(FOLDER, FORMAT, PLENTY, budget_bytes, disk)
    short_chat(store, "named", 0)
    for salt in range(1, 5):
        short_chat(store, f"~{salt}", salt)
    assert store.match([*range(2000, 2084), 1]) is not None
    short_chat(store, "~5", 5)
    assert sorted(store.names()) == ["named", "~2", "~3", "~4", "~5"]
    assert store.bytes_on_disk == used(disk) <= budget_bytes


def test_a_live_session_never_gives_way_and_the_refusal_tells_the_bytes() -> None:
    disk = VirtualDisk()
    store = SessionStore(FOLDER, FORMAT, PLENTY, 14_000, disk)
    for name in ("~1", "~2"):
        short_chat(store, name, int(name[1:]))
        store.pin(name)
    with pytest.raises(UnavailableError, match=r"session ~3: no room for its KV: \d+ bytes needed, \d+ free of 14000"):
        short_chat(store, "~3", 3)
    assert {"~1", "~2"} <= set(store.names())
    store.unpin("~1")
    short_chat(store, "~4", 4)
    assert "~1" not in store.names()


def test_a_new_session_is_refused_when_named_ones_alone_fill_the_disk_and_they_stay() -> None:
    disk = VirtualDisk()
    store = SessionStore(FOLDER, FORMAT, PLENTY, 14_000, disk)
    named = [short_chat(store, name, salt) for salt, name in enumerate(("a", "b"))]
    with pytest.raises(UnavailableError, match="held by sessions that are named or live; drop a session, or raise disk_bytes"):
        short_chat(store, "~3", 3)
    for chat in named:
        assert Chat.resumed(store, chat.name).tokens == chat.tokens


def test_a_named_session_takes_the_kv_of_another_named_one_but_not_its_history() -> None:
    disk = VirtualDisk()
    reports: list[str] = []
    store = SessionStore(FOLDER, FORMAT, PLENTY, 14_000, disk, reports.append)
    first, second = short_chat(store, "a", 1), short_chat(store, "b", 2)
    second.prompt(list(range(90)))
    second.end()
    held = store.resume("a")
    assert held is not None
    assert (list(held.ids), held.tokens) == (first.ids, 0)
    assert reports == ["session a gave up its KV for room; its 85 ids stay"]
    assert Chat.resumed(store, "b").tokens == second.tokens
    assert store.bytes_on_disk == used(disk) <= 14_000


def test_a_smaller_budget_is_kept_from_the_start() -> None:
    disk = VirtualDisk()
    store = SessionStore(FOLDER, FORMAT, PLENTY, PLENTY, disk)
    for salt in range(5):
        short_chat(store, f"~{salt}", salt)
    store = SessionStore(FOLDER, FORMAT, PLENTY, 20_000, disk)
    assert store.bytes_on_disk == used(disk) <= 20_000
    assert store.names()
    assert used(VirtualDisk()) == 0


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_error_at_any_operation_is_unavailable_and_the_session_is_sound_afterwards(error: int) -> None:
    for fail_at in range(1, 400):
        disk = VirtualDisk()
        store = store_on(disk)
        chat = long_chat(store, "alice", blocks=3)
        before = list(chat.ids)
        disk.fail_at, disk.error = disk.operations + fail_at, error
        with suppress(UnavailableError):
            chat.prompt([9] * 70)
            chat.answer([8, 8])
            chat.end()
        if disk.operations < disk.fail_at:
            break
        disk.fail_at = None
        again = Chat.resumed(store, "alice")
        assert again.ids[: len(before)] == before
        again.prompt([7] * 70)
        again.end()
        after = Chat.resumed(store_on(disk), "alice")
        assert (after.ids, after.tokens) == (again.ids, again.tokens)
        assert store.bytes_on_disk == used(disk)
    assert 40 < fail_at < 399


TALK = """
import sys
from pathlib import Path
from edge_agent.store.kv_sessions import SessionStore
from tests.kv_child import FORMAT, Chat

class Said(Chat):
    def _say(self, step, first_row):
        super()._say(step, first_row)
        sys.stdout.write(f"said {len(self.ids)}\\n")
        sys.stdout.flush()

store = SessionStore(Path(sys.argv[1]), FORMAT, 2**20, 2**20)
if store.resume("alice") is None:
    store.create("alice")
chat = Said.resumed(store, "alice")
store.pin("alice")
while True:
    if len(chat.ids) % 50 < 3:
        chat.prompt([len(chat.ids) + n for n in range(20)])
    chat.answer([len(chat.ids), 7])
    if len(chat.ids) % 10 == 0:
        chat.end()
"""


def test_a_kill_at_any_time_loses_no_token_that_was_said_and_recomputes_none(tmp_path: Path) -> None:
    def check(said: list[tuple[str, str]]) -> None:
        store = SessionStore(tmp_path, FORMAT, 0, PLENTY)
        chat = Chat.resumed(store, "alice")
        assert len(chat.ids) >= max(int(number) for _, number in said)
        assert chat.tokens >= max(int(number) for _, number in said) - 1
        assert store.bytes_on_disk == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    assert over_cycles(12, TALK, tmp_path, check) > 60


class StoreAgainstModel(RuleBasedStateMachine):
    """The store against plain lists of ids. Budgets hold, what comes back is right, and only unnamed sessions vanish."""

    BUDGET_BYTES = 60_000
    RAM_BYTES = 5_000
    which = st.integers(0, 4)

    @initialize()
    def start(self) -> None:
        self.disk = VirtualDisk()
        self.chats: dict[str, Chat] = {}
        self.open()

    def open(self) -> None:
        self.store = SessionStore(FOLDER, FORMAT, self.RAM_BYTES, self.BUDGET_BYTES, self.disk)

    @contextmanager
    def room(self, name: str) -> Iterator[None]:
        """A refusal for want of room leaves the session as the store has it."""
        try:
            yield
        except UnavailableError as error:
            assert "no room for its KV" in str(error)
            if self.store.resume(name) is None:
                self.chats.pop(name, None)
            else:
                self.chats[name] = Chat.resumed(self.store, name)

    def name(self, number: int) -> str:
        return f"~{number}" if number % 2 else f"n{number}"

    @rule(number=which, salt=st.integers(0, 1), count=st.integers(1, 300))
    def talk(self, number: int, salt: int, count: int) -> None:
        name = self.name(number)
        with self.room(name):
            held = self.store.resume(name)
            if held is None:
                self.chats[name] = Chat(self.store, name).begin()
            else:
                self.chats[name] = Chat.resumed(self.store, name)
            chat = self.chats[name]
            chat.prompt([salt * 10_000 + len(chat.ids) + n for n in range(count)])
            chat.answer([1, 2])
            chat.end()

    @rule(number=which, other=which, share=st.integers(0, 100))
    def fork_from_a_match(self, number: int, other: int, share: int) -> None:
        source, name = self.chats.get(self.name(number)), self.name(other)
        if source is None or self.store.resume(name) is not None:
            return
        prompt = [*source.ids[: len(source.ids) * share // 100], 5, 5, 5]
        held = self.store.match(prompt)
        if held is None:
            return
        assert held.tokens < len(prompt)
        assert list(held.ids[: held.tokens]) == prompt[: held.tokens]
        assert Bytes(prompt).agree(self.store.load(held))
        with self.room(name):
            self.store.fork(held, held.tokens, name)
            self.chats[name] = Chat.resumed(self.store, name)
            assert self.chats[name].ids == prompt[: held.tokens]
            assert self.chats[name].tokens == held.tokens
            self.store.sync(name)

    @rule(number=which, tokens=st.integers(0, 400))
    def rewind(self, number: int, tokens: int) -> None:
        name = self.name(number)
        if self.store.resume(name) is not None:
            with self.room(name):
                self.store.rewind(name, tokens)
                self.store.sync(name)
                del self.chats[name].ids[tokens:]

    @rule(number=which)
    def drop(self, number: int) -> None:
        self.store.drop(self.name(number))
        self.chats.pop(self.name(number), None)
        assert self.store.resume(self.name(number)) is None

    @rule(seed=st.integers(0, 5), cut=st.booleans())
    def restart(self, seed: int, cut: bool) -> None:
        self.disk = self.disk.rebooted(mixture(Random(seed))) if cut else self.disk.killed()
        self.open()

    @rule(number=which, which_file=st.integers(0, 50), at=st.integers(0, 10_000))
    def flip_a_bit(self, number: int, which_file: int, at: int) -> None:
        paths = sorted(path for path, inode in self.disk.names_now.items() if path.suffix != ".log" and inode.data)
        if paths:
            data = self.disk.names_now[paths[which_file % len(paths)]].data
            data[at % len(data)] ^= 1

    @invariant()
    def agrees(self) -> None:
        names = set(self.store.names())
        assert names <= set(self.chats)
        assert {name for name in self.chats if name.startswith("n")} <= names
        self.chats = {name: chat for name, chat in self.chats.items() if name in names}
        for name, chat in self.chats.items():
            held = self.store.resume(name)
            assert held is not None
            assert list(held.ids) == chat.ids
            assert chat.kv.agree(self.store.load(held))
        assert self.store.bytes_on_disk == used(self.disk) <= self.BUDGET_BYTES
        assert self.store.bytes_in_ram <= self.RAM_BYTES


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
