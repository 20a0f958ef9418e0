"""What a hostile repository, broker or thief of a key can offer a board as the fleet's metadata, and what comes of it.

SECURITY.md cases 1-8, 12, 24, 25, on the engine that the agent uses. The fetcher is the repository in memory.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from securesystemslib.signer import CryptoSigner, SSlibKey

from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.store.files import Disk
from ota import trust
from ota.trust import MAX_NEW_ROOTS, TrustedMetadata
from tests.tuf_repository import ONLINE, ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TufRepository

NOW_S = int(datetime.now(UTC).timestamp())
DAY_S = 86_400


class Unsynced(Disk):
    """For tests that are not about durability."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_folder(self, folder: Path) -> None:
        pass


class Board:
    """Keeps what a board keeps: a folder that may vanish, and floors in the ledger that may not."""

    def __init__(self, folder: Path, repository: TufRepository) -> None:
        self.folder, self.root = folder, repository.documents["1.root"]
        self.floors: dict[str, int] = {}
        self.clock_s = NOW_S

    def refresh(self, repository: TufRepository, floors: Mapping[str, int] | None = None) -> TrustedMetadata:
        trusted = TrustedMetadata(
            self.folder,
            repository,
            bootstrap=self.root,
            floors=self.floors if floors is None else floors,
            disk=Unsynced(),
            clock=lambda: self.clock_s,
        )
        trusted.refresh()
        for mark, version in trusted.marks.items():
            self.floors[mark] = max(version, self.floors.get(mark, 0))
        return trusted

    def version(self, role: str) -> int:
        return int(json.loads((self.folder / f"{role}.json").read_bytes())["signed"]["version"])


@pytest.fixture
def repository() -> TufRepository:
    return TufRepository()


@pytest.fixture
def board(tmp_path: Path, repository: TufRepository) -> Board:
    board = Board(tmp_path / "tuf", repository)
    board.refresh(repository)
    return board


def refused(board: Board, repository: TufRepository, words: str) -> RefusedError:
    with pytest.raises(RefusedError, match=words) as caught:
        board.refresh(repository)
    return caught.value


def test_what_was_published_is_trusted_and_said(board: Board, repository: TufRepository) -> None:
    repository.add("fleet/charter.cbor", b"who belongs")
    repository.sign_at(NOW_S)
    repository.publish(*ONLINE)
    trusted = board.refresh(repository)
    target = trusted.target("fleet/charter.cbor")
    assert target is not None and (target.size_bytes, trusted.paths()) == (11, ["fleet/charter.cbor"])
    assert trusted.target("fleet/another") is None
    assert trusted.signed_s == NOW_S
    assert [version for mark, version in trusted.marks.items() if "tuf/time/" not in mark] == [1, 2, 2, 2]


@pytest.mark.parametrize("role", ONLINE)
@pytest.mark.parametrize("keeps_folder", [True, False])
def test_lower_version_is_refused(board: Board, repository: TufRepository, role: str, keeps_folder: bool) -> None:
    repository.publish(*ONLINE)
    board.refresh(repository)
    repository.part(role).version = 1
    repository.put(role, repository.signed(role))
    for each in ONLINE[ONLINE.index(role) + 1 :]:
        repository.publish(each)
    if not keeps_folder:
        shutil.rmtree(board.folder)
    refused(board, repository, "version")
    assert board.floors[next(mark for mark in board.floors if role in mark)] == 2


@pytest.mark.parametrize("role", [SNAPSHOT, TARGETS])
def test_same_version_with_another_digest_is_refused(board: Board, repository: TufRepository, role: str) -> None:
    before = (board.folder / f"{role}.json").read_bytes()
    repository.part(role).unrecognized_fields["another"] = "content"
    for each in ONLINE[ONLINE.index(role) :]:
        repository.part(each).version += each != role
        repository.put(each, repository.signed(each))
    refused(board, repository, "other content|length|hash|digest")
    assert (board.folder / f"{role}.json").read_bytes() == before


