"""``sly board``: which boards there are, and what they feel.

Rules: data goes to stdout, as a table or as JSON; nothing here opens a device or loads a library in this process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.core.errors import ConfigError

if TYPE_CHECKING:
    from board_support.board import BoardInfo, BoardSettings, Sensors, Unavailable

WATCH_PERIOD_S = 1.0
ONLY_WHEN_NAMED = "only when named"


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``sly board probe`` and ``sly board show``."""
    parser = subparsers.add_parser("board", help="probe the boards and read their sensors")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    probe = commands.add_parser("probe", help="every board: PASS, or all reasons why it is not here")
    _common_arguments(probe)
    probe.set_defaults(run=run_probe)

    show = commands.add_parser("show", help="live sensors of one board, with units; what is absent says why")
    _common_arguments(show)
    show.add_argument("--backend", default="auto", metavar="NAME", help="jetson, coral, raspberry_pi, jalapeno (default: auto)")
    show.add_argument("--profile", default="", metavar="P", help="name or path of a profile, for jalapeno and the cost prior")
    show.add_argument("--watch", action="store_true", help="again every second, until interrupted")
    show.set_defaults(run=run_show)


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="/", metavar="DIR", help="the folder that stands for / (default: /)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def run_probe(args: argparse.Namespace) -> int:
    """Exit code 0 if a real board is here or one can be emulated, else 1."""
    from board_support.board import BoardInfo
    from board_support.registry import probe_all

    found = probe_all(_settings(args))
    if args.json:
        print(json.dumps([_as_json(board) for board in found], indent=2))
    else:
        for board in found:
            print("\n".join(_probe_lines(board)))
    return 0 if any(isinstance(board, BoardInfo) for board in found) else 1


def run_show(args: argparse.Namespace) -> int:
    from board_support.registry import open_board

    board = open_board(args.backend, _settings(args))
    info = board.probe()
    while True:
        sensors = board.read_sensors(time.monotonic_ns() // 1000)
        if args.json:
            print(json.dumps({"board": _as_json(info), "sensors": _sensors_json(sensors)}, indent=None if args.watch else 2))
        else:
            print("\n".join(_probe_lines(info)[:1] + _sensor_lines(sensors)))
        if not args.watch:
            return 0
        sys.stdout.flush()
        try:
            time.sleep(WATCH_PERIOD_S)
        except KeyboardInterrupt:
            return 0


def _settings(args: argparse.Namespace) -> BoardSettings:
    from board_support.board import BoardSettings

    root = Path(args.root)
    if not root.is_dir():
        raise ConfigError("--root", args.root, "a folder that stands for /")
    return BoardSettings(root=root.resolve(), profile=getattr(args, "profile", ""))


def _as_json(board: BoardInfo | Unavailable) -> dict[str, object]:
    from dataclasses import asdict

    from board_support.board import BoardInfo

    here = isinstance(board, BoardInfo)
    return {"available": here, "only_when_named": here and board.emulated, **asdict(board)}  # type: ignore[union-attr]


def _sensors_json(sensors: Sensors) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(sensors)


def _probe_lines(board: BoardInfo | Unavailable) -> list[str]:
    from board_support.board import BoardInfo

    if not isinstance(board, BoardInfo):
        return [f"{board.backend:<14} not here", *(f"{'':<14}   {reason}" for reason in board.reasons)]
    verdict = f"EMULATED, {ONLY_WHEN_NAMED}" if board.emulated else "PASS"
    memory = f"{board.memory_bytes // 2**20} MiB" if board.memory_bytes else "memory unknown"
    return [
        f"{board.backend:<14} {verdict}  {board.hardware_model}; {board.accelerator}; {memory}",
        *(f"{'':<14}   {note}" for note in board.notes),
    ]


def _sensor_lines(sensors: Sensors) -> list[str]:
    lines = [
        f"  {reading.name:<36} {'absent' if reading.value is None else f'{reading.value} {reading.unit}':>16}  {reading.note}"
        for reading in sensors.readings
    ]
    trip = "unknown" if sensors.trip_mdegc is None else f"{sensors.trip_mdegc} mdegC"
    power = "unknown" if sensors.power_mw is None else f"{sensors.power_mw} mW, {sensors.power_kind}"
    throttled = "; ".join(sensors.throttled) or "no"
    return [line.rstrip() for line in lines] + [f"  throttles from: {trip}   power: {power}   slowed now: {throttled}"]
