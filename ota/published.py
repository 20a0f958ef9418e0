"""What a TUF repository has published, as files of one folder: the one reader and the one writer of ``metadata/``.

Owns ``Published``, what was signed last, and the order of writing.  Rules: what is read was signed by the repository's own keys,
else it is refused, for it would be signed again with the next change; ``timestamp.json`` is renamed into place last, so that a
kill leaves the old state or the new one; of snapshots and targets the last two stay, of roots all (TUF specification 1.0.33,
section 5.3.2: a client walks every one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from edge_agent.core.errors import RefusedError
from edge_agent.store.files import Disk, reaching, read_bounded, write_atomically
from ota.signing import CryptoSigner, Signers, signers_of

MAX_DOCUMENT_BYTES = 3 * 2**20
"""Of one metadata file: it travels as one message."""
MAX_ROOTS = 900
"""Of one fleet; a board that was away takes them some at a time, and is offered at most ``ota.checked.MAX_DOCUMENTS``."""
KEPT = 2
PUBLIC_FILE = 0o644
DAYS = "x-sly-days"
"""An unrecognized field of a role in the root: for how many days its metadata is signed."""
SIGNED_AT = "sly_signed_at"
"""An unrecognized field of the timestamp: the seconds since 1970 at which it was signed."""
SUFFIX = ".json"

T = TypeVar("T", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, slots=True)
class Published:
    """One state of the repository; ``before``: the targets that were published before these, ``None`` for none; ``stamp``:
    the timestamp's bytes.

    ``unfinished``: the newest root does not vouch for the rest, the one before does: a rotation was cut short.
    """

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets
    before: Targets | None
    stamp: bytes
    unfinished: bool


class MetadataFolder:
    """``metadata/``. Its methods raise ``UnavailableError`` where the disk refuses, ``RefusedError`` for what is not signed."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder, self._disk = folder, disk

    def write(self, name: str, data: bytes) -> None:
        """``name`` as on ``ota/meta/``; durable on return."""
        if len(data) > MAX_DOCUMENT_BYTES:
            remedy = "withdraw old releases"
            raise RefusedError(f"metadata {name}", f"{len(data)} bytes", f"at most {MAX_DOCUMENT_BYTES} bytes", remedy)
        write_atomically(self._disk, self._folder / (name + SUFFIX), data, PUBLIC_FILE)

    def read(self, name: str) -> bytes | None:
        path = self._folder / (name + SUFFIX)
        with reaching(path):
            if self._disk.facts(path) is None:
                return None
        return read_bounded(self._disk, path, MAX_DOCUMENT_BYTES)

    def required(self, name: str) -> bytes:
        data = self.read(name)
        if data is None:
            raise RefusedError(f"repository {self._folder.parent}", f"no metadata {name}", "a whole repository", "restore it")
        return data

    def roots(self) -> Iterator[bytes]:
        """Every root from the first to the newest."""
        for version in range(1, MAX_ROOTS + 1):
            data = self.read(f"{version}.{Root.type}")
            if data is None:
                return
            yield data

    def load(self) -> Published:
        """What was published last, verified from the first root on."""
        older, root = self._verified_roots()
        timestamp = self.required(Timestamp.type)
        try:
            return self._state(root, timestamp, unfinished=False)
        except RefusedError:
            if older is None:
                raise
        return replace(self._state(older, timestamp, unfinished=True), root=root)

    def write_root(self, root: Root, signers: Sequence[CryptoSigner]) -> None:
        self.write(f"{root.version}.{Root.type}", signed(root, signers))

    def publish(
        self, root: Root, held: Signers, listed: Mapping[str, TargetFile], versions: tuple[int, int, int], now_s: int
    ) -> None:
        """Sign targets, snapshot and timestamp of these ``versions``; the new state is there when the last is written."""
        targets = Targets(versions[0], expires=expiry(root, Targets.type, now_s), targets=dict(listed))
        targets_meta = self._signed_file(root, held, targets)
        snapshot = Snapshot(versions[1], expires=expiry(root, Snapshot.type, now_s), meta={Targets.type + SUFFIX: targets_meta})
        self.stamp(root, held, self._signed_file(root, held, snapshot), versions[2], now_s)

    def stamp(self, root: Root, held: Signers, snapshot: MetaFile, version: int, now_s: int) -> None:
        """Sign a timestamp."""
        until = expiry(root, Timestamp.type, now_s)
        timestamp = Timestamp(version, expires=until, snapshot_meta=snapshot, unrecognized_fields={SIGNED_AT: now_s})
        self.write(Timestamp.type, signed(timestamp, signers_of(root, Timestamp.type, held)))

    def _signed_file(self, root: Root, held: Signers, content: T) -> MetaFile:
        data = signed(content, signers_of(root, content.type, held))
        self.write(f"{content.version}.{content.type}", data)
        return MetaFile.from_data(content.version, data, ["sha256"])

    def sweep(self, state: Published) -> None:
        """Remove what is older than the last ``KEPT`` snapshots and targets of ``state``."""
        newest = {Snapshot.type: state.snapshot.version, Targets.type: state.targets.version}
        with reaching(self._folder):
            for name in self._disk.names(self._folder):
                version, _, role = name.removesuffix(SUFFIX).partition(".")
                if role in newest and version.isdecimal() and int(version) <= newest[role] - KEPT:
                    self._disk.unlink(self._folder / name)

    def _verified_roots(self) -> tuple[Root | None, Root]:
        """The newest root and the one before it."""
        older, newest = None, None
        for data in self.roots():
            signed = _read(data, Root)
            for vouching in (newest, signed.signed):
                if vouching is not None:
                    _verify(vouching, Root.type, signed)
            older, newest = newest, signed.signed
        if newest is None:
            remedy = "make one with: sly fleet init"
            raise RefusedError(f"repository {self._folder.parent}", "no root", "the folder of a fleet", remedy)
        return older, newest

    def _state(self, root: Root, timestamp_data: bytes, *, unfinished: bool) -> Published:
        timestamp = _verify(root, Timestamp.type, _read(timestamp_data, Timestamp))
        snapshot = self._listed(root, Snapshot.type, timestamp.snapshot_meta, Snapshot)
        targets = self._listed(root, Targets.type, snapshot.meta[Targets.type + SUFFIX], Targets)
        before = self.read(f"{targets.version - 1}.{Targets.type}")
        earlier = None if before is None else _read(before, Targets).signed
        return Published(root, timestamp, snapshot, targets, earlier, timestamp_data, unfinished)

    def _listed(self, root: Root, role: str, listed: MetaFile, kind: type[T]) -> T:
        data = self.required(f"{listed.version}.{role}")
        try:
            listed.verify_length_and_hashes(data)
        except RepositoryError as error:
            raise RefusedError(f"metadata {role}", str(error), "what was published", "restore it from a backup") from error
        return _verify(root, role, _read(data, kind))


