"""Static plans made in hindsight: what a fleet would do that is set up once, with every request of the run known beforehand.

Rules: a plan gives each *stream* (what comes in at one board for one task, model and quality floor) one (board, model) for the
whole run; costs are the modelled ones of idle boards; ``STATIC`` holds the plans that are tried, and the best of them in
hindsight is what the observing placer must beat.  They are good plans, not proven to be the best static ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from board_support.profile import load_profile
from edge_agent.core.values import ModelOffer, ShapeCost
from edge_agent.core.wanted import TALK_SHAPE, answer_tokens_of
from edge_agent.placement.options import BoardView, Option, Rules, choose
from edge_agent.sim.arrivals import arrivals
from edge_agent.sim.baselines import static_key
from edge_agent.sim.costs import TYPICAL_CONTEXT_TOKENS, Costs, digest_of
from edge_agent.sim.scenario import BoardPlan, ModelPlan, Scenario
from edge_agent.sim.shelf import Shelf

ANSWER_BITS = range(3, 11)
"""Shapes of talk that a board tells of: answers asked for with at most 4 to 512 tokens, in powers of two."""

Key = tuple[str, str, str, int]
Place = tuple[str, str]
Work = dict[Place, int]
Plan = dict[Key, Place]


def balanced(scenario: Scenario, seed: int) -> Plan:
    """The heaviest stream first, each where it is then done first: the makespan rule for unrelated machines."""
    loads = dict.fromkeys((board.id for board in scenario.boards), 0)
    plan = Plan()
    streams = streams_of(scenario, seed)
    for key in sorted(streams, key=lambda k: (-min(streams[k].values()), k)):
        place = min(streams[key], key=lambda p: (loads[p[0]] + streams[key][p], p))
        plan[key] = place
        loads[place[0]] += streams[key][place]
    return plan


def fastest(scenario: Scenario, seed: int) -> Plan:
    """Each stream where its requests take the least time, however many others go there."""
    return {key: min(work, key=lambda p: (work[p], p)) for key, work in streams_of(scenario, seed).items()}


def at_home(scenario: Scenario, seed: int) -> Plan:
    """Each stream on its own board if that can serve it, else where it is fastest."""
    plan = fastest(scenario, seed)
    for key, work in streams_of(scenario, seed).items():
        own = [place for place in work if place[0] == key[0]]
        plan[key] = min(own, key=lambda p: (work[p], p)) if own else plan[key]
    return plan


STATIC: Mapping[str, Callable[[Scenario, int], Plan]] = MappingProxyType(
    {"static-balanced": balanced, "static-fastest": fastest, "static-at-home": at_home}
)


def streams_of(scenario: Scenario, seed: int) -> dict[Key, Work]:
    """For each stream of the run, the work in µs of all its requests at each place that may serve every one of them."""
    boards = [view_of(board, scenario) for board in scenario.boards]
    rules = Rules(scenario.policy, frozenset(digest_of(model.name) for model in scenario.models))
    streams: dict[Key, Work] = {}
    for arrival in arrivals(scenario, seed):
        options = choose(arrival.request, boards, rules, arrival.request.limits.deadline_us).ranked
        here = {(option.board, option.offer.model): _work_us(option) for option in options}
        key = static_key(arrival.ingress, arrival.request)
        known = streams.setdefault(key, dict.fromkeys(here, 0))
        streams[key] = {place: known[place] + here[place] for place in known if place in here}
    return {key: work for key, work in streams.items() if work}


def _work_us(option: Option) -> int:
    return option.cost.busy_us


def view_of(board: BoardPlan, world: Scenario) -> BoardView:
    """A board that is idle and has measured what it hosts."""
    costs = Costs(load_profile(board.profile))
    hosted = [model for model in world.models if model.name in board.models]
    kv = {model.name: Shelf(model, board, costs).state() for model in hosted if model.talks}
    return BoardView(board.id, tuple(_offer(costs, model) for model in hosted), kv=kv)


def _offer(costs: Costs, model: ModelPlan) -> ModelOffer:
    offer = costs.offer(model)
    if not model.talks:
        return offer
    step = costs.step(model, 1, TYPICAL_CONTEXT_TOKENS)
    energy_nj = step.dynamic_nj + costs.profile.idle_mw * step.busy_us
    middles = {TALK_SHAPE + bits: answer_tokens_of(TALK_SHAPE + bits) * 3 // 8 for bits in ANSWER_BITS}
    shapes = [ShapeCost(shape, step.busy_us * tokens, energy_nj * tokens // 1000) for shape, tokens in middles.items()]
    return ModelOffer(
        offer.model, offer.task, offer.digest, offer.quality_permille, offer.busy_us, offer.energy_uj, shapes=tuple(shapes)
    )
