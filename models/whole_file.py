"""Files that appear whole or not at all, read-only (mode 0444)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edge_agent.core.errors import UnavailableError

FILE_MODE = 0o444


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place at ``path`` when the block ends well, and leaves nothing when it does not.

    Raises ``UnavailableError`` naming the folder for what the system refuses.
    """
    with _told(path.parent), tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        scratch = Path(file.name)
        try:
            yield file
            file.flush()
            os.fchmod(file.fileno(), FILE_MODE)
            os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def made_folder(folder: Path) -> None:
    """Make it if need be, and see that it can be written. Raises ``UnavailableError``."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnavailableError(f"model folder {folder}", reason, "set SLY_MODELS to a folder that can be written") from error