def test_same_timestamp_version_with_another_digest_does_not_count_and_is_said(board: Board, repository: TufRepository) -> None:
    repository.publish(TARGETS, SNAPSHOT)
    repository.put(TIMESTAMP, repository.signed(TIMESTAMP))
    trusted = board.refresh(repository)
    assert board.version(SNAPSHOT) == 1
    assert "timestamp 1 came with other content" in trusted.notes[0]


def test_expired_timestamp_freezes_nobody_unnoticed(board: Board, repository: TufRepository) -> None:
    board.clock_s = NOW_S + 8 * DAY_S
    error = refused(board, repository, "expired")
    assert "this board's clock says" in str(error) and "sly fleet renew" in error.remedy


@pytest.mark.parametrize("role", [ROOT, *ONLINE])
def test_expired_metadata_of_any_role_is_refused(board: Board, repository: TufRepository, role: str) -> None:
    repository.part(role).expires = datetime.now(UTC) - timedelta(days=1)
    repository.publish(*([ROOT] if role == ROOT else []), *ONLINE)
    refused(board, repository, "expired")


@pytest.mark.parametrize("role", ONLINE)
def test_fast_forward_ends_with_new_keys(board: Board, repository: TufRepository, role: str) -> None:
    repository.part(role).version = 2**31 - 1 - (role == TIMESTAMP)
    repository.publish(*ONLINE[ONLINE.index(role) :])
    board.refresh(repository)
    assert board.version(role) == 2**31 - 1

    repository.part(role).version = 1
    repository.publish(*ONLINE)
    refused(board, repository, "version")

    for each in {TARGETS: ONLINE, SNAPSHOT: (SNAPSHOT, TIMESTAMP), TIMESTAMP: (TIMESTAMP,)}[role]:
        repository.rotate(each)
    repository.publish(*ONLINE)
    trusted = board.refresh(repository)
    assert board.version(role) == 3
    old, new = sorted(version for mark, version in board.floors.items() if mark.startswith(f"tuf/{role}/"))[::-1]
    assert (old, new) == (2**31 - 1, 3) and trusted.root_version >= 2


def test_fast_forward_of_time_ends_with_new_keys(board: Board, repository: TufRepository) -> None:
    honest = repository.timestamp.expires
    repository.timestamp.expires = datetime(2100, 1, 1, tzinfo=UTC)
    repository.sign_at(int(datetime(2099, 1, 1, tzinfo=UTC).timestamp()))
    repository.publish(TIMESTAMP)
    board.refresh(repository)
    repository.timestamp.expires = honest
    repository.sign_at(NOW_S)
    repository.publish(TIMESTAMP)
    assert "2099-01-01" in str(refused(board, repository, "expired"))

    repository.rotate(TIMESTAMP)
    repository.publish(TIMESTAMP)
    assert board.refresh(repository).signed_s == NOW_S


def test_mix_and_match_of_snapshots_is_refused(board: Board, repository: TufRepository) -> None:
    repository.publish(*ONLINE)
    first = repository.documents["2.snapshot"]
    repository.publish(*ONLINE)
    repository.documents["3.snapshot"] = first
    refused(board, repository, "length|hash|version|match")
    assert board.version(SNAPSHOT) == 1


def test_mix_and_match_of_targets_is_refused(board: Board, repository: TufRepository) -> None:
    repository.add("a", b"of the second")
    repository.publish(*ONLINE)
    second = repository.documents["2.targets"]
    repository.add("a", b"of the third.")
    repository.publish(*ONLINE)
    repository.documents["3.targets"] = second
    refused(board, repository, "length|hash|version|match")
    assert board.version(TARGETS) == 1


def test_metadata_of_another_fleet_is_refused(board: Board) -> None:
    other = TufRepository()
    other.publish(*ONLINE)
    refused(board, other, "signed|threshold|signatures")


def test_a_folder_swapped_for_that_of_another_fleet_does_not_change_whom_a_board_trusts(
    board: Board, repository: TufRepository, tmp_path: Path
) -> None:
    other = TufRepository()
    other.publish(*ONLINE)
    Board(tmp_path / "other", other).refresh(other)
    shutil.rmtree(board.folder)
    shutil.copytree(tmp_path / "other", board.folder, symlinks=True)
    refused(board, other, "signed|threshold|signatures")
    board.refresh(repository)


