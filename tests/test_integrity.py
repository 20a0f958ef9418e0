"""Integrity is a filter: whatever is asked of whatever boards, no option is ranked that may not serve, and none vanishes.

The laws are written down here a second time, in the plainest way, and held against ten thousand random cases of the live choice,
and against the agreed table.  That these cases would see a filter break is shown by breaking each of them.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import pytest

from edge_agent.core.chat import CHAT
from edge_agent.core.config import PolicySection
from edge_agent.core.kv import KvHome, KvState, Place, session_hash
from edge_agent.core.values import INVOKE, DataClass, InferenceRequest, Limits, ModelOffer, ShapeCost, Tensor, TrustTier
from edge_agent.core.wanted import Demand, Wanted, shape_of
from edge_agent.placement import options
from edge_agent.placement.cost import expected_cost
from edge_agent.placement.facts import BoardFacts
from edge_agent.placement.kv import KvAction
from edge_agent.placement.options import BoardView, Decision, Rules
from edge_agent.placement.table import TableMaker

CASES, CASES_A_MUTANT, TABLES = 10_000, 1_500, 200
TASKS = ("detect_faces", "classify", CHAT)
MODELS = tuple(f"m{number}" for number in range(7))
UNSIGNED = ("m4", "m6")
BOARDS = ("a", "b", "c", "d", "e")
POLICY = PolicySection()
RULES = Rules(POLICY, frozenset(sha256(name.encode()).digest() for name in MODELS if name not in UNSIGNED))
FORMATS = (b"f" * 32, b"g" * 32)
SESSION = "kitchen"
BUDGET_US = 10_000_000


def some_offer(chance: random.Random, name: str, *, cloud: bool) -> ModelOffer:
    task = CHAT if cloud else TASKS[MODELS.index(name) % 3]
    busy_us = chance.choice((1_000, 80_000, 2_000_000))
    shapes = tuple(ShapeCost(shape, busy_us, chance.choice((500, 50_000)), 9) for shape in (10, 71) if chance.random() < 0.4)
    quality, energy_uj = chance.choice((300, 700, 900)), chance.choice((100, 20_000, 900_000))
    digest = sha256(("cloud " if cloud else "").encode() + name.encode()).digest()
    return ModelOffer(name, task, digest, quality, busy_us, energy_uj, shapes=shapes, cloud=cloud, price_us=5_000 * cloud)


def some_kv(chance: random.Random, offer: ModelOffer) -> KvState:
    homes = (
        (KvHome(session_hash(SESSION), chance.choice((40, 900)), chance.choice(list(Place))),) if chance.random() < 0.5 else ()
    )
    free_bytes = chance.choice((2**16, 2**30, 2**30))
    return KvState(offer.model, chance.choice(FORMATS), 100, 200, free_bytes, 4096, prefill_tok_s=300, homes=homes)


def some_offers(chance: random.Random, *, clouds: bool) -> tuple[ModelOffer, ...]:
    hosted = [some_offer(chance, name, cloud=False) for name in chance.sample(MODELS, chance.randrange(5))]
    return (*hosted, some_offer(chance, "cloudy", cloud=True)) if clouds and chance.random() < 0.3 else tuple(hosted)


def some_trust(chance: random.Random) -> TrustTier:
    return chance.choice((TrustTier.CONTRAINDICATED, TrustTier.NONE, TrustTier.WARNING, TrustTier.AFFIRMING, TrustTier.AFFIRMING))


def some_headroom(chance: random.Random) -> int | None:
    guard_mdegc = POLICY.guard_band_mdegc
    return chance.choice((None, None, 30_000, 30_000, guard_mdegc, guard_mdegc - 1, -500))


def some_view(chance: random.Random, board: str) -> BoardView:
    offers = some_offers(chance, clouds=True)
    return BoardView(
        board,
        offers,
        queue_us=chance.choice((0, 0, 500_000)),
        local=board == "a",
        headroom_mdegc=some_headroom(chance),
        barred="it is offline" if chance.random() < 0.1 else "",
        barred_models={name: "its engine died" for name in MODELS if chance.random() < 0.05},
        kv={offer.model: some_kv(chance, offer) for offer in offers if offer.task == CHAT and chance.random() < 0.8},
        trust=some_trust(chance),
        booked_us=chance.choice((0, 10**6)),
    )


def some_request(chance: random.Random) -> InferenceRequest:
    task = chance.choice((*TASKS, CHAT, INVOKE))
    size_bytes = chance.choice((1, 600, 5_000))
    limits = Limits(
        BUDGET_US,
        chance.choice((None, None, 400, 30_000)),
        chance.choice((0, 0, 500, 900)),
        chance.choice((TrustTier.NONE, TrustTier.NONE, TrustTier.WARNING, TrustTier.AFFIRMING)),
    )
    return InferenceRequest(
        "ab" * 16,
        task,
        {"x": Tensor("uint8", (size_bytes,), bytes(size_bytes))},
        chance.choice(MODELS) if task == INVOKE or chance.random() < 0.2 else None,
        limits,
        SESSION if chance.random() < 0.5 else "",
        chance.choice(list(DataClass)),
        chance.choice((0, 100)),
    )


def cases(count: int) -> Iterator[tuple[InferenceRequest, list[BoardView]]]:
    chance = random.Random("integrity")
    views = {board: [some_view(chance, board) for _ in range(150)] for board in BOARDS}
    for _ in range(count):
        there = [board for board in BOARDS if chance.random() < 0.7]
        yield some_request(chance), [chance.choice(views[board]) for board in there]


# the laws, in the plainest way


def broken_laws(
    wanted: Wanted, offer: ModelOffer, *, trust: TrustTier, local: bool, headroom_mdegc: int | None, barred: bool
) -> list[str]:
    """Every law that an option would break."""
    data, energy_uj = wanted.data, expected_cost(offer, wanted.shape).energy_uj
    laws = {
        "barred": not barred,
        "tier": trust >= wanted.trust,
        "contraindicated": trust != TrustTier.CONTRAINDICATED,
        "stays local": data != DataClass.LOCAL or (local and not offer.cloud),
        "not in the cloud": data == DataClass.PUBLIC or not offer.cloud,
        "nobody appraises the cloud": wanted.trust == TrustTier.NONE or not offer.cloud,
        "signed": offer.cloud or offer.digest in RULES.releases,
        "guard band": headroom_mdegc is None or headroom_mdegc >= POLICY.guard_band_mdegc,
        "quality": offer.quality_permille >= wanted.quality_permille,
        "energy": not wanted.energy_uj or energy_uj <= wanted.energy_uj,
        "task": wanted.task in (offer.task, INVOKE),
        "pinned": wanted.model in ("", offer.model),
    }
    return [name for name, kept in laws.items() if not kept]


def check(request: InferenceRequest, views: list[BoardView], decision: Decision) -> Counter[str]:
    """Raises ``AssertionError`` if a decision breaks a law, loses an option, or shuts one out for nothing.

    What it saw: laws that kept options out, and options ranked.
    """
    wanted, seen = Wanted.of(request), Counter[str]()
    ranked = {(option.board, option.offer.model): option for option in decision.ranked}
    reasons = {(each.board, each.model): each.reason for each in decision.excluded}
    assert len(ranked) == len(decision.ranked) and len(reasons) == len(decision.excluded) and all(reasons.values())
    assert not [key for key in ranked if key in reasons or (key[0], "") in reasons]
    for view in views:
        assert any(board == view.board for board, _ in (*ranked, *reasons)), f"{view.board} vanished"
        for offer in view.offers:
            key = (view.board, offer.model)
            broken = broken_laws(
                wanted, offer, trust=view.trust, local=view.local, headroom_mdegc=view.headroom_mdegc,
                barred=bool(view.barred or offer.model in view.barred_models),
            )  # fmt: skip
            seen.update(broken if len(broken) == 1 else [])
            if broken:
                assert key not in ranked, f"{key} may not serve: {broken}"
                assert key in reasons or (view.board, "") in reasons or not wanted.served_by(offer), f"{key} vanished"
            else:
                assert key in ranked or "no room for its KV" in reasons.get(key, ""), f"{key} is out for nothing"
                seen["ranked" if key in ranked else "no room"] += 1
    trusted = {view.board for view in views if view.trust >= max(wanted.trust, TrustTier.NONE) and not view.barred}
    for option in decision.ranked:
        seen["fetched"] += option.kv.action is KvAction.PEER
        assert not option.kv.lacking, "it may not serve: there is no room"
        assert not option.kv.source or option.kv.source in trusted, f"the past of its talk comes from {option.kv.source}"
    return seen


def looked_at(choose_module: ModuleType, count: int) -> Counter[str]:
    seen = Counter[str]()
    for request, views in cases(count):
        seen += check(request, views, choose_module.choose(request, views, RULES, BUDGET_US))
    return seen


def test_in_ten_thousand_random_cases_no_option_is_ranked_that_may_not_serve_and_none_vanishes() -> None:
    seen = looked_at(options, CASES)
    laws = (
        "barred", "tier", "stays local", "not in the cloud", "nobody appraises the cloud", "signed",
        "guard band", "quality", "energy", "task", "pinned", "ranked", "no room", "fetched",
    )  # fmt: skip
    assert {law: seen[law] for law in laws if seen[law] < 20} == {}, "each law alone decides often enough to be missed"


FILTERS = {
    "the tier": ("if trust < asked:", "if trust + 1 < asked:"),
    "what bars a board": ("if reason := view.barred or why", "if reason := why"),
    "what bars a model": ("view.barred_models.get(offer.model) or ", ""),
    "data that stays": ("if wanted.data is DataClass.LOCAL and not view.local:", "if False:"),
    "data for the cloud": ("if offer.cloud and wanted.data is not DataClass.PUBLIC:", "if False:"),
    "local data for the cloud": ("wanted.data is not DataClass.PUBLIC:", "wanted.data is DataClass.PRIVATE:"),
    "private data for the cloud": ("wanted.data is not DataClass.PUBLIC:", "wanted.data is DataClass.LOCAL:"),
    "trust in the cloud": ("if offer.cloud and wanted.trust > TrustTier.NONE:", "if False:"),
    "signed digests": ("if not offer.cloud and offer.digest not in rules.releases:", "if False:"),
    "the guard band": ("view.headroom_mdegc < guard_mdegc:", "view.headroom_mdegc < guard_mdegc - 1:"),
    "the guard band itself": ("view.headroom_mdegc < guard_mdegc:", "view.headroom_mdegc <= guard_mdegc:"),
    "quality": ("if offer.quality_permille < wanted.quality_permille:", "if False:"),
    "energy": ("if wanted.energy_uj and energy_uj > wanted.energy_uj:", "if False:"),
    "energy of the shape": ("expected_cost(offer, wanted.shape).energy_uj", "offer.energy_uj"),
    "task and pinned model": ("if not wanted.served_by(offer):", "if False:"),
    "the reason of a model": ("excluded.append(Exclusion(view.board, offer.model, reason))", "pass"),
    "the reason of a board": ('excluded.append(Exclusion(view.board, "", reason))', "pass"),
    "KV of an untrusted board": (" and not why_not_trusted(view.trust, wanted.trust)]", "]"),
    "room for KV": ("if plan.lacking:", "if False:"),
}  # fmt: skip


def mutant(old: str, new: str) -> ModuleType:
    """The module of the options with one line of it broken."""
    source = Path(str(options.__file__)).read_text()
    assert source.count(old) == 1, f"{old!r} is in the source {source.count(old)} times"
    module = ModuleType("broken_options")
    sys.modules[module.__name__] = module
    exec(compile(source.replace(old, new), "broken_options.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_that_is_broken_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "broken_options", raising=False)
    with pytest.raises(AssertionError, match="may not serve|vanished|out for nothing|comes from"):
        looked_at(mutant(*FILTERS[name]), CASES_A_MUTANT)


def test_a_contraindicated_board_runs_nothing_even_if_a_request_class_would_have_it() -> None:
    """No request can ask for that; what a table is made of comes from other boards."""
    lenient = replace(Wanted.of(some_request(random.Random(1))), trust=TrustTier.CONTRAINDICATED)
    view = BoardView("a", (), local=True, trust=TrustTier.CONTRAINDICATED)
    assert options.why_not_board(lenient, view, RULES) == "its appraisal is contraindicated"


# the agreed table


def some_facts(chance: random.Random, board: str) -> BoardFacts:
    offers = some_offers(chance, clouds=True)
    wanted = {Wanted.of(some_request(chance)).classed() for _ in range(chance.randrange(1, 5))}
    return BoardFacts.rounded(
        board,
        up=chance.random() < 0.9,
        trust=some_trust(chance),
        headroom_mdegc=some_headroom(chance),
        offers=offers,
        kv=[some_kv(chance, offer) for offer in offers if offer.task == CHAT and not offer.cloud],
        demand=[Demand(each, chance.choice((1, 900, 20_000))) for each in sorted(wanted)],
    )


def serves(there: BoardFacts) -> bool:
    """Is what comes in there placed at all?"""
    return there.up and there.trust is not TrustTier.CONTRAINDICATED


def test_no_table_lists_an_option_that_may_not_serve_and_every_demand_has_its_entry() -> None:
    chance, listed, empty = random.Random("tables"), 0, 0
    for _ in range(TABLES):
        facts = {board: some_facts(chance, board) for board in BOARDS if chance.random() < 0.8}
        table = TableMaker(RULES).make(facts.values())
        asked = {(board, each.wanted) for board, there in facts.items() if serves(there) for each in there.demand}
        assert {(entry.ingress, entry.wanted) for entry in table.entries} == asked
        for entry in table.entries:
            listed, empty = listed + len(entry.options), empty + (not entry.options)
            places = {(each.board, each.model) for each in entry.options}
            assert len(places) == len(entry.options)
            for board, there in facts.items():
                for offer in there.offers:
                    broken = broken_laws(
                        entry.wanted, offer, trust=there.trust, local=board == entry.ingress,
                        headroom_mdegc=there.headroom_mdegc, barred=not there.up,
                    )  # fmt: skip
                    assert not broken or (board, offer.model) not in places, f"{board}/{offer.model} may not serve: {broken}"
                    if not broken and offer.task != CHAT:
                        assert (board, offer.model) in places, f"{board}/{offer.model} is out for nothing"
    assert listed > 200 and empty > 100


def test_a_shape_decides_the_energy_that_is_looked_at() -> None:
    """The figure for no known shape is not what a request of a known one is held to."""
    request = InferenceRequest("ab" * 16, "classify", {"x": Tensor("uint8", (600,), bytes(600))}, limits=Limits(energy_uj=1_000))
    digest = sha256(b"m1").digest()
    thrifty = ModelOffer("m1", "classify", digest, 900, 1_000, 50_000, shapes=(ShapeCost(shape_of(request), 1_000, 900, 3),))
    (option,) = options.choose(request, [BoardView("a", (thrifty,), local=True)], RULES, BUDGET_US).ranked
    assert option.cost.energy_us == 900 * POLICY.energy_us_per_mj // 1000
