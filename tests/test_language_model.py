"""SmolLM2 as it is served, against its float reference: the int8 stages, the int8 ring, int4 blocks, on each runtime."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.language.decoder import Decoder, Segment
from edge_agent.language.stages import open_stages
from models.gguf import Gguf
from models.llama_gguf import LlamaGguf
from tests.fetched import smollm2, smollm2_gguf
from tests.llama_reference import cosines, logits
from tests.rings import Session, same_ring
from tests.sandboxes import INSTALLED

Floats = NDArray[np.float32]
TOKENS = {"ai_edge_litert": 1_600, "tflite_runtime": 1_600}
WINDOW_BLOCKS = 32
HOT_PERCENT, PARKED_PERCENT = 1.5, 2.5
LEAST_COSINE = 0.99


class Reading(NamedTuple):
    """What a session thought of each next token, in nats, how near its logits were, and the session."""

    surprise: Floats
    cosine: Floats
    session: Session


@cache
def ids() -> list[int]:
    text = (Path(__file__).parent / "data" / "alice.txt").read_text()
    found = smollm2().tokenizer().encode(text)
    assert len(found) > 1_600
    return found[:1_601]


@cache
def reference() -> Floats:
    with Gguf(smollm2_gguf()) as gguf:
        weights = LlamaGguf(gguf)
        return np.asarray(logits(weights, weights.shape, ids()), np.float32)


@cache
def decoder(runtime: str) -> Decoder:
    built = smollm2()
    shape = built.card.shape
    module = importlib.import_module(f"{runtime}.interpreter")
    threads = 1 if runtime == "tflite_runtime" else 2  # two threads make its int32 products slower
    return Decoder(open_stages(module, str(built.stages(runtime)), shape, threads, runtime), shape, threads)


def surprise(rows: Floats, first: int) -> Floats:
    z = rows - rows.max(-1, keepdims=True)
    told = z[np.arange(len(rows)), ids()[first + 1 : first + 1 + len(rows)]]
    return np.asarray(np.log(np.exp(z).sum(-1)) - told, np.float32)


def read(session: Session, last: int) -> Reading:
    surprises, near = [], []
    while (first := session.ring.tokens) < last:
        rows = session.read(ids()[first : first + min(session.ring.room, last - first)])
        surprises.append(surprise(rows, first))
        near.append(cosines(rows, reference()[first : first + len(rows)]))
    return Reading(np.concatenate(surprises), np.concatenate(near), session)


@cache
def halves(runtime: str) -> tuple[Reading, Session, Reading]:
    """The first half, the session as it was restored there, and the second half of the one that went on."""
    session = Session(decoder(runtime), decoder(runtime).shape, WINDOW_BLOCKS)
    first = read(session, 830)
    restored = session.resumed()
    return first, restored, read(session, 1_600)


def percent_over_float(surprises: Floats) -> float:
    floats = surprise(reference()[:1_600], 0)
    return float(np.expm1(surprises.mean() - floats.mean()) * 100)


@pytest.fixture(params=INSTALLED)
def runtime(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@pytest.mark.long
def test_logits_point_where_the_float_reference_points(runtime: str) -> None:
    first, _, second = halves(runtime)
    cosine = np.concatenate((first.cosine, second.cosine))
    print(f"{runtime}: cosine to float, mean {cosine.mean():.4f}, least {cosine.min():.4f}")
    assert cosine.mean() >= LEAST_COSINE


@pytest.mark.long
def test_perplexity_with_the_hot_ring_is_near_the_float_reference(runtime: str) -> None:
    first, _, second = halves(runtime)
    over = percent_over_float(np.concatenate((first.surprise, second.surprise)))
    print(f"{runtime}: perplexity {over:+.2f} % over float's {np.exp(surprise(reference()[:1_600], 0).mean()):.3f}, hot")
    assert over <= HOT_PERCENT


@pytest.mark.long
def test_perplexity_of_a_session_parked_and_restored_once_is_near_the_float_reference(runtime: str) -> None:
    first, restored, second = halves(runtime)
    again = read(restored, 1_600)
    over = percent_over_float(np.concatenate((first.surprise, again.surprise)))
    print(f"{runtime}: perplexity {over:+.2f} % over float, parked and restored at 830 tokens")
    assert over <= PARKED_PERCENT
    assert np.array_equal(again.surprise, second.surprise)
    assert same_ring(again.session.ring, second.session.ring)


def test_a_prompt_is_the_same_bits_wherever_it_is_cut(runtime: str) -> None:
    made = [Session(decoder(runtime), decoder(runtime).shape, 2) for _ in range(4)]
    whole, *cut = made
    one = whole.read(ids()[:150])
    for each, step in zip(cut, (1, 13, 50), strict=True):
        assert np.array_equal(one, each.read(ids()[:150], step))
        assert same_ring(whole.ring, each.ring)


def test_guesses_and_neighbours_change_no_bit_of_a_row(runtime: str) -> None:
    made = [Session(decoder(runtime), decoder(runtime).shape, 2) for _ in range(4)]
    one, other, beside, prompt = made
    for each, count in ((one, 150), (other, 150), (beside, 70)):
        each.read(ids()[:count])
    guessed, piece = ids()[150:154], Segment(prompt.ring, ids()[:30], "none", prompt=True)
    together, _, _ = decoder(runtime).step([Segment(one.ring, guessed, "all"), piece, Segment(beside.ring, [5], "last")])
    alone = np.concatenate([other.read([each], prompt=False) for each in guessed])
    assert np.array_equal(together, alone)
    assert same_ring(one.ring, other.ring)
    prompt.seal()
    prompt.read(ids()[30:90])
    whole = Session(decoder(runtime), decoder(runtime).shape, 2)
    whole.read(ids()[:90])
    assert same_ring(prompt.ring, whole.ring)
