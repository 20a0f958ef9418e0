"""``sly demo``: a fleet of four emulated boards on this machine, a real detector, a real photograph, and two disasters."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("demo", help="four emulated boards, a real detector, three disasters, in about a minute")
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="where pictures and logs go (./demo)")
    parser.add_argument("--requests", type=int, default=120, metavar="N", help="requests in each of the three acts (120)")
    parser.add_argument("--json", action="store_true", help="print the closing table as JSON")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from edge_agent.core.errors import UnavailableError
    from edge_agent.demo.play import run

    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(f"--output {arguments.output}", error.strerror or str(error), "choose another folder") from error
    return run(arguments.output, arguments.requests, as_json=arguments.json)
