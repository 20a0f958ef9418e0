"""Turns in the engine, over the real ring and decoder: what is told, and that neither company nor guesses change an answer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, repeat
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.core.chat import Finish, Sampling
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import block_start, sealed_blocks
from edge_agent.core.model_shape import ModelShape, ring_bytes
from edge_agent.language.batching import CostCurve
from edge_agent.language.costs import Costs
from edge_agent.language.decoder import Decoder, Segment
from edge_agent.language.engine import Decodes, Engine, Options
from edge_agent.language.events import MAX_BURST_IDS, TurnEvent, bulk_of, from_bodies, to_body
from edge_agent.language.handshake import step_bytes
from edge_agent.language.ring import Ring
from edge_agent.language.speculation import MAX_GUESSES
from edge_agent.language.stages import open_stages
from models.llama import LITERT, build
from models.tokenizer import Tokenizer
from tests.fetched import smollm2
from tests.kept_sessions import Kept
from tests.needs import needs_module
from tests.numpy_stages import TINY, NumpyStages
from tests.rings import text
from tests.tiny_llama import TINY as TINY_LLAMA
from tests.tiny_llama import RandomWeights

WINDOW = 2
FLAT = CostCurve(((1, 1000), (8, 1100), (64, 9000)))
DEAR = CostCurve(((1, 1000), (2, 2000), (64, 64_000)))
LIVELY = ModelShape(**{name: getattr(TINY_LLAMA, name) for name in ModelShape.__slots__})
STOP = 63
"""The id that ends an answer, where a test wants one."""


class Scripted:
    """A decoder whose model is a function from all ids so far to the next one; ``None`` is not a number."""

    def __init__(self, following: Callable[[Sequence[int]], int | None]) -> None:
        self.following = following
        self.ids: dict[int, list[int]] = {}
        self.fails = False

    def step(self, segments: Sequence[Segment]) -> list[NDArray[np.float32]]:
        logits = [self._rows(each) for each in segments]
        if self.fails:
            raise RuntimeError("no step now")
        return logits

    def _rows(self, segment: Segment) -> NDArray[np.float32]:
        ids = self.ids.setdefault(id(segment.ring), [])
        ids[segment.ring.tokens :] = []
        wanted = []
        for each in segment.ids:
            ids.append(each)
            wanted.append(self._logits(self.following(ids)))
        segment.ring.advance(len(segment.ids))
        return np.array(wanted[{"all": 0, "last": len(wanted) - 1, "none": len(wanted)}[segment.wanted] :])

    def _logits(self, chosen: int | None) -> NDArray[np.float32]:
        logits = np.zeros(TINY.vocabulary, np.float32)
        logits[0 if chosen is None else chosen] = np.nan if chosen is None else 1
        return logits


class Told(Costs):
    """What steps really take here is nothing to plan by."""

    def took(self, rows: int, us: int) -> None:
        assert rows >= 1 and us >= 0


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A real model whose next token depends on all before it, on the runtime that gives a row the same bits in any company."""
    needs_module("ai_edge_litert", "dev")
    path = tmp_path_factory.mktemp("tiny") / "stages.tflite"
    build(RandomWeights(tied=False), TINY_LLAMA, LITERT, path)
    interpreter = importlib.import_module("ai_edge_litert.interpreter")
    return Decoder(open_stages(interpreter, str(path), LIVELY, 1, LITERT), LIVELY)


def shifted(token: int) -> bytes:
    return bytes(((token + 64) % 256,))


def engine(
    decoder: Decodes | None = None, curve: CostCurve = FLAT, stop_ids: Sequence[int] = (), most_chunk: int = 64,
    token_bytes: Callable[[int], bytes] = shifted,
) -> Engine:  # fmt: skip
    shape = decoder.shape if isinstance(decoder, Decoder) else TINY

    def ring(slot: int) -> Ring:
        return Ring(bytearray(ring_bytes(shape, WINDOW)), shape, WINDOW)

    real = decoder or Decoder(NumpyStages(), TINY)
    return Engine(real, ring, lambda slot: None, token_bytes, frozenset(stop_ids), Told(curve), 8, most_chunk)


