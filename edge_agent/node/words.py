"""Decisions and request classes in words that a person reads. Pure: from values to text.

Rules: a difference is named by what is better in the chosen option; what differs most comes first and what hardly differs is left
out; times carry their unit.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_agent.core.values import DataClass, TrustTier
from edge_agent.core.wanted import Wanted, answer_tokens_of
from edge_agent.placement.cost import CostParts
from edge_agent.placement.options import Decision, Option

PARTS = ("busy", "wait", "transfer", "kv", "energy", "lateness", "quality", "congestion", "price")
"""What a cost is the sum of: the fields of ``CostParts`` without their unit."""
BETTER: Mapping[str, str] = {
    "busy": "faster", "wait": "shorter queue", "transfer": "nearer", "kv": "its KV is had sooner", "energy": "less energy",
    "lateness": "less late", "quality": "better model", "congestion": "less booked", "price": "lower price",
}  # fmt: skip
WORSE: Mapping[str, str] = {
    "busy": "slower", "wait": "longer queue", "transfer": "farther", "kv": "its KV is had later", "energy": "more energy",
    "lateness": "later", "quality": "weaker model", "congestion": "more booked", "price": "higher price",
}  # fmt: skip
WORTH_TELLING = 4
"""A part that differs by less than a fourth of the one that differs most is not told."""
NO_OTHER_BOARD = "no other board is left"
NOTHING_LEFT = "nothing was left"
SAME_COST = "same cost, first by name"


def why(decision: Decision) -> dict[str, object]:
    """Why the chosen option won, as plain values: ``main`` in a few words, ``text`` in a sentence.

    ``against`` holds the runner-up and, where that is another model of the same board, the best option of another board.
    ``main`` is the part that speaks most for the board: what differs most from the best other board.
    """
    chosen = decision.chosen
    if chosen is None:
        left = "every option is excluded" if decision.excluded else "no board is known"
        return {"chosen": "", "main": NOTHING_LEFT, "against": [], "text": f"nothing can be chosen: {left}"}
    elsewhere = next((option for option in decision.ranked if option.board != chosen.board), None)
    rivals = list(dict.fromkeys([*decision.ranked[1:2], *([elsewhere] if elsewhere else [])]))
    sentences = [_sentence(chosen, rival) for rival in rivals]
    sentences += [] if elsewhere else [_why_alone(decision, chosen.board)]
    return {
        "chosen": named(chosen),
        "main": _main(chosen, elsewhere) if elsewhere else NO_OTHER_BOARD,
        "against": [_comparison(chosen, rival) for rival in rivals],
        "text": f"chosen: {named(chosen)}, {'; '.join(sentences)}",
    }


def _why_alone(decision: Decision, board: str) -> str:
    """With the reason, where there is one for all other boards."""
    reasons = {each.reason for each in decision.excluded if each.board != board}
    return f"{NO_OTHER_BOARD}: {reasons.pop()}" if len(reasons) == 1 else NO_OTHER_BOARD


def named(option: Option) -> str:
    return f"{option.board}/{option.offer.model}"


def part_us(cost: CostParts, part: str) -> int:
    value: int = getattr(cost, f"{part}_us")
    return value


def duration(time_us: int) -> str:
    """A time of any size with its unit."""
    if abs(time_us) < 1000:
        return f"{time_us} µs"
    return f"{time_us / 1000:.1f} ms" if abs(time_us) < 10_000_000 else f"{time_us / 1_000_000:.1f} s"


def size(size_bytes: int) -> str:
    """A number of bytes with its binary unit."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.3g} {name}"
    return f"{size_bytes} B"


def class_words(wanted: Wanted) -> str:
    """A request class in one line: what is wanted, how large it is, and what it may cost."""
    words = [f"talk, answer <= {answer_tokens_of(wanted.shape)} tokens" if wanted.talks else wanted.task]
    words += [f"by {wanted.model}"] if wanted.model else []
    words += [size(wanted.size_bytes), f"within {wanted.deadline_us / 1_000_000:.3g} s"]
    words += [f"quality >= {wanted.quality_permille} ‰"] if wanted.quality_permille else []
    words += [f"<= {wanted.energy_uj / 1000:.3g} mJ"] if wanted.energy_uj else []
    words += [f"trust {wanted.trust.name.lower()}"] if wanted.trust > TrustTier.NONE else []
    words += [f"{wanted.data.value} data"] if wanted.data is not DataClass.PRIVATE else []
    return ", ".join(words)


def _differences(chosen: Option, rival: Option) -> dict[str, int]:
    """By part, what the chosen option saves; negative where it costs more. Parts that are equal are left out."""
    saved = {part: part_us(rival.cost, part) - part_us(chosen.cost, part) for part in PARTS}
    return {part: saved_us for part, saved_us in saved.items() if saved_us}


def _comparison(chosen: Option, rival: Option) -> dict[str, object]:
    return {
        "option": named(rival),
        "by_us": rival.cost.total_us - chosen.cost.total_us,
        "saved_us": _differences(chosen, rival),
        "words": _words(chosen, rival),
    }


def _main(chosen: Option, rival: Option) -> str:
    saved = _differences(chosen, rival)
    return BETTER[max(saved, key=lambda part: saved[part])] if rival.cost.total_us > chosen.cost.total_us else SAME_COST


def _sentence(chosen: Option, rival: Option) -> str:
    by_us = rival.cost.total_us - chosen.cost.total_us
    if not by_us:
        return f"which costs as much as {named(rival)}: the first by name is taken"
    return f"{duration(by_us)} cheaper than {named(rival)}: {_words(chosen, rival)}"


def _words(chosen: Option, rival: Option) -> str:
    """What speaks for the chosen option, with its worth where there is more than one thing to weigh, and what speaks against."""
    saved = _differences(chosen, rival)
    most_us = max((abs(saved_us) for saved_us in saved.values()), default=0)
    ordered = sorted(saved, key=lambda part: -abs(saved[part]))
    told = [part for part in ordered if abs(saved[part]) * WORTH_TELLING >= most_us]
    better = [part for part in told if saved[part] > 0] or [part for part in ordered if saved[part] > 0][:1]
    worse = [part for part in told if saved[part] < 0]
    if len(better) == 1 and not worse:
        return BETTER[better[0]]
    text = ", ".join(f"{BETTER[part]} ({duration(saved[part])})" for part in better)
    against = ", ".join(f"{WORSE[part]} ({duration(-saved[part])})" for part in worse)
    return f"{text}, though {against}" if text and against else text or against
