"""The configuration refuses what it does not know and what is out of bounds, in words; its defaults are pinned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest

from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import ConfigError

LEAST: dict[str, dict[str, object]] = {"board": {"id": "a"}, "state": {"folder": "/var/lib/sly"}}
SECTIONS = get_type_hints(AgentConfig)
SETTINGS = [
    (section, entry, get_type_hints(kind)[entry.name]) for section, kind in SECTIONS.items() for entry in dataclasses.fields(kind)
]
IDS = [f"{section}.{entry.name}" for section, entry, _ in SETTINGS]


def configured(section: str, key: str, value: object) -> AgentConfig:
    mapping = {name: dict(entries) for name, entries in LEAST.items()}
    mapping.setdefault(section, {})[key] = value
    return AgentConfig.from_mapping(mapping)


def refusal(mapping: Mapping[str, object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        AgentConfig.from_mapping(mapping)
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_defaults_are_pinned() -> None:
    config = dataclasses.asdict(AgentConfig.from_mapping(LEAST))
    assert config == {
        "board": {"id": "a", "backend": "auto", "profile": "", "paced": True},
        "state": {"folder": Path("/var/lib/sly"), "cache_bytes": 512 * 2**20},
        "fleet": {"name": "home", "members": {}, "trust": {}, "operators": {}, "endorsers": {}},
        "broker": {
            "host": "", "port": 1883, "ca_file": "", "certificate_file": "", "key_file": "", "keepalive_s": 10,
            "reconnect_max_ms": 30_000, "untrusted": "stop", "will_delay_s": 0,
        },
        "models": {"serve": (), "folder": "", "releases": ()},
        "engine": {"runtime": "auto", "threads": 1, "memory_bytes": 4 * 2**30, "max_deaths": 3},
        "language": {
            "window_tokens": 2048, "hot_bytes": 192 * 2**20, "ram_bytes": 32 * 2**20, "disk_bytes": 512 * 2**20,
            "max_sessions": 16, "max_waiting": 64, "speculate": True,
        },
        "gateway": {
            "on": False, "host": "127.0.0.1", "port": 8080, "token": "", "max_body_bytes": 512 * 2**10, "max_requests": 32,
        },
        "queue": {"max_requests": 1024, "max_bytes": 64 * 2**20, "order": "edf", "shed_late": True},
        "policy": {
            "energy_us_per_mj": 700, "lateness_factor": 10, "quality_us_per_permille": 20, "link_bytes_per_ms": 10_000,
            "link_latency_us": 2_000, "guard_band_mdegc": 2_000, "horizon_us": 10_000_000, "congestion_factor": 50,
            "gain_us": 1_000,
        },
        "cloud": {
            "on": False, "url": "", "model": "", "token_file": "", "quality_permille": 900, "price_us": 5_000_000,
            "busy_us": 3_000_000, "parallel": 4,
        },
        "attest": {
            "on": True, "epoch_s": 30, "missed": 3, "verifiers": (), "agree": 1, "software_keys": "warning", "key": "auto",
            "tcti": "", "pcr": 23, "rehash_bytes_per_s": 8 * 2**20, "recheck_permille": 16, "code": (), "libraries": (),
        },
        "ota": {
            "root": "", "trial_inferences": 5, "trial_s": 60, "trial_boots": 3, "confirm_s": 300, "serve": True,
            "max_bytes_per_s": 4 * 2**20, "url": "",
        },
    }  # fmt: skip


def test_a_configuration_is_frozen_and_not_shared() -> None:
    first, second = AgentConfig.from_mapping(LEAST), AgentConfig.from_mapping(LEAST)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.board.id = "b"  # type: ignore[misc]
    assert first.fleet.members is not second.fleet.members


@pytest.mark.parametrize("missing", ["board", "state"])
def test_a_required_setting_that_is_missing_is_named(missing: str) -> None:
    error = refusal({name: entries for name, entries in LEAST.items() if name != missing})
    assert error.subject in ("[board] id", "[state] folder") and "set it" in str(error)


def test_an_unknown_section_is_refused_with_the_known_ones() -> None:
    error = refusal({**LEAST, "radio": {"on": True}})
    assert error.subject == "section [radio]" and all(f"[{name}]" in error.allowed for name in SECTIONS)


@pytest.mark.parametrize("section", list(SECTIONS))
@pytest.mark.parametrize("value", [3, "text", [1], None, True])
def test_a_section_that_is_no_table_is_refused(section: str, value: object) -> None:
    error = refusal({**LEAST, section: value})
    assert error.subject == f"section [{section}]" and error.allowed == "a table"


@pytest.mark.parametrize("section", list(SECTIONS))
def test_an_unknown_key_is_refused_with_the_known_ones(section: str) -> None:
    error = refusal({**LEAST, section: {**LEAST.get(section, {}), "colour": "red"}})
    names = [entry.name for entry in dataclasses.fields(SECTIONS[section])]
    assert error.subject == f"[{section}] colour" and error.allowed == ", ".join(names)


WRONG: dict[object, tuple[object, ...]] = {
    bool: (1, 0, "true", None, []),
    int: (1.0, "1", True, None, [], -(2**63), 2**63),
    str: (1, None, [], "with\0nul", True),
    Path: (1, None, "", "with\0nul", []),
    tuple: ("text", 1, None, [1], [None], ["Über"], ["a", "a"], ["m"] * 100),
    Mapping: ("text", 1, [], {"a": 1}, {"a": "zz"}, {"A B": "0" * 64}, {"": "0" * 64}, {"a" * 33: "0" * 64}),
}


@pytest.mark.parametrize(("section", "entry", "kind"), SETTINGS, ids=IDS)
def test_a_value_of_the_wrong_type_or_out_of_bounds_is_refused_naming_the_key_what_came_and_what_is_allowed(
    section: str, entry: dataclasses.Field[Any], kind: object
) -> None:
    for value in WRONG[get_origin(kind) or kind]:
        with pytest.raises(ConfigError) as caught:
            configured(section, entry.name, value)
        error = caught.value
        assert error.subject.startswith(f"[{section}] {entry.name}"), value
        assert error.got and error.allowed, value


@pytest.mark.parametrize(
    ("section", "entry"),
    [(s, e) for s, e, kind in SETTINGS if kind is int],
    ids=[i for i, s in zip(IDS, SETTINGS, strict=True) if s[2] is int],
)
def test_a_number_is_taken_at_its_bounds_and_refused_one_beyond(section: str, entry: dataclasses.Field[Any]) -> None:
    bounds = entry.metadata["bounds"]
    for value in (bounds.low, bounds.high):
        assert getattr(getattr(configured(section, entry.name, value), section), entry.name) == value
    for value in (bounds.low - 1, bounds.high + 1):
        with pytest.raises(ConfigError, match=f"a whole number from {bounds.low} to {bounds.high}"):
            configured(section, entry.name, value)


@pytest.mark.parametrize("name", ["A", "", "-a", "a" * 33, "a/b", "a+b", "../a", "a\n"])
def test_a_board_id_that_could_not_be_a_topic_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\[board\] id"):
        configured("board", "id", name)


def test_what_may_be_listed_is_bounded() -> None:
    assert configured("models", "serve", [f"m{i}" for i in range(64)]).models.serve[63] == "m63"
    with pytest.raises(ConfigError, match="at most 64"):
        configured("models", "serve", [f"m{i}" for i in range(65)])
    members = {f"b{i}": "0" * 64 for i in range(1025)}
    with pytest.raises(ConfigError, match="at most 1024"):
        configured("fleet", "members", members)
    members.popitem()
    assert len(configured("fleet", "members", members).fleet.members) == 1024


def test_the_order_in_which_members_are_written_does_not_matter() -> None:
    one, other = {"a": "0" * 64, "b": "1" * 64}, {"b": "1" * 64, "a": "0" * 64}
    assert list(configured("fleet", "members", one).fleet.members) == list(configured("fleet", "members", other).fleet.members)


def test_an_engine_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="auto, ai_edge_litert, tflite_runtime"):
        configured("engine", "runtime", "onnx")


def test_a_home_folder_is_written_out() -> None:
    assert configured("state", "folder", "~/sly").state.folder == Path("~/sly").expanduser()
