"""The board's secret: 32 bytes of Ed25519 seed in a file of mode 0600.

Rules: made once, never logged, never sent; a file that others may read is refused, not repaired silently.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edge_agent.core.errors import RefusedError
from edge_agent.store.files import Disk, read_bounded, write_atomically

SEED_BYTES = 32


def load_or_make_seed(path: Path, disk: Disk | None = None) -> bytes:
    """The seed in ``path``, made at random if there is none. Raises ``RefusedError`` for a wrong size or mode."""
    disk = disk or Disk()
    if not path.exists():
        write_atomically(disk, path, os.urandom(SEED_BYTES), 0o600)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise RefusedError(f"identity {path}", f"mode {mode:04o}", "mode 0600", f"run: chmod 600 {path}")
    seed = read_bounded(disk, path, SEED_BYTES)
    if len(seed) != SEED_BYTES:
        raise RefusedError(
            f"identity {path}", f"{len(seed)} bytes", f"{SEED_BYTES} bytes", "restore it, or enroll the board anew"
        )
    return seed