@pytest.mark.parametrize("role", [ROOT, *ONLINE])
def test_below_threshold_is_refused(board: Board, repository: TufRepository, role: str) -> None:
    repository.part(role).version += 1
    repository.put(role, repository.signed(role, keys=repository.keys[role][:-1][:1]))
    if role != ROOT:
        repository.publish(*ONLINE[ONLINE.index(role) + 1 :])
    refused(board, repository, "signed|signatures")
    assert board.version(role) == 1


def test_a_signature_that_is_given_twice_counts_once(board: Board, repository: TufRepository) -> None:
    repository.root.version += 1
    document = json.loads(repository.signed(ROOT, keys=repository.keys[ROOT][:1]))
    document["signatures"] *= 2
    repository.put(ROOT, json.dumps(document).encode())
    refused(board, repository, "signatures|unique|Multiple")


def twin(signer: CryptoSigner, written: Callable[[str], str]) -> CryptoSigner:
    """The same key under another name."""
    key = signer.public_key
    same = SSlibKey("f" * 64, key.keytype, key.scheme, {"public": written(key.keyval["public"])})
    return CryptoSigner(signer._private_key, same)


@pytest.mark.parametrize("role", [ROOT, *ONLINE])
@pytest.mark.parametrize("written", [str.lower, str.upper])
def test_one_key_under_two_names_counts_once(
    board: Board, repository: TufRepository, role: str, written: Callable[[str], str]
) -> None:
    """python-tuf counts the names of keys: without a rule of ours one thief would be two."""
    signers = repository.keys[role]
    signers.append(twin(signers[0], written))
    repository.root.add_key(signers[-1].public_key, role)
    repository.root.roles[role].threshold = 2
    repository.publish(ROOT)
    if role == ROOT:
        board.refresh(repository)
        repository.publish(ROOT, keys=[signers[0], signers[-1]])
    else:
        repository.publish(*ONLINE)
    before = board.version(role)
    refused(board, repository, "2 signatures of 1 keys; allowed: 2 keys")
    assert board.version(role) == before


def test_one_key_under_two_names_beside_others_does_no_harm(board: Board, repository: TufRepository) -> None:
    signers = repository.keys[ROOT]
    repository.root.add_key(twin(signers[0], str.lower).public_key, ROOT)
    repository.publish(ROOT)
    repository.publish(ROOT)
    assert board.refresh(repository).root_version == 3


def test_one_key_in_two_writings_counts_once(board: Board, repository: TufRepository) -> None:
    signer = CryptoSigner.generate_ecdsa()
    repository.keys[TARGETS] = [signer, twin(signer, lambda pem: f"\n{pem}\n")]
    for each in repository.keys[TARGETS]:
        repository.root.add_key(each.public_key, TARGETS)
    repository.root.roles[TARGETS].threshold = 2
    repository.publish(ROOT, *ONLINE)
    refused(board, repository, "2 signatures of 1 keys")


@pytest.mark.parametrize("whose", ["of the old root", "of the new root"])
def test_one_key_under_two_names_rotates_no_root(board: Board, repository: TufRepository, whose: str) -> None:
    first, second, *_ = repository.keys[ROOT]
    again = twin(first, str.lower)
    if whose == "of the old root":
        repository.root.add_key(again.public_key, ROOT)
        repository.publish(ROOT)
        board.refresh(repository)
        for signer in [*repository.keys[ROOT], again]:
            repository.root.revoke_key(signer.public_key.keyid, ROOT)
        signers = [first, again, repository.new_key(ROOT), repository.new_key(ROOT)]
    else:
        for signer in repository.keys[ROOT]:
            repository.root.revoke_key(signer.public_key.keyid, ROOT)
        third = repository.new_key(ROOT)
        repository.root.add_key(twin(third, str.lower).public_key, ROOT)
        signers = [first, second, third, twin(third, str.lower)]
    before = board.version(ROOT)
    repository.publish(ROOT, keys=signers)
    refused(board, repository, "2 signatures of 1 keys")
    assert board.version(ROOT) == before


