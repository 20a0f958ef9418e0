"""A model is exchanged under way: no request fails because of an update, whatever the new release turns out to be."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.attest.evidence import Measurements
from edge_agent.attest.measure import FileSet, Software
from edge_agent.core.clock import SystemClock
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import MAX_DEADLINE_US, InferenceResult, Status
from edge_agent.hosting.pair import Pair, PairState
from edge_agent.hosting.trial import SPARE, share_us
from edge_agent.shell.measuring import Measuring
from tests.releases import MODEL, Rig, hosting
from tests.sandboxes import run

BAD = ("crash|0", "nan|0", "fail|0", "refuse|0")


async def served(rig: Rig) -> bytes:
    """The digest of the release that did a request, which was done well."""
    result = await rig.ask()
    assert result.status is Status.OK, result.reason
    return result.model_digest


def test_a_release_is_loaded_beside_the_one_that_serves_then_served_then_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            one = await served(rig)
            await rig.host.bring(two := rig.install(2))
            assert await served(rig) == one, "a brought release serves nobody yet"
            golden, why = await rig.host.golden_beside(MODEL)
            assert (len(golden), why) == (32, "")
            offer = await rig.host.hand_over(MODEL)
            assert offer.digest == two.files["tiny.tflite"] != one
            assert await served(rig) == offer.digest
            assert rig.trials == [""]
            await rig.host.settle(MODEL)
            await rig.until_gone()
            assert await served(rig) == offer.digest
            assert len(rig.supervisor.loaded()) == 1
            assert rig.trials == [""], "what was settled is on trial no more"

    run(story())


def test_a_bad_release_costs_no_request_and_is_told_of_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            one = await served(rig)
            for number, mood in enumerate(BAD, 2):
                rig.trials.clear()
                await rig.host.bring(rig.install(number, mood))
                await rig.host.hand_over(MODEL)
                assert [await served(rig) for _ in range(3)] == [one] * 3
                assert len(rig.trials) == 1, mood
                assert rig.trials[0]
                assert (await rig.host.hand_back(MODEL)).digest == one
                await rig.until_gone()
                assert len(rig.supervisor.loaded()) == 1

    run(story())


def test_a_release_that_hangs_is_given_up_in_time_for_the_old_one_to_answer(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            one = await served(rig)
            await rig.host.bring(rig.install(2, "hang|1"))
            assert (await rig.host.golden_beside(MODEL))[1] == ""
            await rig.host.hand_over(MODEL)
            assert await served(rig) == one
            assert len(rig.trials) == 1
            assert "no answer within" in rig.trials[0]
            assert await served(rig) == one, "and nobody waits for it again"

    run(story())


def test_a_release_that_turns_bad_later_is_told_then(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            one = await served(rig)
            await rig.host.bring(two := rig.install(2, "nan|4"))
            await rig.host.hand_over(MODEL)
            digests = [await served(rig) for _ in range(6)]
            assert digests == [two.files["tiny.tflite"]] * 4 + [one] * 2
            assert rig.trials[:4] == [""] * 4
            assert "NaN" in rig.trials[4]
            assert len(rig.trials) == 5

    run(story())


def test_nothing_more_is_tried_on_a_release_that_went_wrong_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            one = await served(rig)
            await rig.host.bring(rig.install(2, "once|0"))
            await rig.host.hand_over(MODEL)
            assert [await served(rig) for _ in range(4)] == [one] * 4

    run(story())


def test_the_old_release_stays_until_a_job_that_was_tried_on_the_new_one_has_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            one = await served(rig)
            await rig.host.bring(rig.install(2, "late|0"))
            await rig.host.hand_over(MODEL)
            tried = asyncio.create_task(served(rig))
            while rig.host.resting(MODEL):
                await asyncio.sleep(0)
            await rig.host.settle(MODEL)
            assert await tried == one

    run(story())


def test_what_the_old_release_cannot_do_either_is_not_held_against_the_new_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path, first=None) as rig:
            await rig.host.load(MODEL, rig.install(1, "fail|0"))
            await rig.host.bring(rig.install(2, "fail|1"))
            await rig.host.hand_over(MODEL)
            assert (await rig.ask()).status is Status.OK
            result = await rig.ask()
            assert (result.status, "an operator that failed" in result.reason) == (Status.FAILED, True)
            assert rig.trials == [""]

    run(story())


@pytest.mark.parametrize("mood", ["crash|0", "nan|0", "fail|0", "hang|0"])
def test_the_golden_input_finds_a_release_that_is_bad_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mood: str
) -> None:
    monkeypatch.setattr("edge_agent.hosting.pictures.GOLDEN_BUDGET_US", 300_000)

    async def story() -> None:
        async with hosting(tmp_path) as rig:
            await rig.host.bring(rig.install(2, mood))
            _, why = await rig.host.golden_beside(MODEL)
            assert why
            await rig.host.discard(MODEL)
            await rig.until_gone()
            assert len(rig.supervisor.loaded()) == 1
            await served(rig)

    run(story())


def test_a_release_that_cannot_be_loaded_leaves_everything_as_it_was(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            one, pinned_bytes = await served(rig), rig.blobs.pinned_bytes
            with pytest.raises(RefusedError, match="a graph that this engine cannot run"):
                await rig.host.bring(rig.install(2, "unloadable|0"))
            with pytest.raises(UnavailableError, match="not in the model cache"):
                await rig.host.bring(rig.foreign(3))
            assert await served(rig) == one
            assert rig.blobs.pinned_bytes == pinned_bytes
            await rig.host.bring(rig.install(4))

    run(story())


def test_a_model_that_rotted_in_the_cache_is_refused_and_set_aside(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            two = rig.install(2)
            path = rig.blobs.path_of(two.files["tiny.tflite"])
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
            with pytest.raises(RefusedError):
                await rig.host.bring(two)
            assert not rig.blobs.contains(two.files["tiny.tflite"])
            await served(rig)

    run(story())


HAND_OVERS, FEWER = 24, 14
MOODS = ("", "", "crash|3", "", "nan|2", "", "hang|5", "fail|4", "", "refuse|1", "slow|0", "crash|0")
"""Of the releases in the stream, in turn: most end as they should."""


class Stream:
    """Requests that follow each other without a pause, ``width`` at a time."""

    def __init__(self, rig: Rig, width: int) -> None:
        self.results: list[InferenceResult] = []
        self._rig, self._over, self._more = rig, False, asyncio.Event()
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(width)]

    async def _ask_on(self) -> None:
        while not self._over:
            self.results.append(await self._rig.ask())
            self._more.set()

    async def more(self, count: int) -> None:
        """Return when so many more were answered."""
        wanted = len(self.results) + count
        while len(self.results) < wanted:
            self._more.clear()
            await self._more.wait()

    async def end(self) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)


async def exchange(rig: Rig, stream: Stream, number: int, mood: str) -> bool:
    """One update as it goes: brought, probed, tried for a while, then settled or handed back by what was told of it."""
    rig.trials.clear()
    await rig.host.bring(rig.install(number, mood))
    _, why = await rig.host.golden_beside(MODEL)
    if why:
        await rig.host.discard(MODEL)
        return False
    await rig.host.hand_over(MODEL)
    while not any(rig.trials) and len(rig.trials) < 6:
        await stream.more(1)
    if any(rig.trials):
        await rig.host.hand_back(MODEL)
        return False
    await rig.host.settle(MODEL)
    return True


@pytest.mark.parametrize(
    ("width", "hand_overs"),
    [(4, FEWER // 2), *(pytest.param(width, HAND_OVERS // 2, marks=pytest.mark.long) for width in (1, 4))],
)
def test_no_request_of_a_stream_fails_over_two_dozen_hand_overs(tmp_path: Path, width: int, hand_overs: int) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            sound, stream = [rig.install(1).files["tiny.tflite"]], Stream(rig, width)
            for number in range(2, 2 + hand_overs):
                mood = MOODS[number % len(MOODS)]
                if await exchange(rig, stream, number, mood):
                    assert mood in ("", "slow|0")
                    sound.append(rig.install(number, mood).files["tiny.tflite"])
                else:
                    assert mood not in ("", "slow|0")
            await stream.end()
            await rig.until_gone()
            assert {result.status for result in stream.results} == {Status.OK}, {each.reason for each in stream.results}
            assert len(rig.supervisor.loaded()) == 1
            assert rig.blobs.pinned_bytes == len(sound and rig.blobs.path_of(sound[-1]).read_bytes())
            answers = {(each.model_digest, bytes(each.outputs["scores"].data)) for each in stream.results}
            assert len({digest for digest, _ in answers}) == len(answers), "each release answers as itself"
            assert await served(rig) == sound[-1]

    run(story())


# the table, and how a job's time is shared

MOVES = ("brought", "handed", "settled", "back", "discarded")
LEGAL = {PairState.ALONE: {"brought"}, PairState.BESIDE: {"handed", "discarded"}, PairState.TRIAL: {"settled", "back"}}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("pair", [Pair("old"), Pair("old", "new", PairState.BESIDE), Pair("old", "new", PairState.TRIAL)])
def test_an_illegal_move_of_a_pair_raises_and_a_legal_one_leaves_something_that_serves(pair: Pair[str], move: str) -> None:
    arguments = ("new",) if move == "brought" else ()
    if move not in LEGAL[pair.state]:
        with pytest.raises(RuntimeError, match=f"it is {pair.state.value}"):
            getattr(pair, move)(*arguments)
        return
    after = getattr(pair, move)(*arguments)
    assert after.serving == ("new" if move in ("handed", "settled") else "old")
    assert len(after.held) == (2 if move in ("brought", "handed") else 1)


@given(st.integers(1, MAX_DEADLINE_US), st.integers(0, 10**9))
def test_the_old_release_always_has_time_left_for_what_it_lately_took(budget_us: int, longest_us: int) -> None:
    share = share_us(budget_us, longest_us)
    assert 0 <= share <= budget_us // 2
    assert not share or budget_us - share >= SPARE * longest_us


def test_a_job_without_time_for_both_goes_to_the_old_release_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.hosting.trial.SPARE", 10**9)

    async def story() -> None:
        async with hosting(tmp_path) as rig:
            one = await served(rig)
            await rig.host.bring(rig.install(2, "hang|0"))
            await rig.host.hand_over(MODEL)
            result = await rig.ask()
            assert (result.status, result.model_digest) == (Status.OK, one), result.reason
            assert rig.trials == []

    run(story())


def test_a_job_under_way_ends_on_the_old_release_and_only_then_that_goes(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path, first=None) as rig:
            offer = await rig.host.load(MODEL, rig.install(1, "slow|0"))
            await rig.host.bring(rig.install(2))
            under_way = [asyncio.create_task(rig.ask()) for _ in range(4)]
            await asyncio.sleep(0)
            await rig.host.hand_over(MODEL)
            await rig.host.settle(MODEL)
            assert await served(rig) != offer.digest
            assert {(each.status, each.model_digest) for each in await asyncio.gather(*under_way)} == {(Status.OK, offer.digest)}
            await rig.until_gone()
            assert len(rig.supervisor.loaded()) == 1

    run(story())


def test_what_is_measured_is_the_release_that_serves_with_its_number_and_slot(tmp_path: Path) -> None:
    async def story() -> None:
        async with hosting(tmp_path) as rig:
            told: list[Measurements] = []
            software = Software(bytes(32), FileSet("none"), {})
            measuring = Measuring(
                rig.host, software, bytes(32), 2**20, SystemClock(), lambda event: told.append(event.measurements), print
            )

            async def measured() -> tuple[str, int, bool, bytes]:
                await measuring.goldens.run_due()
                measuring.look()
                [model] = told[-1].models
                assert model.mapped == model.offered == rig.host.offered(MODEL)
                return model.slot, model.version, bool(model.golden), model.golden

            measuring.begin()
            *confirmed, first = await measured()
            assert confirmed == ["confirmed", 1, True]
            await rig.host.bring(rig.install(2))
            assert await measured() == ("confirmed", 1, True, first)
            golden, _ = await rig.host.golden_beside(MODEL)
            await rig.host.hand_over(MODEL)
            measuring.look()
            assert told[-1].models[0].golden == b"", "what another release gave says nothing of this one"
            assert await measured() == ("trial", 2, True, golden)
            await rig.host.settle(MODEL)
            await rig.until_gone()
            assert await measured() == ("confirmed", 2, True, golden)
            assert golden != first
            measuring.close()

    run(story())