def begin(made: Engine, slot: int, prompt: Sequence[int], kept: Kept | None = None, **options: Any) -> Kept:
    kept = kept or Kept(made._ring_of(slot).shape, WINDOW)
    if not kept.tokens:
        made.open(slot, 0)
    made.begin(slot, kept.ask(prompt), Options(**{"max_tokens": 100} | options))
    return kept


def run(made: Engine, kept: dict[int, Kept], steps: int = 10_000) -> dict[int, TurnEvent]:
    """Step until nobody wants more; the last event of each slot."""
    last = {}
    while made.live and steps:
        steps -= 1
        for event in made.step().events:
            kept[event.slot].take(event)
            last[event.slot] = event
    return last


def answer(made: Engine, prompt: Sequence[int], slot: int = 0, **options: Any) -> tuple[Kept, TurnEvent]:
    kept = begin(made, slot, prompt, **options)
    return kept, run(made, {slot: kept})[slot]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 180), st.booleans(), st.integers(20, 68))
def test_an_agent_that_takes_every_event_has_all_that_a_restore_needs(
    prompt: int, count: int, speculate: bool, most_chunk: int
) -> None:
    made = engine(most_chunk=most_chunk)
    kept, last = answer(made, text(prompt, 8), max_tokens=count, speculate=speculate)
    assert (last.finish, len(kept.ids)) == (Finish.LENGTH, prompt + count)
    begin(made, 0, text(5, 8), kept, max_tokens=10)
    run(made, {0: kept})
    assert len(kept.ids) == prompt + count + 5 + 10


@settings(max_examples=10, deadline=None)
@given(st.integers(4, 250), st.integers(0, 150))
def test_a_session_restored_from_what_was_told_goes_on_with_the_same_ids(lively: Decoder, prompt: int, steps: int) -> None:
    made, other = engine(lively), engine(lively)
    kept = begin(made, 0, text(prompt, 200), max_tokens=200)
    run(made, {0: kept}, steps + prompt // 64 + 2)
    told = len(kept.ids) - prompt
    other.open(3, **kept.parked())
    twin = Kept(LIVELY, WINDOW)
    twin.__dict__ |= {name: type(value)(value) for name, value in vars(kept).items() if name != "shape"}
    if made.live:
        run(made, {0: kept})
        other.begin(3, twin.ask([]), Options(max_tokens=200 - told))
        run(other, {3: twin})
    assert twin.ids == kept.ids


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50), st.integers(0, 3))
def test_greedy_ids_are_the_same_with_guesses_and_without_and_in_company(lively: Decoder, seed: int, company: int) -> None:
    prompt = text(8, 200, seed)
    plain, _ = answer(engine(lively, curve=DEAR), prompt, speculate=False, max_tokens=150)
    guessing = engine(lively, curve=FLAT)
    kept = {slot: begin(guessing, slot, text(8, 200, 100 + slot)) for slot in range(company)}
    kept[7] = begin(guessing, 7, prompt, max_tokens=150)
    run(guessing, kept)
    assert kept[7].ids == plain.ids
    assert len(set(plain.ids[8:])) > 5, "an answer that could go wrong"


def test_guesses_come_true_on_a_text_that_repeats_itself_and_save_steps() -> None:
    model = Scripted(lambda ids: len(ids) % 11)
    made = engine(model)
    kept = begin(made, 0, [each % 11 for each in range(22)], max_tokens=100)
    steps = 0
    while made.live:
        (event,) = made.step().events
        kept.take(event)
        steps += 1
    assert kept.ids[22:] == [each % 11 for each in range(22, 122)]
    assert steps < 30