def test_one_key_under_two_names_counts_once_in_what_is_kept_too(board: Board, repository: TufRepository) -> None:
    """The second name is known only to a root that came after the document."""
    signer = repository.keys[TARGETS][0]
    again = twin(signer, str.lower)
    repository.publish(TARGETS, keys=[signer, again])
    repository.publish(SNAPSHOT, TIMESTAMP)
    board.refresh(repository)
    repository.root.add_key(again.public_key, TARGETS)
    repository.root.roles[TARGETS].threshold = 2
    repository.publish(ROOT)
    refused(board, repository, "targets: got 2 signatures of 1 keys")


def test_a_floor_belongs_to_keys_and_threshold_in_any_order(tmp_path: Path) -> None:
    repository = TufRepository()
    repository.keys[TARGETS].append(repository.new_key(TARGETS))
    repository.publish(ROOT, *ONLINE)
    marks = []
    for change in (lambda role: None, lambda role: role.keyids.reverse(), lambda role: setattr(role, "threshold", 2)):
        change(repository.root.roles[TARGETS])
        repository.publish(ROOT)
        found = Board(tmp_path / str(len(marks)), repository).refresh(repository).marks
        marks.append(next(mark for mark in found if TARGETS in mark))
    assert marks[0] == marks[1] != marks[2]


def test_new_keys_may_begin_a_version_anew(board: Board, repository: TufRepository) -> None:
    repository.rotate(TARGETS)
    repository.targets.unrecognized_fields["another"] = "content"
    repository.put(TARGETS, repository.signed(TARGETS))
    repository.publish(SNAPSHOT, TIMESTAMP)
    board.refresh(repository)
    assert b"another" in (board.folder / "targets.json").read_bytes()


def test_root_that_skips_a_version_is_refused(board: Board, repository: TufRepository) -> None:
    repository.publish(ROOT)
    repository.publish(ROOT)
    repository.documents["2.root"] = repository.documents.pop("3.root")
    refused(board, repository, "version")
    assert board.version(ROOT) == 1


def test_root_beyond_a_missing_one_is_not_looked_for(board: Board, repository: TufRepository) -> None:
    repository.publish(ROOT)
    repository.publish(ROOT)
    del repository.documents["2.root"]
    assert board.refresh(repository).root_version == 1


@pytest.mark.parametrize("signers", ["old", "new"])
def test_root_signed_only_by_old_or_only_by_new_keys_is_refused(board: Board, repository: TufRepository, signers: str) -> None:
    old = repository.keys[ROOT]
    repository.rotate(ROOT)
    repository.put(ROOT, repository.signed(ROOT, keys=old if signers == "old" else None))
    refused(board, repository, "signed|signatures")
    assert board.version(ROOT) == 1


def test_endless_root_chain_is_bounded_and_goes_on_next_time(tmp_path: Path) -> None:
    repository = TufRepository(root_keys=1, threshold=1)
    board = Board(tmp_path, repository)
    for _ in range(MAX_NEW_ROOTS + 8):
        repository.publish(ROOT)
    assert board.refresh(repository).root_version == 1 + MAX_NEW_ROOTS
    assert sum("root" in url for url in repository.fetched) == MAX_NEW_ROOTS
    assert board.refresh(repository, floors={}).root_version == 9 + MAX_NEW_ROOTS
    shutil.rmtree(board.folder)
    assert board.refresh(repository).root_version == 9 + MAX_NEW_ROOTS, "the floor says how far to go"


def test_root_chain_longer_than_ever_allowed_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "MAX_ROOTS", 5)
    repository = TufRepository(root_keys=1, threshold=1)
    board = Board(tmp_path, repository)
    for _ in range(9):
        repository.publish(ROOT)
    for _ in range(3):
        assert board.refresh(repository).root_version == 6


def _newer_specification(document: dict[str, object]) -> None:
    document["spec_version"] = "2.0.0"


def _unknown_type(document: dict[str, object]) -> None:
    document["_type"] = "targets-of-tomorrow"


def _unknown_digest(document: dict[str, object]) -> None:
    document["targets"] = {"a": {"length": 1, "hashes": {"sha4-256": "00" * 32}}}


