"""What was appended is there, in order, up to the first damage; nothing is ever read that was not written."""

from __future__ import annotations

import errno
from array import array
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import SINK_TOKENS
from edge_agent.store.files import Disk
from edge_agent.store.kv_journal import MAX_RECORD_IDS, BlockRows, TokenLog
from tests.kv_child import FORMAT, Bytes
from tests.virtual_disk import VirtualDisk, crashes, survivals

FOLDER = Path("/state")
LOG, ROWS = FOLDER / "x.log", FOLDER / "x.0.rows"
IDS = array("I", range(1000, 1000 + SINK_TOKENS + 64))
KV = Bytes(IDS)
PARENT = bytes(range(32))


def log_of(*appends: tuple[int, list[int]]) -> tuple[VirtualDisk, TokenLog]:
    disk = VirtualDisk()
    log = TokenLog.create(disk, LOG, "alice", FORMAT.fingerprint)
    for position, ids in appends:
        log.append(position, ids)
    return disk, log


def rows_of(count: int) -> tuple[VirtualDisk, BlockRows]:
    disk = VirtualDisk()
    rows = BlockRows.create(disk, ROWS, FORMAT, 0, PARENT)
    for index in range(count):
        append_row(rows, index)
    return disk, rows


def append_row(rows: BlockRows, index: int, count: int = 1) -> None:
    first = SINK_TOKENS + index
    rows.append(index, IDS[first : first + count], KV.rows(first, first + count))


def reopened(disk: Disk) -> BlockRows:
    rows = BlockRows.open(disk, ROWS, FORMAT)
    rows.check(IDS)
    return rows


def test_a_log_comes_back_with_its_name_fingerprint_and_ids() -> None:
    disk, log = log_of((0, [1, 2, 3]), (3, [4]), (4, [2**31 - 1] * (MAX_RECORD_IDS + 1)))
    again = TokenLog.open(disk, LOG)
    assert (again.name, again.fingerprint, again.ids, again.cut_bytes) == ("alice", FORMAT.fingerprint, log.ids, 0)
    assert again.size_bytes == log.size_bytes == len(disk.names_now[LOG].data)


def test_ids_at_an_earlier_position_replace_what_was_there_also_after_a_restart() -> None:
    disk, log = log_of((0, [1, 2, 3, 4]), (2, [9]), (3, [8, 7]), (4, []))
    assert list(log.ids) == [1, 2, 9, 8] == list(TokenLog.open(disk, LOG).ids)


def test_a_position_past_the_end_is_a_bug_and_writes_nothing() -> None:
    disk, log = log_of((0, [1]))
    before = disk.content(LOG)
    with pytest.raises(ValueError, match="position 2 of a session of 1 tokens"):
        log.append(2, [5])
    assert (disk.content(LOG), list(log.ids)) == (before, [1])


def test_a_new_fingerprint_is_remembered() -> None:
    disk, log = log_of((0, [1]))
    log.stamp(b"n" * 32)
    log.append(1, [2])
    again = TokenLog.open(disk, LOG)
    assert (again.fingerprint, list(again.ids)) == (b"n" * 32, [1, 2])


def test_a_flipped_bit_at_any_byte_of_a_log_cuts_it_there_and_invents_nothing() -> None:
    written = [*range(1, 9)]
    for at in range(len(log_of(*((n, [n + 1]) for n in range(8)))[0].content(LOG) or b"")):
        disk, _ = log_of(*((n, [n + 1]) for n in range(8)))
        disk.names_now[LOG].data[at] ^= 1 << at % 8
        try:
            log = TokenLog.open(disk, LOG)
        except RefusedError:
            assert at < 12 + 8 + 16 + 32 + 5, "the head is sound"
            continue
        assert list(log.ids) == written[: len(log.ids)]
        assert len(log.ids) < 8
        assert log.cut_bytes


def test_a_log_cut_at_any_length_or_with_a_zero_tail_keeps_its_sound_beginning_and_goes_on() -> None:
    whole = log_of((0, [1, 2]), (2, [3]), (3, [4]))[0].content(LOG) or b""
    for kept in range(12 + 8 + 16 + 32 + 5, len(whole)):
        for tail in (b"", bytes(len(whole) - kept), whole[: len(whole) - kept]):
            disk = VirtualDisk()
            fd = disk.create(LOG)
            disk.write(fd, whole[:kept] + tail)
            disk.close(fd)
            log = TokenLog.open(disk, LOG)
            assert list(log.ids) == [1, 2, 3, 4][: len(log.ids)]
            log.append(len(log.ids), [77])
            assert list(TokenLog.open(disk, LOG).ids) == list(log.ids)
            assert TokenLog.open(disk, LOG).cut_bytes == 0


def test_a_record_of_another_log_is_none() -> None:
    disk, _ = log_of((0, [1]))
    other = log_of((0, [1]), (1, [2]))[0].content(LOG) or b""
    disk.names_now[LOG].data += other[-16:]
    assert list(TokenLog.open(disk, LOG).ids) == [1]


def test_a_log_in_many_pieces_is_rewritten_in_few_by_the_first_append() -> None:
    disk, log = log_of(*((n, [n]) for n in range(5000)))
    again = TokenLog.open(disk, LOG)
    again.append(5000, [5000])
    assert again.size_bytes < log.size_bytes // 3
    assert list(TokenLog.open(disk, LOG).ids) == list(range(5001))


