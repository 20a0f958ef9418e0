"""The cloud as an option of a board: what goes there and what never does, what it says, and endpoints that are not kind.

The board is a real agent; the endpoint is our own HTTP door over a scripted board, or bytes over a real socket.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import cli
from edge_agent.agent import Agent
from edge_agent.cloud import chat_api
from edge_agent.cloud.chat_api import Events
from edge_agent.cloud.endpoint import Endpoint, EndpointError, endpoint_of, name_of, offer_of
from edge_agent.cloud.exchange import _in_turn, connected
from edge_agent.cloud.speaker import CloudSpeaker
from edge_agent.configured import check
from edge_agent.core.chat import ChatMessage, Finish, Sampling, Turn, TurnEnd, TurnPart
from edge_agent.core.config import AgentConfig, CloudSection, GatewaySection
from edge_agent.core.errors import ConfigError, UnavailableError
from edge_agent.core.kv import KvState
from edge_agent.core.values import DataClass, EnergyKind, Limits, Status, TrustTier
from edge_agent.node.events import Execute
from edge_agent.node.streams import turn_request
from edge_agent.transport.backoff import BackoffLimits
from tests.certificates import Authority
from tests.needs import needs_module
from tests.scripted_speaker import TALK_OFFER, Parrot, answer_to
from tests.scripted_talker import LONG_S, MODEL, Served, served
from tests.strange_endpoint import (
    DONE,
    STREAM,
    Asked,
    Play,
    StrangeEndpoint,
    event,
    fine,
    holding,
    saying,
    status,
    strange_endpoint,
    word,
)

needs_module("h11", "cloud")
needs_module("uvicorn", "gateway")
TOKEN = "s3cret-of-the-cloud"
CLOUD = f"cloud.{MODEL}"
PUBLIC = DataClass.PUBLIC
WAIT_S = 60.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that asks again at once."""
    monkeypatch.setattr("edge_agent.cloud.speaker.LIMITS", BackoffLimits(1_000, 10_000))


def token_file(folder: Path, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(mode)
    return path


def config_of(folder: Path, url: str, **cloud: object) -> AgentConfig:
    section = {"on": True, "url": url, "model": MODEL, "token_file": str(token_file(folder)), "price_us": 0, **cloud}
    return AgentConfig.from_mapping(
        {
            "board": {"id": "kitchen", "backend": "jalapeno"},
            "state": {"folder": str(folder / "state")},
            "models": {"releases": [TALK_OFFER.digest.hex()]},
            "cloud": section,
        }
    )


@asynccontextmanager
async def board(folder: Path, url: str, log: Callable[[str], None], **cloud: object) -> AsyncIterator[Agent]:
    """An agent whose cloud has answered once."""
    async with asyncio.timeout(WAIT_S), Agent(config_of(folder, url, **cloud), log) as agent:
        await until(lambda: CLOUD in agent.models())
        yield agent


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.002)


def turn(text: str = "say hello big world", tokens: int = 20, **settings: object) -> Turn:
    return Turn((ChatMessage("user", text),), max_tokens=tokens, **settings)  # type: ignore[arg-type]


async def heard(agent: Agent, asked: Turn, data: DataClass = PUBLIC, **more: object) -> tuple[str, TurnEnd]:
    text = ""
    async for part in agent.talk(asked, data=data, **more):  # type: ignore[arg-type]
        if isinstance(part, TurnEnd):
            return text, part
        text += part.text
    raise AssertionError("no end")


def in_cloud(door: Served, folder: Path, scene: Callable[[Agent], Awaitable[None]], **cloud: object) -> None:
    """Play a scene on a board whose cloud is our own HTTP door."""

    async def play() -> None:
        async with board(folder, f"{door.url}/v1", print, **cloud) as agent:
            await scene(agent)

    asyncio.run(play())


# what goes there


