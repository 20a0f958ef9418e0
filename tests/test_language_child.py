"""The language child as a real process in its sandbox: it talks, dies, is replaced, and is never believed beyond reason."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.core.chat import ChatMessage, Finish, Sampling
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS, block_start
from edge_agent.core.model_shape import ModelShape
from edge_agent.language import child as language_child
from edge_agent.language.child import ChildDiedError, Death, LanguageChild
from edge_agent.language.events import MAX_BURST_US
from edge_agent.language.ring_memory import RingMemory
from edge_agent.runtime import doorbell
from edge_agent.runtime.settings import EngineSettings
from models.language_build import Words, install
from models.language_card import FileEntry, LanguageCard
from tests.kept_sessions import Kept
from tests.lying_language_worker import LIES, MORE
from tests.rings import text
from tests.sandboxes import each_runtime, run
from tests.slow_language_worker import STEP_US
from tests.tiny_llama import TINY, RandomWeights, tiny_tokenizer

WINDOW, SLOTS = 3, 4
SHAPE = ModelShape(**{name: getattr(TINY, name) for name in ModelShape.__slots__})
CURVE = ((1, 1000), (8, 1100), (64, 9000))
SETTINGS = EngineSettings(invoke_limit_us=60_000_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageCard, Path]:
    """It hardly ever ends its answer."""
    folder = tmp_path_factory.mktemp("lively")
    origin = FileEntry("random.gguf", "0" * 64, 1)
    words = Words("a lively random model", quality_source="none: it is noise")
    weights = RandomWeights(tied=False)
    weights._head[:3] = 0
    return install(weights, TINY, tiny_tokenizer(), "lively", folder, words, None, origin), folder


Model = tuple[LanguageCard, Path]


@asynccontextmanager
async def started(
    model: Model, settings: EngineSettings = SETTINGS, ring: RingMemory | None = None, deaths: list[Death] | None = None
) -> AsyncIterator[LanguageChild]:
    memory = ring or RingMemory(SHAPE, WINDOW, SLOTS)
    on_death = (lambda death: None) if deaths is None else deaths.append
    try:
        child = await LanguageChild.start(*model, settings, memory, on_death, CURVE)
        try:
            yield child
        finally:
            await child.close()
    finally:
        if ring is None:
            memory.close()


async def begun(child: LanguageChild, slot: int, ids: list[int], kept: Kept | None = None, **options: Any) -> Kept:
    kept = kept or Kept(SHAPE, WINDOW)
    if not kept.tokens:
        await child.open(slot)
    await child.begin(slot, kept.ask(ids), **{"sampling": Sampling(), "max_tokens": 60} | options)
    return kept


async def finished(
    child: LanguageChild, kept: dict[int, Kept], steps: int = 10_000, burst_us: int = 0
) -> dict[int, Finish | None]:
    """Step until nobody wants more."""
    ends = {}
    for _ in range(steps):
        reply = await child.step(burst_us)
        for event in reply.events:
            kept[event.slot].take(event, steps=reply.steps)
            assert not event.failed
            ends[event.slot] = event.finish
        if not reply.live:
            break
    return ends


async def answered(child: LanguageChild, ids: list[int], **options: Any) -> Kept:
    kept = await begun(child, 0, ids, **options)
    await finished(child, {0: kept})
    return kept


@each_runtime
@pytest.mark.parametrize("threads", [1, 2])
def test_it_talks_from_behind_every_wall(model: Model, runtime: str, threads: int) -> None:
    async def story() -> None:
        async with started(model, replace(SETTINGS, runtime=runtime, threads=threads)) as child:
            account = child.account
            assert account.library.startswith(runtime) and account.resident_bytes > 2**20
            assert "seccomp" in account.confinement and any(each.startswith("landlock") for each in account.confinement)
            assert account.stop_ids == (0, 2) and account.curve == CURVE
            ids = await child.encode(messages=[ChatMessage("user", "Say the thing in 5 words.")], limit=500)
            kept = await begun(child, 2, list(ids))
            ends = await finished(child, {2: kept})
            assert ends[2] is not None
            more = await child.encode("Go on, " * 60, limit=2000)
            await begun(child, 2, list(more), kept, max_tokens=150)
            await finished(child, {2: kept})
            assert len(kept.blocks) > 1 and kept.text

    run(story())


@each_runtime
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1200, 40, 950, 77)])
def test_after_kill_9_amid_an_answer_another_child_goes_on_with_the_same_ids_and_text(
    model: Model, runtime: str, sampling: Sampling
) -> None:
    ring = RingMemory(SHAPE, WINDOW, SLOTS)
    settings = replace(SETTINGS, runtime=runtime)
    options: dict[str, Any] = {"sampling": sampling, "stop": ("\n\n\n",), "speculate": runtime == "ai_edge_litert"}
    prompt = text(150, 200)

    async def story() -> None:
        deaths: list[Death] = []
        async with started(model, settings) as child:
            whole = await answered(child, prompt, max_tokens=230, **options)
        async with started(model, settings, ring, deaths) as child:
            kept = await begun(child, 1, prompt, max_tokens=230, **options)
            assert await finished(child, {1: kept}, 20) == {1: None}, "in the middle"
            step = asyncio.create_task(child.step())
            await asyncio.sleep(0)
            os.kill(child.pid, signal.SIGKILL)
            try:
                for event in (await step).events:
                    kept.take(event)
            except ChildDiedError:
                pass
            with pytest.raises(ChildDiedError, match="SIGKILL"):
                while True:
                    for event in (await child.step()).events:
                        kept.take(event)
            assert [death.cause for death in deaths] == ["SIGKILL"] and not child.alive
            with pytest.raises(ChildDiedError):
                await child.encode("x", limit=5)
        assert 0 < len(kept.ids) - 150 < 230
        assert any(os.pread(ring.fd, ring.slot_bytes, ring.slot_bytes)), "the memory outlived the child"
        async with started(model, settings, ring) as child:
            await child.open(3, **kept.parked())  # type: ignore[arg-type]
            told = tuple(kept.ids[150:])
            await begun(child, 3, [], kept, max_tokens=230 - len(told), answered=told, **options)
            await finished(child, {3: kept})
        assert len(whole.ids) == 150 + 230
        assert (kept.ids, kept.text) == (whole.ids, whole.text)

    try:
        run(story())
    finally:
        ring.close()


def test_a_session_larger_than_the_arena_comes_in_pieces(model: Model) -> None:
    window = 2**20 // SHAPE.block_bytes * 2 + 5
    tokens = block_start(window + 7) + BLOCK_TOKENS + 9
    parked: dict[str, Any] = {
        "tokens": tokens,
        "prelude": bytes(SHAPE.prelude_bytes),
        "blocks": [bytes((n % 7, 0)) * (SHAPE.block_bytes // 2) for n in range(window)],
        "rows": bytes((BLOCK_TOKENS + 9) * SHAPE.row_bytes),
    }

    async def ids(arena_bytes: int) -> tuple[int, ...]:
        ring = RingMemory(SHAPE, window, 2)
        try:
            async with started(model, replace(SETTINGS, arena_bytes=arena_bytes), ring) as child:
                await child.open(1, **parked)
                await child.begin(1, [5, 6, 7], sampling=Sampling(), max_tokens=5)
                return tuple([each for _ in range(5) for event in (await child.step()).events for each in event.ids])
        finally:
            ring.close()

    small, large = run(ids(2**20)), run(ids(2**24))
    assert small == large and len(small) == 5


def test_what_is_asked_amiss_is_refused_and_the_child_lives_on(model: Model) -> None:
    async def story() -> None:
        async with started(model, replace(SETTINGS, arena_bytes=2**20)) as child:
            with pytest.raises(RefusedError, match="open it"):
                await child.begin(0, [1], sampling=Sampling(), max_tokens=5)
            await child.open(0)
            for prompt, count in (([], 5), ([10**6], 5), ([1], 0), ([1], 10**6)):
                with pytest.raises(RefusedError):
                    await child.begin(0, prompt, sampling=Sampling(), max_tokens=count)
            for slot in (-1, SLOTS, 2**40):
                with pytest.raises(RefusedError, match="slot"):
                    await child.open(slot)
            with pytest.raises(RefusedError, match="at most 10 tokens|10"):
                await child.encode("word " * 100, limit=10)
            with pytest.raises(RefusedError, match="10"):
                await child.encode(messages=[ChatMessage("user", "word " * 100)], limit=10)
            for wrong in ({"rows": b"x"}, {"prelude": b""}, {"tokens": 500}, {"blocks": [b"x"]}):
                parked: dict[str, Any] = {
                    "tokens": 10, "prelude": bytes(SHAPE.prelude_bytes), "rows": bytes(6 * SHAPE.row_bytes)
                } | wrong  # fmt: skip
                with pytest.raises(RefusedError):
                    await child.open(0, **parked)
            with pytest.raises(RefusedError, match="arena|bulk|bytes"):
                await child.begin(0, [1] * 2**19, sampling=Sampling(), max_tokens=5)
            assert (await child.step()).events == ()
            assert len((await answered(child, [5, 6, 7], max_tokens=4)).ids) == 7

    run(story())


def test_calls_get_their_turn_between_two_steps(model: Model) -> None:
    async def story() -> None:
        async with started(model) as child:
            kept = await begun(child, 0, [5] * 30, max_tokens=100)
            order: list[str] = []

            async def stepping() -> None:
                live = 1
                while live:
                    reply = await child.step()
                    live = reply.live
                    order.append("step")
                    for event in reply.events:
                        kept.take(event)

            async def asking() -> None:
                for _ in range(5):
                    await child.encode("who speaks?", limit=50)
                    order.append("call")

            await asyncio.gather(stepping(), asking())
            calls = [index for index, each in enumerate(order) if each == "call"]
            assert calls[-1] <= 5 * 3, order

    run(story())


@each_runtime
def test_bursts_give_the_very_answer_of_single_steps_in_fewer_calls(model: Model, runtime: str) -> None:
    async def story() -> None:
        async with started(model, replace(SETTINGS, runtime=runtime)) as child:
            plain, calls = await answered(child, text(90, 200), max_tokens=150), 0
            kept, live = await begun(child, 1, text(90, 200), max_tokens=150), 1
            while live:
                reply = await child.step(MAX_BURST_US)
                live, calls = reply.live, calls + 1
                for event in reply.events:
                    kept.take(event, steps=reply.steps)
            assert (kept.ids, kept.text, kept.blocks) == (plain.ids, plain.text, plain.blocks)
            assert calls < 20

    run(story())


def test_a_call_that_waits_ends_the_burst(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_child, "WORKER", "tests.slow_language_worker")

    async def story() -> None:
        async with started(model) as child:
            kept = await begun(child, 0, [5] * 30, max_tokens=1000, speculate=False)
            await finished(child, {0: kept}, 1)
            burst = asyncio.create_task(child.step(MAX_BURST_US))
            while not child.stepping:
                await asyncio.sleep(0)
            await child.encode("who speaks?", limit=50)
            assert burst.done(), "calls keep their order"
            hurried = await burst
            burst = asyncio.create_task(child.step(MAX_BURST_US))
            while not child.stepping:
                await asyncio.sleep(0)
            child.hurry()
            second = await burst
            patient = await child.step(MAX_BURST_US)
            for reply in (hurried, second, patient):
                for event in reply.events:
                    kept.take(event, steps=reply.steps)
            assert hurried.steps <= 2 and second.steps <= 2 < patient.steps, "a hurry is spent with its burst"

    run(story())


def test_a_burst_exceeds_its_bound_by_no_more_than_a_step(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_child, "WORKER", "tests.slow_language_worker")

    async def story() -> None:
        async with started(model) as child:
            await begun(child, 0, [5] * 30, max_tokens=1000, speculate=False)
            await child.step()
            for burst_us in (0, 10_000, STEP_US, 3 * STEP_US):
                reply = await child.step(burst_us)
                assert reply.steps <= -(-burst_us // STEP_US) + (not burst_us)
            for wrong in (-1, MAX_BURST_US + 1):
                with pytest.raises(RefusedError, match="burst_us"):
                    await child.step(wrong)

    run(story())


def test_a_step_that_its_caller_gave_up_is_given_to_the_next(model: Model) -> None:
    async def story() -> None:
        async with started(model) as child:
            kept = await begun(child, 0, [9, 8, 7], max_tokens=30)
            for _ in range(5):
                caller = asyncio.create_task(child.step())
                await asyncio.sleep(0)
                caller.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await caller
                for event in (await child.step()).events:
                    kept.take(event)
            await finished(child, {0: kept})
            assert kept.ids == (await answered(child, [9, 8, 7], max_tokens=30)).ids

    run(story())


def test_a_cancelled_turn_stops_and_a_closed_slot_gives_its_memory_back(model: Model) -> None:
    ring = RingMemory(SHAPE, 200, SLOTS)

    async def story() -> None:
        async with started(model, ring=ring) as child:
            kept = await begun(child, 1, text(3000, 200))
            kept.window_blocks = 200
            await finished(child, {1: kept}, 30)
            kept.take(await child.cancel(1), cancelled=True)
            kept.must_be_whole()
            assert (await child.step()).live == 0
            used = os.fstat(ring.fd).st_blocks * 512
            await child.close_slot(1)
            assert os.fstat(ring.fd).st_blocks * 512 < used / 4
            with pytest.raises(RefusedError, match="open it"):
                await child.cancel(1)

    try:
        run(story())
    finally:
        ring.close()


@pytest.mark.parametrize("lie", [*LIES, *MORE])
def test_a_child_that_says_nonsense_is_killed(model: Model, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_child, "WORKER", "tests.lying_language_worker")

    async def story() -> None:
        deaths: list[Death] = []
        async with started(model, deaths=deaths) as child:
            await child.encode(f"lie: {lie}", limit=50)
            with pytest.raises(ChildDiedError, match="broke the protocol"):
                await child.step()
            assert len(deaths) == 1 and not Path(f"/proc/{child.pid}").exists()

    run(story())


def test_bulk_outside_the_arena_is_refused_on_both_sides() -> None:
    for size_bytes in (2**20 + 1, 2**63, -1, True):
        with pytest.raises(RefusedError):
            doorbell.decode_answer(doorbell.encode_said(1, 0, None, size_bytes), 2**20)
        with pytest.raises(RefusedError):
            doorbell.decode_call(doorbell.encode_call(1, "step", None, size_bytes), 2**20)
    said = doorbell.decode_answer(doorbell.encode_said(1, 7, [1, "x"], 2**20), 2**20)
    assert (said.sequence, said.elapsed_us, said.reply) == (1, 7, doorbell.Said([1, "x"], 2**20))


@pytest.mark.parametrize("lie", ["ids", "count"])
def test_ids_that_are_none_are_not_believed(model: Model, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_child, "WORKER", "tests.lying_language_worker")

    async def story() -> None:
        async with started(model) as child:
            with pytest.raises(ChildDiedError, match="broke the protocol"):
                await child.encode(f"lie: {lie}", limit=50)

    run(story())


@pytest.mark.parametrize(("how", "cause"), [("hang", "hung"), ("exit", "exit code 7")])
def test_a_child_that_hangs_or_leaves_is_told(model: Model, how: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_child, "WORKER", "tests.lying_language_worker")

    async def story() -> None:
        async with started(model, replace(SETTINGS, invoke_limit_us=1_000_000)) as child:
            await child.encode(f"lie: {how}", limit=50)
            waiting = [asyncio.create_task(child.encode("x", limit=5)) for _ in range(2)]
            await asyncio.gather(*waiting)
            with pytest.raises(ChildDiedError, match=cause):
                await child.step()

    run(story())


def test_files_that_are_missing_or_changed_are_told_and_nothing_stays_open(model: Model, tmp_path: Path) -> None:
    card, folder = model
    wrong = replace(card.tokenizer, sha256="1" * 64)
    stages = {name: replace(entry, sha256="1" * 64) for name, entry in card.files.items()}

    async def fails(error: type[Exception], *bad: Any) -> None:
        with pytest.raises(error):
            async with started(bad):
                pass

    async def story() -> None:
        await fails(UnavailableError, card, tmp_path)
        await fails(RefusedError, replace(card, tokenizer=wrong), folder)
        await fails(RefusedError, replace(card, files=stages), folder)

    run(story())
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    run(story())
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_arena_that_cannot_hold_a_step_is_refused(model: Model) -> None:
    ring = RingMemory(replace(SHAPE, layers=256), 1, 64)

    async def story() -> None:
        with pytest.raises(RefusedError, match="arena_bytes"):
            await LanguageChild.start(*model, replace(SETTINGS, arena_bytes=2**20), ring)

    try:
        run(story())
    finally:
        ring.close()


def test_the_cost_of_rows_is_measured_where_it_is_not_given(model: Model) -> None:
    async def story() -> tuple[tuple[int, int], ...]:
        ring = RingMemory(SHAPE, WINDOW, SLOTS)
        try:
            child = await LanguageChild.start(*model, SETTINGS, ring)
            await child.close()
        finally:
            ring.close()
        return child.account.curve

    curve = run(story())
    assert [rows for rows, _ in curve][0] == 1 and curve[-1][0] == 64
    assert curve[0][1] < curve[-1][1]


def test_the_agents_side_needs_no_numpy() -> None:
    code = "import sys, edge_agent.language.child; sys.exit('numpy' in sys.modules or 'ai_edge_litert' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
