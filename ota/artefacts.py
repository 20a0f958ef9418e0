"""The artefacts of a board's updates on its disk: what grows in staging, what is whole in the cache, what is read from it.

Owns staging, the pieces that are written, and the pins of the updates.  Rules: what takes long runs in one thread of its own, in
the order in which it was asked for; the cache and the folder of staging are touched on the event loop alone; a disk that fails is
an answer, never an error that leaves here.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.store.blobs import BlobStore
from edge_agent.store.files import Disk, reaching
from edge_agent.store.staging import Receiving, Staging
from ota.chunks import Artefact
from ota.events import Finished, Open, Opened, Store, Stored
from ota.manifest import MAX_RELEASE_BYTES, Release, decode_release

SETTLE_S = 3.0
"""So much of a transfer is lost with the power at most; by itself the kernel writes after half a minute (vm.dirty_expire)."""


class Artefacts:
    """``folder``: of the updates; ``say``: what is for people."""

    def __init__(self, folder: Path, blobs: BlobStore, disk: Disk, say: Callable[[str], None]) -> None:
        self._folder, self._blobs, self._disk, self._say = folder, blobs, disk, say
        self._staging: Staging | None = None
        self._receiving: dict[bytes, Receiving] = {}
        self._settled_s: dict[bytes, float] = {}
        """By artefact: when its pieces were last made durable, or the first of those that are not was written."""
        self._pinned: frozenset[bytes] = frozenset()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ota")

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._writer.shutdown)
        for receiving in self._receiving.values():
            receiving.close()
        self._receiving.clear()

    # what grows

    def stage(self) -> Staging:
        """Where artefacts grow; there from the start on, unless the disk failed. Raises ``UnavailableError``."""
        if self._staging is None:
            self._staging = Staging(self._folder / "staging", self._blobs, self._disk)
        return self._staging

    async def opened(self, effect: Open, beside: Iterable[Path]) -> Opened:
        """Open the staging of an artefact, with all that is here of it: in staging, in ``seeds``, in files ``beside``."""
        digest = effect.artefact.digest
        try:
            self._drop(digest)
            receiving = self._receiving[digest] = self.stage().open(effect.artefact, scan=False)
            await self._in_turn(receiving.scan)
            for seed in effect.seeds:
                await self._in_turn(partial(receiving.seed, seed))
            for path in beside:
                await self._in_turn(partial(receiving.seed_file, path))
            _must_have_room(self._folder, receiving)
        except SlyError as error:
            self._drop(digest)
            return Opened(digest, why=str(error), refused=isinstance(error, RefusedError))
        return Opened(digest, receiving.held)

    async def stored(self, effect: Store) -> Stored:
        receiving, why = self._receiving.get(effect.digest), ""
        try:
            if receiving is not None:
                await self._in_turn(partial(self._put, receiving, effect))
        except SlyError as error:
            why = str(error)
        return Stored(effect.digest, effect.index, effect.token, why)

    def _put(self, receiving: Receiving, effect: Store) -> None:
        receiving.put(effect.index, effect.data, checked=True)
        now_s = time.monotonic()
        if now_s - self._settled_s.setdefault(effect.digest, now_s) >= SETTLE_S:
            receiving.settle()
            self._settled_s[effect.digest] = now_s

    async def finished(self, digest: bytes) -> Finished:
        receiving = self._receiving.get(digest)
        if receiving is None:
            return Finished(digest, why="its staging is gone")
        try:
            await self._in_turn(receiving.verify)
            receiving.finish()
            self._drop(digest)
        except RefusedError as error:
            is_whole = receiving.done
            self._drop(digest)
            return Finished(digest, why=str(error), refused=is_whole)
        except SlyError as error:
            self._drop(digest)
            return Finished(digest, why=str(error))
        return Finished(digest, self.read(digest, MAX_RELEASE_BYTES) if receiving.pieces.count == 1 else b"")

    def abandon(self, digest: bytes) -> None:
        self._drop(digest)
        with suppress(SlyError):
            if self._staging is not None and digest in self._staging.digests():
                self._staging.remove(digest)

    def _drop(self, digest: bytes) -> None:
        self._settled_s.pop(digest, None)
        if (receiving := self._receiving.pop(digest, None)) is not None:
            receiving.close()

    # what is whole

    def keep(self, digests: frozenset[bytes]) -> None:
        """Pin these, and nothing else of the updates."""
        for digest in digests - self._pinned:
            with suppress(UnavailableError):
                self._blobs.pin(digest)
                self._pinned |= {digest}
        for digest in self._pinned - digests:
            self._blobs.unpin(digest)
            self._pinned -= {digest}

    def read(self, digest: bytes, max_bytes: int) -> bytes:
        """A small one, checked; nothing where it is not here or has rotted."""
        if not self._blobs.contains(digest):
            return b""
        try:
            fd = self._blobs.open_verified(digest)
        except SlyError as error:
            self._say(str(error))
            return b""
        with os.fdopen(fd, "rb") as file:
            return file.read(max_bytes)

    def manifest(self, digest: bytes) -> Release | None:
        """The release of a manifest that is here, and is one."""
        data = self.read(digest, MAX_RELEASE_BYTES)
        with suppress(RefusedError):
            return decode_release(data) if data else None
        return None

    async def piece(self, artefact: Artefact, index: int) -> bytes:
        """A piece of what is whole, unchecked: who gets it checks it. Raises ``UnavailableError``."""
        path = self._blobs.path_of(artefact.digest)
        with reaching(path):
            data: bytes = await self._in_turn(partial(_piece, path, artefact, index))
        return data

    async def _in_turn(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)


def _must_have_room(folder: Path, receiving: Receiving) -> None:
    """What cannot be written is not asked for: a giver repeats a piece only so often. Raises ``UnavailableError``."""
    pieces = receiving.pieces
    missing_bytes = sum(pieces.piece_bytes(each) for each in range(pieces.count) if not receiving.held >> each & 1)
    with reaching(folder):
        disk = os.statvfs(folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < missing_bytes:
        reason = f"{os.strerror(errno.ENOSPC)}: {missing_bytes} bytes are missing, {free_bytes} are free"
        raise UnavailableError(f"artefact {pieces.digest.hex()[:16]}…", reason, "free some space: it then goes on by itself")


def _piece(path: Path, artefact: Artefact, index: int) -> bytes:
    with path.open("rb") as file:
        file.seek(index * artefact.step_bytes)
        return file.read(artefact.piece_bytes(index))
