"""The files of releases in the content-addressed cache: brought in, pinned as long as a release needs them, given back.

Rules: what is used is what was hashed, here or by the engine child through the descriptor that it maps; a copy that rotted is set
aside and, where set-up left the file, made once more; a language model's files lie in a folder of links of its own, which goes
with the release.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.store.blobs import BlobStore


class CachedFiles:
    """``links``: where folders of links are made. ``report`` gets a line for each file that was found rotten."""

    def __init__(self, blobs: BlobStore, links: Path, report: Callable[[str], None]) -> None:
        self.blobs, self._links, self._report = blobs, links, report

    def take_in(self, path: Path, digest: bytes) -> int:
        """A verified descriptor of the cache's copy of a file that set-up left, pinned."""
        self.blobs.add_file(path, digest)
        self.blobs.pin(digest)
        try:
            return self.blobs.open_verified(digest)
        except RefusedError as error:
            self._report(f"{error.subject}: got {error.got}; set aside, and copied from {path} again")
            self.blobs.add_file(path, digest)
            return self.blobs.open_verified(digest)

    def open(self, digest: bytes) -> int:
        """A descriptor of what is in the cache, pinned; its reader hashes it. Raises ``UnavailableError``."""
        self.blobs.pin(digest)
        try:
            return os.open(self.blobs.path_of(digest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.blobs.unpin(digest)
            raise UnavailableError(f"blob {digest.hex()}", error.strerror or str(error), "fetch the release again") from error

    def suspect(self, digest: bytes) -> None:
        """Its reader found other bytes: look for oneself, set it aside if so, and raise ``RefusedError`` then."""
        os.close(self.blobs.open_verified(digest))

    def give_back(self, digests: Collection[bytes]) -> None:
        for digest in digests:
            self.blobs.unpin(digest)

    def link(self, name: str, number: int, files: Mapping[str, bytes]) -> Path:
        """A folder with these files of a release under their names, all of them pinned.

        What a crash left of it is made anew.  Raises ``UnavailableError`` if one is not in the cache, or cannot be linked.
        """
        folder, pinned = self.folder_of(name, number), list[bytes]()
        try:
            for digest in files.values():
                self.blobs.pin(digest)
                pinned.append(digest)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, mode=0o700)
            for filename, digest in files.items():
                os.link(self.blobs.path_of(digest), folder / filename)
        except BaseException as error:
            self.give_back(pinned)
            if isinstance(error, OSError):
                raise UnavailableError(f"folder {folder}", error.strerror or str(error)) from error
            raise
        return folder

    def unlink(self, name: str, number: int, files: Mapping[str, bytes]) -> None:
        """A release that was linked goes."""
        shutil.rmtree(self.folder_of(name, number), ignore_errors=True)
        self.give_back(files.values())

    def sweep(self, name: str, keep: Collection[int]) -> None:
        """Remove the folders of releases of ``name`` that a crash left, for links keep bytes on the disk."""
        if (self._links / name).is_dir():
            for folder in (self._links / name).iterdir():
                if folder.name not in map(str, keep):
                    shutil.rmtree(folder, ignore_errors=True)

    def folder_of(self, name: str, number: int) -> Path:
        return self._links / name / str(number)
