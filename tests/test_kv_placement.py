"""Where the next turn of a session goes: to its KV, or its KV to the turn, or neither; in integers, and explained."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.chat import CHAT
from edge_agent.core.config import PolicySection
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import MAX_HOMES, KvHome, KvState, Place, session_hash
from edge_agent.core.values import InferenceRequest, Limits, Tensor
from edge_agent.node.report import decision_report
from edge_agent.placement.kv import ANSWER_TOKENS, BYTES_A_TOKEN, KvAction, holdings, plan_kv
from edge_agent.placement.options import BoardView, Decision, choose
from tests.virtual_board import RULES, offer

POLICY = PolicySection()
SESSION = session_hash("talk")
STATE = KvState("parrot", b"f" * 32, 6480, 12240, 2**30, 2048, prefill_tok_s=800, ram_tok_s=25_000, disk_tok_s=20_000)
TALK = replace(offer("parrot", 500_000, task=CHAT), parallel=4)
MINUTE_US = 60_000_000


def request(session: str = "talk", size_bytes: int = 200) -> InferenceRequest:
    turn = Tensor("uint8", (size_bytes,), bytes(size_bytes))
    return InferenceRequest("ab" * 16, CHAT, {"turn": turn}, None, Limits(MINUTE_US), session)


def holding(state: KvState, tokens: int, place: Place = Place.RAM) -> KvState:
    return replace(state, homes=(KvHome(SESSION, tokens, place),))


def view(board: str, state: KvState = STATE, **settings: object) -> BoardView:
    return BoardView(board, (TALK,), kv={"parrot": state}, **settings)  # type: ignore[arg-type]


def decided(*views: BoardView, asked: InferenceRequest | None = None) -> Decision:
    return choose(asked or request(), views, RULES, MINUTE_US)


def test_the_next_turn_goes_to_the_board_that_holds_the_session() -> None:
    decision = decided(view("a", local=True), view("b", holding(STATE, 1500)))
    assert decision.chosen is not None
    assert (decision.chosen.board, decision.chosen.kv.action) == ("b", KvAction.RAM)
    assert decision.chosen.cost.kv_us == 1500 * 10**6 // 25_000


def test_another_session_stays_where_it_is_asked() -> None:
    views = view("a", local=True), view("b", holding(STATE, 1500))
    for asked in (request(""), request("other")):
        chosen = decided(*views, asked=asked).chosen
        assert chosen is not None and (chosen.board, chosen.kv.action, chosen.cost.kv_us) == ("a", KvAction.NONE, 0)


def test_a_busy_home_gives_the_session_up_to_a_peer() -> None:
    busy = replace(holding(STATE, 1500), queue_us=20_000_000)
    chosen = decided(view("a", local=True), view("b", busy)).chosen
    assert chosen is not None and (chosen.board, chosen.kv.action, chosen.kv.source) == ("a", KvAction.PEER, "b")


@pytest.mark.parametrize(("place", "action"), [(Place.HOT, "resident"), (Place.RAM, "ram"), (Place.DISK, "disk")])
def test_the_tier_of_the_home_is_named_and_priced(place: Place, action: str) -> None:
    chosen = decided(view("a", holding(STATE, 1000, place), local=True)).chosen
    assert chosen is not None and chosen.kv.action == action
    assert chosen.cost.kv_us == {"resident": 0, "ram": 40_000, "disk": 50_000}[action]


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**5))
def test_restore_iff_its_bandwidth_is_above_bytes_a_token_times_prefill(ram_tok_s: int, prefill_tok_s: int, tokens: int) -> None:
    state = holding(replace(STATE, prefill_tok_s=prefill_tok_s, ram_tok_s=ram_tok_s), tokens)
    plan = plan_kv("a", state, 100, holdings(SESSION, [("a", state)]), POLICY)
    bandwidth, needed = ram_tok_s * STATE.parked_bytes, STATE.parked_bytes * prefill_tok_s
    if tokens * 10**6 // ram_tok_s != tokens * 10**6 // prefill_tok_s:
        assert (plan.action is KvAction.RAM) == (bandwidth > needed)
    assert plan.kv_us == min(tokens * 10**6 // ram_tok_s, tokens * 10**6 // prefill_tok_s)


@given(st.integers(1, 10**6), st.integers(1, 2048), st.integers(1, 10**4))
def test_a_peer_is_asked_iff_the_link_beats_the_prefill(link_bytes_per_ms: int, tokens: int, prefill_tok_s: int) -> None:
    policy = PolicySection(link_bytes_per_ms=link_bytes_per_ms)
    state = replace(STATE, prefill_tok_s=prefill_tok_s)
    plan = plan_kv("a", state, 100, holdings(SESSION, [("b", holding(STATE, tokens))]), policy)
    way_us = policy.link_latency_us + tokens * 6480 * 1000 // link_bytes_per_ms + tokens * 10**6 // 25_000
    recompute_us = tokens * 10**6 // prefill_tok_s
    assert plan.action is (KvAction.PEER if way_us < recompute_us else KvAction.RECOMPUTE)
    assert plan.kv_us == min(way_us, recompute_us)


def test_kv_of_another_format_cannot_move() -> None:
    held = holdings(SESSION, [("b", holding(replace(STATE, fingerprint=b"g" * 32), 1500))])
    assert plan_kv("a", STATE, 100, held, POLICY).action is KvAction.RECOMPUTE


def test_a_board_that_holds_a_part_computes_or_fetches_the_rest_whichever_is_cheaper() -> None:
    own, other = holding(STATE, 1400), holding(STATE, 1500)
    held = holdings(SESSION, [("a", own), ("b", other)])
    plan = plan_kv("a", own, 100, held, POLICY)
    assert (plan.action, plan.kv_us) == (KvAction.RAM, 1400 * 40 + 100 * 1250)
    slow = replace(own, prefill_tok_s=20)
    assert plan_kv("a", slow, 100, held, POLICY).action is KvAction.PEER


def test_a_barred_home_is_no_source() -> None:
    chosen = decided(view("a", local=True), view("b", holding(STATE, 1500), barred="it is offline")).chosen
    assert chosen is not None and (chosen.board, chosen.kv.action) == ("a", KvAction.NONE)


def test_a_board_without_room_for_the_kv_is_out_with_the_bytes() -> None:
    tokens = 1500 + 50 + ANSWER_TOKENS
    full = replace(holding(STATE, 1500), free_bytes=tokens * 12240 - 1)
    decision = decided(view("a", local=True), view("b", full))
    (out,) = decision.excluded
    need_bytes = tokens * 12240
    assert (out.board, out.model) == ("b", "parrot")
    assert out.reason == f"no room for its KV: {tokens} tokens need {need_bytes} bytes, {need_bytes - 1} are free"
    fits = replace(full, free_bytes=need_bytes)
    assert not decided(view("a", local=True), view("b", fits)).excluded


def test_no_session_needs_more_than_the_window() -> None:
    state = replace(holding(STATE, 10**6), free_bytes=2048 * 12240)
    assert not decided(view("a", state, local=True)).excluded


def test_what_is_new_in_a_turn_is_computed_and_what_is_sent_again_is_not_counted_twice() -> None:
    def prefill_us(tokens_sent: int, past: int) -> int:
        held = holdings(SESSION, [("a", holding(STATE, past))]) if past else []
        return plan_kv("a", STATE, tokens_sent * BYTES_A_TOKEN, held, POLICY).prefill_us

    assert prefill_us(800, 0) == 10**6
    assert prefill_us(1600, 800) == 10**6
    assert prefill_us(80, 800) == 100_000


def test_a_picture_does_not_wait_for_talk_and_talk_not_for_pictures() -> None:
    queued = replace(STATE, queue_us=7)
    board = BoardView("a", (TALK, offer("small", 10)), 9_000, local=True, kv={"parrot": queued})
    talk = choose(request(), [board], RULES, MINUTE_US).chosen
    look = choose(InferenceRequest("ab" * 16, "detect_faces", {}), [board], RULES, MINUTE_US).chosen
    assert talk is not None and look is not None
    assert (talk.cost.wait_us, look.cost.wait_us) == (7, 9_000)


states = st.builds(
    lambda free, prefill, tokens, place: holding(replace(STATE, free_bytes=free, prefill_tok_s=prefill), tokens, place),
    st.sampled_from((0, 2**22, 2**30)),
    st.sampled_from((0, 100, 900)),
    st.sampled_from((0, 64, 1500)),
    st.sampled_from(list(Place)),
)


@given(st.lists(states, min_size=1, max_size=5), st.data())
def test_the_choice_is_the_plain_minimum_and_no_order_changes_it(states: list[KvState], data: st.DataObject) -> None:
    views = [view(f"b{number}", state, local=number == 0) for number, state in enumerate(states)]
    decision = decided(*views)
    assert decision == decided(*data.draw(st.permutations(views)))
    ranks = [option.rank for option in decision.ranked]
    assert ranks == sorted(ranks) and len(decision.ranked) + len(decision.excluded) == len(views)


def test_explain_shows_the_action_and_its_price() -> None:
    (option,) = decision_report(decided(view("a", holding(STATE, 1000), local=True)))["options"]  # type: ignore[misc]
    assert (option["kv_action"], option["kv_us"], option["kv_tokens"]) == ("ram", 40_000, 1000)  # type: ignore[index]


def test_a_state_that_cannot_be_is_refused() -> None:
    with pytest.raises(RefusedError, match="each once"):
        replace(STATE, homes=(KvHome(SESSION, 1, Place.RAM), KvHome(SESSION, 2, Place.RAM)))
    many = tuple(KvHome(number.to_bytes(16), 1, Place.RAM) for number in range(MAX_HOMES + 1))
    with pytest.raises(RefusedError, match=f"at most {MAX_HOMES}"):
        replace(STATE, homes=many)
    with pytest.raises(RefusedError, match="session length"):
        KvHome(b"short", 1, Place.RAM)
