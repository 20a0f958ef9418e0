"""``sly self-test``: a person at a board types it, beside a real agent, a real broker, and what is really broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent import cli
from edge_agent.commands.terminal import WIDTH
from edge_agent.steward.enrolling import Enrolment, enroll, revoke
from edge_agent.steward.folder import OperatorFolder
from tests.brokers import free_port
from tests.fetched import model_path
from tests.needs import needs
from tests.operators import broker_of, new_fleet
from tests.test_agent import daemon, toml

MODEL = "blazeface-short"
NAMES = {"inference", "sandbox", "models", "board", "clock", "identity", "certificate", "user", "disk", "broker"}


def written(folder: Path, **sections: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {"board": {"id": "kitchen", "backend": "jalapeno"}, "state": {"folder": str(folder)}}
    file = folder / "agent.toml"
    file.write_text(toml(known | sections))
    return file


def told(capsys: pytest.CaptureFixture[str], config: Path, code: int) -> dict[str, Any]:
    """The checks by name; ``""`` is the whole report."""
    assert cli.main(["self-test", "--config", str(config), "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    return {each["name"]: each for each in report["checks"]} | {"": report}


def test_a_board_before_its_first_start_passes_or_is_warned_and_nothing_is_made_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path / "state")
    checks = told(capsys, config, 0)
    assert checks.keys() - {""} == NAMES and not checks[""]["agent_runs"]
    assert checks["identity"]["verdict"] == "warn" and "start the agent" in checks["identity"]["remedy"]
    assert {checks[name]["verdict"] for name in ("inference", "board", "models", "broker")} == {"pass"}
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["agent.toml"]
    nowhere = written(tmp_path / "other", state={"folder": str(tmp_path / "none")})
    assert told(capsys, nowhere, 0)["disk"]["verdict"] == "warn" and not (tmp_path / "none").exists()


def test_what_fails_comes_first_with_what_to_do_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, broker={"host": "127.0.0.1", "port": free_port()}, models={"serve": [MODEL], "folder": "/none"})
    assert cli.main(["self-test", "--config", str(config)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("kitchen: FAIL") and all(len(line) <= WIDTH for line in lines)
    words = [line.split()[0] for line in lines[1:] if line[:4] in ("PASS", "WARN", "FAIL")]
    assert words == sorted(words, key=["FAIL", "WARN", "PASS"].index) and words.count("FAIL") == 2 and len(words) == len(NAMES)
    text = "\n".join(lines)
    assert "nothing listens there" in text and "sly models fetch" in text and "-> " in text


def test_a_configuration_that_cannot_be_read_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["self-test", "--config", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err.startswith("sly: config ")


def test_a_model_whose_file_was_damaged_fails_and_a_sound_one_is_really_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "models" / model_path(MODEL).name
    copy.parent.mkdir()
    copy.write_bytes(model_path(MODEL).read_bytes())
    config = written(tmp_path / "state", models={"serve": [MODEL], "folder": str(copy.parent)})
    assert told(capsys, config, 0)["models"]["what"] == MODEL
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    check = told(capsys, config, 1)["models"]
    assert check["verdict"] == "fail" and "SHA-256" in check["what"]


def test_a_board_that_is_none_fails_and_the_rest_of_the_machine_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = told(capsys, written(tmp_path, board={"id": "kitchen", "backend": "coral"}), 1)
    assert checks["board"]["verdict"] == "fail" and "coral: " in checks["board"]["what"]
    assert checks["inference"]["verdict"] in ("pass", "fail") and checks["disk"]["verdict"] == "pass"


def test_beside_a_running_agent_nothing_is_disturbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(tmp_path / "state") as running:
        for _ in range(2):
            checks = told(capsys, tmp_path / "state" / "agent.toml", 0)
            assert checks[""]["agent_runs"] and checks["identity"]["verdict"] == checks["disk"]["verdict"] == "pass"
        assert running.status()["kept"] and not running.status()["disk"]
        code, log = running.stop()
    assert code == 0 and "takes nothing" not in log


def in_1970(config: Path) -> subprocess.CompletedProcess[str]:
    needs(shutil.which("faketime"), "faketime is not installed (apt-get install faketime)")
    command = ["faketime", "1970-01-02 00:00:00", sys.executable, "-m", "edge_agent.cli", "self-test", "--config", str(config)]
    return subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=False)


def test_a_clock_at_1970_fails_says_what_to_do_and_does_not_judge_the_certificate_by_it(tmp_path: Path) -> None:
    folder = new_fleet(tmp_path / "fleet")
    enroll(folder, Enrolment("kitchen", "jalapeno", state=folder.board_folder("kitchen")))
    ended = in_1970(folder.board_folder("kitchen") / "agent.toml")
    assert ended.returncode == 1, ended.stderr
    checks = {each["name"]: each for each in json.loads(ended.stdout)["checks"]}
    assert checks["clock"]["verdict"] == "fail" and checks["clock"]["what"].startswith("1970-01-02")
    assert "time server" in checks["clock"]["remedy"] and "the clock is wrong" in checks["certificate"]["what"]
    assert "certificate was made then" in checks["clock"]["what"] or "younger" in checks["clock"]["what"]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[OperatorFolder]:
    folder = new_fleet(tmp_path / "fleet")
    enroll(folder, Enrolment("kitchen", "jalapeno", state=folder.board_folder("kitchen")))
    with broker_of(folder):
        yield folder


def test_a_broker_is_asked_with_the_boards_certificate_and_one_that_was_revoked_is_told_so(
    fleet: OperatorFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fleet.board_folder("kitchen") / "agent.toml"
    checks = told(capsys, config, 0)
    assert checks["broker"]["what"].startswith("connected to") and checks["certificate"]["what"].startswith("good until 20")
    revoke(fleet, "kitchen", "stolen")
    assert fleet.reload_broker()
    while (checks := told_any(capsys, config))["broker"]["verdict"] == "pass":
        pass  # until the broker has read its list
    assert "certificate revoked" in checks["broker"]["what"] and checks["broker"]["remedy"]


def told_any(capsys: pytest.CaptureFixture[str], config: Path) -> dict[str, Any]:
    assert cli.main(["self-test", "--config", str(config), "--json"]) in (0, 1)
    return {each["name"]: each for each in json.loads(capsys.readouterr().out)["checks"]}


def test_a_ca_of_another_fleet_fails_with_the_words_of_tls(
    fleet: OperatorFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = new_fleet(tmp_path / "other")
    board = fleet.board_folder("kitchen")
    (board / "ca.pem").write_bytes((other.folder / "ca" / "ca.pem").read_bytes())
    check = told(capsys, board / "agent.toml", 1)["broker"]
    assert check["verdict"] == "fail" and "not signed by our CA" in check["what"]


def test_help_does_not_load_what_the_test_needs() -> None:
    code = "import sys, edge_agent.cli as c; c.parser(); print(sorted({'numpy', 'cryptography', 'paho'} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert ended.stdout == "[]\n"
