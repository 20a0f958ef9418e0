"""A benchmark in a process of its own, with one NumPy thread: its figures come as one line of JSON each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from edge_agent.core.errors import UnavailableError
from tests.bench.figures import Figure


def figures_of(module: str, *arguments: str, python: str = sys.executable) -> Iterator[Figure]:
    """What ``module`` says, as it says it. Raises ``UnavailableError`` if it fails; its own words are on stderr."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [python, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout
        for line in child.stdout:
            each = json.loads(line)
            yield Figure(each["what"], each["value"], each["unit"], each["goal"])
    if child.returncode:
        raise UnavailableError(f"benchmark {module}", f"{python} ended with {child.returncode}", "its own words are above")
