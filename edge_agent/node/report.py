"""What a node tells a person who asks: plain values for the shell and for JSON. Reads, never changes."""

from __future__ import annotations

from collections.abc import Mapping

from edge_agent.core.wanted import Wanted
from edge_agent.gossip.record import BoardRecord
from edge_agent.node.node import Node
from edge_agent.node.words import PARTS, class_words, part_us, why
from edge_agent.placement.agreed import Table
from edge_agent.placement.options import Decision, Option

Shares = Mapping[tuple[str, str], int]
"""What the agreed table gives each (board, model) of a class, in thousandths."""


def decision_report(decision: Decision, shares: Shares | None = None) -> dict[str, object]:
    """Why a request went where it went: the ranked options with their costs taken apart, each excluded one's reason, and why the
    first one won. ``shares``: of its class, if the table has it."""
    return {
        "request": decision.request_id,
        "class": class_words(decision.wanted.classed()) if decision.wanted else "",
        "options": [_option(option, shares) for option in decision.ranked],
        "excluded": [{"board": e.board, "model": e.model, "reason": e.reason} for e in decision.excluded],
        "why": why(decision),
    }


def shares_of(table: Table, ingress: str, wanted: Wanted) -> Shares | None:
    """What the table gives each option of this class, for what comes in at ``ingress``; ``None`` if it has no such class."""
    entry = table.entry(ingress, wanted.classed())
    return {(each.board, each.model): each.share_permille for each in entry.options} if entry else None


def table_report(node: Node, now_us: int) -> dict[str, object]:
    """The agreed table with its classes in words, and who agrees with it."""
    report = node.agreement.report(now_us)
    entries: list[dict[str, object]] = report["entries"]  # type: ignore[assignment]
    for entry, told in zip(node.agreement.table.entries, entries, strict=True):
        told["class"] = class_words(entry.wanted)
    return report | {"board": node.board}


def fleet_report(node: Node, now_us: int) -> dict[str, object]:
    """This board and what it knows of the others."""
    own = {
        "board": node.board,
        "standing": "draining" if node.draining else "serving",
        "hardware": node.settings.hardware,
        "emulated": node.settings.emulated,
        "boot_epoch": node.settings.boot_epoch,
        "queue_us": node.execution.queue_us(now_us),
        "temperature_mdegc": node.sensed.temperature_mdegc,
        "forecast_mdegc": _listed(node.forecast_mdegc),
        "trust": _trust(node, node.board),
        "demand_mhz": sum(_demand_mhz(record) for record in node.fleet.all_records() if record.board == node.board),
        "models": sorted(node.execution.offers),
    }
    others = [
        {
            "board": record.board,
            "standing": node.fleet.standing(record.board).value,
            "hardware": record.hardware,
            "emulated": record.emulated,
            "boot_epoch": record.boot_epoch,
            "queue_us": record.queue_us,
            "temperature_mdegc": record.temperature_mdegc,
            "forecast_mdegc": _listed(record.forecast_mdegc),
            "trust": _trust(node, record.board),
            "demand_mhz": _demand_mhz(record),
            "models": [offer.model for offer in record.offers],
        }
        for record in node.fleet.records()
    ]
    return {
        "boards": [own, *others],
        "link": node.router.views.link_state or "connected",
        "pending": len(node.router.ingress),
        "withdrawn": dict(node.execution.withdrawn),
    }


def _demand_mhz(record: BoardRecord) -> int:
    """As it was last told to the others."""
    return sum(each.rate_mhz for each in record.demand)


def _trust(node: Node, board: str) -> str:
    return node.trust.tier(board).name.lower()


def _listed(forecast_mdegc: tuple[int, int, int] | None) -> list[int] | None:
    """In 10, 30 and 60 s."""
    return None if forecast_mdegc is None else list(forecast_mdegc)


def _option(option: Option, shares: Shares | None) -> dict[str, object]:
    costs = {f"{part}_us": part_us(option.cost, part) for part in PARTS}
    return {
        "board": option.board,
        "model": option.offer.model,
        "total_us": option.cost.total_us,
        **costs,
        "kv_action": option.kv.action.value,
        "kv_tokens": option.kv.tokens,
        "kv_source": option.kv.source,
        "share_permille": None if shares is None else shares.get((option.board, option.offer.model), 0),
    }
