"""Two real agents, a real broker and a real (tiny) language model: talk that crosses boards, and KV that follows it."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from board_support.board import Sensors
from edge_agent.agent import Agent
from edge_agent.core.chat import ChatMessage, Tier, Turn, TurnEnd
from edge_agent.core.config import AgentConfig
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.core.kv import session_hash
from edge_agent.node.events import KvGave, KvGive
from edge_agent.store.identity import load_or_make_seed
from tests.brokers import Relay, mosquitto
from tests.needs import needs_module
from tests.tiny_llama import PLAIN, tiny_model

WAIT_S = 90.0
QUESTION = "Tell me about the sea and the ships on it, please. " * 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_module("ai_edge_litert", "dev")
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder, says=PLAIN)
    return folder


def keys(folder: Path, boards: tuple[str, ...]) -> dict[str, str]:
    for board in boards:
        (folder / board).mkdir(mode=0o700, exist_ok=True)
    seeds = {board: load_or_make_seed(folder / board / "identity.key") for board in boards}
    return {board: Signer(board.encode(), seed).public_key.hex() for board, seed in seeds.items()}


@asynccontextmanager
async def agents(
    folder: Path, models: Path, ports: dict[str, int], serve: dict[str, list[str]] | None = None, **sections: object
) -> AsyncIterator[dict[str, Agent]]:
    """An agent for each board of ``ports``, which know each other; a port of 0 stands for no broker."""
    members = keys(folder, tuple(ports))
    running: dict[str, Agent] = {}
    try:
        for board, port in ports.items():
            config = {
                "board": {"id": board, "backend": "jalapeno"},
                "state": {"folder": str(folder / board)},
                "models": {"serve": (serve or {}).get(board, ["tiny"]), "folder": str(models)},
                "fleet": {"members": members},
                "broker": {"host": "127.0.0.1", "port": port, "keepalive_s": 5, "reconnect_max_ms": 200} if port else {},
                **sections,
            }
            running[board] = await Agent(AgentConfig.from_mapping(config), lambda text: None).__aenter__()
        for agent in running.values():
            await agent.work.until(lambda agent=agent: agent.node.online_boards == len(ports) or not all(ports.values()))  # type: ignore[misc]
        yield running
    finally:
        for agent in running.values():
            await agent.__aexit__(None, None, None)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WAIT_S):
            await scene()

    asyncio.run(limited())


def turn(text: str, tokens: int = 60, session: str = "s") -> Turn:
    return Turn((ChatMessage("user", text),), max_tokens=tokens, session=session)


async def said(agent: Agent, asked: Turn) -> tuple[str, TurnEnd]:
    text = ""
    async for part in agent.talk(asked):
        if isinstance(part, TurnEnd):
            return text, part
        text += part.text
    raise AssertionError("no end")


async def alone(folder: Path, models: Path, *turns: Turn) -> list[TurnEnd]:
    """What one board says that never stopped and never moved anything."""
    async with agents(folder, models, {"alone": 0}) as running:
        return [(await said(running["alone"], each))[1] for each in turns]


async def make_hot(agent: Agent) -> None:
    """Nothing new is placed on this board any more."""
    agent.board.read_sensors = lambda now_us: Sensors(84_900, 85_000)  # type: ignore[method-assign]
    await agent.heartbeat.read_sensors()


async def knows_home(agent: Agent, board: str, session: str) -> None:
    def known() -> bool:
        records = {record.board: record for record in agent.node.fleet.records()}
        return any(state.home(session_hash(session)) for state in records[board].kv)

    await agent.work.until(known)


def test_talk_is_served_by_the_board_that_has_the_model_and_streams_to_the_one_that_was_asked(
    tmp_path: Path, models: Path
) -> None:
    async def scene() -> None:
        with mosquitto(tmp_path / "broker") as broker:
            ports = {"a": broker.port, "b": broker.port}
            async with agents(tmp_path, models, ports, {"a": []}) as running:
                a, b = running["a"], running["b"]
                await a.work.until(lambda: bool(a.models()))
                parts = 0
                async for part in a.talk(turn(QUESTION, 200)):
                    if isinstance(part, TurnEnd):
                        end = part
                    else:
                        parts += 1
                assert parts > 1, "it came while it was made"
                await knows_home(a, "b", "s")
                again = (await said(a, turn("And now?", 10)))[1]
                assert again.cached_tokens >= end.prompt_tokens + end.completion_tokens - 1
                assert await a.ready() == "" and not a.host.speakers and b.node.idle

    play(scene)


def test_a_turn_that_is_placed_elsewhere_takes_its_sessions_kv_along_and_nothing_is_computed_again(
    tmp_path: Path, models: Path
) -> None:
    async def scene() -> None:
        first, second, third = turn(QUESTION), turn("Go on, and say why."), turn("Once more!")
        expected = await alone(tmp_path, models, first, second, third)
        with mosquitto(tmp_path / "broker") as broker:
            async with agents(tmp_path, models, {"a": broker.port, "b": broker.port}) as running:
                a, b = running["a"], running["b"]
                assert (await said(a, first))[1].text == expected[0].text
                await knows_home(b, "a", "s")
                await make_hot(a)
                text, end = await said(a, second)
                option = next(reversed(a.node.decisions.values())).chosen
                assert option is not None and (option.board, option.kv.action, option.kv.source) == ("b", "peer", "a")
                assert end.text == text == expected[1].text, "the same greedy answer"
                assert (end.tier, end.recomputed_tokens, end.cached_tokens) == (Tier.PEER, 0, expected[1].cached_tokens)
                assert b.node.moves.counts[0] == 1
                await a.work.until(lambda: a.node.moves.counts[2] == 1)
                assert [kept[0] for kept in b.host.speakers["tiny"].sessions()] == ["s"]
                assert not a.host.speakers["tiny"].sessions(), "its home has given it up"
                assert (await said(a, third))[1].text == expected[2].text

    play(scene)


def test_a_session_outlives_its_agent_is_listed_and_can_be_forgotten(tmp_path: Path, models: Path) -> None:
    async def scene() -> None:
        first, second = turn(QUESTION), turn("Go on.")
        expected = await alone(tmp_path, models, first, second)
        async with agents(tmp_path, models, {"a": 0}) as running:
            assert (await said(running["a"], first))[1].text == expected[0].text
        async with agents(tmp_path, models, {"a": 0}) as running:
            a = running["a"]
            (kept,) = await a.verbs.handle("sessions", None)  # type: ignore[misc]
            tokens = expected[0].prompt_tokens + expected[0].completion_tokens - 1
            assert kept[:2] == ["s", tokens] and kept[2] > 0 and kept[3] == "disk"
            end = (await said(a, second))[1]
            assert (end.text, end.recomputed_tokens, end.tier) == (expected[1].text, 0, Tier.DISK)
            await a.verbs.handle("drop", "s")
            assert await a.verbs.handle("sessions", None) == []
            with pytest.raises(RefusedError, match="session: got s"):
                await a.verbs.handle("drop", "s")
            assert (await said(a, first))[1].text == expected[0].text, "a session of this name begins anew"

    play(scene)


def test_the_gateway_of_an_agent_speaks_http(tmp_path: Path, models: Path) -> None:
    needs_module("starlette", "gateway")

    def ask(port: int) -> dict[str, Any]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        posted = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(posted, timeout=WAIT_S) as answer:
            return dict(json.load(answer))

    async def scene() -> None:
        async with agents(tmp_path, models, {"a": 0}, gateway={"on": True, "port": 0}) as running:
            answer = await asyncio.to_thread(ask, running["a"].gateway_port)
            assert answer["usage"]["completion_tokens"] == 5

    play(scene)


def test_a_holder_that_goes_in_the_middle_of_a_move_leaves_a_turn_that_computes_what_did_not_come(
    tmp_path: Path, models: Path
) -> None:
    async def scene() -> None:
        first, second = turn(QUESTION), turn("Go on.")
        with mosquitto(tmp_path / "broker") as broker:
            relay = Relay(broker.port)
            async with agents(tmp_path, models, {"a": relay.port, "b": broker.port}) as running:
                a, b = running["a"], running["b"]
                await said(a, first)
                await knows_home(b, "a", "s")
                give = a.host.give

                async def vanish(effect: KvGive) -> KvGave:
                    relay.cut()
                    return await give(effect)

                a.host.give = vanish  # type: ignore[method-assign]
                await make_hot(a)
                await b.work.until(lambda: any(each.headroom_mdegc == 100 for each in b.node.fleet.records()))
                end = (await said(b, second))[1]
                assert end.text and end.cached_tokens == 0 and b.node.moves.counts[:2] == (0, 1)
            relay.close()

    play(scene)
