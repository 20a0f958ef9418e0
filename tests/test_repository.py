"""The operator's repository: any TUF client takes what it publishes, it never signs what it did not sign, no kill breaks it."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadHTTPError, ExpiredMetadataError
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.files import Disk
from models.card import OwnSource
from models.catalog import card
from ota.charter import CHARTER_PATH, Enrolled, decode_charter
from ota.manifest import Kind, Release, decode_release, encode_release, manifest_path
from ota.published import SIGNED_AT
from ota.repository import Repository
from ota.trust import Offered, TrustedMetadata
from tests.test_release import released

DAY_S = 86_400
WEIGHTS = bytes(range(256)) * 1024


class Unsynced(Disk):
    """Durability is the point of ``test_repository_power``, not of these."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_folder(self, folder: Path) -> None:
        pass


class Clock:
    """The operator's clock: begins now, and is set by the test."""

    def __init__(self) -> None:
        self.now_s = float(int(time.time()))

    def __call__(self) -> float:
        return self.now_s


class Served(FetcherInterface):
    """A folder as an HTTP server would serve it; ``asked`` says what was."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix("http://fleet/")
        self.asked.append(name)
        if not (self.folder / name).is_file():
            raise DownloadHTTPError(f"no {name}", 404)
        return iter(((self.folder / name).read_bytes(),))


class Client:
    """python-tuf's own client, with a folder that it keeps."""

    def __init__(self, folder: Path, repository: Repository, bootstrap: bytes | None = None) -> None:
        self.folder, self.repository = folder, repository
        self.bootstrap = bootstrap or (repository.folder / "metadata" / "1.root.json").read_bytes()
        (folder / "targets").mkdir(parents=True)

    def updater(self) -> Updater:
        served = Served(self.repository.folder)
        return Updater(
            str(self.folder), "http://fleet/metadata/", str(self.folder / "targets"), "http://fleet/targets/", served,
            bootstrap=self.bootstrap,
        )  # fmt: skip

    def get(self, path: str) -> bytes | None:
        updater = self.updater()
        updater.refresh()
        info = updater.get_targetinfo(path)
        return None if info is None else Path(updater.download_target(info)).read_bytes()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def repository(tmp_path: Path, clock: Clock) -> Repository:
    return Repository.create(tmp_path / "fleet", "home", disk=Unsynced(), now_s=clock)


def release_in(folder: Path, number: int, data: bytes = WEIGHTS) -> tuple[Release, dict[str, Path]]:
    path = folder / f"faces-{number}.tflite"
    path.write_bytes(data)
    return Release("faces", number, Kind.PERCEPTION, (released("faces.tflite", data),)), {"faces.tflite": path}


def published(repository: Repository, tmp_path: Path, number: int, data: bytes = WEIGHTS) -> Release:
    release, files = release_in(tmp_path, number, data)
    repository.add_release(release, files)
    repository.commit()
    return release


def test_a_client_of_python_tuf_takes_the_charter_a_manifest_and_a_file(repository: Repository, tmp_path: Path) -> None:
    release = published(repository, tmp_path, 1)
    charter = replace(repository.charter(), serial=2, boards={"attic": Enrolled(bytes(32))})
    repository.put_charter(charter)
    repository.commit()

    client = Client(tmp_path / "client", repository)
    assert decode_charter(client.get(CHARTER_PATH) or b"") == charter
    assert decode_release(client.get(manifest_path("faces", 1)) or b"", manifest_path("faces", 1)) == release
    assert client.get("releases/faces/1/faces.tflite") == WEIGHTS
    assert client.get(manifest_path("faces", 2)) is None


def test_a_repository_that_is_opened_again_says_what_it_said(repository: Repository, tmp_path: Path, clock: Clock) -> None:
    first = published(repository, tmp_path, 1)
    second = published(repository, tmp_path, 2, WEIGHTS + b"more")
    again = Repository(repository.folder, now_s=clock)
    assert again.models() == ["faces"]
    assert again.releases("faces") == [1, 2]
    assert again.next_number("faces") == 3
    assert (again.release("faces", 1), again.release("faces", 2)) == (first, second)
    assert again.documents() == repository.documents()
    assert again.root() == again.documents()["1.root"]
    with pytest.raises(RefusedError, match="allowed: 1, 2"):
        again.release("faces", 3)
    with pytest.raises(RefusedError, match="none of it; of faces"):
        again.release("hands", 1)


