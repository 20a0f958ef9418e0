"""The fleet's signed metadata, verified by python-tuf, with floors and a time that a board cannot lose.

Owns ``TrustedMetadata``; documents come by ``ota.fetchers``: ``Offered`` (what was retained on ``ota/meta/``) or ``HttpFetcher``.
Rules: python-tuf does all verification, in its own order; what is added here only refuses more:

* a version under its floor is refused, whatever the folder says, because a folder can be lost or restored and a floor cannot;
* one key counts once, under however many names it stands (python-tuf counts names);
* one version has one content: another one under the same keys is refused, or passed over and said;
* time is the later of this board's clock and the last time that the fleet signed;
* nothing that was refused by these rules is written, and what is written is durable before anything relies on it.

Imported only where a check is made (``ota.checker``) and on the operator's machine: never by the agent.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib import parse

from securesystemslib.exceptions import StorageError
from tuf.api import exceptions as tuf
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError, UnavailableError, shown
from edge_agent.store.files import Disk, fsync_file, reaching, write_atomically
from ota.checked import MAX_PATHS, MAX_TARGET_BYTES, MAX_TIME_S, Target
from ota.fetchers import MAX_DOCUMENT_BYTES, HttpFetcher, Offered, Watched
from ota.unique_keys import refuse_twins

__all__ = ["HttpFetcher", "Offered", "Target", "TrustedMetadata"]

MAX_ROOT_BYTES = 512_000
MAX_TIMESTAMP_BYTES = 16_384
MAX_SNAPSHOT_BYTES = 2_000_000
MAX_TARGETS_BYTES = MAX_DOCUMENT_BYTES
MAX_NEW_ROOTS = 32
"""Taken in one refresh; the next one goes on from there."""
MAX_ROOTS = 1_024
"""From the root that a board was enrolled with to the newest."""
MAX_DELEGATIONS = 32
SIGNED_AT = "sly_signed_at"
"""What the publisher adds to the signed part of the timestamp: the seconds since 1970 at which it signed."""
ROLES = (Timestamp.type, Snapshot.type, Targets.type)
SUBJECT = "update metadata"


class _Workflow(Updater):
    """python-tuf's own client workflow; the methods here are the places in its order where our rules are asked.

    ``after_roots`` is called with the final root before any timestamp is read, and gives the time to judge by; ``before_kept``
    with what was verified, before it is written.
    """

    after_roots: Callable[[Root], datetime]
    before_kept: Callable[[str, bytes, Signed], None]

    def __init__(self, disk: Disk, folder: Path, base_url: str, fetcher: FetcherInterface, bootstrap: bytes | None) -> None:
        self._disk = disk
        limits = UpdaterConfig(MAX_NEW_ROOTS, MAX_DELEGATIONS, MAX_ROOT_BYTES, MAX_TIMESTAMP_BYTES,
                               MAX_SNAPSHOT_BYTES, MAX_TARGETS_BYTES)  # fmt: skip
        super().__init__(str(folder), base_url, fetcher=fetcher, config=limits, bootstrap=bootstrap)

    @property
    def root(self) -> Root:
        return self._trusted_set.root

    def trusted(self, role: str) -> Signed:
        return self._trusted_set[role]

    def _load_timestamp(self) -> None:
        self._trusted_set.reference_time = self.after_roots(self.root)
        super()._load_timestamp()

    def _persist_metadata(self, rolename: str, data: bytes) -> None:
        self.before_kept(rolename, data, self._trusted_set[rolename])
        super()._persist_metadata(rolename, data)

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(self._disk, path, data)


_HOOKS = ("_load_timestamp", "_persist_metadata", "_persist_file")
if missing := [name for name in _HOOKS if not hasattr(Updater, name)]:
    raise RuntimeError(f"this python-tuf has no {', '.join(missing)}: its rules would not be ours; install tuf >= 6, < 8")


class TrustedMetadata:
    """What one fleet has signed, as far as ``folder`` and ``fetcher`` tell.

    ``bootstrap`` is the root to begin with, ``None`` the one that lies in ``folder``; ``floors`` are the ``marks`` of earlier
    refreshes; ``not_before_s`` is a time (seconds since 1970) that has passed for sure.  One process at a time may use a folder.

    Raises ``RefusedError`` for a bootstrap that is no valid root, ``UnavailableError`` for a folder that cannot be used.
    Source: TUF specification 1.0.33, section 5.
    """

    def __init__(
        self,
        folder: Path,
        fetcher: FetcherInterface,
        *,
        bootstrap: bytes | None,
        base_url: str = "",
        floors: Mapping[str, int] | None = None,
        not_before_s: int = 0,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._disk = folder, disk or Disk()
        self._floors = dict(floors or {})
        self._not_before_s, self._clock_s = min(not_before_s, MAX_TIME_S), int(clock())
        self._fetcher = Watched(fetcher, self._before_root)
        self._now = self._not_after_trusted_time(0)
        self.notes: list[str] = []
        with self._told(), reaching(folder):
            self._disk.make_folder(folder / "root_history")
            self._workflow = _Workflow(self._disk, folder, base_url, self._fetcher, bootstrap)
        self._workflow.after_roots, self._workflow.before_kept = self._after_roots, self._before_kept
        self._workflow.config.max_root_rotations = self._reach(self._workflow.root.version)

    def refresh(self) -> None:
        """Take what is newer and right. Once in the life of this object.

        Raises ``RefusedError`` for metadata that breaks a rule, ``UnavailableError`` for what is not there or cannot be kept.
        """
        try:
            with self._told(), reaching(self._folder):
                self._workflow.refresh()
            for role in ROLES:
                self._check_floor(role, self._workflow.trusted(role).version)
                refuse_twins(self._workflow.root, role, (self._folder / f"{role}.json").read_bytes())
            self._check_snapshot_is_the_one_signed_for()
            self._note_another_timestamp()
        finally:
            with reaching(self._folder):
                self._disk.fsync_folder(self._folder)

    def target(self, path: str) -> Target | None:
        """The target of that name, ``None`` if the fleet signed for none. Raises as ``refresh``."""
        info = self._info(path)
        return None if info is None else _target(info)

    def paths(self) -> list[str]:
        """The names of all targets of the top role, sorted. Raises ``RefusedError`` past ``MAX_PATHS``."""
        listed = cast(Targets, self._workflow.trusted(Targets.type)).targets
        if len(listed) > MAX_PATHS:
            raise RefusedError("targets of the fleet", f"{len(listed)}", f"at most {MAX_PATHS}", "remove old releases from it")
        return sorted(listed)

    @property
    def root_version(self) -> int:
        return self._workflow.root.version

    @property
    def marks(self) -> dict[str, int]:
        """What was accepted, as floors for later refreshes: only ever to be raised.

        ``tuf/root`` is the root's version.  ``tuf/<role>/<keys>`` is that of another role under one set of keys and threshold:
        new keys begin a new floor, which is how a fleet recovers from a fast-forward.  ``tuf/time/<keys>`` is the last time that
        was signed with those keys, for the same reason.
        """
        root = self._workflow.root
        versions = {_mark(root, role): self._workflow.trusted(role).version for role in ROLES}
        return {"tuf/root": root.version, **versions, _time_mark(root): self.signed_s}

    @property
    def signed_s(self) -> int:
        """When the publisher signed the timestamp, never later than its expiry; 0 if it does not say."""
        timestamp = self._workflow.trusted(Timestamp.type)
        said = timestamp.unrecognized_fields.get(SIGNED_AT)
        if not isinstance(said, int) or isinstance(said, bool) or said < 0:
            return 0
        return min(said, int(timestamp.expires.timestamp()))

    def download(self, path: str, target_base_url: str, folder: Path) -> Path:
        """Fetch a target into ``folder``, under its quoted name, verified and durable; what is right there already stays.

        Raises ``RefusedError`` for a target that is not signed for or has other bytes, ``UnavailableError`` as ``refresh``.
        """
        info = self._info(path)
        if info is None:
            raise RefusedError(f"target {shown(path)}", "not in the fleet's metadata", "a target that is", "check its name")
        if info.length > MAX_TARGET_BYTES:
            raise RefusedError(f"target {shown(path)}", f"{info.length} bytes", f"at most {MAX_TARGET_BYTES} bytes")
        place = folder / parse.quote(path, "")
        with self._told(), reaching(place):
            if self._workflow.find_cached_target(info, str(place)):
                return place
            self._disk.make_folder(folder)
            part = folder / f".part-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
            try:
                self._workflow.download_target(info, str(part), target_base_url)
                fsync_file(self._disk, part)
                self._disk.rename(part, place)
            finally:
                part.unlink(missing_ok=True)
            self._disk.fsync_folder(folder)
        return place

    def _info(self, path: str) -> TargetFile | None:
        with self._told(), reaching(self._folder):
            return self._workflow.get_targetinfo(path)

    def _reach(self, first: int) -> int:
        """How many roots after ``first`` one refresh may take: those that are kept, those up to the floor, some new ones."""
        kept = [_number(name) for name in self._disk.names(self._folder / "root_history")]
        return min(max([first, self._floors.get("tuf/root", 0), *kept]) - first + MAX_NEW_ROOTS, MAX_ROOTS)

    def _not_after_trusted_time(self, signed_s: int) -> datetime:
        return datetime.fromtimestamp(min(max(self._clock_s, self._not_before_s, signed_s), MAX_TIME_S), UTC)

    def _after_roots(self, root: Root) -> datetime:
        floor = self._floors.get("tuf/root", 0)
        if root.version < floor:
            raise RefusedError(f"{SUBJECT}: root", f"version {root.version}", f"{floor} or later, which this board has seen",
                               "offer all roots of the fleet")  # fmt: skip
        self._now = self._not_after_trusted_time(self._floors.get(_time_mark(root), 0))
        return self._now

    def _before_root(self, data: bytes) -> None:
        """A new root is signed by the one before it and by itself; each key of both counts once."""
        refuse_twins(self._workflow.root, Root.type, data)
        refuse_twins(None, Root.type, data)

    def _before_kept(self, role: str, data: bytes, signed: Signed) -> None:
        if role in ROLES:
            self._check_floor(role, signed.version)
            refuse_twins(self._workflow.root, role, data)
        self._check_same_version_same_content(role, signed)

    def _check_floor(self, role: str, version: int) -> None:
        floor = self._floors.get(_mark(self._workflow.root, role), 0)
        if version < floor:
            raise RefusedError(f"{SUBJECT}: {role}", f"version {version}", f"{floor} or later, which this board has seen",
                               "an old release is offered again; publish the fleet's newest")  # fmt: skip

    def _check_same_version_same_content(self, role: str, signed: Signed) -> None:
        """Only what was signed counts, and only under today's keys: a role may be signed again, or begin anew with new keys."""
        kept = self._kept(role)
        if kept is None or kept.signed.version != signed.version or kept.signed == signed:
            return
        if role in ROLES and not _verifies(self._workflow.root, role, kept):
            return
        raise RefusedError(f"{SUBJECT}: {role}", f"version {signed.version} with other content than before",
                           "one content for one version", "publish it again under a new version")  # fmt: skip

    def _check_snapshot_is_the_one_signed_for(self) -> None:
        meta = cast(Timestamp, self._workflow.trusted(Timestamp.type)).snapshot_meta
        kept = (self._folder / "snapshot.json").read_bytes()
        with self._told():
            meta.verify_length_and_hashes(kept)

    def _note_another_timestamp(self) -> None:
        came = self._fetcher.timestamp
        if came and came != (self._folder / "timestamp.json").read_bytes():
            version = self._workflow.trusted(Timestamp.type).version
            self.notes.append(f"timestamp {version} came with other content than the one that is kept, which counts")

    def _kept(self, role: str) -> Metadata[Any] | None:
        try:
            return Metadata[Any].from_file(str(self._folder / f"{parse.quote(role, '')}.json"))
        except (tuf.RepositoryError, StorageError):
            return None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what python-tuf raises into our two kinds of failure, in words for a person."""
        try:
            yield
        except tuf.ExpiredMetadataError as error:
            raise RefusedError(SUBJECT, f"{error} at {self._moment()}", "metadata that has not expired",
                               "set this board's clock if it is wrong, else sign anew: sly fleet renew") from error  # fmt: skip
        except tuf.RepositoryError as error:
            raise RefusedError(SUBJECT, _words(error), *_rule(error)) from error
        except tuf.DownloadLengthMismatchError as error:
            raise RefusedError(SUBJECT, _words(error), "the signed length") from error
        except tuf.DownloadError as error:
            raise UnavailableError(SUBJECT, _words(error), "it is tried again later") from error

    def _moment(self) -> str:
        clock = datetime.fromtimestamp(max(0, min(self._clock_s, MAX_TIME_S)), UTC)
        own = f"{self._now:%Y-%m-%d %H:%M:%S} UTC"
        if clock >= self._now:
            return f"{own}, which is what this board's clock says"
        return f"{own}, the last time known to have passed (this board's clock says {clock:%Y-%m-%d %H:%M:%S} UTC)"


def _rule(error: tuf.RepositoryError) -> tuple[str, str]:
    """What would be allowed, and what to do."""
    if isinstance(error, tuf.UnsignedMetadataError):
        return "signatures of enough keys that the trusted root names for it", "sign it with the fleet's own keys"
    if isinstance(error, tuf.BadVersionNumberError):
        return "no version before one that was seen, and the one that is signed for", "publish the fleet's newest"
    if isinstance(error, tuf.LengthOrHashMismatchError):
        return "the length and digest that are signed for", "publish again: a document was changed or mixed with another's"
    return "metadata as TUF 1.0 writes it", "publish it again with this version's sly"


def _words(error: Exception) -> str:
    cause = f": {error.__cause__}" if error.__cause__ and str(error.__cause__) not in str(error) else ""
    return f"{error}{cause}"


def _verifies(root: Root, role: str, kept: Metadata[Any]) -> bool:
    try:
        root.verify_delegate(role, kept.signed_bytes, kept.signatures)
    except tuf.RepositoryError:
        return False
    return True


def _keys(root: Root, role: str) -> str:
    names = root.roles[role]
    return hashlib.sha256(encode([names.threshold, sorted(names.keyids)])).hexdigest()[:16]


def _mark(root: Root, role: str) -> str:
    return f"tuf/{role}/{_keys(root, role)}"


def _time_mark(root: Root) -> str:
    return f"tuf/time/{_keys(root, Timestamp.type)}"


def _number(name: str) -> int:
    number = name.removesuffix(".root.json")
    return int(number) if number != name and number.isdecimal() and len(number) < 10 else 0


def _target(info: TargetFile) -> Target:
    digest = info.hashes.get("sha256")
    if digest is None:
        raise RefusedError(f"digest of target {shown(info.path)}", ", ".join(info.hashes), "SHA-256", "publish it again")
    try:
        return Target(info.path, info.length, bytes.fromhex(digest))
    except ValueError as error:
        raise RefusedError(f"digest of target {shown(info.path)}", shown(digest), "SHA-256 in hex") from error
