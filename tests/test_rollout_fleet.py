"""Fifty boards behind a real broker, and the real ``sly ota push``: eight agents, and 42 without engines in one process."""

from __future__ import annotations

import contextlib
from hashlib import sha256
from pathlib import Path

import pytest

from edge_agent.commands.terminal import WIDTH
from edge_agent.steward.folder import OperatorFolder
from edge_agent.store.files import Disk
from tests.enrolled_fleet import MODEL, QUICK, EnrolledAgents, LightProcess, bad_file, enrolled, good_file, sly, told
from tests.fetched import model_path
from tests.operators import broker_of, new_fleet

REAL = [f"real{i}" for i in range(8)]
LIGHT = [f"light{i:02d}" for i in range(42)]
GIVERS = REAL[:2]
TAKES_ONLY = {**QUICK, "ota": f"{QUICK['ota']}serve = false\n"}
SCREEN_LINES = 24
WAVES = ("--canary", "10%", "--wave", "50%", "--settled", "100%")


def enroll_all(operator: OperatorFolder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk: that is tested elsewhere."""
    with monkeypatch.context() as patched:
        patched.setattr(Disk, "fsync", lambda self, fd: None)
        patched.setattr(Disk, "fsync_folder", lambda self, path: None)
        for board in REAL:
            enrolled(operator, folder, board, "jalapeno", QUICK if board in GIVERS else TAKES_ONLY)
        for board in LIGHT:
            enrolled(operator, folder, board, "raspberry_pi", QUICK)


def everyone_serves(agents: EnrolledAgents, light: LightProcess, operator: OperatorFolder, number: int, digest: bytes) -> None:
    """By their own answers, their own tables, and what they told the fleet."""
    assert {board: agents.served_by(board) for board in REAL} == dict.fromkeys(REAL, digest)
    assert {board: (serving, confirmed) for board, (serving, confirmed, _) in light.serving().items()} == dict.fromkeys(
        LIGHT, (number, number)
    )
    (status,) = told(operator, "ota", "status", MODEL)["rollouts"]
    assert {each["board"]: each["serves"] for each in status["boards"]} == dict.fromkeys([*REAL, *LIGHT], number)


@pytest.mark.long
def test_a_release_that_fails_its_health_check_is_stopped_at_the_canaries_of_50_boards_and_a_good_one_reaches_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = sha256(model_path(MODEL).read_bytes()).digest()
    operator = new_fleet(tmp_path / "op")
    enroll_all(operator, tmp_path, monkeypatch)
    with (
        broker_of(operator),
        contextlib.closing(LightProcess(tmp_path, LIGHT)) as light,
        EnrolledAgents(tmp_path, REAL) as agents,
    ):
        assert sly(operator, "fleet", "publish").returncode == 0
        agents.start()
        light.wait_up()

        bad = bad_file(tmp_path / "bad")
        pushed = sly(operator, "ota", "push", str(bad), "--untested", *WAVES)
        print(pushed.stdout)
        assert pushed.returncode == 1, pushed.stderr
        stopped_at_the_canaries(pushed.stdout)
        everyone_serves(agents, light, operator, 0, factory)

        good = good_file(tmp_path / "good", bytes(100_000))
        pushed = sly(operator, "ota", "push", str(good), "--untested", *WAVES)
        assert pushed.returncode == 0, pushed.stderr
        assert "done; every wave has settled" in pushed.stdout and "serving: release 2 on 50" in pushed.stdout
        everyone_serves(agents, light, operator, 2, sha256(good.read_bytes()).digest())
        assert agents.stop() == [0] * len(REAL)


def stopped_at_the_canaries(screen: str) -> None:
    """All of it on one screen: who failed, why, and that everybody serves what was there before."""
    lines = screen.splitlines()
    assert len(lines) <= SCREEN_LINES and max(map(len, lines)) <= WIDTH
    assert lines[0].startswith(f"rollout of {MODEL} 1: stopped; ") and "of the first 5 boards lost" in screen
    failed = [line for line in lines if ": failed: " in line]
    assert failed and all("NaN" in line for line in failed), screen
    assert "serving: release factory on 50" in screen and screen.count("not begun") == 2
