"""The decoder: what a row gives does not depend on what shares its step."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.language.decoder import DECODE_ROWS, Decoder, Segment
from edge_agent.language.shape import ModelShape
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
    module, shape = importlib.import_module(f"{runtime}.interpreter"), ModelShape(**card.shape)
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
        segments.insert(len(segments) // 2, Segment(prompt.ring, text(40, 64), "none"))
    logits = [each for each in decoder.step(segments) if len(each)]
    for one, ids, each, other in zip(logits, guesses, together, apart, strict=True):
        assert np.array_equal(one, alone(other, ids))
        assert same_ring(each.ring, other.ring)


def test_a_prompt_read_in_chunks_gives_what_reading_token_by_token_gives(decoder: Decoder) -> None:
    ids = text(300, decoder.shape.vocabulary)
    chunks, steps = sessions(decoder, [0, 0])
    one, other = chunks.read(ids), steps.read(ids, 1)
    cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    assert cosine.mean() > 0.99
    assert cosine.min() > 0.9


def test_logits_come_in_the_order_that_was_asked_and_only_those(decoder: Decoder) -> None:
    one, two, three = sessions(decoder, [70, 9, 200])
    prompt, step, guess = decoder.step(
        [Segment(one.ring, text(20, 64), "last"), Segment(two.ring, [5], "none"), Segment(three.ring, [1, 2, 3], "all")]
    )
    assert [len(each) for each in (prompt, step, guess)] == [1, 0, 3]
    assert np.array_equal(guess, alone(sessions(decoder, [0, 0, 200])[2], [1, 2, 3]))


def test_a_step_needs_a_segment_and_one_of_each_ring(decoder: Decoder) -> None:
    (one,) = sessions(decoder, [10])
    for wrong in ([], [Segment(one.ring, [1]), Segment(one.ring, [2])]):
        with pytest.raises(ValueError, match="one of each ring"):
            decoder.step(wrong)
    with pytest.raises(ValueError, match="takes 1 to 58"):
        Segment(one.ring, [1] * 59)
    assert one.ring.tokens == 10
