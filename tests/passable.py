"""Lets another user run what lies below folders that are root's alone: ``unshare --mount python passable.py PATHS COMMAND``.

A checkout or a Python below ``/root`` (pyenv) cannot be reached by the user that a test wants to be.  Nobody's modes are changed:
in a mount namespace of its own, an empty folder that others may pass lies over each shut one, with the named paths back in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

EVERYBODY_PASSES = 0o001


def shut(paths: Iterable[Path]) -> list[Path]:
    """The topmost folders above ``paths`` that others may not pass."""
    found = set()
    for path in paths:
        above = [each for each in reversed(path.parents) if not each.stat().st_mode & EVERYBODY_PASSES]
        found.update(above[:1])
    return sorted(found)


def passable(paths: Sequence[Path], command: Sequence[str]) -> list[str]:
    """``command``, where every one of ``paths`` can be reached by anybody."""
    if not shut(paths):
        return list(command)
    here = [sys.executable, str(Path(__file__).resolve()), ":".join(map(str, paths))]
    return ["unshare", "--mount", *here, *command]


def open_up(paths: Sequence[Path]) -> None:
    """In this mount namespace. The descriptors lead to what is covered."""
    held = {path: os.open(path, os.O_PATH) for path in paths}
    for folder in shut(paths):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "passable", folder], check=True)
        for path, fd in held.items():
            if folder in path.parents:
                path.mkdir(parents=True, exist_ok=True)
                subprocess.run(["mount", "--no-canonicalize", "--rbind", f"/proc/{os.getpid()}/fd/{fd}", path], check=True)


if __name__ == "__main__":
    open_up([Path(each) for each in sys.argv[1].split(":")])
    os.execvp(sys.argv[2], sys.argv[2:])
