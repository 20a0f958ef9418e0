"""A model may do what it likes to its child: its request fails, the engine comes back, and in the end it is not run any more."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from edge_agent.runtime import quarantine
from edge_agent.runtime.child import ChildDiedError
from edge_agent.runtime.quarantine import Answered, Died, Record, Released, step
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervisor import EngineState, EngineSupervisor, Invocation
from tests.odd_engines import BRIEF, ROGUE
from tests.sandboxes import BUDGET_US, MODEL, child_pid, filled, load, run, supervised, until_state, words
from tests.tiny_models import tiny_model

ROGUISH = EngineSettings(engine=ROGUE)


async def order(supervisor: EngineSupervisor, text: str, budget_us: int = BUDGET_US) -> str:
    result = await supervisor.invoke(MODEL, {"order": words(text)}, budget_us)
    return bytes(result.outputs["answer"].data).decode()


async def infer(supervisor: EngineSupervisor, budget_us: int = BUDGET_US) -> Invocation:
    signature = supervisor._engines[MODEL]._signature
    assert signature is not None
    return await supervisor.invoke(MODEL, {spec.name: filled(spec) for spec in signature.inputs}, budget_us)


def test_a_child_killed_while_it_works_fails_that_request_and_the_next_one_succeeds() -> None:
    async def story() -> None:
        async with supervised(tiny_model("slow")) as (supervisor, _, reports):
            before = await infer(supervisor)
            os.kill(child_pid(supervisor), signal.SIGSTOP)  # it cannot answer before it is killed, however late that is
            request = asyncio.create_task(infer(supervisor))
            sandbox = supervisor._engines[MODEL]._sandbox
            while sandbox is None or not sandbox.busy:
                await asyncio.sleep(0)
            os.kill(child_pid(supervisor), signal.SIGKILL)
            with pytest.raises(UnavailableError, match="SIGKILL"):
                await request
            assert supervisor.state(MODEL) is EngineState.RESTARTING
            assert (await infer(supervisor)).outputs == before.outputs
            assert supervisor.state(MODEL) is EngineState.READY
            assert reports.count_of("died, death 1 of 3") == reports.count_of("runs again") == 1

    run(story())


def test_a_child_killed_while_it_rests_is_replaced_before_anybody_asks() -> None:
    async def story() -> None:
        async with supervised(tiny_model()) as (supervisor, _, reports):
            os.kill(child_pid(supervisor), signal.SIGKILL)
            while not reports.count_of("runs again"):
                await asyncio.sleep(0.005)
            await infer(supervisor)

    run(story())


def test_an_endless_model_is_ended_by_the_watchdog_and_quarantined_after_the_bound() -> None:
    async def story() -> None:
        settings = EngineSettings(invoke_limit_us=150_000, max_deaths=2)
        async with supervised(tiny_model("endless"), settings) as (supervisor, _, reports):
            for _ in range(2):
                with pytest.raises(ChildDiedError, match="hung"):
                    await infer(supervisor)
            assert supervisor.state(MODEL) is EngineState.QUARANTINED
            with pytest.raises(UnavailableError, match=r"quarantine after 2 deaths: hung.*hung.*release it"):
                await infer(supervisor)
            assert reports.count_of("runs again") == 1, "a quarantined model must not be started again"

    run(story())


@pytest.mark.parametrize("delay_ms", [0, 1, 3, 10, 30])
def test_a_child_that_dies_as_soon_as_it_is_loaded_never_leaves_a_caller_waiting(delay_ms: int) -> None:
    async def story() -> None:
        model = tiny_model() + bytes([delay_ms])
        with pytest.raises(UnavailableError, match="exit code 3"):
            async with supervised(model, EngineSettings(engine=BRIEF, death_window=10**6)) as (supervisor, _, _):
                while True:
                    with contextlib.suppress(ChildDiedError):
                        await order(supervisor, "hello")

    run(story())


def test_a_released_model_is_started_again_with_nothing_held_against_it() -> None:
    async def story() -> None:
        async with supervised(tiny_model(), EngineSettings(engine=ROGUE, max_deaths=1)) as (supervisor, _, _):
            for _ in range(2):
                assert await order(supervisor, "hello") == "hello"
                with pytest.raises(ChildDiedError):
                    await order(supervisor, "exit")
                assert supervisor.state(MODEL) is EngineState.QUARANTINED
                supervisor.release(MODEL)
            await until_state(supervisor, EngineState.READY)
            supervisor.release(MODEL)
            assert supervisor.state(MODEL) is EngineState.READY

    run(story())


def test_requests_run_one_at_a_time_first_come_first_served() -> None:
    async def story() -> None:
        async with supervised(tiny_model(), ROGUISH) as (supervisor, _, _):
            done: list[int] = []

            async def one(number: int) -> None:
                assert await order(supervisor, f"n{number}") == f"n{number}"
                done.append(number)

            await asyncio.gather(*(one(number) for number in range(20)))
            assert done == list(range(20))

    run(story())


def test_a_caller_that_comes_again_at_once_does_not_overtake_who_waits() -> None:
    async def story() -> None:
        async with supervised(tiny_model(), ROGUISH) as (supervisor, _, _):
            done: list[str] = []

            async def in_turn(*texts: str) -> None:
                for text in texts:
                    done.append(await order(supervisor, text))

            await asyncio.gather(in_turn("a1", "a2", "a3"), in_turn("b1", "b2", "b3"))
            assert done == ["a1", "b1", "a2", "b2", "a3", "b3"]

    run(story())


def test_only_so_many_may_wait_and_the_rest_are_told_at_once() -> None:
    async def story() -> None:
        settings = EngineSettings(engine=ROGUE, max_waiting=3)
        async with supervised(tiny_model(), settings) as (supervisor, _, _):
            waiting = [asyncio.create_task(order(supervisor, "hello")) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="3 requests wait already"):
                await order(supervisor, "hello")
            assert await asyncio.gather(*waiting) == ["hello"] * 3

    run(story())


def test_callers_that_give_up_neither_kill_the_child_nor_count_against_the_model() -> None:
    async def story() -> None:
        async with supervised(tiny_model("slow"), EngineSettings(max_deaths=1)) as (supervisor, _, reports):
            pid = child_pid(supervisor)
            expected = (await infer(supervisor)).outputs
            for _ in range(3):
                with pytest.raises(UnavailableError, match="no answer within the 2000 µs"):
                    await infer(supervisor, budget_us=2000)
                caller = asyncio.create_task(infer(supervisor))
                await asyncio.sleep(0)
                caller.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await caller
            assert (await infer(supervisor)).outputs == expected
            assert child_pid(supervisor) == pid and reports == []

    run(story())


def test_an_answer_never_reaches_the_wrong_caller() -> None:
    async def story() -> None:
        async with supervised(tiny_model(), ROGUISH) as (supervisor, _, _):
            for number in range(50):
                quitter = asyncio.create_task(order(supervisor, f"quitter {number}"))
                for _ in range(number % 4):
                    await asyncio.sleep(0)
                quitter.cancel()
                assert await order(supervisor, f"n{number}") == f"n{number}"
                await asyncio.gather(quitter, return_exceptions=True)

    run(story())


def test_a_budget_covers_the_wait_for_a_new_child() -> None:
    async def story() -> None:
        async with supervised(tiny_model(), ROGUISH) as (supervisor, _, _):
            with pytest.raises(ChildDiedError):
                await order(supervisor, "exit")
            with pytest.raises(UnavailableError, match="within the 1000 µs"):
                await order(supervisor, "hello", budget_us=1000)
            assert await order(supervisor, "hello") == "hello"

    run(story())


def test_bad_inputs_are_refused_even_while_the_engine_restarts() -> None:
    async def story() -> None:
        async with supervised(tiny_model()) as (supervisor, _, _):
            os.kill(child_pid(supervisor), signal.SIGKILL)
            with pytest.raises(RefusedError, match="'y'"):
                await supervisor.invoke(MODEL, {"y": words("x")}, BUDGET_US)

    run(story())


def test_a_model_file_that_changed_on_disk_is_not_loaded_again(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "model.tflite"
        path.write_bytes(tiny_model())
        reports: list[str] = []
        supervisor = EngineSupervisor(EngineSettings(), report=reports.append)
        with path.open("rb") as file:
            await supervisor.load(MODEL, file.fileno(), hashlib.sha256(tiny_model()).digest())
        flipped = bytearray(tiny_model())
        flipped[-1] ^= 1
        path.write_bytes(flipped)
        os.kill(child_pid(supervisor), signal.SIGKILL)
        await until_state(supervisor, EngineState.QUARANTINED)
        with pytest.raises(UnavailableError, match="SHA-256"):
            await infer(supervisor)
        await supervisor.close()

    run(story())


def test_a_file_cut_short_under_the_mapping_is_a_dead_child_not_a_dead_agent(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "model.tflite"
        path.write_bytes(tiny_model("slow"))
        supervisor = EngineSupervisor(EngineSettings())
        with path.open("rb") as file:
            await supervisor.load(MODEL, file.fileno(), hashlib.sha256(tiny_model("slow")).digest())
        os.truncate(path, 0)
        results = await asyncio.gather(*(infer(supervisor) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, Invocation | UnavailableError) for result in results), results
        await supervisor.close()

    run(story())


def test_unloading_answers_everybody_who_waits() -> None:
    async def story() -> None:
        async with supervised(tiny_model(), ROGUISH) as (supervisor, _, _):
            waiting = [asyncio.create_task(order(supervisor, "hang")) for _ in range(3)]
            await asyncio.sleep(0)
            await supervisor.unload(MODEL)
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(result, UnavailableError) for result in results), results
            with pytest.raises(RefusedError, match="load it first"):
                await order(supervisor, "hello")
            await load(supervisor, tiny_model())
            assert await order(supervisor, "hello") == "hello"

    run(story())


def test_unloading_while_it_loads_leaves_no_child() -> None:
    async def story() -> None:
        supervisor = EngineSupervisor(EngineSettings())
        loading = asyncio.create_task(load(supervisor, tiny_model()))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="still being loaded"):
            await supervisor.invoke(MODEL, {}, BUDGET_US)
        await supervisor.close()
        with pytest.raises(UnavailableError, match="while it loaded"):
            await loading
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    run(story())


def test_one_model_in_quarantine_does_not_touch_another() -> None:
    async def story() -> None:
        settings = EngineSettings(invoke_limit_us=100_000, max_deaths=1)
        async with supervised(tiny_model("endless"), settings) as (supervisor, _, _):
            await load(supervisor, tiny_model(), name="other")
            with pytest.raises(ChildDiedError):
                await infer(supervisor)
            assert supervisor.state(MODEL) is EngineState.QUARANTINED
            assert supervisor.state("other") is EngineState.READY
            with pytest.raises(RuntimeError, match="loaded already"):
                await load(supervisor, tiny_model(), name="other")

    run(story())


@pytest.mark.parametrize(
    ("name", "value"),
    [("runtime", "torch"), ("threads", 0), ("memory_bytes", 1), ("arena_bytes", 1), ("max_deaths", 0), ("invoke_limit_us", 0)],
)
def test_settings_out_of_bounds_are_refused(name: str, value: object) -> None:
    with pytest.raises(RefusedError, match=name):
        EngineSettings(**{name: value})  # type: ignore[arg-type]
    assert issubclass(ConfigError, RefusedError)


EVENTS = st.lists(st.sampled_from([Answered(), Died("x"), Released()]), max_size=60)


def played(record: Record, events: Sequence[quarantine.Event]) -> Record:
    for event in events:
        record = step(record, event)
        if record.quarantined:
            break
    return record


@given(events=EVENTS, max_deaths=st.integers(1, 4), window=st.integers(1, 10))
def test_quarantine_comes_exactly_when_the_deaths_of_one_window_reach_the_bound(
    events: list[quarantine.Event], max_deaths: int, window: int
) -> None:
    answers, deaths = 0, []
    record = Record(max_deaths, window)
    for event in events:
        record = step(record, event)
        if isinstance(event, Released):
            answers, deaths = 0, []
        elif isinstance(event, Answered):
            answers += 1
        else:
            deaths.append(answers)
        expected = isinstance(event, Died) and sum(answers - death < window for death in deaths) >= max_deaths
        assert record.quarantined == expected
        if expected:
            break


def test_nothing_happens_in_quarantine_but_release() -> None:
    record = played(Record(2, 10), [Died("a"), Died("b")])
    assert record.quarantined and record.reasons == ("a", "b")
    for event in (Answered(), Died("c")):
        with pytest.raises(RuntimeError, match="quarantine"):
            step(record, event)
    assert step(record, Released()) == Record(2, 10)


@given(count=st.integers(0, 500))
def test_a_model_that_dies_rarely_is_never_quarantined(count: int) -> None:
    events = [event for _ in range(count // 10) for event in (*[Answered()] * 10, Died("x"))]
    assert not played(Record(2, 10), events).quarantined
