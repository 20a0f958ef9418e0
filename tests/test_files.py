"""Files are replaced in whole, durably, or not at all, whatever happens to the disk in between."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.files import PART_PREFIX, Disk, read_bounded, sweep_parts, write_atomically
from tests.cramped import file_system_of_1_mb, files_of_at_most, remount
from tests.virtual_disk import VirtualDisk, crashes, survivals

FOLDER = Path("/state")
TABLE = FOLDER / "table"
OLD, NEW = b"old" * 700, b"the new one" * 500


class NoFsync(VirtualDisk):
    def fsync(self, fd: int) -> None:
        self._change()


class NoFolderFsync(VirtualDisk):
    def fsync_folder(self, folder: Path) -> None:
        self._change()


class InPlace(VirtualDisk):
    """Renames by copying the bytes, as a program does that writes into the file itself."""

    def rename(self, source: Path, target: Path) -> None:
        data = bytes(self._inode(source).data)
        self.unlink(source)
        if target in self.names_now:
            self.unlink(target)
        fd = self.create(target)
        self.write(fd, data)
        self.fsync(fd)
        self.close(fd)


def disk_with(data: bytes | None) -> VirtualDisk:
    disk = VirtualDisk()
    disk.make_folder(FOLDER)
    if data is not None:
        write_atomically(disk, TABLE, data)
    return disk


def replace_table(disk: VirtualDisk) -> None:
    write_atomically(disk, TABLE, NEW)


def violations(before: bytes | None, kind: type[VirtualDisk] = VirtualDisk) -> list[str]:
    """What is broken after a cut at any change of a replacement, and after a second one in the sweep that follows."""
    found = []
    for crashed in crashes(replace_table, disk_with(before), kind):
        for disk in crashes(lambda disk: sweep_parts(disk, FOLDER), crashed, random_ones=1):
            sweep_parts(disk, FOLDER)
            if disk.content(TABLE) not in (before, NEW):
                found.append("a mix")
            if set(disk.names(FOLDER)) - {TABLE.name}:
                found.append("a leftover")
    finished = disk_with(before).rebooted(lambda _: True, kind=kind)
    replace_table(finished)
    found += ["a loss" for keeps in survivals(6) if finished.rebooted(keeps).content(TABLE) != NEW]
    return sorted(set(found))


@pytest.mark.parametrize("before", [None, OLD])
def test_a_power_cut_at_any_write_leaves_the_old_content_or_the_new(before: bytes | None) -> None:
    assert violations(before) == []


@pytest.mark.parametrize(
    ("kind", "harm"), [(NoFsync, "a mix"), (NoFsync, "a loss"), (NoFolderFsync, "a loss"), (InPlace, "a mix")]
)
def test_the_virtual_disk_shows_the_harm_of_a_missing_fsync_or_rename(kind: type[VirtualDisk], harm: str) -> None:
    assert harm in violations(OLD, kind)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG])
def test_a_disk_error_at_any_operation_is_unavailable_and_nothing_is_half_done(error: int) -> None:
    for fail_at in range(1, 100):
        disk = disk_with(OLD)
        disk.fail_at, disk.error = disk.operations + fail_at, error
        try:
            write_atomically(disk, TABLE, NEW)
        except UnavailableError as refusal:
            assert os.strerror(error) in refusal.reason
            assert refusal.remedy
            assert disk.content(TABLE) in (OLD, NEW)
            assert not disk.open_files
            assert disk.names(FOLDER) == [TABLE.name]
            replace_table(disk)
        else:
            assert fail_at > 5
            break
        assert disk.content(TABLE) == NEW


def test_the_old_content_stays_when_the_new_is_larger_than_files_may_be(tmp_path: Path) -> None:
    path = tmp_path / "table"
    write_atomically(Disk(), path, OLD)
    with files_of_at_most(len(OLD)), pytest.raises(UnavailableError, match=r"table.*too large.*ulimit"):
        write_atomically(Disk(), path, NEW)
    assert path.read_bytes() == OLD
    assert Disk().names(tmp_path) == ["table"]


def test_a_full_file_system_leaves_the_old_content_whole(tmp_path: Path) -> None:
    with file_system_of_1_mb(tmp_path / "small") as folder:
        path = folder / "table"
        write_atomically(Disk(), path, OLD)
        with pytest.raises(UnavailableError, match=r"No space left.*free some space"):
            write_atomically(Disk(), path, bytes(2 * 2**20))
        assert read_bounded(Disk(), path, len(OLD)) == OLD
        write_atomically(Disk(), path, NEW)
        assert path.read_bytes() == NEW


def test_a_file_system_that_went_read_only_is_unavailable_until_it_is_writable_again(tmp_path: Path) -> None:
    with file_system_of_1_mb(tmp_path / "small") as folder:
        path = folder / "table"
        write_atomically(Disk(), path, OLD)
        remount(folder, "ro")
        with pytest.raises(UnavailableError, match=r"Read-only file system; remount"):
            write_atomically(Disk(), path, NEW)
        assert read_bounded(Disk(), path, len(OLD)) == OLD
        remount(folder, "rw")
        write_atomically(Disk(), path, NEW)
        assert path.read_bytes() == NEW


def test_a_written_file_has_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_atomically(Disk(), tmp_path / "public", b"x", 0o644)
        write_atomically(Disk(), tmp_path / "private", b"x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("public", "private")]
    assert modes == [0o644, 0o600]


def test_a_written_link_is_replaced_and_its_target_is_not_touched(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(OLD)
    link.symlink_to(target)
    write_atomically(Disk(), link, NEW)
    assert (target.read_bytes(), link.is_symlink()) == (OLD, False)


def test_two_writers_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / f"{PART_PREFIX}0").write_bytes(b"another's")
    write_atomically(Disk(), tmp_path / "table", NEW)
    assert (tmp_path / f"{PART_PREFIX}0").read_bytes() == b"another's"


def test_the_sweep_takes_leftovers_only(tmp_path: Path) -> None:
    for name in (f"{PART_PREFIX}0", f"{PART_PREFIX}7", "table"):
        (tmp_path / name).write_bytes(OLD)
    assert sweep_parts(Disk(), tmp_path) == 2
    assert Disk().names(tmp_path) == ["table"]


def test_reading_stops_at_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"12345")
    assert read_bounded(Disk(), path, 5) == b"12345"
    with pytest.raises(RefusedError, match=r"record: got more than 4 bytes; allowed: at most 4 bytes"):
        read_bounded(Disk(), path, 4)


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(RefusedError, match="a regular file"):
            read_bounded(Disk(), path, 100)


def test_a_missing_file_is_unavailable_and_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"nowhere: No such file or directory; check the path"):
        read_bounded(Disk(), tmp_path / "nowhere", 100)


def test_new_folders_belong_to_this_user_only(tmp_path: Path) -> None:
    Disk().make_folder(tmp_path / "a" / "b")
    Disk().make_folder(tmp_path / "a" / "b")
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]