def test_a_rejected_guess_leaves_nothing_behind() -> None:
    model = Scripted(lambda ids: (len(ids) * len(ids) // 7) % 5)
    made = engine(model)
    kept = begin(made, 0, [1, 2, 1, 2, 1, 2], max_tokens=120)
    drafted = accepted = 0
    while made.live:
        (event,) = made.step().events
        kept.take(event)
        drafted, accepted = drafted + event.drafted, accepted + event.accepted
        assert model.ids[next(iter(model.ids))][: kept.tokens] == kept.ids[: kept.tokens]
    assert drafted > accepted, "some were wrong"


def test_a_stop_text_ends_the_answer_where_the_ids_end_even_amid_guesses() -> None:
    made = engine(Scripted(lambda ids: len(ids) % 11))
    stop = bytes((64 + 4, 64 + 5)).decode()
    kept, last = answer(made, [each % 11 for each in range(22)], stop=(stop,))
    assert (last.finish, kept.ids[-1], kept.tokens) == (Finish.STOP, 5, len(kept.ids) - 1)
    assert kept.text == "@ABC"
    assert made.open is not None
    begin(made, 0, [7], kept, max_tokens=3)
    run(made, {0: kept})
    assert kept.ids[-4:-3] == [7]


def test_a_stop_id_is_told_and_pending_and_shows_no_text() -> None:
    made = engine(Scripted(lambda ids: STOP if len(ids) == 9 else 3), stop_ids=[STOP])
    kept, last = answer(made, [1, 2, 3, 4])
    assert (last.finish, kept.ids[4:], kept.text, kept.tokens) == (Finish.STOP, [3] * 5 + [STOP], "CCCCC", 9)


def test_the_last_token_that_may_be_made_is_the_last() -> None:
    for count in (1, 2, 7):
        kept, last = answer(engine(Scripted(lambda ids: 1)), [1] * 20, max_tokens=count)
        assert (last.finish, len(kept.ids)) == (Finish.LENGTH, 20 + count)


def test_a_turn_goes_on_in_the_middle_of_a_character_and_of_a_stop_text() -> None:
    euro = dict(enumerate("€".encode()))
    made = engine(Scripted(lambda ids: len(ids)), token_bytes=lambda token: bytes((euro.get(token - 5, 33),)))
    made.open(0, 0)
    made.begin(0, [0, 1, 2, 3, 4, 5, 6], Options(max_tokens=3, answered=(5, 6), begun="x"))
    assert "".join(made.step().events[0].text for _ in range(4)) == "€!!"
    made.close(0)
    made.open(0, 0)
    made.begin(0, [0, 1, 2, 3, 4, 5, 6, 7], Options(max_tokens=9, answered=(5, 6, 7), stop=("€!!",)))
    events = [made.step().events[0] for _ in range(3)][1:]
    assert [(each.text, each.finish) for each in events] == [("", None), ("", Finish.STOP)]


@pytest.mark.parametrize("sampling", [Sampling(900, 0, 1000, 5), Sampling(1500, 20, 900, 6)])
def test_a_draw_is_the_same_alone_in_company_and_in_another_engine(lively: Decoder, sampling: Sampling) -> None:
    alone, _ = answer(engine(lively), text(6, 8), sampling=sampling, max_tokens=60)
    made = engine(lively)
    kept = {slot: begin(made, slot, text(8, 8, slot), sampling=Sampling(1000)) for slot in (1, 2)}
    kept[0] = begin(made, 0, text(6, 8), sampling=sampling, max_tokens=60)
    run(made, kept)
    assert kept[0].ids == alone.ids
    assert kept[1].ids[8:] != kept[2].ids[8:]


def test_each_token_is_another_draw() -> None:
    flat = Scripted(lambda ids: 0)
    flat._logits = lambda chosen: np.zeros(TINY.vocabulary, np.float32)  # type: ignore[method-assign]
    kept, _ = answer(engine(flat), [1, 2, 3, 4], sampling=Sampling(1000, 0, 1000, 1), max_tokens=50)
    assert len(set(kept.ids[4:])) > 20


def test_a_long_prompt_never_keeps_a_speaker_from_a_token() -> None:
    made = engine(Scripted(lambda ids: len(ids) % 13), curve=DEAR)
    speaker = begin(made, 0, [1, 2, 3], max_tokens=1000)
    run(made, {0: speaker}, 1)
    kept = {0: speaker, 1: begin(made, 1, text(600, 60)), 2: begin(made, 2, text(90, 60))}
    first: dict[int, int] = {}
    for number in range(300):
        events = {event.slot: event for event in made.step().events}
        assert len(events[0].ids) >= 1
        for slot, event in events.items():
            kept[slot].take(event)
            if event.ids:
                first.setdefault(slot, number)
    assert first[2] < first[1], "the short prompt does not wait for the long one"


def test_logits_that_are_no_numbers_end_one_turn_and_no_other() -> None:
    made = engine(Scripted(lambda ids: None if ids[0] == 9 and len(ids) > 20 else 2), curve=DEAR)
    kept = {0: begin(made, 0, [9] * 8), 1: begin(made, 1, [1] * 8)}
    last = run(made, kept)
    assert "nan" in last[0].failed and last[0].over and last[0].finish is None
    assert (kept[0].tokens, kept[0].ids[-1]) == (len(kept[0].ids) - 1, 2), "its KV is what was told"
    assert last[1].finish is Finish.LENGTH


def test_a_prompt_whose_logits_are_no_numbers_fails_with_nothing_in_kv() -> None:
    kept, last = answer(engine(Scripted(lambda ids: None)), [1] * 8)
    assert (last.failed != "", last.tokens, last.rows) == (True, 0, b"")


def test_a_step_that_fails_ends_the_turns_and_what_was_told_still_holds() -> None:
    model = Scripted(lambda ids: len(ids) % 7)
    made = engine(model)
    kept = {slot: begin(made, slot, [1, 2, 3, 4, 5, slot]) for slot in (0, 1)}
    run(made, kept, 20)
    model.fails = True
    with pytest.raises(RuntimeError, match="no step now"):
        made.step()
    assert made.live == 0
    model.fails = False
    for slot, each in kept.items():
        begin(made, slot, [], each, max_tokens=5)
    run(made, kept)
    for slot, each in kept.items():
        assert each.ids == [1, 2, 3, 4, 5, slot, *(n % 7 for n in range(6, len(each.ids)))]


def test_a_cancelled_turn_tells_the_rows_that_were_not_told_and_the_slot_goes_on() -> None:
    made = engine(most_chunk=20)
    whole, _ = answer(engine(most_chunk=20), text(100, 8), max_tokens=10, speculate=False)
    kept = begin(made, 0, text(100, 8), speculate=False)
    run(made, {0: kept}, 5)
    assert 0 < kept.tokens < 100 and not kept.rows
    kept.take(made.cancel(0), cancelled=True)
    kept.must_be_whole()
    assert made.live == 0
    begin(made, 0, [], kept, max_tokens=10, speculate=False)
    run(made, {0: kept})
    assert kept.ids == whole.ids
    assert made.cancel(0) == TurnEvent(0, kept.tokens)


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    made = engine()
    for slot in (-1, 8, 64):
        with pytest.raises(RefusedError, match="slot"):
            made.open(slot, 0)
    with pytest.raises(RefusedError, match="open it"):
        made.begin(0, [1], Options())
    with pytest.raises(RefusedError):
        made.open(0, 100, b"", [], b"")
    with pytest.raises(RefusedError, match="open it"):
        made.begin(0, [1], Options())
    made.open(0, 0)
    for prompt in ([], [TINY.vocabulary], [-1]):
        with pytest.raises(RefusedError):
            made.begin(0, prompt, Options())
    for count in (0, -1, 10**6):
        with pytest.raises(RefusedError, match="max_tokens"):
            Options(max_tokens=count)
    made.begin(0, [1], Options(max_tokens=2))
    with pytest.raises(RefusedError, match="one turn at a time"):
        made.begin(0, [1], Options())
    kept = Kept(TINY, WINDOW)
    kept.ask([1])
    run(made, {0: kept})
    assert len(kept.ids) == 3


def test_a_step_with_nobody_live_is_empty() -> None:
    stepped = engine().step()
    assert (stepped.events, stepped.rows, stepped.live, stepped.steps) == ([], 0, 0, 0)


# bursts


def patience(steps: Iterator[int]) -> Callable[[], bool]:
    """Goes on for so many steps more."""
    left = iter(range(next(steps)))
    return lambda: next(left, None) is not None


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 140), st.booleans(), st.integers(0, 2))
def test_a_burst_changes_no_id_no_text_no_row_and_no_sealed_byte(
    lively: Decoder, bursts: list[int], prompt: int, speculate: bool, company: int
) -> None:
    def talked(steps: Iterator[int]) -> dict[int, Kept]:
        made = engine(lively)
        prompts = {slot: text(prompt if not slot else 3 * slot, 200, slot) for slot in range(1 + company)}
        kept = {
            slot: begin(made, slot, ids, max_tokens=90 + slot, speculate=speculate, sampling=Sampling(900 * slot, seed=slot))
            for slot, ids in prompts.items()
        }
        while made.live:
            stepped = made.step(patience(steps))
            assert len({event.slot for event in stepped.events}) == len(stepped.events)
            for event in stepped.events:
                kept[event.slot].take(event, steps=stepped.steps)
        return kept

    plain, burst = talked(repeat(0)), talked(cycle(bursts))
    for slot, each in plain.items():
        other = burst[slot]
        assert (other.ids, other.text, other.tokens) == (each.ids, each.text, each.tokens)
        assert (other.prelude, other.blocks) == (each.prelude, each.blocks)
        last = range(block_start(sealed_blocks(each.tokens)), each.tokens)
        assert [other.rows[position] for position in last] == [each.rows[position] for position in last]