def test_documents_are_every_root_and_the_last_two_of_the_rest(repository: Repository, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        published(repository, tmp_path, number)
    assert set(repository.documents()) == {"timestamp", "1.root", "3.snapshot", "4.snapshot", "3.targets", "4.targets"}
    names = {each.name for each in (repository.folder / "metadata").iterdir()}
    assert names == {f"{name}.json" for name in repository.documents()}


def test_an_artefact_is_found_by_its_digest(repository: Repository, tmp_path: Path) -> None:
    release = published(repository, tmp_path, 1)
    for data in (WEIGHTS, encode_release(release)):
        path = repository.artefact(sha256(data).digest())
        assert path is not None
        assert path.read_bytes() == data
    assert repository.digest(manifest_path("faces", 1)) == sha256(encode_release(release)).digest()
    assert repository.artefact(bytes(32)) is None


def test_a_charter_that_was_replaced_is_there_for_who_still_fetches_it_and_then_goes(
    repository: Repository, tmp_path: Path
) -> None:
    digests = [repository.digest(CHARTER_PATH)]
    for serial in (2, 3):
        repository.put_charter(replace(repository.charter(), serial=serial))
        repository.commit()
        digests.append(repository.digest(CHARTER_PATH))
    assert [repository.artefact(each) is not None for each in digests] == [False, True, True]
    assert len(list((repository.folder / "targets" / "fleet").iterdir())) == 2


def test_a_release_is_withdrawn_but_never_the_newest(repository: Repository, tmp_path: Path) -> None:
    for number in (1, 2):
        published(repository, tmp_path, number, WEIGHTS + bytes([number]))
    with pytest.raises(RefusedError, match="newest release"):
        repository.withdraw("faces", 2)
    repository.withdraw("faces", 1)
    repository.commit()
    assert repository.releases("faces") == [2]
    assert repository.artefact(sha256(WEIGHTS + b"\1").digest()) is not None, "gone while some still fetch it"
    client = Client(tmp_path / "client", repository)
    assert client.get("releases/faces/1/faces.tflite") is None
    repository.put_charter(replace(repository.charter(), serial=2))
    repository.commit()
    assert repository.artefact(sha256(WEIGHTS + b"\1").digest()) is None
    assert repository.artefact(sha256(WEIGHTS + b"\2").digest()) is not None


def test_a_released_model_is_recognized_from_then_on_and_a_withdrawn_one_no_more(repository: Repository, tmp_path: Path) -> None:
    known, digests = card("mobilenet-vww"), list[bytes]()
    for number, data in enumerate((b"one", b"two", b"two"), 1):
        digest = sha256(data).hexdigest()
        own = replace(known, source=OwnSource(digest, 3, "mine"), golden={"a library 2.3 x86_64": "ab" * 32})
        (tmp_path / "file").write_bytes(data)
        release = Release(known.name, number, Kind.PERCEPTION, (released(known.filename, data),), own.to_toml())
        repository.add_release(release, {known.filename: tmp_path / "file"})
        repository.commit()
        digests.append(bytes.fromhex(digest))
    references = repository.charter().references
    assert references.models == set(digests)
    assert references.golden == {(each, "a library 2.3 x86_64"): {bytes.fromhex("ab" * 32)} for each in set(digests)}
    assert repository.charter().serial == 3, "the third says nothing new"
    for number, left in ((2, set(digests)), (1, {digests[1]})):
        repository.withdraw(known.name, number)
        repository.commit()
        assert repository.charter().references.models == left
        assert {model for model, _ in repository.charter().references.golden} == left
    unreadable = Release("faces", 1, Kind.PERCEPTION, (released("file", b"two"),), "no card")
    with pytest.raises(RefusedError, match="card"):
        repository.add_release(unreadable, {"file": tmp_path / "file"})
    assert repository.models() == [known.name]


def test_private_keys_are_for_their_owner_only(repository: Repository) -> None:
    keys = sorted((repository.folder / "keys").iterdir())
    assert [each.name for each in keys] == [
        "root-1.pem", "root-2.pem", "root-3.pem", "snapshot.pem", "targets.pem", "timestamp.pem",
    ]  # fmt: skip
    assert {stat.S_IMODE(each.stat().st_mode) for each in keys} == {0o600}


def test_a_number_is_given_once_and_a_serial_grows(repository: Repository, tmp_path: Path) -> None:
    published(repository, tmp_path, 4)
    for number in (3, 4):
        with pytest.raises(RefusedError, match="the next one is 5"):
            repository.add_release(*release_in(tmp_path, number))
    with pytest.raises(RefusedError, match="more than 1"):
        repository.put_charter(repository.charter())
    with pytest.raises(RefusedError, match="of fleet away"):
        repository.put_charter(replace(repository.charter(), fleet="away", serial=2))


def test_a_file_changed_between_the_build_and_the_copy_is_refused(repository: Repository, tmp_path: Path) -> None:
    release, files = release_in(tmp_path, 1)
    for changed in (WEIGHTS[:-1] + b"!", WEIGHTS + b"!", WEIGHTS[:-1]):
        files["faces.tflite"].write_bytes(changed)
        with pytest.raises(RefusedError, match="it changed since the release was built"):
            repository.add_release(release, files)
    assert repository.releases("faces") == []
    assert not list((repository.folder / "targets" / "releases" / "faces" / "1").iterdir())
    with pytest.raises(RefusedError, match=r"allowed: faces\.tflite"):
        repository.add_release(release, {})


def test_nothing_is_published_before_the_commit(repository: Repository, tmp_path: Path) -> None:
    before = repository.documents()
    repository.add_release(*release_in(tmp_path, 1))
    assert repository.releases("faces") == [1]
    assert repository.documents() == before
    assert Repository(repository.folder).releases("faces") == []


def test_the_timestamp_is_renewed_alone_and_says_when(repository: Repository, tmp_path: Path, clock: Clock) -> None:
    client, before = Client(tmp_path / "client", repository), repository.documents()
    clock.now_s += 6 * DAY_S
    repository.renew()
    after = repository.documents()
    assert {name for name in after if after[name] != before.get(name)} == {"timestamp"}
    assert f'"{SIGNED_AT}":{int(clock.now_s)}'.encode() in after["timestamp"]
    assert repository.expires_s()["timestamp"] == int(clock.now_s) + 7 * DAY_S
    assert client.get(CHARTER_PATH) is not None


def test_freeze_a_timestamp_that_nobody_renewed_is_refused_by_clients(tmp_path: Path, clock: Clock) -> None:
    clock.now_s -= 8 * DAY_S
    repository = Repository.create(tmp_path / "fleet", "home", now_s=clock)
    with pytest.raises(ExpiredMetadataError):
        Client(tmp_path / "client", repository).get(CHARTER_PATH)
    clock.now_s += 8 * DAY_S
    repository.renew()
    assert Client(tmp_path / "other", repository).get(CHARTER_PATH) is not None


def test_what_expires_before_the_next_timestamp_is_renewed_with_it(tmp_path: Path, clock: Clock) -> None:
    repository = Repository.create(tmp_path / "fleet", "home", snapshot_days=10, now_s=clock)
    clock.now_s += 4 * DAY_S
    repository.renew()
    assert repository.expires_s()["snapshot"] == int(clock.now_s) + 10 * DAY_S
    assert Client(tmp_path / "client", repository).get(CHARTER_PATH) is not None


def test_a_clock_that_went_back_signs_nothing(repository: Repository, clock: Clock) -> None:
    before = repository.documents()
    clock.now_s = 0
    for sign in (repository.commit, repository.renew, lambda: repository.rotate("timestamp")):
        with pytest.raises(RefusedError, match="clock"):
            sign()
    assert repository.documents() == before


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_a_role_gets_new_keys_and_clients_follow(repository: Repository, tmp_path: Path, clock: Clock, role: str) -> None:
    client = Client(tmp_path / "client", repository)
    assert client.get(CHARTER_PATH) is not None
    old = {path.name: path.read_bytes() for path in (repository.folder / "keys").glob(f"{role}*.pem")}
    made = repository.rotate(role)
    assert all(path.is_file() and path.read_bytes() not in old.values() for path in made)
    assert len(made) == len(old)
    again = Repository(repository.folder, now_s=clock)
    assert "2.root" in again.documents()
    published(again, tmp_path, 1)
    assert client.get("releases/faces/1/faces.tflite") == WEIGHTS
    assert Client(tmp_path / "newcomer", again).get(CHARTER_PATH) is not None


def test_a_board_takes_what_is_published_and_keeps_its_floors(repository: Repository, tmp_path: Path, clock: Clock) -> None:
    marks: dict[str, int] = {}
    root = repository.root()
    for number, role in enumerate(("timestamp", "snapshot", "targets", "root"), 1):
        clock.now_s += 1
        published(repository, tmp_path, number)
        board = TrustedMetadata(tmp_path / "board", Offered(repository.documents()), bootstrap=root, floors=marks)
        board.refresh()
        found = board.target(manifest_path("faces", number))
        assert found is not None
        assert found.digest == repository.digest(manifest_path("faces", number))
        assert board.signed_s == int(clock.now_s)
        assert {name for name, version in board.marks.items() if version < marks.get(name, 0)} == set()
        marks = {**marks, **board.marks}
        repository.rotate(role)


def test_a_key_that_was_rotated_out_signs_nothing_any_more(repository: Repository, tmp_path: Path, clock: Clock) -> None:
    stolen = (repository.folder / "keys" / "timestamp.pem").read_bytes()
    repository.rotate("timestamp")
    assert not (repository.folder / "keys" / "timestamp.pem").exists()
    (made,) = (repository.folder / "keys").glob("timestamp-*.pem")
    made.write_bytes(stolen)
    with pytest.raises(RefusedError, match="timestamp keys of this fleet"):
        Repository(repository.folder, now_s=clock).renew()


def test_root_keys_that_lie_elsewhere_sign_by_threshold(repository: Repository, tmp_path: Path) -> None:
    safe = tmp_path / "safe"
    safe.mkdir()
    keys = [path.rename(safe / path.name) for path in sorted((repository.folder / "keys").glob("root-*.pem"))]
    for few in ((), keys[:1], [keys[0], keys[0]], [keys[0], repository.folder / "keys" / "targets.pem"]):
        with pytest.raises(RefusedError, match="2 different ones"):
            repository.rotate("targets", few)
    repository.rotate("targets", keys[1:])
    new = repository.rotate("root", keys[:2], new_key_folder=safe)
    with pytest.raises(RefusedError, match="0 of its keys"):
        repository.renew_root(keys)
    repository.renew_root(new[1:])
    assert not list((repository.folder / "keys").glob("root-*"))
    assert Client(tmp_path / "client", repository).get(CHARTER_PATH) is not None
    assert set(repository.documents()) >= {"1.root", "2.root", "3.root", "4.root"}


def test_metadata_changed_on_the_operators_disk_is_never_signed_again(repository: Repository, tmp_path: Path) -> None:
    published(repository, tmp_path, 1)
    for name in ("timestamp.json", "2.snapshot.json", "2.targets.json", "1.root.json"):
        path = repository.folder / "metadata" / name
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"version":1', b'"version":9').replace(b'"version":2', b'"version":9'))
        with pytest.raises(RefusedError):
            Repository(repository.folder)
        path.write_bytes(data)
    Repository(repository.folder)


@pytest.mark.parametrize("role", ["targets", "snapshot"])
def test_older_metadata_under_a_newer_name_is_never_signed_again(repository: Repository, tmp_path: Path, role: str) -> None:
    published(repository, tmp_path, 1)
    metadata = repository.folder / "metadata"
    (metadata / f"2.{role}.json").write_bytes((metadata / f"1.{role}.json").read_bytes())
    with pytest.raises(RefusedError, match="restore it from a backup"):
        Repository(repository.folder)


def test_a_charter_changed_on_the_operators_disk_is_refused(repository: Repository) -> None:
    path = repository.artefact(repository.digest(CHARTER_PATH))
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RefusedError, match="other bytes"):
        repository.charter()


def test_two_commands_at_once_do_not_mix(repository: Repository, tmp_path: Path, clock: Clock) -> None:
    other = Repository(repository.folder, now_s=clock)
    repository.add_release(*release_in(tmp_path, 1))
    other.put_charter(replace(other.charter(), serial=2))
    repository.commit()
    with pytest.raises(UnavailableError, match="another command has changed it"):
        other.commit()
    assert Client(tmp_path / "client", repository).get(manifest_path("faces", 1)) is not None
    assert Repository(repository.folder).charter().serial == 1


def test_keys_are_never_overwritten(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="never overwritten"):
        Repository.create(repository.folder, "home")
    with pytest.raises(RefusedError, match="no root"):
        Repository(tmp_path)
    with pytest.raises(RefusedError, match="threshold"):
        Repository.create(tmp_path / "new", "home", 2, 3)
