"""A block file is what was written for exactly these tokens by this model, or it is nothing."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.core.chat import Tier
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, chain
from edge_agent.store.files import PART_PREFIX, write_unsynced
from edge_agent.store.kv_blocks import NO_PARENT, BlockFiles, encoded, file_bytes
from tests.kv_child import FORMAT, Bytes
from tests.virtual_disk import VirtualDisk, crashes, survivals

FOLDER = Path("/state/blocks")
IDS = list(range(100, 100 + SINK_TOKENS + 3 * BLOCK_TOKENS))
KV = Bytes(IDS)
ROOT, *NAMES = chain(FORMAT.fingerprint, IDS)
PARENTS = [ROOT, *NAMES]


def ids_of(block: int) -> list[int]:
    return IDS[SINK_TOKENS + block * BLOCK_TOKENS :][:BLOCK_TOKENS]


def put(store: BlockFiles, block: int, owner: str = "a") -> None:
    store.put(NAMES[block], PARENTS[block], ids_of(block), KV.block(block), owner)


def on(disk: VirtualDisk, ram_bytes: int = 0) -> BlockFiles:
    return BlockFiles(FOLDER, FORMAT, ram_bytes, disk)


def with_block() -> tuple[VirtualDisk, BlockFiles, bytearray]:
    """A disk with one block, a store without a copy of it, and the file's bytes."""
    disk = VirtualDisk()
    store = on(disk)
    put(store, 0)
    return disk, store, disk.names_now[FOLDER / NAMES[0].hex()].data


def must_be_gone(disk: VirtualDisk, store: BlockFiles) -> None:
    assert NAMES[0] not in store
    assert (disk.names(FOLDER), store.bytes_on_disk) == ([], 0)
    with pytest.raises(UnavailableError):
        store.read(NAMES[0])


def test_a_block_and_a_prelude_come_back_as_they_were_written() -> None:
    disk = VirtualDisk()
    store = on(disk)
    store.put(ROOT, NO_PARENT, IDS[:SINK_TOKENS], KV.prelude(), "a")
    put(store, 0)
    assert on(disk).read(ROOT) == (KV.prelude(), Tier.DISK)
    assert on(disk).read(NAMES[0]) == (KV.block(0), Tier.DISK)
    assert store.bytes_on_disk == file_bytes(FORMAT, SINK_TOKENS) + file_bytes(FORMAT, BLOCK_TOKENS)
    assert store.bytes_on_disk == on(disk).bytes_on_disk == sum(len(inode.data) for inode in disk.names_now.values())


def test_a_flipped_bit_at_any_byte_is_found_and_the_file_removed() -> None:
    size_bytes = file_bytes(FORMAT, BLOCK_TOKENS)
    for at in range(size_bytes):
        disk, store, data = with_block()
        data[at] ^= 1 << at % 8
        with pytest.raises(RefusedError, match=f"KV block {NAMES[0].hex()[:16]}: got"):
            store.read(NAMES[0])
        must_be_gone(disk, store)


def test_a_file_cut_or_grown_to_any_length_is_found_and_removed() -> None:
    size_bytes = file_bytes(FORMAT, BLOCK_TOKENS)
    for kept_bytes in {*range(0, size_bytes, 13), size_bytes - 1, size_bytes + 1, 10 * size_bytes}:
        disk, store, data = with_block()
        data[kept_bytes:] = bytes(max(0, kept_bytes - size_bytes))
        with pytest.raises(RefusedError):
            store.read(NAMES[0])
        must_be_gone(disk, store)


def test_a_tail_of_zeros_is_found() -> None:
    for start in range(0, file_bytes(FORMAT, BLOCK_TOKENS) - 1, 101):
        disk, store, data = with_block()
        data[start:] = bytes(len(data) - start)
        with pytest.raises(RefusedError):
            store.read(NAMES[0])
        must_be_gone(disk, store)


def test_a_sound_file_of_other_tokens_another_model_or_another_kind_is_foreign() -> None:
    other_model = replace(FORMAT, fingerprint=b"g" * 32)
    foreign = [
        ("a block of other tokens", encoded(FORMAT, PARENTS[1], ids_of(1), KV.block(1))),
        (f"fingerprint {(b'g' * 32).hex()[:16]}", encoded(other_model, PARENTS[0], ids_of(0), KV.block(0))),
        ("a block of other tokens", encoded(FORMAT, NO_PARENT, IDS[:SINK_TOKENS], KV.prelude())),
        ("bytes that begin with", b"SlyKVb\x00\x02" + encoded(FORMAT, PARENTS[0], ids_of(0), KV.block(0))[8:]),
    ]
    for reason, content in foreign:
        disk, store, data = with_block()
        data[:] = content
        with pytest.raises(RefusedError, match=reason):
            store.read(NAMES[0])
        must_be_gone(disk, store)


