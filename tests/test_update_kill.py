"""The real agent is killed with SIGKILL at random points of real updates; ``python -m tests.update_kills N`` does more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ota.rollout import Step
from ota.slots import State
from tests import update_kills
from tests.ota_board import TRIAL_BOOTS
from tests.ota_fleet import NUMBER, OtaFleet

FEW, MANY = 2, 50


@pytest.mark.parametrize(("kills", "worlds"), [(FEW, FEW), pytest.param(MANY, update_kills.WORLDS, marks=pytest.mark.long)])
def test_19_a_real_agent_killed_at_any_point_of_an_update_serves_again_forgets_nothing_and_ends_with_the_update(
    kills: int, worlds: int, tmp_path: Path
) -> None:
    found = update_kills.run(kills, tmp_path, worlds=worlds)
    assert sum(found.values()) == kills + worlds
    assert kills == FEW or (found["staging"] >= 3 and found["trial"] >= 3), found


def test_23_a_release_that_takes_its_board_down_at_each_start_is_given_up_for_good() -> None:
    fleet = OtaFleet("boot loop", 3, lambda board, when: "")
    board = fleet.boards["b00"]
    fleet.boot()
    fleet.push(canary=3, wave=1, max_error_permille=1000)
    for _ in range(TRIAL_BOOTS):
        fleet.run_until(lambda: board.slots.state is State.TRIAL and board.serving == NUMBER, "it serves the release on trial")
        board.kill()
        board.boot()
    fleet.run_until(fleet.has_arrived, "everybody has settled")
    assert (board.serving, board.trials, board.slots.state) == (0, TRIAL_BOOTS, State.ROLLED_BACK)
    assert board.progress is not None and board.progress.step is Step.FAILED and "without being confirmed" in board.progress.why
