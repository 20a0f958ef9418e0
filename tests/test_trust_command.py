"""``sly trust``: the table, its exit code, and what an operator signs."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cli import main
from edge_agent.commands.terminal import WIDTH
from edge_agent.commands.trust_table import contraindicated, trust_table

BOARD: dict[str, Any] = {
    "board": "barn", "standing": "online", "tier": "warning", "agreed": "warning", "own": "warning", "why": "", "key": "software",
    "vector": {"hardware": -33, "executables": 2, "instance_identity": 2}, "reasons": ["a key in a file"], "evidence_age_s": 3,
    "quote": 7, "bootcount": 2, "receipts": 41, "said": [{"verifier": "gate", "tier": "warning", "counts": True}],
}  # fmt: skip
BAD = BOARD | {"board": "shop", "tier": "contraindicated", "reasons": ["model m: the bytes in memory are 00, offered is ff " * 4]}
GATE = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
"""A public key of RFC 8032, section 7.1."""
REPORT: dict[str, Any] = {
    "board": "gate", "attests": True, "epoch": 5, "quote": 3, "receipts": 12, "boards": [BOARD, BAD],
    "checks": {"done": 2, "differed": 1, "waiting": 0},
}  # fmt: skip


def test_each_board_has_its_tier_its_claims_in_order_and_what_is_held_against_it() -> None:
    table = trust_table(REPORT)
    assert all(len(line) <= WIDTH for line in table.splitlines())
    assert "identity affirming (2), executables affirming (2), hardware warning (-33)" in table
    assert "- a key in a file" in table and "CONTRAINDICATED" in table and "3 s ago" in table and "gate warning" in table
    assert table.endswith("seen by gate in its epoch 5: 12 receipts signed here; 2 answers of others run again here, 1 differed")


def test_only_a_board_that_was_ever_there_makes_the_command_fail() -> None:
    assert contraindicated(REPORT) == ["shop"]
    assert contraindicated(REPORT | {"boards": [BOARD, BAD | {"standing": "unknown"}]}) == []


@pytest.mark.parametrize(("value", "word"), [(1, "none"), (-1, "none"), (31, "affirming"), (-32, "affirming"), (32, "warning"),
    (-33, "warning"), (95, "warning"), (-96, "warning"), (96, "contraindicated"), (-97, "contraindicated")])  # fmt: skip
def test_the_ranges_are_those_of_ar4si(value: int, word: str) -> None:
    assert f"hardware {word} ({value})" in trust_table(REPORT | {"boards": [BOARD | {"vector": {"hardware": value}}]})


def test_a_board_that_does_not_attest_says_so() -> None:
    told = trust_table({"board": "gate", "attests": False, "boards": [{"board": "gate", "tier": "none"}]})
    assert "does not attest" in told and "gate" in told


def test_an_operators_key_is_made_once_and_nobody_else_may_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "operator.key"
    assert main(["trust", "key", "--key", str(key), "--name", "ann"]) == 0
    assert main(["trust", "key", "--key", str(key), "--name", "ann"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith('ann = "') and stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(f'[board]\nid = "barn"\n[state]\nfolder = "{tmp_path}"\n[fleet.members]\ngate = "{GATE}"\n')
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    assert main(["trust", "key", "--key", str(tmp_path / "operator.key")]) == 0
    return tmp_path / "operator.key"


@pytest.mark.parametrize("action", ["clear", "revoke"])
def test_a_key_that_the_fleet_does_not_know_is_refused_before_anything_is_said(
    action: str, config: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = capsys.readouterr().out.strip()
    assert main(["trust", action, "gate", "--key", str(key), "--config", str(config)]) == 2
    told = capsys.readouterr().err
    assert "no such operator" in told and line in told


def test_a_word_about_a_board_that_is_not_of_the_fleet_is_refused(
    config: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trust", "revoke", "gaet", "--key", str(key), "--config", str(config)]) == 2
    assert "got gaet; allowed: a board of [fleet.members]: barn, gate" in capsys.readouterr().err


def test_only_sly_trust_key_makes_a_key(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "oprator.key"
    assert main(["trust", "clear", "gate", "--key", str(missing), "--config", str(config)]) == 2
    assert not missing.exists() and f"{missing}: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(("what", "told"), [("folder", "no regular file"), ("short", "31 bytes"), ("open", "chmod 600")])
def test_what_is_no_secret_key_is_refused_in_one_line(
    what: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "key"
    if what == "folder":
        path.mkdir()
    else:
        path.write_bytes(bytes(31 if what == "short" else 32))
        path.chmod(0o644 if what == "open" else 0o600)
    assert main(["trust", "key", "--key", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_what_a_board_says_of_another_is_shown_and_not_obeyed() -> None:
    evil = BAD | {"reasons": ["\x1b[2J all is\u202e well \x9b31m\nboard  affirming"]}
    table = trust_table(REPORT | {"boards": [evil]})
    assert all(char.isprintable() for char in table.replace("\n", "")) and len(table.splitlines()) == 5


def test_without_a_socket_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trust"]) == 2
    assert "--socket" in capsys.readouterr().err
