"""What a node tells a person who asks: plain values for the shell and for JSON. Reads, never changes."""

from __future__ import annotations

from edge_agent.node.node import Node
from edge_agent.placement.options import Decision, Option


def decision_report(decision: Decision) -> dict[str, object]:
    """Why a request went where it went: the ranked options with their costs taken apart, and each excluded one's reason."""
    return {
        "request": decision.request_id,
        "options": [_option(option) for option in decision.ranked],
        "excluded": [{"board": e.board, "model": e.model, "reason": e.reason} for e in decision.excluded],
    }


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
            "models": [offer.model for offer in record.offers],
        }
        for record in node.fleet.records()
    ]
    return {
        "boards": [own, *others],
        "link": node.router.link_state or "connected",
        "pending": len(node.router.ingress),
        "withdrawn": dict(node.execution.withdrawn),
    }


def _option(option: Option) -> dict[str, object]:
    cost = option.cost
    return {
        "board": option.board,
        "model": option.offer.model,
        "total_us": cost.total_us,
        "busy_us": cost.busy_us,
        "wait_us": cost.wait_us,
        "transfer_us": cost.transfer_us,
        "energy_us": cost.energy_us,
        "lateness_us": cost.lateness_us,
        "quality_us": cost.quality_us,
        "kv_action": option.kv.action.value,
        "kv_us": cost.kv_us,
        "kv_tokens": option.kv.tokens,
        "kv_source": option.kv.source,
    }
