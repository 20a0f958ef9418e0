"""``sly``: the one command. Owns the parser and the way an error reaches a person: one line, exit code 2.

Rules: nothing heavy is imported before its command runs; data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from edge_agent.commands import (
    agent,
    ask,
    board,
    broker,
    chat,
    demo,
    fleet,
    models,
    ota,
    pipeline,
    place,
    run,
    self_test,
    sim,
    trust,
    verify,
)
from edge_agent.core.errors import SlyError

COMMANDS = (agent, self_test, ask, chat, pipeline, place, fleet, ota, run, sim, trust, verify, models, board, broker, demo)
USAGE_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A command line that cannot be is told like any other fault."""

    def error(self, message: str) -> NoReturn:
        print(f"sly: {message}; see: {self.prog} --help", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def parser() -> argparse.ArgumentParser:
    """Every command and its arguments; ``run`` of what is parsed carries it out."""
    parser = _Parser(prog="sly", description="Schedules inference requests over a federation of unlike edge boards.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code is 0 for success, 1 for a promise that broke, 2 for what the user must mend."""
    chosen = parser().parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        sys.stdout.flush()
    except SlyError as error:
        print(f"sly: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
