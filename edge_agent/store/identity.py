"""A secret key, of a board, an operator or a device root: 32 bytes of Ed25519 seed in a file of mode 0600.

Rules: made once, never logged, never sent; a file that others may read is refused, not repaired silently.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edge_agent.core.errors import RefusedError
from edge_agent.store.files import Disk, reaching, read_bounded, write_atomically

SEED_BYTES = 32


def load_or_make_seed(path: Path, disk: Disk | None = None) -> bytes:
    """The seed in ``path``, made at random if there is none. Raises ``SlyError`` as ``load_seed``."""
    disk = disk or Disk()
    if not path.exists():
        write_atomically(disk, path, os.urandom(SEED_BYTES), 0o600)
    return load_seed(path, disk)


def load_seed(path: Path, disk: Disk | None = None) -> bytes:
    """The seed in ``path``. Raises ``RefusedError`` for what is no such file, ``UnavailableError`` if it cannot be read."""
    with reaching(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError(f"key {path}", "no regular file", f"a file of {SEED_BYTES} bytes")
    mode, size_bytes = stat.S_IMODE(status.st_mode), status.st_size
    if size_bytes != SEED_BYTES:
        raise RefusedError(f"key {path}", f"{size_bytes} bytes", f"{SEED_BYTES} bytes", "restore it, or enroll a new key")
    if mode & 0o077:
        raise RefusedError(f"key {path}", f"mode {mode:04o}", "mode 0600", f"run: chmod 600 {path}")
    return read_bounded(disk or Disk(), path, SEED_BYTES)
