"""The operator's TUF repository: releases and the charter as signed targets, and the keys that sign them.

Owns ``Repository`` and the layout of its folder: ``metadata/`` and ``targets/`` (as any HTTP server serves them, consistent
snapshots), ``keys/``.  Rules: all metadata is made by python-tuf; nothing is published before every byte that it names is
durable; what was published is verified before it is signed again; two commands at once cannot mix; numbers and serials only grow;
a clock that went back signs nothing.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Self

from tuf.api.metadata import Role, Root, Snapshot, TargetFile, Targets, Timestamp

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.files import Disk, reaching
from ota.charter import CHARTER_PATH, MAX_CHARTER_BYTES, Charter, References, decode_charter, encode_charter
from ota.manifest import MAX_RELEASE_BYTES, Release, decode_release, encode_release, manifest_path
from ota.published import DAYS, MAX_ROOTS, SIGNED_AT, MetadataFolder, documents, expiry
from ota.recognition import forgetting, recognizing
from ota.signing import CryptoSigner, KeyFolder, read_signers, signers_of
from ota.target_files import TargetFiles

MAX_ROOT_KEYS = 16
ONLINE = (Timestamp.type, Snapshot.type, Targets.type)
RELEASE_FILE = "release.cbor"


class Repository:
    """An opened repository. What ``add_release`` and ``put_charter`` bring is published by ``commit``, all at once.

    Raises ``RefusedError`` for a folder that is no repository of a fleet, or was changed by something else;
    ``UnavailableError`` where the disk refuses.
    """

    def __init__(self, folder: Path, *, disk: Disk | None = None, now_s: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._disk, self._clock_s = disk or Disk(), now_s
        self._metadata = MetadataFolder(folder / "metadata", self._disk)
        self._files = TargetFiles(folder / "targets", self._disk)
        self._keys = KeyFolder(folder / "keys", self._disk)
        self._pending: dict[str, TargetFile] = {}
        self._withdrawn: set[str] = set()
        self._state = self._metadata.load()
        if self._state.unfinished:
            self._end_rotation()

    @classmethod
    def create(
        cls,
        folder: Path,
        fleet: str,
        root_keys: int = 3,
        threshold: int = 2,
        timestamp_days: int = 7,
        snapshot_days: int = 365,
        targets_days: int = 365,
        root_days: int = 1095,
        *,
        disk: Disk | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> Self:
        """A new repository with keys of its own and an empty charter; ``threshold`` of ``root_keys`` sign a new root.

        Raises ``RefusedError`` where one was begun already, for keys are never overwritten.
        """
        disk = disk or Disk()
        if not 1 <= threshold <= root_keys <= MAX_ROOT_KEYS:
            raise RefusedError(
                "root keys", f"{threshold} of {root_keys}", f"a threshold of 1 up to all of at most {MAX_ROOT_KEYS}"
            )
        charter, now = encode_charter(Charter(fleet, 1, {}, {})), int(now_s())
        _make_folders(disk, folder)
        keys, metadata = KeyFolder(folder / "keys", disk), MetadataFolder(folder / "metadata", disk)
        days = {Root.type: root_days, Timestamp.type: timestamp_days, Snapshot.type: snapshot_days, Targets.type: targets_days}
        root = Root(consistent_snapshot=True, roles={role: Role([], 1, {DAYS: days[role]}) for role in days})
        for name, role in [*((f"root-{n}", Root.type) for n in range(1, root_keys + 1)), *((role, role) for role in ONLINE)]:
            root.add_key(keys.make(name).public_key, role)
        root.roles[Root.type].threshold = threshold
        root.expires = expiry(root, Root.type, now)
        held = keys.signers()
        metadata.write_root(root, signers_of(root, Root.type, held))
        target = TargetFiles(folder / "targets", disk).put(CHARTER_PATH, charter)
        metadata.publish(root, held, {CHARTER_PATH: target}, (1, 1, 1), now)
        return cls(folder, disk=disk, now_s=now_s)

    def root(self) -> bytes:
        """The newest root: what a board is given at its enrolment."""
        return self._metadata.required(f"{self._state.root.version}.{Root.type}")

    def documents(self) -> Mapping[str, bytes]:
        """The metadata that was published last, by its names on ``ota/meta/``."""
        return documents(self._metadata, self._state)

    def expires_s(self) -> dict[str, int]:
        """When each role's metadata expires, in seconds since 1970."""
        state = self._state
        signed = (state.root, state.timestamp, state.snapshot, state.targets)
        return {each.type: int(each.expires.timestamp()) for each in signed}

    def charter(self) -> Charter:
        """The charter, as the next ``commit`` publishes it."""
        return decode_charter(self._read(CHARTER_PATH, MAX_CHARTER_BYTES))

    def models(self) -> list[str]:
        """The models that there are releases of, sorted."""
        return sorted({model for model, _ in self._manifests()})

    def releases(self, model: str) -> list[int]:
        """The numbers of a model's releases, ascending."""
        return sorted(number for each, number in self._manifests() if each == model)

    def next_number(self, model: str) -> int:
        return max(self.releases(model), default=0) + 1

    def release(self, model: str, number: int) -> Release:
        """Raises ``RefusedError`` naming the releases that there are."""
        path = manifest_path(model, number)
        if path not in self._listed():
            there = ", ".join(map(str, self.releases(model))) or f"none of it; of {', '.join(self.models()) or 'no model at all'}"
            raise RefusedError(f"release of {model}", number, there)
        return decode_release(self._read(path, MAX_RELEASE_BYTES), path)

    def digest(self, path: str) -> bytes:
        """SHA-256 of a target, by its TUF path, such as a manifest's. Raises ``RefusedError`` where there is none."""
        if path not in self._listed():
            raise RefusedError("target", path, "one of this repository")
        return bytes.fromhex(self._listed()[path].hashes["sha256"])

    def artefact(self, digest: bytes) -> Path | None:
        """The file of a target, also of one that was replaced last, by its SHA-256."""
        before = self._state.before.targets if self._state.before else {}
        for listed in (self._listed(), before):
            for target in listed.values():
                if target.hashes["sha256"] == digest.hex() and self._files.holds(target):
                    return self._files.path_of(target)
        return None

    def add_release(self, release: Release, files: Mapping[str, Path]) -> None:
        """Take in a release and copies of its files, each verified while it is copied; the charter recognizes its model then.

        Raises ``RefusedError`` for a number that is not the next ones', and for a file that is not what the release says.
        """
        if release.number < self.next_number(release.model):
            remedy = f"the next one is {self.next_number(release.model)}"
            raise RefusedError(f"release of {release.model}", release.number, "a number that was not given yet", remedy)
        if files.keys() != {each.name for each in release.files}:
            raise RefusedError(f"files of {release.model}", ", ".join(files), ", ".join(each.name for each in release.files))
        manifest, recognized = encode_release(release), recognizing(self.charter().references, release)
        folder = f"releases/{release.model}/{release.number}"
        self._files.make_folder(folder)
        copies = [self._files.copy(f"{folder}/{each.name}", files[each.name], each) for each in release.files]
        self._recognize(recognized)
        manifest_target = self._files.put(manifest_path(release.model, release.number), manifest)
        self._pending |= {target.path: target for target in (*copies, manifest_target)}

    def withdraw(self, model: str, number: int) -> None:
        """Offer a release no more. The newest stays, so that its number is never given twice."""
        if number == max(self.releases(model), default=0):
            raise RefusedError(f"newest release of {model}", number, "an older one", "make a newer one first, or roll it back")
        release = self.release(model, number)
        others = [self.release(*each) for each in self._manifests() if each != (model, number)]
        self._recognize(forgetting(self.charter().references, release, others))
        folder = manifest_path(model, number).removesuffix(RELEASE_FILE)
        self._withdrawn |= {folder + RELEASE_FILE, *(folder + each.name for each in release.files)}

    def put_charter(self, charter: Charter) -> None:
        """Raises ``RefusedError`` for another fleet's charter and for a serial that is not greater than the last one's."""
        last = self.charter()
        if charter.fleet != last.fleet:
            raise RefusedError("charter", f"of fleet {charter.fleet}", last.fleet)
        if charter.serial <= last.serial:
            raise RefusedError("charter serial", charter.serial, f"more than {last.serial}")
        self._pending[CHARTER_PATH] = self._files.put(CHARTER_PATH, encode_charter(charter))

    def _recognize(self, references: References) -> None:
        charter = self.charter()
        if references != charter.references:
            self.put_charter(replace(charter, serial=charter.serial + 1, references=references))

    def commit(self) -> None:
        """Publish what was brought. A kill at any point leaves the old state or the new one."""
        with self._locked():
            self._publish(self._listed(), self._state.root)
        self._pending, self._withdrawn = {}, set()

    def renew(self) -> None:
        """Sign what is published for another while: the timestamp, and the rest if that expires before it."""
        with self._locked():
            until, state = expiry(self._state.root, Timestamp.type, self._now_s()), self._state
            if min(state.snapshot.expires, state.targets.expires) < until:
                self._publish(state.targets.targets, state.root)
            else:
                version = state.timestamp.version + 1
                self._metadata.stamp(state.root, self._keys.signers(), state.timestamp.snapshot_meta, version, self._now_s())
                self._state = self._metadata.load()

    def rotate(self, role: str, root_key_paths: Sequence[Path] = (), new_key_folder: Path | None = None) -> list[Path]:
        """Give ``role`` new keys by a new root, and sign everything again; the files of the new keys.

        ``root_key_paths``: as many old root keys as the threshold, for keys that lie elsewhere than with the repository.  New
        root keys are written to ``new_key_folder``; the old ones are left where they are, to be destroyed by their owners.
        """
        if role not in (Root.type, *ONLINE):
            raise RefusedError("role", role, ", ".join((Root.type, *ONLINE)))
        if new_key_folder and not new_key_folder.is_dir():
            remedy = "mount the medium that goes offline, or make the folder"
            raise RefusedError("folder for new root keys", f"{new_key_folder}, which is none", "a folder that is there", remedy)
        with self._locked():
            signers = self._root_signers(root_key_paths)
            root, old = self._next_root(), list(self._state.root.roles[role].keyids)
            for keyid in old:
                root.revoke_key(keyid, role)
            names = (
                [f"root-{root.version}-{n}" for n in range(1, len(old) + 1)] if role == Root.type else [f"{role}-{root.version}"]
            )
            folder = new_key_folder if new_key_folder and role == Root.type else self.folder / "keys"
            made = {name: KeyFolder(folder, self._disk).make(name) for name in names}
            for signer in made.values():
                root.add_key(signer.public_key, role)
            self._metadata.write_root(root, [*signers, *(made.values() if role == Root.type else ())])
            self._publish(self._state.targets.targets, root)
            if role != Root.type:
                self._keys.discard(old)
        return [folder / f"{name}.pem" for name in names]

    def renew_root(self, root_key_paths: Sequence[Path] = ()) -> None:
        """Sign the root for another while, with the keys that it has."""
        with self._locked():
            root = self._next_root()
            self._metadata.write_root(root, self._root_signers(root_key_paths))
            self._publish(self._state.targets.targets, root)

    def _root_signers(self, paths: Sequence[Path]) -> list[CryptoSigner]:
        held = read_signers(self._disk, paths) if paths else self._keys.signers()
        return signers_of(self._state.root, Root.type, held)

    def _next_root(self) -> Root:
        root = deepcopy(self._state.root)
        if root.version >= MAX_ROOTS:
            raise RefusedError(
                "root", f"version {root.version}", f"at most {MAX_ROOTS}", "make a new fleet: clients walk every root"
            )
        root.version += 1
        root.expires = expiry(root, Root.type, self._now_s())
        return root

    def _end_rotation(self) -> None:
        """A root was signed and then everything stopped: sign the rest with the keys that it names."""
        with self._locked():
            if self._state.unfinished:
                self._publish(self._state.targets.targets, self._state.root)
                named = {keyid for role in self._state.root.roles.values() for keyid in role.keyids}
                self._keys.discard(self._keys.signers().keys() - named)

    def _publish(self, listed: Mapping[str, TargetFile], root: Root) -> None:
        state = self._state
        versions = state.targets.version + 1, state.snapshot.version + 1, state.timestamp.version + 1
        self._metadata.publish(root, self._keys.signers(), listed, versions, self._now_s())
        self._state = self._metadata.load()
        self._metadata.sweep(self._state)
        self._drop_all_but(state.before, [state.targets, self._state.targets])

    def _drop_all_but(self, gone: Targets | None, kept: Sequence[Targets]) -> None:
        if gone is not None:
            paths = {self._files.path_of(each) for targets in kept for each in targets.targets.values()}
            self._files.drop(each for each in gone.targets.values() if self._files.path_of(each) not in paths)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other command changes the repository meanwhile, or has changed it since this one read it."""
        with _alone(self.folder):
            if self._metadata.required(Timestamp.type) != self._state.stamp:
                raise UnavailableError(f"repository {self.folder}", "another command has changed it meanwhile", "try again")
            yield

    def _listed(self) -> dict[str, TargetFile]:
        """The targets of the next commit, by path."""
        listed = self._state.targets.targets | self._pending
        return {path: target for path, target in listed.items() if path not in self._withdrawn}

    def _manifests(self) -> Iterator[tuple[str, int]]:
        for path in self._listed():
            match path.split("/"):
                case ["releases", model, number, "release.cbor"]:
                    yield model, int(number)

    def _read(self, path: str, max_bytes: int) -> bytes:
        return self._files.read(self._listed()[path], max_bytes)

    def _now_s(self) -> int:
        now, last = int(self._clock_s()), int(self._state.timestamp.unrecognized_fields.get(SIGNED_AT, 0))
        if now < last:
            raise RefusedError(
                "this machine's clock", time.ctime(now), f"later than the last signature, {time.ctime(last)}", "set it"
            )
        return now


def _make_folders(disk: Disk, folder: Path) -> None:
    for part in ("keys", "targets/fleet", "metadata"):
        with reaching(folder):
            disk.make_folder(folder / part)
            if disk.names(folder / part):
                remedy = "choose another folder: the keys of a fleet are never overwritten"
                raise RefusedError(f"new repository {folder}", f"something in {part}", "an empty folder", remedy)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with reaching(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
