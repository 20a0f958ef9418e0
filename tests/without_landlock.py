"""The engine child on a kernel that has no Landlock, as far as it can tell."""

from __future__ import annotations

import errno
import sys

from edge_agent.runtime import landlock, worker


def absent(model_fd: int) -> int:
    raise OSError(errno.ENOSYS, "no such layer in this test")


if __name__ == "__main__":
    landlock.restrict = absent
    worker.main(sys.argv[1:])
