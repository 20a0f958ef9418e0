"""The self-test of a running agent: what it says, publishes and never lets come in the way of serving."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from board_support.board import Delegate
from edge_agent.agent import Agent
from edge_agent.attest.self_test import Check, SelfTest, Verdict, open_self_test
from edge_agent.core.clock import SystemClock
from edge_agent.runtime.settings import EngineSettings
from edge_agent.shell import checks, self_test
from edge_agent.shell.known_answer import Asked
from edge_agent.transport.endpoint import BrokerAddress
from edge_agent.transport.link import Delivered, LinkDown, LinkUp, Published, Rejected
from edge_agent.transport.topics import Topics
from tests.brokers import free_port, mosquitto
from tests.certificates import Authority
from tests.operators import Client
from tests.test_self_test import LIMIT_S, configured


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agents of these tests look at themselves at once, and often."""
    monkeypatch.setattr(self_test, "SOON_S", 0.0)
    monkeypatch.setattr(self_test, "LOOK_S", 0.05)
    monkeypatch.setattr(self_test, "REST_S", 0.05)


def verdicts(agent: Agent) -> dict[str, Verdict]:
    return {each.name: each.verdict for each in agent.self_test.last.checks} if agent.self_test.last else {}


def counting_looks(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each look at the machine."""
    looks, seen = list[int](), agent.self_test._seen

    def counted() -> list[Check]:
        looks.append(1)
        return seen()

    monkeypatch.setattr(agent.self_test, "_seen", counted)
    return looks


def test_an_agent_without_the_file_of_a_model_serves_and_says_what_fails_and_then_that_it_passes(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "models").mkdir()
    missing = {"serve": ["mobilenet-vww", "smollm2"], "folder": str(tmp_path / "models")}

    async def scene() -> None:
        async with Agent(configured(tmp_path / "state", models=missing), said.append) as agent:
            await until(lambda: agent.self_test.last is not None)
            assert verdicts(agent)["models"] is Verdict.FAIL and verdicts(agent)["inference"] is Verdict.PASS
            line = next(line for line in said if line.startswith("self-test: FAIL models: "))
            assert f"no file {tmp_path}/models/mobilenet-vww.tflite; fetch it with: sly models fetch mobilenet-vww" in line
            assert "build it with: sly models build smollm2 --folder" in agent.node.execution.withdrawn["smollm2"]
            agent.config = replace(agent.config, models=replace(agent.config.models, serve=()))
            await until(lambda: verdicts(agent)["models"] is Verdict.PASS)
            assert said[-1].startswith("self-test: PASS models")

    asyncio.run(scene())


def test_a_broker_that_is_not_reached_fails_after_its_time_with_the_words_of_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "LINK_LIMIT_US", 1)
    broker = {"host": "127.0.0.1", "port": free_port(), "reconnect_max_ms": 100}

    async def scene() -> None:
        async with Agent(configured(tmp_path / "state", broker=broker), lambda text: None) as agent:
            await until(lambda: verdicts(agent).get("broker") is Verdict.FAIL)
            assert agent.self_test.last is not None
            check = next(each for each in agent.self_test.last.checks if each.name == "broker")
            assert "nothing listens there" in check.what and check.remedy

    asyncio.run(scene())


def test_the_result_is_kept_at_the_broker_and_told_again_when_it_changes_and_not_when_only_figures_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(port: int) -> None:
        config = configured(tmp_path / "state", broker={"host": "127.0.0.1", "port": port, "reconnect_max_ms": 100})
        listener = await Client(BrokerAddress("127.0.0.1", port), "listener").up()
        topic = Topics(config.fleet.name).self_test("kitchen")
        listener.link.subscribe(topic)

        def heard() -> list[SelfTest]:
            messages = [each.message.payload for each in listener.events if isinstance(each, Delivered)]
            return [open_self_test(each, lambda kid: key) for each in messages]

        async with Agent(config, lambda text: None) as agent:
            key = agent.node.settings.signer.public_key
            await listener.until(lambda: bool(heard()) and heard()[-1] == agent.self_test.last)
            assert verdicts(agent)["broker"] is Verdict.PASS
            before = len(heard())
            numbers = [each.version for each in heard()]
            assert numbers == sorted(numbers) and heard()[-1].boot_epoch == 1
            looks = counting_looks(agent, monkeypatch)
            await until(lambda: len(looks) == 5)
            assert len(heard()) == before, "looks that found the same are not told"
            (config.state.folder / "identity.key").chmod(0o644)
            await listener.until(lambda: heard()[-1].verdict is Verdict.FAIL)
            (config.state.folder / "identity.key").chmod(0o600)
        late = await Client(BrokerAddress("127.0.0.1", port), "late").up()
        late.link.subscribe(topic)
        await late.until(lambda: topic in late.topics)
        for each in (listener, late):
            each.link.close()

    with mosquitto(tmp_path / "broker") as broker:
        asyncio.run(scene(broker.port))


def test_a_broker_that_refuses_the_topic_is_said_once_and_nothing_else_hears_of_it(tmp_path: Path) -> None:
    said: list[str] = []

    async def scene() -> None:
        async with Agent(configured(tmp_path / "state"), said.append) as agent:
            for _ in range(3):
                assert agent.self_test.hear(Rejected("not authorized", self_test.TICKET))
            assert agent.self_test.hear(Published(self_test.TICKET))
            assert not agent.self_test.hear(Rejected("not authorized", 7)) and not agent.self_test.hear(Published(7))
            assert not agent.self_test.hear(LinkUp(False)) and not agent.self_test.hear(LinkDown("gone"))

    asyncio.run(scene())
    assert [line for line in said if "does not take the self-test" in line][1:] == []
    assert any("not authorized" in line for line in said)


def test_a_self_test_that_breaks_is_a_line_in_the_log_and_the_agent_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def broken(*arguments: object) -> Check:
        raise ZeroDivisionError("a bug of this room")

    monkeypatch.setattr(checks, "models", broken)

    async def scene() -> None:
        async with Agent(configured(tmp_path / "state"), said.append) as agent:
            await until(lambda: any("a fault of its own" in line for line in said))
            assert not agent.stop_requested.is_set() and not agent.faulty

    asyncio.run(scene())


def test_the_known_answer_is_asked_once_and_not_with_every_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []

    async def counted(settings: EngineSettings, delegate: Delegate | None) -> Asked:
        times.append(1)
        return Asked("a library", layers=("seccomp",))

    monkeypatch.setattr(self_test, "ask_known_answer", counted)

    async def scene() -> None:
        async with Agent(configured(tmp_path / "state"), lambda text: None) as agent:
            looks = counting_looks(agent, monkeypatch)
            await until(lambda: len(looks) > 3)
            assert len(times) == 1
            agent.self_test._whole_due_us = 0
            await until(lambda: len(times) == 2)

    asyncio.run(scene())


def test_a_disk_that_does_not_answer_fails_and_is_not_asked_by_ever_more_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, asked_times, looks = threading.Event(), list[int](), list[int]()
    monkeypatch.setattr(self_test, "LOOK_LIMIT_S", 0.05)

    async def scene() -> None:
        async with Agent(configured(tmp_path / "state"), lambda text: None) as agent:

            def hang() -> list[Check]:
                asked_times.append(1)
                stuck.wait(LIMIT_S)
                return []

            machine = agent.self_test._machine

            async def counted() -> list[Check]:
                looks.append(1)
                return await machine()

            monkeypatch.setattr(agent.self_test, "_machine", counted)
            monkeypatch.setattr(agent.self_test, "_seen", hang)
            await until(lambda: verdicts(agent).get("disk") is Verdict.FAIL and len(asked_times) == 1)
            before = len(looks)
            await until(lambda: len(looks) > before + 2)
            assert len(asked_times) == 1
            stuck.set()

    try:
        asyncio.run(scene())
    finally:
        stuck.set()


def test_the_clock_of_an_agent_that_starts_in_1970_fails_beside_its_certificate(tmp_path: Path) -> None:
    class In1970(SystemClock):
        def wall_us(self) -> int:
            return 60_000_000

    path, key = Authority(tmp_path / "ca").issue("kitchen")
    config = configured(tmp_path / "state", broker={"certificate_file": str(path), "key_file": str(key)})

    async def scene() -> None:
        async with Agent(config, lambda text: None, In1970()) as agent:
            await until(lambda: agent.self_test.last is not None)
            assert verdicts(agent)["clock"] is Verdict.FAIL and verdicts(agent)["certificate"] is Verdict.WARN
            assert agent.self_test.last is not None and agent.self_test.last.checks[0].name == "clock", "what fails comes first"

    asyncio.run(scene())
