"""What the runtime's tests share: real children over real models, on one event loop a test."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
from array import array
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from math import prod
from typing import Any, TypeVar

import pytest

from edge_agent.core.values import DTYPE_BYTES, Tensor, TensorSpec
from edge_agent.runtime.settings import RUNTIMES, EngineSettings
from edge_agent.runtime.supervisor import EngineState, EngineSupervisor, Loaded
from models.card import Card

T = TypeVar("T")
PATIENCE_S = 60.0
BUDGET_US = 60_000_000
MODEL = "m"
DEFAULTS = EngineSettings()

INSTALLED = tuple(name for name in RUNTIMES[1:] if importlib.util.find_spec(name))
each_runtime = pytest.mark.parametrize("runtime", INSTALLED)


def run(story: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(PATIENCE_S):
            return await story

    return asyncio.run(bounded())


def model_file(model: bytes) -> int:
    """A descriptor that holds ``model``; the caller closes it."""
    fd = os.memfd_create("model", os.MFD_CLOEXEC)
    os.write(fd, model)
    return fd


async def load(supervisor: EngineSupervisor, model: bytes, name: str = MODEL, card: Card | None = None) -> Loaded:
    fd = model_file(model)
    try:
        return await supervisor.load(name, fd, hashlib.sha256(model).digest(), card)
    finally:
        os.close(fd)


class Reports(list[str]):
    """What a supervisor reported, line by line."""

    def count_of(self, words: str) -> int:
        return sum(words in line for line in self)


@asynccontextmanager
async def supervised(
    model: bytes, settings: EngineSettings = DEFAULTS, card: Card | None = None
) -> AsyncIterator[tuple[EngineSupervisor, Loaded, Reports]]:
    """A supervisor with ``model`` loaded under the name ``MODEL``."""
    reports = Reports()
    supervisor = EngineSupervisor(settings, report=reports.append)
    try:
        yield supervisor, await load(supervisor, model, card=card), reports
    finally:
        await supervisor.close()


def child_pid(supervisor: EngineSupervisor, name: str = MODEL) -> int:
    sandbox = supervisor._engines[name]._sandbox
    assert sandbox is not None
    return sandbox.pid


async def until_state(supervisor: EngineSupervisor, state: EngineState, name: str = MODEL) -> None:
    while supervisor.state(name) is not state:
        await asyncio.sleep(0.005)


def filled(spec: TensorSpec, value: float = 0.25, rows: int = 1) -> Tensor:
    """A tensor that fits ``spec`` with every element the same; dynamic dimensions get ``rows``."""
    shape = tuple(rows if n < 0 else n for n in spec.shape)
    if spec.dtype == "float32":
        return Tensor(spec.dtype, shape, array("f", [value] * prod(shape)).tobytes())
    return Tensor(spec.dtype, shape, bytes(prod(shape) * DTYPE_BYTES[spec.dtype]))


def words(text: str) -> Tensor:
    data = text.encode()
    return Tensor("uint8", (len(data),), data)
