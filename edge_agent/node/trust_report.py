"""What a node tells a person of trust: plain values for the shell and for JSON. Reads, never changes."""

from __future__ import annotations

from collections.abc import Iterable

from edge_agent.attest.appraisal import Appraisal, Vector
from edge_agent.attest.claims import Verdict
from edge_agent.node.attestation import Attestation
from edge_agent.node.node import Node

MICROSECONDS = 1_000_000


def trust_report(node: Node, now_us: int) -> dict[str, object]:
    """Every board with how far it is trusted and why.

    ``tier``: at this moment; ``agreed``: by what was published, for the table; ``own``: what this board thinks by itself, of a
    board that it verifies; ``evidence_age_s``: since its last fresh quote came in here; ``said``: its verifiers' last words.
    """
    attestation = node.trust.attestation
    report: dict[str, object] = {"board": node.board, "attests": attestation is not None}
    if attestation is None:
        boards = sorted({node.board, *(record.board for record in node.fleet.records())})
        return report | {"boards": [_static(node, board) for board in boards]}
    rechecks = node.trust.rechecks
    return report | {
        "epoch": attestation.epochs.counter,
        "quote": attestation.attester.number,
        "receipts": attestation.receipts,
        "checks": {"done": rechecks.done, "differed": rechecks.differed, "waiting": len(rechecks)} if rechecks else {},
        "boards": [_told(node, attestation, board, now_us) for board in sorted(attestation.verifier.verifiers)],
    }


def evidence_of(node: Node, boards: Iterable[str]) -> tuple[list[bytes], list[bytes]]:
    """The last fresh quotes of these boards and their verifiers' newest appraisals, as they were signed: for a proof."""
    attestation, wanted = node.trust.attestation, set(boards)
    if attestation is None:
        return [], []
    quotes = [shown.message for board, shown in attestation.shown.items() if board in wanted]
    latest = attestation.attester.latest
    if latest is not None and node.board in wanted:
        quotes.append(latest[1])
    return quotes, [message for (_, board), message in attestation.said.items() if board in wanted]


def _static(node: Node, board: str) -> dict[str, object]:
    tier = node.trust.tier(board).name.lower()
    return {"board": board, "standing": _standing(node, board), "tier": tier, "agreed": tier}


def _told(node: Node, attestation: Attestation, board: str, now_us: int) -> dict[str, object]:
    verifies = board == node.board or board in attestation.verifier.boards
    said = [_said(attestation, each, now_us) for each in attestation.verifier.opinions.of(board)]
    verdict = attestation.verifier.verdict(board)
    shown = attestation.shown.get(board)
    latest = attestation.attester.latest
    quote = shown.quote if shown else latest[0] if board == node.board and latest else None
    worst = min(attestation.verifier.opinions.of(board), key=lambda each: each.tier, default=None)
    seen = verdict if verifies or worst is None else Verdict(worst.tier, worst.vector, worst.reasons)
    return {
        "board": board,
        "standing": _standing(node, board),
        "tier": node.trust.tier(board).name.lower(),
        "agreed": node.trust.agreed_tier(board).name.lower(),
        "own": verdict.tier.name.lower() if verifies else None,
        "why": node.trust.why(board),
        "key": quote.key_kind.value if quote else "",
        "vector": _claims(seen.vector),
        "reasons": list(seen.reasons),
        "evidence_age_s": (now_us - shown.at_us) // MICROSECONDS if shown else None,
        "quote": quote.counter if quote else None,
        "bootcount": quote.bootcount if quote else None,
        "receipts": quote.receipts if quote else None,
        "said": said,
    }


def _said(attestation: Attestation, appraisal: Appraisal, now_us: int) -> dict[str, object]:
    heard_us = attestation.heard_us.get((appraisal.verifier, appraisal.board))
    return {
        "verifier": appraisal.verifier,
        "tier": appraisal.tier.name.lower(),
        "vector": _claims(appraisal.vector),
        "reasons": list(appraisal.reasons),
        "age_s": (now_us - heard_us) // MICROSECONDS if heard_us is not None else None,
        "counts": appraisal.verifier in attestation.online,
    }


def _claims(vector: Vector) -> dict[str, int]:
    """By the names of AR4SI, those that were made."""
    claims = {name: getattr(vector, name) for name in Vector.__dataclass_fields__}
    return {name: value for name, value in claims.items() if value}


def _standing(node: Node, board: str) -> str:
    if board == node.board:
        return "draining" if node.draining else "serving"
    if node.fleet.version(board) < (0, 0) and node.fleet.presence(board) is None:
        return "unknown"
    return node.fleet.standing(board).value if node.link_up else "out of reach"
