"""No engine child outlives its agent, whatever it is doing when the agent is killed."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys

import pytest

WAIT_S = 30.0

_AGENT = """
import asyncio, sys
from edge_agent.runtime.settings import EngineSettings
from tests.sandboxes import child_pid, supervised
from tests.odd_engines import ROGUE
from tests.test_supervisor import order
from tests.tiny_models import tiny_model

async def live():
    async with supervised(tiny_model(), EngineSettings(engine=ROGUE)) as (supervisor, _, _):
        assert await order(supervisor, "hello") == "hello"
        if sys.argv[1] != "idle":
            busy = asyncio.create_task(order(supervisor, sys.argv[1]))
            await asyncio.sleep(0)
        print(child_pid(supervisor), flush=True)
        await asyncio.Event().wait()

asyncio.run(live())
"""


@pytest.mark.parametrize("doing", ["idle", "hang", "spin"])
def test_an_engine_child_ends_with_its_killed_agent(doing: str) -> None:
    with subprocess.Popen([sys.executable, "-c", _AGENT, doing], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        child = os.pidfd_open(int(agent.stdout.readline()))
        try:
            agent.kill()
            with selectors.DefaultSelector() as selector:
                selector.register(child, selectors.EVENT_READ)
                assert selector.select(WAIT_S), "the engine child lives on without its agent"
        finally:
            os.close(child)