def test_a_file_that_somebody_removed_is_unavailable_and_can_be_written_again() -> None:
    disk, store, _ = with_block()
    disk.unlink(FOLDER / NAMES[0].hex())
    with pytest.raises(UnavailableError, match="No such file"):
        store.read(NAMES[0])
    must_be_gone(disk, store)
    put(store, 0)
    assert store.read(NAMES[0]) == (KV.block(0), Tier.DISK)


def test_a_file_that_a_power_cut_left_does_not_stand_in_for_the_block_in_hand() -> None:
    disk, _, data = with_block()
    data[700:] = bytes(len(data) - 700)
    store = on(disk)
    put(store, 0)
    store.sync([NAMES[0]])
    assert store.durable(NAMES[0])
    assert store.read(NAMES[0])[0] == KV.block(0)


def test_what_was_not_seen_by_this_process_does_not_count_as_durable() -> None:
    disk, _, _ = with_block()
    store = on(disk)
    store.sync([NAMES[0]])
    assert not store.durable(NAMES[0])
    store.read(NAMES[0])
    assert store.durable(NAMES[0])


def test_what_two_own_is_stored_once_and_lives_until_both_release_it() -> None:
    disk = VirtualDisk()
    store = on(disk)
    put(store, 0, "a")
    put(store, 0, "b")
    assert store.bytes_on_disk == file_bytes(FORMAT, BLOCK_TOKENS)
    store.release([NAMES[0]], "a")
    assert NAMES[0] in store
    store.release([NAMES[0]], "b")
    must_be_gone(disk, store)


def test_debris_is_removed_at_the_start_and_what_nobody_owns_when_all_were_heard() -> None:
    disk = VirtualDisk()
    store = on(disk)
    put(store, 0)
    put(store, 1)
    disk.close(disk.create(FOLDER / f"{PART_PREFIX}{NAMES[2].hex()}"))
    again = on(disk)
    again.retain([NAMES[1], NAMES[2]], "a")
    assert again.remove_unowned() == 1
    assert disk.names(FOLDER) == [NAMES[1].hex()]


def test_ram_holds_the_last_used_within_its_budget() -> None:
    disk = VirtualDisk()
    store = on(disk, 2 * FORMAT.block_bytes)
    for block in (0, 1):
        put(store, block)
    assert store.read(NAMES[0]) == (KV.block(0), Tier.RAM)
    put(store, 2)
    assert [store.in_ram(name) for name in NAMES] == [True, False, True]
    assert store.read(NAMES[1]) == (KV.block(1), Tier.DISK)
    assert store.bytes_in_ram == 2 * FORMAT.block_bytes
    assert on(disk, FORMAT.block_bytes - 1).read(NAMES[0])[1] is Tier.DISK


def test_a_payload_of_another_size_is_refused_and_other_ids_are_a_bug() -> None:
    store = on(VirtualDisk())
    with pytest.raises(RefusedError, match="KV payload: got 1199 bytes; allowed: 1200 bytes"):
        store.put(NAMES[0], ROOT, ids_of(0), KV.block(0)[:-1], "a")
    with pytest.raises(ValueError, match="does not stand for these ids"):
        store.put(NAMES[1], ROOT, ids_of(0), KV.block(0), "a")
    assert len(store) == 0


def test_after_sync_a_power_cut_takes_nothing() -> None:
    disk = VirtualDisk()
    store = on(disk)
    put(store, 0)
    assert any(FOLDER / NAMES[0].hex() not in disk.rebooted(keeps).names_now for keeps in survivals(2))
    store.sync([NAMES[0]])
    assert all(on(disk.rebooted(keeps)).read(NAMES[0])[0] == KV.block(0) for keeps in survivals(6))


def test_a_power_cut_at_any_write_shows_the_block_or_a_damage_that_is_found() -> None:
    def write(disk: VirtualDisk) -> None:
        put(on(disk), 0)

    found = set()
    for crashed in crashes(write, VirtualDisk()):
        try:
            found.add(on(crashed).read(NAMES[0])[0] == KV.block(0))
        except (RefusedError, UnavailableError) as error:
            found.add(type(error))
    assert found == {True, RefusedError, UnavailableError}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_error_at_any_operation_of_a_put_leaves_nothing_and_the_next_put_works(error: int) -> None:
    for fail_at in range(1, 50):
        disk = VirtualDisk()
        store = on(disk)
        disk.fail_at, disk.error = disk.operations + fail_at, error
        try:
            put(store, 0)
        except UnavailableError:
            assert (disk.names(FOLDER), store.bytes_on_disk, disk.open_files) == ([], 0, {})
            put(store, 0)
        else:
            break
        assert store.read(NAMES[0])[0] == KV.block(0)
    assert fail_at > 4


def test_an_unsynced_write_replaces_in_whole_and_clears_what_an_earlier_one_left() -> None:
    disk = VirtualDisk()
    disk.close(disk.create(FOLDER / f"{PART_PREFIX}x"))
    write_unsynced(disk, FOLDER / "x", b"old")
    write_unsynced(disk, FOLDER / "x", b"new")
    assert (disk.content(FOLDER / "x"), disk.names(FOLDER)) == (b"new", ["x"])
