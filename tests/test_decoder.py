"""The decoder: what a row gives does not depend on what shares its step."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.language import attention
from edge_agent.language.decoder import DECODE_ROWS, Decoder, Segment
from edge_agent.language.stages import open_stages
from tests.numpy_stages import TINY, NumpyStages
from tests.rings import Session, same_ring, text
from tests.sandboxes import INSTALLED
from tests.tiny_llama import tiny_model

Floats = NDArray[np.float32]


@pytest.fixture(scope="module", params=["numpy", *INSTALLED])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Of a tiny model, without a runtime and on each."""
    runtime = request.param
    if runtime == "numpy":
        return Decoder(NumpyStages(), TINY)
    card, paths = tiny_model(tmp_path_factory.mktemp(runtime))
    module, shape = importlib.import_module(f"{runtime}.interpreter"), card.shape
    return Decoder(open_stages(module, str(paths[runtime]), shape, 1, runtime), shape)


def sessions(decoder: Decoder, lengths: list[int], window_blocks: int = 2) -> list[Session]:
    made = [Session(decoder, decoder.shape, window_blocks) for _ in lengths]
    for number, (each, length) in enumerate(zip(made, lengths, strict=True)):
        each.read(text(length, decoder.shape.vocabulary, seed=number))
    return made


def alone(each: Session, ids: list[int]) -> Floats:
    """One by one."""
    return np.concatenate([each.decoder.step([Segment(each.ring, [i])])[0] for i in ids])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(4, 330), st.integers(1, DECODE_ROWS)), min_size=1, max_size=5), st.booleans())
def test_decoded_rows_are_the_same_bits_whatever_shares_their_step(
    decoder: Decoder, asked: list[tuple[int, int]], beside_a_prompt: bool
) -> None:
    together, apart = (sessions(decoder, [length for length, _ in asked]) for _ in range(2))
    guesses = [text(min(rows, each.ring.room), 64, rows) for each, (_, rows) in zip(together, asked, strict=True)]
    segments = [Segment(each.ring, ids, "all") for each, ids in zip(together, guesses, strict=True)]
    if beside_a_prompt:
        prompt = Session(decoder, decoder.shape, 2)
        segments.insert(len(segments) // 2, Segment(prompt.ring, text(40, 64), "none", prompt=True))
    logits = [each for each in decoder.step(segments) if len(each)]
    for one, ids, each, other in zip(logits, guesses, together, apart, strict=True):
        assert np.array_equal(one, alone(other, ids))
        assert same_ring(each.ring, other.ring)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 150), st.booleans()), min_size=1, max_size=5), st.data())
def test_a_prompt_gives_the_same_bits_wherever_it_is_cut_and_whatever_was_generated_before(
    decoder: Decoder, parts: list[tuple[int, bool]], data: st.DataObject
) -> None:
    whole, cut = sessions(decoder, [0, 0])
    for seed, (count, generated) in enumerate(parts):
        ids = text(count, decoder.shape.vocabulary, seed)
        if generated:
            assert np.array_equal(whole.read(ids, DECODE_ROWS, prompt=False), cut.read(ids, 1, prompt=False))
            continue
        pieces = [np.empty((0, decoder.shape.vocabulary), np.float32)]
        while ids:
            length = data.draw(st.integers(1, len(ids)))
            pieces.append(cut.read(ids[:length]))
            ids = ids[length:]
        one = whole.read(text(count, decoder.shape.vocabulary, seed))
        assert np.array_equal(one, np.concatenate(pieces))
    assert same_ring(whole.ring, cut.ring)


def test_a_prompt_read_in_company_gives_what_it_gives_alone(decoder: Decoder) -> None:
    lengths = [0, 97, 200]
    together, apart = sessions(decoder, lengths), sessions(decoder, lengths)
    ids = [text(count, decoder.shape.vocabulary, count) for count in (50, 35, 60)]
    for _ in range(2):
        logits = decoder.step([Segment(each.ring, part, "all", True) for each, part in zip(together, ids, strict=True)])
        for one, part, each, other in zip(logits, ids, together, apart, strict=True):
            each.seal()
            assert np.array_equal(one, other.read(part))
            assert same_ring(each.ring, other.ring)
        ids = [text(each.ring.room, decoder.shape.vocabulary, 5) for each in together]


