"""``sly ota`` as processes, on a real Mosquitto with TLS: what is pushed, ordered, shown, kept for later and refused.

One fleet of two light boards (``tests.light_boards``) serves all tests of this file, one after another; each begins with whatever
is on the boards.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cli import main
from edge_agent.commands.ota_view import outcome, rollout_lines
from edge_agent.commands.terminal import WIDTH
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError
from edge_agent.steward.folder import OperatorFolder
from edge_agent.steward.journal import Journal
from edge_agent.steward.session import OperatorSession
from edge_agent.steward.status import rollout_status
from edge_agent.store.files import Disk
from edge_agent.transport.endpoint import BrokerAddress
from ota.charter import Charter, Enrolled
from ota.rollout import Action, Report, Rollout, Step
from tests.enrolled_fleet import MODEL, PATIENCE_S, QUICK, LightProcess, bad_file, enrolled, good_file, sly, told
from tests.operators import HOST, broker_of, new_fleet
from tests.rollouts import a_report, a_rollout, names

BOARDS = ["barn", "shop"]
ONE_BY_ONE = ("--canary", "1%", "--wave", "1%", "--untested")


@dataclass
class Fleet:
    operator: OperatorFolder
    folder: Path
    boards: LightProcess
    pushes: int = 0
    began: list[subprocess.Popen[str]] = field(default_factory=list)

    def good(self) -> Path:
        """A revision that no test pushed yet."""
        self.pushes += 1
        return good_file(self.folder / f"good{self.pushes}", bytes([self.pushes]) * 100_000)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """A command that goes on."""
        command = [sys.executable, "-m", "edge_agent.cli", *words, "--fleet", str(self.operator.folder)]
        self.began.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return self.began[-1]

    def serving(self) -> set[int]:
        """The releases that boards serve, as they say themselves."""
        return {number for number, _, _ in self.boards.serving().values()}

    def status(self) -> dict[str, Any]:
        (rollout,) = told(self.operator, "ota", "status", MODEL)["rollouts"]
        return rollout  # type: ignore[no-any-return]

    def pushed(self, *words: str) -> int:
        """The number of a good release that is on every board now."""
        done = sly(self.operator, "ota", "push", str(self.good()), "--untested", "--canary", "100%", "--json", *words)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["number"])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("ota")
    operator = new_fleet(folder / "op")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Disk, "fsync", lambda self, fd: None)
        patched.setattr(Disk, "fsync_folder", lambda self, path: None)
        for board in BOARDS:
            enrolled(operator, folder, board, "raspberry_pi", QUICK)
    with broker_of(operator), contextlib.closing(LightProcess(folder, BOARDS, "--quick")) as boards:
        assert sly(operator, "fleet", "publish").returncode == 0
        boards.wait_up()
        made = Fleet(operator, folder, boards)
        try:
            yield made
        finally:
            for process in made.began:
                process.kill()
                process.communicate(timeout=PATIENCE_S)


def contents(folder: Path) -> dict[Path, bytes]:
    """SHA-256 of every file of an operator's folder, but of the broker's own."""
    files = (path for path in folder.rglob("*") if path.is_file() and folder / "broker" not in path.parents)
    return {path: sha256(path.read_bytes()).digest() for path in files}


def until_line(process: subprocess.Popen[str], words: str) -> str:
    """The first line on stderr of a command that goes on in which ``words`` stand."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return line
    raise AssertionError("".join(seen))


def test_a_good_release_reaches_every_board_and_each_step_is_a_line_on_stderr(fleet: Fleet) -> None:
    path = fleet.good()
    done = sly(fleet.operator, "ota", "push", str(path), *ONE_BY_ONE)
    assert done.returncode == 0, done.stderr
    (number,) = fleet.serving()
    assert done.stdout.splitlines()[:4] == [
        f"rollout of {MODEL} {number}: done; every wave has settled",
        f"  canaries   [{'#' * 30}] 100 % here, 1 of 1 confirmed",
        f"  wave 1     [{'#' * 30}] 100 % here, 1 of 1 confirmed",
        f"  serving: release {number} on 2",
    ]
    states = [line for line in done.stderr.splitlines() if line.startswith(f"{MODEL} {number}: ")]
    assert len(states) == len(set(states)) >= 4 and "done; 2 confirmed" in states[-1]
    again = told(fleet.operator, "ota", "push", str(path), "--canary", "1%", "--untested")
    assert (again["number"], again["state"], again["given_bytes"]) == (number, "done", 0), "the same is no new release"


