"""What guessing gains on text that repeats itself, and costs on prose that does not: SmolLM2 answers greedily, with and without.

How: in a process of its own with one NumPy thread, the same engine answers the same prompt with guesses and without by turns,
whole answers, ``ROUNDS`` times; a round's ratio is of the times from the first id to the last, the figure is the median of all.
Both answers must be the same ids.  Goals: guesses make a quote or an edit 1.5 times as fast, and prose at least 0.97 times.
"""

from __future__ import annotations

import importlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_agent.core.chat import ChatMessage
from edge_agent.core.model_shape import ModelShape, ring_bytes
from edge_agent.language import measuring
from edge_agent.language.costs import Costs
from edge_agent.language.decoder import Decoder
from edge_agent.language.engine import Engine, Options
from edge_agent.language.ring import Ring
from edge_agent.language.stages import open_stages
from tests.bench.apart import figures_of
from tests.bench.figures import Figure, Progress, progress
from tests.fetched import smollm2

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"
CODE = Path(__file__).with_name("figures.py")
ROUNDS, ANSWER_TOKENS, WINDOW_BLOCKS = 5, 160, 24
REPEATED_GOAL, PROSE_GOAL = 1 / 1.5, 1 / 0.97


def prompts() -> dict[str, tuple[str, float]]:
    """What is asked, and the most that an answer with guesses may take of one without."""
    paragraph = TEXT.read_text().split("\n\n")[1]
    tale = TEXT.read_text()[:4000]
    code = CODE.read_text().split("\n\n\n")
    part = next(each for each in code if each.startswith("def table"))
    return {
        "an edit of code": (f"Rewrite this code with `figures` renamed to `rows`:\n```python\n{part}\n```", REPEATED_GOAL),
        "a quote": (f"Repeat this text word for word:\n\n{paragraph}", REPEATED_GOAL),
        "prose, a tale": ("Tell a tale of a fox who learns to sail.", PROSE_GOAL),
        "prose over a long text": (f"{tale}\n\nTell in your own words what happens next.", PROSE_GOAL),
        "prose, advice": ("How do I bake bread at home? Explain every step.", PROSE_GOAL),
    }


def measure(progress: Progress) -> Iterator[Figure]:
    progress("SmolLM2")
    smollm2()
    yield from figures_of("tests.bench.speculation")


def main() -> None:
    built = smollm2()
    shape, tokenizer = built.card.shape, built.tokenizer()
    runtime = importlib.import_module("ai_edge_litert.interpreter")
    for threads in (1, 2):
        stages = open_stages(runtime, str(built.stages("ai_edge_litert")), shape, threads, "ai_edge_litert")
        decoder = Decoder(stages, shape, threads)
        costs = Costs(measuring.measured(decoder, _ring(shape)))
        for name, (asked, goal) in prompts().items():
            progress(f"{name}, {threads}")
            engine = Engine(
                decoder, lambda slot: _ring(shape), lambda slot: None, tokenizer.token_bytes, tokenizer.stop_ids, costs, 1, 68
            )  # fmt: skip
            prompt = tokenizer.render([ChatMessage("user", asked)])
            words = f"guesses on {name}, {threads} thread" + "s" * (threads > 1)
            for figure in compared(engine, prompt, words, goal):
                print(json.dumps(figure.as_json()), flush=True)


def compared(engine: Engine, prompt: list[int], words: str, goal: float) -> Iterator[Figure]:
    ratios = []
    for number in range(1 + ROUNDS):
        took = {way: answered(engine, prompt, way) for way in ((True, False) if number % 2 else (False, True))}
        assert took[True].ids == took[False].ids, "a guess changed an answer"
        ratios.append(took[True].seconds / took[False].seconds)
    last = took[True]
    yield Figure(f"{words}: time / time without", statistics.median(ratios[1:]), "", goal)
    yield Figure(f"{words}: ids a step", len(last.ids) / max(1, last.steps), "")
    yield Figure(f"{words}: guesses that came true", last.accepted / max(1, last.drafted), "")


@dataclass
class Answered:
    """``seconds`` from the first id to the last."""

    ids: tuple[int, ...]
    seconds: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0


def answered(engine: Engine, prompt: list[int], speculate: bool) -> Answered:
    engine.open(0, 0)
    engine.begin(0, prompt, Options(max_tokens=ANSWER_TOKENS, speculate=speculate))
    while not (ids := engine.step().events[0].ids):
        pass
    found = Answered(ids)
    start = time.perf_counter()
    while engine.live:
        (event,) = engine.step().events
        found.ids += event.ids
        found.steps, found.drafted, found.accepted = (
            found.steps + 1, found.drafted + event.drafted, found.accepted + event.accepted
        )  # fmt: skip
    found.seconds = time.perf_counter() - start
    return found


def _ring(shape: ModelShape) -> Ring:
    return Ring(bytearray(ring_bytes(shape, WINDOW_BLOCKS)), shape, WINDOW_BLOCKS)


if __name__ == "__main__":
    main()
