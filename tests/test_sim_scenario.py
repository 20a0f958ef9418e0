"""Scenario files: what they may say, and that each fault in one is a single clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.errors import ConfigError, UnavailableError
from edge_agent.sim.scenario import load_scenario, parse_scenario, scenario_names
from tests.sim_worlds import BOARDS, CAMERAS, MODELS, TALK, world

HEAD = 'title = "t"\nduration_s = 5\n'


def test_every_packaged_scenario_loads_and_says_what_it_shows() -> None:
    assert len(scenario_names()) == 9
    for name in scenario_names():
        scenario = load_scenario(name)
        assert scenario.title
        assert scenario.arrivals
        path = Path(__file__).parents[1] / "edge_agent/sim/scenarios" / f"{name}.toml"
        assert "# Shows:" in path.read_text(encoding="utf-8")


def test_a_count_makes_boards_of_their_own_ids() -> None:
    assert [board.id for board in world().boards] == ["pi-1", "pi-2", "orin"]


def test_policy_and_queue_are_those_of_an_agent() -> None:
    scenario = world('[policy]\nenergy_us_per_mj = 7\n[queue]\norder = "fifo"\n')
    assert (scenario.policy.energy_us_per_mj, scenario.queue.order) == (7, "fifo")


BAD = {
    "an unknown section": (HEAD + "[weather]\nrain = 1", "'weather'"),
    "an unknown key": (HEAD + '[[boards]]\nid = "a"\nprofile = "orin_nano"\ncolour = 1', "'colour'"),
    "no duration": ('title = "t"', "duration_s"),
    "a duration of nothing": ('title = "t"\nduration_s = 0', "duration_s"),
    "truth for a number": ('title = "t"\nduration_s = true', "duration_s"),
    "no boards": (HEAD + MODELS, "[[boards]]"),
    "a profile that does not exist": (HEAD + '[[boards]]\nid = "a"\nprofile = "abacus"', "abacus"),
    "a bad board id": (HEAD + '[[boards]]\nid = "A b"\nprofile = "orin_nano"', "id"),
    "two boards of one id": (HEAD + 2 * '[[boards]]\nid = "a"\nprofile = "orin_nano"\n', "twice"),
    "a board with an unknown model": (HEAD + '[[boards]]\nid = "a"\nprofile = "orin_nano"\nmodels = ["x"]', "x"),
    "a tier that does not exist": (HEAD + '[[boards]]\nid = "a"\nprofile = "orin_nano"\ntrust = "blind"', "affirming"),
    "talk without KV": (
        HEAD + BOARDS + '[[models]]\nname = "t"\ntask = "chat"\nquality_permille = 1\nmacs = 1\nweight_bytes = 1', "talk"
    ),
    "a cut of no boards": (HEAD + MODELS + BOARDS + '[[outages]]\nkind = "cut"\nfrom_ms = 1\nto_ms = 2', "boards"),
    "an outage that ends before it begins": (
        HEAD + MODELS + BOARDS + '[[outages]]\nkind = "broker"\nfrom_ms = 2\nto_ms = 2', "to_ms"
    ),
    "a fault on an unknown board": (HEAD + MODELS + BOARDS + '[[faults]]\nkind = "kill"\nboards = ["z"]', "z"),
    "arrivals for a task that nobody does": (HEAD + MODELS + BOARDS + CAMERAS.replace("objects", "smells"), "detect_smells"),
    "a camera that talks": (HEAD + MODELS + BOARDS + CAMERAS.replace("detect_objects", "chat"), "perception"),
    "a process without a rate": (HEAD + MODELS + BOARDS + TALK.replace("rate_mhz = 1000", ""), "rate_mhz"),
    "a bad policy": (HEAD + MODELS + BOARDS + "[policy]\nhorizon_us = 1", "horizon_us"),
    "no TOML": ("= = =", "TOML"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_scenario_is_one_line_that_names_the_fault(case: str) -> None:
    text, named = BAD[case]
    with pytest.raises(ConfigError) as refused:
        parse_scenario("bad", text.encode())
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_name_shows_the_known_ones_and_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eight-boards"):
        load_scenario("nowhere")
    with pytest.raises(UnavailableError, match=r"x\.toml"):
        load_scenario(str(tmp_path / "x.toml"))


def test_a_file_larger_than_is_allowed_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "big.toml"
    path.write_bytes(b"#" * (2**18 + 1))
    with pytest.raises(ConfigError, match="at most 262144 bytes"):
        load_scenario(str(path))


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=6),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=6), each, max_size=3),
    max_leaves=5,
)
_lines = st.tuples(
    st.sampled_from(("id", "profile", "models", "count", "kind", "boards", "rate_mhz", "task", "macs", "from_ms", "name", "x")),
    st.sampled_from(('"orin_nano"', '"a"', "1", "-1", "true", "[]", '["a"]', "1.5", "{}", '"chat"', "9_999_999_999_999_999_999")),
).map(lambda pair: f"{pair[0]} = {pair[1]}")
_heads = st.sampled_from(
    ("[[boards]]", "[[models]]", "[[faults]]", "[[outages]]", "[[arrivals]]", "[links]", "[policy]", "[boards]")
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(_lines, _heads), max_size=12), st.binary(max_size=20))
def test_garbage_is_refused_or_is_a_scenario_and_never_anything_else(lines: list[str], tail: bytes) -> None:
    try:
        scenario = parse_scenario("garbage", (HEAD + "\n".join(lines) + "\n").encode() + tail)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert scenario.boards
