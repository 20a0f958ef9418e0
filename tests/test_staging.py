"""What is fetched piece by piece is kept as far as it is good, whatever befalls the disk, and becomes a blob when it is whole."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.blobs import BlobStore
from edge_agent.store.staging import Receiving, Staging
from ota.chunks import Artefact, pieces_of
from ota.manifest import CHUNK_BYTES
from tests.cramped import file_system_of_1_mb, remount
from tests.virtual_disk import PowerCutError, VirtualDisk, crashes, survivals

BLOBS, STAGING = Path("/state/blobs"), Path("/state/staging")
BUDGET_BYTES = 2**20


def made(seed: int, size_bytes: int) -> bytes:
    """Bytes that look like none of another seed."""
    block = b"".join(sha256(b"%d/%d" % (seed, number)).digest() for number in range(64))
    return (block * (size_bytes // len(block) + 1))[:size_bytes]


def pieces_in(data: bytes) -> list[bytes]:
    return [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]


def artefact_in(data: bytes) -> Artefact:
    return Artefact(sha256(data).digest(), len(data), b"".join(sha256(piece).digest() for piece in pieces_in(data)))


MODEL = b"".join(made(number, CHUNK_BYTES) for number in range(3)) + made(9, 1000)
ARTEFACT = artefact_in(MODEL)
PIECES = pieces_in(MODEL)


class Board:
    """A cache and a staging folder."""

    def __init__(self, folder: Path, disk: VirtualDisk | None = None, budget_bytes: int = BUDGET_BYTES) -> None:
        self.blobs = BlobStore(folder / "blobs", budget_bytes, disk)
        self.staging = Staging(folder / "staging", self.blobs, disk)

    def holds(self, data: bytes) -> bool:
        digest = sha256(data).digest()
        if not self.blobs.contains(digest):
            return False
        disk = self.staging.disk
        fd = self.blobs.open_verified(digest)
        try:
            return disk.read(fd, len(data) + 1) == data
        finally:
            disk.close(fd)


def on(disk: VirtualDisk) -> Board:
    return Board(Path("/state"), disk)


def put_all(receiving: Receiving, order: list[int] | None = None) -> None:
    for index in order or range(len(PIECES)):
        receiving.put(index, PIECES[index])


def install(disk: VirtualDisk) -> None:
    """All that happens to an artefact, begun anew or gone on with."""
    board = on(disk)
    if board.blobs.contains(ARTEFACT.digest):
        return
    receiving = board.staging.open(ARTEFACT)
    put_all(receiving, [2, 0, 3, 1])
    receiving.finish()


def test_pieces_in_any_order_become_a_read_only_blob(tmp_path: Path) -> None:
    board = Board(tmp_path)
    receiving = board.staging.open(ARTEFACT)
    put_all(receiving, [3, 1, 0, 2])
    receiving.finish()
    assert board.holds(MODEL)
    path = board.blobs.path_of(ARTEFACT.digest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert list((tmp_path / "staging").iterdir()) == []
    assert board.blobs.used_bytes == len(MODEL)


def test_finish_takes_the_file_itself_not_a_copy(tmp_path: Path) -> None:
    board = Board(tmp_path)
    receiving = board.staging.open(ARTEFACT)
    put_all(receiving)
    inode = board.staging.path_of(ARTEFACT.digest).stat().st_ino
    receiving.finish()
    assert board.blobs.path_of(ARTEFACT.digest).stat().st_ino == inode


def test_a_corrupt_piece_never_touches_the_disk(tmp_path: Path) -> None:
    receiving = Board(tmp_path).staging.open(ARTEFACT)
    bad = bytearray(PIECES[1])
    bad[77] ^= 1
    with pytest.raises(RefusedError, match="bytes that hash to"):
        receiving.put(1, bad)
    assert (receiving.held, (tmp_path / "staging" / ARTEFACT.digest.hex()).stat().st_size) == (0, 0)


def test_a_piece_at_the_wrong_offset_is_refused(tmp_path: Path) -> None:
    receiving = Board(tmp_path).staging.open(ARTEFACT)
    for index in (0, 2):
        with pytest.raises(RefusedError, match=f"piece {index} of artefact"):
            receiving.put(index, PIECES[1])
    for index in (-1, len(PIECES), 2**40):
        with pytest.raises(RefusedError, match="a whole number from 0 to 3"):
            receiving.put(index, PIECES[1])
    assert receiving.held == 0


def test_a_piece_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    receiving = Board(tmp_path).staging.open(ARTEFACT)
    assert [receiving.put(0, PIECES[0]), receiving.put(0, PIECES[0])] == [True, False]


def test_a_piece_longer_than_declared_or_with_trailing_data_is_refused(tmp_path: Path) -> None:
    receiving = Board(tmp_path).staging.open(ARTEFACT)
    for index in (0, 3):
        with pytest.raises(RefusedError, match=f"{len(PIECES[index]) + 1} bytes"):
            receiving.put(index, PIECES[index] + b"\0")
    assert receiving.held == 0


def test_a_file_longer_than_declared_is_begun_anew(tmp_path: Path) -> None:
    path = Board(tmp_path).staging.path_of(ARTEFACT.digest)
    path.write_bytes(MODEL + b"trailing")
    board = Board(tmp_path)
    receiving = board.staging.open(ARTEFACT)
    assert (receiving.held, path.stat().st_size, board.blobs.used_bytes) == (0, 0, len(MODEL))


def test_two_artefacts_that_grow_at_once_do_not_mix(tmp_path: Path) -> None:
    other = made(20, 2 * CHUNK_BYTES + 5)
    board = Board(tmp_path)
    first, second = board.staging.open(ARTEFACT), board.staging.open(artefact_in(other))
    for index, piece in enumerate(pieces_in(other)):
        with pytest.raises(RefusedError):
            first.put(index, piece)
        second.put(index, piece)
        first.put(index, PIECES[index])
    second.finish()
    first.put(3, PIECES[3])
    first.finish()
    assert board.holds(MODEL) and board.holds(other)


def test_what_was_written_before_a_kill_is_found_again_and_the_rest_is_lacking(tmp_path: Path) -> None:
    receiving = Board(tmp_path).staging.open(ARTEFACT)
    receiving.put(3, PIECES[3])
    receiving.put(1, PIECES[1])
    again = Board(tmp_path).staging.open(ARTEFACT)
    assert pieces_of(again.held) == [1, 3]
    again.put(0, PIECES[0])
    again.put(2, PIECES[2])
    again.finish()


@pytest.mark.parametrize("kept_bytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(MODEL) - 1, len(MODEL)])
def test_it_resumes_at_any_byte(tmp_path: Path, kept_bytes: int) -> None:
    put_all(Board(tmp_path).staging.open(ARTEFACT))
    os.truncate(tmp_path / "staging" / ARTEFACT.digest.hex(), kept_bytes)
    board = Board(tmp_path)
    receiving = board.staging.open(ARTEFACT)
    assert receiving.held.bit_count() == kept_bytes // CHUNK_BYTES + (kept_bytes == len(MODEL))
    put_all(receiving)
    receiving.finish()
    assert board.holds(MODEL)


def test_what_rotted_in_the_staging_is_lacking_again(tmp_path: Path) -> None:
    board = Board(tmp_path)
    receiving = board.staging.open(ARTEFACT)
    put_all(receiving)
    with (tmp_path / "staging" / ARTEFACT.digest.hex()).open("r+b") as file:
        file.seek(2 * CHUNK_BYTES + 5)
        file.write(b"rot")
    with pytest.raises(RefusedError, match="1 pieces rotted on this disk; they are fetched again"):
        receiving.finish()
    assert pieces_of(receiving.held) == [0, 1, 3]
    assert not board.blobs.contains(ARTEFACT.digest)
    receiving.put(2, PIECES[2])
    receiving.finish()
    assert board.holds(MODEL)


def test_a_list_of_pieces_that_does_not_make_the_whole_never_becomes_a_blob(tmp_path: Path) -> None:
    board = Board(tmp_path)
    receiving = board.staging.open(Artefact(bytes(32), len(MODEL), ARTEFACT.chunks))
    put_all(receiving)
    with pytest.raises(RefusedError, match="the release is wrong"):
        receiving.finish()
    receiving.abandon()
    assert (board.blobs.digests(), board.blobs.used_bytes) == ([], 0)


def test_finish_while_pieces_are_lacking_is_the_callers_bug(tmp_path: Path) -> None:
    receiving = Board(tmp_path).staging.open(ARTEFACT)
    put_all(receiving, [0, 1, 2])
    with pytest.raises(RuntimeError, match="1 pieces of .* are lacking"):
        receiving.finish()


def test_pieces_that_a_held_blob_shares_are_copied_wherever_they_stand(tmp_path: Path) -> None:
    board = Board(tmp_path)
    old = made(30, CHUNK_BYTES) + PIECES[2] + PIECES[1] + made(31, 500)
    board.blobs.add([old], sha256(old).digest())
    receiving = board.staging.open(ARTEFACT)
    assert receiving.seed(sha256(old).digest()) == 2
    assert pieces_of(receiving.held) == [1, 2]
    assert receiving.seed(bytes(32)) == 0
    put_all(receiving, [0, 3])
    receiving.finish()
    assert board.holds(MODEL) and board.holds(old)


def test_a_piece_that_stands_twice_is_fetched_once(tmp_path: Path) -> None:
    twice = PIECES[0] + PIECES[1] + PIECES[0]
    board = Board(tmp_path)
    board.blobs.add([PIECES[0]], sha256(PIECES[0]).digest())
    receiving = board.staging.open(artefact_in(twice))
    assert receiving.seed(sha256(PIECES[0]).digest()) == 2
    assert pieces_of(receiving.held) == [0, 2]


def test_a_seed_that_rotted_gives_only_what_is_still_good(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.blobs.add([MODEL], ARTEFACT.digest)
    path = board.blobs.path_of(ARTEFACT.digest)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(CHUNK_BYTES)
        file.write(b"rot")
    revision = MODEL[:-1] + b"!"
    receiving = board.staging.open(artefact_in(revision))
    assert receiving.seed(ARTEFACT.digest) == 2
    assert pieces_of(receiving.held) == [0, 2]


def test_a_seed_that_changes_between_the_check_and_the_copy_gives_the_bytes_that_were_checked() -> None:
    class Changing(VirtualDisk):
        def read_at(self, fd: int, max_bytes: int, offset: int) -> bytes:
            data = super().read_at(fd, max_bytes, offset)
            if data:
                self.open_files[fd][0].data[offset : offset + 3] = b"rot"
            return data

    disk = VirtualDisk()
    board = on(disk)
    board.blobs.add([MODEL], ARTEFACT.digest)
    receiving = board.staging.open(artefact_in(MODEL + b"more"))
    disk.__class__ = Changing
    assert receiving.seed(ARTEFACT.digest) == 3
    disk.__class__ = VirtualDisk
    assert receiving.scan() == 3


def test_what_is_changed_between_the_last_check_and_the_use_is_not_served(tmp_path: Path) -> None:
    board = Board(tmp_path)
    receiving = board.staging.open(ARTEFACT)
    put_all(receiving)
    receiving.verify()
    with (tmp_path / "staging" / ARTEFACT.digest.hex()).open("r+b") as file:
        file.write(b"rot")
    receiving.finish()
    with pytest.raises(RefusedError, match="set aside; fetch the model again"):
        board.holds(MODEL)
    assert not board.blobs.contains(ARTEFACT.digest)


def test_after_a_reboot_a_newer_release_takes_over_what_was_fetched_of_the_older(tmp_path: Path) -> None:
    put_all(Board(tmp_path).staging.open(ARTEFACT), [0, 2])
    newer = MODEL[:-1] + b"!"
    board = Board(tmp_path)
    receiving = board.staging.open(artefact_in(newer))
    assert receiving.seed(ARTEFACT.digest) == 2
    assert board.staging.sweep({artefact_in(newer).digest}) == 1
    for index in (1, 3):
        receiving.put(index, pieces_in(newer)[index])
    receiving.finish()
    assert board.holds(newer)
    assert board.blobs.used_bytes == len(newer)


def test_an_artefact_of_one_piece(tmp_path: Path) -> None:
    manifest = made(40, 200_000)
    board = Board(tmp_path)
    receiving = board.staging.open(Artefact(sha256(manifest).digest(), len(manifest)))
    receiving.put(0, memoryview(manifest))
    receiving.finish()
    assert board.holds(manifest)


def test_room_is_taken_before_the_first_byte_and_given_back(tmp_path: Path) -> None:
    old = made(50, 300_000)
    board = Board(tmp_path, budget_bytes=400_000)
    board.blobs.add([old], sha256(old).digest())
    board.blobs.pin(sha256(old).digest())
    with pytest.raises(UnavailableError, match="no room in the model cache: .*unpin a model or raise the budget"):
        board.staging.open(ARTEFACT)
    board.blobs.unpin(sha256(old).digest())
    receiving = board.staging.open(ARTEFACT)
    assert (board.blobs.digests(), board.blobs.used_bytes) == ([], len(MODEL))
    receiving.abandon()
    assert (board.blobs.used_bytes, board.staging.digests()) == (0, [])
    with pytest.raises(RefusedError, match="raise the budget of the model cache"):
        Board(tmp_path / "small", budget_bytes=1000).staging.open(ARTEFACT)


def test_what_nobody_wants_any_more_counts_until_it_is_swept(tmp_path: Path) -> None:
    put_all(Board(tmp_path).staging.open(ARTEFACT))
    board = Board(tmp_path)
    assert board.blobs.used_bytes == len(MODEL)
    assert board.staging.sweep({ARTEFACT.digest}) == 0
    assert board.staging.sweep(()) == 1
    assert (board.blobs.used_bytes, list((tmp_path / "staging").iterdir())) == (0, [])


def test_a_full_disk_keeps_what_is_there_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with file_system_of_1_mb(tmp_path / "small") as folder:
        large = b"".join(made(number, CHUNK_BYTES) for number in range(12))
        (folder / "in the way").write_bytes(bytes(500_000))
        board = Board(folder)
        receiving = board.staging.open(artefact_in(large))
        with pytest.raises(UnavailableError, match="No space left.*free some space"):
            for index, piece in enumerate(pieces_in(large)):
                receiving.put(index, piece)
        held = receiving.held
        assert 0 < held.bit_count() < 12
        (folder / "in the way").unlink()
        for index, piece in enumerate(pieces_in(large)):
            receiving.put(index, piece)
        receiving.finish()
        assert board.holds(large)


def test_a_read_only_remount_is_unavailable_until_it_is_writable_again(tmp_path: Path) -> None:
    with file_system_of_1_mb(tmp_path / "small") as folder:
        receiving = Board(folder).staging.open(ARTEFACT)
        receiving.put(0, PIECES[0])
        receiving.close()
        remount(folder, "ro")
        with pytest.raises(UnavailableError, match="Read-only file system; remount"):
            Board(folder).staging.open(ARTEFACT)
        remount(folder, "rw")
        board = Board(folder)
        receiving = board.staging.open(ARTEFACT)
        assert pieces_of(receiving.held) == [0]
        put_all(receiving)
        receiving.finish()
        assert board.holds(MODEL)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_eio_or_another_disk_error_at_any_operation_loses_nothing_that_was_there_and_the_same_call_works_later(
    error: int,
) -> None:
    for fail_at in range(1, 200):
        disk = VirtualDisk()
        board = on(disk)
        disk.fail_at, disk.error = disk.operations + fail_at, error
        receiving: Receiving | None = None
        failures = 0
        while not board.blobs.contains(ARTEFACT.digest):
            try:
                receiving = receiving or board.staging.open(ARTEFACT)
                put_all(receiving, [index for index in range(4) if not receiving.held >> index & 1])
                receiving.finish()
            except UnavailableError as refusal:
                assert os.strerror(error) in refusal.reason
                failures += 1
        went_through = disk.operations < disk.fail_at
        disk.fail_at = None
        assert failures <= 1
        assert not disk.open_files
        assert board.holds(MODEL)
        assert board.blobs.used_bytes == len(MODEL)
        assert all(on(disk.rebooted(keeps)).holds(MODEL) for keeps in survivals(2))
        if went_through:
            assert fail_at > 20
            return
    raise AssertionError("it never went through")


class Forgetful(VirtualDisk):
    """As Linux does, it counts cached data as clean after an fsync of it failed: a later one succeeds and writes nothing."""

    def fsync(self, fd: int) -> None:
        inode = self.open_files[fd][0]
        try:
            self._change()
        except OSError:
            inode.pages_lie = True
            raise
        if not inode.pages_lie:
            inode.durable, inode.durable_mtime_s = bytes(inode.data), inode.mtime_s

    def forget_cached(self, fd: int) -> None:
        super().forget_cached(fd)
        inode = self.open_files[fd][0]
        if inode.pages_lie:
            inode.pages_lie, inode.data = False, bytearray(inode.durable)


def test_after_an_fsync_that_failed_what_the_storage_does_not_have_is_written_again() -> None:
    for fail_at in range(1, 100):
        disk = Forgetful()
        board = on(disk)
        receiving = board.staging.open(ARTEFACT)
        disk.fail_at = disk.operations + fail_at
        try:
            put_all(receiving)
            receiving.finish()
            break
        except UnavailableError:
            put_all(receiving)
            receiving.finish()
        assert all(on(disk.rebooted(keeps)).holds(MODEL) for keeps in survivals(2))
    assert fail_at > 10


def violations(kind: type[VirtualDisk]) -> Counter[str]:
    """What is broken after a cut at any change of an installation, and a second one at any change of the start that follows."""
    found: Counter[str] = Counter()
    before = VirtualDisk()
    on(before)
    for crashed in crashes(install, before, kind, random_ones=2):
        for disk in crashes(on, crashed, random_ones=0):
            found["states"] += 1
            board = on(disk)
            if board.blobs.contains(ARTEFACT.digest):
                try:
                    found["another blob"] += not board.holds(MODEL)
                except RefusedError:
                    found["a partial blob"] += 1
            found["both"] += bool(board.staging.digests()) and board.blobs.contains(ARTEFACT.digest)
            install(disk)
            found["not installed"] += not on(disk).holds(MODEL)
    finished = before.rebooted(lambda _: True, kind=kind)
    install(finished)
    found["a loss"] = sum(not on(finished.rebooted(keeps)).blobs.contains(ARTEFACT.digest) for keeps in survivals(6))
    return +found


def test_a_power_cut_at_any_write_leaves_a_whole_blob_or_what_can_be_gone_on_with() -> None:
    found = violations(VirtualDisk)
    assert found.pop("states") > 300
    assert not found


class NoFsync(VirtualDisk):
    def fsync(self, fd: int) -> None:
        self._change()


class NoFolderFsync(VirtualDisk):
    def fsync_folder(self, folder: Path) -> None:
        self._change()


@pytest.mark.parametrize(("kind", "harm"), [(NoFsync, "a partial blob"), (NoFolderFsync, "a loss")])
def test_the_virtual_disk_shows_the_harm_of_a_missing_fsync(kind: type[VirtualDisk], harm: str) -> None:
    assert violations(kind)[harm]


def test_an_installation_that_was_killed_at_any_change_is_durable_once_the_next_says_so() -> None:
    for cut_at in range(1, 100):
        disk = VirtualDisk(cut_at)
        try:
            install(disk)
        except PowerCutError:
            install(disk.killed())
            assert all(on(disk.rebooted(keeps)).holds(MODEL) for keeps in survivals(4))
        else:
            assert cut_at == 15
            return
