"""Reading ``/sys``, ``/proc`` and ``/etc`` below an injected root.

Rules: a read is bounded and never raises for what the machine does or does not have: what cannot be read is an ``Absent``
that says which file and why.  Only regular text comes out; a number comes out only inside its plausible range.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edge_agent.core.errors import shown

MAX_TEXT_BYTES = 64 * 2**10
MAX_MATCHES = 256
MEMINFO_TOTAL = re.compile(r"^MemTotal:\s+(\d{1,15}) kB$", re.MULTILINE)
LOWEST_MDEGC, HIGHEST_MDEGC = -60_000, 200_000


@dataclass(frozen=True, slots=True)
class Absent:
    """A value that is not there, and why."""

    reason: str


class Tree:
    """The files of a machine. Paths are given without the leading slash; messages name them with it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def is_this_machine(self) -> bool:
        """Whether the root is the real one, so that the machine's own commands speak of the same board."""
        return self.root == Path("/")

    def text(self, path: str) -> str | Absent:
        """The file's text without surrounding blanks and NULs (device-tree strings end in one)."""
        try:
            data = self._read(path)
        except (OSError, ValueError) as error:
            return Absent(f"/{path}: {_why(error)}")
        if len(data) > MAX_TEXT_BYTES:
            return Absent(f"/{path}: more than {MAX_TEXT_BYTES} bytes")
        try:
            text = data.decode("utf-8").strip("\0 \t\r\n")
        except UnicodeDecodeError:
            return Absent(f"/{path}: not text")
        return text if text else Absent(f"/{path}: empty")

    def number(self, path: str, low: int, high: int, unit: str = "") -> int | Absent:
        """A decimal integer in ``[low, high]``."""
        text = self.text(path)
        if isinstance(text, Absent):
            return text
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            return Absent(f"/{path}: {shown(text)} is not a whole number")
        number = int(text)
        return number if low <= number <= high else Absent(f"/{path}: {number} {unit} is outside {low}..{high}")

    def matches(self, pattern: str) -> list[str]:
        """Paths below the root that match a glob, in the order a person counts, at most ``MAX_MATCHES``."""
        try:
            found = [str(path.relative_to(self.root)) for path in self.root.glob(pattern)]
        except OSError:
            return []
        return sorted(found, key=_natural)[:MAX_MATCHES]

    def is_file(self, path: str) -> bool:
        try:
            return (self.root / path).is_file()
        except (OSError, ValueError):
            return False

    def memory_bytes(self) -> int | Absent:
        """What the kernel has as RAM, from /proc/meminfo."""
        text = self.text("proc/meminfo")
        if isinstance(text, Absent):
            return text
        total = MEMINFO_TOTAL.search(text)
        return int(total[1]) * 1024 if total else Absent("/proc/meminfo: no MemTotal")

    def _read(self, path: str) -> bytes:
        # O_NONBLOCK: a FIFO in the place of a file must not hold the probe
        descriptor = os.open(self.root / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            chunks, size_bytes = [], 0
            while size_bytes <= MAX_TEXT_BYTES and (chunk := os.read(descriptor, MAX_TEXT_BYTES + 1 - size_bytes)):
                chunks.append(chunk)
                size_bytes += len(chunk)
            return b"".join(chunks)
        finally:
            os.close(descriptor)


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path)]


def known(value: int | Absent) -> int | None:
    """The number, or ``None`` for an absent one."""
    return None if isinstance(value, Absent) else value
