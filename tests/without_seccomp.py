"""The engine child on a kernel that has no seccomp, as far as it can tell."""

from __future__ import annotations

import errno
import sys
from typing import Any

from edge_agent.runtime import seccomp, worker


def absent(**_: Any) -> None:
    raise OSError(errno.ENOSYS, "no such layer in this test")


if __name__ == "__main__":
    seccomp.install = absent
    worker.main(sys.argv[1:])