def test_a_burst_ends_where_somebody_waits_for_what_happened() -> None:
    made = engine(Scripted(lambda ids: len(ids) % 13), most_chunk=20)
    kept = {
        0: begin(made, 0, text(50, 60), max_tokens=90, speculate=False),
        1: begin(made, 1, [3], max_tokens=7, speculate=False),
    }
    while made.live:
        before = {slot: each.tokens for slot, each in kept.items()}
        stepped = made.step(lambda: True)
        for event in stepped.events:
            was_reading = before[event.slot] < kept[event.slot].prompt_end
            kept[event.slot].take(event, steps=stepped.steps)
            assert stepped.steps == 1 or not was_reading, "the first id is told at once, and a piece of a prompt ends a burst"
            assert len(event.sealed) <= 1 and len(event.rows) <= 128 * TINY.row_bytes
            if event.finish:
                assert len(kept[event.slot].ids) == kept[event.slot].prompt_end + (7 if event.slot else 90)
    assert len(kept[0].blocks) == 1


def test_a_burst_of_many_is_bounded_by_what_the_arena_holds() -> None:
    made = engine(Scripted(lambda ids: len(ids) % 13))
    kept = {slot: begin(made, slot, [1, 2, 3], max_tokens=100) for slot in range(8)}
    most_ids = most_bytes = 0
    while made.live:
        stepped = made.step(lambda: True)
        most_ids = max(most_ids, sum(len(event.ids) for event in stepped.events))
        most_bytes = max(most_bytes, sum(map(len, bulk_of(stepped.events))))
        for event in stepped.events:
            kept[event.slot].take(event, steps=stepped.steps)
    assert MAX_BURST_IDS <= most_ids < MAX_BURST_IDS + 8 * (1 + MAX_GUESSES)
    assert most_bytes <= step_bytes(TINY, 8)