def documents(folder: MetadataFolder, state: Published) -> Mapping[str, bytes]:
    """What clients may ask for, by its name on ``ota/meta/``: the timestamp, every root, the last two of the others."""
    found = {f"{version}.{Root.type}": data for version, data in enumerate(folder.roots(), 1)}
    for role, newest in ((Snapshot.type, state.snapshot.version), (Targets.type, state.targets.version)):
        for version in range(max(1, newest - KEPT + 1), newest + 1):
            data = folder.read(f"{version}.{role}")
            if data is not None:
                found[f"{version}.{role}"] = data
    return found | {Timestamp.type: folder.required(Timestamp.type)}


def signed(content: T, signers: Sequence[CryptoSigner]) -> bytes:
    """Metadata with a signature of each of ``signers``."""
    metadata = Metadata(content)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(JSONSerializer(compact=True))


def expiry(root: Root, role: str, now_s: int) -> datetime:
    """Until when ``role`` is valid that is signed now."""
    return datetime.fromtimestamp(now_s, UTC) + timedelta(days=days_of(root, role))


def days_of(root: Root, role: str) -> int:
    """For how many days ``role`` is signed in this repository."""
    return int(root.roles[role].unrecognized_fields.get(DAYS, 1))


def _read(data: bytes, kind: type[T]) -> Metadata[T]:
    try:
        metadata: Metadata[T] = Metadata.from_bytes(data)
    except RepositoryError as error:
        raise RefusedError(f"metadata {kind.type}", str(error), "TUF metadata", "restore it from a backup") from error
    if not isinstance(metadata.signed, kind):
        raise RefusedError(f"metadata {kind.type}", metadata.signed.type, kind.type, "restore it from a backup")
    return metadata


def _verify(root: Root, role: str, metadata: Metadata[T]) -> T:
    try:
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except RepositoryError as error:
        remedy = "it was changed on this disk by something else than these commands: restore it from a backup"
        raise RefusedError(f"metadata {role}", str(error), "what this repository's keys signed", remedy) from error
    return metadata.signed
