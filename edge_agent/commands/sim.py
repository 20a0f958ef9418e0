"""``sly sim``: a fleet of production nodes on virtual time, with emulated boards.

Rules: the result goes to stdout, as tables or as JSON; progress, incidents and where the requests come from go to stderr; every
output says that the plant is simulated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.core.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from edge_agent.sim.results import Metrics, Run
    from edge_agent.sim.scenario import Scenario

DEFAULT = "house"
MAX_OPTIONS = 16
"""Rows of the table of what was chosen."""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``sly sim``."""
    parser = subparsers.add_parser("sim", help="simulate a fleet: the same nodes on virtual time, emulated boards")
    parser.add_argument("scenario", nargs="?", default=DEFAULT, metavar="SCENARIO", help="a name (see --list) or a TOML file")
    parser.add_argument("--list", action="store_true", help="the scenarios that come with this package")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="a seed gives the same run every time (default: 0)")
    parser.add_argument("--placer", default="table", metavar="NAME", help="what places requests: table (ours) or a baseline")
    parser.add_argument("--requests", type=_positive, metavar="N", help="end after so many requests")
    parser.add_argument("--duration", type=_positive, metavar="S", help="seconds of arrivals, instead of the scenario's")
    parser.add_argument("--load", type=_positive, default=100, metavar="PERCENT", help="requests so much faster (default: 100)")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="where the public traces lie")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for stdout, instead of the tables")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw pictures of the run (needs matplotlib)")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number from 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from edge_agent.progress import Bar
    from edge_agent.sim.fleet import simulate
    from edge_agent.sim.results import metrics
    from edge_agent.sim.scenario import load_scenario

    if args.list:
        return _list()
    scenario = _adjusted(load_scenario(args.scenario), args)
    if args.plots is not None:
        _check_plots()
    with Bar() as bar:
        ran = simulate(scenario, args.seed, args.placer, lambda done, whole: bar.show(f"simulating {scenario.name}", done, whole))
    measured = metrics(ran, scenario.warmup_us)
    for at_us, text in ran.incidents:
        print(f"{at_us / 1e6:10.3f} s  {text}", file=sys.stderr)
    if args.json is not None:
        _write_json(args.json, as_json(ran, measured))
    if args.json != "-":
        print("\n".join(report(ran, measured)))
    if args.plots is not None:
        _draw(ran, args.plots)
    return 0


def _list() -> int:
    from edge_agent.sim.scenario import load_scenario, scenario_names

    for name in scenario_names():
        print(f"{name:<16} {load_scenario(name).title}")
    return 0


def _adjusted(scenario: Scenario, args: argparse.Namespace) -> Scenario:
    if args.traces is not None and not args.traces.is_dir():
        raise ConfigError("--traces", str(args.traces), "a folder with the traces")
    duration_us = args.duration * 1_000_000 if args.duration else None
    adjusted = replace(scenario.shortened(duration_us, args.requests), traces=args.traces)
    return adjusted if args.load == 100 else adjusted.at_load(args.load * 10)


def report(run: Run, measured: Metrics) -> Iterable[str]:
    """The result as tables: the fleet, each board, each option that was chosen."""
    scenario = run.scenario
    yield f"{scenario.title} ({scenario.name}, seed {run.seed}, placed by {run.placer})"
    yield f"{run.label}; trace {run.trace_digest[:16]}"
    yield ""
    yield from _fleet_rows(run, measured)
    yield ""
    yield from _table(("board", "profile", "answers", "busy", "energy", "above idle", "hottest", "throttled"), _board_rows(run))
    yield ""
    yield from _table(("chosen", "model", "times", "share"), _option_rows(measured))
    if run.incidents:
        yield ""
        yield f"incidents: {len(run.incidents)} (on stderr)"


def _fleet_rows(run: Run, measured: Metrics) -> Iterable[str]:
    yield (
        f"requests {measured.requests} ({measured.offered_per_s:.2f}/s)   within limits {measured.goodput_per_s:.2f}/s"
        f" = {measured.attainment:.1%}, after warm-up {measured.attainment_steady:.1%}"
        f"   shed {measured.shed_rate:.1%}   pending {len(run.pending)}"
    )
    yield (
        f"latency p50 {measured.p50_ms:.0f} ms, p95 {measured.p95_ms:.0f} ms, p99 {measured.p99_ms:.0f} ms"
        f"   {measured.mj_per_request:.0f} mJ a request above idling, {measured.j_total:.0f} J in all"
        f"   sessions moved {measured.migrations}"
    )


def _board_rows(run: Run) -> Iterable[Sequence[str]]:
    for each in run.boards:
        busy = f"{each.busy_us / max(1, each.up_us):.1%}"
        throttled = f"{each.throttled_us / 1e6:.0f} s" if each.throttled_us else "no"
        yield (
            each.board, each.profile, str(each.answers), busy, f"{each.energy_uj / 1e6:.0f} J", f"{each.dynamic_uj / 1e6:.1f} J",
            f"{each.hottest_mdegc / 1000:.1f} °C", throttled,
        )  # fmt: skip


def _option_rows(measured: Metrics) -> Iterable[Sequence[str]]:
    chosen = sorted(measured.by_option.items(), key=lambda item: (-item[1], item[0]))
    total = max(1, sum(measured.by_option.values()))
    for (board, model), count in chosen[:MAX_OPTIONS]:
        yield board, model, str(count), f"{count / total:.1%}"
    if left := sum(count for _, count in chosen[MAX_OPTIONS:]):
        yield "others", "", str(left), f"{left / total:.1%}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """Aligned columns, names to the left and figures to the right."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = (
            text.ljust(width) if i < 2 else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def as_json(run: Run, measured: Metrics) -> dict[str, object]:
    """The whole result as plain values."""
    figures = asdict(measured)
    figures["by_option"] = [[board, model, count] for (board, model), count in sorted(measured.by_option.items())]
    return {
        "scenario": run.scenario.name, "seed": run.seed, "placer": run.placer, "plant": run.label,
        "trace_digest": run.trace_digest, "load_us": run.load_us, "virtual_us": run.virtual_us, "metrics": figures,
        "boards": [asdict(each) for each in run.boards],
        "incidents": [list(each) for each in run.incidents], "pending": list(run.pending),
        "served": [_served_out(each) for each in run.served], "samples": [asdict(each) for each in run.samples],
    }  # fmt: skip


def _served_out(served: object) -> dict[str, object]:
    from edge_agent.sim.results import Served

    assert isinstance(served, Served)
    out = asdict(served)
    out["wanted"]["trust"] = served.wanted.trust.name.lower()
    return {**out, "latency_us": served.latency_us, "within_limits": served.within_limits}


def _write_json(where: str, result: dict[str, object]) -> None:
    text = json.dumps(result, indent=1)
    if where == "-":
        print(text)
        return
    try:
        Path(where).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UnavailableError(f"result {where}", error.strerror or str(error), "choose another --json") from error


def _check_plots() -> None:
    """Say at once, not after the run, that it cannot be drawn."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise UnavailableError("--plots", "matplotlib is not installed", "pip install 'slyos-edge[bench]'")


def _draw(run: Run, folder: Path) -> None:
    from edge_agent.sim.flow_plot import flow
    from edge_agent.sim.plots import gantt, latency_cdf, temperatures

    gantt(run, folder / "gantt.svg")
    temperatures(run, folder / "temperature.svg")
    latency_cdf({run.placer: run}, folder / "latency.svg")
    flow(run, folder / "flow.svg")
    print(f"drawn in {folder}: gantt.svg, temperature.svg, latency.svg, flow.svg", file=sys.stderr)
