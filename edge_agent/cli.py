"""``sly``: the one command. Owns the parser and the way an error reaches a person: one line, exit code 2.

Rules: nothing heavy is imported before its command runs; data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from edge_agent.commands import agent, ask, board, demo, fleet, models
from edge_agent.core.errors import SlyError

COMMANDS = (agent, ask, fleet, models, board, demo)
USAGE_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code is 0 for success, 1 for a promise that broke, 2 for what the user must mend."""
    parser = argparse.ArgumentParser(
        prog="sly", description="Schedules inference requests over a federation of unlike edge boards."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(subparsers)
    chosen = parser.parse_args(arguments)
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