def test_a_bad_release_stops_at_the_canary_which_is_said_to_be_back(fleet: Fleet) -> None:
    before = fleet.serving()
    done = sly(fleet.operator, "ota", "push", str(bad_file(fleet.folder / "bad")), *ONE_BY_ONE)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    why = rf"rollout of {MODEL} \d+: stopped; 1 of the first 1 boards lost, allowed are 20 ‰; \w+: .*NaN"
    assert re.match(why, lines[0]) and fleet.serving() == before
    assert f"  canaries   [{'#' * 30}] 1 of 1 back, 1 FAILED" in lines and "  wave 1     not begun, 1 board" in lines
    assert any(line.startswith("  serving: release ") and line.endswith(" on 2") for line in lines)
    assert "LOST" not in done.stdout and " 0 %" not in done.stdout


def test_a_rollout_that_is_paused_begins_with_nobody_until_it_is_resumed(fleet: Fleet) -> None:
    before = fleet.serving()
    path = fleet.good()
    detached = told(fleet.operator, "ota", "push", str(path), "--canary", "100%", "--untested", "--detach")
    assert detached["state"] == "running" and detached["given_bytes"] == 0
    paused = sly(fleet.operator, "ota", "pause", MODEL, "--reason", "the shop is full")
    assert paused.returncode == 0 and "paused by ann: the shop is full" in paused.stdout
    assert fleet.serving() == before and fleet.status()["state"] == "paused"
    resumed = told(fleet.operator, "ota", "resume", MODEL)
    assert (resumed["state"], resumed["number"]) == ("done", detached["number"]) and fleet.serving() == {detached["number"]}


def test_who_ends_the_looking_on_leaves_the_rollout_in_the_fleet_which_an_abort_ends(fleet: Fleet) -> None:
    before = fleet.serving()
    path = good_file(fleet.folder / "large", bytes(range(256)) * 4000)
    looking = fleet.begin("ota", "push", str(path), "--max-rate", "20kB", "--untested")
    until_line(looking, "fetching")
    looking.send_signal(signal.SIGINT)
    out, err = looking.communicate(timeout=PATIENCE_S)
    assert (looking.returncode, out) == (130, "") and f"look on again with: sly ota resume {MODEL}" in err
    (entry, *_) = told(fleet.operator, "ota", "history", MODEL)
    assert (entry["number"], entry["state"]) == (fleet.status()["number"], "running"), "how it stood when somebody last looked"
    other = sly(fleet.operator, "ota", "push", str(fleet.good()), "--untested")
    assert other.returncode == 2 and "is under way" in other.stderr and f"sly ota abort {MODEL}" in other.stderr
    aborted = sly(fleet.operator, "ota", "abort", MODEL, "--reason", "too slow")
    assert aborted.returncode == 0 and "aborted; abort by ann: too slow" in aborted.stdout
    assert "1 of 1 back" in aborted.stdout and ": went back" in aborted.stdout and fleet.serving() == before
    after = sly(fleet.operator, "ota", "resume", MODEL)
    assert after.returncode == 2 and "after abort: got run" in after.stderr and "push it again: a new plan" in after.stderr


def test_what_was_done_is_rolled_back_to_the_release_before_and_history_has_it_first(fleet: Fleet) -> None:
    (before,) = fleet.serving()
    number = fleet.pushed()
    assert fleet.serving() == {number}
    done = sly(fleet.operator, "ota", "rollback", MODEL, "--reason", "wrong labels")
    assert done.returncode == 0, done.stderr
    assert f"[{'#' * 30}] 2 of 2 back" in done.stdout and f"serving: release {before or 'factory'} on 2" in done.stdout
    assert re.search("(barn, shop|shop, barn): went back", done.stdout) and fleet.serving() == {before}
    newest = told(fleet.operator, "ota", "history")[0]
    assert (newest["number"], newest["state"], newest["counts"]) == (number, "aborted", {"returned": 2})
    lines = sly(fleet.operator, "ota", "history", MODEL).stdout.splitlines()
    assert f"{MODEL} {number} " in lines[0] and lines[0].endswith("aborted; rollback by ann: wrong labels")
    assert max(map(len, lines)) <= WIDTH


