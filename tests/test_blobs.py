"""The model cache serves the bytes that were asked for or nothing, within its budget, whatever happens to the disk."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store import blobs
from edge_agent.store.blobs import BlobStore
from edge_agent.store.files import PART_PREFIX
from tests.cramped import file_system_of_1_mb, files_of_at_most
from tests.virtual_disk import PowerCutError, VirtualDisk, crashes, survivals

FOLDER = Path("/state/blobs")
MODEL, OTHER = b"a model, " * 300, b"another model, " * 200


def digest_of(data: bytes) -> bytes:
    return sha256(data).digest()


def chunks_of(data: bytes, size_bytes: int = 1000) -> list[bytes]:
    return [data[start : start + size_bytes] for start in range(0, len(data), size_bytes)]


def served(store: BlobStore, data: bytes) -> bytes:
    fd = store.open_verified(digest_of(data))
    try:
        return os.read(fd, len(data) + 1)
    finally:
        os.close(fd)


def test_what_was_added_is_served_read_only_from_its_start(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10_000)
    store.add(chunks_of(MODEL), digest_of(MODEL))
    assert store.contains(digest_of(MODEL))
    assert served(store, MODEL) == MODEL
    assert stat.S_IMODE((tmp_path / digest_of(MODEL).hex()).stat().st_mode) == 0o444
    fd = store.open_verified(digest_of(MODEL))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_file_is_added_under_its_own_digest(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(MODEL)
    store = BlobStore(tmp_path / "cache", 10_000)
    assert store.add_file(tmp_path / "model.tflite") == digest_of(MODEL)
    assert store.add_file(tmp_path / "model.tflite") == digest_of(MODEL)
    assert store.add_file(tmp_path / "model.tflite", digest_of(MODEL)) == digest_of(MODEL)
    assert (store.used_bytes, store.free_bytes) == (len(MODEL), 10_000 - len(MODEL))
    with pytest.raises(RefusedError, match=rf"bytes that hash to {digest_of(MODEL).hex()}"):
        store.add_file(tmp_path / "model.tflite", digest_of(OTHER))
    with pytest.raises(UnavailableError, match=r"nowhere: No such file"):
        store.add_file(tmp_path / "nowhere")


def test_bytes_of_another_digest_are_refused_and_never_seen(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10_000)
    with pytest.raises(RefusedError, match=f"blob {digest_of(MODEL).hex()}: got .* bytes that hash to {digest_of(OTHER).hex()}"):
        store.add(chunks_of(OTHER), digest_of(MODEL))
    assert (list(tmp_path.iterdir()), store.used_bytes) == ([], 0)


def test_more_bytes_than_announced_are_refused_before_they_are_written(tmp_path: Path) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(1000)

    store = BlobStore(tmp_path, 10_000)
    with pytest.raises(RefusedError, match="more than 2500 bytes; allowed: at most 2500 bytes"):
        store.add(endless(), digest_of(MODEL), announced_bytes=2500)
    with pytest.raises(RefusedError, match="more than 10000 bytes"):
        store.add(endless(), digest_of(MODEL))
    with pytest.raises(RefusedError, match="10001 bytes; allowed: at most 10000 bytes; raise the budget"):
        store.add([], digest_of(MODEL), announced_bytes=10_001)
    assert list(tmp_path.iterdir()) == []


def test_a_sender_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield MODEL[:100]
        raise ConnectionResetError("the sender went away")

    store = BlobStore(tmp_path, 10_000)
    with pytest.raises(ConnectionResetError, match="the sender went away"):
        store.add(broken(), digest_of(MODEL))
    assert (list(tmp_path.iterdir()), store.used_bytes) == ([], 0)


def test_a_digest_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="blob digest: got 31 bytes"):
        BlobStore(tmp_path, 10_000).contains(bytes(31))


@pytest.mark.parametrize("harm", ["flip", "truncate", "extend"])
def test_a_blob_that_rotted_is_set_aside_and_can_be_fetched_again(tmp_path: Path, harm: str) -> None:
    store = BlobStore(tmp_path, 10_000)
    store.add([MODEL], digest_of(MODEL))
    path = tmp_path / digest_of(MODEL).hex()
    rotten = {"flip": MODEL[:-1] + bytes([MODEL[-1] ^ 1]), "truncate": MODEL[:-1], "extend": MODEL + b"x"}[harm]
    path.chmod(0o644)
    path.write_bytes(rotten)
    with pytest.raises(RefusedError, match=f"hash to {digest_of(rotten).hex()}; set aside"):
        store.open_verified(digest_of(MODEL))
    assert not store.contains(digest_of(MODEL))
    assert (tmp_path / f".bad-{path.name}").read_bytes() == rotten
    with pytest.raises(UnavailableError, match="not in the model cache"):
        store.open_verified(digest_of(MODEL))
    store.add([MODEL], digest_of(MODEL))
    assert served(store, MODEL) == MODEL


def test_every_single_bit_flip_is_found(tmp_path: Path) -> None:
    data = b"eight by"
    store = BlobStore(tmp_path, 10_000)
    for bit in range(8 * len(data)):
        store.add([data], digest_of(data))
        path = tmp_path / digest_of(data).hex()
        path.chmod(0o644)
        path.write_bytes((int.from_bytes(data, "big") ^ 1 << bit).to_bytes(len(data), "big"))
        with pytest.raises(RefusedError):
            store.open_verified(digest_of(data))


def test_a_link_in_the_place_of_a_blob_is_not_followed(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "cache", 10_000)
    store.add([MODEL], digest_of(MODEL))
    path = tmp_path / "cache" / digest_of(MODEL).hex()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match="symbolic link"):
        store.open_verified(digest_of(MODEL))


def test_a_blob_that_somebody_removed_is_unavailable_and_can_be_added_again(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10_000)
    store.add([MODEL], digest_of(MODEL))
    (tmp_path / digest_of(MODEL).hex()).unlink()
    with pytest.raises(UnavailableError, match="No such file"):
        store.open_verified(digest_of(MODEL))
    store.add([MODEL], digest_of(MODEL))
    assert served(store, MODEL) == MODEL


def test_a_descriptor_outlives_the_eviction_of_its_blob(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, len(MODEL))
    store.add([MODEL], digest_of(MODEL))
    fd = store.open_verified(digest_of(MODEL))
    store.add([OTHER[: len(MODEL)]], digest_of(OTHER[: len(MODEL)]))
    assert not store.contains(digest_of(MODEL))
    assert os.read(fd, len(MODEL)) == MODEL
    os.close(fd)


def test_the_least_recently_used_goes_first_also_after_a_restart(tmp_path: Path) -> None:
    models = [bytes([number]) * 100 for number in range(4)]
    store = BlobStore(tmp_path, 400)
    for model in models:
        store.add([model], digest_of(model))
    served(store, models[0])
    store.add([models[1]], digest_of(models[1]))
    again = BlobStore(tmp_path, 400)
    expected = [digest_of(models[number]) for number in (2, 3, 0, 1)]
    assert store.digests() == again.digests() == expected
    again.add([b"new" * 50], digest_of(b"new" * 50))
    assert again.digests() == [*expected[2:], digest_of(b"new" * 50)]


def test_equal_last_use_is_decided_by_name(tmp_path: Path) -> None:
    models = [bytes([number]) * 100 for number in range(8)]
    for model in models:
        path = tmp_path / digest_of(model).hex()
        path.write_bytes(model)
        os.utime(path, (7, 7))
    assert BlobStore(tmp_path, 800).digests() == sorted(map(digest_of, models))


def test_a_pinned_blob_stays_and_the_refusal_tells_the_figures(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 300)
    store.add([b"p" * 200], digest_of(b"p" * 200))
    store.pin(digest_of(b"p" * 200))
    store.pin(digest_of(b"p" * 200))
    store.unpin(digest_of(b"p" * 200))
    for announced in (150, None):
        with pytest.raises(UnavailableError, match=r"150 bytes needed, 100 free, 200 pinned of 300; unpin a model or raise"):
            store.add([b"n" * 150], digest_of(b"n" * 150), announced)
    store.unpin(digest_of(b"p" * 200))
    store.add([b"n" * 150], digest_of(b"n" * 150))
    assert store.digests() == [digest_of(b"n" * 150)]


def test_what_cannot_fit_evicts_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 300)
    for data in (b"p" * 100, b"q" * 100):
        store.add([data], digest_of(data))
    store.pin(digest_of(b"p" * 100))
    with pytest.raises(UnavailableError):
        store.add(chunks_of(b"n" * 250, 50), digest_of(b"n" * 250), announced_bytes=250)
    assert len(store.digests()) == 2


def test_pins_are_counted_and_belong_to_blobs_that_are_here(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 300)
    with pytest.raises(UnavailableError, match="not in the model cache; add it first"):
        store.pin(digest_of(MODEL))
    with pytest.raises(RuntimeError, match="not pinned"):
        store.unpin(digest_of(MODEL))


def test_what_was_set_aside_goes_before_any_blob(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 300)
    store.add([b"a" * 100], digest_of(b"a" * 100))
    store.add([b"b" * 100], digest_of(b"b" * 100))
    (tmp_path / digest_of(b"b" * 100).hex()).chmod(0o644)
    (tmp_path / digest_of(b"b" * 100).hex()).write_bytes(b"rotten".ljust(100))
    with pytest.raises(RefusedError):
        store.open_verified(digest_of(b"b" * 100))
    assert store.used_bytes == BlobStore(tmp_path, 300).used_bytes == 200
    store.add([b"c" * 200], digest_of(b"c" * 200))
    assert store.digests() == [digest_of(b"a" * 100), digest_of(b"c" * 200)]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_number_of_blobs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "MAX_BLOBS", 3)
    store = BlobStore(tmp_path, 10_000)
    for number in range(6):
        store.add([bytes([number])], digest_of(bytes([number])))
    assert store.digests() == [digest_of(bytes([number])) for number in (3, 4, 5)]


def test_a_full_disk_refuses_the_blob_and_works_again_when_there_is_room(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "limited", 10_000)
    with files_of_at_most(2000), pytest.raises(UnavailableError, match="too large"):
        store.add(chunks_of(MODEL), digest_of(MODEL))
    assert store.used_bytes == 0
    store.add(chunks_of(MODEL), digest_of(MODEL))
    assert served(store, MODEL) == MODEL
    with file_system_of_1_mb(tmp_path / "small") as folder:
        store = BlobStore(folder, 10**9)
        large = bytes(2 * 2**20)
        with pytest.raises(UnavailableError, match="No space left"):
            store.add(chunks_of(large), digest_of(large))
        store.add(chunks_of(MODEL), digest_of(MODEL))
        assert served(store, MODEL) == MODEL


def add_model(disk: VirtualDisk) -> None:
    BlobStore(FOLDER, 6000, disk).add(chunks_of(MODEL), digest_of(MODEL))


def disk_with_other() -> VirtualDisk:
    """A cache that must evict ``OTHER`` (3000 bytes) and what was set aside to take ``MODEL`` (2700) if 6000 are allowed."""
    disk = VirtualDisk()
    BlobStore(FOLDER, 6000, disk).add(chunks_of(OTHER), digest_of(OTHER))
    BlobStore(FOLDER, 6000, disk).add([b"z" * 2000], digest_of(b"z" * 2000))
    return disk


def violations(kind: type[VirtualDisk]) -> Counter[str]:
    """What is broken after a cut at any change of an ``add`` that evicts, and a second one at any change of the next start."""
    found: Counter[str] = Counter()
    for crashed in crashes(add_model, disk_with_other(), kind):
        for disk in crashes(lambda disk: BlobStore(FOLDER, 6000, disk), crashed, random_ones=1):
            found["states"] += 1
            store = BlobStore(FOLDER, 6000, disk)
            for digest in store.digests():
                try:
                    disk.close(store.open_verified(digest))
                except RefusedError:
                    found["a partial blob"] += 1
            found["a leftover"] += any(name.startswith(PART_PREFIX) for name in disk.names(FOLDER))
            found["another blob"] += not set(store.digests()) <= {digest_of(data) for data in (MODEL, OTHER, b"z" * 2000)}
            store.add(chunks_of(MODEL), digest_of(MODEL))
            found["not served"] += digest_of(MODEL) not in store.digests()
    finished = disk_with_other().rebooted(lambda _: True, kind=kind)
    add_model(finished)
    found["a loss"] = sum(not holds_model(finished.rebooted(keeps)) for keeps in survivals(6))
    return +found


def holds_model(disk: VirtualDisk) -> bool:
    return disk.content(FOLDER / digest_of(MODEL).hex()) == MODEL


def test_a_power_cut_at_any_write_of_an_add_shows_no_partial_blob_and_loses_no_added_one() -> None:
    found = violations(VirtualDisk)
    assert found.pop("states") > 1000
    assert not found


class NoFsync(VirtualDisk):
    def fsync(self, fd: int) -> None:
        self._change()


class NoFolderFsync(VirtualDisk):
    def fsync_folder(self, folder: Path) -> None:
        self._change()


@pytest.mark.parametrize(("kind", "harm"), [(NoFsync, "a partial blob"), (NoFsync, "a loss"), (NoFolderFsync, "a loss")])
def test_the_virtual_disk_shows_the_harm_of_a_missing_fsync(kind: type[VirtualDisk], harm: str) -> None:
    assert violations(kind)[harm]


def test_an_add_that_a_killed_process_had_almost_done_is_durable_once_the_next_says_so() -> None:
    """The rename was done and not yet synced: who finds the blob there and says "added" must have synced the folder."""
    for cut_at in range(1, 100):
        disk = VirtualDisk(cut_at)
        try:
            add_model(disk)
        except PowerCutError:
            add_model(disk.killed())
            assert all(holds_model(disk.rebooted(keeps)) for keeps in survivals(6))
        else:
            assert cut_at > 8
            break


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_error_at_any_operation_of_an_add_is_unavailable_and_the_next_add_is_durable(error: int) -> None:
    for fail_at in range(1, 200):
        disk = disk_with_other()
        store = BlobStore(FOLDER, 6000, disk)
        disk.fail_at, disk.error = disk.operations + fail_at, error
        try:
            store.add(chunks_of(MODEL), digest_of(MODEL))
        except UnavailableError:
            assert not disk.open_files
            assert store.used_bytes == sum(len(inode.data) for inode in disk.names_now.values())
            store.add(chunks_of(MODEL), digest_of(MODEL))
        else:
            break
        assert all(holds_model(disk.rebooted(keeps)) for keeps in survivals(4))
    assert fail_at == 12


def test_a_read_error_is_unavailable_and_sets_nothing_aside() -> None:
    for fail_at in range(1, 5):
        disk = VirtualDisk()
        store = BlobStore(FOLDER, 6000, disk)
        store.add([MODEL], digest_of(MODEL))
        disk.fail_at = disk.operations + fail_at
        with pytest.raises(UnavailableError, match="the storage is failing"):
            store.open_verified(digest_of(MODEL))
        assert not disk.open_files
        disk.close(store.open_verified(digest_of(MODEL)))


def test_a_read_only_disk_still_serves() -> None:
    class ReadOnly(VirtualDisk):
        def _change(self, torn: object = None) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    disk = VirtualDisk()
    BlobStore(FOLDER, 6000, disk).add([MODEL], digest_of(MODEL))
    store = BlobStore(FOLDER, 6000, disk)
    disk.__class__ = ReadOnly
    disk.close(store.open_verified(digest_of(MODEL)))


class CacheAgainstModel(RuleBasedStateMachine):
    """The cache against a list of names in order of last use; a restart forgets the pins and nothing else."""

    BUDGET_BYTES = 1000
    sizes = st.integers(1, 450)
    choice = st.integers(0, 6)

    @initialize()
    def start(self) -> None:
        self.disk = VirtualDisk()
        self.store = BlobStore(FOLDER, self.BUDGET_BYTES, self.disk)
        self.order: list[bytes] = []
        self.pins: Counter[bytes] = Counter()

    @rule(number=choice, chunk_bytes=st.integers(1, 200), announces=st.booleans())
    def add(self, number: int, chunk_bytes: int, announces: bool) -> None:
        data = bytes([number]) * (number * 70 + 30)
        pinned = sum(len(other) for other in self.order if self.pins[other])
        if data not in self.order and pinned + len(data) > self.BUDGET_BYTES:
            with pytest.raises(UnavailableError):
                self.store.add(chunks_of(data, chunk_bytes), digest_of(data), len(data))
            return
        self.store.add(chunks_of(data, chunk_bytes), digest_of(data), len(data) if announces else None)
        if data in self.order:
            self.order.remove(data)
        while sum(map(len, self.order)) + len(data) > self.BUDGET_BYTES:
            self.order.remove(next(other for other in self.order if not self.pins[other]))
        self.order.append(data)

    @rule(number=choice)
    def use(self, number: int) -> None:
        if self.order:
            data = self.order[number % len(self.order)]
            fd = self.store.open_verified(digest_of(data))
            assert self.disk.read(fd, 1000) == data
            self.disk.close(fd)
            self.order.remove(data)
            self.order.append(data)

    @rule(number=choice)
    def pin(self, number: int) -> None:
        if self.order:
            data = self.order[number % len(self.order)]
            self.store.pin(digest_of(data))
            self.pins[data] += 1

    @rule(number=choice)
    def unpin(self, number: int) -> None:
        pinned = sorted(+self.pins)
        if pinned:
            self.store.unpin(digest_of(pinned[number % len(pinned)]))
            self.pins[pinned[number % len(pinned)]] -= 1

    @rule()
    def restart(self) -> None:
        self.store = BlobStore(FOLDER, self.BUDGET_BYTES, self.disk)
        self.pins.clear()

    @invariant()
    def agrees(self) -> None:
        assert self.store.digests() == [digest_of(data) for data in self.order]
        assert self.store.used_bytes == sum(map(len, self.order)) <= self.BUDGET_BYTES
        assert self.store.pinned_bytes == sum(len(data) for data in self.order if self.pins[data])


CacheAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCacheAgainstModel = CacheAgainstModel.TestCase