def test_a_log_is_whole_after_a_power_cut_while_it_is_rewritten() -> None:
    disk, log = log_of((0, [1, 2, 3]))
    log.file.sync()
    disk.names_now[LOG].data += b"torn"
    disk.names_now[LOG].durable += b"torn"

    def mend(disk: VirtualDisk) -> None:
        TokenLog.open(disk, LOG).append(3, [4])

    for crashed in crashes(mend, disk.rebooted(lambda _: True)):
        assert list(TokenLog.open(crashed, LOG).ids) in ([1, 2, 3], [1, 2, 3, 4])


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failed_append_keeps_nothing_and_the_next_one_is_read(error: int) -> None:
    class Torn(VirtualDisk):
        """Half of what fails is written."""

        torn = False

        def write(self, fd: int, data: bytes) -> None:
            if self.torn:
                self.torn = False
                super().write(fd, data[: len(data) // 2])
                raise OSError(error, "failed")
            super().write(fd, data)

    disk = Torn()
    log = TokenLog.create(disk, LOG, "alice", FORMAT.fingerprint, [1])
    rows = BlockRows.create(disk, ROWS, FORMAT, 0, PARENT)
    append_row(rows, 0)
    disk.torn = True
    with pytest.raises(OSError, match="failed"):
        log.append(1, [2])
    disk.torn = True
    with pytest.raises(OSError, match="failed"):
        append_row(rows, 1)
    assert (list(log.ids), rows.count) == ([1], 1)
    log.append(1, [3])
    append_row(rows, 1)
    assert list(TokenLog.open(disk, LOG).ids) == [1, 3]
    assert reopened(disk).read(2) == KV.rows(SINK_TOKENS, SINK_TOKENS + 2)


def test_what_was_synced_survives_a_power_cut_and_what_follows_is_never_misread() -> None:
    disk, log = log_of((0, [1, 2]))
    log.file.sync()
    for n in range(3, 300):
        log.append(n - 1, [n])
    for keeps in survivals(40):
        ids = list(TokenLog.open(disk.rebooted(keeps), LOG).ids)
        assert ids == list(range(1, len(ids) + 1))
        assert len(ids) >= 2


def test_rows_come_back_as_they_were_appended() -> None:
    disk, rows = rows_of(3)
    append_row(rows, 3, 61)
    again = reopened(disk)
    assert (again.count, again.parent, again.block) == (64, PARENT, 0)
    assert again.read(64) == KV.rows(SINK_TOKENS, SINK_TOKENS + 64)
    assert again.read(2) == KV.rows(SINK_TOKENS, SINK_TOKENS + 2)


def test_a_flipped_bit_at_any_byte_of_a_rows_file_keeps_the_rows_before_it_only() -> None:
    size_bytes = len(rows_of(3)[0].content(ROWS) or b"")
    for at in range(size_bytes):
        disk, rows = rows_of(3)
        disk.names_now[ROWS].data[at] ^= 1 << at % 8
        try:
            again = reopened(disk)
        except RefusedError:
            again = None
        if again is not None and again.parent == PARENT and again.block == 0:
            assert again.count < 3
            assert again.read(again.count) == KV.rows(SINK_TOKENS, SINK_TOKENS + again.count)
        with suppress(RefusedError):
            assert rows.read(3) == KV.rows(SINK_TOKENS, SINK_TOKENS + 3)
            assert at < size_bytes - 3 * (FORMAT.row_bytes + 20), "a damaged row was not told"


def test_a_rows_file_cut_at_any_length_keeps_its_whole_rows_and_goes_on() -> None:
    size_bytes = len(rows_of(3)[0].content(ROWS) or b"")
    for kept in range(0, size_bytes):
        for tail in (0, size_bytes - kept):
            disk, _ = rows_of(3)
            disk.names_now[ROWS].data[kept:] = bytes(tail)
            try:
                again = reopened(disk)
            except RefusedError:
                continue
            if again.parent == PARENT:
                sound = again.count
                assert sound < 3
                append_row(again, sound)
                assert reopened(disk).read(sound + 1) == KV.rows(SINK_TOKENS, SINK_TOKENS + sound + 1)


def test_rows_of_other_ids_another_block_or_another_model_are_none() -> None:
    disk, _ = rows_of(3)
    other = array("I", IDS)
    other[SINK_TOKENS + 1] += 1
    rows = BlockRows.open(disk, ROWS, FORMAT)
    assert rows.check(other) > 0
    assert rows.count == 1
    with pytest.raises(RefusedError, match="rows of this model"):
        BlockRows.open(disk, ROWS, replace(FORMAT, fingerprint=b"g" * 32))
    with pytest.raises(RefusedError, match="rows of this model"):
        BlockRows.open(disk, ROWS, replace(FORMAT, row_bytes=47))


def test_rows_that_are_there_are_not_written_twice_and_others_replace_what_follows() -> None:
    disk, rows = rows_of(5)
    size_bytes, changes = rows.file.size_bytes, disk.changes
    append_row(rows, 0, 5)
    assert (rows.file.size_bytes, disk.changes) == (size_bytes, changes)
    rows.append(2, IDS[SINK_TOKENS + 2 : SINK_TOKENS + 3], b"x" * FORMAT.row_bytes)
    expected = KV.rows(SINK_TOKENS, SINK_TOKENS + 2) + b"x" * FORMAT.row_bytes
    assert (rows.count, rows.read(3), reopened(disk).read(3), reopened(disk).count) == (3, expected, expected, 3)


def test_a_gap_between_rows_is_a_bug() -> None:
    _, rows = rows_of(2)
    with pytest.raises(ValueError, match="rows 3 to 4 after 2 of block 0"):
        append_row(rows, 3)


def test_a_descriptor_is_held_only_until_it_is_given_back() -> None:
    disk, log = log_of((0, [1]), (1, [2]))
    assert len(disk.open_files) == 1
    log.file.close()
    assert not disk.open_files
    log.append(2, [3])
    assert list(TokenLog.open(disk, LOG).ids) == [1, 2, 3]
