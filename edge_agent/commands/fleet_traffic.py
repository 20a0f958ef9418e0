"""``sly fleet traffic``: what so many boards cost their broker, computed from the protocol, and counted in a simulation.

Rules: pure arithmetic unless ``--count`` is given; what is counted is held against what was computed, and the exit code says
whether they agree within ``TOLERANCE_PERCENT``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_agent.sim.counted import Counted
    from edge_agent.sim.traffic import Cell, Flow

ABOUT = """\
What boards cost their broker, in messages and bytes a second: computed from the protocol's periods and the sizes of its messages.
Boards stand in cells: a cell is a fleet of its own name, whose boards hear each other and nobody else. Of each kind of message:
"in" is what its boards say, "fan-out" how many boards hear each, "out" what the broker sends. With --count N, N cells are also
simulated with the code that boards run (some 10 s of processor time for a cell of 20), and their messages counted: exit code 1 if
what the broker sends is more than 5 % off what was computed.
"""
TOLERANCE_PERCENT = 5
WINDOW_US = 30_000_000
REST_SETTLED_US = 15_000_000


def add(below: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = below.add_parser("traffic", help="what so many boards cost their broker", description=ABOUT)
    for option, default, about in (
        ("--boards", 1_000, "in all"),
        ("--cell", 20, "boards of one cell"),
        ("--sources", 200, "of 1000 boards, how many host nothing and give all their requests to others"),
        ("--requests-mhz", 500, "thousandths of a request a second that each of those gives"),
        ("--request-bytes", 16_384, "of each request's input"),
        ("--count", 0, "simulate so many cells, and count"),
        ("--seed", 0, "of the first cell that is simulated"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{about} (default: {default})")
    about_rest = "no board gives requests, and all booted at one moment: counted in a fifth of the time"
    parser.add_argument("--at-rest", action="store_true", help=about_rest)
    about_plot = "draw what goes out over the size of a cell, at rest and at work (needs matplotlib)"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=about_plot)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_traffic)


def _traffic(arguments: argparse.Namespace) -> int:
    from edge_agent.core.values import bounded
    from edge_agent.sim.traffic import Cell, flows

    bounded("--boards", arguments.boards, 2, 10**7)
    bounded("--sources", arguments.sources, 0, 999)
    cell = Cell(
        arguments.cell, arguments.cell * arguments.sources // 1000, arguments.requests_mhz, request_bytes=arguments.request_bytes
    )
    if arguments.plot is not None:
        from edge_agent.sim.traffic_plot import sent

        sent(arguments.plot, arguments.boards, cell)
    if arguments.at_rest:
        cell = Cell(arguments.cell, apart=False)
    computed = flows(cell)
    counted = _counted(cell, arguments.count, arguments.seed) if arguments.count else None
    if arguments.json:
        print(json.dumps(as_json(arguments.boards, cell, computed, counted)))
    else:
        print("\n".join(report(arguments.boards, cell, computed, counted)))
    return 1 if counted is not None and abs(off_percent(computed, counted)) > TOLERANCE_PERCENT else 0


def _counted(cell: Cell, cells: int, seed: int) -> Counted:
    """As one cell on average."""
    from edge_agent.progress import Bar
    from edge_agent.sim.counted import SETTLED_US, Counted, count

    whole, settled_us = Counted(), SETTLED_US if cell.apart else REST_SETTLED_US
    with Bar() as bar:
        for number in range(cells):
            bar.show("simulating cells", number, cells)
            whole.add(count(cell, WINDOW_US, seed + number, settled_us))
    return whole


def off_percent(computed: list[Flow], counted: Counted) -> float:
    """By how much the messages that go out were computed too high, in percent."""
    heard_hz = sum(counted.heard_hz(flow.kind) for flow in computed)
    return 100 * (sum(flow.heard_hz for flow in computed) / heard_hz - 1) if heard_hz else 0.0


def report(boards: int, cell: Cell, computed: list[Flow], counted: Counted | None) -> Iterator[str]:
    """The table of one cell, and what all cells come to."""
    from edge_agent.sim.traffic import total

    requests_hz = cell.requests_mhz / 1000
    yield f"a cell of {cell.boards} boards; {cell.sources} of them give {requests_hz:g} requests a second each to others"
    yield ""
    head = f"{'kind':<11} {'in /s':>9} {'fan-out':>8} {'out /s':>10} {'bytes':>7} {'retained':>9}"
    yield head + f"  {'counted':>10} {'off':>6}" * bool(counted)
    for flow in computed:
        seen = f"  {counted.heard_hz(flow.kind):>10.2f} {_off(flow.heard_hz, counted.heard_hz(flow.kind)):>6}" if counted else ""
        yield (
            f"{flow.kind.name.lower():<11} {flow.sent_hz:>9.2f} {flow.fan_out:>8} {flow.heard_hz:>10.2f} {flow.packet_bytes:>7}"
            f" {flow.kept:>9}{seen}"
        )
    if counted is not None:
        off = off_percent(computed, counted)
        yield f"messages out: computed {off:+.1f} % off what was counted; allowed: {TOLERANCE_PERCENT} %"
    cells = -(-boards // cell.boards)
    for name, many in (("one cell", 1), (f"{cells} cells", cells)):
        all_of = total(computed, many)
        yield ""
        yield f"{name}: {all_of.in_hz:,.0f} messages/s in, {all_of.out_hz:,.0f} out; with acknowledgements, TLS and TCP"
        yield f"  {all_of.in_bytes * 8 / 1e6:,.2f} Mbit/s in, {all_of.out_bytes * 8 / 1e6:,.2f} out"
        yield f"  {many * cell.boards:,} sessions; {all_of.kept:,} retained messages with {all_of.kept_bytes / 2**20:,.2f} MiB"


def _off(computed_hz: float, counted_hz: float) -> str:
    return f"{100 * (computed_hz / counted_hz - 1):+.1f}%" if counted_hz else ""


def as_json(boards: int, cell: Cell, computed: list[Flow], counted: Counted | None) -> dict[str, object]:
    from edge_agent.sim.traffic import total

    out: dict[str, object] = {
        "cell": asdict(cell),
        "flows": [{**asdict(flow), "kind": flow.kind.name.lower(), "heard_hz": flow.heard_hz} for flow in computed],
        "one_cell": asdict(total(computed)),
        "all": asdict(total(computed, -(-boards // cell.boards))),
    }
    if counted is not None:
        out["counted_hz"] = {
            flow.kind.name.lower(): [counted.sent_hz(flow.kind), counted.heard_hz(flow.kind)] for flow in computed
        }
        out["counted_bytes"] = {flow.kind.name.lower(): counted.packet_bytes(flow.kind) for flow in computed}
        out["off_percent"] = off_percent(computed, counted)
    return out
