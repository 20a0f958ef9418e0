"""The cost curve of a model's steps, kept from one start of the agent to the next: measuring it is most of what a start takes.

Rules: it is a cache.  A file that is missing, torn, of another model or for other threads is no curve, and one that cannot be
written is told and not missed.  What it says is only where the learning begins (``costs``).
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

from edge_agent.core.cbor import decode, encode
from edge_agent.core.errors import RefusedError, SlyError
from edge_agent.language.handshake import Curve, checked_curve
from edge_agent.runtime.doorbell import items
from edge_agent.store.files import Disk, read_bounded, write_atomically

MAX_CURVE_BYTES = 4096


class KeptCurve:
    """``key`` says what the curve is of; machine and cores are added to it."""

    def __init__(self, path: Path, key: bytes, report: Callable[[str], None], disk: Disk | None = None) -> None:
        board = f"{platform.machine()} {os.cpu_count()} ".encode()
        self._path, self._key = path, hashlib.sha256(board + key).digest()
        self._report, self._disk = report, disk or Disk()
        self.curve = self._read()

    def _read(self) -> Curve:
        """The curve, or none."""
        try:
            key, points = items(decode(read_bounded(self._disk, self._path, MAX_CURVE_BYTES)), "kept curve", 2)
            return checked_curve(points) if key == self._key else ()
        except SlyError:
            return ()

    def keep(self, curve: Curve) -> None:
        """From now on this is the curve."""
        if curve == self.curve:
            return
        self.curve = curve
        try:
            self._disk.make_folder(self._path.parent)
            write_atomically(self._disk, self._path, encode([self._key, [list(point) for point in curve]]))
        except (OSError, RefusedError, SlyError) as error:
            self._report(f"{self._path}: what steps cost is not kept: {error}")