def _no_version(document: dict[str, object]) -> None:
    del document["version"]


def _version_as_text(document: dict[str, object]) -> None:
    document["version"] = "2"


@pytest.mark.parametrize("change", [_newer_specification, _unknown_type, _no_version, _version_as_text])
def test_unknown_critical_field_is_refused(
    board: Board, repository: TufRepository, change: Callable[[dict[str, object]], None]
) -> None:
    """Signed by the right key: what is not understood is not passed over."""
    repository.timestamp.version += 1
    document = json.loads(repository.signed(TIMESTAMP))
    change(document["signed"])
    repository.put(TIMESTAMP, _signed_again(document, repository.keys[TIMESTAMP][0]))
    refused(board, repository, "deserialize|type|Expected|understood")
    assert board.version(TIMESTAMP) == 1


def _signed_again(document: dict[str, object], signer: CryptoSigner) -> bytes:
    from securesystemslib.formats import encode_canonical

    signature = signer.sign(str(encode_canonical(cast(dict[str, Any], document["signed"]))).encode())
    document["signatures"] = [signature.to_dict()]
    return json.dumps(document).encode()


def test_target_of_an_unknown_digest_algorithm_is_refused(board: Board, repository: TufRepository) -> None:
    repository.targets.version += 1
    document = json.loads(repository.signed(TARGETS))
    _unknown_digest(document["signed"])
    repository.put(TARGETS, _signed_again(document, repository.keys[TARGETS][0]))
    repository.publish(SNAPSHOT, TIMESTAMP)
    trusted = board.refresh(repository)
    with pytest.raises(RefusedError, match="SHA-256"):
        trusted.target("a")


def test_key_of_an_unknown_algorithm_signs_nothing(board: Board, repository: TufRepository) -> None:
    strange = SSlibKey("e" * 64, "ed448-pq", "ed448-pq", {"public": "00" * 57})
    repository.root.revoke_key(repository.keys[TARGETS][0].public_key.keyid, TARGETS)
    repository.root.add_key(strange, TARGETS)
    repository.publish(ROOT)
    repository.publish(*ONLINE)
    refused(board, repository, "Unsupported public key")
    assert board.version(ROOT) == 1


def test_clock_at_1970_opens_no_freeze(board: Board, repository: TufRepository) -> None:
    repository.sign_at(NOW_S)
    repository.publish(TIMESTAMP)
    board.refresh(repository)
    frozen = dict(repository.documents)
    board.clock_s = 0
    assert board.refresh(repository).signed_s == NOW_S

    repository.timestamp.expires = datetime.now(UTC) + timedelta(days=30)
    repository.sign_at(NOW_S + 20 * DAY_S)
    repository.publish(TIMESTAMP)
    board.refresh(repository)

    repository.documents.update(frozen)
    shutil.rmtree(board.folder)
    board.floors = {mark: version for mark, version in board.floors.items() if "time" in mark}
    error = refused(board, repository, "expired")
    assert "1970-01-01" in str(error) and "last time known to have passed" in str(error)


def test_clock_in_the_future_says_what_the_board_believes(board: Board, repository: TufRepository) -> None:
    board.clock_s = int(datetime(2035, 6, 1, tzinfo=UTC).timestamp())
    error = refused(board, repository, "expired")
    assert "2035-06-01" in str(error) and "set this board's clock" in error.remedy
    board.clock_s = NOW_S
    board.refresh(repository)


def test_clock_that_jumps_back_after_an_update_changes_nothing(board: Board, repository: TufRepository) -> None:
    repository.sign_at(NOW_S)
    repository.publish(*ONLINE)
    board.refresh(repository)
    board.clock_s = NOW_S - 400 * DAY_S
    repository.publish(*ONLINE)
    assert board.refresh(repository).marks.items() <= board.floors.items()


def test_a_time_that_a_publisher_cannot_have_signed_at_is_not_believed(board: Board, repository: TufRepository) -> None:
    for said, believed in ((-1, 0), ("soon", 0), (True, 0), (2**70, int(repository.timestamp.expires.timestamp()))):
        repository.timestamp.unrecognized_fields["sly_signed_at"] = said
        repository.publish(TIMESTAMP)
        assert board.refresh(repository, floors={}).signed_s == believed


