"""The KV ring: what it holds is a function of the session's tokens, whether it was built, slid, parked or restored."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, block_start, sealed_blocks
from edge_agent.core.model_shape import ModelShape, ring_bytes, ring_slots
from edge_agent.language import int4
from edge_agent.language.decoder import Decoder, Segment
from edge_agent.language.int8 import int8_of
from edge_agent.language.ring import Ring
from edge_agent.language.rope import Rope, turned, turned_back
from tests.numpy_stages import TINY, NumpyStages
from tests.rings import Session, same_ring, text

Floats = NDArray[np.float32]
SMOLLM2 = ModelShape(30, 9, 3, 64, 576, 1536, 49152, 100_000, 8192)
WINDOW = 2
LENGTHS = (4, 5, 67, 68, 69, 131, 132, 133, 195, 196, 197, 260, 261, 324, 400, 700)
"""Around the sinks, a block's end, the first sealing, the window's end, and long after it."""


def session(window_blocks: int = WINDOW) -> Session:
    return Session(Decoder(NumpyStages(), TINY), TINY, window_blocks)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_restored_session_holds_bit_for_bit_what_the_one_that_never_stopped_holds(tokens: int) -> None:
    one = session()
    one.read(text(tokens, TINY.vocabulary))
    assert same_ring(one.ring, one.resumed().ring)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_restored_session_goes_on_as_the_one_that_never_stopped(tokens: int) -> None:
    one = session()
    last = one.read(text(tokens, TINY.vocabulary))[-1]
    other = one.resumed()
    assert one.greedy(last, 140) == other.greedy(last, 140)
    assert same_ring(one.ring, other.ring)


def test_a_session_that_is_parked_at_every_token_holds_what_the_one_that_never_stopped_holds() -> None:
    ids = text(420, TINY.vocabulary)
    one, other = session(), session()
    one.read(ids, 1)
    other.read(ids[:4], 1)
    for each in ids[4:]:
        other = other.resumed()
        other.read([each])
    assert same_ring(one.ring, other.ring)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=60))
def test_the_ring_does_not_depend_on_how_many_tokens_a_step_decodes(steps: list[int]) -> None:
    ids = text(sum(steps), TINY.vocabulary)
    one, other = session(1), session(1)
    one.read(ids, 1, prompt=False)
    for count in steps:
        other.read(ids[:count], prompt=False)
        ids = ids[count:]
    assert same_ring(one.ring, other.ring)


def test_a_rejected_guess_leaves_no_trace() -> None:
    one, other = session(), session()
    ids = text(200, TINY.vocabulary)
    for ring in (one, other):
        ring.read(ids)
    kept = one.ring.tokens
    one.decoder.step([_segment(one, [1, 2, 3, 4, 5])])
    one.ring.truncate(kept + 2)
    other.read([1, 2], prompt=False)
    assert same_ring(one.ring, other.ring)
    assert np.array_equal(one.read([9], prompt=False), other.read([9], prompt=False))


def test_sinks_are_rejected_like_any_guess() -> None:
    one, other = session(), session()
    one.read([1, 2])
    one.decoder.step([_segment(one, [7, 8, 9])])
    one.ring.truncate(2)
    other.read([1, 2])
    for each in (one, other):
        each.read([3, 4, 5])
    assert same_ring(one.ring, other.ring)


def test_sealed_tokens_cannot_be_rejected() -> None:
    one = session()
    one.read(text(140, TINY.vocabulary))
    assert one.ring.first_row == block_start(1)
    with pytest.raises(ValueError, match="68 to 140 are rows"):
        one.ring.truncate(67)
    with pytest.raises(ValueError, match="are rows"):
        one.ring.truncate(141)


def test_nothing_is_appended_past_a_block_that_waits_to_be_sealed() -> None:
    one = session()
    one.read(text(131, TINY.vocabulary))
    one.decoder.step([_segment(one, [1])])
    assert one.ring.room == 0
    with pytest.raises(ValueError, match="takes 1 to 0"):
        _segment(one, [1])
    one.seal()
    assert one.ring.room == BLOCK_TOKENS


def test_a_block_is_sealed_when_the_block_after_it_is_full() -> None:
    one = session()
    for tokens in range(1, 330):
        one.read([tokens % TINY.vocabulary])
        assert sorted(one.blocks) == list(range(sealed_blocks(tokens)))


@pytest.mark.parametrize("blocks", [2, 3, 4, 9])
def test_sealing_leaves_the_rows_that_stay_as_they_were(blocks: int) -> None:
    one = session()
    one.read(text(block_start(blocks) - 1, TINY.vocabulary))
    one.decoder.step([_segment(one, [1])])
    staying = (block_start(blocks - 1), block_start(blocks))
    before = one.ring.rows(*staying)
    assert [block for block, _ in one.ring.seal()] == [blocks - 2]
    assert one.ring.rows(*staying) == before


def test_the_window_never_grows_past_its_slots() -> None:
    one = session()
    most = 0
    for each in text(900, TINY.vocabulary):
        one.read([each])
        most = max(most, one.ring.used)
    assert most == ring_slots(WINDOW) - 1


def test_sizes_are_those_that_the_store_counts_on() -> None:
    one = session()
    one.read(text(300, TINY.vocabulary))
    prelude, blocks, rows = one.parked()
    assert len(prelude) == TINY.prelude_bytes
    assert {len(block) for block in one.blocks.values()} == {TINY.block_bytes}
    assert len(rows) == (300 - block_start(sealed_blocks(300))) * TINY.row_bytes
    assert len(blocks) == WINDOW


def test_a_real_block_has_the_bytes_that_are_published() -> None:
    assert SMOLLM2.block_bytes / BLOCK_TOKENS == 6_480
    for part in int4.parts(bytearray(SMOLLM2.block_bytes), SMOLLM2):
        assert part.nibbles.shape == (30, 3, BLOCK_TOKENS, 32)
    assert ring_bytes(SMOLLM2, 2) == ring_slots(2) * SMOLLM2.row_bytes + SMOLLM2.prelude_bytes


def test_the_bytes_of_a_block_are_all_used_and_none_twice() -> None:
    payload = bytearray(TINY.block_bytes)
    for part in int4.parts(payload, TINY):
        part.nibbles[:] += 1
        part.scales.view(np.uint8)[:] += 1
        part.zeros.view(np.uint8)[:] += 1
    assert payload == b"\1" * TINY.block_bytes


@pytest.mark.parametrize("which", [0, 1])
def test_int4_errs_by_at_most_half_a_step(which: int) -> None:
    part = int4.parts(bytearray(TINY.block_bytes), TINY)[which]
    x = np.random.default_rng(3).normal(size=(2, 2, BLOCK_TOKENS, 16)).astype(np.float32)
    step = (x.max(part.axis, keepdims=True) - x.min(part.axis, keepdims=True)) / int4.LEVELS
    part.encode(x.copy())
    assert (np.abs(part.decoded() - x) <= 0.51 * step + 0.002).all()


def test_a_constant_block_comes_back_as_it_was() -> None:
    part, _ = int4.parts(bytearray(TINY.block_bytes), TINY)
    part.encode(np.full((2, 2, BLOCK_TOKENS, 16), 0.5, np.float32))
    assert (part.decoded() == 0.5).all()


def test_a_vector_of_zeros_is_no_division_by_zero() -> None:
    whole, scale = int8_of(np.zeros((3, 8), np.float32))
    assert not whole.any()
    assert (scale > 0).all()


def test_turning_back_undoes_a_turn_at_any_position() -> None:
    rope = Rope(64, 100_000)
    x = np.random.default_rng(4).normal(size=(3, 5, 64)).astype(np.float32)
    angles = rope.angles(np.array([0, 1, 511, 100_003, 2**30]))
    assert np.allclose(turned_back(turned(x, *angles), *angles), x, atol=1e-5)


def test_scores_depend_on_distance_alone_however_far_the_session_has_come() -> None:
    rope = Rope(64, 100_000)
    q, k = np.random.default_rng(5).normal(size=(2, 64)).astype(np.float32)

    def score(at: int) -> float:
        (near,), (far,) = (turned(x[None], *rope.angles(np.array([p]))) for x, p in ((q, at), (k, at - 300)))
        return float(near @ far)

    assert score(100_000_000) == pytest.approx(score(300), abs=1e-4)


def test_sinks_stand_just_before_the_window() -> None:
    one = session()
    one.read(text(700, TINY.vocabulary))
    oldest = block_start(sealed_blocks(700) - WINDOW)
    angles = Rope(TINY.head_dim, TINY.rope_base).angles(np.arange(oldest - SINK_TOKENS, oldest))
    prelude = np.frombuffer(one.ring.prelude(), np.float16).reshape(2, 2, 2, SINK_TOKENS, TINY.head_dim).astype(np.float32)
    whole, scale = int8_of(turned(prelude[:, 0], *angles))
    assert np.array_equal(one.ring.values[:, 0, :, :SINK_TOKENS], whole)
    assert np.array_equal(one.ring.scales[:, 0, :, :SINK_TOKENS], scale)


def test_the_window_slides_without_drift_over_a_hundred_thousand_tokens() -> None:
    period = text(BLOCK_TOKENS * 5, TINY.vocabulary)
    one = session(3)
    one.read(text(SINK_TOKENS, TINY.vocabulary, seed=2))
    one.read(period)
    early = one.read(period)
    for _ in range(100_000 // len(period) - 3):
        one.blocks.clear()
        last = one.read(period)
    assert one.ring.tokens > 99_000
    assert _growth_bytes(one, period) < 100_000
    assert np.isfinite(last).all()
    assert _perplexity(last, period) == pytest.approx(_perplexity(early, period), rel=0.01)
    cosine = (early * last).sum(-1) / np.linalg.norm(early, axis=-1) / np.linalg.norm(last, axis=-1)
    assert cosine.min() > 0.995
    assert cosine.mean() > 0.999


def test_a_ring_refuses_what_does_not_fit() -> None:
    one = session()
    one.read(text(300, TINY.vocabulary))
    prelude, blocks, rows = one.parked()
    ring = session().ring
    for wrong in (
        (prelude[1:], blocks, rows),
        (prelude, blocks[1:], rows),
        (prelude, [blocks[0], blocks[1][1:]], rows),
        (prelude, blocks, rows[1:]),
    ):
        with pytest.raises(RefusedError):
            ring.restore(300, *wrong)
        assert ring.tokens == ring.used == 0


@pytest.mark.parametrize("part", ["prelude", "block", "rows"])
def test_numbers_that_are_none_are_refused(part: str) -> None:
    one = session()
    one.read(text(300, TINY.vocabulary))
    prelude, blocks, rows = one.parked()
    if part == "prelude":
        prelude = b"\xff" * len(prelude)
    elif part == "block":
        blocks = [blocks[0], b"\xff" * len(blocks[1])]
    else:
        rows = b"\xff" * len(rows)
    with pytest.raises(RefusedError, match="no number"):
        session().ring.restore(300, prelude, blocks, rows)


def test_a_ring_needs_memory_of_its_exact_size() -> None:
    with pytest.raises(ValueError, match="cannot lie in"):
        Ring(bytearray(ring_bytes(TINY, 2) - 1), TINY, 2)


def _growth_bytes(one: Session, period: list[int]) -> int:
    """How much more memory Python and NumPy hold after 3,200 tokens more."""
    one.blocks.clear()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10):
            one.read(period)
            one.blocks.clear()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def _segment(one: Session, ids: list[int]) -> Segment:
    return Segment(one.ring, ids)


def _perplexity(logits: Floats, ids: list[int]) -> float:
    z = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    return float(np.exp((np.log(np.exp(z).sum(-1)) - z[np.arange(len(ids) - 1), ids[1:]]).mean()))
