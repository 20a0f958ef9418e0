"""A session moves to another board block by block, resumed at any block, and never with other bytes than were announced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import packed_ids
from edge_agent.store.kv_blocks import NO_PARENT, encoded
from edge_agent.store.kv_manifest import MAX_MANIFEST_TOKENS, Manifest
from edge_agent.store.kv_peers import PeerKv
from edge_agent.store.kv_sessions import SessionStore
from tests.kv_child import FORMAT, Chat
from tests.virtual_disk import VirtualDisk

FOLDER = Path("/state/kv")
PLENTY = 2**30


def board(disk: VirtualDisk | None = None, disk_bytes: int = PLENTY) -> SessionStore:
    return SessionStore(FOLDER, FORMAT, PLENTY, disk_bytes, disk or VirtualDisk())


def home(name: str = "alice") -> tuple[SessionStore, Chat, Manifest]:
    store = board()
    chat = Chat(store, name).begin()
    chat.prompt(list(range(400)))
    chat.answer([7, 8, 9])
    chat.end()
    return store, chat, Manifest.decode(PeerKv(store).export(name).encode())


def move(source: SessionStore, target: SessionStore, manifest: Manifest, most: int = 10**6) -> int:
    """Fetch what is missing, ``most`` blocks at most; how many bytes came."""
    came = 0
    PeerKv(target).adopt(manifest)
    missing = PeerKv(target).missing(manifest)
    for name in missing.blocks[:most]:
        data = PeerKv(source).export_block(name)
        PeerKv(target).import_block(manifest, name, data)
        came += len(data)
    if missing.rows and most > len(missing.blocks):
        rows = PeerKv(source).export_rows(manifest)
        PeerKv(target).import_rows(manifest, rows)
        came += len(rows)
    return came


@pytest.mark.parametrize("name", ["alice", "~a1"])
def test_a_moved_session_goes_on_where_it_was(name: str) -> None:
    source, chat, manifest = home(name)
    disk = VirtualDisk()
    target = board(disk)
    move(source, target, manifest)
    assert not PeerKv(target).missing(manifest)
    target.sync(name)
    moved = Chat.resumed(board(disk), name)
    assert (moved.ids, moved.tokens, moved.sealed) == (chat.ids, chat.tokens, chat.sealed)
    moved.prompt([1] * 70)
    moved.end()


def test_a_move_is_resumed_where_it_stopped_also_after_a_restart_of_the_receiver() -> None:
    source, chat, manifest = home()
    disk = VirtualDisk()
    whole = move(source, board(), manifest)
    came = 0
    while True:
        target = board(disk.killed())
        PeerKv(target).adopt(manifest)
        if not PeerKv(target).missing(manifest):
            break
        came += move(source, target, manifest, most=1)
    assert came == whole
    assert Chat.resumed(target, "alice").tokens == chat.tokens


def test_a_session_that_comes_home_brings_only_what_is_new() -> None:
    source, chat, manifest = home()
    away = board()
    first = move(source, away, manifest)
    moved = Chat.resumed(away, "alice")
    moved.prompt([3] * 80)
    moved.end()
    back = move(away, source, PeerKv(away).export("alice"))
    assert Chat.resumed(source, "alice").ids == moved.ids
    assert Chat.resumed(source, "alice").tokens == moved.tokens
    assert back < first * 3
    assert move(away, source, PeerKv(away).export("alice")) == 0


def test_what_another_session_shares_already_is_not_fetched() -> None:
    source, chat, manifest = home()
    target = board()
    twin = Chat(target, "twin").begin()
    twin.prompt(chat.ids[:400])
    twin.end()
    PeerKv(target).adopt(manifest)
    assert not PeerKv(target).missing(manifest).blocks
    assert PeerKv(target).missing(manifest).rows


def test_other_bytes_than_the_manifest_names_are_refused_and_not_kept() -> None:
    source, _, manifest = home()
    target = board()
    PeerKv(target).adopt(manifest)
    name, other, *_ = PeerKv(target).missing(manifest).blocks
    data = PeerKv(source).export_block(name)
    forged = encoded(FORMAT, NO_PARENT, range(4), bytes(FORMAT.prelude_bytes))
    flipped = bytes([*data[:-40], data[-40] ^ 1, *data[-39:]])
    for bad in (forged, flipped, data[:-1], b"", PeerKv(source).export_block(other), data[:-1] + bytes([data[-1] ^ 1])):
        with pytest.raises(RefusedError):
            PeerKv(target).import_block(manifest, name, bad)
    with pytest.raises(RefusedError, match="one that the manifest names"):
        PeerKv(target).import_block(manifest, bytes(32), data)
    rows = PeerKv(source).export_rows(manifest)
    for bad in (rows[:-1], rows + b"x", bytes(len(rows)), b""):
        with pytest.raises(RefusedError, match="fetch them again"):
            PeerKv(target).import_rows(manifest, bad)
    assert len(PeerKv(target).missing(manifest).blocks) == len(manifest.files)
    assert PeerKv(target).missing(manifest).rows


def test_a_block_that_is_damaged_at_home_is_not_exported() -> None:
    store, _, _ = home()
    disk = VirtualDisk()
    source = SessionStore(FOLDER, FORMAT, 0, PLENTY, disk)
    chat = Chat(source, "alice").begin()
    chat.prompt(list(range(400)))
    chat.end()
    block = max((path for path in disk.names_now if "blocks-" in str(path)), key=lambda path: len(disk.names_now[path].data))
    disk.names_now[block].data[600] ^= 1
    manifest = PeerKv(source).export("alice")
    assert manifest.tokens < chat.tokens
    target = board()
    move(source, target, manifest)
    assert Chat.resumed(target, "alice").tokens == manifest.tokens


def test_rows_of_a_session_that_moved_on_are_not_given_for_an_old_manifest() -> None:
    source, chat, manifest = home()
    chat.prompt([1] * 80)
    chat.end()
    with pytest.raises(UnavailableError, match="moved on since it was exported"):
        PeerKv(source).export_rows(manifest)


def test_a_session_of_this_name_with_other_ids_is_not_overwritten() -> None:
    _, _, manifest = home()
    target = board()
    own = Chat(target, "alice").begin()
    own.prompt([5] * 100)
    own.end()
    with pytest.raises(RefusedError, match="ids that differ from those of session alice.*drop the session first"):
        PeerKv(target).adopt(manifest)
    assert Chat.resumed(target, "alice").ids == own.ids


def test_a_session_that_does_not_fit_is_refused_before_anything_is_fetched() -> None:
    _, _, manifest = home()
    target = board(disk_bytes=5000)
    with pytest.raises(UnavailableError, match=r"no room for its KV: \d+ bytes needed"):
        PeerKv(target).adopt(manifest)
    assert (target.names(), target.bytes_on_disk) == ([], 0)


def test_a_manifest_of_another_model_or_window_is_refused() -> None:
    _, _, manifest = home()
    with pytest.raises(RefusedError, match="host the same model on both"):
        PeerKv(board()).adopt(replace(manifest, fingerprint=b"g" * 32))
    with pytest.raises(RefusedError, match="2 files for 403 tokens; allowed: 3 files"):
        PeerKv(board()).adopt(replace(manifest, files=manifest.files[1:]))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"}, {"name": "~~a"}, {"ids": b"123"}, {"ids": b"\xff" * 4}, {"tokens": 405}, {"tokens": -1}, {"sealed": 99},
        {"sealed": 0}, {"files": (b"short",)}, {"rows": b""}, {"fingerprint": b""},
        {"ids": packed_ids([1]) * (MAX_MANIFEST_TOKENS + 1)},
    ],
)  # fmt: skip
def test_a_manifest_that_no_session_can_have_is_refused(change: dict[str, object]) -> None:
    _, _, manifest = home()
    with pytest.raises(RefusedError):
        replace(manifest, **change)  # type: ignore[arg-type]


def test_bytes_that_are_no_manifest_are_refused() -> None:
    _, _, manifest = home()
    data = manifest.encode()
    for bad in (b"", data[:-1], data + b"\0", encode({1: 2}), encode([])):
        with pytest.raises(RefusedError):
            Manifest.decode(bad)
    assert Manifest.decode(data) == manifest


def test_a_session_without_kv_moves_as_its_history() -> None:
    source = board()
    source.create("alice")
    source.prompt("alice", [1, 2, 3])
    target = board()
    manifest = PeerKv(source).export("alice")
    held = PeerKv(target).adopt(manifest)
    assert (list(held.ids), held.tokens, bool(PeerKv(target).missing(manifest))) == ([1, 2, 3], 0, False)
