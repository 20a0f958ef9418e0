"""The demo's fifth act: somebody changes a model file on a board while it runs, and the others stop trusting that board.

Owns that act and its table.  Rules: one byte is changed on disk, in place, and nobody is told; what is shown is asked of the
other boards through their sockets; every receipt is held against what was asked, offline, as ``sly verify`` does.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.client import Client
from edge_agent.core.values import InferenceRequest, InferenceResult, Limits, Status, TrustTier
from edge_agent.demo.act import DEADLINE_US, TASK
from edge_agent.demo.story import Story, say
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.transport.embedded import EmbeddedBroker

MODEL = "blazeface-short"
BOARDS = (Member("shop", "orin_nano"), Member("barn", "raspberry_pi_5"), Member("gate", "jalapeno_edge"))
EPOCH_S = 5
SETTINGS = f"\n[attest]\nepoch_s = {EPOCH_S}\n"
REQUESTS = 24
"""Of each half."""
PATIENCE_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Caught:
    """``after_s``: from the changed byte until the last of the other boards trusted its board no more."""

    board: str
    reason: str
    after_s: float
    before: Counter[str]
    """Who answered, until then."""
    since: Counter[str]
    proven: int
    """Receipts that hold."""


def tamper(folder: Path, story: Story, broker: EmbeddedBroker, picture: bytes) -> Caught:
    """Play the act and judge it. Raises ``SlyError`` for what keeps it from starting."""
    say(f"Act 5: one byte of a model file is changed on a board while it runs (epochs of {EPOCH_S} s)")
    with LocalFleet(folder / "trust", BOARDS, [MODEL], broker.port, name="trust", settings=SETTINGS) as fleet:
        fleet.start()
        boards = list(fleet.members)
        _until(fleet, boards, lambda told: told["tier"] == "warning", boards)
        say("  every board has appraised the others: trusted as far as a key in a file goes")
        asked = _ask(fleet, boards, picture)
        before = Counter(result.board for _, result in asked)
        victim = max(boards, key=lambda board: (before[board], board))
        others = [board for board in boards if board != victim]
        began_s = time.monotonic()
        _change_a_byte(fleet.folder / victim / "models")
        say(f"  [{story.now_s():5.2f} s] a byte of {MODEL} is changed on {victim}")
        told = _until(fleet, others, lambda told: told["tier"] == "contraindicated", [victim])
        caught_s = time.monotonic() - began_s
        after = _ask(fleet, others, picture)
        proven = sum(_is_proven(fleet, request, result) for request, result in asked + after)
        codes = fleet.stop()
    caught = Caught(victim, told["why"], caught_s, before, Counter(result.board for _, result in after), proven)
    _judge(story, caught, [result for _, result in asked + after], codes)
    return caught


def _until(fleet: LocalFleet, asked: Sequence[str], holds: Callable[[Mapping[str, Any]], bool], of: Sequence[str]) -> Any:
    """Ask ``asked`` until what each says of each of ``of`` ``holds``, for ``PATIENCE_S`` at most; the last such word."""
    due_s = time.monotonic() + PATIENCE_S
    while True:
        told = [_trust(fleet, board) for board in asked]
        words = [word for report in told for word in report["boards"] if word["board"] in of]
        if len(words) >= len(asked) * len(of) and all(map(holds, words)) or time.monotonic() > due_s:
            return words[-1]
        time.sleep(POLL_S)


def _trust(fleet: LocalFleet, board: str) -> Any:
    with Client(fleet.socket_of(board)) as client:
        return client.trust()


def _ask(fleet: LocalFleet, boards: Sequence[str], picture: bytes) -> list[tuple[InferenceRequest, InferenceResult]]:
    """Requests that only a board may serve which others have appraised."""
    from edge_agent.client import request_for_picture

    limits = Limits(DEADLINE_US, trust=TrustTier.WARNING)
    answers = []
    for number in range(REQUESTS):
        request = request_for_picture(TASK, picture, limits=limits)
        with Client(fleet.socket_of(boards[number % len(boards)])) as client:
            answers.append((request, client.submit(request)))
    return answers


def _change_a_byte(models: Path) -> None:
    """Of the cached model, in the file that is mapped, as malware or a dying card would."""
    path = max((each for each in models.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _is_proven(fleet: LocalFleet, request: InferenceRequest, result: InferenceResult) -> bool:
    from edge_agent.attest.audit import Anchors, verify
    from edge_agent.attest.proof import Asked, gathered

    if not result.receipt:
        return False
    proof = gathered([result.receipt], asked=[Asked.of(request, result)])
    return not verify(proof, Anchors(dict(fleet.keys))).broken


def _judge(story: Story, caught: Caught, results: Sequence[InferenceResult], codes: Sequence[int]) -> None:
    story.promise(
        caught.after_s <= EPOCH_S, f"within one epoch {caught.board} is trusted no more ({caught.after_s:.2f} s): {caught.reason}"
    )
    served = ", ".join(f"{board} {number}" for board, number in sorted(caught.since.items()))
    story.promise(not caught.since[caught.board], f"and gets no more requests: {served}")
    good = sum(result.status is Status.OK for result in results)
    story.promise(good == len(results), f"none is lost by that: {good} of {len(results)} answered")
    story.promise(caught.proven == good, f"each answer carries a receipt that holds offline ({caught.proven} of {good})")
    story.promise(set(codes) == {0}, f"the {len(codes)} agents drain and end cleanly (codes {list(codes)})")


def caught_table(caught: Caught) -> str:
    lines = ["", f"{'board':<12} {'answers before':>15} {'after the byte was changed':>27}"]
    boards = sorted(member.board for member in BOARDS)
    lines += [f"{board:<12} {caught.before[board]:>15} {caught.since[board]:>27}" for board in boards]
    return "\n".join(lines)


def caught_json(caught: Caught) -> dict[str, object]:
    return {
        "board": caught.board, "reason": caught.reason, "after_s": round(caught.after_s, 3), "before": dict(caught.before),
        "after": dict(caught.since), "receipts_that_hold": caught.proven,
    }  # fmt: skip
