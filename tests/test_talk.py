"""Turns of talk through a real agent: parts as they are made, many at once, broken off when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from edge_agent.agent import Agent
from edge_agent.core.chat import ChatMessage, Sampling, Turn, TurnEnd, TurnPart
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.gateway.local import LocalConnection
from edge_agent.gateway.local_talk import talk_over
from edge_agent.shell.door import SOCKET_NAME
from tests.scripted_speaker import REFUSED_PROMPT, TALK_OFFER, Parrot, answer_to

WAIT_S = 60.0


def in_agent(
    folder: Path,
    scene: Callable[[Agent, Parrot], Awaitable[None]],
    parrot: Callable[[], Parrot] = Parrot,
    log: Callable[[str], None] = lambda text: None,
) -> None:
    async def play() -> None:
        config = {
            "board": {"id": "kitchen", "backend": "jalapeno"}, "state": {"folder": str(folder)},
            "models": {"releases": [TALK_OFFER.digest.hex()]},
        }  # fmt: skip
        async with asyncio.timeout(WAIT_S), Agent(AgentConfig.from_mapping(config), log) as agent:
            speaker = parrot()
            agent.host_speaker(TALK_OFFER, speaker)
            await scene(agent, speaker)

    asyncio.run(play())


def turn(text: str = "hello", tokens: int = 20, **settings: object) -> Turn:
    return Turn((ChatMessage("user", text),), max_tokens=tokens, **settings)  # type: ignore[arg-type]


async def heard(agent: Agent, asked: Turn, model: str | None = None) -> tuple[str, TurnEnd]:
    """The text of all parts, and the end."""
    text, tokens = "", 0
    async for part in agent.talk(asked, model):
        if isinstance(part, TurnEnd):
            assert tokens == part.completion_tokens
            return text, part
        text, tokens = text + part.text, tokens + part.tokens
    raise AssertionError("no end")


def test_a_turn_streams_and_its_end_holds_the_whole(tmp_path: Path) -> None:
    async def scene(agent: Agent, parrot: Parrot) -> None:
        text, end = await heard(agent, turn())
        assert text == end.text == answer_to(turn())[0]
        assert agent.models() == ["parrot"] and await agent.ready() == ""
        assert {each.name for each in agent.figures()} >= {"turns", "jobs_running"}

    in_agent(tmp_path, scene)


def test_text_comes_while_the_answer_is_being_made(tmp_path: Path) -> None:
    async def scene(agent: Agent, parrot: Parrot) -> None:
        async with aclosing(agent.talk(turn())) as parts:
            first = [await anext(parts) for _ in range(5)]
            await parrot.held.wait()
            assert all(isinstance(part, TurnPart) for part in first) and parrot.talking == 1
            parrot.gate.set()
            rest = [part async for part in parts]
        assert isinstance(rest[-1], TurnEnd) and len(first) + len(rest) == 21

    in_agent(tmp_path, scene, lambda: Parrot(hold_after=5))


def test_four_turns_run_at_once_and_the_fifth_waits_for_a_place(tmp_path: Path) -> None:
    async def scene(agent: Agent, parrot: Parrot) -> None:
        talks = [asyncio.create_task(heard(agent, turn(f"say {i}"))) for i in range(6)]
        await parrot.held.wait()
        while parrot.talking < 4:
            await asyncio.sleep(0)
        assert agent.node.execution.running == 4 and len(agent.node.execution) == 2
        parrot.gate.set()
        for i, (text, end) in enumerate(await asyncio.gather(*talks)):
            assert text == end.text == answer_to(turn(f"say {i}"))[0]
        assert parrot.most_talking == 4 and agent.node.idle

    in_agent(tmp_path, scene, lambda: Parrot(hold_after=3))


def test_a_client_that_leaves_frees_its_place_at_once_and_its_turns_end_is_no_news(tmp_path: Path) -> None:
    log: list[str] = []

    async def scene(agent: Agent, parrot: Parrot) -> None:
        async with aclosing(agent.talk(turn())) as parts:
            await anext(parts)
            await parrot.held.wait()
        while not agent.node.idle:
            await asyncio.sleep(0)
        assert parrot.broken_off == 1 and parrot.talking == 0
        parrot.hold_after = None
        assert (await heard(agent, turn()))[0]

    in_agent(tmp_path, scene, lambda: Parrot(hold_after=3), log.append)
    assert log and not [line for line in log if "dropped" in line]


def test_a_turn_that_is_abandoned_before_it_runs_leaves_nothing(tmp_path: Path) -> None:
    async def scene(agent: Agent, parrot: Parrot) -> None:
        for _ in range(3):
            talk = asyncio.create_task(heard(agent, turn()))
            await asyncio.sleep(0)
            talk.cancel()
            await asyncio.gather(talk, return_exceptions=True)
        while not agent.node.idle:
            await asyncio.sleep(0)
        assert parrot.talking == 0 and not agent.faulty

    in_agent(tmp_path, scene)


def test_what_the_model_refuses_is_refused_and_an_unknown_model_is_named(tmp_path: Path) -> None:
    async def scene(agent: Agent, parrot: Parrot) -> None:
        with pytest.raises(RefusedError, match="prompt: got one that is refused"):
            await heard(agent, turn(REFUSED_PROMPT))
        with pytest.raises(RefusedError, match="chat model: got owl; allowed: parrot"):
            await heard(agent, turn(), "owl")
        assert agent.node.idle

    in_agent(tmp_path, scene)


def test_a_sampled_turn_without_a_seed_gets_one_that_every_board_can_draw_with(tmp_path: Path) -> None:
    async def scene(agent: Agent, parrot: Parrot) -> None:
        await heard(agent, turn(sampling=Sampling(700)))
        await heard(agent, turn(sampling=Sampling(700, seed=5)))
        assert parrot.heard[0].sampling.seed is not None and parrot.heard[1].sampling.seed == 5

    in_agent(tmp_path, scene)


def test_a_board_that_drains_takes_no_turn_and_finishes_those_it_has(tmp_path: Path) -> None:
    async def scene(agent: Agent, parrot: Parrot) -> None:
        talk = asyncio.create_task(heard(agent, turn()))
        await parrot.held.wait()
        draining = asyncio.create_task(agent.drain())
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="draining: "):
            await heard(agent, turn())
        parrot.gate.set()
        assert (await talk)[0] == answer_to(turn())[0]
        await draining

    in_agent(tmp_path, scene, lambda: Parrot(hold_after=3))


def test_the_local_socket_streams_too(tmp_path: Path) -> None:
    def ask() -> tuple[list[TurnPart], TurnEnd]:
        parts: list[TurnPart] = []
        with LocalConnection(tmp_path / SOCKET_NAME) as connection:
            stream = talk_over(connection, turn())
            while True:
                try:
                    parts.append(next(stream))
                except StopIteration as ended:
                    return parts, ended.value

    async def scene(agent: Agent, parrot: Parrot) -> None:
        parts, end = await asyncio.to_thread(ask)
        assert "".join(part.text for part in parts) == end.text == answer_to(turn())[0]
        assert len(parts) > 1

    in_agent(tmp_path, scene)
