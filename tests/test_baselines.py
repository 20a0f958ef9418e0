"""What each placer that ours is compared with may and must do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.chat import CHAT
from edge_agent.core.config import PolicySection
from edge_agent.core.kv import KvHome, KvState, Place, session_hash
from edge_agent.core.values import DataClass, InferenceRequest, Limits, ModelOffer, Tensor, TrustTier
from edge_agent.placement.options import BoardView, Decision, Rules, choose
from edge_agent.sim.baselines import ABLATIONS, BASELINES, PLACERS, Frozen, Static, pinned, static_key

SIGNED, UNSIGNED = b"s" * 32, b"u" * 32
RULES = Rules(PolicySection(), frozenset({SIGNED}))
BOARDS = tuple(f"b{n}" for n in range(8))


@dataclass
class Seen:
    """What an oracle sees."""

    seed: int = 0
    queues_us: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def queue_us(self, board: str, lane: str) -> int:
        return self.queues_us.get((board, lane), 0)

    def work_us(self, board: str) -> int:
        return sum(queue_us for (name, _), queue_us in self.queues_us.items() if name == board)


def offer(name: str = "faces", busy_us: int = 20_000, **others: object) -> ModelOffer:
    return ModelOffer(name, "detect_faces", SIGNED, 800, busy_us, 100, **others)  # type: ignore[arg-type]


def fleet(*offers: ModelOffer, boards: Sequence[str] = BOARDS, local: str = "b0") -> list[BoardView]:
    return [BoardView(name, offers or (offer(),), local=name == local) for name in boards]


def request(number: int = 1, **others: object) -> InferenceRequest:
    inputs = {"image": Tensor("uint8", (1000,), bytes(1000))}
    return InferenceRequest(f"{number:032x}", "detect_faces", inputs, **others)  # type: ignore[arg-type]


def place(name: str, views: Sequence[BoardView], number: int = 1, peek: Seen | None = None, **others: object) -> Decision:
    asked = request(number, **others)
    return PLACERS[name](peek or Seen())(asked, views, RULES, asked.limits.deadline_us)


def taken(decision: Decision) -> str:
    assert decision.chosen
    return decision.chosen.board


ALL_KINDS = (
    offer(), offer("better", 60_000), replace(offer("forged"), digest=UNSIGNED), replace(offer("poor"), quality_permille=9),
)  # fmt: skip
view_lists = st.lists(
    st.builds(
        BoardView,
        st.sampled_from(BOARDS),
        st.just(ALL_KINDS),
        queue_us=st.integers(0, 10**7),
        headroom_mdegc=st.sampled_from((None, -1, 1_000, 30_000)),
        barred=st.sampled_from(("", "", "it is gone")),
        barred_models=st.sampled_from(({}, {"faces": "it failed here"})),
        trust=st.sampled_from(TrustTier),
        booked_us=st.integers(0, 10**7),
    ),
    max_size=8,
    unique_by=lambda view: view.board,
)  # fmt: skip


@pytest.mark.parametrize("name", PLACERS)
@given(views=view_lists, trust=st.sampled_from(list(TrustTier)[1:]), data=st.sampled_from(DataClass))
def test_no_placer_takes_what_a_hard_filter_excludes(
    name: str, views: list[BoardView], trust: TrustTier, data: DataClass
) -> None:
    views = [replace(view, local=not number) for number, view in enumerate(views)]
    asked = request(limits=Limits(quality_permille=500, trust=trust), data=data)
    feasible = choose(asked, views, RULES, asked.limits.deadline_us)
    allowed = {(option.board, option.offer.model) for option in feasible.ranked}
    decision = PLACERS[name](Seen())(asked, views, RULES, asked.limits.deadline_us)
    ranked = [(option.board, option.offer.model) for option in decision.ranked]
    assert set(ranked) <= allowed and len(set(ranked)) == len(ranked)
    assert bool(ranked) == bool(allowed), "what may be served is not shed"


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_takes_the_fastest_model_over_the_floor(name: str) -> None:
    views = fleet(offer("slow", 90_000), offer("fast", 10_000), replace(offer("poor", 5_000), quality_permille=100))
    decision = place(name, views, limits=Limits(quality_permille=500))
    assert decision.chosen and decision.chosen.offer.model == "fast"
    assert len(decision.ranked) == 16, "the other options stay behind it"


def test_random_takes_every_board_and_the_same_one_for_the_same_request() -> None:
    counts = Counter(taken(place("random", fleet(), number)) for number in range(800))
    assert set(counts) == set(BOARDS) and min(counts.values()) > 60
    assert taken(place("random", fleet(), 5)) == taken(place("random", fleet()[::-1], 5))
    assert len({taken(place("random", fleet(), 5, Seen(seed))) for seed in range(20)}) > 3


def test_round_robin_takes_each_board_in_turn_from_its_own() -> None:
    chooser = PLACERS["round-robin"](Seen())
    views = fleet(local="b6")
    assert [taken(chooser(request(n), views, RULES, 10**6)) for n in range(4)] == ["b6", "b7", "b0", "b1"]


def test_round_robin_passes_over_what_may_not_serve() -> None:
    chooser = PLACERS["round-robin"](Seen())
    views = [replace(view, barred="gone" if view.board in ("b1", "b7") else "") for view in fleet()]
    order = [taken(chooser(request(n), views, RULES, 10**6)) for n in range(8)]
    assert order == ["b0", "b2", "b3", "b4", "b5", "b6", "b0", "b2"]


def test_each_ingress_board_goes_round_for_itself() -> None:
    chooser = PLACERS["round-robin"](Seen())
    order = [taken(chooser(request(n), fleet(local=local), RULES, 10**6)) for n, local in enumerate(("b0", "b4", "b0", "b4"))]
    assert order == ["b0", "b4", "b1", "b5"]


def test_least_loaded_believes_gossip() -> None:
    views = [replace(view, queue_us=0 if view.board == "b3" else 5_000) for view in fleet()]
    truth = Seen(queues_us={("b3", ""): 10**7})
    assert {taken(place("least-loaded", views, n, truth)) for n in range(20)} == {"b3"}


def test_least_loaded_spreads_over_equals() -> None:
    assert len({taken(place("least-loaded", fleet(), n)) for n in range(100)}) == 8


def test_jsq2_takes_the_shorter_of_two_and_probes_the_true_queues() -> None:
    truth = Seen(queues_us={(board, ""): 1_000 * n for n, board in enumerate(BOARDS)})
    stale = [replace(view, queue_us=9_000 - 1_000 * n) for n, view in enumerate(fleet())]
    counts = Counter(taken(place("jsq2", stale, n, truth)) for n in range(2_800))
    expected = {board: 2_800 * (7 - n) // 28 for n, board in enumerate(BOARDS)}
    assert counts["b7"] == 0, "the longest of all is never the shorter of two"
    assert all(abs(counts[board] - most) < 120 for board, most in expected.items())


def test_greedy_latency_sees_the_truth_and_stale_greedy_the_gossip() -> None:
    truth = Seen(queues_us={(board, ""): 0 if board == "b5" else 10**6 for board in BOARDS})
    gossip = [replace(view, queue_us=0 if view.board == "b2" else 10**6) for view in fleet()]
    assert taken(place("greedy-latency", gossip, 1, truth)) == "b5"
    assert taken(place("stale-greedy", gossip, 1, truth)) == "b2"


def test_greedy_latency_counts_the_way_there_and_not_the_energy() -> None:
    views = fleet(replace(offer(), energy_uj=10**9))
    cheap = replace(views[1], offers=(replace(offer(), energy_uj=1),))
    assert taken(place("greedy-latency", [views[0], cheap])) == "b0"


TALK = ModelOffer("talk", CHAT, SIGNED, 700, 100_000, 100)


def turn(number: int = 1) -> InferenceRequest:
    return InferenceRequest(f"{number:032x}", CHAT, {"turn": Tensor("uint8", (8_000,), bytes(8_000))}, session="s")


def talking(board: str, queue_us: int = 0, tokens: int = 0) -> BoardView:
    homes = (KvHome(session_hash("s"), tokens, Place.HOT),) if tokens else ()
    state = KvState("talk", b"f" * 32, 512, 1024, 2**30, 4096, queue_us, prefill_tok_s=1_000, homes=homes)
    return BoardView(board, (TALK,), local=board == "b0", kv={"talk": state})


def test_greedy_latency_counts_the_past_that_a_board_holds() -> None:
    views = [talking("b0"), talking("b1", tokens=1_500), talking("b2")]
    assert taken(PLACERS["greedy-latency"](Seen())(turn(), views, RULES, 10**7)) == "b1"
    busy = Seen(queues_us={("b1", "talk"): 5 * 10**6})
    assert taken(PLACERS["greedy-latency"](busy)(turn(), views, RULES, 10**7)) != "b1"


def test_without_affinity_a_session_does_not_hold_its_turns() -> None:
    views = [talking("b0"), talking("b1", tokens=1_500)]
    assert taken(choose(turn(), views, RULES, 10**7)) == "b1"
    blind = PLACERS["without-affinity"](Seen())(turn(), views, RULES, 10**7)
    assert taken(blind) == "b0" and blind.chosen and blind.chosen.kv.source == "b1", "its past comes all the same"


def test_without_the_table_bookings_do_not_count() -> None:
    views = [replace(view, booked_us=10**8 if view.local else 0) for view in fleet()]
    assert taken(place("table", views)) != "b0"
    assert taken(place("without-table", views)) == "b0"


def test_shuffled_state_deals_out_what_is_seen_but_keeps_costs_and_filters() -> None:
    views = [replace(view, queue_us=0 if view.board == "b3" else 10**7, barred_models={}) for view in fleet()]
    views = [replace(view, queue_us=10**7) if view.local else view for view in views]
    assert taken(place("table", views)) == "b3"
    assert len({taken(place("shuffled-state", views, n)) for n in range(60)} - {"b0"}) == 7


def test_a_frozen_plan_stays_even_when_its_board_is_gone() -> None:
    chooser = Frozen(Seen())
    views = [replace(view, queue_us=0 if view.board == "b3" else 10**6) for view in fleet()]
    assert taken(chooser(request(1), views, RULES, 10**6)) == "b3"
    later = [replace(view, queue_us=10**7 if view.board == "b3" else 0) for view in fleet()]
    assert taken(chooser(request(2), later, RULES, 10**6)) == "b3"
    gone = [replace(view, barred="it is gone" if view.board == "b3" else "") for view in fleet()]
    decision = chooser(request(3), gone, RULES, 10**6)
    assert decision.chosen is None and "the plan is frozen" in decision.why_shed()


def test_a_pinned_decision_keeps_one_option_and_says_why_not_the_others() -> None:
    decision = choose(request(), fleet(boards=BOARDS[:3]), RULES, 10**6)
    kept = pinned(decision, ("b2", "faces"))
    assert [option.board for option in kept.ranked] == ["b2"] and kept.size == decision.size


def test_every_placer_has_one_name() -> None:
    assert set(PLACERS) == {"table", *BASELINES, *ABLATIONS} and len(PLACERS) == 1 + len(BASELINES) + len(ABLATIONS)


def test_a_static_plan_takes_its_one_option_or_none() -> None:
    chooser = Static({static_key("b0", request()): ("b4", "faces")})
    busy = [replace(view, queue_us=10**7 if view.board == "b4" else 0) for view in fleet()]
    assert taken(chooser(request(1), busy, RULES, 10**6)) == "b4"
    assert chooser(request(1), fleet(local="b1"), RULES, 10**6).chosen is None, "nothing is planned for what comes in elsewhere"
