"""``python -m tests.bench [NAME...] [--json FILE]``: measure, and print one table against the goals.

Rules: a goal that is missed is a row of the table, not a failure; the exit code is 2, with one line, only for a benchmark that
cannot run, and the others run all the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from edge_agent.core.errors import SlyError
from tests.bench.figures import Benchmark, Figure, progress, table

SUBJECTS = (
    "overhead", "memory", "startup", "rehash", "fleet", "wire", "attest", "solve", "language", "speculation", "ota", "check",
)  # fmt: skip


def machine() -> dict[str, object]:
    """What these figures hold for."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": platform.machine(),
        "cpu": models[0].split(":", 1)[1].strip() if models else "unknown",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).date().isoformat(),
    }


def measured(names: list[str], figures: list[Figure]) -> list[str]:
    """Add to ``figures`` what every benchmark gives; why some could not run."""
    faults = []
    for name in names:
        benchmark: Benchmark = importlib.import_module(f"tests.bench.{name}").measure
        try:
            figures.extend(benchmark(partial(_report, name)))
        except SlyError as error:
            faults.append(f"bench: {name}: {error}")
    progress("")
    return faults


def _report(name: str, text: str) -> None:
    progress(f"{name}: {text}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the agent against its goals.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SUBJECTS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the machine's facts there, too")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SUBJECTS):
        parser.error(f"{', '.join(sorted(unknown))}: not a benchmark; there are {', '.join(SUBJECTS)}")
    facts = machine()
    figures: list[Figure] = []
    faults = measured(arguments.names or list(SUBJECTS), figures)
    print(table(figures))
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if arguments.json:
        report = {"machine": facts, "figures": [each.as_json() for each in figures]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
