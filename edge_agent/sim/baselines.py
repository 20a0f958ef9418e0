"""The placers that ours is compared with, and ours with a part taken away.

Owns ``PLACERS``: each makes a chooser over the same options and hard filters as ours (``placement.choose``), so that integrity,
memory and heat bind all alike and only the pick differs.  Rules for the baselines: they pick a board; on it they take the fastest
model that meets the request's floor of quality, which is the variant strongest in goodput; KV moves with a session by the same
plan as for ours; what is random is drawn from the run's seed and the request's id, so that no order of calls matters.  In their
favour: JSQ(2) and greedy latency see true queues at no cost of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from random import Random
from types import MappingProxyType
from typing import Protocol

from edge_agent.core.values import InferenceRequest
from edge_agent.core.wanted import Wanted
from edge_agent.node.routing import Chooser
from edge_agent.placement.options import BoardView, Decision, Exclusion, Option, Rules, choose

JSQ_CHOICES = 2


class Peek(Protocol):
    """What a simulation lets a placer see that no board could."""

    @property
    def seed(self) -> int:
        """Of the run."""

    def queue_us(self, board: str, lane: str) -> int:
        """What a new job would wait on a board now, in a lane of its queue (a language model's name, or empty)."""

    def work_us(self, board: str) -> int:
        """All work that a board has still to do, running and waiting."""


class Baseline:
    """A placer that orders boards, each standing for its fastest option."""

    def __init__(self, peek: Peek) -> None:
        self.peek = peek

    def __call__(self, request: InferenceRequest, boards: Sequence[BoardView], rules: Rules, budget_us: int) -> Decision:
        views = self.seen(boards)
        decision = choose(request, views, rules, budget_us)
        return preferring(decision, self.order(request, views, fastest_of_each(decision.ranked)))

    def seen(self, boards: Sequence[BoardView]) -> Sequence[BoardView]:
        return boards

    def order(self, request: InferenceRequest, boards: Sequence[BoardView], options: list[Option]) -> list[Option]:
        """``options``, one a board and sorted by board, from the best to the worst."""
        raise NotImplementedError

    def draw(self, request: InferenceRequest) -> Random:
        """Randomness of this request alone."""
        return Random(blake2b(f"{self.peek.seed}/{request.request_id}".encode(), digest_size=16).digest())


class AtRandom(Baseline):
    """Any board that may serve it, each as likely."""

    def order(self, request: InferenceRequest, boards: Sequence[BoardView], options: list[Option]) -> list[Option]:
        return self.draw(request).sample(options, len(options))


class RoundRobin(Baseline):
    """Each ingress board goes around all boards, beginning at itself, and passes over those that may not serve a request."""

    def __init__(self, peek: Peek) -> None:
        super().__init__(peek)
        self._next: dict[str, str] = {}

    def order(self, request: InferenceRequest, boards: Sequence[BoardView], options: list[Option]) -> list[Option]:
        ingress = next((view.board for view in boards if view.local), "")
        first = self._next.get(ingress, ingress)
        ordered = sorted(options, key=lambda o: (o.board < first, o.board))
        if ordered:
            names = sorted(view.board for view in boards)
            self._next[ingress] = names[(names.index(ordered[0].board) + 1) % len(names)]
        return ordered


class LeastLoaded(Baseline):
    """The board with the least work waiting, by gossip; among equals any."""

    def order(self, request: InferenceRequest, boards: Sequence[BoardView], options: list[Option]) -> list[Option]:
        shuffled = self.draw(request).sample(options, len(options))
        return sorted(shuffled, key=lambda o: o.cost.wait_us)


class WithTrueQueues(Baseline):
    """A baseline that probes the queues."""

    def seen(self, boards: Sequence[BoardView]) -> Sequence[BoardView]:
        return [self._probed(view) for view in boards]

    def _probed(self, view: BoardView) -> BoardView:
        kv = {model: replace(state, queue_us=self.peek.queue_us(view.board, model)) for model, state in view.kv.items()}
        return replace(view, queue_us=self.peek.queue_us(view.board, ""), kv=kv)


class ShorterOfTwo(Baseline):
    """JSQ(2): of two boards at random the one with less work, running or waiting (Mitzenmacher, 2001), probed in no time."""

    def order(self, request: InferenceRequest, boards: Sequence[BoardView], options: list[Option]) -> list[Option]:
        drawn = self.draw(request).sample(options, len(options))
        return sorted(drawn[:JSQ_CHOICES], key=lambda o: self.peek.work_us(o.board)) + drawn[JSQ_CHOICES:]


class StaleGreedy(Baseline):
    """The least predicted completion by the gossiped views: wait, transfer, what its KV takes, and the work itself."""

    def order(self, request: InferenceRequest, boards: Sequence[BoardView], options: list[Option]) -> list[Option]:
        return sorted(options, key=lambda o: (o.cost.latency_us, o.board))


class GreedyLatency(WithTrueQueues, StaleGreedy):
    """An oracle: the least predicted completion by true queues, which no board knows in time. KV reuse is in the prediction."""


class WithoutTable:
    """Ours, when no board is booked for anything."""

    def __init__(self, peek: Peek) -> None:
        pass

    def __call__(self, request: InferenceRequest, boards: Sequence[BoardView], rules: Rules, budget_us: int) -> Decision:
        return choose(request, [replace(view, booked_us=0) for view in boards], rules, budget_us)


class WithoutAffinity:
    """Ours, when it does not count what it costs to bring a session's past to a board; the past is brought all the same."""

    def __init__(self, peek: Peek) -> None:
        pass

    def __call__(self, request: InferenceRequest, boards: Sequence[BoardView], rules: Rules, budget_us: int) -> Decision:
        decision = choose(request, boards, rules, budget_us)
        return preferring(decision, sorted(decision.ranked, key=lambda o: (o.cost.total_us - o.cost.kv_us, *o.rank)))


class Shuffled:
    """Ours, when the observed state (queues, heat, KV homes, bookings) of the other boards is dealt out among them anew."""

    def __init__(self, peek: Peek) -> None:
        self._peek = peek

    def __call__(self, request: InferenceRequest, boards: Sequence[BoardView], rules: Rules, budget_us: int) -> Decision:
        others = sorted((view for view in boards if not view.local), key=lambda view: view.board)
        draw = Random(blake2b(f"{self._peek.seed}/{request.request_id}/state".encode(), digest_size=16).digest())
        dealt = [_in_state_of(view, other) for view, other in zip(others, draw.sample(others, len(others)), strict=True)]
        believed = choose(request, [*(view for view in boards if view.local), *dealt], rules, budget_us)
        decision = choose(request, boards, rules, budget_us)
        true = {(option.board, option.offer.model): option for option in decision.ranked}
        return preferring(decision, [true[key] for o in believed.ranked if (key := (o.board, o.offer.model)) in true])


@dataclass(slots=True)
class Frozen:
    """Ours, decided once: the first decision for a request class at an ingress board holds for ever, whatever happens since."""

    peek: Peek
    _kept: dict[tuple[str, Wanted], tuple[str, str]] = field(default_factory=dict)

    def __call__(self, request: InferenceRequest, boards: Sequence[BoardView], rules: Rules, budget_us: int) -> Decision:
        decision = choose(request, boards, rules, budget_us)
        ingress = next((view.board for view in boards if view.local), "")
        where = (ingress, Wanted.of(request).classed())
        if decision.chosen and where not in self._kept:
            self._kept[where] = (decision.chosen.board, decision.chosen.offer.model)
        return pinned(decision, self._kept.get(where))


@dataclass(frozen=True, slots=True)
class Static:
    """A plan made before the run: for each ingress board, task, pinned model and quality floor one (board, model), no other."""

    plan: Mapping[tuple[str, str, str, int], tuple[str, str]]

    def __call__(self, request: InferenceRequest, boards: Sequence[BoardView], rules: Rules, budget_us: int) -> Decision:
        ingress = next((view.board for view in boards if view.local), "")
        return pinned(choose(request, boards, rules, budget_us), self.plan.get(static_key(ingress, request)))


def static_key(ingress: str, request: InferenceRequest) -> tuple[str, str, str, int]:
    """What a static plan tells requests apart by."""
    return ingress, request.task, request.model or "", request.limits.quality_permille


def pinned(decision: Decision, kept: tuple[str, str] | None) -> Decision:
    """``decision`` when nothing but the kept (board, model) is thought of."""
    left = tuple(option for option in decision.ranked if (option.board, option.offer.model) == kept)
    others = tuple(Exclusion(o.board, o.offer.model, "the plan is frozen") for o in decision.ranked if o not in left)
    return replace(decision, ranked=left, excluded=decision.excluded + others)


def fastest_of_each(ranked: Iterable[Option]) -> list[Option]:
    """For each board, by name, its option of the least busy time (ties: by model)."""
    fastest: dict[str, Option] = {}
    for option in sorted(ranked, key=lambda o: (o.board, o.cost.busy_us, o.offer.model)):
        fastest.setdefault(option.board, option)
    return list(fastest.values())


def preferring(decision: Decision, first: Sequence[Option]) -> Decision:
    """``decision`` with these of its options first, the rest behind them in its own order."""
    chosen = {(option.board, option.offer.model) for option in first}
    rest = [option for option in decision.ranked if (option.board, option.offer.model) not in chosen]
    return replace(decision, ranked=(*first, *rest))


def _in_state_of(view: BoardView, other: BoardView) -> BoardView:
    kv = {
        model: replace(state, queue_us=other.kv[model].queue_us, homes=other.kv[model].homes) if model in other.kv else state
        for model, state in view.kv.items()
    }
    return replace(view, queue_us=other.queue_us, headroom_mdegc=other.headroom_mdegc, booked_us=other.booked_us, kv=kv)


def _ours(peek: Peek) -> Chooser:
    return choose


BASELINES: Mapping[str, Callable[[Peek], Chooser]] = MappingProxyType(
    {
        "random": AtRandom,
        "round-robin": RoundRobin,
        "least-loaded": LeastLoaded,
        "jsq2": ShorterOfTwo,
        "stale-greedy": StaleGreedy,
        "greedy-latency": GreedyLatency,
    }
)
ABLATIONS: Mapping[str, Callable[[Peek], Chooser]] = MappingProxyType(
    {
        "without-table": WithoutTable,
        "without-affinity": WithoutAffinity,
        "shuffled-state": Shuffled,
        "frozen": Frozen,
    }
)
PLACERS: Mapping[str, Callable[[Peek], Chooser]] = MappingProxyType({"table": _ours, **BASELINES, **ABLATIONS})
"""Every placer by its name; ``table`` is ours."""
