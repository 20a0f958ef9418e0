"""The closing table of a demo: who served what, how fast, at what energy, and what was survived."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edge_agent.demo.story import Served, Story
from edge_agent.local_fleet import Member

Row = tuple[str, str, int, float, float, float]


def closing_table(story: Story, members: Sequence[Member]) -> str:
    heads = ("board", "profile (emulated)", "answers", "p50 ms", "p95 ms", "energy mJ (emulated)")
    lines = ["", f"{heads[0]:<12} {heads[1]:<20} {heads[2]:>8} {heads[3]:>8} {heads[4]:>8} {heads[5]:>22}"]
    lines += [f"{r[0]:<12} {r[1]:<20} {r[2]:>8} {r[3]:>8.1f} {r[4]:>8.1f} {r[5]:>22.1f}" for r in _rows(story, members)]
    lines += ["", f"{'act':<18} {'requests':>9} {'p50 ms':>8} {'p95 ms':>8}"]
    for act in dict.fromkeys(each.act for each in story.served):
        latencies = sorted(each.latency_ms for each in story.served if each.act == act)
        lines.append(f"{act:<18} {len(latencies):>9} {_quantile(latencies, 50):>8.1f} {_quantile(latencies, 95):>8.1f}")
    return "\n".join(lines)


def promises(story: Story) -> str:
    """Every promise with its verdict."""
    return "\n".join(["", *(f"{'kept  ' if kept else 'BROKEN'}  {text}" for kept, text in story.promises)])


def closing_json(story: Story, members: Sequence[Member]) -> dict[str, object]:
    names = ("board", "profile", "answers", "p50_ms", "p95_ms", "energy_mj_emulated")
    return {
        "boards": [dict(zip(names, row, strict=True)) for row in _rows(story, members)],
        "incidents": [{"at_s": round(at_s, 3), "what": text} for at_s, text in story.incidents],
        "promises": [{"kept": kept, "promise": text} for kept, text in story.promises],
    }


def _rows(story: Story, members: Sequence[Member]) -> list[Row]:
    rows = [
        _row(member.board, member.profile, [each for each in story.served if each.result.board == member.board])
        for member in members
    ]
    return [*rows, _row("all", "", story.served)]


def _row(board: str, profile: str, served: Iterable[Served]) -> Row:
    known = list(served)
    latencies = sorted(each.latency_ms for each in known)
    energy_mj = sum(each.result.energy_uj for each in known) / 1000
    return (board, profile, len(known), _quantile(latencies, 50), _quantile(latencies, 95), energy_mj)


def _quantile(ordered: Sequence[float], percent: int) -> float:
    """The nearest-rank quantile; 0 of nothing."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0.0