@pytest.mark.parametrize("lengths", [(1, 16, 33), (64, 68, 5), (20, 2, 130)])
def test_a_second_thread_changes_no_bit_of_a_prompt(lengths: tuple[int, ...]) -> None:
    (one,), (other,) = (sessions(Decoder(NumpyStages(), TINY, threads), [0]) for threads in (1, 2))
    for length in lengths:
        ids = text(length, TINY.vocabulary, length)
        assert np.array_equal(one.read(ids), other.read(ids))
    assert same_ring(one.ring, other.ring)


def test_what_the_memory_of_a_ring_held_before_changes_no_bit(decoder: Decoder) -> None:
    clean, soiled = sessions(decoder, [0, 0])
    soiled.ring.values[...] = -128
    soiled.ring.scales[...] = np.nan
    for _ in range(3):
        ids = text(70, decoder.shape.vocabulary)
        assert np.array_equal(clean.read(ids, 7), soiled.read(ids, 7))
        assert np.array_equal(clean.read(ids[:3], prompt=False), soiled.read(ids[:3], prompt=False))
    assert same_ring(clean.ring, soiled.ring)


@pytest.mark.parametrize("slots", [1, 150, 400])
def test_rows_of_many_rings_are_computed_in_groups_with_the_same_bits(
    decoder: Decoder, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [20, 70, 200, 30, 120]
    together, apart = sessions(decoder, lengths), sessions(decoder, lengths)
    monkeypatch.setattr(attention, "GROUP_SLOTS", slots)
    lanes = [(each.ring, 2) for each in together]
    found = list(attention.groups(lanes))
    assert [lane for group in found for lane in group] == lanes
    assert all(len(group) == 1 or sum(ring.used + rows for ring, rows in group) <= slots for group in found)
    logits = decoder.step([Segment(each.ring, [7, 8], "all") for each in together])
    for one, each, other in zip(logits, together, apart, strict=True):
        assert np.array_equal(one, alone(other, [7, 8]))
        assert same_ring(each.ring, other.ring)


def test_read_and_generated_tokens_give_nearly_the_same(decoder: Decoder) -> None:
    ids = text(300, decoder.shape.vocabulary)
    chunks, steps = sessions(decoder, [0, 0])
    one, other = chunks.read(ids), steps.read(ids, 1, prompt=False)
    cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    assert cosine.mean() > 0.99
    assert cosine.min() > 0.9


def test_logits_come_in_the_order_that_was_asked_and_only_those(decoder: Decoder) -> None:
    one, two, three = sessions(decoder, [70, 9, 200])
    prompt, step, guess = decoder.step(
        [
            Segment(one.ring, text(20, 64), "last", prompt=True),
            Segment(two.ring, [5], "none"),
            Segment(three.ring, [1, 2, 3], "all"),
        ]
    )
    assert [len(each) for each in (prompt, step, guess)] == [1, 0, 3]
    assert np.array_equal(guess, alone(sessions(decoder, [0, 0, 200])[2], [1, 2, 3]))


def test_a_step_needs_a_segment_and_one_of_each_ring(decoder: Decoder) -> None:
    (one,) = sessions(decoder, [10])
    for wrong in ([], [Segment(one.ring, [1]), Segment(one.ring, [2])]):
        with pytest.raises(ValueError, match="one of each ring"):
            decoder.step(wrong)
    with pytest.raises(ValueError, match="takes 1 to 58"):
        Segment(one.ring, [1] * 59, prompt=True)
    with pytest.raises(ValueError, match=f"takes 1 to {DECODE_ROWS}"):
        Segment(one.ring, [1] * (DECODE_ROWS + 1))
    assert one.ring.tokens == 10
