"""The operator's repository through power cuts and kills: the old state or the new one, and clients go on either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import pytest
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from edge_agent.core.errors import UnavailableError
from edge_agent.store.files import write_atomically
from ota.charter import CHARTER_PATH
from ota.manifest import Kind, Release, manifest_path
from ota.repository import Repository
from tests.test_kill import killed_while
from tests.test_release import released
from tests.virtual_disk import VirtualDisk, crashes

NOW_S = 2_000_000_000
SOURCE = Path("/source")
KILLS = 6


class Documents(FetcherInterface):
    """What lies on ``ota/meta/``."""

    def __init__(self, repository: Repository) -> None:
        self.documents = repository.documents()

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2].removesuffix(".json")
        if name not in self.documents:
            raise DownloadHTTPError(f"no {name}", 404)
        return iter((self.documents[name],))


def refreshed(folder: Path, repository: Repository, root: bytes) -> Updater:
    updater = Updater(str(folder), "http://fleet/", fetcher=Documents(repository), bootstrap=root)
    updater.refresh()
    return updater


def release(number: int) -> tuple[Release, bytes]:
    data = bytes([number]) * 100_000
    return Release("faces", number, Kind.PERCEPTION, (released("faces.tflite", data),)), data


def add(disk: VirtualDisk, repository: Repository, number: int) -> None:
    built, data = release(number)
    if disk.content(SOURCE) is None:
        write_atomically(disk, SOURCE, data)
    repository.add_release(built, {"faces.tflite": SOURCE})


def push(repository: Repository, disk: VirtualDisk) -> None:
    add(disk, repository, 2)
    repository.put_charter(replace(repository.charter(), serial=2))
    repository.commit()


def renew(repository: Repository, _: VirtualDisk) -> None:
    repository.renew()


def rotate(role: str, repository: Repository, _: VirtualDisk) -> None:
    repository.rotate(role)


def whole(repository: Repository, disk: VirtualDisk) -> None:
    """Everything that is listed is there, bit by bit."""
    assert repository.charter().fleet == "home"
    for number in repository.releases("faces"):
        for file in repository.release("faces", number).files:
            path = repository.artefact(file.digest)
            assert path is not None
            content = disk.content(path)
            assert content is not None
            assert released("faces.tflite", content) == file


CHANGES = [
    pytest.param(push, id="push"),
    pytest.param(partial(rotate, "root"), id="rotate root"),
    pytest.param(renew, id="renew", marks=pytest.mark.long),
    *(pytest.param(partial(rotate, role), id=f"rotate {role}", marks=pytest.mark.long) for role in ("timestamp", "targets")),
]


@pytest.mark.parametrize("change", CHANGES)
def test_power_cut_at_every_write_leaves_the_old_state_or_the_new(
    tmp_path: Path, change: Callable[[Repository, VirtualDisk], None]
) -> None:
    folder, before = tmp_path / "fleet", VirtualDisk()
    folder.mkdir()
    opened = partial(Repository, folder, now_s=lambda: NOW_S)
    first = Repository.create(folder, "home", root_keys=2, disk=before, timestamp_days=10_000, now_s=lambda: NOW_S)
    add(before, first, 1)
    first.commit()
    before.names_now.pop(SOURCE)
    write_atomically(before, SOURCE, release(2)[1])
    root, old = first.root(), first.documents()["timestamp"]
    seen: dict[bool, int] = {True: 0, False: 0}
    for disk in crashes(lambda disk: change(opened(disk=disk), disk), before, random_ones=1):
        found = opened(disk=disk)
        changed = found.documents()["timestamp"] != old
        seen[changed] += 1
        expected = [1, 2] if change is push and changed else [1]
        assert found.releases("faces") == expected
        assert found.charter().serial == (2 if change is push and changed else 1)
        whole(found, disk)
        client = Path(mkdtemp(dir=tmp_path))
        refreshed(client, first, root)
        updater = refreshed(client, found, root)
        assert updater.get_targetinfo(CHARTER_PATH) is not None
        assert (updater.get_targetinfo(manifest_path("faces", 2)) is not None) == (2 in expected)
        if not changed and change is push:
            push(found, disk)
            whole(opened(disk=disk), disk)
            assert refreshed(client, found, root).get_targetinfo(manifest_path("faces", 2)) is not None
    assert all(seen.values()), "the power was never cut before, or never after the change"


def test_a_rotation_cut_short_is_ended_by_the_next_command(tmp_path: Path) -> None:
    folder, before = tmp_path / "fleet", VirtualDisk()
    folder.mkdir()
    opened = partial(Repository, folder, now_s=lambda: NOW_S)
    first = Repository.create(folder, "home", disk=before, timestamp_days=10_000, now_s=lambda: NOW_S)
    ended = 0
    for disk in crashes(lambda disk: opened(disk=disk).rotate("snapshot") and None, before, random_ones=0):
        two_roots = disk.content(folder / "metadata" / "2.root.json") is not None
        unfinished = two_roots and disk.content(folder / "metadata" / "timestamp.json") == first.documents()["timestamp"]
        found = opened(disk=disk)
        if unfinished:
            ended += 1
            assert found.documents()["timestamp"] != first.documents()["timestamp"]
            names = [path.name for path in disk.names_now if path.parent.name == "keys"]
            assert sum(name.startswith("snapshot") for name in names) == 1, "the old key is still here"
        assert opened(disk=disk).documents() == found.documents()
    assert ended


def test_a_disk_that_fails_at_any_operation_publishes_the_old_state_or_the_new(tmp_path: Path) -> None:
    folder, before = tmp_path / "fleet", VirtualDisk()
    folder.mkdir()
    opened = partial(Repository, folder, now_s=lambda: NOW_S)
    old = Repository.create(folder, "home", disk=before, now_s=lambda: NOW_S).documents()["timestamp"]
    write_atomically(before, SOURCE, release(2)[1])
    fail_at, failed, published = 0, 0, 0
    while fail_at == failed:
        fail_at += 1
        disk = before.rebooted(lambda _: True)
        disk.fail_at = fail_at
        try:
            push(opened(disk=disk), disk)
        except UnavailableError:
            failed += 1
        disk.fail_at = None
        found = opened(disk=disk)
        changed = found.documents()["timestamp"] != old
        published += changed and fail_at == failed
        assert found.releases("faces") == ([2] if changed else [])
        whole(found, disk)
    assert failed > 100
    assert published, "the disk never failed after the change"


PUSHER = """
import sys, pathlib
from ota.manifest import Kind, Release
from ota.repository import Repository
from tests.test_release import released
folder = pathlib.Path(sys.argv[1])
while True:
    repository = Repository(folder)
    number = repository.next_number("faces")
    data = bytes([number % 256]) * 100_000
    source = folder / "source"
    source.write_bytes(data)
    repository.add_release(Release("faces", number, Kind.PERCEPTION, (released("faces.tflite", data),)), {"faces.tflite": source})
    repository.commit()
    print("published", number, flush=True)
    repository.renew()
    if number % 5 == 0:
        repository.rotate(("timestamp", "snapshot", "targets")[number // 5 % 3])
        print("rotated", number, flush=True)
"""


def test_a_killed_command_loses_nothing_that_it_published(tmp_path: Path) -> None:
    folder, random, published = tmp_path / "fleet", Random(1), 0
    root = Repository.create(folder, "home").root()
    client = tmp_path / "client"
    client.mkdir()
    for _ in range(KILLS):
        said = killed_while(PUSHER, folder, random.randint(1, 8), random.uniform(0, 0.05))
        published = max(int(number) for verb, number in said if verb == "published")
        repository = Repository(folder)
        assert repository.releases("faces")[:published] == list(range(1, published + 1))
        assert repository.next_number("faces") - 1 in (published, published + 1)
        for number in repository.releases("faces"):
            (file,) = repository.release("faces", number).files
            path = repository.artefact(file.digest)
            assert path is not None
            assert released("faces.tflite", path.read_bytes()) == file
        assert refreshed(client, repository, root).get_targetinfo(manifest_path("faces", published)) is not None
    assert published >= KILLS
