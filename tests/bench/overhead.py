"""What the agent adds to an inference: p50 of a request through it, against the bare interpreter on the same model and input.

How: the agent runs in this process with one hosted model and its engine child; a client in this process awaits
``Agent.submit`` for the task ``invoke`` (the model's own input tensor in, its own output tensors out).  The board is a
Raspberry Pi on a fabricated ``/sys``, because an emulated one computes time and heat, which metal does not.  The bare interpreter
loops in a process of its own.  Rounds of both alternate, so that what else the machine does falls on both; each round gives
one ratio and one difference of its two medians, and the figure is the median over the rounds.

An engine in a process of its own is woken, and wakes the asker.  What that costs on this machine, without any agent, is
measured too: the bare interpreter is asked for one inference at a time over a pipe, and the way there and back is a row.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from random import Random

from board_support.board import BoardSettings
from board_support.raspberry_pi import RaspberryPi
from edge_agent.agent import Agent
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import INVOKE, InferenceRequest, Status, Tensor
from models.card import Card
from models.catalog import card
from models.fetch import fetch
from tests.bench import synthetic
from tests.bench.bare import BareInterpreter
from tests.bench.cold import PAUSE_S, cold_factor
from tests.bench.figures import Figure, Progress, p50
from tests.trees import plant, raspberry_pi_files

RATIO_GOAL, ADDED_GOAL_US = 1.05, 300.0
RATIO_FROM_US = 10_000
"""The goal for the ratio is for models that take at least this long."""
SYNTHETIC_LAYERS = 36
"""About 12 ms on a core of an AMD EPYC."""
ROUNDS, WARM_UP_ROUNDS = 24, 3
ROUND_US = 60_000
"""A round is as many inferences as fill this time, but at least ``MIN_INFERENCES``."""
MIN_INFERENCES = 5


@dataclass(frozen=True, slots=True)
class Rounds:
    """Medians in µs, round by round."""

    bare: list[float]
    woken: list[float]
    way: list[float]
    agent: list[float]

    @property
    def ratio(self) -> float:
        return p50(agent / bare for agent, bare in zip(self.agent, self.bare, strict=True))

    @property
    def added_us(self) -> float:
        return p50(agent - bare for agent, bare in zip(self.agent, self.bare, strict=True))


def measure(progress: Progress) -> Iterator[Figure]:
    progress("how cold code gets here")
    yield Figure(f"this machine: any code {PAUSE_S * 1000:g} ms after its last run / at once", cold_factor(), "")
    with tempfile.TemporaryDirectory(prefix="sly-bench-") as name:
        folder = Path(name)
        for real in ("mobilenet-vww", "blazeface-short", "blazeface-back"):
            yield from _figures(real, _compared(card(real), fetch(card(real), report=progress), folder / real, progress))
        with synthetic.hosted(folder, SYNTHETIC_LAYERS) as model:
            yield from _figures(synthetic.NAME, _compared(card(synthetic.NAME), model, folder / synthetic.NAME, progress))


def _figures(model: str, rounds: Rounds) -> Iterator[Figure]:
    bare_us = p50(rounds.bare)
    yield Figure(f"{model}: bare interpreter, p50", bare_us, "µs")
    yield Figure(f"{model}: the same, woken for each inference, p50", p50(rounds.woken), "µs")
    yield Figure(f"{model}: way to another process and back over a pipe, no agent, p50", p50(rounds.way), "µs")
    yield Figure(f"{model}: added by the agent, p50", rounds.added_us, "µs", ADDED_GOAL_US)
    yield Figure(f"{model}: agent / bare", rounds.ratio, "", RATIO_GOAL if bare_us >= RATIO_FROM_US else None)


def _compared(model: Card, path: Path, folder: Path, progress: Progress) -> Rounds:
    folder.mkdir()
    tensor = random_input(model)
    (folder / "input").write_bytes(tensor.data)
    with BareInterpreter(path, folder / "input") as bare:
        return asyncio.run(_alternating(model, tensor, bare, folder, path.parent, progress))


async def _alternating(
    model: Card, tensor: Tensor, bare: BareInterpreter, folder: Path, models: Path, progress: Progress
) -> Rounds:
    rounds = Rounds([], [], [], [])
    inferences = max(MIN_INFERENCES, int(ROUND_US / p50(bare.round(MIN_INFERENCES))))
    board = RaspberryPi(BoardSettings(root=plant(folder / "root", raspberry_pi_files())))
    async with Agent(configuration(model.name, folder / "state", models), lambda line: None, board=board) as agent:
        for number in range(-WARM_UP_ROUNDS, ROUNDS):
            progress(f"{model.name}, round {max(number + 1, 0)} of {ROUNDS}")
            of_bare = p50(bare.round(inferences))
            of_agent = p50(await _round(agent, model, tensor, inferences))
            asked = [bare.asked() for _ in range(inferences)]
            if number >= 0:
                rounds.bare.append(of_bare)
                rounds.agent.append(of_agent)
                rounds.woken.append(p50(inside_us for inside_us, _ in asked))
                rounds.way.append(p50(way_us for _, way_us in asked))
    return rounds


async def _round(agent: Agent, model: Card, tensor: Tensor, inferences: int) -> list[float]:
    samples = []
    inputs = {model.inputs[0].name: tensor}
    for _ in range(inferences):
        started_ns = time.perf_counter_ns()
        result = await agent.submit(InferenceRequest(os.urandom(16).hex(), INVOKE, inputs, model.name))
        samples.append((time.perf_counter_ns() - started_ns) / 1000)
        if result.status is not Status.OK:
            raise UnavailableError(f"agent with {model.name}", f"{result.status.value}: {result.reason}")
    return samples


def configuration(model: str, state: Path, models: Path) -> AgentConfig:
    return AgentConfig.from_mapping(
        {
            "board": {"id": "bench"},
            "state": {"folder": str(state)},
            "models": {"serve": [model], "folder": str(models)},
        }
    )


def random_input(model: Card) -> Tensor:
    """A tensor of the model's first input: noise in [-1, 1) or any bytes, the same every time."""
    spec, random = model.inputs[0], Random(1)
    count = prod(spec.shape)
    if spec.dtype == "float32":
        return Tensor(spec.dtype, spec.shape, array("f", (random.uniform(-1, 1) for _ in range(count))).tobytes())
    return Tensor(spec.dtype, spec.shape, random.randbytes(count))
