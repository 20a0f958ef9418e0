"""What every command of an operator needs: the folder that ``--fleet`` names, and the broker where it is there.

Rules: what was decided is on disk before the broker is asked; a broker that is away is said on stderr and changes no exit code,
unless bringing it something was all there was to do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.steward.folder import OperatorFolder

VARIABLE = "SLY_FLEET"


def with_folder(parser: argparse.ArgumentParser) -> None:
    """The options that all these commands share."""
    about = f"the operator's folder, as sly fleet init made it (default: ${VARIABLE})"
    parser.add_argument("--fleet", type=Path, metavar="DIR", default=os.environ.get(VARIABLE) or None, help=about)
    parser.add_argument("--json", action="store_true", help="print JSON")


def opened(arguments: argparse.Namespace) -> OperatorFolder:
    """Raises ``ConfigError`` when no folder is named, or it is none of a fleet's."""
    from edge_agent.core.errors import ConfigError
    from edge_agent.steward.folder import OperatorFolder

    if arguments.fleet is None:
        raise ConfigError(
            "sly fleet", "no --fleet", f"the operator's folder, or {VARIABLE} set to it", "make one: sly fleet init DIR"
        )
    return OperatorFolder(Path(arguments.fleet))


def brought(folder: OperatorFolder, over: bool = False, must: bool = False) -> dict[str, Any]:
    """Bring the broker what it lacks; what became of it. Raises ``SlyError`` only if it ``must`` be there."""
    import asyncio

    from edge_agent.core.errors import SlyError

    try:
        return {"published": True, "messages": asyncio.run(_bring(folder, over))}
    except SlyError as error:
        if must:
            raise
        say(f"not published yet: {error}; when the broker is there, run: sly fleet publish")
        return {"published": False, "why": str(error)}


async def _bring(folder: OperatorFolder, over: bool) -> int:
    from edge_agent.transport.topics import Kind

    async with folder.session(kinds=(Kind.OTA_META, Kind.WORD)) as session:
        return await folder.publish(session, over)


def told(arguments: argparse.Namespace, report: Mapping[str, Any] | Sequence[Mapping[str, Any]], text: str) -> int:
    """Data on stdout: JSON, or words."""
    print(json.dumps(report) if arguments.json else text)
    return 0


def say(text: str) -> None:
    print(f"sly: {text}", file=sys.stderr)


def remind(folder: OperatorFolder) -> None:
    """Speak of what ends soon."""
    from edge_agent.steward.status import reminders

    for text in reminders(folder):
        say(text)
