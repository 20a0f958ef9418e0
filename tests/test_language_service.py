"""Laws of the language service, on a tiny model with its real confined child and its real files.

What was said once is paid for once: after a restart, a death, a detour to disk or in company, a session answers as if nothing had
happened.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.core.chat import ChatMessage, Finish, Sampling, Tier, Turn, TurnEnd
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS
from edge_agent.gateway.talker import CONTEXT_LENGTH, DRAINING, KV_ROOM, SESSION_BUSY
from edge_agent.language.child import StepReply
from edge_agent.language.service import LanguageService
from edge_agent.store.kv_peers import PeerKv
from tests.speaking import LIVELY, answer, new_service, run, says, serving, until

GREEDY = Sampling()
LONG = 100
"""Tokens of an answer in which blocks are sealed; three of them fill the window."""


def three_turns(session: str) -> list[Turn]:
    return [says(text, session, LONG) for text in ("Who is there?", "And why?", "Then go.")]


def texts(ends: list[TurnEnd]) -> list[str]:
    return [end.text for end in ends]


async def undisturbed(state: Path, turns: list[Turn]) -> list[str]:
    """What a service that nothing happens to answers, one turn after another."""
    async with serving(state) as service:
        return [(await answer(service, turn)).text for turn in turns]


def test_a_session_answers_after_each_restart_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    async def work() -> None:
        expected = await undisturbed(tmp_path / "whole", three_turns("a"))
        for number, turn in enumerate(three_turns("a")):
            async with serving(tmp_path / "cut") as service:
                end = await answer(service, turn)
            assert end.text == expected[number]
            assert end.recomputed_tokens == 0
            if number:
                assert end.tier is Tier.DISK
                assert end.prompt_tokens - end.cached_tokens < 40, "the new message, and the last id before it"

    run(work())


def test_in_one_process_a_session_stays_hot_and_parking_it_changes_no_answer(tmp_path: Path) -> None:
    async def work() -> None:
        expected = await undisturbed(tmp_path / "hot", three_turns("a"))
        async with serving(tmp_path / "parked", max_sessions=1) as service:
            ends = []
            for turn in three_turns("a"):
                ends.append(await answer(service, turn))
                assert (await answer(service, says("a guest", "b"))).kv_bytes > 0
        assert texts(ends) == expected
        assert [end.tier for end in ends] == [Tier.NONE, Tier.RAM, Tier.RAM]

    run(work())


QUESTION = Turn((ChatMessage("user", "What comes next?"),), max_tokens=24)
"""Greedy. The tiny model's answers are plain text, which is the same tokens again when it is sent back."""