def test_a_step_that_fails_late_in_a_burst_loses_nothing_of_the_steps_before_it() -> None:
    model = Scripted(lambda ids: len(ids) % 7)
    made = engine(model)
    kept = {slot: begin(made, slot, [1, 2, 3, 4, 5, slot], max_tokens=60) for slot in (0, 1)}
    run(made, kept, 3)

    def failing() -> bool:
        model.fails = stepping.pop()
        return True

    stepping = [True, False, False]
    stepped = made.step(failing)
    assert (stepped.steps, stepped.live) == (3, 2)
    for event in stepped.events:
        kept[event.slot].take(event, steps=3)
    with pytest.raises(RuntimeError, match="no step now"):
        made.step()
    assert made.live == 0
    for slot, each in kept.items():
        assert each.ids == [1, 2, 3, 4, 5, slot, *(n % 7 for n in range(6, len(each.ids)))]


def test_a_turn_that_fails_in_a_burst_has_told_the_rows_of_the_steps_before_it() -> None:
    made = engine(Scripted(lambda ids: None if len(ids) > 20 else 2))
    kept = begin(made, 0, [9] * 8, speculate=False)
    run(made, {0: kept}, 1)
    (event,) = made.step(lambda: True).events
    kept.take(event)
    assert event.failed and len(event.ids) == 12 == len(event.rows) // TINY.row_bytes
    kept.must_be_whole()


