"""What a node tells a person who asks: plain values for the shell and for JSON. Reads, never changes."""

from __future__ import annotations

from collections.abc import Mapping

from edge_agent.core.wanted import Wanted
from edge_agent.node.node import Node
from edge_agent.node.words import PARTS, class_words, part_us, why
from edge_agent.placement.options import Decision, Option

Shares = Mapping[tuple[str, str], int]
"""What the agreed table gives each (board, model) of a class, in thousandths."""


def decision_report(decision: Decision, wanted: Wanted | None = None, shares: Shares | None = None) -> dict[str, object]:
    """Why a request went where it went: the ranked options with their costs taken apart, each excluded one's reason, and why the
    first one won. ``wanted``: what was asked for, as far as that is remembered; ``shares``: of its class, if the table has it."""
    return {
        "request": decision.request_id,
        "class": class_words(wanted.classed()) if wanted else "",
        "options": [_option(option, shares) for option in decision.ranked],
        "excluded": [{"board": e.board, "model": e.model, "reason": e.reason} for e in decision.excluded],
        "why": why(decision),
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
