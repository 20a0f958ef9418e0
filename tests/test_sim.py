"""The simulator: reproducible to the bit, honest about time and energy, and every packaged scenario keeps its promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from board_support.plant import ThermalPlant
from board_support.profile import load_profile
from edge_agent import cli
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import Status, TrustTier
from edge_agent.sim.arrivals import arrivals
from edge_agent.sim.costs import Costs, work_of
from edge_agent.sim.engine import Accelerator, Phase
from edge_agent.sim.fleet import SimFleet, simulate
from edge_agent.sim.results import Run, metrics, percentile
from edge_agent.sim.scenario import Scenario, load_scenario, scenario_names
from edge_agent.sim.traces import read_trace, trace_extent
from tests.needs import needs_shared
from tests.sim_worlds import BOARDS, CAMERAS, TALK, world

ROUGH = '[links]\nloss_permille = 20\n[[faults]]\nkind = "kill"\nboards = ["orin"]\nfrom_ms = 2000\nto_ms = 5000\n'
SHORT_S = {"thirty-join": 6, "eight-boards": 6}


# reproducible


def test_a_seed_reproduces_its_run_to_the_bit_and_another_seed_gives_another() -> None:
    scenario = world(CAMERAS, TALK, ROUGH)
    first, second, other = simulate(scenario, 3), simulate(scenario, 3), simulate(scenario, 4)
    assert first == second
    assert first.trace_digest != other.trace_digest


def test_the_hash_seed_of_the_process_changes_nothing() -> None:
    code = (
        "from edge_agent.sim.fleet import simulate; from tests.sim_worlds import *; from tests.test_sim import ROUGH;"
        "print(simulate(world(CAMERAS, TALK, ROUGH), 3).trace_digest)"
    )
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        root = Path(__file__).parents[1]
        ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True)
        digests.add(ran.stdout.strip())
    assert digests == {simulate(world(CAMERAS, TALK, ROUGH), 3).trace_digest}


def test_work_that_boards_share_in_the_simulator_is_work_that_each_would_do_alike() -> None:
    scenario = world(CAMERAS, TALK, ROUGH)
    with SimFleet(scenario, 3) as alone:
        assert alone.run().trace_digest == simulate(scenario, 3).trace_digest


# promises


def check_promises(run: Run) -> None:
    came = [each.request.request_id for each in arrivals(run.scenario, run.seed)]
    answered = Counter(each.request_id for each in run.served)
    assert not answered.keys() & set(run.pending)
    assert sorted(came) == sorted([*answered.elements(), *run.pending])
    boards = {board.id: board for board in run.scenario.boards}
    for each in run.served:
        if each.status is Status.OK:
            assert TrustTier[boards[each.board].trust.upper()] >= each.wanted.trust
            assert each.model in boards[each.board].models
            assert each.arrived_us <= each.began_us < each.ended_us <= each.answered_us
    for use in run.boards:
        assert use.busy_us <= use.up_us <= run.virtual_us + 3_000_000
        idle_uj = load_profile(use.profile).idle_mw * use.up_us // 1000
        assert abs(use.energy_uj - use.dynamic_uj - idle_uj) <= 1
        busy_us = sum(each.busy_us for each in run.served if each.board == use.board)
        assert busy_us <= use.busy_us + 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name == "hostile" else ()) for name in scenario_names()]
)
def test_a_packaged_scenario_keeps_its_promises(name: str) -> None:
    scenario = load_scenario(name)
    short = replace(
        scenario.shortened(SHORT_S.get(name, 20) * 1_000_000), outages=_sooner(scenario), faults=_sooner_faults(scenario)
    )
    run = simulate(short, 1)
    assert run.served
    assert metrics(run).attainment > 0.9
    check_promises(run)


def _sooner(scenario: Scenario) -> tuple[object, ...]:
    return tuple(replace(each, from_ms=each.from_ms // 10, to_ms=each.to_ms // 10) for each in scenario.outages)


def _sooner_faults(scenario: Scenario) -> tuple[object, ...]:
    return tuple(replace(each, from_ms=each.from_ms // 10, to_ms=max(each.to_ms // 10, 1)) for each in scenario.faults)


def test_a_request_whose_board_dies_is_answered_once_by_another() -> None:
    run = simulate(world(CAMERAS, TALK, ROUGH, duration_s=10), 1)
    check_promises(run)
    assert not run.pending
    died = [each for each in run.served if each.ingress == "orin" and 2_000_000 < each.arrived_us < 4_900_000]
    assert died
    assert {each.board for each in died} <= {"pi-1", "pi-2"}


def test_no_request_runs_under_its_tier_and_no_local_data_leaves() -> None:
    boards = BOARDS.replace('id = "orin"', 'id = "orin"\ntrust = "contraindicated"').replace(
        'id = "pi"', 'id = "pi"\ntrust = "warning"'
    )
    boards += '[[boards]]\nid = "good"\nprofile = "coral_m2"\nmodels = ["detector"]\n'
    strict = CAMERAS + 'trust = "affirming"\n' + CAMERAS + 'data = "local"\n' + CAMERAS
    run = simulate(world(strict, boards=boards), 1)
    check_promises(run)
    ok = [each for each in run.served if each.status is Status.OK]
    assert {each.board for each in ok if each.wanted.trust is TrustTier.AFFIRMING} == {"good"}
    assert "orin" not in {each.board for each in ok}
    local = [each for each in ok if each.wanted.data == "local"]
    assert local
    assert all(each.board == each.ingress for each in local)


def test_a_talk_goes_on_where_its_past_is_or_its_past_follows_it() -> None:
    talks = TALK + "turns = 8\nclients = 5\nmax_prompt_tokens = 1800\n"
    boards = '[[boards]]\nid = "pi"\ncount = 3\nprofile = "raspberry_pi_5"\nmodels = ["talker"]\n'
    run = simulate(world(talks, duration_s=30, boards=boards), 1)
    check_promises(run)
    actions = Counter(each.kv_action for each in run.served)
    assert actions["resident"] > 3
    assert metrics(run).migrations == actions["peer"] > 3
    assert actions["recompute"] <= 1


def test_an_engine_that_fails_is_answered_for_by_another() -> None:
    run = simulate(world(CAMERAS, '[[faults]]\nkind = "engine"\nboards = ["orin"]\nfail_permille = 1000\n'), 1)
    ok = [each for each in run.served if each.status is Status.OK]
    assert len(ok) > 40
    assert "orin" not in {each.board for each in ok}


# the accelerator

ORIN = load_profile("orin_nano")
DETECTOR, TALKER = world().models


def accelerator(ambient_mdegc: int = 25_000) -> Accelerator:
    return Accelerator(Costs(ORIN), ThermalPlant(replace(ORIN, ambient_mdegc=ambient_mdegc), 0), 0)


def finish(engine: Accelerator) -> dict[str, int]:
    """Run until nothing is left; when each job ended."""
    ended = {}
    while (next_us := engine.next_us()) is not None:
        for each in engine.advance(next_us):
            ended[each.task.key] = engine.now_us
    return ended


def decode(tokens: int = 100) -> list[Phase]:
    return [Phase(TALKER, decode=True, tokens=tokens, context_tokens=100)]


def test_an_inference_alone_takes_what_the_roofline_says() -> None:
    engine = accelerator()
    engine.begin("a", [Phase(DETECTOR)], 10**9)
    assert finish(engine) == {"a": Costs(ORIN).inference(DETECTOR, cold=True).busy_us}


def test_two_at_once_share_the_accelerator() -> None:
    alone, both = accelerator(), accelerator()
    alone.begin("a", decode(), 10**9)
    both.begin("a", decode(), 10**9)
    both.begin("b", [Phase(TALKER, tokens=50_000)], 10**9)
    assert finish(both)["a"] > 1.8 * finish(alone)["a"]


def test_turns_that_decode_together_read_the_weights_once() -> None:
    alone, four = accelerator(), accelerator()
    alone.begin("a", decode(), 10**9)
    for key in "abcd":
        four.begin(key, decode(), 10**9)
    assert max(finish(four).values()) < 1.5 * finish(alone)["a"]


def test_a_job_whose_time_is_up_ends_late_and_its_energy_counts() -> None:
    engine = accelerator()
    engine.begin("a", decode(100_000), 1_000_000)
    done = []
    while not done:
        done = engine.advance(engine.next_us() or 0)
    assert (done[0].late, engine.now_us) == (True, 1_000_000)
    assert engine.totals.dynamic_nj == done[0].task.dynamic_nj > 0


def test_heat_throttles_and_throttled_arithmetic_takes_longer() -> None:
    cool, hot = accelerator(), accelerator(ambient_mdegc=85_000)
    for engine in (cool, hot):
        engine.begin("a", [Phase(TALKER, tokens=100_000)], 10**9)
    assert finish(hot)["a"] > 1.3 * finish(cool)["a"]
    assert hot.totals.throttled_us > 0
    assert cool.totals.throttled_us == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 2), st.integers(1, 400), st.booleans()), min_size=1, max_size=12)
)
def test_every_busy_microsecond_and_every_joule_is_some_jobs(jobs: list[tuple[int, int, int, bool]]) -> None:
    engine, tasks, aborted = accelerator(), {}, 0
    for number, (after_us, kind, tokens, aborts) in enumerate(jobs):
        until_us = engine.now_us + after_us
        while engine.now_us < until_us:
            engine.advance(min(until_us, engine.next_us() or until_us))
        phases = [[Phase(DETECTOR)], [Phase(TALKER, tokens=tokens), *decode(tokens)], decode(tokens)][kind]
        engine.begin(str(number), phases, 30_000_000)
        tasks[str(number)] = engine.tasks[str(number)]
        if aborts and engine.abort(str(number)):
            aborted += 1
    finish(engine)
    assert not engine.tasks
    spent_ns = sum(task.busy_ns for task in tasks.values())
    events = 10 * len(jobs) + engine.now_us // 500_000 + 10
    assert 0 <= engine.totals.busy_us * 1000 - spent_ns <= events * len(jobs)
    assert engine.totals.dynamic_nj == sum(task.dynamic_nj for task in tasks.values())
    assert engine.totals.busy_us <= engine.now_us


def test_a_model_that_is_wider_than_the_array_is_slower_in_one_row_than_its_arithmetic() -> None:
    work = work_of(replace(TALKER, width=576), 1)
    assert sum(op.repeats * op.depth * op.outputs for op in work.ops) <= TALKER.macs


# arrivals and traces


def test_a_process_without_a_trace_has_the_traces_statistics(tmp_path: Path) -> None:
    plan = '[[arrivals]]\nkind = "azure"\ndeadline_ms = 1000\nmax_prompt_tokens = 65_000\n'
    scenario = replace(world(plan, duration_s=1000), traces=tmp_path)
    came = list(arrivals(scenario, 1))
    assert 5000 < len(came) < 6100
    assert 900 < percentile(sorted(each.prompt_tokens for each in came), 500) < 1100
    assert 110 < percentile(sorted(each.answer_tokens for each in came), 500) < 145


def test_azures_trace_is_replayed_at_any_speed(tmp_path: Path) -> None:
    path = needs_shared("traces", "azure_llm_2023_conv.csv")
    assert trace_extent("azure", path)[1] == 19_366
    plan = '[[arrivals]]\nkind = "azure"\ndeadline_ms = 1000\nrate_mhz = 20_000\n'
    came = list(arrivals(replace(world(plan, duration_s=60), traces=path.parent), 1))
    assert 900 < len(came) < 1500
    assert all(first.at_us <= second.at_us for first, second in zip(came, came[1:], strict=False))


def test_mooncakes_growing_prefixes_are_sessions() -> None:
    path = needs_shared("traces", "mooncake_synthetic.jsonl")
    rows = list(read_trace("mooncake", path))
    turns = Counter(row.session for row in rows)
    assert len(rows) == 3_993
    assert len(rows) - len(turns) > 1_200
    assert max(turns.values()) > 5


def test_a_session_is_who_begins_like_an_earlier_prompt(tmp_path: Path) -> None:
    path = tmp_path / "mooncake_synthetic.jsonl"
    prompts = ([1, 2], [7], [1, 2, 3], [1, 2, 3, 4], [9, 2])
    lines = [json.dumps({"timestamp": i, "input_length": 9, "output_length": 1, "hash_ids": p}) for i, p in enumerate(prompts)]
    path.write_text("\n".join(lines))
    assert [row.session for row in read_trace("mooncake", path)] == [1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("azure", "TIME,A,B\n"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374\n"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,374,1\n"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,-4,1\n"),
        ("mooncake", "{}\n"),
        ("mooncake", "[1]\n"),
        ("mooncake", '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}\n'),
        ("mooncake", "x" * (2**20 + 2)),
    ],
)
def test_a_damaged_trace_is_refused_with_its_line(tmp_path: Path, kind: str, text: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(RefusedError, match="line"):
        list(read_trace(kind, path))


def test_load_makes_everything_come_faster() -> None:
    scenario = world(CAMERAS, TALK, duration_s=60)
    slow, fast = (len(list(arrivals(each, 1))) for each in (scenario, scenario.at_load(2000)))
    assert 1.8 * slow < fast < 2.2 * slow


# the command


def test_the_command_shows_tables_and_says_that_the_plant_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sim", "house", "--duration", "5", "--seed", "2"]) == 0
    out = capsys.readouterr().out
    assert "simulated plant" in out
    assert "coral" in out


def test_the_command_gives_all_of_a_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sim", "house", "--requests", "8", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["requests"] == len(result["served"]) == 8
    assert result["plant"].startswith("simulated plant")


def test_a_placer_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sim", "house", "--placer", "dice"]) == 2
    assert "round-robin" in capsys.readouterr().err


def test_the_baselines_run_in_the_same_world() -> None:
    scenario = world(CAMERAS, TALK)
    for placer in ("random", "jsq2", "greedy-latency"):
        run = simulate(scenario, 1, placer)
        check_promises(run)
        assert len(run.served) == len(simulate(scenario, 1).served)


@pytest.mark.parametrize("flag", ["--requests", "--duration", "--load"])
@pytest.mark.parametrize("given", ["abc", "0", "-1", "1.5", "²"])
def test_a_bad_number_is_one_line_that_says_what_is_allowed(flag: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sim", "house", f"{flag}={given}"])
    assert ended.value.code == 2
    assert f"argument {flag}: got {given!r}; allowed: a whole number from 1" in capsys.readouterr().err