@pytest.mark.parametrize("what", ["deleted", "restored"])
@pytest.mark.parametrize("role", [ROOT, *ONLINE])
def test_counter_files_deleted_or_restored_from_backup_lower_no_floor(
    board: Board, repository: TufRepository, tmp_path: Path, what: str, role: str
) -> None:
    backup = shutil.copytree(board.folder, tmp_path / "backup", symlinks=True)
    old = dict(repository.documents)
    repository.publish(*([ROOT] if role == ROOT else ONLINE[ONLINE.index(role) :]))
    board.refresh(repository)

    shutil.rmtree(board.folder)
    if what == "restored":
        shutil.copytree(backup, board.folder, symlinks=True)
    repository.documents.clear()
    repository.documents.update(old)
    error = refused(board, repository, "which this board has seen")
    assert "version 1" in str(error)


def test_no_floor_at_all_means_the_folder_alone_decides(board: Board, repository: TufRepository) -> None:
    """The control of the test above: without floors the same deletion is not noticed."""
    old = dict(repository.documents)
    repository.publish(*ONLINE)
    board.refresh(repository)
    shutil.rmtree(board.folder)
    repository.documents.clear()
    repository.documents.update(old)
    board.refresh(repository, floors={})


@pytest.mark.parametrize("role", [ROOT, *ONLINE])
def test_a_document_longer_than_its_bound_is_refused(board: Board, repository: TufRepository, role: str) -> None:
    repository.part(role).unrecognized_fields["padding"] = "x" * trust.MAX_TARGETS_BYTES
    repository.publish(*([ROOT] if role == ROOT else ONLINE[ONLINE.index(role) :]))
    refused(board, repository, "exceeding")


NO_METADATA = (
    b"",
    b"{",
    b"[" * 10_000,
    b'{"signed":' * 40,
    b"\xff\xfe",
    b"null",
    b'{"signed": {}, "signatures": []}',
    b"1" * 9000,
)


@pytest.mark.parametrize("name", ["2.root", "timestamp", "2.snapshot", "2.targets"])
@pytest.mark.parametrize("data", NO_METADATA)
def test_what_is_no_metadata_is_refused(board: Board, repository: TufRepository, name: str, data: bytes) -> None:
    repository.publish(*([ROOT] if "root" in name else ONLINE))
    repository.documents[name] = data
    with pytest.raises(RefusedError):
        board.refresh(repository)


def test_a_flipped_bit_changes_nothing_or_is_refused(board: Board, repository: TufRepository, tmp_path: Path) -> None:
    """Bits of the layout carry nothing; every other one breaks the signature."""
    repository.publish(ROOT, *ONLINE)
    right = dict(repository.documents)
    expected = Board(tmp_path / "right", repository).refresh(repository).marks
    random, refusals = Random(6), 0
    for number in range(240):
        name = random.choice(["2.root", "timestamp", "2.snapshot", "2.targets"])
        data = bytearray(right[name])
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        repository.documents[name] = bytes(data)
        try:
            assert Board(tmp_path / str(number), repository).refresh(repository).marks == expected
        except RefusedError:
            refusals += 1
        repository.documents[name] = right[name]
    assert refusals > 150


class FailingDisk(Disk):
    """Fails at one of its operations; logs them all."""

    def __init__(self, fail_at: int = -1, error: int = errno.ENOSPC) -> None:
        self.log: list[tuple[str, str]] = []
        self._fail_at, self._error = fail_at, error

    def _step(self, what: str, name: str) -> None:
        self.log.append((what, name))
        if len(self.log) - 1 == self._fail_at:
            raise OSError(self._error, os.strerror(self._error))

    def write(self, fd: int, data: bytes) -> None:
        self._step("write", "")
        super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._step("fsync", "")
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target.name)
        super().rename(source, target)

    def fsync_folder(self, folder: Path) -> None:
        self._step("fsync_folder", folder.name)
        super().fsync_folder(folder)


def _on(disk: Disk, board: Board, repository: TufRepository) -> None:
    TrustedMetadata(board.folder, repository, bootstrap=board.root, disk=disk).refresh()


