"""A TUF repository in memory, which is its own fetcher: it can be published rightly, and wrongly in every way.

Owns ``TufRepository``.  Rules: all metadata by python-tuf's own API; ``publish`` keeps versions, lengths and hashes consistent,
and whoever wants them otherwise changes ``documents`` or signs by ``signed``; Ed25519 keys; targets lie beside the metadata.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from ota.trust import SIGNED_AT, Offered

ROOT, TIMESTAMP, SNAPSHOT, TARGETS = "root", "timestamp", "snapshot", "targets"
ONLINE = (TARGETS, SNAPSHOT, TIMESTAMP)
"""In the order in which they are published."""


class TufRepository(Offered):
    """``documents`` are named as on ``ota/meta/``; ``fetched`` are the URLs that were asked for."""

    def __init__(self, root_keys: int = 3, threshold: int = 2, days: float = 7) -> None:
        self.documents: dict[str, bytes] = {}
        super().__init__(self.documents)
        self.fetched: list[str] = []
        self.files: dict[str, bytes] = {}
        expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
        self.root, self.targets = Root(expires=expires), Targets(expires=expires)
        self.snapshot, self.timestamp = Snapshot(expires=expires), Timestamp(expires=expires)
        self.keys = {ROOT: [self.new_key(ROOT) for _ in range(root_keys)]}
        self.root.roles[ROOT].threshold = threshold
        for role in ONLINE:
            self.keys[role] = [self.new_key(role)]
        self.publish(ROOT, *ONLINE)

    def _fetch(self, url: str) -> Any:
        self.fetched.append(url)
        if "targets/" in url:
            digest = url.rpartition("/")[2].partition(".")[0]
            return iter([data for data in self.files.values() if hashlib.sha256(data).hexdigest() == digest])
        return super()._fetch(url)

    def new_key(self, role: str) -> CryptoSigner:
        """A key that the next root will name for ``role``; it signs only when it is among ``keys``."""
        signer = CryptoSigner.generate_ed25519()
        self.root.add_key(signer.public_key, role)
        return signer

    def rotate(self, role: str) -> None:
        """New keys for ``role``, as many as there were; a root is signed once with the old ones as well."""
        old = self.keys[role]
        for signer in old:
            self.root.revoke_key(signer.public_key.keyid, role)
        self.keys[role] = [self.new_key(role) for _ in old]
        if role == ROOT:
            self.publish(ROOT, keys=old + self.keys[ROOT])
        else:
            self.publish(ROOT)

    def part(self, role: str) -> Any:
        """The unsigned part of a role, to be changed."""
        return getattr(self, role)

    def signed(self, role: str, keys: list[CryptoSigner] | None = None) -> bytes:
        metadata = Metadata(deepcopy(self.part(role)))
        for signer in self.keys[role] if keys is None else keys:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def publish(self, *roles: str, keys: list[CryptoSigner] | None = None) -> None:
        """Sign ``roles`` under their next version, and say so in what lists them (which is not published by itself)."""
        for role in roles:
            part = self.part(role)
            part.version += f"{part.version}.{role}" in self.documents or (role == TIMESTAMP and TIMESTAMP in self.documents)
            self.put(role, self.signed(role, keys))

    def put(self, role: str, data: bytes) -> None:
        """Offer ``data`` as the newest of a role."""
        version = self.part(role).version
        self.documents[role if role == TIMESTAMP else f"{version}.{role}"] = data
        listed = MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
        if role == TARGETS:
            self.snapshot.meta["targets.json"] = listed
        if role == SNAPSHOT:
            self.timestamp.snapshot_meta = listed

    def add(self, path: str, data: bytes) -> None:
        """A target, of the next ``publish``."""
        self.files[path] = data
        self.targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])

    def sign_at(self, seconds: int) -> None:
        self.timestamp.unrecognized_fields[SIGNED_AT] = seconds

    def write(self, folder: Path) -> None:
        """Lay it out as a plain HTTP server serves it: ``metadata/`` and ``targets/`` with consistent snapshots."""
        for name, data in self.documents.items():
            place = folder / "metadata" / f"{name}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        for path, data in self.files.items():
            place = folder / "targets" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_name(f"{hashlib.sha256(data).hexdigest()}.{place.name}").write_bytes(data)
