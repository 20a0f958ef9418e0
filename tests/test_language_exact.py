"""Neither company nor a kill changes what a prompt gives: the engine's own cuts, on a real model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.kv import SINK_TOKENS
from edge_agent.language.batching import CostCurve
from edge_agent.language.decoder import Decoder
from edge_agent.language.engine import Options
from tests.kept_sessions import Kept
from tests.rings import same_ring, text
from tests.test_language_engine import DEAR, FLAT, LIVELY, WINDOW, answer, begin, engine, lively, run

__all__ = ["lively"]
ROOMY = CostCurve(((1, 1000), (64, 3000)))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50), st.integers(1, 300), st.sampled_from([DEAR, FLAT, ROOMY]))
def test_four_sessions_with_one_prompt_in_company_say_what_one_says_alone(
    lively: Decoder, seed: int, length: int, curve: CostCurve
) -> None:
    prompt = text(length, 200, seed)
    plain, _ = answer(engine(lively, curve=DEAR), prompt, max_tokens=40)
    made = engine(lively, curve=curve)
    kept = {slot: begin(made, slot, text(5 + slot, 200, slot), max_tokens=90) for slot in range(2)}
    run(made, kept, 3)
    kept |= {slot: begin(made, slot, prompt, max_tokens=40) for slot in range(2, 6)}
    run(made, kept)
    assert [kept[slot].ids for slot in range(2, 6)] == [plain.ids] * 4
    alone = engine(lively)
    answer(alone, prompt, max_tokens=40)
    assert all(same_ring(made._slots[slot].ring, alone._slots[0].ring) for slot in range(2, 6))


@settings(max_examples=10, deadline=None)
@given(st.integers(4, 200), st.integers(1, 300), st.integers(0, 6), st.integers(20, 68))
def test_a_turn_whose_prompt_was_cut_short_by_a_kill_says_what_it_says_without(
    lively: Decoder, past: int, length: int, steps: int, most_chunk: int
) -> None:
    whole, prompt = engine(lively), text(length, 200)
    kept, _ = answer(whole, text(past, 200, 3), max_tokens=5)
    parked: Any = kept.parked()
    twin = Kept(LIVELY, WINDOW)
    twin.__dict__ |= {name: type(value)(value) for name, value in vars(kept).items() if name != "shape"}
    begin(whole, 0, prompt, kept, max_tokens=40)
    run(whole, {0: kept})
    killed, other = engine(lively, most_chunk=most_chunk), engine(lively, most_chunk=20)
    for made in (killed, other):
        made.open(0, **parked)
    killed.begin(0, [*twin.ids[twin.tokens :], *prompt], Options(max_tokens=40))
    for _ in range(steps):
        killed.step()
    begin(other, 0, prompt, twin, max_tokens=40)
    run(other, {0: twin})
    assert twin.ids == kept.ids
    assert same_ring(whole._slots[0].ring, other._slots[0].ring)


@pytest.mark.parametrize("told", [1, 2, 9, 30])
def test_ids_that_were_generated_and_are_computed_again_give_the_bits_that_they_gave(lively: Decoder, told: int) -> None:
    prompt = text(100, 200)
    whole, again = engine(lively), engine(lively)
    kept, _ = answer(whole, prompt, max_tokens=60)
    assert len(kept.ids) > 100 + told > SINK_TOKENS
    answered = tuple(kept.ids[100 : 100 + told])
    again.open(0, 0)
    again.begin(0, [*prompt, *answered], Options(max_tokens=60 - told, answered=answered))
    while again.live:
        again.step()
    assert same_ring(whole._slots[0].ring, again._slots[0].ring)