def test_a_client_that_resends_its_history_pays_only_for_the_new_turn(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            end = await answer(service, QUESTION)
            sessions = len(service.store.names())
            more = (*QUESTION.messages, ChatMessage("assistant", end.text), ChatMessage("user", "go on"))
            again = await answer(service, Turn(more, max_tokens=24))
            assert again.cached_tokens == end.prompt_tokens + end.completion_tokens - 1
            assert again.tier is Tier.HOT
            assert len(service.store.names()) == sessions, "its own session went on"
            alone = Turn(more, max_tokens=24, session="whole")
            async with serving(tmp_path / "fresh") as other:
                assert (await answer(other, alone)).text == again.text

    run(work())


def test_sessions_that_begin_alike_share_their_blocks_and_do_not_disturb_each_other(tmp_path: Path) -> None:
    prefix = "All sessions begin with these very words, which are more than three blocks long. " * 4

    def turn(end: str, session: str = "") -> Turn:
        return Turn(prompt=prefix + end, session=session, sampling=LIVELY, max_tokens=40)

    async def work() -> None:
        expected = await undisturbed(tmp_path / "alone", [turn("One", "one"), says("go on", "one")])
        async with serving(tmp_path / "shared") as service:
            first = await answer(service, turn("One", "one"))
            blocks_bytes = service.store.bytes_on_disk
            second = await answer(service, turn("Two"))
            assert first.cached_tokens == 0
            assert second.cached_tokens >= 256, "up to where they part, or to the block before it"
            assert service.store.bytes_on_disk - blocks_bytes < blocks_bytes * 3 // 4
            assert [first.text, (await answer(service, says("go on", "one"))).text] == expected

    run(work())


def test_a_named_session_takes_new_messages_or_its_own_history_resent(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            one = await answer(service, says("first", "n"))
            two = await answer(service, says("second", "n"))
            assert two.prompt_tokens > one.prompt_tokens + one.completion_tokens
            assert two.cached_tokens == one.prompt_tokens + one.completion_tokens - 1
            assert two.session == "n"
            history = (ChatMessage("user", "first"), ChatMessage("assistant", "something else"), ChatMessage("user", "third"))
            rewound = await answer(service, Turn(history, session="n", max_tokens=8))
            assert rewound.prompt_tokens < two.prompt_tokens + two.completion_tokens, "it went back to where the history diverges"
            assert rewound.cached_tokens >= one.prompt_tokens - 1
            assert service.store.names() == ["n"]

    run(work())


def test_a_second_turn_of_a_named_session_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            refusals: list[str] = []

            async def also(text: str) -> None:
                if not refusals:
                    with pytest.raises(RefusedError) as caught:
                        await answer(service, says("me too", "n"))
                    refusals.append(caught.value.subject)

            await answer(service, says("first", "n"), also)
            assert refusals == [SESSION_BUSY]
            assert (await answer(service, says("now", "n"))).completion_tokens

    run(work())


def test_an_unnamed_turn_forks_from_a_session_that_is_busy(tmp_path: Path) -> None:
    turn = Turn(prompt="The same beginning of everything. " * 4, sampling=LIVELY, max_tokens=48)

    async def work() -> None:
        async with serving(tmp_path) as service:
            forks: list[TurnEnd] = []

            async def also(text: str) -> None:
                if not forks:
                    forks.append(await answer(service, turn))

            first = await answer(service, turn, also)
            assert forks[0].text == first.text
            assert forks[0].cached_tokens > 64
            assert len(service.store.names()) == 2

    run(work())


# admission


def test_a_turn_that_does_not_fit_now_waits_and_one_that_never_fits_is_refused_with_bytes(tmp_path: Path) -> None:
    async def work() -> None:
        probe = new_service(tmp_path / "probe")
        need_bytes = probe.hot.need_bytes(20 + LONG + 40)
        await probe.close()
        async with serving(tmp_path / "s", hot_bytes=need_bytes, max_waiting=1) as service:
            with pytest.raises(RefusedError, match=rf"{CONTEXT_LENGTH}: got \d+ bytes of KV; allowed: {need_bytes} bytes"):
                await answer(service, says("too much", "c", 2000))
            first = asyncio.create_task(answer(service, says("hi", "a", LONG)))
            await until(lambda: service.turns.live() == 1)
            second = asyncio.create_task(answer(service, says("hi", "b", LONG)))
            await until(lambda: service.waiting == 1)
            with pytest.raises(UnavailableError, match="bytes needed") as caught:
                await answer(service, says("hi", "c", LONG))
            assert caught.value.subject == KV_ROOM
            assert not second.done()
            assert (await first).text == (await second).text, "the first gave way when it was idle"
            assert service.waiting == 0

    run(work())


def test_a_turn_that_waits_and_is_given_up_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, max_sessions=1) as service:
            first = asyncio.create_task(answer(service, says("hi", "a", LONG)))
            await until(lambda: service.turns.live() == 1)
            second, third = (asyncio.create_task(answer(service, says("hi", name, 8))) for name in "bc")
            await until(lambda: service.waiting == 2)
            second.cancel()
            assert (await first).completion_tokens == LONG
            assert (await third).completion_tokens == 8
            assert (await answer(service, says("hi", "b", 8))).completion_tokens == 8

    run(work())


def test_sessions_that_gave_way_hold_no_memory(tmp_path: Path) -> None:
    async def work() -> None:
        probe = new_service(tmp_path / "probe")
        small_bytes, large_bytes = probe.hot.need_bytes(60), probe.hot.need_bytes(400)
        await probe.close()
        assert small_bytes < large_bytes <= 2 * small_bytes
        async with serving(tmp_path / "s", hot_bytes=3 * small_bytes) as service:
            for name in "abc":
                await answer(service, says("hi", name, 4))
            assert len(service.hot.residents()) == 3
            await answer(service, says("x" * 300, "big", 60))
            assert len(service.hot.residents()) == 2
            assert 0 < os.fstat(service.ring.fd).st_blocks * 512 <= service.hot.used_bytes, "as the system counts"
            for resident in service.hot.residents():
                service.cool(resident.session)
            assert await service.ready() == ""
            assert os.fstat(service.ring.fd).st_blocks == 0

    run(work())


def test_more_new_tokens_than_the_window_are_a_matter_of_context_and_leave_no_trace(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            for length in (1000, 100_000):
                for session in ("", "a"):
                    for turn in (Turn(prompt="x" * length, session=session, max_tokens=8), says("x" * length, session, 8)):
                        with pytest.raises(RefusedError) as caught:
                            await answer(service, turn)
                        assert caught.value.subject == CONTEXT_LENGTH
            assert service.store.names() == []
            assert service.hot.used_bytes == 0
            assert (await answer(service, says("hi"))).completion_tokens

    run(work())


# company


def test_eight_turns_at_once_answer_as_one_by_one(tmp_path: Path) -> None:
    turns = [says(f"Session {number} says " + "so " * number, f"s{number}", 80) for number in range(8)]

    async def work() -> None:
        expected = await undisturbed(tmp_path / "alone", turns)
        async with serving(tmp_path / "together") as service:
            ends = await asyncio.gather(*(answer(service, turn) for turn in turns))
            assert texts(list(ends)) == expected
            assert service.turns.live() == 0

    run(work())


# deaths


def test_a_child_that_is_killed_in_the_middle_of_turns_loses_and_repeats_nothing(tmp_path: Path) -> None:
    turns = [says(f"Speaker {name}", name, LONG, sampling) for name, sampling in (("a", LIVELY), ("b", GREEDY), ("c", LIVELY))]
    turns.append(Turn(prompt="x" * 200, session="d", max_tokens=LONG, sampling=LIVELY))

    async def work() -> None:
        expected = await undisturbed(tmp_path / "alone", turns)
        log: list[str] = []
        async with serving(tmp_path / "killed", log.append, max_deaths=10) as service:
            strikes = [10, 60, 120]

            async def strike(text: str) -> None:
                struck_is_seen = service.pump.deaths == 3 - len(strikes) and not service.pump.why
                if strikes and service.turns.tokens_made >= strikes[0] and struck_is_seen:
                    strikes.pop(0)
                    os.kill(pid_of(service), signal.SIGKILL)

            ends = await asyncio.gather(*(answer(service, turn, strike) for turn in turns))
            assert texts(list(ends)) == expected
            assert service.pump.deaths == sum("runs again" in line for line in log) == 3
            again = await answer(service, says("still there?", "a"))
            assert again.recomputed_tokens == 0

    run(work())


def pid_of(service: LanguageService) -> int:
    assert service.pump.child is not None
    return service.pump.child.pid


def test_a_child_that_dies_between_turns_is_replaced_and_its_sessions_come_from_the_store(tmp_path: Path) -> None:
    async def work() -> None:
        expected = await undisturbed(tmp_path / "alone", three_turns("a")[:2])
        async with serving(tmp_path / "killed") as service:
            first = await answer(service, three_turns("a")[0])
            os.kill(pid_of(service), signal.SIGKILL)
            await until(lambda: service.pump.deaths == 1 and not service.pump.why)
            assert service.hot.used_bytes == 0, "nothing lies in the rings of a new child"
            second = await answer(service, three_turns("a")[1])
            assert texts([first, second]) == expected
            assert second.tier is Tier.RAM

    run(work())


def test_a_model_that_keeps_dying_is_quarantined_until_it_is_released(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, max_deaths=2) as service:

            async def strike(text: str) -> None:
                os.kill(pid_of(service), signal.SIGKILL)

            with pytest.raises(UnavailableError, match="in quarantine after 2 deaths"):
                while True:
                    await answer(service, says("hi", "a", LONG), strike)
            assert "in quarantine" in await service.ready()
            with pytest.raises(UnavailableError, match="release it"):
                await answer(service, says("hi", "a"))
            service.pump.release()
            await until(lambda: not service.pump.why)
            assert await service.ready() == ""
            assert (await answer(service, says("hi", "a"))).completion_tokens

    run(work())


# ends


def test_a_client_that_goes_frees_its_slot_and_what_it_heard_is_kept(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, max_sessions=1) as service:
            stream = service.talk(says("hi", "a", 2000))
            heard = [await anext(stream) for _ in range(5)]
            await stream.aclose()
            assert (await answer(service, says("me", "b"))).completion_tokens
            held = service.store.resume("a")
            assert held is not None
            assert len(held.pending) == 1, "all ids but the last are in KV"
            end = await answer(service, says("and then?", "a"))
            assert end.cached_tokens == held.tokens
            assert len(heard) == 5

    run(work())


def test_a_client_that_goes_while_its_prompt_is_read_holds_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            for delay in range(12):
                task = asyncio.create_task(answer(service, Turn(prompt="y" * 250, session="a", max_tokens=8)))
                for _ in range(delay):
                    await asyncio.sleep(0.0005)
                task.cancel()
                await asyncio.wait([task])
                await until(lambda: service.turns.count == 0)
                service.store.drop("a")
            assert (await answer(service, says("hi", "a"))).completion_tokens

    run(work())


def test_what_was_read_of_a_prompt_is_kept_when_its_client_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            turn = Turn(prompt="z" * 370, session="a", max_tokens=8)
            task = asyncio.create_task(answer(service, turn))
            take, read = service.turns.take, 0

            def heard(reply: StepReply) -> None:
                nonlocal read
                take(reply)
                read = max(read, *(event.tokens for event in reply.events if not event.ids), 0)
                task.cancel()

            monkeypatch.setattr(service.turns, "take", heard)
            await asyncio.wait([task])
            await until(lambda: service.turns.count == 0)
            monkeypatch.undo()
            held = service.store.resume("a")
            assert held is not None
            assert held.tokens >= read > 0
            end = await answer(service, turn)
            assert end.cached_tokens == held.tokens

    run(work())


def test_stopping_ends_live_turns_and_keeps_what_they_said(tmp_path: Path) -> None:
    async def work() -> None:
        service = new_service(tmp_path)
        await service.start()
        stream = service.talk(says("hi", "a", 2000))
        text = "".join([(await anext(stream)).text for _ in range(5)])
        closing = asyncio.create_task(service.close())
        with pytest.raises(UnavailableError) as caught:
            async for part in stream:
                text += part.text
        assert caught.value.subject == DRAINING
        await closing
        with pytest.raises(UnavailableError):
            await answer(service, says("hi"))
        async with serving(tmp_path) as service:
            held = service.store.resume("a")
            assert held is not None
            assert len(held.pending) == 1

    run(work())


# damage


def block_files(state: Path) -> list[Path]:
    return sorted((state / "kv").glob("**/blocks-*/*"), key=lambda path: path.stat().st_mtime_ns)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


Damage = Callable[[Path], object]
REST: list[Damage] = [lambda path: os.truncate(path, 100), lambda path: path.write_bytes(b"foreign" * 99)]
DAMAGES: list[Damage] = [flip, *REST]


async def answered_after(
    damage: Callable[[Path], object], which: Callable[[list[Path]], Path], folder: Path, turns: list[Turn]
) -> TurnEnd:
    """The end of the second turn, when ``which`` of the first one's blocks was damaged in between; it tells of that."""
    log: list[str] = []
    async with serving(folder) as service:
        await answer(service, turns[0])
    damage(which(block_files(folder)))
    async with serving(folder, log.append) as service:
        end = await answer(service, turns[1])
    assert end.recomputed_tokens > 0
    assert end.notes
    assert any("KV block" in line for line in log)
    return end


def prelude(files: list[Path]) -> Path:
    return min(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [flip, *(pytest.param(each, marks=pytest.mark.long) for each in REST)])
def test_a_session_whose_prelude_was_damaged_is_read_from_its_beginning_and_answers_alike(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """What was read and is read again gives the same bits, on every runtime (ADR 5)."""
    turns = [Turn(prompt="Read this, and this. " * 14, session="a", max_tokens=1), says("And then?", "a", LONG)]

    async def work() -> None:
        expected = await undisturbed(tmp_path / "whole", turns)
        assert (await answered_after(damage, prelude, tmp_path / "hurt", turns)).text == expected[1]

    run(work())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_costs_its_suffix_and_the_talk_goes_on(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """The block before it is int4 now where it was int8 when what follows was first computed: not the same bits (ADR 5)."""

    async def work() -> None:
        end = await answered_after(damage, lambda files: files[-1], tmp_path, three_turns("a")[:2])
        assert end.completion_tokens == LONG
        assert 0 < end.cached_tokens < end.prompt_tokens - BLOCK_TOKENS
        assert end.recomputed_tokens < 3 * BLOCK_TOKENS, "it, and the rows after it"
        async with serving(tmp_path) as service:
            again = await answer(service, three_turns("a")[2])
            assert (again.recomputed_tokens, again.notes) == (0, ()), "it was mended"

    run(work())


# the rest


def test_a_begun_answer_goes_on_after_what_was_given(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            end = await answer(service, QUESTION)
            begun = end.text[:8]
            rest = await answer(service, replace(QUESTION, max_tokens=12, begun=begun))
            assert rest.text == end.text[:20], "greedy, so it goes on as it would have"
            assert len(set(end.text)) > 1

    run(work())


def test_a_broken_off_turn_of_a_named_session_goes_on_and_is_not_asked_twice(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            for before in ("", "Earlier."):
                name = f"n{len(before)}"
                if before:
                    await answer(service, says(before, name, 8))
                named = replace(QUESTION, session=name)
                whole = await answer(service, named)
                begun = whole.text[:6]
                again = await answer(service, replace(named, begun=begun, max_tokens=4))
                assert again.text.startswith(begun)
                assert again.prompt_tokens <= whole.prompt_tokens + whole.completion_tokens, "the message is there once"
                assert service.admitting.reasons[name].startswith("rewound")

    run(work())


def test_a_store_that_fails_ends_its_turn_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        expected = await undisturbed(tmp_path / "alone", [says("hi", "good", LONG)])
        async with serving(tmp_path / "s") as service:
            append = service.store.append

            def fails(name: str, *rest: Any, **more: Any) -> None:
                if name == "bad" and rest[0] > 60:
                    raise UnavailableError("disk", "no space left on device")
                append(name, *rest, **more)

            monkeypatch.setattr(service.store, "append", fails)
            good, bad = await asyncio.gather(
                answer(service, says("hi", "good", LONG)), answer(service, says("hi", "bad", 4000)), return_exceptions=True
            )
            assert (await service.pump.call(lambda child: child.step())).live == 0, "the child knows that it is over"
            assert isinstance(good, TurnEnd)
            assert good.text == expected[0]
            assert isinstance(bad, UnavailableError)
            assert bad.subject == "disk"
            assert service.turns.count == 0
            monkeypatch.undo()
            assert (await answer(service, says("again", "bad"))).completion_tokens

    run(work())


def test_a_fault_of_the_agents_own_is_told_to_everybody_and_hangs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        log: list[str] = []
        async with serving(tmp_path, log.append) as service:
            append = service.store.append

            def broken(name: str, *rest: Any, **more: Any) -> None:
                if rest[0] > 60:
                    raise ZeroDivisionError
                append(name, *rest, **more)

            monkeypatch.setattr(service.store, "append", broken)
            outcomes = await asyncio.gather(*(answer(service, says("hi", name, LONG)) for name in "ab"), return_exceptions=True)
            assert ["fault of the agent" in str(each) for each in outcomes] == [True, True], outcomes
            assert "ZeroDivisionError" in await service.ready()
            assert any("ZeroDivisionError" in line for line in log)

    run(work())


def test_a_session_moves_to_another_board_and_says_there_what_it_would_have_said_here(tmp_path: Path) -> None:
    async def work() -> None:
        first, second = three_turns("a")[:2]
        expected = await undisturbed(tmp_path / "stays", [first, second])
        async with serving(tmp_path / "here") as here, serving(tmp_path / "there") as there:
            one = await answer(here, first)
            gives, takes = PeerKv(here.store), PeerKv(there.store)
            manifest = gives.export("a")
            takes.adopt(manifest)
            for name in takes.missing(manifest).blocks:
                takes.import_block(manifest, name, gives.export_block(name))
            takes.import_rows(manifest, gives.export_rows(manifest))
            two = await answer(there, second)
            assert texts([one, two]) == expected
            assert two.cached_tokens == one.prompt_tokens + one.completion_tokens - 1

    run(work())


def test_a_session_that_rests_gives_its_memory_back_and_one_that_answers_does_not(tmp_path: Path) -> None:
    async def work() -> None:
        expected = await undisturbed(tmp_path / "alone", three_turns("a")[:2])
        async with serving(tmp_path / "s") as service:

            async def also(text: str) -> None:
                with pytest.raises(RefusedError) as caught:
                    service.cool("a")
                assert caught.value.subject == SESSION_BUSY

            first = await answer(service, three_turns("a")[0], also)
            assert service.hot.used_bytes > 0
            service.cool("a")
            assert service.hot.used_bytes == 0
            assert texts([first, await answer(service, three_turns("a")[1])]) == expected

    run(work())


def test_sessions_are_listed_as_a_turn_would_find_them_the_last_used_first(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            ends = [await answer(service, says("hi", name)) for name in ("a", "b", "")]
            service.cool("a")
            for _ in range(3):
                service.sessions(9)
            hot, cooled = service.sessions(9)
            assert [hot.name, cooled.name] == ["b", "a"], "who lists them does not use them, and unnamed ones are nobody's affair"
            assert [hot.tier, cooled.tier] == [Tier.HOT, Tier.RAM]
            held = [end.prompt_tokens + end.completion_tokens - 1 for end in ends]
            assert [cooled.tokens, hot.tokens] == held[:2]
            assert service.sessions(1) == [hot]
            assert 0 < cooled.size_bytes == service.store.bytes_of("a")
            before = cooled
        async with serving(tmp_path) as service:
            (again,) = [each for each in service.sessions(9) if each.name == "a"]
            assert again == replace(before, tier=Tier.DISK), "with the time of its last use"
            end = await answer(service, says("go on", "a"))
            assert end.cached_tokens == again.tokens

    run(work())


def test_a_session_that_is_forgotten_is_nowhere_and_one_that_answers_cannot_be(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:

            async def also(text: str) -> None:
                with pytest.raises(RefusedError) as caught:
                    await service.forget("a")
                assert caught.value.subject == SESSION_BUSY

            first = await answer(service, says("hi", "a"), also)
            forgetting = asyncio.create_task(service.forget("a"))
            await asyncio.sleep(0)
            with pytest.raises(RefusedError, match=SESSION_BUSY):
                await answer(service, says("hi", "a"))
            assert await forgetting
            assert not await service.forget("a"), "it is not here any more"
            assert await service.ready() == ""
            assert os.fstat(service.ring.fd).st_blocks == service.hot.used_bytes == 0
            assert service.sessions(9) == service.store.names() == []
            assert (await answer(service, says("hi", "a"))).text == first.text, "a session of this name begins anew"

    run(work())


def test_figures_tell_what_is_held_and_ready_asks_the_child(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path) as service:
            assert await service.ready() == ""
            end = await answer(service, says("hello there, this is a longer prompt" * 8, "a"))
            told = {(each.name, dict(each.labels).get("tier", "")): each.value for each in service.figures()}
            assert told["tokens_made_total", ""] == end.completion_tokens
            assert told["sessions", ""] == 1
            assert told["prefill_tokens_a_second", ""] > 0
            assert told["kv_bytes", "hot"] > 0
            assert told["kv_bytes", "disk"] > 0
            assert end.finish is Finish.LENGTH
        assert "unloaded" in await service.ready() or "stopping" in await service.ready()

    run(work())


@pytest.mark.parametrize("a_look", [30, pytest.param(80, marks=pytest.mark.long)])
def test_memory_is_flat_over_hundreds_of_turns(tmp_path: Path, a_look: int) -> None:
    async def work() -> None:
        async with serving(tmp_path, disk_bytes=2**18, ram_bytes=2**18) as service:

            async def turns(count: int) -> int:
                for number in range(count):
                    await answer(service, says(f"turn {number % 7}", "a" if number % 2 else "", 4))
                return tracemalloc.get_traced_memory()[0]

            await turns(70)
            tracemalloc.start()
            held = [await turns(a_look) for _ in range(4)]
            tracemalloc.stop()
            grown = [after - before for before, after in zip(held, held[1:], strict=False)]
            assert min(grown) < 100_000, "a thing that is made once may be made at any time; a leak grows each time"
            assert len(asyncio.all_tasks()) < 6

    run(work())