def test_a_public_turn_on_a_board_without_a_language_model_goes_to_the_cloud_and_streams(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        asked = turn("hold one two", sampling=Sampling(700, top_p_milli=900, seed=5), stop=("###",))
        async with aclosing(agent.talk(asked, data=PUBLIC)) as parts:
            assert await anext(parts) == TurnPart("one", 1)
            assert door.talker.live == 1
            door.do(door.talker.go_on)
            rest = [part async for part in parts]
        end = rest[-1]
        assert isinstance(end, TurnEnd) and (end.text, end.finish) == ("one two", Finish.STOP)
        assert (end.prompt_tokens, end.cached_tokens, end.completion_tokens) == (9, 6, 2)
        assert end.notes == (f"from the cloud: {MODEL} at 127.0.0.1:{door.gateway.port}, for 7000 µs",)
        there = door.talker.turns[0]
        assert (there.messages, there.max_tokens, there.stop, there.sampling) == (
            asked.messages, asked.max_tokens, asked.stop, asked.sampling,
        )  # fmt: skip

    with served(GatewaySection(on=True, port=0, token=TOKEN)) as door:
        in_cloud(door, tmp_path, scene, price_us=7000)


def test_a_result_from_the_cloud_says_so_costs_this_board_no_energy_and_is_counted_with_its_price(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        result = await agent.submit(turn_request("ab" * 16, turn(), None, Limits(), PUBLIC))
        assert (result.status, result.model, result.model_digest) == (Status.OK, CLOUD, offer_of(agent.config.cloud).digest)
        assert (result.energy_uj, result.energy_kind) == (0, EnergyKind.ESTIMATED) and result.busy_us > 0
        chosen = agent.node.decisions["ab" * 16].chosen
        assert chosen is not None and chosen.offer.cloud and chosen.cost.price_us == 1_500_000
        figures = {(each.name, *[value for _, value in each.labels]): each.value for each in agent.figures()}
        assert figures["cloud_turns_total", CLOUD, "served"] == 1 and figures["cloud_turns_total", CLOUD, "failed"] == 0
        assert figures["cloud_price_seconds_total", CLOUD] == 1.5
        assert await agent.ready() == "" and agent.models() == [CLOUD]

    with served(GatewaySection(on=True, port=0, token=TOKEN)) as door:
        in_cloud(door, tmp_path, scene, price_us=1_500_000)


def test_private_data_and_what_asks_for_trust_never_reach_the_cloud_and_are_told_why(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        for data in (DataClass.PRIVATE, DataClass.LOCAL):
            with pytest.raises(UnavailableError, match=f"{CLOUD}: the request's data is {data}, only public data"):
                await heard(agent, turn(), data)
        with pytest.raises(UnavailableError, match="only public data"):
            async for _ in agent.talk(turn(), CLOUD):
                pass
        with pytest.raises(UnavailableError, match="asks for affirming"):
            await heard(agent, turn(), limits=Limits(trust=TrustTier.AFFIRMING))
        assert door.talker.turns == []

    with served() as door:
        in_cloud(door, tmp_path, scene)


@pytest.mark.parametrize(
    ("key", "data", "trust", "reason"),
    [
        ("kitchen", DataClass.PRIVATE, TrustTier.NONE, "only public data"),
        ("kitchen", PUBLIC, TrustTier.WARNING, "nobody appraises the cloud"),
        ("barn", PUBLIC, TrustTier.NONE, "is for requests that come in there"),
    ],
)
def test_a_job_that_was_placed_on_the_cloud_wrongly_is_stopped_at_the_last_door(
    tmp_path: Path, key: str, data: DataClass, trust: TrustTier, reason: str
) -> None:
    async def scene(agent: Agent) -> None:
        request = turn_request("ab" * 16, turn(), CLOUD, Limits(trust=trust), data)
        result = await agent.host.execute(Execute(f"{key}/{'ab' * 16}", request, CLOUD, 10**7), lambda part: None)
        assert result.status is Status.FAILED and reason in result.reason
        assert door.talker.turns == []

    with served() as door:
        in_cloud(door, tmp_path, scene)


def test_a_local_model_is_preferred_while_the_price_is_higher_than_what_the_cloud_gains(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        agent.host_speaker(TALK_OFFER, Parrot())
        text, _ = await heard(agent, turn())
        assert text == answer_to(turn())[0] and door.talker.turns == []
        assert agent.models() == ["parrot", CLOUD]

    with served() as door:
        in_cloud(door, tmp_path, scene, price_us=5_000_000, busy_us=1)


def test_a_cloud_that_is_cheaper_than_the_local_model_is_taken(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        agent.host_speaker(TALK_OFFER, Parrot())
        text, _ = await heard(agent, turn())
        assert text == "hello big world"

    with served() as door:
        in_cloud(door, tmp_path, scene, price_us=0, busy_us=1)


class BusyParrot(Parrot):
    """One that tells of its KV, as a real one does, and so of its queue."""

    def kv_state(self) -> KvState:
        return KvState("parrot", b"f" * 32, 100, 100, 2**30, 2048, 10**6, 10**6, 10**6)


def test_public_turns_stay_while_the_local_model_has_a_place_and_go_to_the_cloud_when_it_has_a_queue(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        parrot = BusyParrot(hold_after=2)
        agent.host_speaker(replace(TALK_OFFER, busy_us=2_000_000), parrot)
        agent._jobs.tell_kv()
        public = [asyncio.create_task(heard(agent, turn(f"say {number}"))) for number in range(4)]
        await until(lambda: parrot.talking == 4)
        private = [asyncio.create_task(heard(agent, turn(f"say {number}"), DataClass.PRIVATE)) for number in range(8)]
        await until(lambda: len(agent.node.execution) == 8)
        assert door.talker.turns == []
        assert (await heard(agent, turn()))[0] == "hello big world"
        parrot.gate.set()
        assert len(await asyncio.gather(*public, *private)) == 12
        assert len(door.talker.turns) == 1

    with served() as door:
        in_cloud(door, tmp_path, scene, price_us=300_000, busy_us=1000)


def test_a_turn_that_the_local_model_would_end_too_late_goes_to_the_cloud(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        agent.host_speaker(replace(TALK_OFFER, busy_us=10**9), Parrot())
        assert (await heard(agent, turn(), limits=Limits(5_000_000)))[0] == "hello big world"

    with served() as door:
        in_cloud(door, tmp_path, scene, price_us=100_000_000, busy_us=1000)


def test_who_is_called_off_at_any_moment_of_connecting_leaves_no_socket_open() -> None:
    async def scene() -> None:
        async with strange_endpoint() as strange:
            endpoint = endpoint_of(CloudSection(on=True, url=f"http://127.0.0.1:{strange.port}/v1", model=MODEL))
            before = len(list(Path("/proc/self/fd").iterdir()))
            for steps in range(30):
                task = asyncio.ensure_future(connect(endpoint))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            async with asyncio.timeout(WAIT_S):
                while len(list(Path("/proc/self/fd").iterdir())) > before or len(asyncio.all_tasks()) > 1:
                    await asyncio.sleep(0.01)

    async def connect(endpoint: Endpoint) -> None:
        async with connected(endpoint):
            pass

    gc.disable()
    try:
        asyncio.run(scene())
    finally:
        gc.enable()


def test_a_name_whose_first_addresses_are_dead_is_reached_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: object, **__: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        dead = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in dead]

    async def scene() -> None:
        async with strange_endpoint() as strange:
            section = CloudSection(on=True, url=f"http://cloud.example:{strange.port}/v1", model=MODEL)
            async with connected(endpoint_of(section)):
                pass

    monkeypatch.setattr(socket, "getaddrinfo", found)
    asyncio.run(scene())


def test_the_families_of_a_name_take_turns_and_no_more_than_a_few_addresses_are_tried() -> None:
    six = [(socket.AF_INET6, f"::{each}") for each in range(1, 9)]
    four = [(socket.AF_INET, f"10.0.0.{each}") for each in range(1, 3)]
    assert _in_turn([*six, *four]) == [six[0], four[0], six[1], four[1]]
    assert _in_turn(four) == four


def test_a_client_that_leaves_ends_the_exchange_with_the_cloud(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        async with aclosing(agent.talk(turn("hold one two"), data=PUBLIC)) as parts:
            await anext(parts)
        assert await asyncio.to_thread(door.talker.freed.acquire, timeout=LONG_S)
        assert door.talker.live == 0
        await until(lambda: agent.node.idle)
        assert CLOUD in agent.models()

    with served() as door:
        in_cloud(door, tmp_path, scene)


# what it cannot serve goes elsewhere


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (turn(begun="hello "), "cannot go on after given words"),
        (turn(session="kitchen-talk"), "belongs to a named session"),
        (Turn(prompt="Once upon a time"), "it is raw text"),
    ],
    ids=["begun", "session", "prompt"],
)
def test_a_turn_that_the_chat_api_cannot_carry_is_not_sent_and_goes_elsewhere(tmp_path: Path, asked: Turn, reason: str) -> None:
    async def scene(agent: Agent) -> None:
        with pytest.raises(UnavailableError, match=reason):
            await heard(agent, asked)
        agent.host_speaker(TALK_OFFER, Parrot())
        assert asked.begun + (await heard(agent, asked))[0] == answer_to(asked)[0]
        assert door.talker.turns == [] and CLOUD in agent.models()

    with served() as door:
        in_cloud(door, tmp_path, scene)


class DyingParrot(Parrot):
    async def talk(self, turn: Turn) -> AsyncGenerator[TurnPart | TurnEnd, None]:
        yield TurnPart("half ", 1)
        raise UnavailableError("engine", "it died")


def test_an_answer_that_a_local_model_began_is_not_gone_on_with_in_other_words_by_the_cloud(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        agent.host_speaker(TALK_OFFER, DyingParrot())
        parts = []
        with pytest.raises(UnavailableError, match="engine: it died.*its answer was begun already"):
            async for part in agent.talk(turn(), data=PUBLIC):
                parts.append(part)
        assert parts == [TurnPart("half ", 1)] and door.talker.turns == []

    with served() as door:
        in_cloud(door, tmp_path, scene, price_us=10**9)


# endpoints that are not kind


def against(play: Play, folder: Path, scene: Callable[[Agent, StrangeEndpoint, list[str]], Awaitable[None]]) -> None:
    """Play a scene on a board with a parrot, whose cloud is cheaper, and answers every turn by ``play``."""

    async def all_of_it() -> None:
        log: list[str] = []
        async with strange_endpoint() as endpoint:
            endpoint.play = play
            async with board(folder, f"http://127.0.0.1:{endpoint.port}/v1", log.append, busy_us=1) as agent:
                agent.host_speaker(TALK_OFFER, Parrot())
                await scene(agent, endpoint, log)
                assert not agent.faulty
        assert not [line for line in log if TOKEN in line]

    asyncio.run(all_of_it())


def falls_back(play: Play, folder: Path, reason: str, *begun: str) -> None:
    """The parrot gives what follows the words that the cloud ``begun`` with.

    The log says why the cloud gave no more, and the cloud is withdrawn for that reason.
    """

    async def scene(agent: Agent, endpoint: StrangeEndpoint, log: list[str]) -> None:
        text, end = await heard(agent, turn())
        assert text == answer_to(turn(tokens=20 - len(begun), begun="".join(begun)))[0]
        assert end.notes == ()
        left = [line for line in log if "leaves kitchen" in line]
        assert len(left) == 1 and re.search(reason, left[0]), left
        await until(lambda: any(re.search(f"{CLOUD} is withdrawn: .*{reason}", line) for line in log))
        await until(lambda: CLOUD in agent.models())

    against(play, folder, scene)


def test_a_wrong_token_401(tmp_path: Path) -> None:
    falls_back(status(401), tmp_path, "answered 401 unauthorized; look at .cloud. token_file")


def test_a_wrong_path_or_model_404(tmp_path: Path) -> None:
    body = json.dumps({"error": {"message": "no such model", "code": "model_not_found"}}).encode()
    falls_back(status(404, body), tmp_path, r"answered 404 not found \(model_not_found\); look at .cloud. url and model")


def test_too_many_requests_429(tmp_path: Path) -> None:
    falls_back(status(429, b"", "Retry-After: 1"), tmp_path, "answered 429 too many requests")


@pytest.mark.parametrize("code", [500, 502, 503, 529])
def test_a_server_that_fails_5xx(tmp_path: Path, code: int) -> None:
    falls_back(status(code), tmp_path, f"answered {code}")


def test_a_redirect_is_not_followed_with_the_token(tmp_path: Path) -> None:
    falls_back(status(307, b"", "Location: http://127.0.0.1:1/"), tmp_path, "307 temporary redirect: no redirect is followed")


def test_no_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.cloud.exchange.HEAD_S", 0.3)
    falls_back(holding(), tmp_path, "no answer began within 0.3 s")


def test_a_stream_that_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.cloud.speaker.SILENT_S", 0.3)
    falls_back(holding(STREAM, word("half ")), tmp_path, "fell silent in the middle", "half ")


def test_a_slow_loris_that_drips_bytes_and_never_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.cloud.speaker.SILENT_S", 0.3)

    async def drip(asked: Asked) -> None:
        await asked.say(STREAM)
        while True:
            await asked.say(b": still here\n")
            await asyncio.sleep(0.01)

    falls_back(drip, tmp_path, "fell silent in the middle")


def test_half_a_stream(tmp_path: Path) -> None:
    falls_back(saying(STREAM, word("half "), word("of ")), tmp_path, "half an answer", "half ", "of ")


def test_half_a_chunked_body(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    half = word("half ")
    falls_back(saying(head, b"%x\r\n" % len(half), half, b"\r\nffff\r\ndata: "), tmp_path, "ended too soon", "half ")


def test_a_connection_that_is_cut_before_the_answer(tmp_path: Path) -> None:
    falls_back(saying(), tmp_path, "is not HTTP, or ended too soon")


@pytest.mark.parametrize(
    "data",
    [b"not json", b"[]", b"{}", b'{"choices": 5}', b'{"choices": [7]}', b"[" * 100_000, b"\xff", b"9" * 5000,
     b'{"error": "x"}', b'{"choices": [{"delta": {"content": 5}}]}', b'{"choices": [{"delta": {"content": "\\ud800"}}]}'],
)  # fmt: skip
def test_garbage_in_an_event(tmp_path: Path, data: bytes) -> None:
    falls_back(saying(STREAM, event(data)), tmp_path, "its endpoint sent ")


@pytest.mark.parametrize("said", [b"\0" * 100, b"HTTP/9 what\r\n\r\n", b"X: y\r\n" * 10_000], ids=["zeros", "version", "headers"])
def test_garbage_instead_of_http(tmp_path: Path, said: bytes) -> None:
    falls_back(saying(said), tmp_path, "is not HTTP")


def test_a_page_instead_of_a_stream(tmp_path: Path) -> None:
    falls_back(status(200, b"<html>sign in</html>", "Content-Type: text/html"), tmp_path, "something else than a stream")


def test_an_answer_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_api, "MAX_TOKEN_CHARS", 2)

    async def endless(asked: Asked) -> None:
        await asked.say(STREAM)
        while True:
            await asked.say(word("x" * 15))

    falls_back(endless, tmp_path, "more than 20 tokens can be", "x" * 15, "x" * 15)


def test_an_event_without_end(tmp_path: Path) -> None:
    async def endless(asked: Asked) -> None:
        await asked.say(STREAM, b"data: ")
        while True:
            await asked.say(b"x" * 65_536)

    falls_back(endless, tmp_path, "more than 262144 bytes in an event")


def test_an_error_body_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.cloud.exchange.ERROR_BODY_S", 10 * WAIT_S)

    async def endless(asked: Asked) -> None:
        await asked.say(b"HTTP/1.1 500 X\r\nContent-Length: 999999999999\r\n\r\n")
        while True:
            await asked.say(b"x" * 65_536)

    falls_back(endless, tmp_path, "answered 500")


def test_usage_that_lies_is_not_believed(tmp_path: Path) -> None:
    lies = event({"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": 10**30, "prompt_tokens_details": 3}})

    async def scene(agent: Agent, endpoint: StrangeEndpoint, log: list[str]) -> None:
        _, end = await heard(agent, turn())
        assert (end.text, end.prompt_tokens, end.completion_tokens) == ("a b", 0, 2)

    against(saying(STREAM, word("a "), word("b", "stop"), lies, DONE), tmp_path, scene)


def test_a_filter_that_cut_the_answer_is_told(tmp_path: Path) -> None:
    async def scene(agent: Agent, endpoint: StrangeEndpoint, log: list[str]) -> None:
        _, end = await heard(agent, turn())
        assert end.notes[1] == "the cloud ended it by content_filter"

    against(saying(STREAM, word("a", "content_filter"), DONE), tmp_path, scene)


def test_a_refusal_of_one_turn_is_no_reason_to_withdraw_the_cloud(tmp_path: Path) -> None:
    body = json.dumps({"error": {"code": "context_length_exceeded"}}).encode()

    async def scene(agent: Agent, endpoint: StrangeEndpoint, log: list[str]) -> None:
        for _ in range(2):
            assert (await heard(agent, turn()))[0] == answer_to(turn())[0]
        assert len(endpoint.asked) == 2 and not [line for line in log if "withdrawn" in line]
        assert [line for line in log if "answered 400 bad request (context_length_exceeded)" in line]

    against(status(400, body), tmp_path, scene)


def test_an_endpoint_that_is_away_is_not_tried_by_every_turn_and_comes_back_when_it_answers(tmp_path: Path) -> None:
    async def scene(agent: Agent, endpoint: StrangeEndpoint, log: list[str]) -> None:
        endpoint.get_status = 503
        assert (await heard(agent, turn()))[0] == answer_to(turn())[0]
        await until(lambda: CLOUD not in agent.models())
        for _ in range(5):
            await heard(agent, turn())
        assert len(endpoint.asked) == 1
        assert await agent.ready() == "" and agent.models() == ["parrot"]
        endpoint.get_status, endpoint.play = 404, fine()
        await until(lambda: CLOUD in agent.models())
        assert (await heard(agent, turn()))[0] == "fine"

    against(status(503), tmp_path, scene)


def test_turns_that_wait_for_an_endpoint_that_fails_are_not_sent_there(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def fail_late(asked: Asked) -> None:
        await release.wait()
        await status(503)(asked)

    async def scene(agent: Agent, endpoint: StrangeEndpoint, log: list[str]) -> None:
        endpoint.get_status = 503
        talks = [asyncio.create_task(heard(agent, turn())) for _ in range(6)]
        await until(lambda: len(endpoint.asked) == 4 and len(agent.node.execution) == 2)
        release.set()
        assert {text for text, _ in await asyncio.gather(*talks)} == {answer_to(turn())[0]}
        assert len(endpoint.asked) == 4

    against(fail_late, tmp_path, scene)


def test_a_board_without_the_network_starts_and_asks_again(tmp_path: Path) -> None:
    async def play() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        log: list[str] = []
        async with asyncio.timeout(WAIT_S), Agent(config_of(tmp_path, f"http://127.0.0.1:{port}"), log.append) as agent:
            await until(lambda: any("withdrawn: cloud: the network failed: " in line for line in log))
            with pytest.raises(UnavailableError, match="does not host"):
                await heard(agent, turn())

    asyncio.run(play())


def test_a_failure_asks_for_patience_and_a_turn_that_was_served_begins_anew(tmp_path: Path) -> None:
    section = config_of(tmp_path, "http://127.0.0.1:1").cloud
    speaker = CloudSpeaker(endpoint_of(section), offer_of(section))
    away = EndpointError("away")
    for _ in range(8):
        assert speaker._wait_us(away) <= speaker._backoff.limits.cap_us
    assert speaker._backoff.ceiling_us == speaker._backoff.limits.cap_us
    speaker._served = True
    assert speaker._wait_us(away) <= speaker._backoff.limits.base_us
    assert speaker._wait_us(EndpointError("busy", retry_s=60)) == speaker._backoff.limits.cap_us


# the token


def test_the_token_is_sent_and_an_endpoint_that_echoes_it_puts_it_nowhere(tmp_path: Path) -> None:
    body = json.dumps({"error": {"message": f"bad key {TOKEN}", "code": TOKEN, "type": TOKEN}}).encode()

    async def scene(agent: Agent, endpoint: StrangeEndpoint, log: list[str]) -> None:
        await heard(agent, turn())
        assert f"\r\nAuthorization: Bearer {TOKEN}\r\n".lower() in endpoint.asked[0].head.lower()
        await until(lambda: any("withdrawn" in line for line in log))
        assert TOKEN not in repr(agent.host.speakers[CLOUD].__dict__) + repr(agent.config) + repr(agent.node.decisions)

    against(status(401, body, f"X-Echo: {TOKEN}"), tmp_path, scene)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_token_that_others_can_read_is_refused_with_its_mode(tmp_path: Path, mode: int) -> None:
    config = config_of(tmp_path, "https://cloud.example/v1")
    token_file(tmp_path, mode)
    with pytest.raises(ConfigError, match=f"token_file .*: got mode {mode:04o}; allowed: 0600.*chmod 600") as caught:
        endpoint_of(config.cloud)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_token_that_only_its_owner_can_read_is_used(tmp_path: Path, mode: int) -> None:
    config = config_of(tmp_path, "https://cloud.example/v1")
    token_file(tmp_path, mode)
    endpoint = endpoint_of(config.cloud)
    assert endpoint.token == TOKEN and TOKEN not in repr(endpoint)


@pytest.mark.parametrize("data", [b"", b"\n", b"two words", b"x\r\nHost: evil", b"\xff", b"x" * 5000])
def test_a_token_that_no_header_can_carry_is_refused_unseen(tmp_path: Path, data: bytes) -> None:
    config = config_of(tmp_path, "https://cloud.example/v1")
    (tmp_path / "token").write_bytes(data)
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        endpoint_of(config.cloud)
    assert "evil" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_token_file_that_is_none_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    config = config_of(tmp_path, "https://cloud.example/v1")
    path = tmp_path / "token"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    with pytest.raises(ConfigError, match=r"\[cloud\] token_file"):
        endpoint_of(config.cloud)


# the configuration


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"url": "https://me:secret@cloud.example/v1"}, "url: got a user in it"),
        ({"url": "https://cloud.example/v1?key=secret"}, "url: got .*without user, query"),
        ({"url": "https:///v1"}, "url: got"),
        ({"url": "https://cloud.example:99999/v1"}, "url: got"),
        ({"url": "https://cloud.example:0/v1"}, "url: got"),
        ({"url": "https://wölke.example/v1"}, "ASCII form"),
        ({"url": ""}, "url: got"),
        ({"url": "http://cloud.example/v1"}, "never sent in clear"),
        ({"model": ""}, "model: got"),
    ],
)
def test_a_cloud_that_cannot_or_must_not_be_used_is_refused_when_it_is_checked(
    tmp_path: Path, section: dict[str, object], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"on": True, "url": "https://cloud.example/v1", "model": MODEL, "token_file": str(token_file(tmp_path)), **section}
    path = tmp_path / "kitchen.toml"
    lines = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items())
    state = tmp_path / "state"
    path.write_text(f'[board]\nid = "kitchen"\nbackend = "jalapeno"\n[state]\nfolder = "{state}"\n[cloud]\n{lines}\n', "utf-8")
    assert cli.main(["agent", "--config", str(path), "--check"]) == 2
    told = capsys.readouterr().err
    assert re.search(reason, told) and len(told.splitlines()) == 1
    assert "secret" not in told or "query" in told


def test_checking_connects_to_nothing(tmp_path: Path) -> None:
    async def play() -> None:
        async with strange_endpoint() as endpoint:
            await check(config_of(tmp_path, f"http://127.0.0.1:{endpoint.port}/v1"))
            assert not endpoint.probes and not endpoint.asked

    asyncio.run(play())


def test_without_its_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h11", None)
    with pytest.raises(ConfigError, match=r"pip install 'slyos-edge\[cloud\]'"):
        endpoint_of(config_of(tmp_path, "https://cloud.example/v1").cloud)


def test_the_cloud_is_off_unless_it_is_turned_on_and_then_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    assert not AgentConfig.from_mapping({"board": {"id": "kitchen"}, "state": {"folder": str(tmp_path)}}).cloud.on
    code = f"""
import asyncio, sys
from edge_agent.agent import Agent
from edge_agent.core.config import AgentConfig
async def play():
    board = {{"id": "kitchen", "backend": "jalapeno"}}
    cloud = {{"url": "http://127.0.0.1:1", "model": "m"}}
    config = AgentConfig.from_mapping({{"board": board, "state": {{"folder": {str(tmp_path)!r}}}, "cloud": cloud}})
    async with Agent(config, lambda text: None) as agent:
        assert agent.models() == [] and not agent.host.speakers
asyncio.run(play())
assert not {{"h11", "edge_agent.cloud.speaker"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("model", "name"),
    [("gpt-5-mini", "cloud.gpt-5-mini"), ("Qwen/Qwen3 8B:free", "cloud.qwen-qwen3-8b-free"), ("é" * 100, "cloud." + "-" * 58)],
)
def test_a_model_of_any_name_gets_one_that_says_cloud(model: str, name: str) -> None:
    assert name_of(model) == name == offer_of(CloudSection(True, "https://c.example", model)).model


# TLS


def test_only_a_certificate_that_is_trusted_is_talked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("127.0.0.1"))

    async def play() -> None:
        log: list[str] = []
        async with (
            asyncio.timeout(WAIT_S),
            strange_endpoint(context) as endpoint,
            Agent(config_of(tmp_path, f"https://127.0.0.1:{endpoint.port}/v1"), log.append) as agent,
        ):
            await until(lambda: any("its certificate is not trusted" in line for line in log))
            assert endpoint.probes == 0
            monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
            await until(lambda: CLOUD in agent.models())
            assert (await heard(agent, turn()))[0] == "fine"

    asyncio.run(play())


# the reader of events


@given(cuts=st.lists(st.integers(0, 200)), end=st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_in_any_pieces(cuts: list[int], end: bytes) -> None:
    lines = [
        b": comment",
        b"event: x",
        b"data: one",
        b"",
        b"data:t\xc3\xbco",
        b"data: three",
        b"id: 7",
        b"",
        b"",
        b"data: [DONE]",
        b"",
    ]
    said = b"".join(line + end for line in lines)
    places = [0, *sorted(min(cut, len(said)) for cut in cuts), len(said)]
    events = Events()
    pieces = [said[a:b] for a, b in zip(places, places[1:], strict=False)]
    assert [each for piece in pieces for each in events.feed(piece)] == ["one", "tüo\nthree", "[DONE]"]
