"""A file that is measured: through a descriptor that stays open, and by its path.

Rules: what counts is what the descriptor shows, for that is what an engine maps (a file's pages are the same for whoever reads
or maps it); where the path has come to hold another file, that one is hashed as well, and tells when it is not what it should be:
the next engine would open it.  A path that holds nothing any more says nothing.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from edge_agent.attest.measure import MappedFile
from edge_agent.attest.rounds import Mark, Rounds

AT_PATH = " at its path"


class WatchedFile:
    """``name`` is the file's in ``rounds``; ``file.fd``, if there is one, is copied. ``known``: its digest, if somebody hashed it
    just now.

    Raises ``OSError`` if it cannot be opened.
    """

    def __init__(self, name: str, file: MappedFile, known: bytes | None, rounds: Rounds) -> None:
        self.name, self._path, self._rounds = name, file.path, rounds
        self.fds = {name: os.dup(file.fd) if file.fd >= 0 else _opened(file.path)}
        self._digests = {} if known is None else {name: known}
        self._mark = Mark.of(os.fstat(self.fds[name]))
        rounds.hold(name, self._mark, hashed=known is not None)

    def maps(self, fd: int) -> bool:
        """Whether this descriptor is of the same file; -1 is of any."""
        return fd < 0 or self._mark.same_file(Mark.of(os.fstat(fd)))

    def look(self) -> None:
        """Notice what changed."""
        self._mark = Mark.of(os.fstat(self.fds[self.name]))
        self._rounds.seen(self.name, self._mark)
        self._look_at_path()

    def hashed(self, name: str, digest: bytes) -> None:
        """One of ``fds`` was hashed to its end."""
        if name in self.fds:
            self._digests[name] = digest

    def digest(self, expected: bytes) -> bytes:
        """What it holds, as far as it was hashed; of two files, of that which is not ``expected``."""
        known = self._digests.get(self.name, expected)
        return known if known != expected else self._digests.get(self.name + AT_PATH, expected)

    def close(self) -> None:
        for name in list(self.fds):
            self._forget(name)

    def _look_at_path(self) -> None:
        other = self.name + AT_PATH
        try:
            mark = Mark.of(self._path.stat())
        except OSError:
            return self._forget(other)
        if mark.same_file(self._mark):
            return self._forget(other)
        if other in self.fds and Mark.of(os.fstat(self.fds[other])).same_file(mark):
            self._rounds.seen(other, mark)
        else:
            self._forget(other)
            with suppress(OSError):
                self.fds[other] = _opened(self._path)
                self._rounds.hold(other, Mark.of(os.fstat(self.fds[other])), hashed=False)
        return None

    def _forget(self, name: str) -> None:
        if name in self.fds:
            os.close(self.fds.pop(name))
            self._digests.pop(name, None)
            self._rounds.drop(name)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
