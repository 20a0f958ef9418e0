"""Which boards and models may serve a request, what each would cost, and which is taken.

Owns the option set, the hard filters and the choice.  Rules: a filter excludes with a reason and is never priced; the
choice is the plain minimum of ``(cost, model, board)``, so that equal views give equal decisions on every board; nothing
is shuffled, hashed or timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edge_agent.core.config import PolicySection
from edge_agent.core.kv import KvState, session_hash
from edge_agent.core.values import DataClass, InferenceRequest, ModelOffer, TrustTier
from edge_agent.core.wanted import Wanted
from edge_agent.placement.cost import CostParts, expected_cost, option_cost, shared, stretched
from edge_agent.placement.kv import Holding, KvAction, KvPlan, holdings, plan_kv

NO_KV = KvPlan(KvAction.NONE, 0, 0)


@dataclass(frozen=True, slots=True)
class Rules:
    """What every board of a fleet places by. ``releases``: the SHA-256 digests of the models that are signed; no other runs."""

    policy: PolicySection = PolicySection()
    releases: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class BoardView:
    """A board as the deciding board sees it. ``barred`` is why it may not be used at all; empty when it may.

    ``barred_models`` says the same of single models there.
    ``queue_us`` is the work that waits there for pictures (a language model's is in its ``kv``); ``booked_us`` what it is booked
    for within the policy's horizon; ``headroom_mdegc`` the distance to its trip point, now or as forecast, whichever is less,
    ``None`` if unknown.
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
    trust: TrustTier = TrustTier.NONE
    distrust: str = ""
    """What its appraisal holds against it, for a person."""
    booked_us: int = 0


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
    """The ranked options and the excluded ones. ``chosen`` is ``None`` when the request must be shed. ``wanted``: what was
    asked for, ``None`` where nobody kept it."""

    request_id: str
    ranked: tuple[Option, ...]
    excluded: tuple[Exclusion, ...]
    wanted: Wanted | None = None

    @property
    def chosen(self) -> Option | None:
        return self.ranked[0] if self.ranked else None

    @property
    def size(self) -> int:
        """Options and exclusions together."""
        return len(self.ranked) + len(self.excluded)

    def why_shed(self) -> str:
        return "; ".join(f"{e.board}{'/' + e.model if e.model else ''}: {e.reason}" for e in self.excluded) or "no board is known"


def choose(request: InferenceRequest, boards: Iterable[BoardView], rules: Rules, budget_us: int) -> Decision:
    """Rank every feasible option of ``request`` over ``boards`` and keep the reason of every infeasible one.

    ``budget_us`` is what is left of the deadline.
    """
    wanted = Wanted.of(request)
    views = sorted(boards, key=lambda v: v.board)
    held = _held(wanted, request.session, views)
    ranked: list[Option] = []
    excluded: list[Exclusion] = []
    for view in views:
        if reason := why_not_board(wanted, view, rules):
            excluded.append(Exclusion(view.board, "", reason))
            continue
        for offer in sorted(view.offers, key=lambda o: o.model):
            if not wanted.served_by(offer):
                continue
            if reason := view.barred_models.get(offer.model) or why_not_model(wanted, offer, rules):
                excluded.append(Exclusion(view.board, offer.model, reason))
                continue
            plan = kv_plan(wanted, view, offer, held.get(offer.model, ()), rules.policy)
            if plan.lacking:
                excluded.append(Exclusion(view.board, offer.model, plan.lacking))
                continue
            ranked.append(Option(view.board, offer, weigh(wanted, view, offer, plan, budget_us, rules.policy), plan))
    return Decision(request.request_id, tuple(sorted(ranked, key=lambda o: o.rank)), tuple(excluded), wanted)


def why_not_trusted(trust: TrustTier, asked: TrustTier, distrust: str = "") -> str:
    """Why a board of this appraisal may have no part in a request that asks for at least ``asked``; empty if it may."""
    because = f": {distrust}" if distrust else ""
    if trust is TrustTier.CONTRAINDICATED:
        return f"its appraisal is contraindicated{because}"
    if trust < asked:
        return f"its appraisal is {trust.name.lower()}, the request asks for {asked.name.lower()}{because}"
    return ""


def why_not_board(wanted: Wanted, view: BoardView, rules: Rules) -> str:
    """Why no model of this board may serve this; empty if one may."""
    if reason := view.barred or why_not_trusted(view.trust, wanted.trust, view.distrust):
        return reason
    if wanted.data is DataClass.LOCAL and not view.local:
        return "the request's data may not leave the board where it came in"
    guard_mdegc = rules.policy.guard_band_mdegc
    if view.headroom_mdegc is not None and view.headroom_mdegc < guard_mdegc:
        return f"too hot: {view.headroom_mdegc} m°C under its trip point, the guard band is {guard_mdegc} m°C"
    if any(wanted.served_by(offer) for offer in view.offers):
        return ""
    hosted = ", ".join(sorted(f"{o.model} ({o.task})" for o in view.offers)) or "nothing"
    return f"does not host {wanted.model or 'a model for ' + wanted.task}; it hosts {hosted}"


def why_not_model(wanted: Wanted, offer: ModelOffer, rules: Rules) -> str:
    """Why this model may not serve this, wherever it is; empty if it may."""
    if offer.cloud and wanted.data is not DataClass.PUBLIC:
        return f"the request's data is {wanted.data}, only public data may go to the cloud"
    if offer.cloud and wanted.trust > TrustTier.NONE:
        return f"nobody appraises the cloud, the request asks for {wanted.trust.name.lower()}"
    if not offer.cloud and offer.digest not in rules.releases:
        return f"its digest {offer.digest.hex()[:16]} is not that of a signed release"
    if offer.quality_permille < wanted.quality_permille:
        return f"quality {offer.quality_permille} ‰ is under the request's floor of {wanted.quality_permille} ‰"
    energy_uj = expected_cost(offer, wanted.shape).energy_uj
    if wanted.energy_uj and energy_uj > wanted.energy_uj:
        return f"{energy_uj} µJ an inference is over the request's {wanted.energy_uj} µJ"
    return ""


def kv_plan(wanted: Wanted, view: BoardView, offer: ModelOffer, held: Iterable[Holding], policy: PolicySection) -> KvPlan:
    """What the KV cache of ``offer`` on this board has to do for a turn, given who holds its session."""
    state = view.kv.get(offer.model)
    if not wanted.talks or state is None:
        return NO_KV
    return plan_kv(view.board, state, wanted.size_bytes, held, policy)


def weigh(wanted: Wanted, view: BoardView, offer: ModelOffer, plan: KvPlan, budget_us: int, policy: PolicySection) -> CostParts:
    """What a feasible option costs."""
    state, cost = view.kv.get(offer.model), expected_cost(offer, wanted.shape)
    alone_us, beside = cost.busy_us + plan.prefill_us, min(state.running, offer.parallel - 1) if state else 0
    others = sum(1 for model, other in view.kv.items() if model != offer.model and other.running)
    return option_cost(
        policy,
        busy_us=stretched(alone_us, beside, others),
        energy_uj=shared(cost.energy_uj, beside + 1),
        queue_us=state.queue_us if state and wanted.talks else view.queue_us,
        payload_bytes=wanted.size_bytes,
        remote=not view.local,
        budget_us=budget_us,
        quality_permille=offer.quality_permille,
        kv_us=plan.kv_us,
        booked_us=view.booked_us,
        price_us=offer.price_us,
        work_us=shared(alone_us, offer.parallel),
    )


def _held(wanted: Wanted, session: str, views: Iterable[BoardView]) -> dict[str, list[Holding]]:
    """Who holds KV of the session that can be had, by model: what an untrusted board has computed is no part of an answer that
    must be trusted."""
    held = dict[str, list[Holding]]()
    if not wanted.talks or not session:
        return held
    name = session_hash(session)
    usable = [view for view in views if not view.barred and not why_not_trusted(view.trust, wanted.trust)]
    for model in {model for view in usable for model in view.kv}:
        held[model] = holdings(name, [(view.board, view.kv[model]) for view in usable if model in view.kv])
    return held
