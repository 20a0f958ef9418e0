"""The operator's signing keys, as files, and which of them sign for a role.

Owns ``KeyFolder``.  Rules: Ed25519, PKCS#8 in PEM, mode 0600; a file's name is a label for people, its key id decides what it may
sign; a root key that lies elsewhere is read from where it lies and copied nowhere; nothing of a private key is ever shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Root

from edge_agent.core.errors import RefusedError
from edge_agent.store.files import PRIVATE_FILE, Disk, reaching, read_bounded, write_atomically

__all__ = ["CryptoSigner", "KeyFolder", "Signers", "read_signer", "read_signers", "signers_of"]

MAX_KEY_FILE_BYTES = 16_384
KEY_SUFFIX = ".pem"
Signers = Mapping[str, CryptoSigner]
"""By key id."""


class KeyFolder:
    """The keys that lie with the repository. Its methods raise ``UnavailableError`` where the disk refuses."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder, self._disk = folder, disk

    def make(self, name: str) -> CryptoSigner:
        """A new key in ``NAME.pem``, durably; what had that name is gone."""
        signer = CryptoSigner.generate_ed25519()
        write_atomically(self._disk, self._folder / (name + KEY_SUFFIX), signer.private_bytes, PRIVATE_FILE)
        return signer

    def signers(self) -> dict[str, CryptoSigner]:
        """Every key that lies here; raises ``RefusedError`` for a file that holds none."""
        with reaching(self._folder):
            names = [name for name in self._disk.names(self._folder) if name.endswith(KEY_SUFFIX)]
        return read_signers(self._disk, [self._folder / name for name in names])

    def discard(self, keyids: Iterable[str]) -> None:
        """Remove the files of these keys, which sign nothing any more."""
        with reaching(self._folder):
            for name in self._disk.names(self._folder):
                path = self._folder / name
                if name.endswith(KEY_SUFFIX) and read_signer(self._disk, path).public_key.keyid in keyids:
                    with suppress(FileNotFoundError):
                        self._disk.unlink(path)
            self._disk.fsync_folder(self._folder)


def read_signer(disk: Disk, path: Path) -> CryptoSigner:
    """The key in a file. Raises ``RefusedError`` for a file that holds no Ed25519 key without a password."""
    data = read_bounded(disk, path, MAX_KEY_FILE_BYTES)
    with suppress(ValueError, TypeError):
        key = load_pem_private_key(data, None)
        if isinstance(key, Ed25519PrivateKey):
            return CryptoSigner(key)
    raise RefusedError(f"key {path}", "something else", "an Ed25519 private key in PEM, without a password")


def read_signers(disk: Disk, paths: Iterable[Path]) -> dict[str, CryptoSigner]:
    return {signer.public_key.keyid: signer for signer in (read_signer(disk, path) for path in paths)}


def signers_of(root: Root, role: str, held: Signers) -> list[CryptoSigner]:
    """Those of ``held`` that may sign for ``role``; raises ``RefusedError`` when they are fewer than its threshold."""
    chosen = [held[keyid] for keyid in root.roles[role].keyids if keyid in held]
    threshold = root.roles[role].threshold
    if len(chosen) < threshold:
        raise RefusedError(
            f"{role} keys of this fleet", f"{len(chosen)} of its keys", f"{threshold} different ones",
            "say where the others are, each by --root-key FILE: a root key is kept apart from this machine"
            if role == Root.type
            else "put the key back into the keys folder, or rotate the role with the root keys",
        )  # fmt: skip
    return chosen
