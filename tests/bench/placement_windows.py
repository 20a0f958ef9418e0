"""How far each placer stays behind the exact optimum, on windows of a few requests of talk over the unlike boards.

Rules: a window's requests are drawn by the statistics of the Azure trace (``sim.statistics``), scaled as in the workload;
costs are the modelled ones of each board; every placer meets the same windows and sees true queues; a session has no past in
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from edge_agent.core.chat import CHAT
from edge_agent.core.values import InferenceRequest, Limits, Tensor
from edge_agent.placement.kv import BYTES_A_TOKEN
from edge_agent.placement.options import BoardView, Decision, Rules, choose
from edge_agent.sim.baselines import BASELINES, PLACERS
from edge_agent.sim.costs import digest_of
from edge_agent.sim.optimum import Arrival, Outcome, Window, optimum, replay
from edge_agent.sim.scenario import load_scenario
from edge_agent.sim.statistics import STATISTICS, draw_length
from tests.bench.placement_cases import AZURE, OURS, UNLIKE, in_processes
from tests.bench.placement_static import view_of

RUSH = 12
"""Windows come at so many times the rate at which all boards together would just be busy."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One window: its optimum and what each placer made of it."""

    best: Outcome
    made: dict[str, Outcome]


@dataclass(slots=True)
class _Views:
    """The true queues of a window: those of the views that the placer is given."""

    seed: int
    views: Sequence[BoardView] = ()

    def queue_us(self, board: str, lane: str) -> int:
        return next(view.kv[lane].queue_us if lane else view.queue_us for view in self.views if view.board == board)

    def work_us(self, board: str) -> int:
        return self.queue_us(board, "")


def compared(windows: int, requests: int, limit_s: float, told: Callable[[str], None], processes: int = 1) -> list[Compared]:
    """So many windows, each of so many requests; ``limit_s`` in CP-SAT's deterministic time for each of two searches."""
    found = []
    for each in in_processes(_compared, [(number, requests, limit_s) for number in range(windows)], processes):
        found.append(each)
        told(f"window {len(found)} of {windows}")
    return found


def _compared(job: tuple[int, int, float]) -> Compared:
    number, requests, limit_s = job
    window = drawn(number, requests)
    return Compared(optimum(window, limit_s), {name: _made(name, window, number) for name in names()})


def names() -> list[str]:
    return [OURS, *(f"{name}, FIFO" for name in BASELINES), *BASELINES]


def _made(name: str, window: Window, seed: int) -> Outcome:
    plain = name.endswith(", FIFO")
    peek = _Views(seed)
    chooser = PLACERS[name.removesuffix(", FIFO")](peek)

    def choosing(request: InferenceRequest, views: Sequence[BoardView], rules: Rules, budget_us: int) -> Decision:
        peek.views = views
        return chooser(request, views, rules, budget_us)

    return replay(window, choosing, admission=not plain)


def drawn(seed: int, requests: int) -> Window:
    """A window of talk over the unlike boards."""
    world, draw = load_scenario(UNLIKE), Random(seed)
    boards = tuple(view_of(board, world) for board in world.boards)
    rules = Rules(world.policy, frozenset(digest_of(model.name) for model in world.models))
    asked = [_turn(number, draw) for number in range(requests)]
    least_us = [min(o.cost.busy_us for o in choose(each, boards, rules, 10**9).ranked) for each in asked]
    gap_us = max(1, sum(least_us) // requests // len(boards) // RUSH)
    at_us, arrivals = 0, []
    for each in asked:
        at_us += int(draw.expovariate(1) * gap_us)
        arrivals.append(Arrival(at_us, draw.choice(world.boards).id, each))
    return Window(tuple(arrivals), boards, rules)


def _turn(number: int, draw: Random) -> InferenceRequest:
    lengths = STATISTICS["azure"]
    plan = draw.choices(AZURE, [each.rate_mhz for each in AZURE])[0]
    prompt = min(plan.max_prompt_tokens, max(1, draw_length(lengths.prompt, draw) * plan.prompt_permille // 1000))
    answer = max(1, draw_length(lengths.answer, draw) * plan.answer_permille // 1000)
    asked = 1 << (answer - 1).bit_length()
    limits = Limits(plan.deadline_ms * 1000 + plan.deadline_token_us * answer, quality_permille=plan.quality_permille)
    turn = {"turn": Tensor("uint8", (prompt * BYTES_A_TOKEN,), _nothing(prompt * BYTES_A_TOKEN))}
    return InferenceRequest(f"{number:032x}", CHAT, turn, limits=limits, answer_tokens=asked)


@cache
def _nothing(size_bytes: int) -> bytes:
    return bytes(size_bytes)


def decision_times_us(rounds: int = 400) -> tuple[float, float]:
    """Median and 99th percentile of one decision of ours over the unlike boards, in wall-clock microseconds."""
    window = drawn(0, 40)
    samples = []
    for number in range(rounds):
        arrival = window.arrivals[number % len(window.arrivals)]
        views = window.views(arrival.ingress, {})
        began = time.perf_counter()
        choose(arrival.request, views, window.rules, arrival.request.limits.deadline_us)
        samples.append((time.perf_counter() - began) * 1e6)
    samples.sort()
    return samples[rounds // 2], samples[rounds * 99 // 100]