def told() -> list[TurnEvent]:
    made = engine()
    kept = {slot: begin(made, slot, text(66, 8, slot), max_tokens=90) for slot in (0, 1)}
    found: list[TurnEvent] = []
    while made.live:
        events = made.step().events
        if len(events) == 2 and any(event.sealed for event in events):
            found = events
        for event in events:
            kept[event.slot].take(event)
    return found


def test_events_cross_as_bodies_and_bulk() -> None:
    events = told()
    assert any(event.rows for event in events) and any(event.sealed for event in events)
    assert from_bodies([to_body(each) for each in events], b"".join(bulk_of(events)), TINY, 8) == tuple(events)


def test_an_event_that_lies_is_refused() -> None:
    events = told()
    bodies, bulk = [to_body(each) for each in events], b"".join(bulk_of(events))
    lies: list[tuple[int, object]] = [
        (0, 0), (0, 1),
        (0, 8), (0, -1), (0, True), (1, -1), (1, 2**40), (1, 3), (2, [64]), (2, [-1]), (2, [1.0]), (2, 5), (2, [1] * 300),
        (3, 5), (3, "x" * 100_000), (4, "because"), (4, 1), (5, -1), (6, 9), (7, 0), (7, 10**6), (8, 1), (8, -TINY.row_bytes),
        (8, 2**40), (8, 0), (9, 5), (9, [[0, 1]]), (9, [[99, TINY.block_bytes]]), (9, [[0, TINY.block_bytes]] * 3), (10, 1),
        (10, TINY.prelude_bytes), (11, 5), (11, "x" * 1000),
    ]  # fmt: skip
    for place, lie in lies:
        for number, body in enumerate(bodies):
            wrong = [*body[:place], lie, *body[place + 1 :]]
            if wrong != body:
                with pytest.raises(RefusedError):
                    from_bodies([*bodies[:number], wrong, *bodies[number + 1 :]], bulk, TINY, 8)
    for said, data in (([*bodies, bodies[0]], bulk), (bodies, bulk + b"x"), (bodies, bulk[:-1]), (bodies[:1], bulk), ({}, bulk)):
        with pytest.raises(RefusedError):
            from_bodies(said, data, TINY, 8)


QUOTED = """def add(a, b):
    return a + b


def subtract(a, b):
    return a - b
"""


def test_smollm2_quotes_a_text_in_fewer_steps_with_the_very_ids_that_it_says_without_guesses() -> None:
    needs_module("ai_edge_litert", "dev")
    built = smollm2()
    tokenizer = Tokenizer.from_bytes(built.tokenizer_path.read_bytes())
    shape = built.card.shape
    interpreter = importlib.import_module("ai_edge_litert.interpreter")
    decoder = Decoder(open_stages(interpreter, str(built.stages(LITERT)), shape, 1, LITERT), shape)
    prompt = tokenizer.encode(QUOTED * 3)
    steps, ids = {}, {}
    for speculate in (False, True):
        made = engine(decoder, most_chunk=68, token_bytes=tokenizer.token_bytes)
        kept = begin(made, 0, prompt, max_tokens=60, speculate=speculate)
        steps[speculate] = 0
        while made.live:
            kept.take(made.step().events[0])
            steps[speculate] += 1
        ids[speculate] = kept.ids[len(prompt) :]
    assert ids[True] == ids[False] and "return a" in tokenizer.decode(ids[True])
    assert steps[True] < 0.7 * steps[False]