WRONG = [
    (["push"], "the following arguments are required: model"),
    (["push", "nosuch"], "model: got nosuch; allowed: blazeface-back"),
    (["push", "nosuch.tflite"], "nosuch.tflite: No such file"),
    (["push", "EMPTY"], "allowed: wheels and wheelhouse.json"),
    (["push", "TEXT"], "flatbuffer"),
    (["push", "GOOD", "--to", "nobody"], "group nobody: got no board; allowed: one of: all"),
    (["push", "GOOD", "--class", "toaster"], "none of class toaster"),
    (["push", "GOOD", "--canary", "10"], "a share from 0% to 100%"),
    (["push", "GOOD", "--canary", "0%"], "a share above 0%"),
    (["push", "GOOD", "--wave", "101%"], "a share from 0% to 100%"),
    (["push", "GOOD", "--settled", "0%"], "a share above 0%"),
    (["push", "GOOD", "--max-rate", "fast"], "allowed: bytes, like 500kB or 2MB"),
    (["push", "GOOD", "--max-rate", "5000GB"], "at most 1 TB"),
    (["push", "GOOD", "--card", "nosuch.toml"], "nosuch.toml"),
    (["push", "GOOD", "--name", "A B"], "A B"),
    (["push", "resnet8-cifar10", "--models", "EMPTY"], "resnet8-cifar10.tflite"),
    (["push", MODEL, "--name", "mine"], "it with a .tflite file"),
    (["push", MODEL, "--card", "mine.toml"], "it with a .tflite file"),
    (["pause", "nosuch"], f"rollout of a model: got nosuch; allowed: {MODEL}"),
    (["status", "nosuch"], f"rollout of a model: got nosuch; allowed: {MODEL}"),
    (["abort", MODEL, "--reason", "two\nlines"], "--reason"),
    (["abort", MODEL, "--reason", "x" * 241], "--reason"),
    (["status", "--fleet", "/nowhere"], "a folder that sly fleet init made"),
    (["pack-agent", "EMPTY"], "which exists"),
    (["pack-agent", "NEW", "--source", "/nowhere"], "name one with --source"),
    (["nosuch"], "invalid choice"),
]


@pytest.mark.parametrize(("words", "why"), WRONG, ids=[" ".join(each[0])[:40] for each in WRONG])
def test_every_wrong_input_is_one_clear_line_and_changes_nothing(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    if not fleet.pushes:
        fleet.pushed()
    (tmp_path / "empty").mkdir()
    text = tmp_path / f"{MODEL}.tflite"
    text.write_text("no model at all " * 100)
    good = fleet.folder / f"good{fleet.pushes}" / f"{MODEL}.tflite"
    places = {"EMPTY": tmp_path / "empty", "TEXT": text, "GOOD": good, "NEW": tmp_path / "new"}
    folder = fleet.operator.folder
    before = contents(folder)
    monkeypatch.setenv("SLY_FLEET", str(folder))
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        assert main(["ota", *(str(places.get(word, word)) for word in words)]) == 2
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if not line.endswith(" ...")]
    assert captured.out == "" and len(said) == 1 and said[0].startswith("sly: ") and why in said[0], captured.err
    assert contents(folder) == before


def status_of(rollout: Rollout, *reports: Report) -> dict[str, Any]:
    """How a rollout stands by these reports, in a session that is not connected."""
    boards = {board: Enrolled(sha256(board.encode()).digest()) for board in rollout.plan.boards}
    session = OperatorSession(BrokerAddress(HOST, 1), Charter("home", 1, boards, {}), Signer(b"ann", bytes(32)))
    for each in reports:
        session.heard.hear_report(each)
    return rollout_status(session, rollout)


def test_a_screen_is_as_wide_as_its_terminal_and_waves_that_stand_alike_share_a_line() -> None:
    heard = [a_report(each, Step.CONFIRMED) for each in names(50)]
    running = a_rollout(200, canary=2, wave=6)
    lines = rollout_lines(status_of(running, *heard, a_report("b50", Step.FETCHING, permille=500)), 80)
    assert [line[2:12].rstrip() for line in lines[1:5]] == ["canaries", "waves 1-8", "wave 9", "waves 10-3"]
    ended = replace(running, action=Action.ABORT, reason="a reason that goes on " * 9)
    for rollout in (running, ended):
        for width in (80, 100, 130):
            lines = outcome(status_of(rollout, *heard, a_report("b51", Step.RETURNED, why="back " * 40)), width).splitlines()
            assert max(map(len, lines)) <= width and len(lines) <= 16, lines


def test_a_damaged_entry_of_the_journal_is_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.entries() == []
    rollout = a_rollout()
    journal.saw(rollout, status_of(rollout))
    assert journal.entries() == [], "of a rollout that was not ordered from here nothing is kept"
    journal.note(rollout)
    journal.saw(rollout, status_of(rollout))
    assert [each["state"] for each in journal.entries(rollout.plan.model)] == ["running"] and journal.entries("another") == []
    (tmp_path / "rollouts" / "torn.json").write_text('{"model": ')
    with pytest.raises(RefusedError, match=r"torn\.json.*move it away"):
        journal.entries()