def test_what_a_refresh_accepted_is_durable_before_it_returns(board: Board, repository: TufRepository) -> None:
    repository.publish(ROOT, *ONLINE)
    disk = FailingDisk()
    _on(disk, board, repository)
    for at, (what, name) in enumerate(disk.log):
        if what == "rename":
            assert [each for each, _ in disk.log[at - 2 : at + 2]] == ["write", "fsync", "rename", "fsync_folder"], name
    renamed = [name for what, name in disk.log if what == "rename"]
    assert renamed == ["2.root.json", "timestamp.json", "snapshot.json", "targets.json"]
    repository.publish(ROOT)
    _on(disk, board, repository)
    assert disk.log[-1] == ("fsync_folder", "tuf"), "the link to the newest root too"


def test_a_downloaded_target_is_durable_under_its_name(board: Board, repository: TufRepository, tmp_path: Path) -> None:
    repository.add("releases/faces/3/model.tflite", b"sixteen weights.")
    repository.publish(*ONLINE)
    disk = FailingDisk()
    trusted = TrustedMetadata(board.folder, repository, bootstrap=board.root, disk=disk)
    trusted.refresh()
    disk.log.clear()
    place = trusted.download("releases/faces/3/model.tflite", "http://site/targets", tmp_path)
    assert place.read_bytes() == b"sixteen weights."
    assert disk.log == [("fsync", ""), ("rename", place.name), ("fsync_folder", tmp_path.name)]


def test_more_or_larger_targets_than_a_board_can_hold_are_refused(
    board: Board, repository: TufRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.add("a", b"12345")
    repository.add("b", b"6")
    repository.publish(*ONLINE)
    trusted = board.refresh(repository)
    monkeypatch.setattr(trust, "MAX_PATHS", 1)
    with pytest.raises(RefusedError, match="at most 1"):
        trusted.paths()
    monkeypatch.setattr(trust, "MAX_TARGET_BYTES", 4)
    with pytest.raises(RefusedError, match="at most 4 bytes"):
        trusted.download("a", "http://site/targets", tmp_path)
    assert trusted.download("b", "http://site/targets", tmp_path).read_bytes() == b"6"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_full_disk_at_any_write_keeps_what_was_and_the_next_refresh_goes_on(
    board: Board, repository: TufRepository, error: int
) -> None:
    repository.publish(ROOT, *ONLINE)
    for fail_at in range(40):
        shutil.copytree(board.folder, board.folder.with_name("copy"), symlinks=True)
        disk = FailingDisk(fail_at, error)
        try:
            _on(disk, board, repository)
            assert fail_at >= len(disk.log)
            return
        except UnavailableError as failure:
            assert os.strerror(error) in failure.reason and failure.remedy
        board.refresh(repository, floors={})
        assert board.version(TARGETS) == 2
        shutil.rmtree(board.folder)
        board.folder.with_name("copy").rename(board.folder)
    pytest.fail("it never came to its end")


def test_torn_files_after_a_power_cut_are_fetched_again(board: Board, repository: TufRepository) -> None:
    for name in ("timestamp.json", "snapshot.json", "targets.json", "root_history/1.root.json"):
        whole = (board.folder / name).read_bytes()
        for torn in (b"", whole[: len(whole) // 2], bytes(len(whole))):
            (board.folder / name).write_bytes(torn)
            board.refresh(repository)
            assert (board.folder / name).read_bytes() == whole


def test_a_missing_document_is_no_refusal(board: Board, repository: TufRepository) -> None:
    repository.publish(*ONLINE)
    del repository.documents["2.snapshot"]
    with pytest.raises(UnavailableError, match="2.snapshot is not offered"):
        board.refresh(repository)


@pytest.mark.parametrize("root", [b"", b"{}", b"\x00", b"not a root"])
def test_a_board_without_a_right_root_trusts_nothing(tmp_path: Path, repository: TufRepository, root: bytes) -> None:
    with pytest.raises(SlyError):
        TrustedMetadata(tmp_path, repository, bootstrap=root)
    assert not repository.fetched
