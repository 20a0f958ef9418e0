"""A language model is exchanged while people talk with it: no turn fails, and every session goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_agent.core.chat import TurnEnd
from edge_agent.core.values import Status
from edge_agent.language import child as language_child
from edge_agent.node.streams import end_of
from edge_agent.runtime.settings import EngineSettings
from tests.releases import LANGUAGE, Rig, hosting
from tests.sandboxes import run


@pytest.fixture(autouse=True)
def moods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_child, "WORKER", "tests.moody_language_worker")


@asynccontextmanager
async def talking(folder: Path, mood: str = "") -> AsyncIterator[Rig]:
    async with hosting(folder, EngineSettings(), first=None) as rig:
        await rig.host.load(LANGUAGE, rig.install_language(1, mood))
        yield rig


async def said(rig: Rig, text: str, session: str = "", tokens: int = 24) -> tuple[TurnEnd, bytes]:
    """The end of a turn that went well, whose parts make up its text; and the digest of who made the last of it."""
    result, parts = await rig.say(text, session, tokens)
    assert result.status is Status.OK, result.reason
    end = end_of(result)
    assert end.text == parts
    assert end.completion_tokens == tokens
    return end, result.model_digest


def test_sessions_follow_to_the_next_release_with_their_ids_and_it_is_said(tmp_path: Path) -> None:
    async def story() -> None:
        async with talking(tmp_path) as rig:
            first, one = await said(rig, "Who is there?", "a", 60)
            await said(rig, "And here?", "b")
            await rig.host.bring(rig.install_language(2))
            golden, why = await rig.host.golden_beside(LANGUAGE)
            assert (len(golden), why) == (32, "")
            offer = await rig.host.hand_over(LANGUAGE)
            second, two = await said(rig, "And why?", "a")
            assert two == offer.digest != one
            assert second.prompt_tokens > first.prompt_tokens + first.completion_tokens, "it knows what was said"
            assert second.cached_tokens == 0
            assert second.recomputed_tokens == first.prompt_tokens + first.completion_tokens - 1
            assert "are computed again" in second.notes[0]
            assert rig.trials == [""]
            assert any("session a comes from release 1" in line for line in rig.reports)
            await rig.host.settle(LANGUAGE)
            await rig.until_gone()
            assert not (tmp_path / "kv" / f"{LANGUAGE}@1").exists()
            third, _ = await said(rig, "Go on.", "a")
            assert third.cached_tokens > 0
            assert not third.notes
            other, _ = await said(rig, "Go on.", "b")
            assert other.recomputed_tokens > 0, "who did not talk in the trial has come along as well"
            assert sorted(name for name, *_ in rig.host.speakers[LANGUAGE].sessions()) == ["a", "b"]

    run(story())


def test_a_turn_under_way_ends_on_the_old_release_while_new_ones_are_served(tmp_path: Path) -> None:
    async def story() -> None:
        async with talking(tmp_path, "slow|0") as rig:
            old_digest = rig.host.offered(LANGUAGE)
            await rig.host.bring(rig.install_language(2))
            begun = asyncio.Event()
            long = asyncio.create_task(rig.say("Tell me all.", "a", 200, heard=lambda text: begun.set()))
            await begun.wait()
            await rig.host.hand_over(LANGUAGE)
            _, digest = await said(rig, "Me too.", "b")
            assert digest != old_digest
            assert not long.done(), "a turn that is to be under way"
            refused, _ = await rig.say("Me too.", "a")
            assert (refused.status, "session in use" in refused.reason) == (Status.REFUSED, True)
            await rig.host.settle(LANGUAGE)
            result, parts = await long
            assert (result.status, result.model_digest) == (Status.OK, old_digest), result.reason
            assert end_of(result).text == parts
            await rig.until_gone()
            end, digest = await said(rig, "And now?", "a")
            assert digest != old_digest
            assert end.prompt_tokens > 200

    run(story())


@pytest.mark.parametrize("mood", ["crash|3", "nan|3", "hang|3", "crash|0"])
def test_a_turn_that_a_bad_release_breaks_off_goes_on_in_the_old_one(
    tmp_path: Path, mood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.hosting.between.PATIENCE_S", 0.5)

    async def story() -> None:
        async with talking(tmp_path) as rig:
            one = rig.host.offered(LANGUAGE)
            first, _ = await said(rig, "Who is there?", "a")
            await rig.host.bring(rig.install_language(2, mood))
            await rig.host.hand_over(LANGUAGE)
            result, parts = await rig.say("Go on.", "a", 40, budget_us=4_000_000 if "hang" in mood else 60_000_000)
            assert (result.status, result.model_digest) == (Status.OK, one), result.reason
            end = end_of(result)
            assert (end.text, end.completion_tokens) == (parts, 40)
            assert len(rig.trials) == 1
            assert rig.trials[0]
            await said(rig, "And now?", "a")
            assert len(rig.trials) == 1, "nothing more is tried on it"
            assert (await rig.host.hand_back(LANGUAGE)).digest == one
            await rig.until_gone()
            last, digest = await said(rig, "Still there?", "a")
            assert digest == one
            assert last.prompt_tokens > first.prompt_tokens + 24 + 40 + 24, "nothing that was said is lost"
            assert not (tmp_path / "kv" / f"{LANGUAGE}@2").exists()
            assert not (tmp_path / "releases" / LANGUAGE / "2").exists()

    run(story())
