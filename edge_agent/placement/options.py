"""Which boards and models may serve a request, what each would cost, and which is taken.

Owns the option set, the hard filters and the choice.  Rules: a filter excludes with a reason and is never priced; the
choice is the plain minimum of ``(cost, model, board)``, so that equal views give equal decisions on every board; nothing
is shuffled, hashed or timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edge_agent.core.chat import CHAT
from edge_agent.core.config import PolicySection
from edge_agent.core.kv import KvState, session_hash
from edge_agent.core.values import InferenceRequest, ModelOffer
from edge_agent.placement.cost import CostParts, option_cost
from edge_agent.placement.kv import Holding, KvAction, KvPlan, holdings, plan_kv

NO_KV = KvPlan(KvAction.NONE, 0, 0)


@dataclass(frozen=True, slots=True)
class BoardView:
    """A board as the deciding board sees it. ``barred`` is why it may not be used at all; empty when it may.

    ``barred_models`` says the same of single models there.
    ``queue_us`` is the work that waits there for pictures (a language model's is in its ``kv``); ``headroom_mdegc`` the distance
    to its trip point, ``None`` if unknown.
    """

    board: str
    offers: Sequence[ModelOffer]
    queue_us: int = 0
    local: bool = False
    headroom_mdegc: int | None = None
    barred: str = ""
    barred_models: Mapping[str, str] = field(default_factory=dict)
    kv: Mapping[str, KvState] = field(default_factory=dict)
    """Of each language model there."""


@dataclass(frozen=True, slots=True)
class Option:
    board: str
    offer: ModelOffer
    cost: CostParts
    kv: KvPlan = NO_KV

    @property
    def rank(self) -> tuple[int, str, str]:
        return (self.cost.total_us, self.offer.model, self.board)


@dataclass(frozen=True, slots=True)
class Exclusion:
    """An option that a filter took out, and why. ``model`` is empty when the whole board is out."""

    board: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The ranked options and the excluded ones. ``chosen`` is ``None`` when the request must be shed."""

    request_id: str
    ranked: tuple[Option, ...]
    excluded: tuple[Exclusion, ...]

    @property
    def chosen(self) -> Option | None:
        return self.ranked[0] if self.ranked else None

    @property
    def size(self) -> int:
        """Options and exclusions together."""
        return len(self.ranked) + len(self.excluded)

    def why_shed(self) -> str:
        return "; ".join(f"{e.board}{'/' + e.model if e.model else ''}: {e.reason}" for e in self.excluded) or "no board is known"


def choose(request: InferenceRequest, boards: Iterable[BoardView], policy: PolicySection, budget_us: int) -> Decision:
    """Rank every feasible option of ``request`` over ``boards`` and keep the reason of every infeasible one.

    ``budget_us`` is what is left of the deadline.
    """
    views = sorted(boards, key=lambda v: v.board)
    held = _held(request, views)
    ranked: list[Option] = []
    excluded: list[Exclusion] = []
    for view in views:
        if reason := _board_filter(view, policy.guard_band_mdegc) or _task_filter(request, view):
            excluded.append(Exclusion(view.board, "", reason))
            continue
        for offer in sorted(view.offers, key=lambda o: o.model):
            if not offer.serves(request):
                continue
            if reason := view.barred_models.get(offer.model) or _offer_filter(request, offer):
                excluded.append(Exclusion(view.board, offer.model, reason))
                continue
            plan = _kv_plan(request, view, offer, held, policy)
            if plan.lacking:
                excluded.append(Exclusion(view.board, offer.model, plan.lacking))
                continue
            state = view.kv.get(offer.model)
            cost = option_cost(
                policy,
                busy_us=offer.busy_us + plan.prefill_us,
                energy_uj=offer.energy_uj,
                queue_us=state.queue_us if state and request.task == CHAT else view.queue_us,
                payload_bytes=request.size_bytes,
                remote=not view.local,
                budget_us=budget_us,
                quality_permille=offer.quality_permille,
                kv_us=plan.kv_us,
            )
            ranked.append(Option(view.board, offer, cost, plan))
    return Decision(request.request_id, tuple(sorted(ranked, key=lambda o: o.rank)), tuple(excluded))


def _held(request: InferenceRequest, views: Iterable[BoardView]) -> dict[str, list[Holding]]:
    """Who holds KV of the request's session that can be had, by model."""
    if request.task != CHAT or not request.session:
        return {}
    session, held = session_hash(request.session), dict[str, list[Holding]]()
    reachable = [view for view in views if not view.barred]
    for model in {model for view in reachable for model in view.kv}:
        held[model] = holdings(session, [(view.board, view.kv[model]) for view in reachable if model in view.kv])
    return held


def _kv_plan(
    request: InferenceRequest, view: BoardView, offer: ModelOffer, held: Mapping[str, list[Holding]], policy: PolicySection
) -> KvPlan:
    state = view.kv.get(offer.model)
    if request.task != CHAT or state is None:
        return NO_KV
    return plan_kv(view.board, state, request.size_bytes, held.get(offer.model, ()), policy)


def _board_filter(view: BoardView, guard_band_mdegc: int) -> str:
    if view.barred:
        return view.barred
    if view.headroom_mdegc is not None and view.headroom_mdegc < guard_band_mdegc:
        return f"too hot: {view.headroom_mdegc} m°C under its trip point, the guard band is {guard_band_mdegc} m°C"
    return ""


def _task_filter(request: InferenceRequest, view: BoardView) -> str:
    if any(offer.serves(request) for offer in view.offers):
        return ""
    hosted = ", ".join(sorted(f"{o.model} ({o.task})" for o in view.offers)) or "nothing"
    return f"does not host {request.model or 'a model for ' + request.task}; it hosts {hosted}"


def _offer_filter(request: InferenceRequest, offer: ModelOffer) -> str:
    limits = request.limits
    if offer.quality_permille < limits.quality_permille:
        return f"quality {offer.quality_permille} ‰ is under the request's floor of {limits.quality_permille} ‰"
    if limits.energy_uj is not None and offer.energy_uj > limits.energy_uj:
        return f"{offer.energy_uj} µJ an inference is over the request's {limits.energy_uj} µJ"
    return ""
