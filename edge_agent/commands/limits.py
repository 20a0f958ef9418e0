"""What a request may cost and where it may run, as options of the command line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_agent.core.values import DataClass, Limits

TURN_MS = 600_000
TIERS = ("none", "warning", "affirming")
DATA = ("public", "private", "local")


def add_limits(parser: argparse.ArgumentParser, deadline_ms: int | None, told: str = "") -> None:
    """``--deadline-ms``, ``--energy-mj``, ``--quality``, ``--trust`` and ``--data``. ``told``: the default deadline in words."""
    parser.add_argument(
        "--deadline-ms", type=int, default=deadline_ms, metavar="N", help=f"give up after N ms (default: {told or deadline_ms})"
    )
    parser.add_argument("--energy-mj", type=int, metavar="N", help="spend at most N mJ")
    parser.add_argument("--quality", type=int, default=0, metavar="N", help="the model's quality must be N per mille or more")
    parser.add_argument(
        "--trust", choices=TIERS, default="none", help="the board's appraisal must be so or better (default: none is asked for)"
    )
    parser.add_argument(
        "--data", choices=DATA, default="private",
        help="how far it may travel: anywhere, a cloud included; this fleet (the default); the board that is asked",
    )  # fmt: skip


def limits_of(arguments: argparse.Namespace) -> Limits:
    """Raises ``RefusedError`` for a limit that cannot be."""
    from edge_agent.core.values import Limits, TrustTier

    return Limits(
        deadline_us=arguments.deadline_ms * 1000,
        energy_uj=None if arguments.energy_mj is None else arguments.energy_mj * 1000,
        quality_permille=arguments.quality,
        trust=TrustTier[arguments.trust.upper()],
    )


def data_of(arguments: argparse.Namespace) -> DataClass:
    from edge_agent.core.values import DataClass

    return DataClass(arguments.data)
