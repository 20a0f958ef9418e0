"""One child, seen from the agent: it answers like the bare interpreter, and whatever else it does, the agent goes on."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from edge_agent.core.values import Tensor
from edge_agent.runtime.arena import KEPT_BYTES, Arena
from edge_agent.runtime.child import ChildDiedError, Death
from edge_agent.runtime.sandbox import KEPT_STDERR_BYTES, STDERR_BYTES_A_SECOND, Sandbox
from edge_agent.runtime.settings import EngineSettings
from tests.odd_engines import LIES, ROGUE
from tests.sandboxes import model_file, run, words
from tests.tiny_models import tiny_model

ROGUISH = EngineSettings(engine=ROGUE, invoke_limit_us=60_000_000)


@asynccontextmanager
async def child(settings: EngineSettings = ROGUISH, deaths: list[Death] | None = None) -> AsyncIterator[Sandbox]:
    model = tiny_model()
    fd = model_file(model)
    try:
        on_death = (lambda death: None) if deaths is None else deaths.append
        sandbox = await Sandbox.start("rogue", fd, hashlib.sha256(model).digest(), settings, on_death=on_death)
    finally:
        os.close(fd)
    try:
        yield sandbox
    finally:
        await sandbox.close()


async def order(sandbox: Sandbox, text: str) -> str:
    done, _ = await sandbox.invoke({"order": words(text)}, whole_task=False)
    return bytes(sandbox.take(done)["answer"].data).decode()


async def death_by(text: str, settings: EngineSettings = ROGUISH) -> Death:
    deaths: list[Death] = []
    async with child(settings, deaths) as sandbox:
        with pytest.raises(ChildDiedError) as caught:
            await order(sandbox, text)
        assert deaths == [caught.value.death]
        assert not Path(f"/proc/{sandbox.pid}").exists(), "not reaped"
        with pytest.raises(ChildDiedError):
            await order(sandbox, "hello")
    return caught.value.death


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("exit", "exit code 7 (I am leaving)"),
        ("segfault", "SIGSEGV"),
        (f"signal {signal.SIGABRT.value}", "SIGABRT"),
        (f"signal {signal.SIGKILL.value}", "SIGKILL"),
    ],
)
def test_a_death_is_told_with_its_cause(text: str, cause: str) -> None:
    assert str(run(death_by(text))).startswith(cause)


def test_an_answer_whose_child_died_in_the_same_turn_of_the_loop_is_a_death() -> None:
    run(dies_with_its_answer("farewell", ChildDiedError, "exit code 7"))


def test_a_refusal_whose_child_ended_in_the_same_turn_of_the_loop_is_that_refusal() -> None:
    run(dies_with_its_answer("regret", RefusedError, "an engine that stays"))


async def dies_with_its_answer(text: str, kind: type[SlyError], words: str) -> None:
    """The loop hears of both at once: nothing else runs here until the child is dead."""
    async with child() as sandbox:
        asking = asyncio.create_task(order(sandbox, text))
        await asyncio.sleep(0)
        os.waitid(os.P_PIDFD, sandbox._pidfd, os.WEXITED | os.WNOWAIT)
        with pytest.raises(kind, match=words):
            await asking


@pytest.mark.parametrize("text", ["hang", "spin"])
def test_the_watchdog_ends_a_child_that_does_not_answer(text: str) -> None:
    death = run(death_by(text, EngineSettings(engine=ROGUE, invoke_limit_us=200_000)))
    assert death.cause == "hung: no answer within 0.2 s"


@pytest.mark.parametrize("lie", LIES)
def test_a_child_that_lies_is_killed_and_never_believed(lie: str) -> None:
    assert run(death_by(lie)).cause.startswith("broke the protocol")


def test_an_answer_to_no_question_kills_the_child() -> None:
    async def story() -> None:
        deaths: list[Death] = []
        async with child(deaths=deaths) as sandbox:
            assert await order(sandbox, "scribble") == "s"
            while not deaths:
                await asyncio.sleep(0.005)
        assert deaths[0].cause == "broke the protocol: an answer to no question"

    run(story())


def test_a_child_that_closes_its_socket_and_lives_on_is_ended() -> None:
    assert run(death_by("close")).cause == "closed its socket"


def test_a_failure_and_a_refusal_are_answers_and_not_deaths() -> None:
    async def story() -> None:
        async with child() as sandbox:
            with pytest.raises(UnavailableError, match=r"the model says.\[31m no") as failed:
                await order(sandbox, "fail")
            assert str(failed.value).isprintable() and not isinstance(failed.value, ChildDiedError)
            with pytest.raises(RefusedError) as refused:
                await order(sandbox, "refuse")
            assert str(refused.value).isprintable() and len(str(refused.value)) < 2000
            with pytest.raises(UnavailableError, match="too large"):
                await order(sandbox, "big")
            assert await order(sandbox, "hello") == "hello"

    run(story())


def test_a_child_that_floods_its_stderr_stands_still_and_costs_the_agent_no_memory() -> None:
    async def story() -> None:
        async with child(EngineSettings(engine=ROGUE, invoke_limit_us=500_000)) as sandbox:
            assert await order(sandbox, "shout") == str(300 * len("\x1b[31mshouting"))
            with pytest.raises(ChildDiedError, match="hung") as flooded:
                await order(sandbox, "flood")
            assert str(flooded.value).isprintable() and len(flooded.value.death.last_words) <= 400
            assert len(sandbox._stderr) <= KEPT_STDERR_BYTES
            assert sandbox._stderr_bytes <= STDERR_BYTES_A_SECOND + 2 * 4096

    run(story())


def test_a_cancelled_caller_leaves_the_child_usable() -> None:
    async def story() -> None:
        async with child() as sandbox:
            caller = asyncio.create_task(order(sandbox, "hello"))
            while not sandbox.busy:
                await asyncio.sleep(0)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            await sandbox.becomes_idle()
            assert await order(sandbox, "and now") == "and now"

    run(story())


def test_two_requests_at_once_are_the_callers_bug() -> None:
    async def story() -> None:
        async with child() as sandbox:
            first = asyncio.create_task(order(sandbox, "hello"))
            while not sandbox.busy:
                await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="one request at a time"):
                await order(sandbox, "me too")
            assert await first == "hello"

    run(story())


def test_nothing_is_left_open_after_many_children() -> None:
    async def story() -> None:
        for text in ("hello", "exit", "hello"):
            async with child() as sandbox:
                if text == "exit":
                    with pytest.raises(ChildDiedError):
                        await order(sandbox, text)
                else:
                    await order(sandbox, text)

    run(story())
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    run(story())
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_closing_ends_a_child_that_is_still_loading() -> None:
    async def story() -> None:
        model = tiny_model()
        fd = model_file(model)
        start = asyncio.create_task(Sandbox.start("m", fd, hashlib.sha256(model).digest(), EngineSettings()))
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        os.close(fd)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    run(story())


def test_a_load_that_takes_too_long_is_ended() -> None:
    async def story() -> None:
        model = tiny_model()
        fd = model_file(model)
        with pytest.raises(ChildDiedError, match="no answer within 0.001 s"):
            await Sandbox.start("m", fd, hashlib.sha256(model).digest(), EngineSettings(load_limit_us=1000))
        os.close(fd)

    run(story())


def test_an_engine_that_does_not_exist_is_refused() -> None:
    async def story() -> None:
        for name in ("tests.nothing:Engine", "tests.odd_engines:Nothing", "pathlib:Path"):
            with pytest.raises(RefusedError, match="Engine"):
                async with child(EngineSettings(engine=name)):
                    pass

    run(story())


def test_the_arena_cannot_change_its_size_and_gives_large_pages_back() -> None:
    arena = Arena(64 * 2**20)
    try:
        for size in (0, 128 * 2**20):
            with pytest.raises(OSError):
                os.ftruncate(arena.fd, size)
        arena.put({"x": Tensor("uint8", (32 * 2**20,), bytes(32 * 2**20))})
        assert os.fstat(arena.fd).st_blocks * 512 >= 32 * 2**20
        arena.trim()
        assert os.fstat(arena.fd).st_blocks * 512 <= KEPT_BYTES
    finally:
        arena.close()


def test_inputs_that_do_not_fit_the_arena_are_refused_and_change_nothing() -> None:
    async def story() -> None:
        settings = EngineSettings(engine=ROGUE, arena_bytes=2**20)
        async with child(settings) as sandbox:
            with pytest.raises(RefusedError, match="1048576 bytes a request"):
                await order(sandbox, "x" * (2**20 + 1))
            assert await order(sandbox, "hello") == "hello"

    run(story())
